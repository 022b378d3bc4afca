//! Norms of rows of which only a part of the width is here: the steps between which ranks sum.

use super::launch::rows;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;
use crate::wide_norm::{check_normed, check_weight};

pub(super) static WIDE_NORM: Source = source!("wide_norm");

/// `out[r] = scale * ` the sum of row `r` of `x`, or with a `mean` of `(x - mean)²`.
pub fn row_moment<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    mean: Option<Slice<'_, f32>>,
    scale: f32,
    out: SliceMut<'_, f32>,
) -> Result<()> {
    let count = out.len();
    let width = check_normed(x.len(), count, mean.map_or(count, |m| m.len()));
    let f = stream.function(&WIDE_NORM, &[("TYPE", T::CUDA)], "row_moment")?;
    let grid = rows::<T>(count, width);
    f.launch(grid, args![x, mean, scale, count as u32, width as u32, out])
}

/// `y = x̂ weight + bias`.
pub fn wide_norm<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    mean: Slice<'_, f32>,
    variance: Slice<'_, f32>,
    eps: f32,
    weight: Slice<'_, T>,
    bias: Option<Slice<'_, T>>,
    y: SliceMut<'_, T>,
) -> Result<()> {
    let (width, count) = (check_normed(x.len(), mean.len(), variance.len()), mean.len());
    check_weight(x.len(), width, y.len(), weight.len(), bias.map_or(width, |b| b.len()));
    let f = stream.function(&WIDE_NORM, &[("TYPE", T::CUDA)], "wide_norm")?;
    let size = [count as u32, width as u32];
    let grid = rows::<T>(count, width);
    f.launch(grid, args![x, mean, variance, eps, weight, bias, size[0], size[1], y])
}

/// `sums [2, rows]`: `scale` times the sums of `dy weight` and of `dy weight x̂` of each row.
pub fn wide_norm_sums<T: Float>(
    stream: &Stream,
    dy: Slice<'_, T>,
    x: Slice<'_, T>,
    mean: Slice<'_, f32>,
    variance: Slice<'_, f32>,
    eps: f32,
    weight: Slice<'_, T>,
    scale: f32,
    sums: SliceMut<'_, f32>,
) -> Result<()> {
    let (width, count) = (check_normed(x.len(), mean.len(), variance.len()), mean.len());
    check_weight(x.len(), width, dy.len(), weight.len(), width);
    assert_eq!(sums.len(), 2 * count, "wide_norm_sums: two sums per row");
    let f = stream.function(&WIDE_NORM, &[("TYPE", T::CUDA)], "wide_norm_sums")?;
    let size = [count as u32, width as u32];
    let grid = rows::<T>(count, width);
    f.launch(grid, args![dy, x, mean, variance, eps, weight, scale, size[0], size[1], sums])
}

/// `dx = (dy weight - sums[0] - x̂ sums[1]) / sqrt(variance + eps)`, and `dw = dy x̂`, whose sum over
/// rows is the weight's gradient.
pub fn wide_norm_backward<T: Float>(
    stream: &Stream,
    dy: Slice<'_, T>,
    x: Slice<'_, T>,
    mean: Slice<'_, f32>,
    variance: Slice<'_, f32>,
    eps: f32,
    weight: Slice<'_, T>,
    sums: Slice<'_, f32>,
    dx: SliceMut<'_, T>,
    dw: SliceMut<'_, f32>,
) -> Result<()> {
    let (width, count) = (check_normed(x.len(), mean.len(), variance.len()), mean.len());
    check_weight(x.len(), width, dy.len(), weight.len(), width);
    assert!(dx.len() == dy.len() && dw.len() == dy.len(), "wide_norm_backward: one per element");
    assert_eq!(sums.len(), 2 * count, "wide_norm_backward: two sums per row");
    let f = stream.function(&WIDE_NORM, &[("TYPE", T::CUDA)], "wide_norm_backward")?;
    let size = [count as u32, width as u32];
    let grid = rows::<T>(count, width);
    f.launch(grid, args![dy, x, mean, variance, eps, weight, sums, size[0], size[1], dx, dw])
}
