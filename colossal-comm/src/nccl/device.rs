//! A GPU as far as collectives need it: a context, a stream, memory, and a way to see how far a
//! stream has come without waiting in the driver.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use parking_lot::Mutex;

use super::library::{Cuda, RawEvent, RawStream, cuda, cuda_checked};
use crate::error::{Error, Result};

/// `CU_STREAM_NON_BLOCKING`: does not wait for the default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const NO_TIMING: u32 = 2;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: c_int = 600;

/// A device's primary context, which the runtime and every other library use too.
#[derive(Debug)]
pub(super) struct Device {
    cuda: &'static Cuda,
    context: *mut c_void,
    /// Events that are not in use.
    events: Mutex<Vec<Mark>>,
}

// SAFETY: contexts, streams and events may be used by any thread; the driver has its own locks.
unsafe impl Send for Device {}

// SAFETY: as above.
unsafe impl Sync for Device {}

/// A stream of ours.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stream(pub(super) RawStream);

// SAFETY: as of `Device`.
unsafe impl Send for Stream {}

// SAFETY: as of `Device`.
unsafe impl Sync for Stream {}

/// A place in a stream.
#[derive(Debug)]
pub(super) struct Mark(RawEvent);

// SAFETY: as of `Device`.
unsafe impl Send for Mark {}

impl Device {
    /// Device `local_rank`, or, with fewer devices than ranks on this host, an error.
    pub(super) fn of(local_rank: usize) -> Result<Device> {
        let cuda = cuda()?;
        let (mut count, mut ordinal, mut context) = (0, 0, null_mut());
        // SAFETY: the pointers are valid.
        unsafe {
            cuda_checked("cuDeviceGetCount", (cuda.cuDeviceGetCount)(&raw mut count))?;
            if local_rank >= count as usize {
                let reason = format!(
                    "this is rank {local_rank} of its host, which shows {count} GPU(s): start one process for each, and see CUDA_VISIBLE_DEVICES"
                );
                return Err(Error::Engine { op: "nccl".into(), reason });
            }
            let code = (cuda.cuDeviceGet)(&raw mut ordinal, local_rank as c_int);
            cuda_checked("cuDeviceGet", code)?;
            let code = (cuda.cuDevicePrimaryCtxRetain)(&raw mut context, ordinal);
            cuda_checked("cuDevicePrimaryCtxRetain", code)?;
        }
        Ok(Device { cuda, context, events: Mutex::default() })
    }

    /// Makes the device this thread's: before every call of CUDA or NCCL.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: a context that we hold.
        cuda_checked("cuCtxSetCurrent", unsafe { (self.cuda.cuCtxSetCurrent)(self.context) })
    }

    pub(super) fn stream(&self) -> Result<Stream> {
        let mut stream = null_mut();
        // SAFETY: the pointer is valid, and the context ours.
        let code = unsafe { (self.cuda.cuStreamCreate)(&raw mut stream, NON_BLOCKING) };
        cuda_checked("cuStreamCreate", code)?;
        Ok(Stream(stream))
    }

    /// Marks how far `stream` is filled.
    pub(super) fn mark(&self, stream: Stream) -> Result<Mark> {
        let kept = self.events.lock().pop();
        let mark = match kept {
            Some(mark) => mark,
            None => {
                let mut event = null_mut();
                // SAFETY: the pointer is valid.
                let code = unsafe { (self.cuda.cuEventCreate)(&raw mut event, NO_TIMING) };
                cuda_checked("cuEventCreate", code)?;
                Mark(event)
            }
        };
        // SAFETY: both are valid; the caller of a verb vouches for its stream.
        cuda_checked("cuEventRecord", unsafe { (self.cuda.cuEventRecord)(mark.0, stream.0) })?;
        Ok(mark)
    }

    /// Has the stream come to the mark?
    pub(super) fn passed(&self, mark: &Mark) -> Result<bool> {
        // SAFETY: a valid event.
        match unsafe { (self.cuda.cuEventQuery)(mark.0) } {
            NOT_READY => Ok(false),
            code => cuda_checked("cuEventQuery", code).map(|()| true),
        }
    }

    /// The mark is not needed any more.
    pub(super) fn forget(&self, mark: Mark) {
        self.events.lock().push(mark);
    }

    /// # Safety
    /// `bytes` bytes at `from`, valid until the stream has passed it, and at the device's `to`.
    pub(super) unsafe fn copy_in(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        let code = unsafe { (self.cuda.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, stream.0) };
        cuda_checked("cuMemcpyHtoDAsync", code)
    }

    /// # Safety
    /// `bytes` bytes at `to`, left alone until the stream has passed it, and at the device's
    /// `from`.
    pub(super) unsafe fn copy_out(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: Stream,
    ) -> Result<()> {
        // SAFETY: the caller's contract.
        let code = unsafe { (self.cuda.cuMemcpyDtoHAsync_v2)(to.cast(), from, bytes, stream.0) };
        cuda_checked("cuMemcpyDtoHAsync", code)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        for mark in self.events.lock().drain(..) {
            // SAFETY: an event of ours, which nobody uses.
            unsafe { (self.cuda.cuEventDestroy_v2)(mark.0) };
        }
    }
}

/// Device memory that grows.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    address: u64,
    bytes: usize,
}

impl Scratch {
    /// The address of at least `bytes` bytes; what was there before may be gone.
    pub(super) fn at_least(&mut self, device: &Device, bytes: usize) -> Result<u64> {
        if bytes > self.bytes {
            let bytes = bytes.next_power_of_two().max(4096);
            self.free(device);
            // SAFETY: the pointer is valid.
            let code = unsafe { (device.cuda.cuMemAlloc_v2)(&raw mut self.address, bytes) };
            cuda_checked("cuMemAlloc", code)?;
            self.bytes = bytes;
        }
        Ok(self.address)
    }

    /// Gives the memory back. Nothing that was put on a stream uses it.
    pub(super) fn free(&mut self, device: &Device) {
        if std::mem::take(&mut self.bytes) > 0 {
            // SAFETY: memory of ours; cuMemFree waits for the device.
            unsafe { (device.cuda.cuMemFree_v2)(self.address) };
        }
    }
}
