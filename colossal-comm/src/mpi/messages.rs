//! Messages from one rank to another: a header, by which both know what the other meant, and a
//! body. A sender's bytes are copied, so that a time-out leaves it nothing.

use std::collections::HashMap;

use super::ffi::{self, Calls, Request, poll};
use super::{MESSAGES, Mpi};
use crate::call::Call;
use crate::engine::{Ticket, Way};
use crate::error::{Error, Result};
use crate::header::{HEADER, Header};

/// Numbers of messages that have tags of their own.
const TAGS: u64 = 8192;

/// What was posted and is not over.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// Messages to and from each peer, counted.
    next: HashMap<(bool, usize), u64>,
    open: HashMap<(bool, usize, u64), Open>,
}

/// A message under way.
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

fn key(ticket: &Ticket) -> (bool, usize, u64) {
    (ticket.way == Way::Send, ticket.peer, ticket.number)
}

fn tag(number: u64) -> i32 {
    MESSAGES + 2 * (number % TAGS) as i32
}

impl Mpi {
    /// # Safety
    /// [`crate::engine::Engine::post`].
    pub(super) unsafe fn post_message(
        &self,
        way: Way,
        call: &Call,
        peer: usize,
        address: *mut u8,
    ) -> Result<Ticket> {
        self.check()?;
        self.recorder.posted(self.comm.rank, call);
        let mut messages = self.messages.lock();
        let sends = way == Way::Send;
        let next = messages.next.entry((sends, peer)).or_insert(0);
        let number = *next;
        *next += 1;
        let mut header = Box::new(Header::new(call, number));
        let at = std::ptr::from_mut(&mut *header).cast::<u8>();
        let mut copy = Vec::new();
        let calls = ffi::calls();
        // SAFETY: header and copy are ours, on the heap, and kept in `open` until they have
        // arrived; the caller's buffer holds `call.len` elements.
        let (head, body) = unsafe {
            if sends {
                copy = std::slice::from_raw_parts(address, call.bytes()).to_vec();
                let head = self.comm.send(&calls, at, HEADER, peer, tag(number), false)?;
                let (from, tag) = (copy.as_ptr(), tag(number) + 1);
                (head, Some(self.comm.send(&calls, from, copy.len(), peer, tag, true)?))
            } else {
                (self.comm.recv(&calls, at, HEADER, peer, tag(number))?, None)
            }
        };
        drop(calls);
        let address = address.expose_provenance();
        let open = Open { header, head, _copy: copy, body, address, kept: None };
        messages.open.insert((sends, peer, number), open);
        Ok(Ticket { way, peer, number, call: *call })
    }

    /// Makes progress on a message; true when it has arrived.
    fn progress(&self, calls: &Calls, open: &mut Open, ticket: &Ticket) -> Result<bool> {
        if !open.head.test(calls)? {
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
            let (bytes, tag) = (ticket.call.bytes(), tag(ticket.number) + 1);
            // SAFETY: the poster keeps the buffer until the ticket is settled or adopted, and a
            // ticket with a body under way is settled only when that has ended.
            open.body = Some(unsafe { self.comm.recv(calls, to, bytes, ticket.peer, tag)? });
        }
        match &mut open.body {
            Some(body) => body.test(calls),
            None => Ok(false),
        }
    }

    pub(super) fn settle_message(&self, ticket: &Ticket) -> Result<()> {
        let Some(mut open) = self.messages.lock().open.remove(&key(ticket)) else {
            return Ok(());
        };
        self.recorder.message(self.comm.rank, Some(ticket.call));
        let (mut calls, timeout) = (ffi::calls(), self.config.timeout);
        let result = poll(&mut calls, timeout, |calls| self.progress(calls, &mut open, ticket));
        drop(calls);
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
                waited: timeout,
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

    pub(super) fn is_message_settled(&self, ticket: &Ticket) -> bool {
        match self.messages.lock().open.get_mut(&key(ticket)) {
            Some(open) => self.progress(&ffi::calls(), open, ticket).unwrap_or(true),
            None => true,
        }
    }

    pub(super) fn adopt_message(&self, ticket: &Ticket, buffer: Box<dyn Send>) {
        match self.messages.lock().open.get_mut(&key(ticket)) {
            Some(open) => open.kept = Some(buffer),
            // MPI may still use it.
            None => std::mem::forget(buffer),
        }
    }

    /// Everything that was posted and is not over stays with MPI.
    pub(super) fn abandon_messages(&self) {
        for (_, open) in self.messages.lock().open.drain() {
            std::mem::forget(open);
        }
    }
}
