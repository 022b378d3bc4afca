//! A softmax whose parts are computed apart: how parts are put together.

use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;
use crate::partial_softmax::{check_loss, check_merge, check_terms};

pub(super) static PARTIAL_SOFTMAX: Source = source!("partial_softmax");

/// Adds a part of an attention, `part [batch, tokens, heads, d]` with its
/// `part_lse [batch, heads, tokens]`, to the sum of those before, laid out alike. A part whose
/// log-sum-exp is minus infinity saw no key.
pub fn merge_attention<T: Float>(
    stream: &Stream,
    part: Slice<'_, T>,
    part_lse: Slice<'_, f32>,
    heads: usize,
    tokens: usize,
    sum: SliceMut<'_, f32>,
    lse: SliceMut<'_, f32>,
) -> Result<()> {
    let rows = lse.len();
    let d = check_merge(part.len(), part_lse.len(), heads * tokens, sum.len(), rows);
    let f = stream.function(&PARTIAL_SOFTMAX, &[("TYPE", T::CUDA)], "merge_attention")?;
    let grid = Grid { threads: [32, 8, 1], ..Grid::line(rows.div_ceil(8), 32) };
    let [rows, heads, tokens, d] = [rows, heads, tokens, d].map(|n| n as u32);
    f.launch(grid, args![part, part_lse, rows, heads, tokens, d, sum, lse])
}

/// What a rank adds to the sums over a sharded vocabulary: `terms [2, rows]`. On entry the first
/// row holds the sums of exponentials below the rank's `own` maxima; they become sums below `max`,
/// the maxima of all ranks. The second becomes the target's logit, 0 where the target is elsewhere.
pub fn vocabulary_terms<T: Float>(
    stream: &Stream,
    logits: Slice<'_, T>,
    targets: Slice<'_, i32>,
    vocab: usize,
    own: Slice<'_, f32>,
    max: Slice<'_, f32>,
    terms: SliceMut<'_, f32>,
) -> Result<()> {
    let rows = check_terms(logits.len(), targets.len(), vocab, own.len(), max.len(), terms.len());
    let f = stream.function(&PARTIAL_SOFTMAX, &[("TYPE", T::CUDA)], "vocabulary_terms")?;
    let grid = Grid::line(rows.div_ceil(256), 256);
    f.launch(grid, args![logits, targets, rows as u32, vocab as u32, own, max, terms])
}

/// The losses and log-sum-exps of rows from the maxima and the summed terms of all ranks:
/// `lse = max + ln(sum)`, `loss = lse - target's logit`, 0 where the target is `ignore`.
pub fn vocabulary_loss(
    stream: &Stream,
    max: Slice<'_, f32>,
    terms: Slice<'_, f32>,
    targets: Slice<'_, i32>,
    ignore: i32,
    loss: SliceMut<'_, f32>,
    lse: SliceMut<'_, f32>,
) -> Result<()> {
    let rows = targets.len();
    check_loss(rows, max.len(), terms.len(), loss.len(), lse.len());
    let f = stream.function(&PARTIAL_SOFTMAX, &[("TYPE", f32::CUDA)], "vocabulary_loss")?;
    let grid = Grid::line(rows.div_ceil(256), 256);
    f.launch(grid, args![max, terms, targets, rows as u32, ignore, loss, lse])
}
