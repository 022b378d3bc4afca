//! What a collective is once everybody has posted: chunks that anybody may work on.
//!
//! Each rank has a region: what it would do if all had a core and the same speed.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use smallvec::SmallVec;

use super::count::Wait;
use super::{Shared, Turn};
use crate::call::{Call, Verb};
use crate::engine::Parts;

/// Bytes of a chunk: large beside a claim, small beside what a rank does in a time slice.
const CHUNK: usize = 64 << 10;

/// Elements at whose multiples the slices of a reduction begin: whole cache lines of any type.
const LINE: usize = 64;

/// Bytes that a rank's input has, of a call whose `len` is agreed; none when the input is not
/// used.
pub(super) fn payload(call: &Call, rank: usize, ranks: usize) -> Option<usize> {
    match call.verb {
        Verb::AllReduce | Verb::Reduce | Verb::ReduceScatter | Verb::AllToAll | Verb::Shift => {
            Some(call.bytes())
        }
        Verb::AllGather | Verb::Gather => Some(call.bytes() / ranks),
        Verb::Broadcast | Verb::Scatter => (call.root == Some(rank)).then(|| call.bytes()),
        Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => None,
    }
}

/// A call that all ranks have posted.
pub(super) struct Work<'a> {
    shared: &'a Shared,
    call: &'a Call,
    sequence: u64,
    /// The same on all ranks, except in a ragged all-to-all, whose lengths are in the slots.
    parts: Parts<'a>,
    inputs: SmallVec<[*const u8; 8]>,
    outputs: SmallVec<[*mut u8; 8]>,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        call: &'a Call,
        sequence: u64,
        parts: Parts<'a>,
        inline: bool,
    ) -> Work<'a> {
        let entries = || (0..shared.ranks).map(|r| shared.recorder.entry(r, sequence));
        let inputs = if inline {
            (0..shared.ranks).map(|r| shared.slot(r, sequence).cast_const()).collect()
        } else {
            entries().map(|e| std::ptr::with_exposed_provenance(e.input.load(Relaxed))).collect()
        };
        let outputs =
            entries().map(|e| std::ptr::with_exposed_provenance_mut(e.output.load(Relaxed)));
        Work { shared, call, sequence, parts, inputs, outputs: outputs.collect() }
    }

    /// Or the places of a shift.
    fn root(&self) -> usize {
        self.call.root.unwrap_or(0)
    }

    /// Elements that `from` sends to `to` in an all-to-all.
    fn sent(&self, from: usize, to: usize) -> usize {
        match self.parts {
            Parts::Even(len) => len,
            Parts::Ragged(_) => self.shared.posted_len(self.sequence, from, to),
        }
    }

    /// Elements of a region.
    fn region(&self, r: usize) -> usize {
        let (len, n) = (self.call.len, self.shared.ranks);
        match self.call.verb {
            Verb::AllReduce | Verb::Reduce => slice(len, r + 1, n) - slice(len, r, n),
            Verb::ReduceScatter | Verb::Scatter => self.parts.len(r),
            Verb::AllGather | Verb::Shift => len,
            Verb::Gather => {
                if r == self.root() {
                    len
                } else {
                    0
                }
            }
            Verb::Broadcast => {
                if r == self.root() {
                    0
                } else {
                    len
                }
            }
            Verb::AllToAll => (0..n).map(|from| self.sent(from, r)).sum(),
            Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => 0,
        }
    }

    /// Works on elements `at..at + len` of region `r`.
    ///
    /// # Safety
    /// All buffers are as the call says, and nobody else works on these elements.
    unsafe fn run(&self, r: usize, at: usize, len: usize) {
        let size = self.call.dtype.size();
        let n = self.shared.ranks;
        // SAFETY: offsets and lengths stay inside buffers that the call describes; inputs are
        // only read, except where they are outputs too, of which these elements are ours.
        unsafe {
            let copy = |from: *const u8, from_at: usize, to: *mut u8, to_at: usize, len: usize| {
                std::ptr::copy_nonoverlapping(
                    from.add(from_at * size),
                    to.add(to_at * size),
                    len * size,
                );
            };
            let reduce = |start: usize, targets: &[*mut u8]| {
                let sources: SmallVec<[*const u8; 8]> =
                    self.inputs.iter().map(|s| s.add(start * size)).collect();
                let op = self.call.op.unwrap_or(crate::ReduceOp::Sum);
                self.call.dtype.reduce(op, &sources, targets, len);
            };
            match self.call.verb {
                Verb::AllReduce => {
                    let start = slice(self.call.len, r, n) + at;
                    let targets: SmallVec<[*mut u8; 8]> =
                        self.outputs.iter().map(|t| t.add(start * size)).collect();
                    reduce(start, &targets);
                }
                Verb::Reduce => {
                    let start = slice(self.call.len, r, n) + at;
                    reduce(start, &[self.outputs[self.root()].add(start * size)]);
                }
                Verb::ReduceScatter => {
                    let start = self.parts.offset(r) + at;
                    reduce(start, &[self.outputs[r].add(at * size)]);
                }
                Verb::Shift => {
                    copy(self.inputs[(r + n - self.root()) % n], at, self.outputs[r], at, len)
                }
                Verb::Broadcast => copy(self.inputs[self.root()], at, self.outputs[r], at, len),
                Verb::Scatter => {
                    let start = self.parts.offset(r) + at;
                    copy(self.inputs[self.root()], start, self.outputs[r], at, len);
                }
                Verb::AllGather | Verb::Gather | Verb::AllToAll => {
                    // The region is an output, made of one part from each rank.
                    let mut begin = 0;
                    for from in 0..n {
                        let part = match self.call.verb {
                            Verb::AllToAll => self.sent(from, r),
                            _ => self.parts.len(from),
                        };
                        let (a, b) = (at.max(begin), (at + len).min(begin + part));
                        if a < b {
                            let before = match self.call.verb {
                                Verb::AllToAll => (0..r).map(|to| self.sent(from, to)).sum(),
                                _ => 0,
                            };
                            copy(self.inputs[from], before + a - begin, self.outputs[r], a, b - a);
                        }
                        begin += part;
                    }
                }
                Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => {}
            }
        }
    }

    /// A small payload: this rank does what it needs from the slots, and nothing else.
    ///
    /// # Safety
    /// Every slot holds its rank's payload, and `output` is this rank's.
    pub(super) unsafe fn alone(&self, rank: usize, output: *mut u8) {
        // SAFETY: the caller's contract; only this rank's output is written.
        unsafe {
            match self.call.verb {
                Verb::AllReduce => self.reduce_all(output),
                Verb::Reduce if rank == self.root() => self.reduce_all(output),
                Verb::Reduce => {}
                _ => self.run(rank, 0, self.region(rank)),
            }
        }
    }

    /// # Safety
    /// [`Work::alone`].
    unsafe fn reduce_all(&self, output: *mut u8) {
        let op = self.call.op.unwrap_or(crate::ReduceOp::Sum);
        // SAFETY: the caller's contract.
        unsafe { self.call.dtype.reduce(op, &self.inputs, &[output], self.call.len) };
    }

    /// A large payload: takes chunks until none is left, and waits for those others took.
    ///
    /// # Safety
    /// Every rank has posted buffers as the call says and comes here, or finds nothing left.
    pub(super) unsafe fn share(&self, rank: usize, turn: &mut Turn) {
        let n = self.shared.ranks;
        let chunk = (CHUNK / self.call.dtype.size()).max(1);
        let (mut mine, mut all) = (0, 0);
        for r in (rank..n).chain(0..rank) {
            let region = self.region(r);
            let (first, count) = (turn.claimed[r], region.div_ceil(chunk) as u64);
            while let Some(claim) = self.claim(r, first + count) {
                let at = (claim - first) as usize * chunk;
                // SAFETY: the claim is ours alone.
                unsafe { self.run(r, at, chunk.min(region - at)) };
                mine += 1;
            }
            turn.claimed[r] += count;
            all += count;
        }
        turn.done += all;
        if mine > 0 {
            self.shared.done.add(mine, turn.done);
        }
        if all > 0 {
            // Whoever holds a chunk runs nothing but the lines above: this ends.
            let nap = Duration::from_secs(1);
            let wait = self.shared.done.wait(turn.done, self.shared.patience, nap, || false);
            debug_assert_eq!(wait, Wait::Reached);
        }
    }

    /// The next chunk of region `r`, counted since the group was made.
    fn claim(&self, r: usize, end: u64) -> Option<u64> {
        let claims = &self.shared.claims[r].0;
        let mut next = claims.load(Relaxed);
        while next < end {
            match claims.compare_exchange_weak(next, next + 1, Relaxed, Relaxed) {
                Ok(_) => return Some(next),
                Err(now) => next = now,
            }
        }
        None
    }
}

/// Where slice `r` of `n` of a reduction of `len` elements begins.
fn slice(len: usize, r: usize, n: usize) -> usize {
    if r == n { len } else { len * r / n / LINE * LINE }
}
