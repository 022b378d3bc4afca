//! Norms of rows of which only a part of the width is here: the steps between which ranks sum.
//!
//! A row's mean, then its variance about it (for RMSNorm about 0), are sums over ranks; backward
//! takes two sums more, of `dy w` and of `dy w x̂`. Rows are `x [rows, width]`, with a mean (zeros for
//! RMSNorm) and a variance each, over the whole width; `x̂ = (x - mean) / sqrt(variance + eps)`.

use crate::float::Float;
use crate::profile;
use crate::threads::{Parts, parallel_for};

fn rstd(variance: f32, eps: f32) -> f32 {
    1.0 / (variance + eps).sqrt()
}

/// The width of rows with a mean and a variance each.
pub(crate) fn check_normed(x: usize, mean: usize, variance: usize) -> usize {
    assert!(
        mean == variance && x.is_multiple_of(mean.max(1)),
        "wide_norm: {x} elements, {mean} means and {variance} variances"
    );
    x.checked_div(mean).unwrap_or(0)
}

/// `out[r] = scale * ` the sum of row `r` of `x`, or with a `mean` of `(x - mean)²`.
pub fn row_moment<T: Float>(x: &[T], mean: Option<&[f32]>, scale: f32, out: &mut [f32]) {
    let _span = profile::moves::<T>("row_moment", x.len(), 1);
    let rows = out.len();
    let width = check_normed(x.len(), rows, mean.map_or(rows, <[f32]>::len));
    let out = Parts::new(out);
    parallel_for(rows, (16384 / width.max(1)).max(1), |range| {
        // SAFETY: ranges of different pieces are disjoint.
        let out = unsafe { out.range(range.clone()) };
        for (out, r) in out.iter_mut().zip(range) {
            let row = x[r * width..(r + 1) * width].iter().map(|x| x.to_f32());
            *out = scale
                * match mean {
                    None => row.sum::<f32>(),
                    Some(mean) => row.map(|x| (x - mean[r]) * (x - mean[r])).sum(),
                };
        }
    });
}

/// `y = x̂ weight + bias`.
pub fn wide_norm<T: Float>(
    x: &[T],
    mean: &[f32],
    variance: &[f32],
    eps: f32,
    weight: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
) {
    let _span = profile::moves::<T>("wide_norm", y.len(), 2);
    let (width, rows) = (check_normed(x.len(), mean.len(), variance.len()), mean.len());
    check_weight(x.len(), width, y.len(), weight.len(), bias.map_or(width, <[T]>::len));
    let y = Parts::new(y);
    parallel_for(rows, (16384 / width.max(1)).max(1), |range| {
        for r in range {
            // SAFETY: each row belongs to one piece.
            let y = unsafe { y.range(r * width..(r + 1) * width) };
            let rstd = rstd(variance[r], eps);
            for (c, y) in y.iter_mut().enumerate() {
                let normed = (x[r * width + c].to_f32() - mean[r]) * rstd;
                let bias = bias.map_or(0.0, |b| b[c].to_f32());
                *y = T::from_f32(normed * weight[c].to_f32() + bias);
            }
        }
    });
}

pub(crate) fn check_weight(x: usize, width: usize, y: usize, weight: usize, bias: usize) {
    assert_eq!(x, y, "wide_norm: one result per element");
    assert!(x == 0 || weight == width && bias == width, "wide_norm: one weight per column");
}

/// `sums [2, rows]`: `scale` times the sums of `dy weight` and of `dy weight x̂` of each row.
pub fn wide_norm_sums<T: Float>(
    dy: &[T],
    x: &[T],
    mean: &[f32],
    variance: &[f32],
    eps: f32,
    weight: &[T],
    scale: f32,
    sums: &mut [f32],
) {
    let _span = profile::moves::<T>("wide_norm_sums", dy.len(), 2);
    let (width, rows) = (check_normed(x.len(), mean.len(), variance.len()), mean.len());
    check_weight(x.len(), width, dy.len(), weight.len(), width);
    assert_eq!(sums.len(), 2 * rows, "wide_norm_sums: two sums per row");
    let (plain, normed) = sums.split_at_mut(rows);
    for r in 0..rows {
        let rstd = rstd(variance[r], eps);
        (plain[r], normed[r]) = (0.0, 0.0);
        for c in 0..width {
            let dyw = dy[r * width + c].to_f32() * weight[c].to_f32();
            plain[r] += dyw * scale;
            normed[r] += dyw * ((x[r * width + c].to_f32() - mean[r]) * rstd) * scale;
        }
    }
}

/// `dx = (dy weight - sums[0] - x̂ sums[1]) / sqrt(variance + eps)`, and `dw = dy x̂`, whose sum over
/// rows is the weight's gradient.
pub fn wide_norm_backward<T: Float>(
    dy: &[T],
    x: &[T],
    mean: &[f32],
    variance: &[f32],
    eps: f32,
    weight: &[T],
    sums: &[f32],
    dx: &mut [T],
    dw: &mut [f32],
) {
    let _span = profile::moves::<T>("wide_norm_backward", dy.len(), 5);
    let (width, rows) = (check_normed(x.len(), mean.len(), variance.len()), mean.len());
    check_weight(x.len(), width, dy.len(), weight.len(), width);
    assert!(dx.len() == dy.len() && dw.len() == dy.len(), "wide_norm_backward: one per element");
    assert_eq!(sums.len(), 2 * rows, "wide_norm_backward: two sums per row");
    let (dx, dw) = (Parts::new(dx), Parts::new(dw));
    parallel_for(rows, (16384 / width.max(1)).max(1), |range| {
        for r in range {
            let own = r * width..(r + 1) * width;
            // SAFETY: each row belongs to one piece.
            let (dx, dw) = unsafe { (dx.range(own.clone()), dw.range(own.clone())) };
            let rstd = rstd(variance[r], eps);
            for (c, at) in own.enumerate() {
                let (dy, normed) = (dy[at].to_f32(), (x[at].to_f32() - mean[r]) * rstd);
                dw[c] = dy * normed;
                let inner = dy * weight[c].to_f32() - sums[r] - normed * sums[rows + r];
                dx[c] = T::from_f32(rstd * inner);
            }
        }
    });
}
