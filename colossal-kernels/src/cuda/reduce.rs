//! Sums and maxima. What the CPU returns goes to a slice of one element.

use super::launch::resident;
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;

pub(super) static REDUCE: Source = source!("reduce");

/// Elements that a block reduces, and how many blocks there are.
pub(super) fn spans(stream: &Stream, n: usize) -> (usize, usize) {
    let span = n.div_ceil(resident(stream)).next_multiple_of(4096).max(4096);
    (span, n.div_ceil(span))
}

/// The sum of all elements. Blocks are added in f32, their sums in f64.
pub fn sum<T: Float>(stream: &Stream, x: Slice<'_, T>, out: SliceMut<'_, f32>) -> Result<()> {
    assert_eq!(out.len(), 1, "sum: out is one element");
    let types = [("TYPE", T::CUDA)];
    let (span, blocks) = spans(stream, x.len());
    let partial = stream.function(&REDUCE, &types, "sum")?;
    let finish = stream.function(&REDUCE, &types, "sum_finish")?;
    stream.with_scratch(blocks, |mut partials: SliceMut<'_, f64>| {
        let sums = partials.reborrow();
        partial.launch(Grid::line(blocks, 256), args![x, x.len() as u64, span as u64, sums])?;
        finish.launch(Grid::line(1, 256), args![partials, blocks as u32, out])
    })
}

/// The largest element; minus infinity for none.
pub fn max<T: Float>(stream: &Stream, x: Slice<'_, T>, out: SliceMut<'_, f32>) -> Result<()> {
    assert_eq!(out.len(), 1, "max: out is one element");
    let types = [("TYPE", T::CUDA)];
    let (span, blocks) = spans(stream, x.len());
    let partial = stream.function(&REDUCE, &types, "max_of")?;
    let finish = stream.function(&REDUCE, &types, "max_finish")?;
    stream.with_scratch(blocks, |mut partials: SliceMut<'_, f32>| {
        let tops = partials.reborrow();
        partial.launch(Grid::line(blocks, 256), args![x, x.len() as u64, span as u64, tops])?;
        finish.launch(Grid::line(1, 256), args![partials, blocks as u32, out])
    })
}

/// `out += ` the sum over rows of `x [rows, dim]`: the gradient of a bias.
pub fn sum_rows<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    dim: usize,
    out: SliceMut<'_, f32>,
) -> Result<()> {
    assert_eq!(out.len(), dim, "sum_rows: out has {} elements, rows have {dim}", out.len());
    if dim == 0 || x.is_empty() {
        return Ok(());
    }
    assert_eq!(x.len() % dim, 0, "sum_rows: {} elements are no rows of {dim}", x.len());
    let rows = x.len() / dim;
    let columns = dim.div_ceil(32 * 16 / size_of::<T>());
    // As many blocks as keep the device busy, none of fewer than 32 rows.
    let span = rows.div_ceil(resident(stream).div_ceil(columns)).max(32);
    let count = rows.div_ceil(span);
    let f = stream.function(&REDUCE, &[("TYPE", T::CUDA)], "sum_rows")?;
    stream.with_scratch(count * dim, |mut partials: SliceMut<'_, f32>| {
        let grid = Grid { blocks: [columns as u32, count as u32, 1], ..Grid::line(1, 256) };
        let (size, sums) = ([rows as u32, dim as u32], partials.reborrow());
        f.launch(grid, args![x, size[0], size[1], span as u32, sums])?;
        add_partials(stream, partials.as_slice(), count, dim, out)
    })
}

/// `out += ` the sum of `count` partial sums, which begin `stride` elements apart, in order.
pub(super) fn add_partials(
    stream: &Stream,
    partials: Slice<'_, f32>,
    count: usize,
    stride: usize,
    out: SliceMut<'_, f32>,
) -> Result<()> {
    let f = stream.function(&REDUCE, &[("TYPE", f32::CUDA)], "add_partials")?;
    let grid = Grid::line(out.len().div_ceil(256), 256);
    f.launch(grid, args![partials, count as u32, stride as u64, out.len() as u32, out])
}

/// `out[r] = ` the sum of row `r` of `x [rows, dim]`.
pub fn sum_last<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    dim: usize,
    out: SliceMut<'_, f32>,
) -> Result<()> {
    assert_eq!(x.len(), out.len() * dim, "sum_last: one sum per row of {dim}");
    let f = stream.function(&REDUCE, &[("TYPE", T::CUDA)], "sum_last")?;
    let count = out.len();
    f.launch(super::launch::rows::<T>(count, dim), args![x, count as u32, dim as u32, out])
}
