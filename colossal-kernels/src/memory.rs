//! Memory for large operands: zeroed, aligned, on huge pages where the system grants them.
//!
//! A product walks over tens of megabytes; with pages of 4 KiB the processor's table of pages is
//! too small for them and every panel waits for its addresses.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A huge page.
const HUGE: usize = 2 << 20;

/// Room for elements, which never moves. Its values are zero when its memory is new.
#[derive(Debug)]
pub struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
    /// What it is a part of, if it is not an allocation of its own.
    arena: Option<Arc<Arena>>,
}

// SAFETY: a Block owns its memory exclusively; bytes have no thread affinity.
unsafe impl Send for Block {}
// SAFETY: shared access only reads; mutation needs `&mut Block`.
unsafe impl Sync for Block {}

impl Block {
    /// `bytes` zeros, starting on a cache line, or on a huge page if there is one to fill.
    pub fn zeroed(bytes: usize) -> Block {
        let layout = Block::layout(bytes);
        // SAFETY: the layout has a size.
        let ptr = unsafe { alloc(layout) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout));
        #[cfg(all(target_os = "linux", not(miri)))]
        if layout.align() == HUGE {
            let pages = layout.size() / HUGE * HUGE;
            // SAFETY: whole pages of an allocation of ours. That advice is refused is no error.
            unsafe { libc::madvise(ptr.as_ptr().cast(), pages, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: `bytes` of them were just allocated.
        unsafe { ptr.as_ptr().write_bytes(0, bytes) };
        Block { ptr, bytes, arena: None }
    }

    fn layout(bytes: usize) -> Layout {
        // More than half of a huge page takes a whole one.
        let (bytes, align) = match bytes {
            n if n > HUGE / 2 => (n.max(HUGE), HUGE),
            n => (n.max(64), 64),
        };
        Layout::from_size_align(bytes, align)
            .expect("an operand is smaller than half the address space")
    }

    /// How many bytes there is room for.
    pub fn capacity(&self) -> usize {
        self.bytes
    }

    /// Is it a part of an [`Arena`]?
    pub fn is_part(&self) -> bool {
        self.arena.is_some()
    }

    /// The first `bytes` of it.
    pub fn bytes(&self, bytes: usize) -> &[u8] {
        assert!(bytes <= self.bytes);
        // SAFETY: in bounds, and initialised when it was allocated.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), bytes) }
    }

    /// The first `bytes` of it, to write.
    pub fn bytes_mut(&mut self, bytes: usize) -> &mut [u8] {
        assert!(bytes <= self.bytes);
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), bytes) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        match &self.arena {
            Some(arena) => arena.put(self.ptr, self.bytes),
            // SAFETY: allocated with this layout and not used again.
            None => unsafe { dealloc(self.ptr.as_ptr(), Block::layout(self.bytes)) },
        }
    }
}

/// A page: what an arena counts in.
const PAGE: usize = 4096;

/// One run of addresses from which blocks of any size are cut, the smallest free run that fits
/// first; neighbours that are free join. Pages take memory when they are first used, so it holds
/// little more than the most that was ever used at once, whatever the sizes were.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    bytes: usize,
    runs: Mutex<Runs>,
}

#[derive(Debug)]
struct Runs {
    /// Length by offset.
    free: BTreeMap<usize, usize>,
    /// Beyond it no page was ever used.
    touched: usize,
    /// Nobody asks for blocks any more: what comes back goes to the system.
    closed: bool,
}

// SAFETY: an Arena owns its addresses; blocks cut from it are disjoint.
unsafe impl Send for Arena {}
// SAFETY: what is free is known under a lock only.
unsafe impl Sync for Arena {}

impl Arena {
    /// As many addresses as the machine has bytes of memory; none where the system refuses.
    pub fn reserve() -> Option<Arc<Arena>> {
        let (start, bytes) = system::reserve()?;
        let free = BTreeMap::from([(0, bytes)]);
        let runs = Mutex::new(Runs { free, touched: 0, closed: false });
        Some(Arc::new(Arena { start, bytes, runs }))
    }

    /// A block of at least `bytes` bytes, with old values or zeros, and whether some of its memory
    /// is new. None when the arena is full.
    pub fn take(self: &Arc<Arena>, bytes: usize) -> Option<(Block, bool)> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE)?;
        let mut runs = self.runs();
        // The run behind all used pages is the largest, so it is the last resort.
        let fits = runs.free.iter().filter(|(_, len)| **len >= bytes);
        let (at, len) = fits.min_by_key(|(at, len)| (**len, **at)).map(|(at, len)| (*at, *len))?;
        runs.free.remove(&at);
        if len > bytes {
            runs.free.insert(at + bytes, len - bytes);
        }
        let grew = at + bytes > runs.touched;
        runs.touched = runs.touched.max(at + bytes);
        // SAFETY: within the addresses of the arena.
        let ptr = unsafe { self.start.add(at) };
        Some((Block { ptr, bytes, arena: Some(self.clone()) }, grew))
    }

    fn put(&self, ptr: NonNull<u8>, bytes: usize) {
        let at = ptr.as_ptr() as usize - self.start.as_ptr() as usize;
        let mut runs = self.runs();
        let (mut start, mut len) = (at, bytes);
        if let Some((before, n)) = runs.free.range(..at).next_back().map(|(a, n)| (*a, *n))
            && before + n == at
        {
            runs.free.remove(&before);
            (start, len) = (before, n + len);
        }
        if let Some(n) = runs.free.remove(&(at + bytes)) {
            len += n;
        }
        runs.free.insert(start, len);
        if runs.closed {
            self.forget(at, bytes);
        }
    }

    /// Bytes of memory that it holds for no block.
    pub fn idle(&self) -> usize {
        let runs = self.runs();
        let used = |(at, len): (&usize, &usize)| (at + len).min(runs.touched).saturating_sub(*at);
        runs.free.iter().map(used).sum()
    }

    /// Gives the memory of what is free back to the system.
    pub fn trim(&self) {
        let mut runs = self.runs();
        for (at, len) in &runs.free {
            self.forget(*at, (at + len).min(runs.touched).saturating_sub(*at));
        }
        if let Some((at, _)) = runs.free.last_key_value().filter(|(at, n)| **at + **n == self.bytes)
        {
            runs.touched = runs.touched.min(*at);
        }
    }

    /// Nobody will ask for blocks any more: what is free, or becomes free, goes to the system.
    pub fn close(&self) {
        self.runs().closed = true;
        self.trim();
    }

    fn forget(&self, at: usize, len: usize) {
        if len > 0 {
            // SAFETY: pages of ours that no block has.
            unsafe { system::forget(self.start.add(at), len) };
        }
    }

    fn runs(&self) -> MutexGuard<'_, Runs> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: reserved with these bounds, and no block is left.
        unsafe { system::release(self.start, self.bytes) };
    }
}

#[cfg(all(unix, not(miri)))]
mod system {
    use std::ptr::NonNull;

    /// Addresses whose pages are zero, and take memory, when they are first used.
    pub(super) fn reserve() -> Option<(NonNull<u8>, usize)> {
        // SAFETY: asks for a number.
        let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
        // SAFETY: as above.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let bytes = usize::try_from(pages).ok()?.checked_mul(usize::try_from(page).ok()?)?;
        let bytes = bytes / super::HUGE * super::HUGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping touches no other.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return None;
        }
        #[cfg(target_os = "linux")]
        // SAFETY: a mapping of ours. That advice is refused is no error.
        unsafe {
            libc::madvise(at, bytes, libc::MADV_HUGEPAGE)
        };
        Some((NonNull::new(at.cast())?, bytes))
    }

    /// # Safety
    /// Pages of a reservation that nobody uses.
    pub(super) unsafe fn forget(at: NonNull<u8>, bytes: usize) {
        // SAFETY: by contract.
        unsafe { libc::madvise(at.as_ptr().cast(), bytes, libc::MADV_DONTNEED) };
    }

    /// # Safety
    /// What [`reserve`] gave, once, when nobody uses it.
    pub(super) unsafe fn release(at: NonNull<u8>, bytes: usize) {
        // SAFETY: by contract.
        unsafe { libc::munmap(at.as_ptr().cast(), bytes) };
    }
}

/// No addresses to reserve: every block is an allocation of its own.
#[cfg(not(all(unix, not(miri))))]
mod system {
    use std::ptr::NonNull;

    pub(super) fn reserve() -> Option<(NonNull<u8>, usize)> {
        None
    }
    pub(super) unsafe fn forget(_: NonNull<u8>, _: usize) {}
    pub(super) unsafe fn release(_: NonNull<u8>, _: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_neighbours_join_and_memory_is_used_again() {
        let Some(arena) = Arena::reserve() else { return };
        let take = |pages: usize| arena.take(pages * PAGE).expect("there is room");
        let [(a, grew_a), (mut b, _), (c, _), (last, _)] = [take(3), take(5), take(2), take(1)];
        assert!(grew_a);
        assert!(b.bytes(5 * PAGE).iter().all(|x| *x == 0));
        b.bytes_mut(5 * PAGE).fill(7);
        drop((a, c));
        assert_eq!(arena.idle(), 5 * PAGE);
        // The smallest run that fits: where c was.
        let (d, grew) = take(2);
        assert!(!grew && arena.idle() == 3 * PAGE);
        drop(b);
        // Where a and b were.
        let (e, grew) = take(8);
        assert!(!grew && e.bytes(8 * PAGE)[3 * PAGE..].iter().all(|x| *x == 7));
        assert!(take(1).1, "all is used");
        drop((d, e, last));
        arena.trim();
        assert_eq!(arena.idle(), 0, "it was given back");
        let (f, grew) = take(11);
        assert!(grew && f.bytes(11 * PAGE).iter().all(|x| *x == 0));
    }

    #[test]
    fn more_than_there_is_is_refused() {
        let Some(arena) = Arena::reserve() else { return };
        assert!(arena.take(usize::MAX).is_none());
        assert!(arena.take(arena.bytes + 1).is_none());
    }
}
