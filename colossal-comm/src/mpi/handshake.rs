//! The beginning of every collective: each rank tells each other what it calls.
//!
//! A packet is a call's signature and, if it is small, its payload. So a rank that is late or gone
//! is known by name, a mismatch is the same error on every rank, and a small collective is over
//! after one message each way. Packets are buffers of ours: a time-out leaves them to MPI and takes
//! nothing from the caller. Groups of more ranks than are met directly agree in rounds
//! (`agreement.rs`).

use std::sync::LazyLock;

use super::agreement::FOUND;
use super::ffi::{self, Request, poll, test_all};
use super::{Mpi, PACKETS, ROLL};
use crate::call::Call;
use crate::error::{Error, Result};
use crate::header::{HEADER, Header};

/// Payloads up to this many bytes travel inside the packet.
const INLINE: usize = 1024;

/// Ranks of the largest group in which each tells each other; `COLOSSAL_MPI_DIRECT` says otherwise.
static FEW: LazyLock<usize> = LazyLock::new(|| {
    std::env::var("COLOSSAL_MPI_DIRECT").ok().and_then(|n| n.parse().ok()).unwrap_or(16)
});

/// Why a rank will call nothing any more.
pub(super) const LEFT: u32 = 1;
pub(super) const PANICKED: u32 = 2;
pub(super) const FAILED: u32 = 3;

/// What a rank needs for its collectives. Locked during one.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) sequence: u64,
    /// Does each rank tell each other?
    is_direct: bool,
    /// Words of a packet.
    size: usize,
    /// This rank's packet, and one of each rank; or those of each round. 8-byte aligned; kept by
    /// MPI after a time-out.
    pub(super) mine: Vec<u64>,
    pub(super) theirs: Vec<u64>,
    /// Of each rank, none of this one and of those that have come.
    coming: Vec<Option<Request>>,
    going: Vec<Request>,
    /// What ranks said out of turn that concerns no call yet: who, and in which call it is.
    pub(super) words: Vec<(usize, Header)>,
    /// Parts that are to be reduced: memory that is touched once and not in every call.
    pub(super) parts: Vec<u64>,
}

impl Turn {
    pub(super) fn new(ranks: usize) -> Turn {
        let is_direct = ranks <= *FEW;
        let rounds = ranks.next_power_of_two().ilog2() as usize;
        let (size, mine, theirs) = match is_direct {
            true => ((HEADER + INLINE) / 8, 1, ranks),
            false => (FOUND, rounds, rounds),
        };
        Turn {
            sequence: 0,
            is_direct,
            size,
            mine: vec![0; size * mine],
            theirs: vec![0; size * theirs],
            coming: Vec::with_capacity(if is_direct { ranks } else { 0 }),
            going: Vec::with_capacity(if is_direct { ranks } else { 0 }),
            words: vec![],
            parts: vec![],
        }
    }

    /// Is there a word of a rank that will not come to this call, or waits in it?
    pub(super) fn concerns(&self, sequence: u64) -> bool {
        self.words.iter().any(|(_, word)| word.sequence <= sequence)
    }

    /// Does a payload of `bytes` bytes travel in the packet?
    pub(super) fn holds(&self, bytes: usize) -> bool {
        self.is_direct && HEADER + bytes <= 8 * self.size
    }

    /// Where the payload lies in a rank's packet; `me` has its own elsewhere.
    pub(super) fn payload(&self, rank: usize, me: usize) -> *const u8 {
        self.packet(rank, me)[HEADER / 8..].as_ptr().cast()
    }

    fn packet(&self, rank: usize, me: usize) -> &[u64] {
        if rank == me { &self.mine } else { &self.theirs[rank * self.size..] }
    }

    fn header(&self, rank: usize, me: usize) -> &Header {
        bytemuck::from_bytes(bytemuck::cast_slice(&self.packet(rank, me)[..HEADER / 8]))
    }

    /// MPI may still read or write the packets: they are left to it.
    pub(super) fn abandon(&mut self) {
        std::mem::forget(std::mem::take(&mut self.mine));
        std::mem::forget(std::mem::take(&mut self.theirs));
        std::mem::forget(std::mem::take(&mut self.coming));
        std::mem::forget(std::mem::take(&mut self.going));
    }

    /// Were the packets left to MPI?
    pub(super) fn is_abandoned(&self) -> bool {
        self.mine.is_empty()
    }
}

impl Mpi {
    /// Sends this rank's packet, with the `bytes` bytes at `payload`, to all, and waits for theirs.
    ///
    /// # Safety
    /// `payload` holds as many bytes, which the packet holds.
    pub(super) unsafe fn handshake(
        &self,
        turn: &mut Turn,
        call: &Call,
        sequence: u64,
        (payload, bytes): (*const u8, usize),
    ) -> Result<()> {
        if !turn.is_direct {
            return self.agree(turn, call, sequence);
        }
        let (me, n, size) = (self.comm.rank, self.comm.size, turn.size);
        let packet: &mut [u8] = bytemuck::cast_slice_mut(&mut turn.mine);
        packet[..HEADER].copy_from_slice(bytemuck::bytes_of(&Header::new(call, sequence)));
        if bytes > 0 {
            // SAFETY: the caller's contract.
            unsafe {
                std::ptr::copy_nonoverlapping(payload, packet[HEADER..].as_mut_ptr(), bytes);
            }
        }
        let mut calls = ffi::calls();
        turn.coming.clear();
        for peer in 0..n {
            if peer == me {
                turn.coming.push(None);
                continue;
            }
            let to = turn.theirs[peer * size..].as_mut_ptr().cast();
            // SAFETY: the buffer is ours, and left to MPI for ever if we give up.
            let request = unsafe { self.comm.recv(&calls, to, 8 * size, peer, PACKETS)? };
            turn.coming.push(Some(request));
        }
        for peer in (0..n).filter(|r| *r != me) {
            let from = turn.mine.as_ptr().cast();
            // SAFETY: as above.
            let request =
                unsafe { self.comm.send(&calls, from, HEADER + bytes, peer, PACKETS, false)? };
            turn.going.push(request);
        }
        let mut gone = None;
        let mut next = 0;
        let ended = poll(&mut calls, self.config.timeout, |calls| {
            // In order: who is first in line is waited for, unless somebody has gone.
            while next < n {
                if let Some(open) = &mut turn.coming[next] {
                    if !open.test(calls)? {
                        break;
                    }
                    turn.coming[next] = None;
                    let leaving = turn.header(next, me).leaving;
                    if leaving != 0 {
                        gone = Some((next, leaving));
                    }
                }
                next += 1;
            }
            for peer in next + 1..n {
                if let Some(open) = &mut turn.coming[peer]
                    && open.test(calls)?
                {
                    turn.coming[peer] = None;
                    let leaving = turn.header(peer, me).leaving;
                    if leaving != 0 {
                        gone = Some((peer, leaving));
                    }
                }
            }
            Ok(gone.is_some() || next == n && test_all(calls, &mut turn.going)?)
        });
        drop(calls);
        let ended = ended.or_else(|e| self.fail(e))?;
        if ended && gone.is_none() {
            // Every rank compares the same headers in the same order.
            let mine = turn.header(me, me);
            if (0..n).all(|r| turn.header(r, me).same(mine)) {
                return Ok(());
            }
        }
        let error = self.quarrel(turn, call, sequence, gone);
        if !error.is_mismatch() {
            // Who comes later learns it at once.
            self.goodbye(FAILED, sequence);
        }
        turn.abandon();
        self.fail(error)
    }

    /// What went wrong in a handshake.
    fn quarrel(
        &self,
        turn: &Turn,
        call: &Call,
        sequence: u64,
        gone: Option<(usize, u32)>,
    ) -> Error {
        let (me, n) = (self.comm.rank, self.comm.size);
        let group = || self.recorder.name().into();
        if let Some((rank, how)) = gone {
            let how = match how {
                PANICKED => "it panicked",
                FAILED => "its group had failed",
                _ => "it dropped its group",
            };
            let how = how.into();
            return Error::Gone { op: call.to_string(), group: group(), sequence, rank, how };
        }
        let mut missing: Vec<usize> = (0..n).filter(|r| turn.coming[*r].is_some()).collect();
        let first = turn.header(0, me);
        let other = (1..n).find(|r| !turn.header(*r, me).same(first));
        if let (true, Some(other)) = (missing.is_empty(), other) {
            return Error::Mismatch {
                group: group(),
                sequence,
                left_rank: 0,
                left: first.show(),
                right_rank: other,
                right: turn.header(other, me).show(),
            };
        }
        if missing.is_empty() {
            // All came once, and some do not take what we send: they have given up.
            missing = (0..n).filter(|r| *r != me).collect();
        }
        let doing = |rank: usize| match &turn.coming[rank] {
            Some(_) => format!("rank {rank} has not come to call {sequence}"),
            None => format!("rank {rank} is in {} (call {sequence})", turn.header(rank, me).show()),
        };
        let doing: Vec<String> = (0..n).map(doing).collect();
        Error::Timeout {
            op: call.to_string(),
            group: group(),
            sequence,
            rank: me,
            missing,
            waited: self.config.timeout,
            doing: doing.join(", "),
        }
    }

    /// Tells all ranks that this one, in call `sequence` or about to make it, makes none any more.
    pub(super) fn goodbye(&self, why: u32, sequence: u64) {
        self.say(Header::leaving(why, sequence));
    }

    /// A word to all ranks.
    pub(super) fn say(&self, word: Header) {
        let tag = if self.comm.size <= *FEW { PACKETS } else { ROLL };
        let packet = bytemuck::bytes_of(&word).to_vec();
        let calls = ffi::calls();
        for peer in (0..self.comm.size).filter(|r| *r != self.comm.rank) {
            // SAFETY: the packet is ours and left to MPI below.
            let request =
                unsafe { self.comm.send(&calls, packet.as_ptr(), HEADER, peer, tag, false) };
            // Small packets leave at once; who has left already receives none.
            if let Ok(mut request) = request {
                let _ = request.test(&calls);
            }
        }
        std::mem::forget(packet);
    }
}
