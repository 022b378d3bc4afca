//! Ranks with a GPU each, over NCCL: the engine for clusters of GPUs.
//!
//! NCCL never says that ranks disagree or that one is missing: it waits. So nothing here waits for
//! NCCL without looking at the clock and, when it takes long, at the store (`inquest.rs`): who is
//! in which call, who has left, who has died. The first that finds something wrong says so there,
//! aborts, and everybody else follows; `ncclCommAbort` ends the kernels that wait.
//!
//! On buffers of the host a call begins with a handshake, as over MPI: an all-gather of packets
//! with each rank's signature and, if it is small, its payload. On device buffers a call is put on
//! the caller's stream and returns; a thread of the group watches how it ends.

mod comm;
mod device;
mod host;
mod inquest;
mod library;
mod messages;
mod verbs;
mod watch;

use std::ffi::{c_int, c_void};
use std::panic::Location;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use serde_json::Value;

use crate::call::{Call, Verb};
use crate::element::DType;
use crate::engine::{Engine, Engines, Io, OnDevice, Ticket, Way};
use crate::error::{Error, Result};
use crate::group::{Config, Group};
use crate::header::HEADER;
use crate::launch::Launch;
use crate::layout::{Layout, payload};
use crate::recorder::Recorder;
use crate::store::Store;
use comm::{Comm, unique_id};
use device::{Device, Scratch, Stream};
use host::{INLINE, PACKET};
use library::{IN_PROGRESS, UniqueId};
use messages::Posted;
use verbs::To;
use watch::Watch;

impl Group {
    /// The group of all processes that were started together, with a GPU each, over NCCL.
    /// [`crate::Launch`] says which process this is, and rank 0 hands out NCCL's id at
    /// `COLOSSAL_STORE` (`host:port`), or at the port after `MASTER_PORT` of `MASTER_ADDR`, which
    /// `torchrun` sets. See [`Group::nccl`].
    ///
    /// # Errors
    /// Those of [`Group::nccl`], and [`Error::Argument`] when nothing says where rank 0 is.
    pub fn nccl_from_env(config: Config) -> Result<Group> {
        match Launch::from_env()? {
            None => Ok(Group::solo()),
            Some(launch) if launch.world_size == 1 => Ok(Group::solo()),
            Some(launch) => Group::nccl(launch, &crate::launch::store_address()?, config),
        }
    }

    /// This rank of a group over NCCL, on the GPU number `launch.local_rank`; rank 0 listens at
    /// `store`, a `host:port` that the others reach. NCCL (2.18 or newer) and the driver are loaded
    /// now, and only now.
    ///
    /// Verbs on slices of the host copy through the device; [`Group::on`] gives those on device
    /// buffers. Sums are NCCL's: the same bits on all ranks and, on the same machines, from run to
    /// run, but half precision is rounded at every step and not once.
    ///
    /// # Errors
    /// [`Error::Engine`] when NCCL, the driver or a GPU is not here or too old, or names the ranks
    /// that did not come within the time-out.
    pub fn nccl(launch: Launch, store: &str, config: Config) -> Result<Group> {
        library::nccl()?;
        let device = Device::of(launch.local_rank)?;
        let (rank, ranks) = (launch.rank, launch.world_size);
        let store = Store::join(store, rank, ranks, config.timeout)?;
        let by = Instant::now() + config.timeout;
        if rank == 0 {
            store.set("id", &unique_id()?.0)?;
        }
        let mut id = UniqueId([0; 128]);
        let bytes = store.wait("id", by)?;
        id.0.copy_from_slice(bytes.get(..128).ok_or_else(|| Error::Engine {
            op: "nccl".into(),
            reason: format!("rank 0 gave an id of {} bytes", bytes.len()),
        })?);
        device.enter()?;
        let comm = Comm::init(id, rank, ranks, by)?;
        let world = Arc::new(World { device, store, config });
        let engines = Nccl::engines(&world, comm, rank, (0..ranks).collect(), "world", "0")?;
        Ok(Group::of(rank, ranks, engines))
    }
}

/// What all groups of this process share.
#[derive(Debug)]
struct World {
    device: Device,
    store: Store,
    config: Config,
}

/// One rank's access to a group.
#[derive(Debug)]
struct Nccl {
    inner: Arc<Inner>,
    turn: Mutex<Turn>,
    watch: Watch,
}

/// What the thread that watches device calls shares.
#[derive(Debug)]
struct Inner {
    world: Arc<World>,
    comm: Comm,
    /// Messages do not wait for collectives.
    messages: Comm,
    rank: usize,
    /// Ranks of the world.
    members: Vec<usize>,
    /// The name in the store: no two groups have the same.
    key: String,
    recorder: Recorder,
    failure: Mutex<Option<Error>>,
}

/// Locked during a call.
#[derive(Debug)]
struct Turn {
    sequence: u64,
    stream: Stream,
    /// For messages of the host.
    side: Stream,
    input: Scratch,
    output: Scratch,
    packets: Scratch,
    mine: Vec<u64>,
    theirs: Vec<u64>,
    /// Messages that were posted and are not on the stream yet, and those that have arrived.
    posted: Vec<Posted>,
    numbers: u64,
}

impl Nccl {
    fn engines(
        world: &Arc<World>,
        comm: Comm,
        rank: usize,
        members: Vec<usize>,
        name: &str,
        key: &str,
    ) -> Result<Engines> {
        let by = Instant::now() + world.config.timeout;
        let split = || comm.split(0, rank, by);
        let (messages, flight, flights) = (split()?, split()?, split()?);
        let blocking =
            Nccl::new(world, [comm, messages], rank, members.clone(), name.into(), key.into())?;
        let (name, key) = (format!("{name} (in flight)"), format!("{key}f"));
        let flight = Nccl::new(world, [flight, flights], rank, members, name, key)?;
        Ok([Arc::new(blocking), Arc::new(flight)])
    }

    fn new(
        world: &Arc<World>,
        [comm, messages]: [Comm; 2],
        rank: usize,
        members: Vec<usize>,
        name: String,
        key: String,
    ) -> Result<Nccl> {
        let (n, device) = (members.len(), &world.device);
        let turn = Turn {
            sequence: 0,
            stream: device.stream()?,
            side: device.stream()?,
            input: Scratch::default(),
            output: Scratch::default(),
            packets: Scratch::default(),
            mine: vec![0; PACKET / 8],
            theirs: vec![0; n * PACKET / 8],
            posted: vec![],
            numbers: 0,
        };
        let inner = Inner {
            world: world.clone(),
            comm,
            messages,
            rank,
            recorder: Recorder::new(name, n),
            members,
            key,
            failure: Mutex::new(None),
        };
        Ok(Nccl { inner: Arc::new(inner), turn: Mutex::new(turn), watch: Watch::default() })
    }

    /// Begins a call: the group is sound, and the device this thread's.
    fn begin(&self, turn: &mut Turn, call: &Call, io: &Io<'_>) -> Result<u64> {
        self.inner.check()?;
        self.inner.world.device.enter()?;
        let sequence = turn.sequence;
        turn.sequence += 1;
        self.inner.recorder.begin(self.inner.rank, sequence, call, io.input, io.output);
        Ok(sequence)
    }
}

impl Inner {
    fn check(&self) -> Result<()> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    /// The first failure is this rank's for ever; the others learn it from the store.
    fn fail<T>(&self, error: Error) -> Result<T> {
        let mut failure = self.failure.lock();
        if let Some(first) = &*failure {
            return Err(first.clone());
        }
        self.recorder.dump(&error);
        *failure = Some(error.clone());
        drop(failure);
        self.comm.abort();
        self.messages.abort();
        let key = format!("{}/failed/{}", self.key, self.rank);
        // Without a store the others have only their time-out.
        let _ = self.world.store.set(&key, error.to_string().as_bytes());
        Err(error)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.world.config.timeout
    }

    fn to<'a>(&self, nccl: &'a library::Nccl, comm: library::RawComm, stream: Stream) -> To<'a> {
        To { nccl, comm, stream: stream.0, rank: self.rank, ranks: self.members.len() }
    }

    /// Runs calls of NCCL, and waits until they are on their stream: the first message between two
    /// ranks connects them, which takes both.
    fn issue(
        &self,
        call: &Call,
        sequence: u64,
        comm: &Comm,
        calls: impl FnOnce(&library::Nccl, library::RawComm) -> c_int,
    ) -> Result<()> {
        comm.run(call.verb.name(), calls).or_else(|e| self.fail(e))?;
        self.until(call, sequence, self.deadline(), || Ok(comm.state()? != IN_PROGRESS))
    }

    /// Puts a collective on a stream.
    ///
    /// # Safety
    /// [`To::collective`].
    unsafe fn put(&self, call: &Call, sequence: u64, io: &Io<'_>, stream: Stream) -> Result<()> {
        // SAFETY: the caller's contract.
        self.issue(call, sequence, &self.comm, |nccl, comm| unsafe {
            self.to(nccl, comm, stream).collective(call, io)
        })
    }

    /// Waits until `stream` has passed all that is on it now, or finds out why it does not.
    fn finish(&self, call: &Call, sequence: u64, stream: Stream) -> Result<()> {
        let device = &self.world.device;
        let mark = device.mark(stream).or_else(|e| self.fail(e))?;
        let result = self.passed(call, sequence, &mark, self.deadline());
        device.forget(mark);
        result
    }
}

impl Engine for Nccl {
    unsafe fn collective(&self, call: &Call, io: Io<'_>) -> Result<()> {
        let mut turn = self.turn.lock();
        let turn = &mut *turn;
        self.flush(turn)?;
        let sequence = self.begin(turn, call, &io)?;
        let inner = &*self.inner;
        let n = inner.members.len();
        let small = call.ragged == 0 && call.bytes() <= INLINE;
        let bytes = if small { payload(call, inner.rank, n).unwrap_or(0) } else { 0 };
        // SAFETY: the input has as many bytes.
        unsafe { self.handshake(turn, call, sequence, (io.input, bytes)) }?;
        if small {
            let of = |r: usize| {
                let packet: &[u8] = bytemuck::cast_slice(&turn.theirs);
                packet[r * PACKET + HEADER..].as_ptr()
            };
            let sent = |_, _| 0;
            let layout = Layout {
                call,
                ranks: n,
                parts: io.recv,
                sent: &sent,
                inputs: (0..n).map(of).collect(),
                // Only this rank's output is written.
                outputs: (0..n).map(|_| io.output).collect(),
            };
            // SAFETY: the packets hold all payloads of this call.
            unsafe { layout.alone(inner.rank, io.output) };
        } else {
            if call.verb == Verb::AllToAll && call.ragged != 0 {
                self.agree_on_parts(turn, call, sequence, &io)?;
            }
            self.transfer(turn, call, sequence, &io).or_else(|e| inner.fail(e))?;
        }
        inner.recorder.end(inner.rank, sequence);
        Ok(())
    }

    unsafe fn post(&self, way: Way, call: &Call, peer: usize, address: *mut u8) -> Result<Ticket> {
        self.inner.check()?;
        self.inner.recorder.posted(self.inner.rank, call);
        let mut turn = self.turn.lock();
        let ticket = Ticket { way, peer, number: turn.numbers, call: *call };
        turn.numbers += 1;
        turn.posted.push(Posted { ticket, address: address.expose_provenance(), kept: None });
        Ok(ticket)
    }

    fn settle(&self, ticket: &Ticket) -> Result<()> {
        let mut turn = self.turn.lock();
        if turn.posted.iter().all(|p| p.ticket.number != ticket.number) {
            // It went with others.
            return self.inner.check();
        }
        self.flush(&mut turn).or_else(|e| self.inner.fail(e))
    }

    fn is_settled(&self, ticket: &Ticket) -> bool {
        let turn = self.turn.lock();
        turn.posted.iter().all(|p| p.ticket.number != ticket.number) || self.inner.check().is_err()
    }

    fn adopt(&self, ticket: &Ticket, buffer: Box<dyn Send>) {
        let mut turn = self.turn.lock();
        if let Some(p) = turn.posted.iter_mut().find(|p| p.ticket.number == ticket.number) {
            p.kept = Some(buffer);
        }
    }

    fn split(
        &self,
        color: usize,
        members: &[usize],
        name: String,
        site: &'static Location<'static>,
    ) -> Result<Engines> {
        let call = Call::new(Verb::Split, DType::U8, 0, site);
        // SAFETY: a split has no buffers.
        unsafe { self.collective(&call, Io::NONE) }?;
        let (inner, turn) = (&*self.inner, self.turn.lock());
        inner.world.device.enter()?;
        let comm = inner.comm.split(color, inner.rank, inner.deadline());
        let comm = comm.or_else(|e| inner.fail(e))?;
        let rank = members.iter().position(|r| *r == inner.rank).unwrap_or(0);
        let members = members.iter().map(|r| inner.members[*r]).collect();
        // All members have made as many calls, so they find the same key, and nobody else does.
        let key = format!("{}.{}.{color}", inner.key, turn.sequence);
        Nccl::engines(&inner.world, comm, rank, members, &name, &key)
    }

    fn name(&self) -> &str {
        self.inner.recorder.name()
    }

    fn report(&self) -> Value {
        self.inner.recorder.json()
    }

    fn leave(&self) {
        let inner = &*self.inner;
        if inner.failure.lock().is_none() {
            let how = if std::thread::panicking() { "it panicked" } else { "it dropped its group" };
            let calls = self.turn.lock().sequence;
            let key = format!("{}/gone/{}", inner.key, inner.rank);
            // Without a store nobody can be told.
            let _ = inner.world.store.set(&key, format!("{calls} {how}").as_bytes());
        }
    }

    fn on_device(&self) -> Option<&dyn OnDevice> {
        Some(self)
    }
}

impl OnDevice for Nccl {
    unsafe fn enqueue(&self, call: &Call, io: Io<'_>, stream: *mut c_void) -> Result<()> {
        let mut turn = self.turn.lock();
        let (inner, stream) = (&*self.inner, Stream(stream));
        let sequence = self.begin(&mut turn, call, &io)?;
        if watch::checks() {
            // SAFETY: no payload.
            unsafe { self.handshake(&mut turn, call, sequence, (std::ptr::null(), 0)) }?;
        }
        // SAFETY: the caller's contract.
        unsafe { inner.put(call, sequence, &io, stream) }?;
        self.watch.over(&self.inner, call, sequence, stream)
    }

    unsafe fn exchange(
        &self,
        messages: &[(Way, Call, usize, *mut u8)],
        stream: *mut c_void,
    ) -> Result<()> {
        let _turn = self.turn.lock();
        let (inner, stream) = (&*self.inner, Stream(stream));
        let Some((_, first, ..)) = messages.first() else { return Ok(()) };
        inner.check()?;
        messages.iter().for_each(|(_, call, ..)| inner.recorder.posted(inner.rank, call));
        inner.world.device.enter()?;
        inner.issue(first, inquest::MESSAGE, &inner.messages, |nccl, comm| {
            inner.to(nccl, comm, stream).together(|to| {
                messages.iter().find_map(|(way, call, peer, address)| {
                    let t = library::datatype(call.dtype);
                    // SAFETY: the caller's contract.
                    unsafe { to.message(*way, *address, call.len, t, *peer) }
                })
            })
        })?;
        self.watch.over(&self.inner, first, inquest::MESSAGE, stream)
    }

    fn wait(&self, stream: *mut c_void, site: &'static Location<'static>) -> Result<()> {
        let inner = &*self.inner;
        inner.check()?;
        inner.world.device.enter()?;
        let call = Call::new(Verb::Barrier, DType::U8, 0, site);
        inner.finish(&call, inquest::WAIT, Stream(stream))
    }
}
