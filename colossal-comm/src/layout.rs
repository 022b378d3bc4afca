//! Who gives what to whom: the geometry of every verb, over addresses.
//!
//! Each rank has a region: what it would do if all had a core and the same speed.

use smallvec::SmallVec;

use crate::call::{Call, Verb};
use crate::engine::Parts;

/// Elements at whose multiples the slices of a reduction begin: whole cache lines of any type.
const LINE: usize = 64;

/// Bytes that a rank's input has, of a call whose `len` is agreed; none when the input is not
/// used.
pub(crate) fn payload(call: &Call, rank: usize, ranks: usize) -> Option<usize> {
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
pub(crate) struct Layout<'a> {
    pub(crate) call: &'a Call,
    pub(crate) ranks: usize,
    /// The same on all ranks, except in a ragged all-to-all.
    pub(crate) parts: Parts<'a>,
    /// Elements that one rank sends to another in a ragged all-to-all.
    pub(crate) sent: &'a dyn Fn(usize, usize) -> usize,
    pub(crate) inputs: SmallVec<[*const u8; 8]>,
    pub(crate) outputs: SmallVec<[*mut u8; 8]>,
}

impl Layout<'_> {
    /// Or the places of a shift.
    fn root(&self) -> usize {
        self.call.root.unwrap_or(0)
    }

    /// Elements that `from` sends to `to` in an all-to-all.
    fn sent(&self, from: usize, to: usize) -> usize {
        match self.parts {
            Parts::Even(len) => len,
            Parts::Ragged(_) => (self.sent)(from, to),
        }
    }

    /// Elements of a region.
    pub(crate) fn region(&self, r: usize) -> usize {
        let (len, n) = (self.call.len, self.ranks);
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
    pub(crate) unsafe fn run(&self, r: usize, at: usize, len: usize) {
        let op = self.call.op.unwrap_or(crate::ReduceOp::Sum);
        // SAFETY: the caller's contract; `run_by` hands out what the call describes.
        unsafe {
            self.run_by(
                (r, at, len),
                |from, to, bytes| std::ptr::copy_nonoverlapping(from, to, bytes),
                |sources, targets, len| self.call.dtype.reduce(op, sources, targets, len),
            );
        }
    }

    /// The same by whoever can copy bytes and reduce elements where the buffers are.
    ///
    /// # Safety
    /// All buffers are as the call says. What is handed to `copy` and `reduce` lies inside them;
    /// inputs are only read, except where they are outputs too, of which these elements are ours.
    pub(crate) unsafe fn run_by(
        &self,
        (r, at, len): (usize, usize, usize),
        mut copy: impl FnMut(*const u8, *mut u8, usize),
        mut reduce: impl FnMut(&[*const u8], &[*mut u8], usize),
    ) {
        let size = self.call.dtype.size();
        let n = self.ranks;
        // SAFETY: offsets and lengths stay inside buffers that the call describes.
        unsafe {
            let mut copy =
                |from: *const u8, from_at: usize, to: *mut u8, to_at: usize, len: usize| {
                    copy(from.add(from_at * size), to.add(to_at * size), len * size);
                };
            let mut reduce = |start: usize, targets: &[*mut u8]| {
                let sources: SmallVec<[*const u8; 8]> =
                    self.inputs.iter().map(|s| s.add(start * size)).collect();
                reduce(&sources, targets, len);
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
    pub(crate) unsafe fn alone(&self, rank: usize, output: *mut u8) {
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
    /// [`Layout::alone`].
    unsafe fn reduce_all(&self, output: *mut u8) {
        let op = self.call.op.unwrap_or(crate::ReduceOp::Sum);
        // SAFETY: the caller's contract.
        unsafe { self.call.dtype.reduce(op, &self.inputs, &[output], self.call.len) };
    }
}

/// Ragged all-to-alls: each rank posts two rows, what it sends to each and what it expects of each.
/// The first pair that differs: from, to, what is sent, what is expected. `posted` reads word `i`
/// of a rank's rows.
pub(crate) fn unequal_parts(
    ranks: usize,
    posted: impl Fn(usize, usize) -> u64,
) -> Option<(usize, usize, u64, u64)> {
    (0..ranks).flat_map(|from| (0..ranks).map(move |to| (from, to))).find_map(|(from, to)| {
        let (sends, expects) = (posted(from, to), posted(to, ranks + from));
        (sends != expects).then_some((from, to, sends, expects))
    })
}

/// Where slice `r` of `n` of a reduction of `len` elements begins.
pub(crate) fn slice(len: usize, r: usize, n: usize) -> usize {
    if r == n { len } else { len * r / n / LINE * LINE }
}
