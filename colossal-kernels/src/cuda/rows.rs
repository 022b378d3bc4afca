//! Rows that several tokens share: weighted sums over them, as experts' answers are combined.

use super::launch::per_row;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;

pub(super) static ROWS: Source = source!("rows");

/// `y[t] = sum over j of weights[t, j] * rows[at[t, j]]`; a negative place counts as zeros.
/// `at` and `weights` are `[tokens, k]`, `rows` `[.., width]`, `y` `[tokens, width]`; no place lies
/// beyond `rows`.
pub fn combine_rows<T: Float>(
    stream: &Stream,
    at: Slice<'_, i32>,
    weights: Slice<'_, f32>,
    k: usize,
    rows: Slice<'_, T>,
    width: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    assert_eq!(at.len(), weights.len(), "combine_rows: one weight for each place");
    assert_eq!(y.len() * k, at.len() * width, "combine_rows: y must have one row for k places");
    let f = stream.function(&ROWS, &[("TYPE", T::CUDA)], "combine_rows")?;
    let grid = per_row::<T>(at.len() / k.max(1), width, 256);
    f.launch(grid, args![at, weights, k as u32, rows, width as u32, y])
}

/// Gradients of [`combine_rows`]: `drows[at[t, j]] = weights[t, j] * dy[t]` and `dweights[t, j] =
/// dy[t] · rows[at[t, j]]`. No place occurs twice (which is not checked here); rows at no place
/// keep what they hold.
pub fn combine_rows_backward<T: Float>(
    stream: &Stream,
    at: Slice<'_, i32>,
    weights: Slice<'_, f32>,
    k: usize,
    rows: Slice<'_, T>,
    width: usize,
    dy: Slice<'_, T>,
    drows: SliceMut<'_, T>,
    dweights: SliceMut<'_, f32>,
) -> Result<()> {
    assert_eq!(at.len(), weights.len(), "combine_rows_backward: one weight for each place");
    assert_eq!(at.len(), dweights.len(), "combine_rows_backward: one gradient for each place");
    assert_eq!(rows.len(), drows.len(), "combine_rows_backward: one gradient for each row");
    assert_eq!(dy.len() * k, at.len() * width, "combine_rows_backward: one row for k places");
    let f = stream.function(&ROWS, &[("TYPE", T::CUDA)], "combine_rows_backward")?;
    let grid = per_row::<T>(at.len() / k.max(1), width, 256);
    f.launch(grid, args![at, weights, k as u32, rows, width as u32, dy, drows, dweights])
}
