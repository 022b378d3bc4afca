//! Memory of a device, and of the host where a device can copy from and to it at full speed.

use std::ops::Range;
use std::ptr::NonNull;

use bytemuck::Pod;
use cudarc::driver::result;
use cudarc::driver::sys::CUresult;

use super::device::Device;
use super::error::{Doing, Error, Result};
use super::slice::{Slice, SliceMut};

/// Bytes of a device, owned. Values are unspecified at first. Freeing waits for the device, so
/// whoever allocates often keeps blocks for the next time.
pub struct Block {
    device: Device,
    address: u64,
    bytes: usize,
}

impl Block {
    /// `bytes` bytes of `device`, aligned to 256.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and what the driver says.
    pub fn new(device: &Device, bytes: usize) -> Result<Block> {
        device.bind()?;
        let ordinal = device.ordinal();
        device.reserve(bytes).map_err(|free| {
            let total = device.reserved() + free;
            Error::OutOfMemory { ordinal, asked: bytes, free, total }
        })?;
        // SAFETY: of a size that is not zero; the bytes are only written and read on the device.
        let made = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|e| {
            device.give_back(bytes);
            match e.0 {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    let (free, total) = device.free_memory().unwrap_or((0, device.memory()));
                    Error::OutOfMemory { ordinal, asked: bytes, free, total }
                }
                _ => Error::driver(ordinal, "allocating", e),
            }
        });
        Ok(Block { device: device.clone(), address: made?, bytes })
    }

    /// How many bytes there is room for.
    pub fn capacity(&self) -> usize {
        self.bytes
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Elements of it.
    ///
    /// # Panics
    /// When the range ends beyond it.
    pub fn slice<T: Pod>(&self, range: Range<usize>) -> Slice<'_, T> {
        let (address, len) = self.part::<T>(range);
        // SAFETY: in bounds; the block is borrowed.
        unsafe { Slice::from_raw(address, len) }
    }

    /// Elements of it, to write.
    ///
    /// # Panics
    /// When the range ends beyond it.
    pub fn slice_mut<T: Pod>(&mut self, range: Range<usize>) -> SliceMut<'_, T> {
        let (address, len) = self.part::<T>(range);
        // SAFETY: in bounds; the block is borrowed by nobody else.
        unsafe { SliceMut::from_raw(address, len) }
    }

    fn part<T>(&self, range: Range<usize>) -> (u64, usize) {
        assert!(
            range.start <= range.end && range.end * size_of::<T>() <= self.bytes,
            "elements {range:?} of {} bytes lie beyond a block of {}",
            size_of::<T>(),
            self.bytes
        );
        (self.address + (range.start * size_of::<T>()) as u64, range.len())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.device.give_back(self.bytes);
        // A device that is lost has freed it.
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `new`, and freed once.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of {:?}", self.bytes, self.device)
    }
}

/// Bytes of the host that stay where they are: a device copies from and to them by itself.
#[derive(Debug)]
pub struct Pinned {
    device: Device,
    ptr: NonNull<u8>,
    bytes: usize,
}

// SAFETY: bytes that are owned, without affinity to a thread.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` zeros.
    ///
    /// # Errors
    /// What the driver says: such memory is scarce.
    pub fn zeroed(device: &Device, bytes: usize) -> Result<Pinned> {
        device.bind()?;
        // SAFETY: of a size that is not zero; the flags are the default.
        let ptr = unsafe { result::malloc_host(bytes.max(1), 0) };
        let ptr = ptr.doing(device.ordinal(), "allocating pinned memory")?;
        let no_room = Error::OutOfMemory {
            ordinal: device.ordinal(),
            asked: bytes,
            free: 0,
            total: device.memory(),
        };
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or(no_room)?;
        // SAFETY: just allocated.
        unsafe { ptr.as_ptr().write_bytes(0, bytes) };
        Ok(Pinned { device: device.clone(), ptr, bytes })
    }

    /// How many bytes it has.
    pub fn capacity(&self) -> usize {
        self.bytes
    }

    /// The contents as elements of `T`. Panics if the length is not a multiple of `T`'s size.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        // SAFETY: initialised when allocated; no copy is under way while a reference can be had.
        bytemuck::cast_slice(unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.bytes) })
    }

    /// The contents as mutable elements of `T`. Panics as [`Pinned::as_slice`] does.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.bytes) };
        bytemuck::cast_slice_mut(bytes)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `zeroed`, freed once, and no copy is under way.
            let _ = unsafe { result::free_host(self.ptr.as_ptr().cast()) };
        }
    }
}
