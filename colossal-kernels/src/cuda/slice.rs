//! Typed views of a device's memory.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements in the memory of a device, to be read.
pub struct Slice<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

/// Elements in the memory of a device, to be written.
pub struct SliceMut<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<'a, T> Slice<'a, T> {
    /// `len` elements at a device address.
    ///
    /// # Safety
    /// The memory is of the device on whose streams the slice is used, aligned for `T`, and stays
    /// allocated and unwritten until they have passed the work that it is given to.
    pub unsafe fn from_raw(address: u64, len: usize) -> Slice<'a, T> {
        Slice { address, len, memory: PhantomData }
    }

    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is there no element?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it. Panics when the range ends beyond it.
    pub fn range(&self, range: Range<usize>) -> Slice<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Slice { address, len: range.len(), memory: PhantomData }
    }
}

impl<'a, T> SliceMut<'a, T> {
    /// `len` elements at a device address.
    ///
    /// # Safety
    /// As for [`Slice::from_raw`], and nobody else touches it meanwhile.
    pub unsafe fn from_raw(address: u64, len: usize) -> SliceMut<'a, T> {
        SliceMut { address, len, memory: PhantomData }
    }

    /// The device address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is there no element?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_, T> {
        SliceMut { address: self.address, len: self.len, memory: PhantomData }
    }

    /// To be read.
    pub fn as_slice(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, memory: PhantomData }
    }

    /// A part of it. Panics when the range ends beyond it.
    pub fn range(self, range: Range<usize>) -> SliceMut<'a, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        SliceMut { address, len: range.len(), memory: PhantomData }
    }
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Slice<'_, T> {}

impl<T> std::fmt::Debug for Slice<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} elements at {:#x}", self.len, self.address)
    }
}

impl<T> std::fmt::Debug for SliceMut<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} elements at {:#x}", self.len, self.address)
    }
}

/// What a kernel can be given: a slice as its address, a number or a plain struct as it is.
///
/// # Safety
/// The pointer shows a value that is laid out as the kernel's parameter, for as long as the
/// argument is borrowed.
pub unsafe trait Arg {
    /// Where the value is.
    fn pointer(&self) -> *mut c_void;
}

// SAFETY: a pointer of CUDA is the address.
unsafe impl<T> Arg for Slice<'_, T> {
    fn pointer(&self) -> *mut c_void {
        (&raw const self.address).cast_mut().cast()
    }
}

// SAFETY: as above.
unsafe impl<T> Arg for SliceMut<'_, T> {
    fn pointer(&self) -> *mut c_void {
        (&raw const self.address).cast_mut().cast()
    }
}

/// An absent slice is the null pointer.
// SAFETY: the static is a null pointer's eight bytes.
unsafe impl<T> Arg for Option<Slice<'_, T>> {
    fn pointer(&self) -> *mut c_void {
        static NULL: u64 = 0;
        match self {
            Some(slice) => slice.pointer(),
            None => (&raw const NULL).cast_mut().cast(),
        }
    }
}

macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: the same type on both sides.
        unsafe impl Arg for $t {
            fn pointer(&self) -> *mut c_void {
                std::ptr::from_ref(self).cast_mut().cast()
            }
        }
    )* };
}
plain!(u32, i32, u64, i64, f32, f64);
