//! Sums and maxima.

use crate::float::Float;
use crate::isa::simd;
use crate::math::{LANES, total};
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// The sum of all elements. Blocks of 4096 are added in f32, their sums in f64.
pub fn sum<T: Float>(x: &[T]) -> f32 {
    let _span = profile::moves::<T>("sum", x.len(), 1);
    simd! { fn block<T: Float>(x: &[T]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += x.to_f32();
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += x.to_f32();
        }
        total(lanes)
    } }
    x.chunks(4096).map(|b| f64::from(block(b))).sum::<f64>() as f32
}

/// The largest element; minus infinity for none.
pub fn max<T: Float>(x: &[T]) -> f32 {
    x.iter().map(|x| x.to_f32()).fold(f32::NEG_INFINITY, f32::max)
}

/// `out += ` the sum over rows of `x [rows, dim]`: the gradient of a bias.
pub fn sum_rows<T: Float>(x: &[T], dim: usize, out: &mut [f32]) {
    let _span = profile::moves::<T>("sum_rows", x.len(), 1);
    assert_eq!(out.len(), dim, "sum_rows: out has {} elements, rows have {dim}", out.len());
    if dim == 0 {
        return;
    }
    assert_eq!(x.len() % dim, 0, "sum_rows: {} elements are no rows of {dim}", x.len());
    simd! { fn piece<T: Float>(x: &[T], dim: usize, first: usize, out: &mut [f32]) {
        let n = out.len();
        let at = |r: usize| &x[r * dim + first..][..n];
        let rows = x.len() / dim;
        let whole = rows / 4 * 4;
        for r in (0..whole).step_by(4) {
            let [a, b, c, d] = [at(r), at(r + 1), at(r + 2), at(r + 3)];
            for i in 0..n {
                let [ab, cd] = [a[i].to_f32() + b[i].to_f32(), c[i].to_f32() + d[i].to_f32()];
                out[i] += ab + cd;
            }
        }
        for r in whole..rows {
            out.iter_mut().zip(at(r)).for_each(|(o, x)| *o += x.to_f32());
        }
    } }
    let parts = Parts::new(out);
    parallel_for(dim, 256, |r| {
        // SAFETY: ranges of different pieces are disjoint.
        let out = unsafe { parts.range(r.clone()) };
        piece(x, dim, r.start, out);
    });
}

/// `out[r] = ` the sum of row `r` of `x [rows, dim]`.
pub fn sum_last<T: Float>(x: &[T], dim: usize, out: &mut [f32]) {
    let _span = profile::moves::<T>("sum_last", x.len(), 1);
    assert_eq!(x.len(), out.len() * dim, "sum_last: one sum per row of {dim}");
    crate::threads::rows(x, dim, out, 1, |_, x, out| {
        for (r, o) in out.iter_mut().enumerate() {
            *o = sum(&x[r * dim..(r + 1) * dim]);
        }
    });
}
