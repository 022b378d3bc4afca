//! A communicator of NCCL that never blocks: every call is polled, and given up by an abort.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::library::{CommConfig, IN_PROGRESS, Nccl, RawComm, UniqueId, nccl, nccl_says};
use crate::error::{Error, Result};

/// How long a communicator that is dropped waits for what is still on its way.
const FAREWELL: Duration = Duration::from_secs(5);

/// One rank of a communicator.
#[derive(Debug)]
pub(super) struct Comm {
    nccl: &'static Nccl,
    handle: Mutex<Handle>,
}

/// Null after an abort.
#[derive(Debug)]
struct Handle(RawComm);

// SAFETY: a communicator may be used by any thread, one at a time, which the lock sees to.
unsafe impl Send for Handle {}

/// A fresh id, for one rank to hand to all.
pub(super) fn unique_id() -> Result<UniqueId> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: the pointer is valid.
    checked("ncclGetUniqueId", unsafe { (nccl()?.ncclGetUniqueId)(&raw mut id) })?;
    Ok(id)
}

fn checked(op: &str, code: c_int) -> Result<()> {
    match code {
        0 | IN_PROGRESS => Ok(()),
        code => {
            let reason = format!("NCCL error {code}: {}", nccl_says(code));
            Err(Error::Engine { op: op.into(), reason })
        }
    }
}

fn late(op: &str) -> Error {
    let reason = "NCCL is not done in time: a rank is not here, or cannot be reached";
    Error::Engine { op: op.into(), reason: reason.into() }
}

impl Comm {
    /// Joins the ranks that hold `id`.
    pub(super) fn init(id: UniqueId, rank: usize, ranks: usize, by: Instant) -> Result<Comm> {
        let (nccl, mut raw, mut config) = (nccl()?, null_mut(), CommConfig::not_blocking());
        let (rank, ranks) = (rank as c_int, ranks as c_int);
        // SAFETY: the pointers are valid for the call, which copies what they point to.
        let code = unsafe {
            (nccl.ncclCommInitRankConfig)(&raw mut raw, ranks, id, rank, &raw mut config)
        };
        let comm = Comm { nccl, handle: Mutex::new(Handle(raw)) };
        checked("ncclCommInitRankConfig", code)?;
        comm.settle("ncclCommInitRankConfig", by)?;
        Ok(comm)
    }

    /// A communicator of the ranks that name the same colour, in their order here.
    pub(super) fn split(&self, color: usize, rank: usize, by: Instant) -> Result<Comm> {
        let mut config = CommConfig::not_blocking();
        let mut raw = null_mut();
        self.run("ncclCommSplit", |nccl, parent| {
            let (color, key) = (color as c_int, rank as c_int);
            // SAFETY: the pointers outlive the call, which is polled to its end below.
            unsafe { (nccl.ncclCommSplit)(parent, color, key, &raw mut raw, &raw mut config) }
        })?;
        self.settle("ncclCommSplit", by)?;
        let comm = Comm { nccl: self.nccl, handle: Mutex::new(Handle(raw)) };
        comm.settle("ncclCommSplit", by)?;
        Ok(comm)
    }

    /// Runs calls of NCCL. They are on their stream once [`Comm::state`] is not in progress.
    pub(super) fn run(&self, op: &str, calls: impl FnOnce(&Nccl, RawComm) -> c_int) -> Result<()> {
        let handle = self.handle.lock();
        if handle.0.is_null() {
            return Err(Error::Engine { op: op.into(), reason: "the group was aborted".into() });
        }
        checked(op, calls(self.nccl, handle.0))
    }

    /// Polls until nothing is in progress on the host; after `by` the communicator is aborted.
    fn settle(&self, op: &str, by: Instant) -> Result<()> {
        for look in 0u64.. {
            match self.state()? {
                IN_PROGRESS if Instant::now() >= by => {
                    self.abort();
                    return Err(late(op));
                }
                IN_PROGRESS if look < 100 => std::thread::yield_now(),
                IN_PROGRESS => std::thread::sleep(Duration::from_micros(100)),
                code => return checked(op, code),
            }
        }
        Ok(())
    }

    /// What has happened meanwhile: 0 when all is well.
    pub(super) fn state(&self) -> Result<c_int> {
        let handle = self.handle.lock();
        let mut state = 0;
        if !handle.0.is_null() {
            // SAFETY: a communicator that was not aborted, and a valid pointer.
            let code = unsafe { (self.nccl.ncclCommGetAsyncError)(handle.0, &raw mut state) };
            checked("ncclCommGetAsyncError", code)?;
        }
        Ok(state)
    }

    /// Takes everything back from the streams: kernels that wait for peers end.
    pub(super) fn abort(&self) {
        let raw = std::mem::replace(&mut self.handle.lock().0, null_mut());
        if !raw.is_null() {
            // SAFETY: nobody uses the communicator any more.
            unsafe { (self.nccl.ncclCommAbort)(raw) };
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        let raw = self.handle.lock().0;
        if raw.is_null() {
            return;
        }
        // SAFETY: the communicator is ours, and alive until it is destroyed or aborted.
        let code = unsafe { (self.nccl.ncclCommFinalize)(raw) };
        let finalised = checked("ncclCommFinalize", code)
            .and_then(|()| self.settle("ncclCommFinalize", Instant::now() + FAREWELL));
        match finalised {
            // SAFETY: as above; after it nobody has the handle.
            Ok(()) => unsafe {
                (self.nccl.ncclCommDestroy)(raw);
                self.handle.lock().0 = null_mut();
            },
            Err(_) => self.abort(),
        }
    }
}
