//! Memory of tensors: aligned buffers from a caching allocator.
//!
//! A rank is a thread, and each thread keeps the buffers it frees, by size class, for its next
//! step: after the first training step nothing is asked of the system. Memory is zeroed when it
//! first comes from the system, so a recycled buffer holds old values but never undefined ones.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::Pod;
use colossal_kernels::memory::Block;

/// Every buffer starts on a cache line.
const ALIGN: usize = 64;

/// An owned, aligned run of bytes that goes back to its thread's cache when dropped.
#[derive(Debug)]
pub struct Buffer {
    /// There until the buffer is dropped.
    block: Option<Block>,
    bytes: usize,
}

impl Buffer {
    /// A buffer of `len` elements whose values are unspecified (but initialised).
    pub fn new<T: Pod>(len: usize) -> Buffer {
        Buffer::with_bytes(len * size_of::<T>())
    }

    /// A buffer of `bytes` bytes whose values are unspecified (but initialised).
    pub fn with_bytes(bytes: usize) -> Buffer {
        let capacity = size_class(bytes);
        let kept = CACHE.try_with(|c| c.borrow_mut().take(capacity)).ok().flatten();
        Buffer { block: Some(kept.unwrap_or_else(|| Block::zeroed(capacity))), bytes }
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
        bytemuck::cast_slice(self.block.as_ref().map_or(&[], |b| b.bytes(self.bytes)))
    }

    /// The contents as mutable elements of `T`. Panics as [`Buffer::as_slice`] does.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        let bytes = self.bytes;
        bytemuck::cast_slice_mut(self.block.as_mut().map_or(&mut [], |b| b.bytes_mut(bytes)))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            // After the thread's cache is gone the block is freed.
            let _ = CACHE.try_with(|c| c.borrow_mut().put(block));
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
        cache.free.clear();
        cache.stats.cached = 0;
    });
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

#[derive(Default)]
struct Cache {
    free: HashMap<usize, Vec<Block>>,
    stats: MemoryStats,
}

/// Cached memory is bounded by the peak of live memory, and by this when little was ever live.
const CACHE_FLOOR: usize = 64 << 20;

impl Cache {
    fn take(&mut self, capacity: usize) -> Option<Block> {
        let stats = &mut self.stats;
        stats.in_use += capacity;
        stats.peak = stats.peak.max(stats.in_use);
        match self.free.get_mut(&capacity).and_then(Vec::pop) {
            Some(block) => {
                stats.cached -= capacity;
                Some(block)
            }
            None => {
                stats.system_allocations += 1;
                None
            }
        }
    }

    fn put(&mut self, block: Block) {
        let capacity = block.capacity();
        // A buffer may be dropped on another thread than its own: the counter saturates.
        self.stats.in_use = self.stats.in_use.saturating_sub(capacity);
        if self.stats.cached + capacity > self.stats.peak.max(CACHE_FLOOR) {
            return;
        }
        self.stats.cached += capacity;
        self.free.entry(capacity).or_default().push(block);
    }
}

/// Rounds up so that near sizes share a class: eight classes to each power of two.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGN);
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    bytes.div_ceil(step) * step
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
