//! Messages from one rank to another, one by one or in batches, blocking or in flight.

use std::panic::Location;

use crate::call::{Call, Verb};
use crate::element::Element;
use crate::engine::{Ticket, Way};
use crate::error::{Error, Result};
use crate::group::Group;
use crate::in_flight::Pending;

/// One message of a [`Group::batch`].
#[derive(Debug)]
pub enum Message<'a, T> {
    /// Send these elements to this rank.
    Send(&'a [T], usize),
    /// Receive as many elements from this rank.
    Recv(&'a mut [T], usize),
}

impl Group {
    /// Sends to one rank; returns when it has been received.
    #[track_caller]
    pub fn send<T: Element>(&self, buf: &[T], to: usize) -> Result<()> {
        self.batch(&mut [Message::Send(buf, to)])
    }

    /// Receives from one rank what it sent, in order.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it sent another type or length.
    #[track_caller]
    pub fn recv<T: Element>(&self, buf: &mut [T], from: usize) -> Result<()> {
        self.batch(&mut [Message::Recv(buf, from)])
    }

    /// Sends and receives at once; returns when all have arrived. No order of the messages can
    /// make ranks wait for each other for ever, so a ring is one call:
    ///
    /// ```
    /// use colossal_comm::{Message, on_ranks};
    /// let from = on_ranks(4, |g| {
    ///     let (me, n) = (g.rank(), g.world_size());
    ///     let mut got = [0u32];
    ///     g.batch(&mut [
    ///         Message::Send(&[me as u32], (me + 1) % n),
    ///         Message::Recv(&mut got, (me + n - 1) % n),
    ///     ])
    ///     .unwrap();
    ///     got[0]
    /// });
    /// assert_eq!(from, [3, 0, 1, 2]);
    /// ```
    #[track_caller]
    pub fn batch<T: Element>(&self, messages: &mut [Message<'_, T>]) -> Result<()> {
        let site = Location::caller();
        let calls = messages.iter().map(|message| match message {
            Message::Send(buf, to) => self.message_call::<T>(Way::Send, buf.len(), *to, site),
            Message::Recv(buf, from) => self.message_call::<T>(Way::Recv, buf.len(), *from, site),
        });
        let calls = calls.collect::<Result<Vec<Call>>>()?;
        let engine = &*self.0.engine;
        let mut tickets: Vec<Ticket> = Vec::with_capacity(calls.len());
        let mut result = Ok(());
        for (message, call) in messages.iter_mut().zip(&calls) {
            let (way, peer, address) = match message {
                Message::Send(buf, to) => (Way::Send, *to, buf.as_ptr().cast::<u8>().cast_mut()),
                Message::Recv(buf, from) => (Way::Recv, *from, buf.as_mut_ptr().cast::<u8>()),
            };
            // SAFETY: the buffer is borrowed until this function returns, which settles every
            // ticket first; a sender's is only read.
            match unsafe { engine.post(way, call, peer, address) } {
                Ok(ticket) => tickets.push(ticket),
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
        }
        tickets.iter().fold(result, |result, ticket| {
            let settled = engine.settle(ticket);
            result.and(settled)
        })
    }

    /// [`Group::send`] in flight: the buffer comes back when it has been received.
    #[track_caller]
    pub fn send_start<T, B>(&self, buf: B, to: usize) -> Pending<B>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
    {
        let call = self.message_call::<T>(Way::Send, buf.as_ref().len(), to, Location::caller());
        Pending::message(self.0.engine.clone(), buf, |engine, buf| {
            let address = (*buf).as_ref().as_ptr().cast::<u8>().cast_mut();
            // SAFETY: `Pending` keeps the buffer until the ticket is settled, or has the engine
            // keep it; it is only read.
            unsafe { engine.post(Way::Send, &call?, to, address) }
        })
    }

    /// [`Group::recv`] in flight: the buffer comes back filled.
    #[track_caller]
    pub fn recv_start<T, B>(&self, mut buf: B, from: usize) -> Pending<B>
    where
        T: Element,
        B: AsMut<[T]> + Send + 'static,
    {
        let call = self.message_call::<T>(Way::Recv, buf.as_mut().len(), from, Location::caller());
        Pending::message(self.0.engine.clone(), buf, |engine, buf| {
            let address = buf.as_mut().as_mut_ptr().cast::<u8>();
            // SAFETY: as in `send_start`.
            unsafe { engine.post(Way::Recv, &call?, from, address) }
        })
    }

    pub(crate) fn message_call<T: Element>(
        &self,
        way: Way,
        len: usize,
        peer: usize,
        site: &'static Location<'static>,
    ) -> Result<Call> {
        let verb = if way == Way::Send { Verb::Send } else { Verb::Recv };
        self.has(verb.name(), peer)?;
        if peer == self.rank() {
            let reason = format!("rank {peer} cannot exchange messages with itself");
            return Err(Error::Argument { op: verb.name(), reason });
        }
        self.count(verb, if way == Way::Send { size_of::<T>() * len } else { 0 });
        Ok(Call::new(verb, T::TYPE, len, site).root(peer))
    }
}
