//! Large payloads, in place, by messages and by MPI's collectives that do not block.
//!
//! All ranks are here and agree: between handshake and end runs nothing but MPI and this file.
//! Should that not end in time, a process has died, and all are ended by `MPI_Abort`, as MPI itself
//! does. Reductions are ours, in rank order: an all-reduce is an all-to-all of slices, a local sum,
//! and the sums to all, 2n(p-1)/p, as the best of MPI's own.

use super::ffi::{self, Cuts, Request, poll, test_all};
use super::handshake::Turn;
use super::{Mpi, SHIFTS};
use crate::call::{Call, Verb};
use crate::engine::{Io, Parts};
use crate::error::{Error, Result};
use crate::layout::{self, slice};

/// Large reductions go through pieces of this many bytes, which stay in the cache.
const PIECE: usize = 2 << 20;

/// Pieces of a reduce between two ranks: one is reduced while the next comes.
const STEP: usize = 256 << 10;

impl Mpi {
    /// Waits for requests that use the caller's buffers.
    fn finish(&self, call: &Call, mut requests: Vec<Request>) -> Result<()> {
        let mut calls = ffi::calls();
        match poll(&mut calls, self.config.timeout, |calls| test_all(calls, &mut requests)) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let waited = self.config.timeout;
                self.end(call, format!("not over after {waited:?}: a process has died"))
            }
            Err(e) => self.end(call, e.to_string()),
        }
    }

    /// What was started, when requests already use the caller's buffers.
    fn sure<T>(&self, call: &Call, started: Result<T>) -> T {
        started.unwrap_or_else(|e| self.end(call, e.to_string()))
    }

    /// The buffers cannot be taken back from MPI, so no error can be returned: all processes end.
    fn end(&self, call: &Call, reason: String) -> ! {
        let (rank, group) = (self.comm.rank, self.recorder.name());
        let error = Error::Engine { op: call.to_string(), reason };
        eprintln!("rank {rank} of group {group}: {error}; all processes end");
        self.recorder.dump(&error);
        self.comm.abort()
    }

    /// An all-to-all of slices, and this rank's reduced into `output`, which may be its slice of
    /// `input`.
    ///
    /// # Safety
    /// `input` holds `lens[r]` elements for each rank r, one after the other; `output` this rank's.
    unsafe fn reduced(
        &self,
        call: &Call,
        parts: &mut Vec<u64>,
        input: *const u8,
        lens: &[usize],
        output: *mut u8,
    ) -> Result<()> {
        let (me, n, size) = (self.comm.rank, self.comm.size, call.dtype.size());
        let mine = lens[me];
        // Words, so that any type is aligned; each source begins at one.
        let stride = (mine * size).div_ceil(8);
        if parts.len() < stride * n {
            parts.resize(stride * n, 0);
        }
        let send = Cuts::new(lens.iter().copied())?;
        let recv = Cuts::strided(mine, stride * 8 / size, n)?;
        let own = lens[..me].iter().sum::<usize>() * size;
        // SAFETY: the caller's contract; `parts` has room for each rank's.
        unsafe {
            let to = parts.as_mut_ptr().cast();
            let going = self.comm.all_to_all(&ffi::calls(), input, &send, to, &recv, size);
            self.finish(call, self.sure(call, going))?;
            let base = parts.as_ptr().cast::<u8>();
            let source = |r| if r == me { input.add(own) } else { base.add(r * stride * 8) };
            let sources: Vec<*const u8> = (0..n).map(source).collect();
            let op = call.op.unwrap_or(crate::ReduceOp::Sum);
            call.dtype.reduce(op, &sources, &[output], mine);
        }
        Ok(())
    }

    /// A large reduce of two ranks: the root takes the other's pieces as they come.
    ///
    /// # Safety
    /// [`Mpi::transfer`].
    unsafe fn reduce_pair(&self, call: &Call, parts: &mut Vec<u64>, io: &Io<'_>) -> Result<()> {
        let (me, root, size) = (self.comm.rank, call.root.unwrap_or(0), call.dtype.size());
        let (bytes, peer) = (call.bytes(), 1 - me);
        let piece = |at: usize| STEP.min(bytes - at);
        if parts.len() < 2 * STEP / 8 {
            parts.resize(2 * STEP / 8, 0);
        }
        let base = parts.as_mut_ptr().cast::<u8>();
        // SAFETY: the caller's contract; a piece lies in the buffers at `at`, and in one half of
        // `parts`, which is not read before the request that fills it has ended.
        let start = |k: usize| unsafe {
            let (at, calls) = (k * STEP, ffi::calls());
            if me == root {
                let half = base.add(k % 2 * STEP);
                self.comm.recv(&calls, half, piece(at), peer, SHIFTS)
            } else {
                self.comm.send(&calls, io.input.add(at), piece(at), peer, SHIFTS, false)
            }
        };
        let mut coming = Some(self.sure(call, start(0)));
        for at in (0..bytes).step_by(STEP) {
            let k = at / STEP;
            let next = (at + STEP < bytes).then(|| self.sure(call, start(k + 1)));
            self.finish(call, coming.into_iter().collect())?;
            coming = next;
            if me == root {
                let op = call.op.unwrap_or(crate::ReduceOp::Sum);
                // SAFETY: as above; the piece has come.
                unsafe {
                    let theirs = base.cast_const().add(k % 2 * STEP);
                    let mut sources = [io.input.add(at), theirs];
                    sources.rotate_left(me);
                    call.dtype.reduce(op, &sources, &[io.output.add(at)], piece(at) / size);
                }
            }
        }
        Ok(())
    }

    /// A large all-reduce or reduce, piece by piece.
    ///
    /// # Safety
    /// [`Mpi::transfer`].
    unsafe fn reduce_in_pieces(&self, call: &Call, turn: &mut Turn, io: &Io<'_>) -> Result<()> {
        let (me, n, size) = (self.comm.rank, self.comm.size, call.dtype.size());
        let piece = (PIECE / size).max(n);
        let mut sum = vec![];
        for at in (0..call.len).step_by(piece) {
            let len = piece.min(call.len - at);
            let lens: Vec<usize> =
                (0..n).map(|r| slice(len, r + 1, n) - slice(len, r, n)).collect();
            let own = slice(len, me, n) * size;
            // Until the request has ended.
            let (send, recv);
            // SAFETY: the caller's contract; the slices of a piece are inside the buffer, and what
            // is sent and what is received do not overlap.
            unsafe {
                let (input, output) = (io.input.add(at * size), io.output.add(at * size));
                let requests = if call.verb == Verb::Reduce {
                    // Ranks but the root keep their buffers.
                    sum.resize((lens[me] * size).div_ceil(8), 0u64);
                    let to = sum.as_mut_ptr().cast::<u8>();
                    self.reduced(call, &mut turn.parts, input, &lens, to)?;
                    (send, recv) = (Cuts::same(0, n)?, Cuts::new(lens.iter().copied())?);
                    let root = call.root.unwrap_or(0);
                    vec![self.comm.gather(&ffi::calls(), to, output, &recv, size, root)?]
                } else {
                    let own = output.add(own);
                    self.reduced(call, &mut turn.parts, input, &lens, own)?;
                    (send, recv) = (Cuts::same(lens[me], n)?, Cuts::new(lens.iter().copied())?);
                    let own = own.cast_const();
                    let going =
                        self.comm.all_to_all(&ffi::calls(), own, &send, output, &recv, size);
                    self.sure(call, going)
                };
                self.finish(call, requests)?;
            }
            drop((send, recv));
        }
        Ok(())
    }

    /// A large payload, after the handshake.
    ///
    /// # Safety
    /// [`crate::engine::Engine::collective`].
    pub(super) unsafe fn transfer(&self, call: &Call, turn: &mut Turn, io: &Io<'_>) -> Result<()> {
        let (me, n, size) = (self.comm.rank, self.comm.size, call.dtype.size());
        let root = call.root.unwrap_or(0);
        let cuts = |p: Parts<'_>| Cuts::new((0..n).map(|r| p.len(r)));
        // What MPI must not move before it has ended: lengths and offsets.
        let (send, recv);
        // SAFETY: the caller's contract gives every buffer; each request is finished before
        // this returns.
        let requests = unsafe {
            match call.verb {
                Verb::Reduce if n == 2 => return self.reduce_pair(call, &mut turn.parts, io),
                Verb::AllReduce | Verb::Reduce => return self.reduce_in_pieces(call, turn, io),
                Verb::ReduceScatter => {
                    let lens: Vec<usize> = (0..n).map(|r| io.recv.len(r)).collect();
                    return self.reduced(call, &mut turn.parts, io.input, &lens, io.output);
                }
                Verb::AllGather => {
                    let own = io.output.add(io.recv.offset(me) * size);
                    std::ptr::copy_nonoverlapping(io.input, own, io.recv.len(me) * size);
                    (send, recv) = (Cuts::same(io.recv.len(me), n)?, cuts(io.recv)?);
                    let (from, to) = (io.input, io.output);
                    let going = self.comm.all_to_all(&ffi::calls(), from, &send, to, &recv, size);
                    self.sure(call, going)
                }
                Verb::Gather => {
                    recv = cuts(io.recv)?;
                    vec![self.comm.gather(&ffi::calls(), io.input, io.output, &recv, size, root)?]
                }
                Verb::Scatter => {
                    recv = cuts(io.recv)?;
                    vec![self.comm.scatter(
                        &ffi::calls(),
                        io.input,
                        io.output,
                        &recv,
                        size,
                        root,
                    )?]
                }
                Verb::AllToAll => {
                    (send, recv) = (cuts(io.send)?, cuts(io.recv)?);
                    let own = io.input.add(io.send.offset(me) * size);
                    let to = io.output.add(io.recv.offset(me) * size);
                    std::ptr::copy_nonoverlapping(own, to, io.recv.len(me) * size);
                    let (from, to) = (io.input, io.output);
                    let going = self.comm.all_to_all(&ffi::calls(), from, &send, to, &recv, size);
                    self.sure(call, going)
                }
                Verb::Broadcast => {
                    vec![self.comm.broadcast(&ffi::calls(), io.output, call.len, size, root)?]
                }
                Verb::Shift => {
                    let (to, from) = ((me + root) % n, (me + n - root) % n);
                    let (calls, bytes) = (ffi::calls(), call.bytes());
                    let coming = self.comm.recv(&calls, io.output, bytes, from, SHIFTS)?;
                    let going = self.comm.send(&calls, io.input, bytes, to, SHIFTS, false);
                    vec![coming, self.sure(call, going)]
                }
                Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => return Ok(()),
            }
        };
        self.finish(call, requests)
    }

    /// Ragged all-to-alls: every rank compares what all send with what all expect.
    pub(super) fn agree_on_parts(&self, call: &Call, sequence: u64, io: &Io<'_>) -> Result<()> {
        let n = self.comm.size;
        let row: Vec<u64> = (0..2 * n)
            .map(|i| if i < n { io.send.len(i) } else { io.recv.len(i - n) } as u64)
            .collect();
        let mut all = vec![0u64; 2 * n * n];
        let (same, cuts) = (Cuts::same(2 * n, n)?, Cuts::strided(2 * n, 2 * n, n)?);
        all[2 * n * self.comm.rank..][..2 * n].copy_from_slice(&row);
        // SAFETY: both buffers are ours until the requests are finished.
        let requests = unsafe {
            let (from, to) = (row.as_ptr().cast(), all.as_mut_ptr().cast());
            self.comm.all_to_all(&ffi::calls(), from, &same, to, &cuts, 8)
        };
        self.finish(call, self.sure(call, requests))?;
        let posted = |rank, i| all[2 * n * rank + i];
        let Some((from, to, sends, expects)) = layout::unequal_parts(n, posted) else {
            return Ok(());
        };
        let of = |len: u64| Call { len: len as usize, ..*call }.to_string();
        self.fail(Error::Mismatch {
            group: self.recorder.name().into(),
            sequence,
            left_rank: from,
            left: of(sends),
            right_rank: to,
            right: of(expects),
        })
    }
}
