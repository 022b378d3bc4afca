//! Rotary position embedding, half-split: channel `i` turns with channel `i + head_dim / 2`.

use super::launch::per_row;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;

pub(super) static ROPE: Source = source!("rope");

/// Rotates `x [tokens, heads, head_dim]`; `cos` and `sin` are `[positions, head_dim / 2]`, and no
/// position lies beyond them.
pub fn rope<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    positions: Slice<'_, i32>,
    cos: Slice<'_, f32>,
    sin: Slice<'_, f32>,
    heads: usize,
    head_dim: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    rotate(stream, x, positions, cos, sin, heads, head_dim, 1.0, y)
}

/// The inverse rotation: the gradient of [`rope`].
pub fn rope_backward<T: Float>(
    stream: &Stream,
    dy: Slice<'_, T>,
    positions: Slice<'_, i32>,
    cos: Slice<'_, f32>,
    sin: Slice<'_, f32>,
    heads: usize,
    head_dim: usize,
    dx: SliceMut<'_, T>,
) -> Result<()> {
    rotate(stream, dy, positions, cos, sin, heads, head_dim, -1.0, dx)
}

fn rotate<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    positions: Slice<'_, i32>,
    cos: Slice<'_, f32>,
    sin: Slice<'_, f32>,
    heads: usize,
    head_dim: usize,
    sign: f32,
    y: SliceMut<'_, T>,
) -> Result<()> {
    let row = heads * head_dim;
    assert_eq!(x.len(), positions.len() * row, "rope: x must be [tokens, heads, head_dim]");
    assert_eq!(x.len(), y.len(), "rope: y must be as long as x");
    assert_eq!(cos.len(), sin.len(), "rope: one sine per cosine");
    let f = stream.function(&ROPE, &[("TYPE", T::CUDA)], "rope")?;
    let grid = per_row::<T>(positions.len(), row / 2, 256);
    f.launch(grid, args![x, positions, cos, sin, heads as u32, head_dim as u32, sign, y])
}
