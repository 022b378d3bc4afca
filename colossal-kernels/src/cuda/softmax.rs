//! Softmax over the last dim.

use super::launch::rows;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::float::Float;

pub(super) static SOFTMAX: Source = source!("softmax");

fn forward<T: Float>(
    stream: &Stream,
    name: &'static str,
    x: Slice<'_, T>,
    dim: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    check(name, x.len(), y.len());
    if x.is_empty() {
        return Ok(());
    }
    assert_eq!(x.len() % dim, 0, "{name}: {} elements are no rows of {dim}", x.len());
    let f = stream.function(&SOFTMAX, &[("TYPE", T::CUDA)], name)?;
    let count = x.len() / dim;
    f.launch(rows::<T>(count, dim), args![x, count as u32, dim as u32, y])
}

fn backward<T: Float>(
    stream: &Stream,
    name: &'static str,
    dy: Slice<'_, T>,
    y: Slice<'_, T>,
    dim: usize,
    dx: SliceMut<'_, T>,
) -> Result<()> {
    check(name, dy.len(), y.len());
    check(name, dy.len(), dx.len());
    if dy.is_empty() {
        return Ok(());
    }
    assert_eq!(dy.len() % dim, 0, "{name}: {} elements are no rows of {dim}", dy.len());
    let f = stream.function(&SOFTMAX, &[("TYPE", T::CUDA)], name)?;
    let count = dy.len() / dim;
    f.launch(rows::<T>(count, dim), args![dy, y, count as u32, dim as u32, dx])
}

/// `y = softmax(x)` over rows of `dim`.
pub fn softmax<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    dim: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    forward(stream, "softmax", x, dim, y)
}

/// `dx = y * (dy - sum(dy * y))` over rows of `dim`.
pub fn softmax_backward<T: Float>(
    stream: &Stream,
    dy: Slice<'_, T>,
    y: Slice<'_, T>,
    dim: usize,
    dx: SliceMut<'_, T>,
) -> Result<()> {
    backward(stream, "softmax_backward", dy, y, dim, dx)
}

/// `y = x - logsumexp(x)` over rows of `dim`.
pub fn log_softmax<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    dim: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    forward(stream, "log_softmax", x, dim, y)
}

/// `dx = dy - exp(y) sum(dy)` over rows of `dim`, where `y` came from [`log_softmax`].
pub fn log_softmax_backward<T: Float>(
    stream: &Stream,
    dy: Slice<'_, T>,
    y: Slice<'_, T>,
    dim: usize,
    dx: SliceMut<'_, T>,
) -> Result<()> {
    backward(stream, "log_softmax_backward", dy, y, dim, dx)
}
