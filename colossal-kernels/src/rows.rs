//! Rows that several tokens share: weighted sums over them, as experts' answers are combined.

use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// `y[t] = sum over j of weights[t, j] * rows[at[t, j]]`; a negative place counts as zeros.
/// `at` and `weights` are `[tokens, k]`, `rows` `[.., width]`, `y` `[tokens, width]`.
pub fn combine_rows<T: Float>(
    at: &[i32],
    weights: &[f32],
    k: usize,
    rows: &[T],
    width: usize,
    y: &mut [T],
) {
    let _span = profile::moves::<T>("combine_rows", y.len(), 1 + k);
    assert_eq!(at.len(), weights.len(), "combine_rows: one weight for each place");
    assert_eq!(y.len() * k, at.len() * width, "combine_rows: y must have one row for k places");
    let parts = Parts::new(y);
    parallel_for(at.len() / k.max(1), (16384 / (k * width).max(1)).max(1), |tokens| {
        with_workspace(width, |sum| {
            for t in tokens {
                sum.fill(0.0);
                for i in t * k..(t + 1) * k {
                    if let Ok(row) = usize::try_from(at[i]) {
                        add(weights[i], &rows[row * width..(row + 1) * width], sum);
                    }
                }
                // SAFETY: each token belongs to one piece.
                let y = unsafe { parts.range(t * width..(t + 1) * width) };
                y.iter_mut().zip(&*sum).for_each(|(y, s)| *y = T::from_f32(*s));
            }
        });
    });
}

/// Gradients of [`combine_rows`]: `drows[at[t, j]] = weights[t, j] * dy[t]` and `dweights[t, j] =
/// dy[t] · rows[at[t, j]]`. No place occurs twice; rows at no place keep what they hold.
pub fn combine_rows_backward<T: Float>(
    at: &[i32],
    weights: &[f32],
    k: usize,
    rows: &[T],
    width: usize,
    dy: &[T],
    drows: &mut [T],
    dweights: &mut [f32],
) {
    let _span = profile::moves::<T>("combine_rows_backward", rows.len(), 3);
    assert_eq!(at.len(), weights.len(), "combine_rows_backward: one weight for each place");
    assert_eq!(at.len(), dweights.len(), "combine_rows_backward: one gradient for each place");
    assert_eq!(rows.len(), drows.len(), "combine_rows_backward: one gradient for each row");
    let mut seen = vec![false; rows.len().checked_div(width).unwrap_or(0)];
    for at in at.iter().filter_map(|at| usize::try_from(*at).ok()) {
        assert!(!std::mem::replace(&mut seen[at], true), "combine_rows_backward: row {at} twice");
    }
    let (drows, dweights) = (Parts::new(drows), Parts::new(dweights));
    parallel_for(at.len() / k.max(1), (16384 / (k * width).max(1)).max(1), |tokens| {
        for t in tokens {
            let dy = &dy[t * width..(t + 1) * width];
            for i in t * k..(t + 1) * k {
                let mut dot = 0.0;
                if let Ok(row) = usize::try_from(at[i]) {
                    let own = row * width..(row + 1) * width;
                    // SAFETY: no row occurs twice, as was just checked.
                    let drow = unsafe { drows.range(own.clone()) };
                    dot = spread(weights[i], dy, &rows[own], drow);
                }
                // SAFETY: each token belongs to one piece.
                let dweight = unsafe { dweights.range(i..i + 1) };
                dweight[0] = dot;
            }
        }
    });
}

simd! {
    fn add<T: Float>(weight: f32, row: &[T], sum: &mut [f32]) {
        for (s, x) in sum.iter_mut().zip(row) {
            *s += weight * x.to_f32();
        }
    }
}

simd! {
    /// `drow = weight * dy`, and `dy · row`.
    fn spread<T: Float>(weight: f32, dy: &[T], row: &[T], drow: &mut [T]) -> f32 {
        for (to, d) in drow.iter_mut().zip(dy) {
            *to = T::from_f32(weight * d.to_f32());
        }
        let mut lanes = [0.0f32; 16];
        let (d16, d_rest) = dy.as_chunks::<16>();
        let (x16, x_rest) = row.as_chunks::<16>();
        for (d, x) in d16.iter().zip(x16) {
            for l in 0..16 {
                lanes[l] += d[l].to_f32() * x[l].to_f32();
            }
        }
        let rest: f32 = d_rest.iter().zip(x_rest).map(|(d, x)| d.to_f32() * x.to_f32()).sum();
        lanes.iter().sum::<f32>() + rest
    }
}
