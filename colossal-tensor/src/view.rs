//! Elements where they are: a slice of the host, or of a device in the order of its stream.

use std::ops::Range;

use bytemuck::Pod;
use colossal_kernels::cuda::{Slice, SliceMut, Stream};

use crate::error::Result;

/// Elements to be read.
#[derive(Debug, Clone, Copy)]
pub enum View<'a, T> {
    /// On the host.
    Cpu(&'a [T]),
    /// On a GPU.
    Cuda(&'a Stream, Slice<'a, T>),
}

/// Elements to be written.
#[derive(Debug)]
pub enum ViewMut<'a, T> {
    /// On the host.
    Cpu(&'a mut [T]),
    /// On a GPU.
    Cuda(&'a Stream, SliceMut<'a, T>),
}

impl<'a, T: Pod> View<'a, T> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            View::Cpu(x) => x.len(),
            View::Cuda(_, x) => x.len(),
        }
    }

    /// Is there no element?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part of them. Panics when the range ends beyond them.
    pub fn range(self, range: Range<usize>) -> View<'a, T> {
        match self {
            View::Cpu(x) => View::Cpu(&x[range]),
            View::Cuda(stream, x) => View::Cuda(stream, x.range(range)),
        }
    }

    /// The same bytes as elements of another type. Panics unless they are a whole number of them.
    pub fn cast<U: Pod>(self) -> View<'a, U> {
        match self {
            View::Cpu(x) => View::Cpu(bytemuck::cast_slice(x)),
            View::Cuda(stream, x) => {
                let bytes = x.len() * size_of::<T>();
                assert!(
                    bytes.is_multiple_of(size_of::<U>()),
                    "{bytes} bytes are no whole elements"
                );
                // SAFETY: the same memory for the same time; devices align to the first element
                // of a buffer, and views begin at whole elements.
                let x = unsafe { Slice::from_raw(x.address(), bytes / size_of::<U>()) };
                View::Cuda(stream, x)
            }
        }
    }

    /// Copies them to the host, waiting for all work that is to write them.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn read(&self, to: &mut [T]) -> Result<()> {
        match self {
            View::Cpu(x) => to.copy_from_slice(x),
            View::Cuda(stream, x) => stream.download(*x, to)?,
        }
        Ok(())
    }
}

impl<'a, T: Pod> ViewMut<'a, T> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            ViewMut::Cpu(x) => x.len(),
            ViewMut::Cuda(_, x) => x.len(),
        }
    }

    /// Is there no element?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        match self {
            ViewMut::Cpu(x) => ViewMut::Cpu(x),
            ViewMut::Cuda(stream, x) => ViewMut::Cuda(stream, x.reborrow()),
        }
    }

    /// To be read.
    pub fn as_view(&self) -> View<'_, T> {
        match self {
            ViewMut::Cpu(x) => View::Cpu(x),
            ViewMut::Cuda(stream, x) => View::Cuda(stream, x.as_slice()),
        }
    }

    /// A part of them. Panics when the range ends beyond them.
    pub fn range(self, range: Range<usize>) -> ViewMut<'a, T> {
        match self {
            ViewMut::Cpu(x) => ViewMut::Cpu(&mut x[range]),
            ViewMut::Cuda(stream, x) => ViewMut::Cuda(stream, x.range(range)),
        }
    }

    /// The same bytes as elements of another type, as [`View::cast`] does.
    pub fn cast<U: Pod>(self) -> ViewMut<'a, U> {
        match self {
            ViewMut::Cpu(x) => ViewMut::Cpu(bytemuck::cast_slice_mut(x)),
            ViewMut::Cuda(stream, x) => {
                let bytes = x.len() * size_of::<T>();
                assert!(
                    bytes.is_multiple_of(size_of::<U>()),
                    "{bytes} bytes are no whole elements"
                );
                // SAFETY: as in `View::cast`, and the view is used up.
                let x = unsafe { SliceMut::from_raw(x.address(), bytes / size_of::<U>()) };
                ViewMut::Cuda(stream, x)
            }
        }
    }

    /// Copies them from the host.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn write(self, from: &[T]) -> Result<()> {
        match self {
            ViewMut::Cpu(x) => x.copy_from_slice(from),
            ViewMut::Cuda(stream, x) => stream.upload(from, x)?,
        }
        Ok(())
    }

    /// Copies them from anywhere.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn copy(self, from: View<'_, T>) -> Result<()> {
        match (self, from) {
            (to, View::Cpu(from)) => to.write(from),
            (ViewMut::Cpu(to), from) => from.read(to),
            (ViewMut::Cuda(stream, to), View::Cuda(_, from)) => Ok(stream.copy(from, to)?),
        }
    }

    /// Sets them to zero.
    pub fn zero(self) -> Result<()> {
        match self {
            ViewMut::Cpu(x) => x.fill(T::zeroed()),
            ViewMut::Cuda(stream, x) => stream.zero(x)?,
        }
        Ok(())
    }
}

impl<'a, T> From<&'a [T]> for View<'a, T> {
    fn from(x: &'a [T]) -> View<'a, T> {
        View::Cpu(x)
    }
}

impl<'a, T> From<&'a mut [T]> for ViewMut<'a, T> {
    fn from(x: &'a mut [T]) -> ViewMut<'a, T> {
        ViewMut::Cpu(x)
    }
}
