//! What an engine must do: move bytes between ranks as a call says, or fail within the time-out.

use std::ffi::c_void;
use std::panic::Location;
use std::sync::Arc;

use serde_json::Value;

use crate::call::Call;
use crate::error::{Error, Result};

/// How a buffer is cut into one part for each rank, in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Parts<'a> {
    /// All of this length.
    Even(usize),
    /// One length each.
    Ragged(&'a [usize]),
}

impl Parts<'_> {
    pub(crate) fn len(&self, rank: usize) -> usize {
        match self {
            Parts::Even(len) => *len,
            Parts::Ragged(counts) => counts[rank],
        }
    }

    pub(crate) fn offset(&self, rank: usize) -> usize {
        match self {
            Parts::Even(len) => rank * len,
            Parts::Ragged(counts) => counts[..rank].iter().sum(),
        }
    }
}

/// This rank's buffers: bytes of `dtype` elements. Where a verb works in place, both are one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Io<'a> {
    pub(crate) input: *const u8,
    pub(crate) output: *mut u8,
    /// How an all-to-all's input is cut.
    pub(crate) send: Parts<'a>,
    /// How the output is cut, or the input of a reduce-scatter or scatter.
    pub(crate) recv: Parts<'a>,
}

impl Io<'_> {
    /// No buffers.
    pub(crate) const NONE: Io<'static> = Io {
        input: std::ptr::null(),
        output: std::ptr::null_mut(),
        send: Parts::Even(0),
        recv: Parts::Even(0),
    };
}

/// A direction of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Send,
    Recv,
}

/// A message that was posted, to be settled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    pub(crate) way: Way,
    pub(crate) peer: usize,
    pub(crate) number: u64,
    pub(crate) call: Call,
}

/// A rank's engine for blocking calls, and the one for calls in flight.
pub(crate) type Engines = [Arc<dyn Engine>; 2];

/// One rank's access to its group. Collectives of one handle are serialised by the engine.
pub(crate) trait Engine: Send + Sync + std::fmt::Debug {
    /// Runs a collective to its end.
    ///
    /// # Safety
    /// `io` holds the buffers that `call` describes, valid for this call. When it returns, with
    /// or without an error, nobody uses them any more.
    unsafe fn collective(&self, call: &Call, io: Io<'_>) -> Result<()>;

    /// Posts a message without waiting.
    ///
    /// # Safety
    /// `address` holds `call.len` elements that stay valid, and are left alone by others, until
    /// the ticket is settled or adopted.
    unsafe fn post(&self, way: Way, call: &Call, peer: usize, address: *mut u8) -> Result<Ticket>;

    /// Waits until a message has arrived. Afterwards, also after an error, nobody uses its buffer.
    fn settle(&self, ticket: &Ticket) -> Result<()>;

    /// Would [`Engine::settle`] return at once?
    fn is_settled(&self, ticket: &Ticket) -> bool;

    /// Keeps a message's buffer until the message has arrived: nobody waits for it any more.
    fn adopt(&self, ticket: &Ticket, buffer: Box<dyn Send>);

    /// New engines for this rank among `members`, all of whom call it with the same colour:
    /// one for blocking calls, one for those in flight.
    fn split(
        &self,
        color: usize,
        members: &[usize],
        name: String,
        site: &'static Location<'static>,
    ) -> Result<Engines>;

    /// The group's name.
    fn name(&self) -> &str;

    /// What the ranks that this engine can see called last.
    fn report(&self) -> Value;

    /// This rank will call nothing any more.
    fn leave(&self);

    /// The same verbs on device buffers, where the ranks have devices.
    fn on_device(&self) -> Option<&dyn OnDevice> {
        None
    }
}

/// What an engine whose ranks have devices must do. Nothing here waits for other ranks, except
/// [`OnDevice::wait`].
pub(crate) trait OnDevice: Send + Sync {
    /// Puts a collective on a stream.
    ///
    /// # Safety
    /// `io` holds device addresses of the buffers that `call` describes, valid until the stream
    /// has passed it; `stream` is one of this rank's device.
    unsafe fn enqueue(&self, call: &Call, io: Io<'_>, stream: *mut c_void) -> Result<()>;

    /// Puts messages on a stream, which may wait for each other.
    ///
    /// # Safety
    /// As of [`OnDevice::enqueue`], for each address.
    unsafe fn exchange(
        &self,
        messages: &[(Way, Call, usize, *mut u8)],
        stream: *mut c_void,
    ) -> Result<()>;

    /// Waits until all that is on the stream has ended.
    fn wait(&self, stream: *mut c_void, site: &'static Location<'static>) -> Result<()>;
}

/// A group of one: copies.
#[derive(Debug)]
pub(crate) struct Solo;

impl Engine for Solo {
    unsafe fn collective(&self, call: &Call, io: Io<'_>) -> Result<()> {
        if !std::ptr::eq(io.input, io.output) {
            // SAFETY: with one rank every verb's input and output are `call.len` elements.
            unsafe { std::ptr::copy_nonoverlapping(io.input, io.output, call.bytes()) };
        }
        Ok(())
    }

    unsafe fn post(&self, _: Way, call: &Call, peer: usize, _: *mut u8) -> Result<Ticket> {
        let reason = format!("there is no rank {peer} in a group of one");
        Err(Error::Argument { op: call.verb.name(), reason })
    }

    fn settle(&self, _: &Ticket) -> Result<()> {
        Ok(())
    }

    fn is_settled(&self, _: &Ticket) -> bool {
        true
    }

    fn adopt(&self, _: &Ticket, _: Box<dyn Send>) {}

    fn split(
        &self,
        _: usize,
        _: &[usize],
        _: String,
        _: &'static Location<'static>,
    ) -> Result<Engines> {
        Ok([Arc::new(Solo), Arc::new(Solo)])
    }

    fn name(&self) -> &str {
        "solo"
    }

    fn report(&self) -> Value {
        serde_json::json!({ "group": "solo", "world_size": 1, "ranks": [] })
    }

    fn leave(&self) {}

    fn on_device(&self) -> Option<&dyn OnDevice> {
        crate::device::runtime().map(|_| self as &dyn OnDevice)
    }
}

impl OnDevice for Solo {
    unsafe fn enqueue(&self, call: &Call, io: Io<'_>, stream: *mut c_void) -> Result<()> {
        let Some(runtime) = crate::device::runtime() else { return Ok(()) };
        if std::ptr::eq(io.input, io.output) {
            return Ok(());
        }
        let (from, to) = (io.input as u64, io.output as u64);
        // SAFETY: with one rank every verb's input and output are `call.len` elements.
        let put = unsafe { runtime.copy(stream, from, to, call.bytes()) };
        put.map_err(|reason| Error::Engine { op: call.to_string(), reason })
    }

    unsafe fn exchange(
        &self,
        messages: &[(Way, Call, usize, *mut u8)],
        _: *mut c_void,
    ) -> Result<()> {
        match messages.first() {
            None => Ok(()),
            Some((_, call, peer, _)) => {
                let reason = format!("there is no rank {peer} in a group of one");
                Err(Error::Argument { op: call.verb.name(), reason })
            }
        }
    }

    fn wait(&self, stream: *mut c_void, _: &'static Location<'static>) -> Result<()> {
        let Some(runtime) = crate::device::runtime() else { return Ok(()) };
        let ended = runtime.synchronize(stream);
        ended.map_err(|reason| Error::Engine { op: "wait".into(), reason })
    }
}
