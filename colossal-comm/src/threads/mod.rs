//! Ranks as threads of one process: the engine that every test and every laptop uses.
//!
//! A rank posts its call and the addresses of its buffers, and waits until all have. A small
//! payload travels inside the post, and everybody is done. For a large one the group becomes one
//! pool of workers: the work is cut into chunks, and whoever is awake takes the next, from its own
//! region first, then from those of ranks that have not got a core yet. Nobody waits for a rank
//! to wake up, only for chunks that somebody is working on.
//!
//! A wait for ranks to arrive can fail, and a rank's arrival and its failure exclude each other
//! ([`count`]). After it, nothing but our own copying runs before a buffer is given back, so the
//! wait for the last chunk has no time-out, and no buffer is read after its call has returned.

mod count;
mod devices;
mod mailbox;
mod work;

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::panic::Location;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::*};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

use crate::call::{Call, Verb};
use crate::device::{self, DeviceEvent};
use crate::engine::{Engine, Engines, Io, OnDevice, Parts, Ticket, Way};
use crate::error::{Error, Result};
use crate::group::Config;
use crate::layout::{self, Layout};
use crate::recorder::Recorder;
use count::{Count, Patience, Wait};
use mailbox::Mailbox;
use work::Work;

/// Payloads up to this many bytes travel inside the post.
const INLINE: usize = 4096;

/// How often a sleeper looks at the clock.
const NAP: Duration = Duration::from_millis(50);

/// What the ranks of a group share.
#[derive(Debug)]
struct Shared {
    ranks: usize,
    config: Config,
    patience: Patience,
    recorder: Recorder,
    /// Arrivals of all ranks; its failure is the group's.
    entry: Count,
    /// Chunks that were worked on.
    done: Count,
    claims: Box<[Claims]>,
    turns: Box<[Mutex<Turn>]>,
    slots: Box<[[Slot; 2]]>,
    gone: Box<[AtomicU8]>,
    failure: Mutex<Option<Error>>,
    /// At `from * ranks + to`.
    mail: Box<[Mailbox]>,
    /// Messages between devices.
    device_mail: devices::Mail,
    /// Groups that are being split off, by call and colour.
    children: Mutex<HashMap<(u64, usize), Pair>>,
}

/// The rendezvous of blocking calls, and that of calls in flight.
type Pair = [Arc<Shared>; 2];

const HERE: u8 = 0;
const LEFT: u8 = 1;
const PANICKED: u8 = 2;

/// What one rank knows of the counts, which all ranks know alike. Locked during a call: two
/// threads that are one rank take turns.
#[derive(Debug)]
#[repr(align(128))]
struct Turn {
    sequence: u64,
    done: u64,
    claimed: Box<[u64]>,
    /// The last event that peers may still be about to wait for.
    event: Option<DeviceEvent>,
}

/// Chunks of a region that have been claimed, since the group was made.
#[derive(Debug)]
#[repr(align(128))]
struct Claims(AtomicU64);

/// A payload that travels inside a post. A rank has two and alternates: it writes one again only
/// after everybody has come to the call after the one that read it.
#[derive(Debug)]
struct Slot(Box<[UnsafeCell<u64>]>);

// SAFETY: written by its rank before it arrives, read by others after all have arrived, and
// written again after all have arrived once more.
unsafe impl Sync for Slot {}

impl Slot {
    fn new(bytes: usize) -> Slot {
        Slot((0..bytes.div_ceil(8)).map(|_| UnsafeCell::new(0)).collect())
    }

    fn address(&self) -> *mut u8 {
        UnsafeCell::raw_get(self.0.as_ptr()).cast()
    }
}

/// One rank of a [`Shared`].
#[derive(Debug)]
pub(crate) struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

impl Threads {
    /// The engines of all ranks: for blocking calls and for those in flight.
    pub(crate) fn ranks(n: usize, config: Config) -> Vec<Engines> {
        let pair = Shared::pair(n, config, "world".into());
        (0..n).map(|rank| Threads::engines(rank, &pair)).collect()
    }

    fn engines(rank: usize, pair: &Pair) -> Engines {
        pair.each_ref()
            .map(|shared| -> Arc<dyn Engine> { Arc::new(Threads { rank, shared: shared.clone() }) })
    }
}

impl Shared {
    fn pair(ranks: usize, config: Config, name: String) -> Pair {
        let flight = format!("{name} (in flight)");
        [Shared::new(ranks, config, name, false), Shared::new(ranks, config, flight, true)]
    }

    fn new(ranks: usize, config: Config, name: String, flight: bool) -> Arc<Shared> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        // Who shares its core, with ranks or with the computation it overlaps, does not keep it.
        let patience = match (flight, ranks <= cores) {
            (true, _) => Patience { spins: 50, yields: 2 },
            (false, true) => Patience { spins: 100, yields: 100 },
            (false, false) => Patience { spins: 0, yields: 8 },
        };
        // Room for two rows of lengths, which ragged all-to-alls post.
        // And for an event.
        let slot = || Slot::new(INLINE.max(16 * ranks + 8));
        let turn = || Turn { sequence: 0, done: 0, claimed: vec![0; ranks].into(), event: None };
        Arc::new(Shared {
            ranks,
            config,
            patience,
            recorder: Recorder::new(name, ranks),
            entry: Count::new(),
            done: Count::new(),
            claims: (0..ranks).map(|_| Claims(AtomicU64::new(0))).collect(),
            turns: (0..ranks).map(|_| Mutex::new(turn())).collect(),
            slots: (0..ranks).map(|_| [slot(), slot()]).collect(),
            gone: (0..ranks).map(|_| AtomicU8::new(HERE)).collect(),
            failure: Mutex::new(None),
            mail: (0..ranks * ranks).map(|_| Mailbox::default()).collect(),
            device_mail: devices::Mail::default(),
            children: Mutex::new(HashMap::new()),
        })
    }

    fn slot(&self, rank: usize, sequence: u64) -> *mut u8 {
        self.slots[rank][(sequence % 2) as usize].address()
    }

    /// The failure of the group, if there is one.
    fn check(&self) -> Result<()> {
        if self.entry.has_failed()
            && let Some(error) = self.failure.lock().clone()
        {
            return Err(error);
        }
        Ok(())
    }

    /// Fails the group, unless all ranks have come to `target` meanwhile. The first failure is
    /// everybody's.
    fn fail(&self, error: Error, target: u64) -> Result<()> {
        let mut failure = self.failure.lock();
        if let Some(first) = &*failure {
            return Err(first.clone());
        }
        if !self.entry.fail(target) {
            return Ok(());
        }
        self.recorder.dump(&error);
        *failure = Some(error.clone());
        drop(failure);
        self.mail.iter().for_each(Mailbox::wake);
        Err(error)
    }

    /// Waits until all ranks have come to this call.
    fn enter(&self, rank: usize, call: &Call, sequence: u64) -> Result<()> {
        let target = self.ranks as u64 * (sequence + 1);
        if !self.entry.add(1, target) {
            return self.check();
        }
        let mut deadline = None;
        let missing = |r: &usize| self.recorder.begun(*r) <= sequence;
        // `gone` is read first: who leaves begins nothing after it.
        let lost = |r: &usize| self.gone[*r].load(Acquire) != HERE && missing(r);
        let nap = NAP.min(self.config.timeout);
        let wait = self.entry.wait(target, self.patience, nap, || {
            let now = Instant::now();
            now >= *deadline.get_or_insert(now + self.config.timeout)
                || (0..self.ranks).any(|r| lost(&r))
        });
        match wait {
            Wait::Reached => Ok(()),
            Wait::Failed => self.check(),
            Wait::Stopped => match (0..self.ranks).find(lost) {
                Some(who) => self.fail(self.gone_error(call, sequence, who), target),
                None => {
                    let missing = (0..self.ranks).filter(missing).collect();
                    self.fail(self.late_error(rank, call, sequence, missing), target)
                }
            },
        }
    }

    fn gone_error(&self, call: &Call, sequence: u64, who: usize) -> Error {
        let how = match self.gone[who].load(Acquire) {
            PANICKED => "it panicked",
            _ => "it dropped its group",
        };
        Error::Gone {
            op: call.to_string(),
            group: self.recorder.name().into(),
            sequence,
            rank: who,
            how: how.into(),
        }
    }

    fn late_error(&self, rank: usize, call: &Call, sequence: u64, missing: Vec<usize>) -> Error {
        Error::Timeout {
            op: call.to_string(),
            group: self.recorder.name().into(),
            sequence,
            rank,
            missing,
            waited: self.config.timeout,
            doing: self.recorder.doing(),
        }
    }

    fn mismatch(&self, sequence: u64, left: (usize, Call), right: (usize, Call)) -> Error {
        Error::Mismatch {
            group: self.recorder.name().into(),
            sequence,
            left_rank: left.0,
            left: left.1.to_string(),
            right_rank: right.0,
            right: right.1.to_string(),
        }
    }

    /// All ranks are here: did they call the same? Every rank finds the same answer.
    fn agree(&self, call: &Call, sequence: u64) -> Result<()> {
        if (0..self.ranks).all(|r| self.recorder.entry(r, sequence).is(call)) {
            return Ok(());
        }
        let all: Vec<Call> =
            (0..self.ranks).filter_map(|r| self.recorder.entry(r, sequence).call()).collect();
        match all.iter().position(|other| *other != all[0]) {
            Some(r) => self.fail(self.mismatch(sequence, (0, all[0]), (r, all[r])), u64::MAX),
            None => Ok(()),
        }
    }

    /// Ragged all-to-alls: what each rank sends must be what its peer expects. The lengths were
    /// posted in the slots, two rows a rank.
    fn agree_on_parts(&self, call: &Call, sequence: u64) -> Result<()> {
        let posted = |rank, i| self.posted_len(sequence, rank, i) as u64;
        let Some((from, to, sends, expects)) = layout::unequal_parts(self.ranks, posted) else {
            return Ok(());
        };
        let of = |len| Call { len: len as usize, ..*call };
        self.fail(self.mismatch(sequence, (from, of(sends)), (to, of(expects))), u64::MAX)
    }

    fn posted_len(&self, sequence: u64, rank: usize, index: usize) -> usize {
        // SAFETY: all ranks have posted two rows of `ranks` words, and nobody writes them before
        // this rank comes to its next call.
        unsafe { *self.slot(rank, sequence).cast::<u64>().add(index) as usize }
    }

    fn gave_up(&self, ticket: &Ticket, rank: usize, late: bool) -> Option<Error> {
        if let Err(e) = self.check() {
            return Some(e);
        }
        let error = if self.gone[ticket.peer].load(Acquire) != HERE {
            self.gone_error(&ticket.call, ticket.number, ticket.peer)
        } else if late {
            self.late_error(rank, &ticket.call, ticket.number, vec![ticket.peer])
        } else {
            return None;
        };
        self.fail(error, u64::MAX).err()
    }

    fn mailbox(&self, rank: usize, way: Way, peer: usize) -> &Mailbox {
        match way {
            Way::Send => &self.mail[rank * self.ranks + peer],
            Way::Recv => &self.mail[peer * self.ranks + rank],
        }
    }
}

impl Engine for Threads {
    unsafe fn collective(&self, call: &Call, io: Io<'_>) -> Result<()> {
        let (shared, rank) = (&*self.shared, self.rank);
        let mut turn = shared.turns[rank].lock();
        shared.check()?;
        let sequence = turn.sequence;
        turn.sequence += 1;
        let slot = shared.slot(rank, sequence);
        let inline = call.bytes() <= INLINE && call.ragged == 0;
        if let (Verb::AllToAll, Parts::Ragged(send), Parts::Ragged(recv)) =
            (call.verb, io.send, io.recv)
        {
            for (i, len) in send.iter().chain(recv).enumerate() {
                // SAFETY: the slot has room for two rows, and is ours until we arrive.
                unsafe { slot.cast::<u64>().add(i).write(*len as u64) };
            }
        } else if inline && let Some(bytes) = layout::payload(call, rank, shared.ranks) {
            // SAFETY: the input has as many bytes, at most `INLINE`; the slot is ours.
            unsafe { std::ptr::copy_nonoverlapping(io.input, slot, bytes) };
        }
        shared.recorder.begin(rank, sequence, call, io.input, io.output);
        shared.enter(rank, call, sequence)?;
        shared.agree(call, sequence)?;
        if call.verb == Verb::AllToAll && call.ragged != 0 {
            shared.agree_on_parts(call, sequence)?;
        }
        let sent = |from, to| shared.posted_len(sequence, from, to);
        let entries = || (0..shared.ranks).map(|r| shared.recorder.entry(r, sequence));
        let inputs = if inline {
            (0..shared.ranks).map(|r| shared.slot(r, sequence).cast_const()).collect()
        } else {
            entries().map(|e| with_exposed_provenance(e.input.load(Relaxed))).collect()
        };
        let outputs = entries().map(|e| with_exposed_provenance_mut(e.output.load(Relaxed)));
        let layout = Layout {
            call,
            ranks: shared.ranks,
            parts: io.recv,
            sent: &sent,
            inputs,
            outputs: outputs.collect(),
        };
        if inline {
            // SAFETY: all ranks have posted the payload of this call.
            unsafe { layout.alone(rank, io.output) };
        } else {
            // SAFETY: all ranks have posted buffers of this call, and leave it when all chunks
            // are done.
            unsafe { Work { shared, layout: &layout }.share(rank, &mut turn) };
        }
        shared.recorder.end(rank, sequence);
        Ok(())
    }

    unsafe fn post(&self, way: Way, call: &Call, peer: usize, address: *mut u8) -> Result<Ticket> {
        let shared = &*self.shared;
        shared.check()?;
        shared.recorder.posted(self.rank, call);
        let mailbox = shared.mailbox(self.rank, way, peer);
        match mailbox.post(way, *call, address) {
            Ok(number) => Ok(Ticket { way, peer, number, call: *call }),
            Err((number, sent, received)) => {
                let (from, to) =
                    if way == Way::Send { (self.rank, peer) } else { (peer, self.rank) };
                let error = shared.mismatch(number, (from, sent), (to, received));
                mailbox.withdraw(way, number);
                Err(shared.fail(error.clone(), u64::MAX).err().unwrap_or(error))
            }
        }
    }

    fn settle(&self, ticket: &Ticket) -> Result<()> {
        let shared = &*self.shared;
        let mailbox = shared.mailbox(self.rank, ticket.way, ticket.peer);
        if mailbox.look(ticket.number, shared.patience) {
            return Ok(());
        }
        shared.recorder.message(self.rank, Some(ticket.call));
        let deadline = Instant::now() + shared.config.timeout;
        let nap = NAP.min(shared.config.timeout);
        let result = mailbox.wait(ticket.way, ticket.number, nap, || {
            shared.gave_up(ticket, self.rank, Instant::now() >= deadline)
        });
        shared.recorder.message(self.rank, None);
        result
    }

    fn is_settled(&self, ticket: &Ticket) -> bool {
        let mailbox = self.shared.mailbox(self.rank, ticket.way, ticket.peer);
        mailbox.is_matched(ticket.number) || self.shared.check().is_err()
    }

    fn adopt(&self, ticket: &Ticket, buffer: Box<dyn Send>) {
        self.shared.mailbox(self.rank, ticket.way, ticket.peer).adopt(
            ticket.way,
            ticket.number,
            buffer,
        );
    }

    fn split(
        &self,
        color: usize,
        members: &[usize],
        name: String,
        site: &'static Location<'static>,
    ) -> Result<Engines> {
        let shared = &*self.shared;
        // The same on all ranks: they have just gathered their colours.
        let key = (shared.turns[self.rank].lock().sequence, color);
        let make = || Shared::pair(members.len(), shared.config, name);
        let pair = shared.children.lock().entry(key).or_insert_with(make).clone();
        let rank = members.iter().position(|r| *r == self.rank).unwrap_or(0);
        let engines = Threads::engines(rank, &pair);
        // Everybody has a handle after this: the registry may forget it.
        let call = Call::new(Verb::Split, crate::DType::U8, 0, site);
        // SAFETY: a split has no buffers.
        unsafe { self.collective(&call, Io::NONE) }?;
        shared.children.lock().remove(&key);
        Ok(engines)
    }

    fn name(&self) -> &str {
        self.shared.recorder.name()
    }

    fn report(&self) -> Value {
        self.shared.recorder.json()
    }

    fn leave(&self) {
        let how = if std::thread::panicking() { PANICKED } else { LEFT };
        self.shared.gone[self.rank].store(how, Release);
        self.shared.entry.wake_sleepers();
        self.shared.mail.iter().for_each(Mailbox::wake);
    }

    fn on_device(&self) -> Option<&dyn OnDevice> {
        device::runtime().map(|_| self as &dyn OnDevice)
    }
}
