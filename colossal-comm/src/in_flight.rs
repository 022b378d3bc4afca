//! Collectives in flight: they own their buffers and make progress on a thread of their own.
//!
//! Each rank of a group has one such thread, started by the first `_start`, that runs what was
//! started in order. It has its own rendezvous, so what is in flight and what is called blocking
//! never wait for each other. A leaked [`Pending`] leaks its buffer and nothing else.

use std::sync::{Arc, OnceLock};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

use crate::error::{Error, Result};
use crate::group::Shared;

/// A collective that is under way and owns `B`.
#[derive(Debug)]
#[must_use = "the result is only known after wait()"]
pub struct Pending<B>(Receiver<Result<B>>);

impl<B> Pending<B> {
    /// Waits for it and takes the buffer back.
    ///
    /// # Errors
    /// What the blocking form would have returned; the buffer is then lost.
    pub fn wait(self) -> Result<B> {
        self.0.recv().unwrap_or_else(|_| {
            Err(Error::Argument {
                op: "wait",
                reason: "the rank's in-flight thread is gone".into(),
            })
        })
    }

    /// Has it ended? Then [`Pending::wait`] returns at once.
    pub fn is_done(&self) -> bool {
        !self.0.is_empty()
    }

    pub(crate) fn failed(error: Error) -> Pending<B> {
        let (send, receive) = bounded(1);
        // The receiver is in our hand.
        let _ = send.send(Err(error));
        Pending(receive)
    }
}

type Job = Box<dyn FnOnce(&Shared, usize) + Send>;

/// The in-flight thread of one rank.
#[derive(Debug)]
pub(crate) struct Stream {
    rank: usize,
    shared: Arc<Shared>,
    jobs: OnceLock<Sender<Job>>,
}

impl Stream {
    pub(crate) fn new(rank: usize, shared: Arc<Shared>) -> Stream {
        Stream { rank, shared, jobs: OnceLock::new() }
    }

    pub(crate) fn start<B: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared, usize) -> Result<B> + Send + 'static,
    ) -> Pending<B> {
        let (send, receive) = bounded(1);
        let job: Job = Box::new(move |shared, rank| {
            // Nobody waits any more: the buffer is dropped here.
            let _ = send.send(work(shared, rank));
        });
        // The thread ends when this sender is dropped, after all jobs.
        let _ = self.jobs.get_or_init(|| self.spawn()).send(job);
        Pending(receive)
    }

    fn spawn(&self) -> Sender<Job> {
        let (send, receive) = unbounded::<Job>();
        let (rank, shared) = (self.rank, self.shared.clone());
        std::thread::Builder::new()
            .name(format!("in flight {rank}"))
            .spawn(move || {
                receive.iter().for_each(|job| job(&shared, rank));
                shared.leave(rank);
            })
            .expect("the system can start one more thread for each rank");
        send
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A thread that runs says itself when it is done; one that never ran cannot.
        if self.jobs.get().is_none() {
            self.shared.leave(self.rank);
        }
    }
}
