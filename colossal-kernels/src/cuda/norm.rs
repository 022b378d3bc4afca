//! RMS norm and layer norm with their gradients, over rows of `x [rows, dim]`.

use super::launch::{per_row, resident, rows};
use super::reduce::add_partials;
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::float::Float;

pub(super) static NORM: Source = source!("norm");

/// `y = x * rstd * weight`, `rstd = 1 / sqrt(mean(x²) + eps)` kept per row.
pub fn rms_norm<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    weight: Slice<'_, T>,
    eps: f32,
    y: SliceMut<'_, T>,
    rstd: SliceMut<'_, f32>,
) -> Result<()> {
    let dim = weight.len();
    check("rms_norm", x.len(), y.len());
    check("rms_norm", x.len(), rstd.len() * dim);
    let f = stream.function(&NORM, &[("TYPE", T::CUDA)], "rms_norm")?;
    let count = rstd.len();
    let grid = rows::<T>(count, dim);
    f.launch(grid, args![x, weight, eps, y, rstd, count as u32, dim as u32])
}

/// Gradients of [`rms_norm`]; `dweight` is added to, and `dx` with `accumulate`. `dy` becomes the result of
/// [`rms_norm`] once more.
///
/// # Panics
/// When sizes do not fit, and beyond 56 Ki columns: the gradient of the weight is summed in a
/// block's shared memory.
pub fn rms_norm_backward<T: Float>(
    stream: &Stream,
    dy: SliceMut<'_, T>,
    x: Slice<'_, T>,
    weight: Slice<'_, T>,
    rstd: Slice<'_, f32>,
    accumulate: bool,
    dx: SliceMut<'_, T>,
    dweight: SliceMut<'_, f32>,
) -> Result<()> {
    let dim = weight.len();
    check("rms_norm_backward", dy.len(), x.len());
    check("rms_norm_backward", dy.len(), dx.len());
    check("rms_norm_backward", dy.len(), rstd.len() * dim);
    check("rms_norm_backward", dweight.len(), dim);
    let grid = shares::<T>(stream, "rms_norm_backward", rstd.len(), dim, 1);
    if grid.blocks[0] == 0 || dim == 0 {
        return Ok(());
    }
    let f = stream.function(&NORM, &[("TYPE", T::CUDA)], "rms_norm_backward")?;
    let count = grid.blocks[0] as usize;
    stream.with_scratch(count * dim, |mut partials: SliceMut<'_, f32>| {
        let (rows, shares) = (rstd.len() as u32, partials.reborrow());
        let add = u32::from(accumulate);
        f.launch(grid, args![dy, x, weight, rstd, add, dx, shares, rows, dim as u32])?;
        add_partials(stream, partials.as_slice(), count, dim, dweight)
    })
}

/// `y = (x - mean) * rstd * weight + bias`; mean and `rstd` are kept per row.
pub fn layer_norm<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    weight: Slice<'_, T>,
    bias: Slice<'_, T>,
    eps: f32,
    y: SliceMut<'_, T>,
    mean: SliceMut<'_, f32>,
    rstd: SliceMut<'_, f32>,
) -> Result<()> {
    let dim = weight.len();
    check("layer_norm", bias.len(), dim);
    check("layer_norm", x.len(), y.len());
    check("layer_norm", x.len(), rstd.len() * dim);
    check("layer_norm", mean.len(), rstd.len());
    let f = stream.function(&NORM, &[("TYPE", T::CUDA)], "layer_norm")?;
    let count = rstd.len();
    let grid = rows::<T>(count, dim);
    f.launch(grid, args![x, weight, bias, eps, y, mean, rstd, count as u32, dim as u32])
}

/// Gradients of [`layer_norm`]; `dweight` and `dbias` are added to, and `dx` with `accumulate`. `dy` becomes the
/// result of [`layer_norm`] once more.
///
/// # Panics
/// When sizes do not fit, and beyond 28 Ki columns, as [`rms_norm_backward`] does.
pub fn layer_norm_backward<T: Float>(
    stream: &Stream,
    dy: SliceMut<'_, T>,
    x: Slice<'_, T>,
    weight: Slice<'_, T>,
    bias: Slice<'_, T>,
    mean: Slice<'_, f32>,
    rstd: Slice<'_, f32>,
    accumulate: bool,
    dx: SliceMut<'_, T>,
    dweight: SliceMut<'_, f32>,
    dbias: SliceMut<'_, f32>,
) -> Result<()> {
    let dim = weight.len();
    check("layer_norm_backward", dy.len(), x.len());
    check("layer_norm_backward", dy.len(), dx.len());
    check("layer_norm_backward", dy.len(), rstd.len() * dim);
    check("layer_norm_backward", mean.len(), rstd.len());
    check("layer_norm_backward", dweight.len(), dim);
    check("layer_norm_backward", bias.len(), dim);
    check("layer_norm_backward", dbias.len(), dim);
    let grid = shares::<T>(stream, "layer_norm_backward", rstd.len(), dim, 2);
    if grid.blocks[0] == 0 || dim == 0 {
        return Ok(());
    }
    let f = stream.function(&NORM, &[("TYPE", T::CUDA)], "layer_norm_backward")?;
    let count = grid.blocks[0] as usize;
    stream.with_scratch(count * 2 * dim, |mut partials: SliceMut<'_, f32>| {
        let (rows, shares) = (rstd.len() as u32, partials.reborrow());
        let add = u32::from(accumulate);
        f.launch(grid, args![dy, x, weight, bias, mean, rstd, add, dx, shares, rows, dim as u32])?;
        let partials = partials.as_slice();
        add_partials(stream, partials, count, 2 * dim, dweight)?;
        add_partials(stream, partials.range(dim..partials.len()), count, 2 * dim, dbias)
    })
}

/// Blocks that take rows by turns, each with its share of `sums` gradients in shared memory.
fn shares<T>(stream: &Stream, kernel: &str, count: usize, dim: usize, sums: usize) -> Grid {
    let shared = sums * dim * size_of::<f32>();
    assert!(shared <= 224 << 10, "{kernel}: rows of {dim} are too long");
    let grid = per_row::<T>(count.min(resident(stream)), dim, 512);
    Grid { shared: shared as u32, ..grid }
}
