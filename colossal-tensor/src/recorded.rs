//! Work on a GPU that is recorded once and launched again: CUDA graphs, and what they read.
//!
//! A step of decoding is hundreds of short kernels, whose launches take the host longer than the GPU
//! needs to run them. Recorded, they are one launch. What changes from step to step then lies on the
//! GPU, at an address that stays: [`Numbers`].

use std::sync::Arc;

use colossal_kernels::cuda::{Graph, Slice, SliceMut};

use crate::error::{Error, Result};
use crate::kept::Held;
use crate::storage::{Buffer, keep_of};
use crate::tensor::{Scope, Tensor};
use crate::view::View;

/// Work that was recorded, with the memory that it uses and what it gave.
///
/// Whatever tensors the work read stay where they are until this is dropped: it shares their memory.
#[derive(Debug)]
pub struct Recorded<T> {
    graph: Graph,
    // Dropped in this order: what the graph has seen, then what can serve others.
    _held: Option<Held<Buffer>>,
    output: T,
}

impl<T> Recorded<T> {
    /// Records what `work` puts on the stream of the scope's GPU; nothing of it is done yet. Do the
    /// work once before: then its memory, kernels and algorithms are there.
    ///
    /// # Errors
    /// [`Error::Cuda`] of which `is_capture` says that the work needs the host, or memory that is
    /// not there; what the work says; [`Error::Other`] without a GPU.
    pub fn new(scope: &Scope, work: impl FnOnce() -> Result<T>) -> Result<Recorded<T>> {
        let Some(stream) = scope.device().stream() else {
            return Err(Error::Other("recorded work needs a GPU; here it is the CPU's".into()));
        };
        // SAFETY: all memory of tensors whose address the work asked for is held; what of it the work
        // made and dropped serves nobody else.
        let (recorded, held) = keep_of(stream, || unsafe { Graph::record(stream, work) });
        let (graph, output) = recorded?;
        Ok(Recorded { graph, _held: held, output })
    }

    /// Does it, in the order of the stream: its output's values are then those of this time.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn launch(&self) -> Result<&T> {
        self.graph.launch()?;
        Ok(&self.output)
    }
}

/// Rows of integers on a GPU, at an address that stays: ids, positions and lengths of a step.
///
/// Ops otherwise take integers from the host, where they check them. These are checked when they are
/// set, and ops compare with the bounds.
#[derive(Debug)]
pub struct Numbers {
    scope: Scope,
    buffer: Arc<Buffer>,
    width: usize,
    below: Vec<usize>,
}

impl Numbers {
    /// Zeros, on the scope's GPU: a row of `width` integers for each bound, below which they are.
    ///
    /// # Errors
    /// [`Error::Other`] without a GPU.
    pub fn new(scope: &Scope, width: usize, below: &[usize]) -> Result<Numbers> {
        if scope.device().stream().is_none() || scope.wide_axes().next().is_some() {
            return Err(Error::Other("numbers on a device are for one rank on a GPU".into()));
        }
        let buffer = Arc::new(Buffer::zeros_on::<i32>(scope.device(), width * below.len())?);
        Ok(Numbers { scope: scope.clone(), buffer, width, below: below.to_vec() })
    }

    /// A row, for ops: they read what is there when their kernels run.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the shape has as many elements.
    pub fn row(&self, index: usize, shape: &[usize]) -> Result<Tensor> {
        let rows = [self.below.len(), self.width];
        match self.below.get(index) {
            Some(below) if shape.iter().product::<usize>() == self.width => {
                Ok(Tensor::numbers(&self.scope, &self.buffer, index * self.width, shape, *below))
            }
            _ => Err(Error::shape("numbers", &rows, shape, "a row that is there, and all of it")),
        }
    }

    /// Writes all rows anew, for what is put on the stream from now on.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of them, [`Error::Other`] for one outside its bound.
    pub fn set(&self, values: &[i32]) -> Result<()> {
        let View::Cuda(stream, there) = self.buffer.view::<i32>() else {
            return Err(Error::Other("numbers: not on a GPU".into()));
        };
        if values.len() != there.len() {
            let rows = [self.below.len(), self.width];
            return Err(Error::shape("numbers", &[values.len()], &rows, "one value per element"));
        }
        for (row, below) in values.chunks(self.width.max(1)).zip(&self.below) {
            if let Some(bad) = row.iter().find(|v| **v < 0 || **v as usize >= *below) {
                return Err(Error::Other(format!("numbers: {bad} is outside 0..{below}")));
            }
        }
        Ok(stream.upload(values, writable(there))?)
    }
}

/// The same memory to write.
fn writable(there: Slice<'_, i32>) -> SliceMut<'_, i32> {
    // SAFETY: of a buffer that only kernels read, in the order of its stream: those that were put
    // there earlier are past when it is written.
    unsafe { SliceMut::from_raw(there.address(), there.len()) }
}
