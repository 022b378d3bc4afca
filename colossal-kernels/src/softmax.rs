//! Softmax over the last dim.

use crate::elementwise::check;
use crate::float::Float;
use crate::isa::simd;
use crate::math::exp;
use crate::profile;
use crate::threads::rows;

simd! {
    /// The largest element.
    pub(crate) fn row_max<T: Float>(x: &[T]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let chunks = x.chunks_exact(16);
        let rest = chunks.remainder().iter().map(|x| x.to_f32()).fold(f32::NEG_INFINITY, f32::max);
        for c in chunks {
            for (lane, x) in lanes.iter_mut().zip(c) {
                let x = x.to_f32();
                *lane = if x > *lane { x } else { *lane };
            }
        }
        lanes.iter().copied().fold(rest, f32::max)
    }
}

simd! {
    /// The sum of `exp(x - max)`.
    pub(crate) fn row_sum_exp<T: Float>(x: &[T], max: f32) -> f32 {
        let mut lanes = [0.0f32; 16];
        let chunks = x.chunks_exact(16);
        let rest: f32 = chunks.remainder().iter().map(|x| exp(x.to_f32() - max)).sum();
        for c in chunks {
            for (lane, x) in lanes.iter_mut().zip(c) {
                *lane += exp(x.to_f32() - max);
            }
        }
        lanes.iter().sum::<f32>() + rest
    }
}

/// `y = softmax(x)` over rows of `dim`.
pub fn softmax<T: Float>(x: &[T], dim: usize, y: &mut [T]) {
    let _span = profile::moves::<T>("softmax", x.len(), 2);
    check("softmax", x.len(), y.len());
    simd! { fn write<T: Float>(x: &[T], max: f32, scale: f32, y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(exp(x.to_f32() - max) * scale);
        }
    } }
    rows(x, dim, y, dim, |_, x, y| {
        for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
            let max = row_max(x);
            write(x, max, 1.0 / row_sum_exp(x, max), y);
        }
    });
}

/// `dx = y * (dy - sum(dy * y))` over rows of `dim`.
pub fn softmax_backward<T: Float>(dy: &[T], y: &[T], dim: usize, dx: &mut [T]) {
    let _span = profile::moves::<T>("softmax_backward", dy.len(), 3);
    check("softmax_backward", dy.len(), y.len());
    check("softmax_backward", dy.len(), dx.len());
    simd! { fn write<T: Float>(dy: &[T], y: &[T], dx: &mut [T]) {
        let mut lanes = [0.0f32; 16];
        let whole = dy.len() / 16 * 16;
        for (a, b) in dy.chunks_exact(16).zip(y.chunks_exact(16)) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a.to_f32() * b.to_f32();
            }
        }
        let rest: f32 = dy[whole..].iter().zip(&y[whole..]).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
        let dot = lanes.iter().sum::<f32>() + rest;
        for ((dx, dy), y) in dx.iter_mut().zip(dy).zip(y) {
            *dx = T::from_f32(y.to_f32() * (dy.to_f32() - dot));
        }
    } }
    rows(dy, dim, dx, dim, |first, dy, dx| {
        for (r, (dy, dx)) in dy.chunks_exact(dim).zip(dx.chunks_exact_mut(dim)).enumerate() {
            write(dy, &y[(first + r) * dim..(first + r + 1) * dim], dx);
        }
    });
}

/// `y = x - logsumexp(x)` over rows of `dim`.
pub fn log_softmax<T: Float>(x: &[T], dim: usize, y: &mut [T]) {
    let _span = profile::moves::<T>("log_softmax", x.len(), 2);
    check("log_softmax", x.len(), y.len());
    simd! { fn write<T: Float>(x: &[T], lse: f32, y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(x.to_f32() - lse);
        }
    } }
    rows(x, dim, y, dim, |_, x, y| {
        for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
            let max = row_max(x);
            write(x, max + row_sum_exp(x, max).ln(), y);
        }
    });
}

/// `dx = dy - exp(y) sum(dy)` over rows of `dim`, where `y` came from [`log_softmax`].
pub fn log_softmax_backward<T: Float>(dy: &[T], y: &[T], dim: usize, dx: &mut [T]) {
    let _span = profile::moves::<T>("log_softmax_backward", dy.len(), 3);
    check("log_softmax_backward", dy.len(), y.len());
    check("log_softmax_backward", dy.len(), dx.len());
    simd! { fn write<T: Float>(dy: &[T], y: &[T], sum: f32, dx: &mut [T]) {
        for ((dx, dy), y) in dx.iter_mut().zip(dy).zip(y) {
            *dx = T::from_f32(dy.to_f32() - exp(y.to_f32()) * sum);
        }
    } }
    rows(dy, dim, dx, dim, |first, dy, dx| {
        for (r, (dy, dx)) in dy.chunks_exact(dim).zip(dx.chunks_exact_mut(dim)).enumerate() {
            let y = &y[(first + r) * dim..(first + r + 1) * dim];
            write(dy, y, crate::reduce::sum(dy), dx);
        }
    });
}
