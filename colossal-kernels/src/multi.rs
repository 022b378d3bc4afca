//! Norm and scale of many tensors at once: gradient clipping.

use crate::isa::simd;
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// The sum of squares: blocks of 4096 in f32, runs of 16 blocks in f64, added in order, so that
/// the result does not depend on the number of threads.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let _span = profile::moves::<f32>("sum_of_squares", x.len(), 1);
    simd! { fn block(x: &[f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        let chunks = x.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().map(|x| x * x).sum();
        for c in chunks {
            for (lane, x) in lanes.iter_mut().zip(c) {
                *lane += x * x;
            }
        }
        lanes.iter().sum::<f32>() + rest
    } }
    const RUN: usize = 16 * 4096;
    let mut sums = vec![0.0f64; x.len().div_ceil(RUN)];
    let parts = Parts::new(&mut sums);
    parallel_for(parts.len(), 1, |range| {
        for i in range {
            let run = &x[i * RUN..((i + 1) * RUN).min(x.len())];
            // SAFETY: each run has its own sum.
            let sum = unsafe { parts.range(i..i + 1) };
            sum[0] = run.chunks(4096).map(|b| f64::from(block(b))).sum();
        }
    });
    sums.iter().sum()
}

/// The sum of squares of all tensors together.
pub fn sum_of_squares_many(tensors: &[&[f32]]) -> f64 {
    tensors.iter().map(|t| sum_of_squares(t)).sum()
}

/// Multiplies every tensor by `s`.
pub fn scale_many(tensors: &mut [&mut [f32]], s: f32) {
    simd! { fn piece(x: &mut [f32], s: f32) {
        x.iter_mut().for_each(|x| *x *= s);
    } }
    for t in tensors {
        let len = t.len();
        let parts = Parts::new(t);
        parallel_for(len, 16384, |r| {
            // SAFETY: ranges of different pieces are disjoint.
            piece(unsafe { parts.range(r) }, s);
        });
    }
}
