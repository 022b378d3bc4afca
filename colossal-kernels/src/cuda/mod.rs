//! The kernels' CUDA twins, and the runtime beneath them.
//!
//! Nothing of CUDA is needed to build, and a machine without it sees no difference: the driver
//! and the compiler are looked for at run time, before their first call ([`devices`]). Kernels are
//! CUDA C++ without headers, compiled for the device that is there straight to machine code and
//! kept on disk ([`module`](Source)).
//!
//! A twin has the name and the arguments of its CPU kernel, the [`Stream`] first and device slices
//! for slices: it is put on the stream and returns. What follows on the same stream sees its
//! result, so work of one stream needs no synchronisation; between streams stand [`Event`]s.
//!
//! ```no_run
//! use colossal_kernels::cuda::{Block, Stream};
//!
//! # fn main() -> colossal_kernels::cuda::Result<()> {
//! let stream = Stream::new(0)?;
//! let mut x = Block::new(stream.device(), 4 * 4)?;
//! stream.upload(&[1.0f32, 2.0, 3.0, 4.0], x.slice_mut(0..4))?;
//! let mut back = [0.0f32; 4];
//! stream.download(x.slice(0..4), &mut back)?;
//! # Ok(())
//! # }
//! ```

mod blas;
mod device;
mod error;
mod library;
mod memory;
mod module;
mod slice;
mod stream;

pub use device::{Device, devices};
pub use error::{Error, Result};
pub use library::{Found, found};
pub use memory::{Block, Pinned};
pub use module::{Function, Grid, Source};
#[allow(unused_imports)] // The launchers use them.
pub(crate) use module::{args, source};
pub use slice::{Arg, Slice, SliceMut};
pub use stream::{Event, Stream, Transfer};
