//! Collectives and messages in flight: they own their buffers.
//!
//! Each rank of a group has one thread, started by its first collective in flight, that runs what
//! was started in order; a rank that is alone waits for nobody, and runs it at once. The thread has
//! its own rendezvous, so what is in flight and what is called blocking never wait for each other.
//! Messages need no thread: a post lies at its peer until the peer posts too. A leaked [`Pending`]
//! leaks its buffer and nothing else; one that is dropped goes on, and its buffer is dropped after
//! it.

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

use crate::engine::{Engine, Ticket};
use crate::error::{Error, Result};

/// A collective or message that is under way and owns `B`.
#[derive(Debug)]
#[must_use = "the result is only known after wait()"]
pub struct Pending<B: Send + 'static>(Kind<B>);

#[derive(Debug)]
enum Kind<B: Send + 'static> {
    Collective(Receiver<Result<B>>),
    Message(Posted<B>),
}

impl<B: Send + 'static> Pending<B> {
    /// Waits for it and takes the buffer back.
    ///
    /// # Errors
    /// What the blocking form would have returned; the buffer is then lost.
    pub fn wait(self) -> Result<B> {
        match self.0 {
            Kind::Collective(result) => result.recv().unwrap_or_else(|_| {
                Err(Error::Argument {
                    op: "wait",
                    reason: "the rank's in-flight thread is gone".into(),
                })
            }),
            Kind::Message(posted) => posted.wait(),
        }
    }

    /// Has it ended? Then [`Pending::wait`] returns at once.
    pub fn is_done(&self) -> bool {
        match &self.0 {
            Kind::Collective(result) => !result.is_empty(),
            Kind::Message(posted) => posted.engine.is_settled(&posted.ticket),
        }
    }

    pub(crate) fn failed(error: Error) -> Pending<B> {
        let (send, receive) = bounded(1);
        // The receiver is in our hand.
        let _ = send.send(Err(error));
        Pending(Kind::Collective(receive))
    }

    /// Boxes the buffer, posts it by `post`, and owns it until it has arrived.
    pub(crate) fn message(
        engine: Arc<dyn Engine>,
        buffer: B,
        post: impl FnOnce(&dyn Engine, &mut B) -> Result<Ticket>,
    ) -> Pending<B> {
        let mut buffer = Kept(NonNull::from(Box::leak(Box::new(buffer))));
        // SAFETY: the box was leaked just now and is ours.
        match post(&*engine, unsafe { buffer.0.as_mut() }) {
            Ok(ticket) => Pending(Kind::Message(Posted { engine, ticket, buffer: Some(buffer) })),
            Err(e) => Pending::failed(e),
        }
    }
}

/// A box that is not touched while its memory is posted.
#[derive(Debug)]
struct Kept<B>(NonNull<B>);

// SAFETY: it is a box of `B`.
unsafe impl<B: Send> Send for Kept<B> {}

// SAFETY: nothing of `B` is reachable through a shared reference.
unsafe impl<B: Send> Sync for Kept<B> {}

impl<B> Kept<B> {
    fn take(self) -> B {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: it came from a box, and is given back once.
        *unsafe { Box::from_raw(this.0.as_ptr()) }
    }
}

impl<B> Drop for Kept<B> {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and is given back once.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// A message whose buffer nobody may touch until it is settled.
#[derive(Debug)]
struct Posted<B: Send + 'static> {
    engine: Arc<dyn Engine>,
    ticket: Ticket,
    buffer: Option<Kept<B>>,
}

impl<B: Send + 'static> Posted<B> {
    fn wait(mut self) -> Result<B> {
        let result = self.engine.settle(&self.ticket);
        // Settled, well or not: nobody uses the buffer any more.
        let buffer = self.buffer.take().map(Kept::take);
        result?;
        buffer.ok_or_else(|| Error::Argument { op: "wait", reason: "waited for twice".into() })
    }
}

impl<B: Send + 'static> Drop for Posted<B> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.engine.adopt(&self.ticket, Box::new(buffer));
        }
    }
}

type Job = Box<dyn FnOnce(&dyn Engine) + Send>;

/// The in-flight thread of one rank.
#[derive(Debug)]
pub(crate) struct Stream {
    rank: usize,
    alone: bool,
    engine: Arc<dyn Engine>,
    jobs: OnceLock<Sender<Job>>,
}

impl Stream {
    pub(crate) fn new(rank: usize, size: usize, engine: Arc<dyn Engine>) -> Stream {
        Stream { rank, alone: size == 1, engine, jobs: OnceLock::new() }
    }

    pub(crate) fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    pub(crate) fn start<B: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Engine) -> Result<B> + Send + 'static,
    ) -> Pending<B> {
        let (send, receive) = bounded(1);
        let job: Job = Box::new(move |engine| {
            // Nobody waits any more: the buffer is dropped here.
            let _ = send.send(work(engine));
        });
        if self.alone {
            job(&*self.engine);
        } else {
            // The thread ends when this sender is dropped, after all jobs.
            let _ = self.jobs.get_or_init(|| self.spawn()).send(job);
        }
        Pending(Kind::Collective(receive))
    }

    fn spawn(&self) -> Sender<Job> {
        let (send, receive) = unbounded::<Job>();
        let engine = self.engine.clone();
        std::thread::Builder::new()
            .name(format!("in flight {}", self.rank))
            .spawn(move || {
                receive.iter().for_each(|job| job(&*engine));
                engine.leave();
            })
            .expect("the system can start one more thread for each rank");
        send
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A thread that runs says itself when it is done; one that never ran cannot.
        if self.jobs.get().is_none() {
            self.engine.leave();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::{Group, ReduceOp};

    #[test]
    fn a_rank_that_is_alone_is_done_when_it_has_started() {
        let group = Group::solo();
        for value in 0..100 {
            let pending = group.all_reduce_start::<f32, _>(vec![value as f32; 3], ReduceOp::Sum);
            assert!(pending.is_done());
            assert_eq!(pending.wait().unwrap(), [value as f32; 3]);
        }
    }
}
