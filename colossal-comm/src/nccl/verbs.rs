//! Every verb as calls of NCCL on device addresses.
//!
//! What NCCL has no call for is a group of sends and receives, of broadcasts (parts of any length
//! to all) or of reductions (parts of any length from all); a group is one launch.

use std::ffi::{c_int, c_void};

use super::library::{IN_PROGRESS, Nccl, RawComm, RawStream, datatype, operation};
use crate::call::{Call, Verb};
use crate::engine::{Io, Parts, Way};

/// Where calls go: a communicator, and a stream that orders them.
pub(super) struct To<'a> {
    pub(super) nccl: &'a Nccl,
    pub(super) comm: RawComm,
    pub(super) stream: RawStream,
    pub(super) rank: usize,
    pub(super) ranks: usize,
}

impl To<'_> {
    /// Puts a collective on the stream; NCCL's first word that is not success.
    ///
    /// # Safety
    /// `io` holds device addresses of what the call says, valid until the stream has passed it.
    pub(super) unsafe fn collective(&self, call: &Call, io: &Io<'_>) -> c_int {
        let (input, output) = (io.input.cast::<c_void>(), io.output.cast::<c_void>());
        let (nccl, comm, stream) = (self.nccl, self.comm, self.stream);
        let (t, len, n) = (datatype(call.dtype), call.len, self.ranks);
        let op = call.op.map_or(0, operation);
        let root = call.root.unwrap_or(0);
        let even = |parts: Parts<'_>| matches!(parts, Parts::Even(_));
        // SAFETY: the caller's contract; lengths and offsets are those of the call.
        unsafe {
            match call.verb {
                Verb::AllReduce => (nccl.ncclAllReduce)(input, output, len, t, op, comm, stream),
                Verb::Reduce => {
                    (nccl.ncclReduce)(input, output, len, t, op, root as c_int, comm, stream)
                }
                Verb::Broadcast => {
                    (nccl.ncclBroadcast)(input, output, len, t, root as c_int, comm, stream)
                }
                Verb::ReduceScatter if even(io.recv) => {
                    let part = io.recv.len(self.rank);
                    (nccl.ncclReduceScatter)(input, output, part, t, op, comm, stream)
                }
                Verb::AllGather if even(io.recv) => {
                    let part = io.recv.len(self.rank);
                    (nccl.ncclAllGather)(input, output, part, t, comm, stream)
                }
                Verb::ReduceScatter => self.together(|to| {
                    (0..n).find_map(|r| {
                        let from = io.input.add(io.recv.offset(r) * call.dtype.size());
                        let (len, r) = (io.recv.len(r), r as c_int);
                        let reduce = to.nccl.ncclReduce;
                        to.unless_empty(len, || {
                            reduce(from.cast(), output, len, t, op, r, comm, stream)
                        })
                    })
                }),
                Verb::AllGather => self.together(|to| {
                    (0..n).find_map(|r| {
                        let part = io.output.add(io.recv.offset(r) * call.dtype.size());
                        let (len, r) = (io.recv.len(r), r as c_int);
                        let broadcast = to.nccl.ncclBroadcast;
                        to.unless_empty(len, || {
                            broadcast(input, part.cast(), len, t, r, comm, stream)
                        })
                    })
                }),
                Verb::AllToAll => self.together(|to| {
                    (0..n).find_map(|r| {
                        let (sends, receives) = (io.send.len(r), io.recv.len(r));
                        let from = io.input.add(io.send.offset(r) * call.dtype.size());
                        let into = io.output.add(io.recv.offset(r) * call.dtype.size());
                        to.message(Way::Send, from.cast_mut(), sends, t, r)
                            .or_else(|| to.message(Way::Recv, into, receives, t, r))
                    })
                }),
                Verb::Gather => self.together(|to| {
                    let part = io.recv.len(self.rank);
                    let sent = to.message(Way::Send, io.input.cast_mut(), part, t, root);
                    let receives = if self.rank == root { n } else { 0 };
                    sent.or_else(|| {
                        (0..receives).find_map(|r| {
                            let into = io.output.add(io.recv.offset(r) * call.dtype.size());
                            to.message(Way::Recv, into, io.recv.len(r), t, r)
                        })
                    })
                }),
                Verb::Scatter => self.together(|to| {
                    let sends = if self.rank == root { n } else { 0 };
                    let sent = (0..sends).find_map(|r| {
                        let from = io.input.add(io.recv.offset(r) * call.dtype.size());
                        to.message(Way::Send, from.cast_mut(), io.recv.len(r), t, r)
                    });
                    let part = io.recv.len(self.rank);
                    sent.or_else(|| to.message(Way::Recv, io.output, part, t, root))
                }),
                Verb::Shift => self.together(|to| {
                    let (next, before) = ((self.rank + root) % n, (self.rank + n - root) % n);
                    to.message(Way::Send, io.input.cast_mut(), len, t, next)
                        .or_else(|| to.message(Way::Recv, io.output, len, t, before))
                }),
                Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => 0,
            }
        }
    }

    /// One launch of all that `calls` make; they return NCCL's first refusal.
    pub(super) fn together(&self, calls: impl FnOnce(&Self) -> Option<c_int>) -> c_int {
        // SAFETY: a group begins and ends on this thread, whatever happens between.
        unsafe {
            let started = (self.nccl.ncclGroupStart)();
            if started != 0 {
                return started;
            }
            let refused = calls(self);
            let ended = (self.nccl.ncclGroupEnd)();
            refused.unwrap_or(ended)
        }
    }

    /// A message inside [`To::together`]: none when all is well.
    ///
    /// # Safety
    /// [`To::collective`].
    pub(super) unsafe fn message(
        &self,
        way: Way,
        address: *mut u8,
        len: usize,
        t: c_int,
        peer: usize,
    ) -> Option<c_int> {
        let (nccl, comm, stream, peer) = (self.nccl, self.comm, self.stream, peer as c_int);
        let address = address.cast::<c_void>();
        // SAFETY: the caller's contract.
        self.unless_empty(len, || unsafe {
            match way {
                Way::Send => (nccl.ncclSend)(address, len, t, peer, comm, stream),
                Way::Recv => (nccl.ncclRecv)(address, len, t, peer, comm, stream),
            }
        })
    }

    /// NCCL's refusal, if it refuses; parts of no length are no call.
    fn unless_empty(&self, len: usize, call: impl FnOnce() -> c_int) -> Option<c_int> {
        (len > 0).then(call).filter(|code| !matches!(*code, 0 | IN_PROGRESS))
    }
}
