//! Device calls under way: a thread of the group sees how each ends, so that a time-out is one
//! also where nobody on the host waits.

use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Instant;

use crossbeam::channel::{Sender, unbounded};

use super::Inner;
use super::device::{Mark, Stream};
use crate::call::Call;
use crate::error::{Error, Result};

/// The thread, started by the first device call.
#[derive(Debug, Default)]
pub(super) struct Watch(OnceLock<Sender<Job>>);

#[derive(Debug)]
struct Job {
    call: Call,
    sequence: u64,
    mark: Mark,
    by: Instant,
}

impl Watch {
    /// Watches a call that was just put on `stream`.
    pub(super) fn over(
        &self,
        inner: &Arc<Inner>,
        call: &Call,
        sequence: u64,
        stream: Stream,
    ) -> Result<()> {
        let mark = inner.world.device.mark(stream).or_else(|e| inner.fail(e))?;
        let job = Job { call: *call, sequence, mark, by: inner.deadline() };
        let jobs = match self.0.get() {
            Some(jobs) => jobs,
            None => {
                let jobs = spawn(inner.clone())?;
                self.0.get_or_init(|| jobs)
            }
        };
        // The thread ends when this sender is dropped, after all jobs.
        let _ = jobs.send(job);
        Ok(())
    }
}

fn spawn(inner: Arc<Inner>) -> Result<Sender<Job>> {
    let (send, jobs) = unbounded::<Job>();
    let watch = move || {
        for Job { call, sequence, mark, by } in jobs {
            let device = &inner.world.device;
            // A failure is kept by the group: the next call on it returns it.
            let ended = device.enter().and_then(|()| inner.passed(&call, sequence, &mark, by));
            if ended.is_ok() {
                inner.recorder.end(inner.rank, sequence);
            }
            device.forget(mark);
        }
    };
    std::thread::Builder::new().name("nccl watch".into()).spawn(watch).map_err(|e| {
        Error::Engine { op: "nccl".into(), reason: format!("no thread to watch calls: {e}") }
    })?;
    Ok(send)
}

/// Does `COLOSSAL_CHECK=1` ask for a handshake before every device call?
pub(super) fn checks() -> bool {
    static CHECKS: LazyLock<bool> =
        LazyLock::new(|| std::env::var("COLOSSAL_CHECK").is_ok_and(|v| v != "0"));
    *CHECKS
}
