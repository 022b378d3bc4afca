//! Ranks as threads with buffers on GPUs: one device for all, or devices that see each other's
//! memory.
//!
//! A rank records an event on its stream, posts it with the addresses of its buffers, and waits on
//! the host until all have. Its stream then waits for the events of all, does the rank's region of
//! the call ([`Layout`]), and a second event tells the others that it is done. So no kernel ever
//! waits for another rank's, which on one device would never end; and sums are in rank order, the
//! same bits in every run.

use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;
use std::panic::Location;
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{NAP, Threads, Turn};
use crate::call::{Call, Verb};
use crate::device::{DeviceEvent, DeviceRuntime, runtime};
use crate::engine::{Io, OnDevice, Parts, Way};
use crate::error::{Error, Result};
use crate::layout::Layout;

/// Messages that were sent and not received yet, by from and to, and receipts by number.
#[derive(Debug, Default)]
pub(super) struct Mail {
    box_of: Mutex<Boxes>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Boxes {
    sent: HashMap<(usize, usize), VecDeque<Sent>>,
    received: HashMap<u64, DeviceEvent>,
    next: u64,
}

#[derive(Debug)]
struct Sent {
    number: u64,
    call: Call,
    address: u64,
    ready: DeviceEvent,
}

impl Threads {
    fn runtime(&self, call: &Call) -> Result<&'static dyn DeviceRuntime> {
        runtime().ok_or_else(|| self.refused(call, "no runtime for GPUs was provided".into()))
    }

    fn refused(&self, call: &Call, reason: String) -> Error {
        Error::Engine { op: call.to_string(), reason }
    }

    /// A device failed at it: the group has, then.
    fn broken(&self, call: &Call, reason: String) -> Error {
        let error = self.refused(call, reason);
        let first = self.shared.fail(error.clone(), u64::MAX).err();
        self.shared.device_mail.wake.notify_all();
        first.unwrap_or(error)
    }

    /// Posts this call with an event and waits until all ranks have; their sequence number.
    fn meet(
        &self,
        turn: &mut MutexGuard<'_, Turn>,
        call: &Call,
        io: Io<'_>,
        event: DeviceEvent,
    ) -> Result<u64> {
        let (shared, rank) = (&*self.shared, self.rank);
        let sequence = turn.sequence;
        turn.sequence += 1;
        let slot = shared.slot(rank, sequence).cast::<u64>();
        // SAFETY: the slot has room for an event behind two rows, and is ours until we arrive.
        unsafe {
            if let (Verb::AllToAll, Parts::Ragged(send), Parts::Ragged(recv)) =
                (call.verb, io.send, io.recv)
            {
                for (i, len) in send.iter().chain(recv).enumerate() {
                    slot.add(i).write(*len as u64);
                }
            }
            slot.add(2 * shared.ranks).write(event.id);
        }
        let before = turn.event.replace(event);
        shared.recorder.begin(rank, sequence, call, io.input, io.output);
        if let Err(e) = shared.enter(rank, call, sequence) {
            // A peer may still be about to wait for it.
            std::mem::forget(before);
            return Err(e);
        }
        // Everybody is here, and so has put its wait for the event before on its stream.
        drop(before);
        shared.agree(call, sequence)?;
        if call.verb == Verb::AllToAll && call.ragged != 0 {
            shared.agree_on_parts(call, sequence)?;
        }
        Ok(sequence)
    }

    /// Lets the stream wait for what all ranks had put on theirs when they met.
    fn follow(&self, call: &Call, sequence: u64, stream: *mut c_void) -> Result<()> {
        let (shared, runtime) = (&*self.shared, self.runtime(call)?);
        for peer in (0..shared.ranks).filter(|r| *r != self.rank) {
            let event = shared.posted_len(sequence, peer, 2 * shared.ranks) as u64;
            // SAFETY: a rank keeps its event until all have come to a later call.
            let waits = unsafe { runtime.wait_for(stream, event) };
            waits.map_err(|e| self.broken(call, e))?;
        }
        Ok(())
    }
}

impl OnDevice for Threads {
    unsafe fn enqueue(&self, call: &Call, io: Io<'_>, stream: *mut c_void) -> Result<()> {
        let (shared, rank, runtime) = (&*self.shared, self.rank, self.runtime(call)?);
        let broken = |e: String| self.broken(call, e);
        let mut turn = shared.turns[rank].lock();
        shared.check()?;
        let ready = runtime.record(stream).map_err(broken)?;
        let sequence = self.meet(&mut turn, call, io, ready)?;
        self.follow(call, sequence, stream)?;
        let sent = |from, to: usize| shared.posted_len(sequence, from, to);
        let entries = || (0..shared.ranks).map(|r| shared.recorder.entry(r, sequence));
        let layout = Layout {
            call,
            ranks: shared.ranks,
            parts: io.recv,
            sent: &sent,
            inputs: entries().map(|e| with_exposed_provenance(e.input.load(Relaxed))).collect(),
            outputs: entries()
                .map(|e| with_exposed_provenance_mut(e.output.load(Relaxed)))
                .collect(),
        };
        let kind = (call.dtype, call.op.unwrap_or(crate::ReduceOp::Sum));
        let mut went = Ok(());
        let mut note = |result| {
            if went.is_ok() {
                went = result;
            }
        };
        let note = std::cell::RefCell::new(&mut note);
        // SAFETY: all ranks have posted device buffers of this call, which stay until the second
        // meeting is passed on every stream; each element is one rank's to write.
        unsafe {
            layout.run_by(
                (rank, 0, layout.region(rank)),
                |from, to, bytes| {
                    note.borrow_mut()(runtime.copy(stream, from as u64, to as u64, bytes));
                },
                |sources, targets, len| {
                    let sources: Vec<u64> = sources.iter().map(|s| *s as u64).collect();
                    let targets: Vec<u64> = targets.iter().map(|t| *t as u64).collect();
                    note.borrow_mut()(runtime.reduce(stream, kind, &sources, &targets, len));
                },
            );
        }
        went.map_err(broken)?;
        let done = runtime.record(stream).map_err(broken)?;
        let over = Call::new(Verb::Barrier, crate::DType::U8, 0, call.site);
        let last = self.meet(&mut turn, &over, Io::NONE, done)?;
        self.follow(call, last, stream)?;
        shared.recorder.end(rank, last);
        Ok(())
    }

    unsafe fn exchange(
        &self,
        messages: &[(Way, Call, usize, *mut u8)],
        stream: *mut c_void,
    ) -> Result<()> {
        let Some((_, first, ..)) = messages.first() else { return Ok(()) };
        let (mail, runtime) = (&self.shared.device_mail, self.runtime(first)?);
        self.shared.check()?;
        let mut waiting = vec![];
        for (_, call, to, address) in messages.iter().filter(|m| m.0 == Way::Send) {
            self.shared.recorder.posted(self.rank, call);
            let ready = runtime.record(stream).map_err(|e| self.broken(call, e))?;
            let mut boxes = mail.box_of.lock();
            let number = boxes.next;
            boxes.next += 1;
            let sent = Sent { number, call: *call, address: *address as u64, ready };
            boxes.sent.entry((self.rank, *to)).or_default().push_back(sent);
            waiting.push((number, call, *to));
        }
        mail.wake.notify_all();
        for (_, call, from, address) in messages.iter().filter(|m| m.0 == Way::Recv) {
            self.shared.recorder.posted(self.rank, call);
            let key = (*from, self.rank);
            let sent = self.await_mail(call, *from, |boxes| {
                boxes.sent.get_mut(&key).and_then(VecDeque::pop_front)
            })?;
            if (sent.call.dtype, sent.call.len) != (call.dtype, call.len) {
                let (left, right) = ((*from, sent.call), (self.rank, *call));
                let error = self.shared.mismatch(sent.number, left, right);
                let first = self.shared.fail(error.clone(), u64::MAX).err();
                mail.wake.notify_all();
                return Err(first.unwrap_or(error));
            }
            let broken = |e: String| self.broken(call, e);
            // SAFETY: the sender keeps event and buffer until it has the receipt, and lets its
            // stream wait for that; the target is the caller's, of as many bytes.
            unsafe {
                runtime.wait_for(stream, sent.ready.id).map_err(broken)?;
                let (from, to) = (sent.address, *address as u64);
                runtime.copy(stream, from, to, call.bytes()).map_err(broken)?;
            }
            let receipt = runtime.record(stream).map_err(broken)?;
            mail.box_of.lock().received.insert(sent.number, receipt);
            mail.wake.notify_all();
        }
        for (number, call, to) in waiting {
            let receipt = self.await_mail(call, to, |boxes| boxes.received.remove(&number))?;
            // SAFETY: the receipt is ours.
            let waits = unsafe { runtime.wait_for(stream, receipt.id) };
            waits.map_err(|e| self.broken(call, e))?;
        }
        Ok(())
    }

    fn wait(&self, stream: *mut c_void, site: &'static Location<'static>) -> Result<()> {
        let call = Call::new(Verb::Barrier, crate::DType::U8, 0, site);
        let ended = self.runtime(&call)?.synchronize(stream);
        ended.map_err(|e| self.broken(&call, e))?;
        self.shared.check()
    }
}

impl Threads {
    /// Waits until `take` finds what it looks for; who is missing when it is too late is `peer`.
    fn await_mail<R>(
        &self,
        call: &Call,
        peer: usize,
        take: impl Fn(&mut Boxes) -> Option<R>,
    ) -> Result<R> {
        let (shared, mail) = (&*self.shared, &self.shared.device_mail);
        let deadline = Instant::now() + shared.config.timeout;
        let mut boxes = mail.box_of.lock();
        loop {
            if let Some(found) = take(&mut boxes) {
                return Ok(found);
            }
            shared.check()?;
            let gone = shared.gone[peer].load(Relaxed) != super::HERE;
            if gone || Instant::now() >= deadline {
                drop(boxes);
                let error = match gone {
                    true => shared.gone_error(call, 0, peer),
                    false => shared.late_error(self.rank, call, 0, vec![peer]),
                };
                let first = shared.fail(error.clone(), u64::MAX).err();
                mail.wake.notify_all();
                return Err(first.unwrap_or(error));
            }
            mail.wake.wait_for(&mut boxes, NAP);
        }
    }
}
