//! Ranks as processes over the system's MPI: the engine for clusters of CPUs.
//!
//! Every collective begins with a handshake: each rank sends every other a packet of fixed size
//! with its call's signature and, if it is small, the payload. So a rank that is late or gone is
//! known by name, a mismatch is the same error on every rank, and a small collective is over after
//! one message each way. Packets are buffers of ours: a time-out leaves them to MPI and takes
//! nothing from the caller. Large payloads then move in place, by MPI's collectives that do not
//! block. Between handshake and end runs nothing but MPI and this file; should that not end in
//! time, a process has died, and all are ended by `MPI_Abort`, as MPI itself does.
//!
//! MPI moves bytes only. Reductions are ours, in rank order: the same bits as the threads engine
//! gives, for every type. An all-reduce is an all-to-all of slices, a local sum, and
//! the sums to all: 2n(p-1)/p, as the best of MPI's own.

mod ffi;

use std::collections::HashMap;
use std::panic::Location;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use serde_json::Value;

use crate::call::{Call, Verb};
use crate::element::DType;
use crate::engine::{Engine, Engines, Io, Parts, Ticket, Way};
use crate::error::{Error, Result};
use crate::group::Config;
use crate::header::{HEADER, Header};
use crate::layout::{self, Layout, payload, slice};
use crate::recorder::Recorder;
use ffi::{Comm, Cuts, Request, poll};

/// Payloads up to this many bytes travel inside the packet of the handshake, in groups of up to
/// [`FEW`] ranks.
const INLINE: usize = 1024;
const FEW: usize = 16;

/// Large reductions go through pieces of this many bytes, which stay in the cache.
const PIECE: usize = 8 << 20;

const PACKETS: i32 = 1;
const SHIFTS: i32 = 2;
/// Messages use the tags from here on, two each, and begin again after [`TAGS`].
const MESSAGES: i32 = 16;
const TAGS: u64 = 8192;

const LEFT: u32 = 1;
const PANICKED: u32 = 2;
const FAILED: u32 = 3;
/// One rank's access to a group of processes.
#[derive(Debug)]
pub(crate) struct Mpi {
    comm: Comm,
    config: Config,
    recorder: Recorder,
    turn: Mutex<Turn>,
    failure: Mutex<Option<Error>>,
    messages: Mutex<Messages>,
}

/// Locked during a collective.
#[derive(Debug)]
struct Turn {
    sequence: u64,
    /// This rank's packet, and one of each rank. 8-byte aligned; kept by MPI after a time-out.
    mine: Vec<u64>,
    theirs: Vec<u64>,
}

#[derive(Debug, Default)]
struct Messages {
    /// Messages to and from each peer, counted.
    next: HashMap<(bool, usize), u64>,
    open: HashMap<(bool, usize, u64), Open>,
}

/// A message under way. A sender's bytes are copied, so that a time-out leaves it nothing.
struct Open {
    header: Box<Header>,
    head: Request,
    /// A sender's copy.
    _copy: Vec<u8>,
    /// None while a receiver waits for the header.
    body: Option<Request>,
    address: usize,
    kept: Option<Box<dyn Send>>,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.header.show())
    }
}

impl Mpi {
    /// The engines of this process among all that `mpirun` or `srun` started.
    pub(crate) fn world(config: Config) -> Result<(usize, usize, Engines)> {
        let pair = Comm::world()?;
        let (rank, size) = (pair[0].rank, pair[0].size);
        Ok((rank, size, Mpi::engines(pair, config, "world".into())))
    }

    fn engines([comm, flight]: [Comm; 2], config: Config, name: String) -> Engines {
        let flight_name = format!("{name} (in flight)");
        [Arc::new(Mpi::new(comm, config, name)), Arc::new(Mpi::new(flight, config, flight_name))]
    }

    fn new(comm: Comm, config: Config, name: String) -> Mpi {
        let recorder = Recorder::new(name, comm.size);
        let words = (HEADER + if comm.size <= FEW { INLINE } else { 0 }) / 8;
        let turn = Turn { sequence: 0, mine: vec![0; words], theirs: vec![0; words * comm.size] };
        Mpi {
            comm,
            config,
            recorder,
            turn: Mutex::new(turn),
            failure: Mutex::new(None),
            messages: Mutex::default(),
        }
    }

    fn check(&self) -> Result<()> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    fn fail<T>(&self, error: Error) -> Result<T> {
        ffi::give_up();
        let mut failure = self.failure.lock();
        if failure.is_none() {
            self.recorder.dump(&error);
        }
        Err(failure.get_or_insert(error).clone())
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.config.timeout
    }

    /// Sends this rank's packet to all and waits for theirs.
    fn handshake(&self, turn: &mut Turn, call: &Call, sequence: u64) -> Result<()> {
        let (me, n, words) = (self.comm.rank, self.comm.size, turn.mine.len());
        let peers = || (0..n).filter(move |r| *r != me);
        let mut arrived: Vec<(usize, Option<Request>)> = Vec::with_capacity(n);
        let mut sent = Vec::with_capacity(n);
        for peer in peers() {
            let to = turn.theirs[peer * words..].as_mut_ptr().cast();
            // SAFETY: both buffers are ours, and left to MPI for ever if we give up.
            unsafe {
                arrived.push((peer, Some(self.comm.recv(to, 8 * words, peer, PACKETS)?)));
                let from = turn.mine.as_ptr().cast();
                sent.push(self.comm.send(from, 8 * words, peer, PACKETS, false)?);
            }
        }
        let mut gone = None;
        let ended = poll(self.deadline(), || {
            for (peer, request) in &mut arrived {
                if let Some(open) = request
                    && open.test()?
                {
                    *request = None;
                    let header = header_of(&turn.theirs, *peer, words);
                    if header.leaving != 0 {
                        gone = Some((*peer, header.leaving));
                    }
                }
            }
            let all = arrived.iter().all(|(_, request)| request.is_none());
            Ok(gone.is_some() || all && test_all(&mut sent)?)
        });
        let ended = ended.or_else(|e| self.fail(e))?;
        let group = || self.recorder.name().into();
        let error = if let Some((rank, how)) = gone {
            let how = match how {
                PANICKED => "it panicked",
                FAILED => "its group had failed",
                _ => "it dropped its group",
            };
            Error::Gone { op: call.to_string(), group: group(), sequence, rank, how: how.into() }
        } else if !ended {
            let mut missing: Vec<usize> =
                arrived.iter().filter(|(_, r)| r.is_some()).map(|(p, _)| *p).collect();
            if missing.is_empty() {
                // All came once, and some do not take what we send: they have given up.
                missing = peers().collect();
            }
            let doing = |(peer, request): &(usize, Option<Request>)| match request {
                Some(_) => format!("rank {peer} has not come to call {sequence}"),
                None => {
                    let header = header_of(&turn.theirs, *peer, words);
                    format!("rank {peer} is in {} (call {sequence})", header.show())
                }
            };
            let doing: Vec<String> = arrived.iter().map(doing).collect();
            Error::Timeout {
                op: call.to_string(),
                group: group(),
                sequence,
                rank: me,
                missing,
                waited: self.config.timeout,
                doing: doing.join(", "),
            }
        } else {
            // Every rank compares the same headers in the same order.
            let of = |rank| {
                if rank == me {
                    header_of(&turn.mine, 0, words)
                } else {
                    header_of(&turn.theirs, rank, words)
                }
            };
            let first = of(0);
            let Some(other) = (1..n).find(|r| !of(*r).same(&first)) else {
                return Ok(());
            };
            Error::Mismatch {
                group: group(),
                sequence,
                left_rank: 0,
                left: first.show(),
                right_rank: other,
                right: of(other).show(),
            }
        };
        if !error.is_mismatch() {
            // Who comes later learns it at once.
            self.goodbye(FAILED, words);
        }
        // MPI may still write or read the packets: they are left to it.
        std::mem::forget(std::mem::take(&mut turn.mine));
        std::mem::forget(std::mem::take(&mut turn.theirs));
        std::mem::forget((arrived, sent));
        self.fail(error)
    }

    /// Tells all ranks that this one will call nothing any more.
    fn goodbye(&self, why: u32, words: usize) {
        let header = Header::leaving(why);
        let mut packet = vec![0u64; words];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut packet);
        bytes[..HEADER].copy_from_slice(bytemuck::bytes_of(&header));
        for peer in (0..self.comm.size).filter(|r| *r != self.comm.rank) {
            // SAFETY: the packet is ours and left to MPI below.
            let request =
                unsafe { self.comm.send(packet.as_ptr().cast(), 8 * words, peer, PACKETS, false) };
            // Small packets leave at once; who has left already receives none.
            if let Ok(mut request) = request {
                let _ = request.test();
            }
        }
        std::mem::forget(packet);
    }

    /// All ranks are here and agree: waits for requests that use the caller's buffers.
    fn finish(&self, call: &Call, mut requests: Vec<Request>) -> Result<()> {
        match poll(self.deadline(), || test_all(&mut requests)) {
            Ok(true) => Ok(()),
            other => {
                // The buffers cannot be taken back from MPI: no error can be returned.
                let why = other.err().map_or_else(
                    || format!("not over after {:?}: a process has died", self.config.timeout),
                    |e| e.to_string(),
                );
                let rank = self.comm.rank;
                let error = Error::Engine { op: call.to_string(), reason: why };
                eprintln!("rank {rank} of group {}: {error}; all processes end", self.name());
                self.recorder.dump(&error);
                self.comm.abort()
            }
        }
    }

    /// An all-to-all of slices, and this rank's reduced.
    ///
    /// # Safety
    /// `input` holds `lens[r]` elements for each rank r, one after the other.
    unsafe fn reduced(&self, call: &Call, input: *const u8, lens: &[usize]) -> Result<Vec<u64>> {
        let (n, size) = (self.comm.size, call.dtype.size());
        let mine = lens[self.comm.rank];
        // Words, so that any type is aligned; each source begins at one.
        let stride = (mine * size).div_ceil(8);
        let mut got = vec![0u64; stride * n];
        let padded = stride * 8 / size;
        let mut sum = vec![0u64; stride];
        let send = Cuts::new(lens.iter().copied())?;
        let recv = Cuts::strided(mine, padded, n)?;
        // SAFETY: the caller's contract; `got` has a part for each rank, and `sum` one.
        unsafe {
            let to = got.as_mut_ptr().cast();
            let request = self.comm.all_to_all(input, &send, to, &recv, size)?;
            self.finish(call, vec![request])?;
            let base = got.as_ptr().cast::<u8>();
            let sources: Vec<*const u8> = (0..n).map(|r| base.add(r * stride * 8)).collect();
            let op = call.op.unwrap_or(crate::ReduceOp::Sum);
            call.dtype.reduce(op, &sources, &[sum.as_mut_ptr().cast()], mine);
        }
        Ok(sum)
    }

    /// A large payload, after the handshake.
    ///
    /// # Safety
    /// [`Engine::collective`].
    unsafe fn transfer(&self, call: &Call, io: Io<'_>) -> Result<()> {
        let (me, n, size) = (self.comm.rank, self.comm.size, call.dtype.size());
        let root = call.root.unwrap_or(0);
        let parts = |p: Parts<'_>| -> Vec<usize> { (0..n).map(|r| p.len(r)).collect() };
        // SAFETY: the caller's contract gives every buffer; each request is finished before
        // this returns.
        unsafe {
            let request = match call.verb {
                Verb::AllReduce | Verb::Reduce => {
                    let piece = (PIECE / size).max(n);
                    for at in (0..call.len).step_by(piece) {
                        let len = piece.min(call.len - at);
                        let lens: Vec<usize> =
                            (0..n).map(|r| slice(len, r + 1, n) - slice(len, r, n)).collect();
                        let sum = self.reduced(call, io.input.add(at * size), &lens)?;
                        let (from, to) = (sum.as_ptr().cast(), io.output.add(at * size));
                        let same = Cuts::same(lens[me], n)?;
                        let cuts = Cuts::new(lens.into_iter())?;
                        let request = match call.verb {
                            Verb::Reduce => self.comm.gather(from, to, &cuts, size, root)?,
                            _ => self.comm.all_to_all(from, &same, to, &cuts, size)?,
                        };
                        self.finish(call, vec![request])?;
                    }
                    return Ok(());
                }
                Verb::ReduceScatter => {
                    let lens = parts(io.recv);
                    let sum = self.reduced(call, io.input, &lens)?;
                    let bytes = lens[me] * size;
                    std::ptr::copy_nonoverlapping(sum.as_ptr().cast(), io.output, bytes);
                    return Ok(());
                }
                Verb::AllGather => {
                    let cuts = Cuts::new(parts(io.recv).into_iter())?;
                    // Of Open MPI's collectives that do not block, the all-gather takes five times
                    // as long as an all-to-all of the same bytes (4.1, two ranks, 1 MiB).
                    let same = Cuts::same(io.recv.len(me), n)?;
                    let request = self.comm.all_to_all(io.input, &same, io.output, &cuts, size)?;
                    // Returns here, and not below, because the cuts must outlive the request.
                    return self.finish(call, vec![request]);
                }
                Verb::Gather => {
                    let cuts = Cuts::new(parts(io.recv).into_iter())?;
                    let request = self.comm.gather(io.input, io.output, &cuts, size, root)?;
                    return self.finish(call, vec![request]);
                }
                Verb::Scatter => {
                    let cuts = Cuts::new(parts(io.recv).into_iter())?;
                    let request = self.comm.scatter(io.input, io.output, &cuts, size, root)?;
                    return self.finish(call, vec![request]);
                }
                Verb::AllToAll => {
                    let send = Cuts::new(parts(io.send).into_iter())?;
                    let recv = Cuts::new(parts(io.recv).into_iter())?;
                    let request = self.comm.all_to_all(io.input, &send, io.output, &recv, size)?;
                    return self.finish(call, vec![request]);
                }
                Verb::Broadcast => self.comm.broadcast(io.output, call.len, size, root)?,
                Verb::Shift => {
                    let (to, from) = ((me + root) % n, (me + n - root) % n);
                    let bytes = call.bytes();
                    let coming = self.comm.recv(io.output, bytes, from, SHIFTS)?;
                    let going = self.comm.send(io.input, bytes, to, SHIFTS, false)?;
                    return self.finish(call, vec![coming, going]);
                }
                Verb::Send | Verb::Recv | Verb::Barrier | Verb::Split => return Ok(()),
            };
            self.finish(call, vec![request])
        }
    }

    /// Ragged all-to-alls: every rank compares what all send with what all expect.
    fn agree_on_parts(&self, call: &Call, sequence: u64, io: &Io<'_>) -> Result<()> {
        let n = self.comm.size;
        let row: Vec<u64> = (0..2 * n)
            .map(|i| if i < n { io.send.len(i) } else { io.recv.len(i - n) } as u64)
            .collect();
        let mut all = vec![0u64; 2 * n * n];
        let (same, cuts) = (Cuts::same(2 * n, n)?, Cuts::strided(2 * n, 2 * n, n)?);
        // SAFETY: both buffers are ours until the request is finished.
        let request = unsafe {
            let (from, to) = (row.as_ptr().cast(), all.as_mut_ptr().cast());
            self.comm.all_to_all(from, &same, to, &cuts, 8)?
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

    /// Makes progress on a message; true when it has arrived.
    fn progress(&self, open: &mut Open, ticket: &Ticket) -> Result<bool> {
        if !open.head.test()? {
            return Ok(false);
        }
        if open.body.is_none() {
            // A receiver has the header now.
            let (len, dtype) = (open.header.len as usize, open.header.code >> 8 & 0xff);
            if len != ticket.call.len || dtype != ticket.call.dtype as u64 {
                return Err(Error::Mismatch {
                    group: self.recorder.name().into(),
                    sequence: ticket.number,
                    left_rank: ticket.peer,
                    left: open.header.show(),
                    right_rank: self.comm.rank,
                    right: ticket.call.to_string(),
                });
            }
            let to = std::ptr::with_exposed_provenance_mut(open.address);
            let tag = tag(ticket.number) + 1;
            // SAFETY: the poster keeps the buffer until the ticket is settled or adopted, and a
            // ticket with a body under way is settled only when that has ended.
            open.body = Some(unsafe { self.comm.recv(to, ticket.call.bytes(), ticket.peer, tag)? });
        }
        match &mut open.body {
            Some(body) => body.test(),
            None => Ok(false),
        }
    }
}

/// The header at the beginning of packet `index`.
fn header_of(packets: &[u64], index: usize, words: usize) -> Header {
    let bytes: &[u8] = bytemuck::cast_slice(&packets[index * words..(index + 1) * words]);
    bytemuck::pod_read_unaligned(&bytes[..HEADER])
}

fn test_all(requests: &mut Vec<Request>) -> Result<bool> {
    while let Some(request) = requests.last_mut() {
        if !request.test()? {
            return Ok(false);
        }
        requests.pop();
    }
    Ok(true)
}

fn tag(number: u64) -> i32 {
    MESSAGES + 2 * (number % TAGS) as i32
}

impl Engine for Mpi {
    unsafe fn collective(&self, call: &Call, io: Io<'_>) -> Result<()> {
        let (me, n) = (self.comm.rank, self.comm.size);
        let mut turn = self.turn.lock();
        self.check()?;
        let sequence = turn.sequence;
        turn.sequence += 1;
        self.recorder.begin(me, sequence, call, io.input, io.output);
        let words = turn.mine.len();
        let inline = call.ragged == 0 && HEADER + call.bytes() <= 8 * words;
        let packet: &mut [u8] = bytemuck::cast_slice_mut(&mut turn.mine);
        packet[..HEADER].copy_from_slice(bytemuck::bytes_of(&Header::new(call, sequence)));
        if inline && let Some(bytes) = payload(call, me, n) {
            // SAFETY: the input has as many bytes, and the packet room for them.
            unsafe {
                std::ptr::copy_nonoverlapping(io.input, packet[HEADER..].as_mut_ptr(), bytes);
            }
        }
        self.handshake(&mut turn, call, sequence)?;
        if inline {
            let of = |r: usize| {
                let packet = if r == me { &turn.mine[..] } else { &turn.theirs[r * words..] };
                packet[HEADER / 8..].as_ptr().cast::<u8>()
            };
            let sent = |_, _| 0;
            let inputs = (0..n).map(of).collect();
            // Only this rank's output is written.
            let outputs = (0..n).map(|_| io.output).collect();
            let layout = Layout { call, ranks: n, parts: io.recv, sent: &sent, inputs, outputs };
            // SAFETY: the packets hold all payloads of this call.
            unsafe { layout.alone(me, io.output) };
        } else {
            if call.verb == Verb::AllToAll && call.ragged != 0 {
                self.agree_on_parts(call, sequence, &io)?;
            }
            // SAFETY: the caller's contract; all ranks agree.
            unsafe { self.transfer(call, io) }.or_else(|e| self.fail(e))?;
        }
        self.recorder.end(me, sequence);
        Ok(())
    }

    unsafe fn post(&self, way: Way, call: &Call, peer: usize, address: *mut u8) -> Result<Ticket> {
        self.check()?;
        let mut messages = self.messages.lock();
        let sends = way == Way::Send;
        let next = messages.next.entry((sends, peer)).or_insert(0);
        let number = *next;
        *next += 1;
        let mut header = Box::new(Header::new(call, number));
        let at = std::ptr::from_mut(&mut *header).cast::<u8>();
        let mut copy = Vec::new();
        // SAFETY: header and copy are ours, on the heap, and kept in `open` until they have
        // arrived; the caller's buffer holds `call.len` elements.
        let (head, body) = unsafe {
            if sends {
                copy = std::slice::from_raw_parts(address, call.bytes()).to_vec();
                let head = self.comm.send(at, HEADER, peer, tag(number), false)?;
                let tag = tag(number) + 1;
                (head, Some(self.comm.send(copy.as_ptr(), copy.len(), peer, tag, true)?))
            } else {
                (self.comm.recv(at, HEADER, peer, tag(number))?, None)
            }
        };
        let address = address.expose_provenance();
        let open = Open { header, head, _copy: copy, body, address, kept: None };
        messages.open.insert((sends, peer, number), open);
        Ok(Ticket { way, peer, number, call: *call })
    }

    fn settle(&self, ticket: &Ticket) -> Result<()> {
        let key = (ticket.way == Way::Send, ticket.peer, ticket.number);
        let Some(mut open) = self.messages.lock().open.remove(&key) else { return Ok(()) };
        self.recorder.message(self.comm.rank, Some(ticket.call));
        let result = poll(self.deadline(), || self.progress(&mut open, ticket));
        self.recorder.message(self.comm.rank, None);
        let error = match result {
            Ok(true) => return Ok(()),
            Err(e) => e,
            Ok(false) => Error::Timeout {
                op: ticket.call.to_string(),
                group: self.recorder.name().into(),
                sequence: ticket.number,
                rank: self.comm.rank,
                missing: vec![ticket.peer],
                waited: self.config.timeout,
                doing: format!("rank {} did not take part", ticket.peer),
            },
        };
        if ticket.way == Way::Recv && open.body.is_some() {
            // MPI writes the caller's buffer, whose sender has died.
            eprintln!("{error}; all processes end");
            self.recorder.dump(&error);
            self.comm.abort();
        }
        // Header and copy are left to MPI.
        std::mem::forget(open);
        self.fail(error)
    }

    fn is_settled(&self, ticket: &Ticket) -> bool {
        let key = (ticket.way == Way::Send, ticket.peer, ticket.number);
        let mut messages = self.messages.lock();
        match messages.open.get_mut(&key) {
            Some(open) => self.progress(open, ticket).unwrap_or(true),
            None => true,
        }
    }

    fn adopt(&self, ticket: &Ticket, buffer: Box<dyn Send>) {
        let key = (ticket.way == Way::Send, ticket.peer, ticket.number);
        match self.messages.lock().open.get_mut(&key) {
            Some(open) => open.kept = Some(buffer),
            // MPI may still use it.
            None => std::mem::forget(buffer),
        }
    }

    fn split(
        &self,
        color: usize,
        _: &[usize],
        name: String,
        site: &'static Location<'static>,
    ) -> Result<Engines> {
        let call = Call::new(Verb::Split, DType::U8, 0, site);
        let none = Parts::Even(0);
        let io =
            Io { input: std::ptr::null(), output: std::ptr::null_mut(), send: none, recv: none };
        // SAFETY: a split has no buffers.
        unsafe { self.collective(&call, io) }?;
        Ok(Mpi::engines(self.comm.split(color)?, self.config, name))
    }

    fn name(&self) -> &str {
        self.recorder.name()
    }

    fn report(&self) -> Value {
        self.recorder.json()
    }

    fn leave(&self) {
        // Everything that was posted and is not over stays with MPI.
        for (_, open) in self.messages.lock().open.drain() {
            std::mem::forget(open);
        }
        let words = self.turn.lock().mine.len();
        if self.failure.lock().is_some() || words == 0 {
            return;
        }
        let why = if std::thread::panicking() { PANICKED } else { LEFT };
        if why == PANICKED {
            ffi::give_up();
        }
        self.goodbye(why, words);
    }
}
