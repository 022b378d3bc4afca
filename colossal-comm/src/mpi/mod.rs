//! Ranks as processes over the system's MPI: the engine for clusters of CPUs.
//!
//! Every collective begins with a handshake, in which small payloads travel (`handshake.rs`; of
//! large groups in rounds, `agreement.rs`); large ones follow in place (`transfer.rs`). MPI moves bytes only: reductions are ours, in rank order,
//! so they have the same bits as on the threads engine, for every type.

mod agreement;
mod ffi;
mod handshake;
mod messages;
mod transfer;

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::*};

use parking_lot::Mutex;
use serde_json::Value;

use crate::call::{Call, Verb};
use crate::element::DType;
use crate::engine::{Engine, Engines, Io, Ticket, Way};
use crate::error::{Error, Result};
use crate::group::Config;
use crate::layout::{Layout, payload};
use crate::recorder::Recorder;
use ffi::Comm;
use handshake::{LEFT, PANICKED, Turn};
use messages::Messages;

/// Tags.
const PACKETS: i32 = 1;
const SHIFTS: i32 = 2;
const ROLL: i32 = 3;
const PARTS: i32 = 4;
/// Messages use the tags from here on, two each.
const MESSAGES: i32 = 16;

/// One rank's access to a group of processes.
#[derive(Debug)]
pub(crate) struct Mpi {
    comm: Comm,
    config: Config,
    recorder: Recorder,
    turn: Mutex<Turn>,
    has_failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    messages: Mutex<Messages>,
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
        Mpi {
            config,
            recorder: Recorder::new(name, comm.size),
            turn: Mutex::new(Turn::new(comm.size)),
            has_failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            messages: Mutex::default(),
            comm,
        }
    }

    fn check(&self) -> Result<()> {
        if self.has_failed.load(Acquire) {
            return self.failure.lock().clone().map_or(Ok(()), Err);
        }
        Ok(())
    }

    fn fail<T>(&self, error: Error) -> Result<T> {
        ffi::give_up();
        let mut failure = self.failure.lock();
        if failure.is_none() {
            self.recorder.dump(&error);
        }
        let error = failure.get_or_insert(error).clone();
        self.has_failed.store(true, Release);
        Err(error)
    }
}

impl Engine for Mpi {
    unsafe fn collective(&self, call: &Call, io: Io<'_>) -> Result<()> {
        let (me, n) = (self.comm.rank, self.comm.size);
        let turn = &mut *self.turn.lock();
        self.check()?;
        let sequence = turn.sequence;
        turn.sequence += 1;
        self.recorder.begin(me, sequence, call, io.input, io.output);
        let inline = call.ragged == 0 && turn.holds(call.bytes());
        let bytes = if inline { payload(call, me, n).unwrap_or(0) } else { 0 };
        // SAFETY: the input has as many bytes, for which the packet has room.
        unsafe { self.handshake(turn, call, sequence, (io.input, bytes)) }?;
        if inline {
            let sent = |_, _| 0;
            let layout = Layout {
                call,
                ranks: n,
                parts: io.recv,
                sent: &sent,
                inputs: (0..n).map(|r| turn.payload(r, me)).collect(),
                // Only this rank's output is written.
                outputs: (0..n).map(|_| io.output).collect(),
            };
            // SAFETY: the packets hold all payloads of this call.
            unsafe { layout.alone(me, io.output) };
        } else {
            if call.verb == Verb::AllToAll && call.ragged != 0 {
                self.agree_on_parts(call, sequence, &io)?;
            }
            // SAFETY: the caller's contract; all ranks agree.
            unsafe { self.transfer(call, turn, &io) }.or_else(|e| self.fail(e))?;
        }
        self.recorder.end(me, sequence);
        Ok(())
    }

    unsafe fn post(&self, way: Way, call: &Call, peer: usize, address: *mut u8) -> Result<Ticket> {
        // SAFETY: the caller's contract.
        unsafe { self.post_message(way, call, peer, address) }
    }

    fn settle(&self, ticket: &Ticket) -> Result<()> {
        self.settle_message(ticket)
    }

    fn is_settled(&self, ticket: &Ticket) -> bool {
        self.is_message_settled(ticket)
    }

    fn adopt(&self, ticket: &Ticket, buffer: Box<dyn Send>) {
        self.adopt_message(ticket, buffer);
    }

    fn split(
        &self,
        color: usize,
        _: &[usize],
        name: String,
        site: &'static Location<'static>,
    ) -> Result<Engines> {
        let call = Call::new(Verb::Split, DType::U8, 0, site);
        // SAFETY: a split has no buffers.
        unsafe { self.collective(&call, Io::NONE) }?;
        Ok(Mpi::engines(self.comm.split(color)?, self.config, name))
    }

    fn name(&self) -> &str {
        self.recorder.name()
    }

    fn report(&self) -> Value {
        self.recorder.json()
    }

    fn leave(&self) {
        self.abandon_messages();
        let turn = self.turn.lock();
        if self.has_failed.load(Acquire) || turn.is_abandoned() {
            return;
        }
        let panics = std::thread::panicking();
        if panics {
            ffi::give_up();
        }
        self.goodbye(if panics { PANICKED } else { LEFT }, turn.sequence);
    }
}
