//! The beginning of a collective in a large group: what the first handshake does with a message to
//! every rank, in log2(ranks) rounds.
//!
//! In round k a rank tells the one 2^k places on what it has found among the 2^k ranks before it
//! (dissemination, as the barrier of Hensgen, Finkel and Manber, 1988). What is found is the two
//! lowest ranks that called different things; joining two findings knows no order and no number of
//! times, so after the last round all ranks have found the same, and all have come.
//!
//! A rank that waits in vain calls the roll: it says so to all, whoever is in a call answers, and
//! all fail together and name who did not. Words of ranks that leave come the same way, with the
//! number of calls that they have completed: who is still in one of those goes on.

use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};

use super::ffi::{self, poll};
use super::handshake::{FAILED, LEFT, PANICKED, Turn};
use super::{Mpi, PACKETS, ROLL};
use crate::call::Call;
use crate::error::{Error, Result};
use crate::header::Header;

/// Who is alive answers the roll within this part of the time-out.
const ANSWER: u32 = 4;

/// The two lowest ranks that called different things.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Found {
    header: [Header; 2],
    /// [`NOBODY`] where all so far agree.
    rank: [u64; 2],
}

/// Words of a finding.
pub(super) const FOUND: usize = size_of::<Found>() / 8;

const NOBODY: u64 = u64::MAX;

impl Found {
    fn one(rank: usize, header: Header) -> Found {
        Found { header: [header; 2], rank: [rank as u64, NOBODY] }
    }

    /// Both findings as one.
    fn join(self, other: Found) -> Found {
        let pairs = |f: Found| [(f.rank[0], f.header[0]), (f.rank[1], f.header[1])];
        let mut all = [pairs(self), pairs(other)].concat();
        all.sort_by_key(|(rank, _)| *rank);
        let (first, header) = all[0];
        let second = all.iter().find(|(rank, h)| *rank != NOBODY && !h.same(&header));
        let (second, unlike) = second.copied().unwrap_or((NOBODY, header));
        Found { header: [header, unlike], rank: [first, second] }
    }
}

impl Mpi {
    /// Tells all ranks of this call and waits for all, hearing of theirs.
    pub(super) fn agree(&self, turn: &mut Turn, call: &Call, sequence: u64) -> Result<()> {
        let (me, n, start) = (self.comm.rank, self.comm.size, Instant::now());
        let header = Header::new(call, sequence);
        let mut found = Found::one(me, header);
        let rounds = (0..usize::BITS).map(|k| 1usize << k).take_while(|distance| *distance < n);
        for (round, distance) in rounds.enumerate() {
            let at = round * FOUND..(round + 1) * FOUND;
            turn.mine[at.clone()].copy_from_slice(bytemuck::cast_slice(&[found]));
            let (to, from) = ((me + distance) % n, (me + n - distance) % n);
            let (bytes, timeout) = (8 * FOUND, self.config.timeout);
            let mut calls = ffi::calls();
            // SAFETY: each round's buffers are ours, and left to MPI for ever if we give up.
            let (mut coming, mut going) = unsafe {
                let theirs = turn.theirs[at.clone()].as_mut_ptr().cast();
                let coming = self.comm.recv(&calls, theirs, bytes, from, PACKETS)?;
                let mine = turn.mine[at.clone()].as_ptr().cast();
                (coming, self.comm.send(&calls, mine, bytes, to, PACKETS, false)?)
            };
            let (mut look, mut is_over) = (0u64, turn.concerns(sequence));
            let ended = poll(&mut calls, timeout.saturating_sub(start.elapsed()), |calls| {
                look += 1;
                // A roll that is called, or a rank that has left: rare, so looked for rarely.
                if look.is_multiple_of(256) {
                    turn.words.extend(self.comm.take_word(calls, ROLL)?);
                    is_over = turn.concerns(sequence);
                }
                Ok(is_over || coming.test(calls)? && going.test(calls)?)
            });
            drop(calls);
            if !ended.or_else(|e| self.fail(e))? || is_over {
                let error = self.call_roll(turn, call, header, start)?;
                self.goodbye(FAILED, sequence);
                turn.abandon();
                return self.fail(error);
            }
            found =
                found.join(bytemuck::pod_read_unaligned(bytemuck::cast_slice(&turn.theirs[at])));
        }
        let [left_rank, right_rank] = found.rank;
        if right_rank == NOBODY {
            return Ok(());
        }
        self.fail(Error::Mismatch {
            group: self.recorder.name().into(),
            sequence,
            left_rank: left_rank as usize,
            left: found.header[0].show(),
            right_rank: right_rank as usize,
            right: found.header[1].show(),
        })
    }

    /// Says to all ranks that this one waits, and hears who else does: why the call fails.
    fn call_roll(
        &self,
        turn: &mut Turn,
        call: &Call,
        header: Header,
        start: Instant,
    ) -> Result<Error> {
        let (me, n, sequence) = (self.comm.rank, self.comm.size, header.sequence);
        let waited = start.elapsed();
        self.say(header);
        // What each rank said: that it waits or has left. Who fails has waited, if it said so.
        let (mut heard, mut failed) = (vec![None; n], None);
        heard[me] = Some(header);
        let patience = (self.config.timeout / ANSWER).min(Duration::from_secs(5));
        let mut calls = ffi::calls();
        poll(&mut calls, patience, |calls| {
            loop {
                for (rank, word) in turn.words.drain(..) {
                    if word.leaving == FAILED {
                        failed.get_or_insert(rank);
                        heard[rank].get_or_insert(word);
                    } else {
                        heard[rank] = Some(word);
                    }
                }
                match self.comm.take_word(calls, ROLL)? {
                    None => break,
                    word => turn.words.extend(word),
                }
            }
            Ok(heard.iter().all(Option::is_some))
        })?;
        drop(calls);
        let (op, group) = (call.to_string(), self.recorder.name().into());
        let gone = |rank: usize, how: &str| {
            let (op, group) = (op.clone(), self.recorder.name().into());
            Error::Gone { op, group, sequence, rank, how: how.into() }
        };
        for (rank, word) in heard.iter().enumerate() {
            match word.map_or(0, |w| w.leaving) {
                LEFT => return Ok(gone(rank, "it dropped its group")),
                PANICKED => return Ok(gone(rank, "it panicked")),
                _ => {}
            }
        }
        let mut missing: Vec<usize> = (0..n).filter(|r| heard[*r].is_none()).collect();
        if missing.is_empty() {
            if let Some(rank) = failed {
                return Ok(gone(rank, "its group had failed"));
            }
            // All are in time to say that they wait, and were not in time to be met.
            missing = (0..n).filter(|r| *r != me).collect();
        }
        let doing = |rank: usize| match &heard[rank] {
            None => format!("rank {rank} did not answer"),
            Some(w) if w.leaving != 0 => format!("rank {rank} had failed"),
            Some(w) => format!("rank {rank} is in {} (call {})", w.show(), w.sequence),
        };
        let doing = (0..n).map(doing).collect::<Vec<_>>().join(", ");
        Ok(Error::Timeout { op, group, sequence, rank: me, missing, waited, doing })
    }
}

#[cfg(test)]
mod tests {
    use std::panic::Location;

    use super::*;
    use crate::call::Verb;
    use crate::element::DType;

    #[test]
    fn findings_join_in_any_order_and_number() {
        let header =
            |len| Header::new(&Call::new(Verb::AllReduce, DType::F32, len, Location::caller()), 3);
        for n in 1..12usize {
            for odd in [vec![], vec![0], vec![n - 1], vec![n / 2, n - 1], (0..n).collect()] {
                let len =
                    |rank: usize| 8 + odd.iter().position(|r| *r == rank).map_or(0, |i| i + 1);
                let mut all: Vec<Found> =
                    (0..n).map(|rank| Found::one(rank, header(len(rank)))).collect();
                let mut distance = 1;
                while distance < n {
                    all = (0..n).map(|r| all[r].join(all[(r + n - distance) % n])).collect();
                    distance *= 2;
                }
                let second = (1..n).find(|r| len(*r) != len(0)).map_or(NOBODY, |r| r as u64);
                for found in all {
                    assert_eq!(found.rank, [0, second], "{n} ranks, {odd:?} call something else");
                    assert_eq!(found.header[0].len, len(0) as u64);
                }
            }
        }
    }
}
