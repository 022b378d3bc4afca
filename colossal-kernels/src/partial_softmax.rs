//! A softmax whose parts are computed apart, on several ranks or one after another: how parts are
//! put together.
//!
//! Attention over some of the keys has a result and a log-sum-exp; of two such parts
//! `lse = ln(e^a + e^b)` and `out = out_a e^(a - lse) + out_b e^(b - lse)`. A loss over some of the
//! vocabulary has a maximum, a sum of exponentials and perhaps the target's logit.

use crate::float::Float;
use crate::isa::simd;
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// Adds a part of an attention, `part [batch, tokens, heads, d]` with its
/// `part_lse [batch, heads, tokens]`, to the sum of those before, laid out alike. A part whose
/// log-sum-exp is minus infinity saw no key.
pub fn merge_attention<T: Float>(
    part: &[T],
    part_lse: &[f32],
    heads: usize,
    tokens: usize,
    sum: &mut [f32],
    lse: &mut [f32],
) {
    let _span = profile::moves::<T>("merge_attention", part.len(), 5);
    let rows = lse.len();
    let d = check_merge(part.len(), part_lse.len(), heads * tokens, sum.len(), rows);
    simd! { fn merge<T: Float>(sum: &mut [f32], keep: f32, part: &[T], add: f32) {
        for (s, p) in sum.iter_mut().zip(part) {
            *s = *s * keep + p.to_f32() * add;
        }
    } }
    let (sum, lse) = (Parts::new(sum), Parts::new(lse));
    parallel_for(rows, (16384 / d.max(1)).max(1), |range| {
        for row in range {
            let (t, h) = (row / heads % tokens, row % heads);
            let at = (row / (heads * tokens) * heads + h) * tokens + t;
            let new = part_lse[at];
            if new == f32::NEG_INFINITY {
                continue;
            }
            // SAFETY: each row, and its place among the log-sum-exps, belongs to one piece.
            let (sum, lse) = unsafe { (sum.range(row * d..(row + 1) * d), lse.range(at..at + 1)) };
            let top = lse[0].max(new);
            let both = top + ((lse[0] - top).exp() + (new - top).exp()).ln();
            merge(sum, (lse[0] - both).exp(), &part[row * d..(row + 1) * d], (new - both).exp());
            lse[0] = both;
        }
    });
}

/// The head's width, of operands that fit.
pub(crate) fn check_merge(
    part: usize,
    part_lse: usize,
    sequence: usize,
    sum: usize,
    rows: usize,
) -> usize {
    assert!(part == sum && part_lse == rows, "merge_attention: a part is as long as the sum");
    assert!(
        rows.is_multiple_of(sequence.max(1)) && part.is_multiple_of(rows.max(1)),
        "merge_attention: {part} elements and {rows} log-sum-exps for {sequence} rows a sequence"
    );
    part.checked_div(rows).unwrap_or(0)
}

/// What a rank adds to the sums over a sharded vocabulary: `terms [2, rows]`. On entry the first
/// row holds the sums of exponentials below the rank's `own` maxima; they become sums below `max`,
/// the maxima of all ranks. The second becomes the target's logit, 0 where the target is elsewhere.
pub fn vocabulary_terms<T: Float>(
    logits: &[T],
    targets: &[i32],
    vocab: usize,
    own: &[f32],
    max: &[f32],
    terms: &mut [f32],
) {
    let rows = check_terms(logits.len(), targets.len(), vocab, own.len(), max.len(), terms.len());
    let (sums, found) = terms.split_at_mut(rows);
    for row in 0..rows {
        sums[row] *= (own[row] - max[row]).exp();
        found[row] = match usize::try_from(targets[row]) {
            Ok(t) if t < vocab => logits[row * vocab + t].to_f32(),
            _ => 0.0,
        };
    }
}

/// The number of rows, of operands that fit.
pub(crate) fn check_terms(
    logits: usize,
    rows: usize,
    vocab: usize,
    own: usize,
    max: usize,
    terms: usize,
) -> usize {
    assert_eq!(logits, rows * vocab, "vocabulary_terms: logits must be [rows, vocab]");
    assert!(own == rows && max == rows, "vocabulary_terms: one maximum per row");
    assert_eq!(terms, 2 * rows, "vocabulary_terms: two terms per row");
    rows
}

/// The losses and log-sum-exps of rows from the maxima and the summed terms of all ranks:
/// `lse = max + ln(sum)`, `loss = lse - target's logit`, 0 where the target is `ignore`.
pub fn vocabulary_loss(
    max: &[f32],
    terms: &[f32],
    targets: &[i32],
    ignore: i32,
    loss: &mut [f32],
    lse: &mut [f32],
) {
    let rows = targets.len();
    check_loss(rows, max.len(), terms.len(), loss.len(), lse.len());
    for row in 0..rows {
        lse[row] = max[row] + terms[row].ln();
        loss[row] = if targets[row] == ignore { 0.0 } else { lse[row] - terms[rows + row] };
    }
}

pub(crate) fn check_loss(rows: usize, max: usize, terms: usize, loss: usize, lse: usize) {
    assert!(max == rows && terms == 2 * rows, "vocabulary_loss: a maximum and two terms per row");
    assert!(loss == rows && lse == rows, "vocabulary_loss: one loss and lse per row");
}
