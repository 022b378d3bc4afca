//! Calls on slices of the host: a handshake, as over MPI, and large payloads through the device.

use std::ffi::c_void;

use super::library::datatype;
use super::{Nccl, Turn};
use crate::call::{Call, Verb};
use crate::element::DType;
use crate::engine::{Io, Parts};
use crate::error::{Error, Result};
use crate::header::{HEADER, Header};
use crate::layout;

/// Payloads up to this many bytes travel inside the packet of the handshake.
pub(super) const INLINE: usize = 1024;
pub(super) const PACKET: usize = HEADER + INLINE;

impl Nccl {
    /// Tells all ranks what this one calls, with `bytes` bytes of `payload`; afterwards all packets
    /// are in `turn.theirs`.
    ///
    /// # Safety
    /// `payload` holds as many bytes, at most [`INLINE`].
    pub(super) unsafe fn handshake(
        &self,
        turn: &mut Turn,
        call: &Call,
        sequence: u64,
        (payload, bytes): (*const u8, usize),
    ) -> Result<()> {
        let inner = &*self.inner;
        let (device, n, stream) = (&inner.world.device, inner.members.len(), turn.stream);
        let packet: &mut [u8] = bytemuck::cast_slice_mut(&mut turn.mine);
        packet[..HEADER].copy_from_slice(bytemuck::bytes_of(&Header::new(call, sequence)));
        if bytes > 0 {
            // SAFETY: the caller's contract; the packet has room.
            unsafe {
                std::ptr::copy_nonoverlapping(payload, packet[HEADER..].as_mut_ptr(), bytes);
            }
        }
        let at = turn.packets.at_least(device, (n + 1) * PACKET)?;
        let (from, to) = (at as *const c_void, (at + PACKET as u64) as *mut c_void);
        let u8s = datatype(DType::U8);
        // SAFETY: the packets are ours, and left to the driver for ever should this fail; the
        // device's memory has room for all.
        let told = unsafe {
            device
                .copy_in(at, turn.mine.as_ptr().cast(), PACKET, stream)
                .and_then(|()| {
                    inner.issue(call, sequence, &inner.comm, |nccl, comm| {
                        (nccl.ncclAllGather)(from, to, PACKET, u8s, comm, stream.0)
                    })
                })
                .and_then(|()| {
                    device.copy_out(turn.theirs.as_mut_ptr().cast(), to as u64, n * PACKET, stream)
                })
                .and_then(|()| inner.finish(call, sequence, stream))
        };
        if let Err(e) = told {
            std::mem::forget(std::mem::take(&mut turn.mine));
            std::mem::forget(std::mem::take(&mut turn.theirs));
            return inner.fail(e);
        }
        let bytes: &[u8] = bytemuck::cast_slice(&turn.theirs);
        let of = |r: usize| -> Header {
            bytemuck::pod_read_unaligned(&bytes[r * PACKET..r * PACKET + HEADER])
        };
        let first = of(0);
        match (1..n).find(|r| !of(*r).same(&first)) {
            None => Ok(()),
            Some(other) => inner.fail(Error::Mismatch {
                group: inner.recorder.name().into(),
                sequence,
                left_rank: 0,
                left: first.show(),
                right_rank: other,
                right: of(other).show(),
            }),
        }
    }

    /// A large payload of the host: to the device, through NCCL, and back.
    pub(super) fn transfer(
        &self,
        turn: &mut Turn,
        call: &Call,
        sequence: u64,
        io: &Io<'_>,
    ) -> Result<()> {
        let inner = &*self.inner;
        let (device, n, stream) = (&inner.world.device, inner.members.len(), turn.stream);
        let size = call.dtype.size();
        let (reads, writes) = extents(call, inner.rank, n, io);
        let input = turn.input.at_least(device, reads * size)?;
        let output = match std::ptr::eq(io.input, io.output) {
            true => input,
            false => turn.output.at_least(device, writes * size)?,
        };
        let there = Io { input: input as *const u8, output: output as *mut u8, ..*io };
        // SAFETY: the buffers of the host hold what the call says, and each step on them has
        // ended before this returns; those of the device have room for as much.
        unsafe {
            device.copy_in(input, io.input, reads * size, stream)?;
            // So that nobody reads the caller's buffer any more, whatever becomes of the call.
            inner.finish(call, sequence, stream)?;
            inner.put(call, sequence, &there, stream)?;
            inner.finish(call, sequence, stream)?;
            device.copy_out(io.output, output, writes * size, stream)?;
        }
        inner.finish(call, sequence, stream)
    }

    /// Ragged all-to-alls: every rank compares what all send with what all expect.
    pub(super) fn agree_on_parts(
        &self,
        turn: &mut Turn,
        call: &Call,
        sequence: u64,
        io: &Io<'_>,
    ) -> Result<()> {
        let n = self.inner.members.len();
        let row: Vec<u64> = (0..2 * n)
            .map(|i| if i < n { io.send.len(i) } else { io.recv.len(i - n) } as u64)
            .collect();
        let mut all = vec![0u64; 2 * n * n];
        let parts = Parts::Even(2 * n);
        let words = Io {
            input: row.as_ptr().cast(),
            output: all.as_mut_ptr().cast(),
            send: parts,
            recv: parts,
        };
        let gather = Call::new(Verb::AllGather, DType::U64, all.len(), call.site);
        self.transfer(turn, &gather, sequence, &words).or_else(|e| self.inner.fail(e))?;
        let posted = |rank, i| all[2 * n * rank + i];
        let Some((from, to, sends, expects)) = layout::unequal_parts(n, posted) else {
            return Ok(());
        };
        let of = |len: u64| Call { len: len as usize, ..*call }.to_string();
        self.inner.fail(Error::Mismatch {
            group: self.inner.recorder.name().into(),
            sequence,
            left_rank: from,
            left: of(sends),
            right_rank: to,
            right: of(expects),
        })
    }
}

/// Elements of this rank's input and output that are used.
fn extents(call: &Call, rank: usize, ranks: usize, io: &Io<'_>) -> (usize, usize) {
    let sum = |parts: Parts<'_>| (0..ranks).map(|r| parts.len(r)).sum();
    let at_root = |len: usize| if call.root == Some(rank) { len } else { 0 };
    let (len, part) = (call.len, || io.recv.len(rank));
    match call.verb {
        Verb::ReduceScatter => (len, part()),
        Verb::AllGather => (part(), len),
        Verb::AllToAll => (sum(io.send), sum(io.recv)),
        Verb::Gather => (part(), at_root(len)),
        Verb::Scatter => (at_root(len), part()),
        Verb::AllReduce | Verb::Reduce | Verb::Broadcast | Verb::Shift => (len, len),
        Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => (0, 0),
    }
}
