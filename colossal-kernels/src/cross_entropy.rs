//! Softmax cross-entropy without a copy of the logits.
//!
//! Forward reads each row twice (maximum, then sum of exponentials) while it is in the cache and
//! keeps one number a row; backward turns the logits into their gradient where they lie.

use crate::float::Float;
use crate::isa::simd;
use crate::math::exp;
use crate::profile;
use crate::softmax::{row_max, row_sum_exp};
use crate::threads::{Parts, parallel_for};

/// A target that lies in another rank's part of the vocabulary.
pub const ELSEWHERE: i32 = i32::MAX;

/// `loss[r] = logsumexp(logits[r]) - logits[r][targets[r]]`, 0 where the target is `ignore`;
/// `lse` keeps the log-sum-exp for the backward pass.
pub fn cross_entropy<T: Float>(
    logits: &[T],
    targets: &[i32],
    vocab: usize,
    ignore: i32,
    loss: &mut [f32],
    lse: &mut [f32],
) {
    let _span = profile::moves::<T>("cross_entropy", logits.len(), 1);
    let rows = targets.len();
    assert_eq!(logits.len(), rows * vocab, "cross_entropy: logits must be [rows, vocab]");
    assert!(loss.len() == rows && lse.len() == rows, "cross_entropy: one loss and lse per row");
    let (loss, lse) = (Parts::new(loss), Parts::new(lse));
    parallel_for(rows, (16384 / vocab.max(1)).max(1), |range| {
        // SAFETY: ranges of different pieces are disjoint.
        let (loss, lse) = unsafe { (loss.range(range.clone()), lse.range(range.clone())) };
        for (i, r) in range.enumerate() {
            let row = &logits[r * vocab..(r + 1) * vocab];
            let max = row_max(row);
            lse[i] = max + row_sum_exp(row, max).ln();
            loss[i] = match usize::try_from(targets[r]) {
                Ok(t) if targets[r] != ignore && t < vocab => lse[i] - row[t].to_f32(),
                _ => 0.0,
            };
        }
    });
}

/// In place: `logits[r] = dloss[r] * (softmax(logits[r]) - onehot(targets[r]))`, zeros for
/// ignored rows. A target outside the vocabulary has no one-hot term.
pub fn cross_entropy_backward<T: Float>(
    dloss: &[f32],
    targets: &[i32],
    vocab: usize,
    ignore: i32,
    lse: &[f32],
    logits_to_grad: &mut [T],
) {
    let _span = profile::moves::<T>("cross_entropy_backward", logits_to_grad.len(), 2);
    let rows = targets.len();
    assert_eq!(
        logits_to_grad.len(),
        rows * vocab,
        "cross_entropy_backward: logits must be [rows, vocab]"
    );
    simd! { fn piece<T: Float>(row: &mut [T], lse: f32, d: f32) {
        for x in row {
            *x = T::from_f32(d * exp(x.to_f32() - lse));
        }
    } }
    let parts = Parts::new(logits_to_grad);
    parallel_for(rows, (16384 / vocab.max(1)).max(1), |range| {
        for r in range {
            // SAFETY: each row belongs to one piece.
            let row = unsafe { parts.range(r * vocab..(r + 1) * vocab) };
            if targets[r] == ignore || dloss[r] == 0.0 {
                row.fill(T::zeroed());
                continue;
            }
            let target = usize::try_from(targets[r]).ok().filter(|t| *t < vocab);
            let at_target = target.map(|t| dloss[r] * (exp(row[t].to_f32() - lse[r]) - 1.0));
            piece(row, lse[r], dloss[r]);
            if let (Some(t), Some(x)) = (target, at_target) {
                row[t] = T::from_f32(x);
            }
        }
    });
}

/// Of each row the first of the largest, and its log-probability: greedy decoding.
pub fn logits_best<T: Float>(logits: &[T], vocab: usize, best: &mut [i32], logprobs: &mut [f32]) {
    let count = best.len();
    assert_eq!(logits.len(), count * vocab, "logits_best: logits must be [rows, vocab]");
    assert_eq!(count, logprobs.len(), "logits_best: one token and log-probability per row");
    let (mut max, mut sum) = (vec![0.0; count], vec![0.0; count]);
    logits_stats(logits, vocab, &mut max, &mut sum);
    for (r, (best, logprob)) in best.iter_mut().zip(logprobs).enumerate() {
        let row = &logits[r * vocab..(r + 1) * vocab];
        *best = row.iter().position(|l| l.to_f32() == max[r]).unwrap_or(0) as i32;
        *logprob = -sum[r].ln();
    }
}

/// Maximum and sum of `exp(x - max)` of each row: what ranks of a sharded vocabulary combine.
pub fn logits_stats<T: Float>(logits: &[T], vocab: usize, max: &mut [f32], sum: &mut [f32]) {
    let _span = profile::moves::<T>("logits_stats", logits.len(), 1);
    assert_eq!(logits.len(), max.len() * vocab, "logits_stats: logits must be [rows, vocab]");
    let rows = max.len();
    let (max, sum) = (Parts::new(max), Parts::new(sum));
    parallel_for(rows, (16384 / vocab.max(1)).max(1), |range| {
        // SAFETY: ranges of different pieces are disjoint.
        let (max, sum) = unsafe { (max.range(range.clone()), sum.range(range.clone())) };
        for (i, r) in range.enumerate() {
            let row = &logits[r * vocab..(r + 1) * vocab];
            max[i] = row_max(row);
            sum[i] = row_sum_exp(row, max[i]);
        }
    });
}
