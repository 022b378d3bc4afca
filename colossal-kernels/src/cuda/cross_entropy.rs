//! Softmax cross-entropy without a copy of the logits.

use super::launch::rows;
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;

pub(super) static CROSS_ENTROPY: Source = source!("cross_entropy");

/// `loss[r] = logsumexp(logits[r]) - logits[r][targets[r]]`, 0 where the target is `ignore`;
/// `lse` keeps the log-sum-exp for the backward pass.
pub fn cross_entropy<T: Float>(
    stream: &Stream,
    logits: Slice<'_, T>,
    targets: Slice<'_, i32>,
    vocab: usize,
    ignore: i32,
    loss: SliceMut<'_, f32>,
    lse: SliceMut<'_, f32>,
) -> Result<()> {
    let count = targets.len();
    assert_eq!(logits.len(), count * vocab, "cross_entropy: logits must be [rows, vocab]");
    assert!(loss.len() == count && lse.len() == count, "cross_entropy: one loss and lse per row");
    let f = stream.function(&CROSS_ENTROPY, &[("TYPE", T::CUDA)], "cross_entropy")?;
    let grid = rows::<T>(count, vocab);
    f.launch(grid, args![logits, targets, count as u32, vocab as u32, ignore, loss, lse])
}

/// In place: `logits[r] = dloss[r] * (softmax(logits[r]) - onehot(targets[r]))`, zeros for
/// ignored rows. A target outside the vocabulary has no one-hot term.
pub fn cross_entropy_backward<T: Float>(
    stream: &Stream,
    dloss: Slice<'_, f32>,
    targets: Slice<'_, i32>,
    vocab: usize,
    ignore: i32,
    lse: Slice<'_, f32>,
    logits_to_grad: SliceMut<'_, T>,
) -> Result<()> {
    let rows = targets.len();
    assert_eq!(
        logits_to_grad.len(),
        rows * vocab,
        "cross_entropy_backward: logits must be [rows, vocab]"
    );
    assert!(
        dloss.len() == rows && lse.len() == rows,
        "cross_entropy_backward: one gradient and lse per row"
    );
    let f = stream.function(&CROSS_ENTROPY, &[("TYPE", T::CUDA)], "cross_entropy_backward")?;
    let columns = vocab.div_ceil(256 * 16 / size_of::<T>()) as u32;
    let grid = Grid { blocks: [columns, rows.min(65535) as u32, 1], ..Grid::line(1, 256) };
    let size = [rows as u32, vocab as u32];
    f.launch(grid, args![dloss, targets, size[0], size[1], ignore, lse, logits_to_grad])
}

/// Maximum and sum of `exp(x - max)` of each row: what ranks of a sharded vocabulary combine.
pub fn logits_stats<T: Float>(
    stream: &Stream,
    logits: Slice<'_, T>,
    vocab: usize,
    max: SliceMut<'_, f32>,
    sum: SliceMut<'_, f32>,
) -> Result<()> {
    assert_eq!(logits.len(), max.len() * vocab, "logits_stats: logits must be [rows, vocab]");
    assert_eq!(max.len(), sum.len(), "logits_stats: one maximum and sum per row");
    let f = stream.function(&CROSS_ENTROPY, &[("TYPE", T::CUDA)], "logits_stats")?;
    let count = max.len();
    f.launch(rows::<T>(count, vocab), args![logits, count as u32, vocab as u32, max, sum])
}

/// Of each row the first of the largest, and its log-probability.
pub fn logits_best<T: Float>(
    stream: &Stream,
    logits: Slice<'_, T>,
    vocab: usize,
    best: SliceMut<'_, i32>,
    logprobs: SliceMut<'_, f32>,
) -> Result<()> {
    let count = best.len();
    assert_eq!(logits.len(), count * vocab, "logits_best: logits must be [rows, vocab]");
    assert_eq!(count, logprobs.len(), "logits_best: one token and log-probability per row");
    let f = stream.function(&CROSS_ENTROPY, &[("TYPE", T::CUDA)], "logits_best")?;
    f.launch(rows::<T>(count, vocab), args![logits, count as u32, vocab as u32, best, logprobs])
}
