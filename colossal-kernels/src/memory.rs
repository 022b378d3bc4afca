//! Memory for large operands: zeroed, aligned, on huge pages where the system grants them.
//!
//! A product walks over tens of megabytes; with pages of 4 KiB the processor's table of pages is
//! too small for them and every panel waits for its addresses.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A huge page.
const HUGE: usize = 2 << 20;

/// Room for elements, which never moves. Its values are zero at first.
#[derive(Debug)]
pub struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
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
        Block { ptr, bytes }
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
        // SAFETY: allocated with this layout and not used again.
        unsafe { dealloc(self.ptr.as_ptr(), Block::layout(self.bytes)) }
    }
}
