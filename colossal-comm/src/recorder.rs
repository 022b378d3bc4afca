//! The flight recorder: what each rank of a group called last, kept for the moment things fail.
//!
//! One ring of entries per rank. In the threads engine the entry is also how a rank posts a call:
//! its peers compare the signature and find the buffers in it. Fields are atomics, so a report can
//! read them while ranks go on; an entry that is overwritten meanwhile is left out.
//!
//! With `COLOSSAL_FLIGHT=<folder>` set, the first failure of a group is written there as JSON;
//! `colossal doctor --flight <file>` shows it.

use std::collections::VecDeque;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering::*};
use std::time::Instant;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::call::Call;

/// Entries that are kept per rank.
const RING: u64 = 64;

/// The recorder of a group: a ring per rank.
#[derive(Debug)]
pub(crate) struct Recorder {
    name: String,
    start: (Instant, u64),
    rings: Box<[Ring]>,
}

#[derive(Debug)]
#[repr(align(128))]
struct Ring {
    /// Calls begun and ended.
    begun: AtomicU64,
    ended: AtomicU64,
    messages: Mutex<Messages>,
    entries: Box<[Entry]>,
}

/// Messages have no sequence of their own.
#[derive(Debug, Default)]
struct Messages {
    /// The one that the rank waits for.
    waits: Option<Call>,
    /// The last that it posted, and when, in [`ticks`].
    posted: VecDeque<(Call, u64)>,
}

/// One cache line.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Entry {
    /// The call's number plus one; 0 while it is being written.
    number: AtomicU64,
    code: AtomicU64,
    len: AtomicUsize,
    ragged: AtomicU64,
    site: AtomicPtr<Location<'static>>,
    /// When it began, in [`ticks`].
    at: AtomicU64,
    pub(crate) input: AtomicUsize,
    pub(crate) output: AtomicUsize,
}

/// A clock that costs nothing: reading the system's would be a tenth of a small call.
fn ticks() -> u64 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: every x86-64 has the instruction.
    return unsafe { std::arch::x86_64::_rdtsc() };
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

impl Entry {
    fn empty() -> Entry {
        Entry {
            number: AtomicU64::new(0),
            code: AtomicU64::new(0),
            len: AtomicUsize::new(0),
            ragged: AtomicU64::new(0),
            site: AtomicPtr::new(null_mut()),
            at: AtomicU64::new(0),
            input: AtomicUsize::new(0),
            output: AtomicUsize::new(0),
        }
    }

    /// The call; none in an entry that was never written.
    pub(crate) fn call(&self) -> Option<Call> {
        let site = self.site.load(Relaxed);
        if site.is_null() {
            return None;
        }
        // SAFETY: only addresses of `&'static Location` are ever stored here.
        let site: &'static Location<'static> = unsafe { &*site };
        Call::decode(
            self.code.load(Relaxed),
            self.len.load(Relaxed),
            self.ragged.load(Relaxed),
            site,
        )
    }

    /// Is it a call with this signature?
    pub(crate) fn is(&self, call: &Call) -> bool {
        self.code.load(Relaxed) == call.code()
            && self.len.load(Relaxed) == call.len
            && self.ragged.load(Relaxed) == call.ragged
    }
}

impl Recorder {
    pub(crate) fn new(name: String, ranks: usize) -> Recorder {
        let ring = || Ring {
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            messages: Mutex::default(),
            entries: (0..RING).map(|_| Entry::empty()).collect(),
        };
        Recorder {
            name,
            start: (Instant::now(), ticks()),
            rings: (0..ranks).map(|_| ring()).collect(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Rank `rank` begins its call `sequence` with these buffers. Only that rank writes its ring.
    pub(crate) fn begin(
        &self,
        rank: usize,
        sequence: u64,
        call: &Call,
        input: *const u8,
        output: *mut u8,
    ) {
        let entry = self.entry(rank, sequence);
        entry.number.store(0, Relaxed);
        entry.code.store(call.code(), Relaxed);
        entry.len.store(call.len, Relaxed);
        entry.ragged.store(call.ragged, Relaxed);
        entry.site.store(std::ptr::from_ref(call.site).cast_mut(), Relaxed);
        entry.at.store(ticks(), Relaxed);
        // Provenance travels through `expose_provenance` and `with_exposed_provenance`.
        entry.input.store(input.expose_provenance(), Relaxed);
        entry.output.store(output.expose_provenance(), Relaxed);
        entry.number.store(sequence + 1, Release);
        self.rings[rank].begun.store(sequence + 1, Release);
    }

    /// Rank `rank` has ended its call `sequence`.
    pub(crate) fn end(&self, rank: usize, sequence: u64) {
        self.rings[rank].ended.store(sequence + 1, Relaxed);
    }

    /// Rank `rank` posts a message.
    pub(crate) fn posted(&self, rank: usize, call: &Call) {
        let posted = &mut self.rings[rank].messages.lock().posted;
        if posted.len() as u64 == RING {
            posted.pop_front();
        }
        posted.push_back((*call, ticks()));
    }

    /// Rank `rank` waits for a message, or no longer.
    pub(crate) fn message(&self, rank: usize, call: Option<Call>) {
        self.rings[rank].messages.lock().waits = call;
    }

    pub(crate) fn entry(&self, rank: usize, sequence: u64) -> &Entry {
        &self.rings[rank].entries[(sequence % RING) as usize]
    }

    /// Calls that a rank has begun.
    pub(crate) fn begun(&self, rank: usize) -> u64 {
        self.rings[rank].begun.load(Acquire)
    }

    /// `rank 0 is in all_reduce(...) (call 3), rank 1 has finished barrier() (call 2)`
    pub(crate) fn doing(&self) -> String {
        let one = |rank: usize| {
            let ring = &self.rings[rank];
            if let Some(message) = ring.messages.lock().waits {
                return format!("rank {rank} waits in {message}");
            }
            let (begun, ended) = (ring.begun.load(Acquire), ring.ended.load(Relaxed));
            let Some(last) = begun.checked_sub(1) else {
                return format!("rank {rank} has called nothing yet");
            };
            let call = self.entry(rank, last).call().map_or_else(String::new, |c| c.to_string());
            let verb = if ended >= begun { "has finished" } else { "is in" };
            format!("rank {rank} {verb} {call} (call {last})")
        };
        (0..self.rings.len()).map(one).collect::<Vec<_>>().join(", ")
    }

    /// The last calls of every rank, oldest first.
    pub(crate) fn json(&self) -> Value {
        let ranks: Vec<Value> = (0..self.rings.len()).map(|rank| self.ring_json(rank)).collect();
        json!({ "group": self.name, "world_size": self.rings.len(), "ranks": ranks })
    }

    fn ring_json(&self, rank: usize) -> Value {
        let ring = &self.rings[rank];
        let (begun, ended) = (ring.begun.load(Acquire), ring.ended.load(Relaxed));
        let (mut calls, mut posts) = (Vec::new(), Vec::new());
        let (start, first) = self.start;
        let elapsed = ticks().wrapping_sub(first).max(1) as f64;
        let us_a_tick = start.elapsed().as_secs_f64() * 1e6 / elapsed;
        let begun_us = |at: u64| (at.wrapping_sub(first) as f64 * us_a_tick) as u64;
        let shown = |call: &Call, at| {
            json!({
                "verb": call.verb.name(),
                "dtype": call.dtype.name(),
                "len": call.len,
                "op": call.op.map(|op| format!("{op:?}")),
                "root": call.root,
                "site": format!("{}:{}", call.site.file(), call.site.line()),
                "begun_us": begun_us(at),
            })
        };
        for sequence in begun.saturating_sub(RING)..begun {
            let entry = self.entry(rank, sequence);
            let Some(call) = entry.call() else { continue };
            let at = entry.at.load(Relaxed);
            // Written again while we read it: gone.
            if entry.number.load(Acquire) != sequence + 1 {
                continue;
            }
            let mut line = shown(&call, at);
            line["sequence"] = sequence.into();
            line["state"] = if sequence < ended { "ended" } else { "in it" }.into();
            calls.push(line);
        }
        let messages = ring.messages.lock();
        posts.extend(messages.posted.iter().map(|(call, at)| shown(call, *at)));
        let waits = messages.waits.map(|call| call.to_string());
        json!({
            "rank": rank, "begun": begun, "ended": ended, "waits_in": waits,
            "calls": calls, "messages": posts,
        })
    }

    /// Writes the report where `COLOSSAL_FLIGHT` says; where it was written.
    pub(crate) fn dump(&self, error: &crate::Error) -> Option<PathBuf> {
        let folder = PathBuf::from(std::env::var_os("COLOSSAL_FLIGHT")?);
        // A report that cannot be written must not hide the failure that it reports.
        self.write(&folder, error).ok()
    }

    fn write(&self, folder: &Path, error: &crate::Error) -> std::io::Result<PathBuf> {
        let mut report = self.json();
        report["error"] = error.to_string().into();
        report["pid"] = std::process::id().into();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = self.name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let path = folder.join(format!("flight-{}-{number}-{name}.json", std::process::id()));
        let half = path.with_extension("part");
        std::fs::create_dir_all(folder)?;
        std::fs::write(&half, serde_json::to_string_pretty(&report)? + "\n")?;
        std::fs::rename(&half, &path)?;
        Ok(path)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::call::Verb;
    use crate::element::DType;

    #[test]
    fn the_file_holds_the_last_calls_of_every_rank() {
        let recorder = Recorder::new("world/tp".into(), 2);
        let call = Call::new(Verb::AllReduce, DType::Bf16, 12, Location::caller());
        for sequence in 0..100 {
            for rank in 0..2 {
                recorder.begin(rank, sequence, &call, std::ptr::null(), null_mut());
                if (rank, sequence) != (1, 99) {
                    recorder.end(rank, sequence);
                }
            }
        }
        let message = Call::new(Verb::Send, DType::F32, 3, Location::caller()).root(1);
        (0..70).for_each(|_| recorder.posted(0, &message));
        let folder = std::env::temp_dir().join(format!("flight-test-{}", std::process::id()));
        let error = crate::Error::Engine { op: "test".into(), reason: "on purpose".into() };
        let path = recorder.write(&folder, &error).unwrap();
        let report: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let calls = report["ranks"][1]["calls"].as_array().unwrap();
        assert_eq!((calls.len(), &calls[0]["sequence"]), (64, &json!(36)));
        assert_eq!((&calls[62]["state"], &calls[63]["state"]), (&json!("ended"), &json!("in it")));
        assert_eq!(calls[63]["verb"], "all_reduce");
        assert!(calls[63]["site"].as_str().unwrap().contains("recorder.rs:"));
        let messages = report["ranks"][0]["messages"].as_array().unwrap();
        assert_eq!((messages.len(), &messages[63]["root"]), (64, &json!(1)));
        assert_eq!(report["error"], "test: on purpose");
        assert!(recorder.doing().contains("rank 1 is in all_reduce(12 x bf16"));
    }
}
