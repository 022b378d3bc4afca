//! Why does it take so long? What the store knows of the others.
//!
//! A rank that has waited for [`ASK`] writes its call down and reads what the others wrote. Two
//! different calls of one number are a mismatch; a rank that left before this call, or whose
//! process died, will never come; at the time-out, who has written nothing is missing. Once
//! something is wrong the others are given [`GRACE`] to say where they are.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Inner;
use super::device::Mark;
use super::library::{IN_PROGRESS, nccl_says};
use crate::call::{Call, Verb};
use crate::error::{Error, Result};
use crate::header::{HEADER, Header};

/// How often the store is asked.
const ASK: Duration = Duration::from_millis(100);
/// How long the others are waited for once something is wrong, if the time-out is not shorter.
const GRACE: Duration = Duration::from_secs(2);

/// Numbers of what has no number: messages, and a host that waits for a stream.
pub(super) const MESSAGE: u64 = u64::MAX;
pub(super) const WAIT: u64 = u64::MAX - 1;

/// What is known of the ranks of a group.
#[derive(Default)]
struct Known {
    within: BTreeMap<usize, Header>,
    gone: BTreeMap<usize, String>,
    failed: BTreeMap<usize, String>,
}

impl Inner {
    /// Waits until a stream has passed `mark`, or finds out why it does not.
    pub(super) fn passed(
        &self,
        call: &Call,
        sequence: u64,
        mark: &Mark,
        by: Instant,
    ) -> Result<()> {
        self.until(call, sequence, by, || self.world.device.passed(mark))
    }

    /// Waits until `done`. Any error is the group's.
    pub(super) fn until(
        &self,
        call: &Call,
        sequence: u64,
        by: Instant,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let mut ask = Instant::now() + ASK;
        let mut wrong = None;
        for look in 0u64.. {
            // An abort ends kernels, and streams go on.
            self.check()?;
            if done().or_else(|e| self.fail(e))? {
                return self.check();
            }
            match look {
                ..200 => std::hint::spin_loop(),
                200..1000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
            if look % 16 != 15 {
                continue;
            }
            let now = Instant::now();
            let state = self.state(call).or_else(|e| self.fail(e))?;
            // A host that waits for a stream: each call on it is watched for itself.
            let watched = sequence == WAIT || now < ask;
            if watched && now < by && state.is_none() {
                continue;
            }
            ask = now + ASK;
            let known = self.ask(call, sequence);
            let verdict = self.verdict(call, sequence, &known);
            let all =
                known.within.len() + known.gone.len() + known.failed.len() >= self.members.len();
            let late = now >= by;
            if verdict.is_none() && state.is_none() && !late {
                continue;
            }
            // Hear everybody, so that all say the same.
            let patience = *wrong.get_or_insert(now + GRACE.min(self.world.config.timeout / 4));
            if !all && now < patience {
                continue;
            }
            let error = verdict.or(state).unwrap_or_else(|| self.late(call, sequence, &known));
            return self.fail(error);
        }
        Ok(())
    }

    /// What NCCL itself found wrong.
    fn state(&self, call: &Call) -> Result<Option<Error>> {
        for comm in [&self.comm, &self.messages] {
            let code = comm.state()?;
            if code != 0 && code != IN_PROGRESS {
                let reason = format!("NCCL error {code}: {}", nccl_says(code));
                return Ok(Some(Error::Engine { op: call.to_string(), reason }));
            }
        }
        Ok(None)
    }

    /// Writes down where this rank is, and reads where the others are. A store that does not
    /// answer is rank 0's process that ended.
    fn ask(&self, call: &Call, sequence: u64) -> Known {
        let mine = Header::new(call, sequence);
        let store = &self.world.store;
        let prefix = format!("{}/", self.key);
        let key = format!("{prefix}within/{}", self.rank);
        let told = store.set(&key, bytemuck::bytes_of(&mine));
        let mut known = Known::default();
        let lost = |known: &mut Known, member: usize| {
            if let Some(r) = self.members.iter().position(|m| *m == member) {
                known.gone.entry(r).or_insert_with(|| "its process ended".into());
            }
        };
        let (Ok(()), Ok(pairs), Ok(dead)) = (told, store.list(&prefix), store.list("lost/")) else {
            lost(&mut known, 0);
            return known;
        };
        for (key, value) in pairs {
            let mut words = key[prefix.len()..].split('/');
            let (Some(what), Some(Ok(r))) = (words.next(), words.next().map(str::parse)) else {
                continue;
            };
            let text = String::from_utf8_lossy(&value).into_owned();
            match what {
                "within" if value.len() == HEADER => {
                    known.within.insert(r, bytemuck::pod_read_unaligned(&value));
                }
                "gone" => {
                    let (calls, how) = text.split_once(' ').unwrap_or(("0", &text));
                    // Who left after this call took part in it.
                    if calls.parse().is_ok_and(|calls: u64| calls <= sequence) {
                        known.gone.insert(r, how.into());
                    }
                }
                "failed" => {
                    known.failed.insert(r, text);
                }
                _ => {}
            }
        }
        dead.keys().filter_map(|k| k.strip_prefix("lost/")?.parse().ok()).for_each(|m| {
            lost(&mut known, m);
        });
        // Written down in an earlier call, and not here yet.
        known.within.retain(|_, h| h.sequence == sequence);
        known
    }

    /// What is wrong, if that is known.
    fn verdict(&self, call: &Call, sequence: u64, known: &Known) -> Option<Error> {
        let group = || self.recorder.name().into();
        let mut within = known.within.iter();
        let (left_rank, left) = within.next()?;
        let different = within.find(|(r, other)| match sequence {
            MESSAGE => unlike_messages(*left_rank, left, **r, other),
            _ => !left.same(other),
        });
        if let Some((right_rank, right)) = different {
            return Some(Error::Mismatch {
                group: group(),
                sequence,
                left_rank: *left_rank,
                left: left.show(),
                right_rank: *right_rank,
                right: right.show(),
            });
        }
        let concerns = |r: usize| sequence != MESSAGE || call.root == Some(r);
        let gone = known.gone.iter().find(|(r, _)| concerns(**r)).map(|(r, how)| (*r, how.clone()));
        let failed = known.failed.iter().next();
        let failed = || failed.map(|(r, text)| (*r, format!("its group had failed: {text}")));
        let (rank, how) = gone.or_else(failed)?;
        Some(Error::Gone { op: call.to_string(), group: group(), sequence, rank, how })
    }

    /// The time-out's error.
    fn late(&self, call: &Call, sequence: u64, known: &Known) -> Error {
        let n = self.members.len();
        let missing: Vec<usize> = match (sequence, call.root) {
            (MESSAGE, Some(peer)) if !known.within.contains_key(&peer) => vec![peer],
            (MESSAGE, _) => vec![],
            _ => (0..n).filter(|r| !known.within.contains_key(r)).collect(),
        };
        if missing.is_empty() || sequence == WAIT {
            let reason = format!(
                "not over within {:?} although all ranks are in it: NCCL_DEBUG=WARN says what NCCL waits for",
                self.world.config.timeout
            );
            return Error::Engine { op: call.to_string(), reason };
        }
        let doing = |r: usize| match known.within.get(&r) {
            Some(header) => format!("rank {r} is in {} (call {sequence})", header.show()),
            None => format!("rank {r} has not come to call {sequence}"),
        };
        Error::Timeout {
            op: call.to_string(),
            group: self.recorder.name().into(),
            sequence,
            rank: self.rank,
            missing,
            waited: self.world.config.timeout,
            doing: (0..n).map(doing).collect::<Vec<_>>().join(", "),
        }
    }
}

/// Do two ranks wait for each other's messages, of different types or lengths?
fn unlike_messages(a: usize, left: &Header, b: usize, right: &Header) -> bool {
    let (Some(x), Some(y)) = (left.call(), right.call()) else { return true };
    let ways = matches!((x.verb, y.verb), (Verb::Send, Verb::Recv) | (Verb::Recv, Verb::Send));
    let pair = ways && x.root == Some(b) && y.root == Some(a);
    pair && (x.len, x.dtype) != (y.len, y.dtype)
}
