//! Blocks of rows copied from and to anywhere, sums of neighbours, dropout.

use bytemuck::Pod;

use super::launch::{per_row, resident};
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::blocks::{check_block, check_dropout, threshold};
use crate::elementwise::check;
use crate::float::Float;

pub(super) static BLOCKS: Source = source!("blocks");

/// Copies `[outer, inner]` rows of `width` elements of 2 or 4 bytes: row `(i, j)` lies `i *
/// strides[0] + j * strides[1]` elements into `x` (`from`) and into `y` (`to`). A stride of 0 in
/// `from` repeats.
///
/// # Panics
/// When a row reaches beyond its slice, and for elements of another size.
pub fn copy_block<T: Pod>(
    stream: &Stream,
    x: Slice<'_, T>,
    from: [usize; 2],
    sizes: [usize; 3],
    y: SliceMut<'_, T>,
    to: [usize; 2],
) -> Result<()> {
    check_block(x.len(), from, sizes, y.len(), to);
    let ty = match size_of::<T>() {
        2 => "bf16",
        4 => "float",
        bytes => panic!("copy_block: elements of {bytes} bytes"),
    };
    let n: usize = sizes.iter().product();
    if n == 0 {
        return Ok(());
    }
    let f = stream.function(&BLOCKS, &[("TYPE", ty)], "copy_block")?;
    let grid = Grid::line(n.div_ceil(256).min(8 * resident(stream)), 256);
    let ([f0, f1], [t0, t1]) = (from.map(|s| s as u64), to.map(|s| s as u64));
    let [outer, inner, width] = sizes.map(|n| n as u32);
    f.launch(grid, args![x, f0, f1, outer, inner, width, y, t0, t1])
}

/// `y[i] = x[i]` to row `index[i]` of `y`, rows of `width`; others keep what they hold. No index
/// occurs twice; rows for an index outside of `y` are left out.
pub fn scatter_rows<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    index: Slice<'_, i32>,
    width: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    assert_eq!(x.len(), index.len() * width, "scatter_rows: x must have one row per index");
    let rows = y.len().checked_div(width).unwrap_or(0) as u64;
    let f = stream.function(&BLOCKS, &[("TYPE", T::CUDA)], "scatter_rows")?;
    f.launch(per_row::<T>(index.len(), width, 256), args![x, index, width as u32, y, rows])
}

/// `y[i, c] = ` the sum over `t` of `x[i, t, c]`, `x [.., times, width]`.
pub fn sum_groups<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    times: usize,
    width: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    check("sum_groups", x.len(), y.len() * times);
    let f = stream.function(&BLOCKS, &[("TYPE", T::CUDA)], "sum_groups")?;
    let groups = y.len().checked_div(width).unwrap_or(0);
    f.launch(per_row::<T>(groups, width, 256), args![x, times as u32, width as u32, y])
}

/// Columns `from ..` of rows of `width` become `value`.
pub fn fill_columns<T: Float>(
    stream: &Stream,
    y: SliceMut<'_, T>,
    width: usize,
    from: usize,
    value: T,
) -> Result<()> {
    if from >= width {
        return Ok(());
    }
    let f = stream.function(&BLOCKS, &[("TYPE", T::CUDA)], "fill_columns")?;
    let grid = per_row::<T>(y.len() / width, width - from, 256);
    f.launch(grid, args![y, width as u32, from as u32, value.to_f32()])
}

/// Zeroes each element with probability `p` and scales the others by `1 / (1 - p)`: the mask of
/// [`dropout`](crate::dropout).
pub fn dropout<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    keys: Slice<'_, u64>,
    first: Slice<'_, u64>,
    width: usize,
    p: f32,
    y: SliceMut<'_, T>,
) -> Result<()> {
    check_dropout(x.len(), keys.len(), first.len(), width, y.len());
    let f = stream.function(&BLOCKS, &[("TYPE", T::CUDA)], "dropout")?;
    let grid = per_row::<T>(keys.len(), width, 256);
    f.launch(grid, args![x, keys, first, width as u32, threshold(p), 1.0 / (1.0 - p), y])
}
