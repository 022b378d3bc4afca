//! Large payloads, in place, by MPI's collectives that do not block.
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

impl Mpi {
    /// Waits for requests that use the caller's buffers.
    fn finish(&self, call: &Call, mut requests: Vec<Request>) -> Result<()> {
        let mut calls = ffi::calls();
        match poll(&mut calls, self.config.timeout, |calls| test_all(calls, &mut requests)) {
            Ok(true) => Ok(()),
            other => {
                // The buffers cannot be taken back from MPI: no error can be returned.
                let why = other.err().map_or_else(
                    || format!("not over after {:?}: a process has died", self.config.timeout),
                    |e| e.to_string(),
                );
                let rank = self.comm.rank;
                let error = Error::Engine { op: call.to_string(), reason: why };
                let group = self.recorder.name();
                eprintln!("rank {rank} of group {group}: {error}; all processes end");
                self.recorder.dump(&error);
                self.comm.abort()
            }
        }
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
        let send = Cuts::new(lens.iter().copied())?.without(me);
        let recv = Cuts::strided(mine, stride * 8 / size, n)?.without(me);
        let own = lens[..me].iter().sum::<usize>() * size;
        // SAFETY: the caller's contract; `parts` has room for each rank's.
        unsafe {
            let to = parts.as_mut_ptr().cast();
            let request = self.comm.all_to_all(&ffi::calls(), input, &send, to, &recv, size)?;
            self.finish(call, vec![request])?;
            let base = parts.as_ptr().cast::<u8>();
            let source = |r| if r == me { input.add(own) } else { base.add(r * stride * 8) };
            let sources: Vec<*const u8> = (0..n).map(source).collect();
            let op = call.op.unwrap_or(crate::ReduceOp::Sum);
            call.dtype.reduce(op, &sources, &[output], mine);
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
                let request = if call.verb == Verb::Reduce {
                    // Ranks but the root keep their buffers.
                    sum.resize((lens[me] * size).div_ceil(8), 0u64);
                    let to = sum.as_mut_ptr().cast::<u8>();
                    self.reduced(call, &mut turn.parts, input, &lens, to)?;
                    (send, recv) = (Cuts::same(0, n)?, Cuts::new(lens.iter().copied())?);
                    let root = call.root.unwrap_or(0);
                    self.comm.gather(&ffi::calls(), to, output, &recv, size, root)?
                } else {
                    let own = output.add(own);
                    self.reduced(call, &mut turn.parts, input, &lens, own)?;
                    // Open MPI takes equal addresses for `MPI_IN_PLACE`: so ours is one element
                    // before what is sent, which begins at offset 1.
                    send = Cuts { offsets: vec![1; n], ..Cuts::same(lens[me], n)? }.without(me);
                    recv = Cuts::new(lens.iter().copied())?.without(me);
                    let from = own.cast_const().wrapping_sub(size);
                    self.comm.all_to_all(&ffi::calls(), from, &send, output, &recv, size)?
                };
                self.finish(call, vec![request])?;
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
                Verb::AllReduce | Verb::Reduce => return self.reduce_in_pieces(call, turn, io),
                Verb::ReduceScatter => {
                    let lens: Vec<usize> = (0..n).map(|r| io.recv.len(r)).collect();
                    return self.reduced(call, &mut turn.parts, io.input, &lens, io.output);
                }
                Verb::AllGather => {
                    // Of Open MPI's collectives that do not block, the all-gather takes five times
                    // as long as an all-to-all of the same bytes (4.1, two ranks, 1 MiB).
                    let own = io.output.add(io.recv.offset(me) * size);
                    std::ptr::copy_nonoverlapping(io.input, own, io.recv.len(me) * size);
                    (send, recv) =
                        (Cuts::same(io.recv.len(me), n)?.without(me), cuts(io.recv)?.without(me));
                    vec![self.comm.all_to_all(
                        &ffi::calls(),
                        io.input,
                        &send,
                        io.output,
                        &recv,
                        size,
                    )?]
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
                    vec![self.comm.all_to_all(
                        &ffi::calls(),
                        io.input,
                        &send,
                        io.output,
                        &recv,
                        size,
                    )?]
                }
                Verb::Broadcast => {
                    vec![self.comm.broadcast(&ffi::calls(), io.output, call.len, size, root)?]
                }
                Verb::Shift => {
                    let (to, from) = ((me + root) % n, (me + n - root) % n);
                    let (calls, bytes) = (ffi::calls(), call.bytes());
                    let coming = self.comm.recv(&calls, io.output, bytes, from, SHIFTS)?;
                    vec![coming, self.comm.send(&calls, io.input, bytes, to, SHIFTS, false)?]
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
        // SAFETY: both buffers are ours until the request is finished.
        let request = unsafe {
            let (from, to) = (row.as_ptr().cast(), all.as_mut_ptr().cast());
            self.comm.all_to_all(&ffi::calls(), from, &same, to, &cuts, 8)?
        };
        self.finish(call, vec![request])?;
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
