//! Memory of tensors: aligned buffers from a caching allocator.
//!
//! A rank is a thread, and each thread keeps the memory it frees for its next step: on the host in
//! an arena, from which buffers of any size are cut, small ones and those of each stream of a GPU
//! by size class. After the first training steps nothing is asked of the system. Memory is zero
//! when it first comes from the system, so a recycled buffer holds old values but never undefined
//! ones.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::Pod;
use colossal_kernels::cuda::{self, SliceMut, Stream};
use colossal_kernels::memory::{Arena, Block};

use crate::device::Device;
use crate::error::Result;
use crate::kept::{Held, Kept};
use crate::view::{View, ViewMut};

/// Every buffer starts on a cache line.
const ALIGN: usize = 64;

/// An owned, aligned run of bytes that goes back to its thread's cache when dropped.
#[derive(Debug)]
pub struct Buffer {
    /// There until the buffer is dropped.
    memory: Option<Memory>,
    bytes: usize,
}

/// What a buffer is a part of.
#[derive(Debug)]
enum Memory {
    Cpu(Block),
    /// Used in the order of the stream, so that what is freed can be used again at once.
    /// A graph that has its address shares it.
    Cuda(Arc<cuda::Block>, Stream),
}

impl Buffer {
    /// A buffer of `len` elements on the host whose values are unspecified (but initialised).
    pub fn new<T: Pod>(len: usize) -> Buffer {
        Buffer::with_bytes(len * size_of::<T>())
    }

    /// A buffer of `bytes` bytes on the host whose values are unspecified (but initialised).
    pub fn with_bytes(bytes: usize) -> Buffer {
        if bytes >= LARGE
            && let Some(memory) = CACHE.try_with(|c| c.borrow_mut().cut(bytes)).ok().flatten()
        {
            return Buffer { memory: Some(memory), bytes };
        }
        let capacity = size_class(bytes);
        let kept = CACHE.try_with(|c| c.borrow_mut().take(HOST, capacity)).ok().flatten();
        let memory = kept.unwrap_or_else(|| Memory::Cpu(Block::zeroed(capacity)));
        Buffer { memory: Some(memory), bytes }
    }

    /// A buffer of `bytes` bytes on `device` whose values are unspecified.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda) when the device has no room, even after what this
    /// thread keeps for reuse was given back.
    pub fn on(device: &Device, bytes: usize) -> Result<Buffer> {
        let Device::Cuda(stream) = device else { return Ok(Buffer::with_bytes(bytes)) };
        let (place, capacity) = (place_of(stream), size_class(bytes));
        let kept = CACHE.try_with(|c| c.borrow_mut().take(place, capacity)).ok().flatten();
        let memory = match kept {
            Some(memory) => memory,
            None => {
                let made = cuda::Block::new(stream.device(), capacity).or_else(|error| {
                    if error.is_capture() {
                        return Err(error);
                    }
                    release_of(place);
                    release_orphans();
                    match error {
                        cuda::Error::OutOfMemory { .. } => {
                            cuda::Block::new(stream.device(), capacity)
                        }
                        other => Err(other),
                    }
                });
                // What was counted as taken was not.
                let made = made.inspect_err(|_| forget(place, capacity))?;
                Memory::Cuda(Arc::new(made), stream.clone())
            }
        };
        Ok(Buffer { memory: Some(memory), bytes })
    }

    /// A buffer of `len` zeros on the host.
    pub fn zeros<T: Pod>(len: usize) -> Buffer {
        let mut buffer = Buffer::new::<T>(len);
        buffer.as_mut_slice::<u8>().fill(0);
        buffer
    }

    /// A buffer of `len` zeros on `device`.
    pub fn zeros_on<T: Pod>(device: &Device, len: usize) -> Result<Buffer> {
        let mut buffer = Buffer::on(device, len * size_of::<T>())?;
        buffer.view_mut::<u8>().zero()?;
        Ok(buffer)
    }

    /// A buffer on the host holding a copy of `data`.
    pub fn from_slice<T: Pod>(data: &[T]) -> Buffer {
        let mut buffer = Buffer::new::<T>(data.len());
        buffer.as_mut_slice().copy_from_slice(data);
        buffer
    }

    /// A buffer on `device` holding a copy of `data`.
    pub fn copy_of<T: Pod>(device: &Device, data: View<'_, T>) -> Result<Buffer> {
        let mut buffer = Buffer::on(device, data.len() * size_of::<T>())?;
        buffer.view_mut().copy(data)?;
        Ok(buffer)
    }

    /// The same bytes on `device`: the buffer itself if it is there.
    pub fn to(self, device: &Device) -> Result<Buffer> {
        match self.device() == *device {
            true => Ok(self),
            false => Buffer::copy_of(device, self.view::<u8>()),
        }
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        match &self.memory {
            Some(Memory::Cuda(_, stream)) => Device::Cuda(stream.clone()),
            _ => Device::Cpu,
        }
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The contents as elements of `T`, wherever they are. Panics if the length is not a multiple
    /// of `T`'s size.
    pub fn view<T: Pod>(&self) -> View<'_, T> {
        match &self.memory {
            Some(Memory::Cuda(block, stream)) => {
                seen(stream, block);
                View::Cuda(stream, block.slice::<u8>(0..self.bytes)).cast()
            }
            _ => View::Cpu(self.as_slice()),
        }
    }

    /// The contents as mutable elements of `T`. Panics as [`Buffer::view`] does.
    pub fn view_mut<T: Pod>(&mut self) -> ViewMut<'_, T> {
        match &mut self.memory {
            Some(Memory::Cuda(block, stream)) => {
                seen(stream, block);
                let there = block.slice::<u8>(0..self.bytes);
                // SAFETY: the buffer is borrowed by nobody else, and what graphs that share the block
                // do to it is done in the order of the stream.
                let there = unsafe { SliceMut::<u8>::from_raw(there.address(), there.len()) };
                ViewMut::Cuda(stream, there).cast()
            }
            Some(Memory::Cpu(block)) => {
                ViewMut::Cpu(bytemuck::cast_slice_mut(block.bytes_mut(self.bytes)))
            }
            None => ViewMut::Cpu(&mut []),
        }
    }

    /// The contents, on the host. Panics if the length is not a multiple of `T`'s size, or the
    /// buffer is on a GPU: see [`Buffer::view`].
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(match &self.memory {
            Some(Memory::Cpu(block)) => block.bytes(self.bytes),
            Some(Memory::Cuda(..)) => panic!("a buffer of {} is no slice", self.device()),
            None => &[],
        })
    }

    /// The contents to write, on the host. Panics as [`Buffer::as_slice`] does.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        match self.view_mut() {
            ViewMut::Cpu(slice) => slice,
            ViewMut::Cuda(stream, _) => panic!("a buffer of {:?} is no slice", stream.device()),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // After the thread's cache is gone the block is freed.
            let _ = CACHE.try_with(|c| c.borrow_mut().put(memory));
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

/// This thread's allocator counters for the host.
pub fn memory_stats() -> MemoryStats {
    stats_of(HOST)
}

/// This thread's allocator counters for `device`.
pub fn memory_stats_of(device: &Device) -> MemoryStats {
    stats_of(device.stream().map_or(HOST, place_of))
}

fn stats_of(place: usize) -> MemoryStats {
    CACHE.with_borrow(|cache| {
        let mut stats = cache.pools.get(&place).map(|p| p.stats).unwrap_or_default();
        if let Some(Some(arena)) = &cache.arena
            && place == HOST
        {
            stats.cached += arena.idle();
        }
        stats
    })
}

/// Starts a new peak measurement at what is live now.
pub fn reset_peak() {
    CACHE.with(|c| {
        for pool in c.borrow_mut().pools.values_mut() {
            pool.stats.peak = pool.stats.in_use;
        }
    });
}

/// Gives this thread's cached memory back to the system, of all devices.
pub fn release_cached() {
    let places: Vec<usize> = CACHE.with(|c| c.borrow().pools.keys().copied().collect());
    places.into_iter().for_each(release_of);
    if let Some(arena) = CACHE.with_borrow(|c| c.arena.clone()).flatten() {
        arena.trim();
    }
}

fn release_of(place: usize) {
    // Freed after the cache is no longer borrowed: a block of a device waits for it.
    let freed = CACHE.try_with(|c| {
        c.borrow_mut().pools.get_mut(&place).map(|pool| {
            pool.stats.cached = 0;
            std::mem::take(&mut pool.free)
        })
    });
    drop(freed);
}

/// Does `work`, and gives what a graph of it must keep: buffers of `stream` that were dropped meanwhile
/// (they serve the work again, and nobody else), and the blocks of all whose address was asked for.
pub(crate) fn keep_of<R>(stream: &Stream, work: impl FnOnce() -> R) -> (R, Option<Held<Buffer>>) {
    struct Keeping;
    impl Keeping {
        fn end() -> Option<Held<Buffer>> {
            let kept = CACHE.try_with(|c| c.borrow_mut().kept.take()).ok().flatten();
            let buffer = |memory| Buffer { memory: Some(memory), bytes: 0 };
            kept.map(|kept| kept.into_held(buffer))
        }
    }
    impl Drop for Keeping {
        fn drop(&mut self) {
            Keeping::end();
        }
    }
    let _ends = Keeping;
    CACHE.with(|c| c.borrow_mut().kept = Some(Kept::new(place_of(stream))));
    let done = work();
    (done, Keeping::end())
}

/// If a graph is being recorded on `stream`, it keeps `what`.
pub(crate) fn seen<T: Any + Send + Sync>(stream: &Stream, what: &Arc<T>) {
    let _ = CACHE.try_with(|c| {
        if let Some(kept) = c.borrow_mut().kept_at(place_of(stream)) {
            kept.see(what);
        }
    });
}

/// Gives back what this thread keeps for streams that nobody else has any more.
pub(crate) fn release_orphans() {
    // Freed after the cache is no longer borrowed, as above.
    let freed = CACHE.try_with(|c| {
        let pools = &mut c.borrow_mut().pools;
        pools.extract_if(|_, pool| pool.is_orphan()).collect::<Vec<_>>()
    });
    drop(freed);
}

/// Memory that was counted as taken could not be had.
fn forget(place: usize, capacity: usize) {
    let _ = CACHE.try_with(|c| {
        if let Some(pool) = c.borrow_mut().pools.get_mut(&place) {
            pool.stats.in_use = pool.stats.in_use.saturating_sub(capacity);
            pool.stats.system_allocations -= 1;
        }
    });
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// The place of buffers on the host; a stream's is its address.
const HOST: usize = 0;

fn place_of(stream: &Stream) -> usize {
    stream.raw().cu_stream() as usize
}

#[derive(Default)]
struct Cache {
    pools: HashMap<usize, Pool>,
    /// While a graph is recorded; still counted as in use.
    kept: Option<Kept<Memory>>,
    /// Of the host, made when it is first needed; none inside if the system has refused.
    arena: Option<Option<Arc<Arena>>>,
}

impl Drop for Cache {
    fn drop(&mut self) {
        if let Some(Some(arena)) = &self.arena {
            arena.close();
        }
    }
}

#[derive(Default)]
struct Pool {
    free: HashMap<usize, Vec<Memory>>,
    stats: MemoryStats,
}

impl Pool {
    /// Does nobody but the buffers that are kept here have their stream?
    fn is_orphan(&self) -> bool {
        match self.free.values().flatten().next() {
            Some(Memory::Cuda(_, stream)) => {
                stream.owners() == self.free.values().map(Vec::len).sum::<usize>()
            }
            _ => false,
        }
    }
}

/// Cached memory is bounded by the peak of live memory, and by this when little was ever live.
const CACHE_FLOOR: usize = 64 << 20;
/// Buffers on the host from this size on are cut from the arena.
const LARGE: usize = 64 << 10;

impl Cache {
    /// A large buffer on the host, if the arena has room.
    fn cut(&mut self, bytes: usize) -> Option<Memory> {
        let arena = self.arena.get_or_insert_with(Arena::reserve).as_ref()?;
        let (block, grew) = arena.take(bytes)?;
        let stats = &mut self.pools.entry(HOST).or_default().stats;
        stats.in_use += block.capacity();
        stats.peak = stats.peak.max(stats.in_use);
        stats.system_allocations += u64::from(grew);
        Some(Memory::Cpu(block))
    }

    fn kept_at(&mut self, place: usize) -> Option<&mut Kept<Memory>> {
        self.kept.as_mut().and_then(|kept| kept.at(place))
    }

    fn take(&mut self, place: usize, capacity: usize) -> Option<Memory> {
        if let Some(memory) = self.kept_at(place).and_then(|kept| kept.take(capacity)) {
            return Some(memory);
        }
        let pool = self.pools.entry(place).or_default();
        let stats = &mut pool.stats;
        stats.in_use += capacity;
        stats.peak = stats.peak.max(stats.in_use);
        match pool.free.get_mut(&capacity).and_then(Vec::pop) {
            Some(memory) => {
                stats.cached -= capacity;
                Some(memory)
            }
            None => {
                stats.system_allocations += 1;
                None
            }
        }
    }

    fn put(&mut self, memory: Memory) {
        let (place, capacity) = match &memory {
            Memory::Cpu(block) => (HOST, block.capacity()),
            Memory::Cuda(block, stream) => (place_of(stream), block.capacity()),
        };
        if let Some(kept) = self.kept_at(place) {
            return kept.put(capacity, memory);
        }
        let pool = self.pools.entry(place).or_default();
        // A buffer may be dropped on another thread than its own: the counter saturates.
        pool.stats.in_use = pool.stats.in_use.saturating_sub(capacity);
        let given_back = match &memory {
            Memory::Cpu(block) => block.is_part(),
            // A graph goes on to write there: when it is dropped the block is freed.
            Memory::Cuda(block, _) => Arc::strong_count(block) > 1,
        };
        if given_back {
            return;
        }
        if pool.stats.cached + capacity > pool.stats.peak.max(CACHE_FLOOR) {
            return;
        }
        pool.stats.cached += capacity;
        pool.free.entry(capacity).or_default().push(memory);
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
