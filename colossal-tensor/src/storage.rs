//! Memory of tensors: aligned buffers from a caching allocator.
//!
//! A rank is a thread, and each thread keeps the buffers it frees, by size class, for its next
//! step: after the first training step nothing is asked of the system. Memory is zeroed when it
//! first comes from the system, so a recycled buffer holds old values but never undefined ones.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;

use bytemuck::Pod;

/// Every buffer starts on a cache line.
const ALIGN: usize = 64;

/// An owned, aligned run of bytes that goes back to its thread's cache when dropped.
#[derive(Debug)]
pub struct Buffer {
    ptr: NonNull<u8>,
    bytes: usize,
    capacity: usize,
}

// SAFETY: a Buffer owns its memory exclusively; bytes have no thread affinity.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads; mutation needs `&mut Buffer`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `len` elements whose values are unspecified (but initialised).
    pub fn new<T: Pod>(len: usize) -> Buffer {
        Buffer::with_bytes(len * size_of::<T>())
    }

    /// A buffer of `bytes` bytes whose values are unspecified (but initialised).
    pub fn with_bytes(bytes: usize) -> Buffer {
        let capacity = size_class(bytes);
        let ptr = CACHE
            .try_with(|c| c.borrow_mut().take(capacity))
            .ok()
            .flatten()
            .unwrap_or_else(|| allocate(capacity));
        Buffer { ptr, bytes, capacity }
    }

    /// A buffer of `len` zeros.
    pub fn zeros<T: Pod>(len: usize) -> Buffer {
        let mut buffer = Buffer::new::<T>(len);
        buffer.as_mut_slice::<u8>().fill(0);
        buffer
    }

    /// A buffer holding a copy of `data`.
    pub fn from_slice<T: Pod>(data: &[T]) -> Buffer {
        let mut buffer = Buffer::new::<T>(data.len());
        buffer.as_mut_slice().copy_from_slice(data);
        buffer
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The contents as elements of `T`. Panics if the length is not a multiple of `T`'s size.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        // SAFETY: `ptr` is valid for `bytes` initialised bytes while `self` lives.
        bytemuck::cast_slice(unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.bytes) })
    }

    /// The contents as mutable elements of `T`. Panics as [`Buffer::as_slice`] does.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        bytemuck::cast_slice_mut(unsafe {
            std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.bytes)
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let kept = CACHE.try_with(|c| c.borrow_mut().put(self.ptr, self.capacity)).unwrap_or(false);
        if !kept {
            release(self.ptr, self.capacity);
        }
    }
}

/// A [`Buffer`] seen as a slice of `T`: what an in-flight collective owns.
#[derive(Debug)]
pub struct Typed<T>(pub Buffer, std::marker::PhantomData<T>);

impl<T: Pod> Typed<T> {
    /// Sees `buffer` as elements of `T`.
    pub fn new(buffer: Buffer) -> Typed<T> {
        Typed(buffer, std::marker::PhantomData)
    }
}

impl<T: Pod> AsRef<[T]> for Typed<T> {
    fn as_ref(&self) -> &[T] {
        self.0.as_slice()
    }
}

impl<T: Pod> AsMut<[T]> for Typed<T> {
    fn as_mut(&mut self) -> &mut [T] {
        self.0.as_mut_slice()
    }
}

/// A shared buffer seen as a slice of `T`: peers read it while its owner reads it too.
#[derive(Debug)]
pub(crate) struct Lent<T>(Arc<Buffer>, std::marker::PhantomData<T>);

impl<T: Pod> Lent<T> {
    /// Sees `buffer` as elements of `T`.
    pub(crate) fn new(buffer: &Arc<Buffer>) -> Lent<T> {
        Lent(buffer.clone(), std::marker::PhantomData)
    }
}

impl<T: Pod> AsRef<[T]> for Lent<T> {
    fn as_ref(&self) -> &[T] {
        self.0.as_slice()
    }
}

/// What this thread's (this rank's) allocator has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in live tensors.
    pub in_use: usize,
    /// The most bytes that were ever live at once.
    pub peak: usize,
    /// Bytes kept for reuse.
    pub cached: usize,
    /// How often memory was asked of the system.
    pub system_allocations: u64,
}

/// This thread's allocator counters.
pub fn memory_stats() -> MemoryStats {
    CACHE.with(|c| c.borrow().stats)
}

/// Starts a new peak measurement at what is live now.
pub fn reset_peak() {
    CACHE.with(|c| {
        let stats = &mut c.borrow_mut().stats;
        stats.peak = stats.in_use;
    });
}

/// Gives this thread's cached memory back to the system.
pub fn release_cached() {
    CACHE.with(|c| {
        let mut cache = c.borrow_mut();
        for (capacity, free) in cache.free.drain() {
            free.into_iter().for_each(|p| release(p.0, capacity));
        }
        cache.stats.cached = 0;
    });
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

#[derive(Default)]
struct Cache {
    free: HashMap<usize, Vec<Free>>,
    stats: MemoryStats,
}

struct Free(NonNull<u8>);

/// Cached memory is bounded by the peak of live memory, and by this when little was ever live.
const CACHE_FLOOR: usize = 64 << 20;

impl Cache {
    fn take(&mut self, capacity: usize) -> Option<NonNull<u8>> {
        let stats = &mut self.stats;
        stats.in_use += capacity;
        stats.peak = stats.peak.max(stats.in_use);
        match self.free.get_mut(&capacity).and_then(Vec::pop) {
            Some(Free(p)) => {
                stats.cached -= capacity;
                Some(p)
            }
            None => {
                stats.system_allocations += 1;
                None
            }
        }
    }

    fn put(&mut self, ptr: NonNull<u8>, capacity: usize) -> bool {
        // A buffer may be dropped on another thread than its own: the counter saturates.
        self.stats.in_use = self.stats.in_use.saturating_sub(capacity);
        if self.stats.cached + capacity > self.stats.peak.max(CACHE_FLOOR) {
            return false;
        }
        self.stats.cached += capacity;
        self.free.entry(capacity).or_default().push(Free(ptr));
        true
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        for (capacity, free) in self.free.drain() {
            free.into_iter().for_each(|p| release(p.0, capacity));
        }
    }
}

/// Rounds up so that near sizes share a class: eight classes to each power of two.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    bytes.div_ceil(step) * step
}

fn block(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, ALIGN)
        .expect("a tensor is smaller than half the address space")
}

fn allocate(capacity: usize) -> NonNull<u8> {
    let layout = block(capacity);
    // SAFETY: the layout has a non-zero size (size_class is at least ALIGN).
    let ptr = unsafe { alloc_zeroed(layout) };
    NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout))
}

fn release(ptr: NonNull<u8>, capacity: usize) {
    // SAFETY: `ptr` came from `allocate` with this capacity and is not used again.
    unsafe { dealloc(ptr.as_ptr(), block(capacity)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_step_asks_nothing_of_the_system() {
        let step = || {
            let a = Buffer::new::<f32>(1000);
            let b = Buffer::zeros::<f32>(77);
            assert!(b.as_slice::<f32>().iter().all(|&x| x == 0.0));
            (a.bytes(), b.bytes())
        };
        step();
        let before = memory_stats().system_allocations;
        for _ in 0..10 {
            step();
        }
        assert_eq!(memory_stats().system_allocations, before);
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in [1usize, 64, 65, 1000, 1 << 20, (1 << 20) + 1, 3_000_001] {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(ALIGN));
            assert!(class - bytes < ALIGN || (class - bytes) * 8 <= bytes, "{bytes} -> {class}");
        }
    }
}
