//! RMS norm and layer norm with their gradients, over rows of `x [rows, dim]`.

use crate::elementwise::check;
use crate::float::Float;
use crate::isa::simd;
use crate::math::{LANES, total};
use crate::profile;
use crate::threads::{Parts, count, parallel_for};

simd! {
    fn dot3<T: Float>(a: &[T], b: &[T], c: &[T]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let [(a, a_rest), (b, b_rest), (c, c_rest)] = [a, b, c].map(|x| x.as_chunks::<LANES>());
        for ((a, b), c) in a.iter().zip(b).zip(c) {
            for (((lane, a), b), c) in lanes.iter_mut().zip(a).zip(b).zip(c) {
                *lane += a.to_f32() * b.to_f32() * c.to_f32();
            }
        }
        for (((lane, a), b), c) in lanes.iter_mut().zip(a_rest).zip(b_rest).zip(c_rest) {
            *lane += a.to_f32() * b.to_f32() * c.to_f32();
        }
        total(lanes)
    }
}

simd! {
    /// Sum of `(x - mean)²`.
    fn squares<T: Float>(x: &[T], mean: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            for (lane, x) in lanes.iter_mut().zip(x) {
                let d = x.to_f32() - mean;
                *lane += d * d;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            let d = x.to_f32() - mean;
            *lane += d * d;
        }
        total(lanes)
    }
}

/// `y = x * rstd * weight`, `rstd = 1 / sqrt(mean(x²) + eps)` kept per row.
pub fn rms_norm<T: Float>(x: &[T], weight: &[T], eps: f32, y: &mut [T], rstd: &mut [f32]) {
    let _span = profile::moves::<T>("rms_norm", x.len(), 2);
    let dim = weight.len();
    check("rms_norm", x.len(), y.len());
    check("rms_norm", x.len(), rstd.len() * dim);
    simd! { fn write<T: Float>(x: &[T], w: &[T], r: f32, y: &mut [T]) {
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = T::from_f32(x.to_f32() * r * w.to_f32());
        }
    } }
    let rows = rstd.len();
    let (y, rstd) = (Parts::new(y), Parts::new(rstd));
    parallel_for(rows, (8192 / dim.max(1)).max(1), |range| {
        for r in range {
            let at = r * dim..(r + 1) * dim;
            // SAFETY: each row belongs to one piece.
            let (y, rstd) = unsafe { (y.range(at.clone()), rstd.range(r..r + 1)) };
            rstd[0] = 1.0 / (squares(&x[at.clone()], 0.0) / dim as f32 + eps).sqrt();
            write(&x[at], weight, rstd[0], y);
        }
    });
}

/// Gradients of [`rms_norm`]; `dweight` is added to, and `dx` with `accumulate`. `dy` becomes the result of
/// [`rms_norm`] once more: the product that took it needs it for the gradient of its weight.
pub fn rms_norm_backward<T: Float>(
    dy: &mut [T],
    x: &[T],
    weight: &[T],
    rstd: &[f32],
    accumulate: bool,
    dx: &mut [T],
    dweight: &mut [f32],
) {
    let _span = profile::moves::<T>("rms_norm_backward", x.len(), 4 + usize::from(accumulate));
    let dim = weight.len();
    check("rms_norm_backward", dy.len(), x.len());
    check("rms_norm_backward", dy.len(), rstd.len() * dim);
    check("rms_norm_backward", dweight.len(), dim);
    simd! { fn write<T: Float>(y: &mut [T], x: &[T], w: &[T], r: f32, c: f32, accumulate: bool, dx: &mut [T], dw: &mut [f32]) {
        let n = dx.len().min(y.len()).min(x.len()).min(w.len()).min(dw.len());
        for i in 0..n {
            let (dy, x) = (y[i].to_f32(), x[i].to_f32());
            y[i] = T::from_f32(x * r * w[i].to_f32());
            let before = if accumulate { dx[i].to_f32() } else { 0.0 };
            dx[i] = T::from_f32(before + r * (dy * w[i].to_f32() - x * c));
            dw[i] += dy * x * r;
        }
    } }
    let (dy, dx) = (Parts::new(dy), Parts::new(dx));
    with_partials(rstd.len(), &mut [dweight], |range, dw| {
        for r in range {
            let at = r * dim..(r + 1) * dim;
            // SAFETY: each row belongs to one piece.
            let (dy, dx) = unsafe { (dy.range(at.clone()), dx.range(at.clone())) };
            let x = &x[at];
            let c = dot3(dy, x, weight) * rstd[r] * rstd[r] / dim as f32;
            write(dy, x, weight, rstd[r], c, accumulate, dx, &mut dw[..dim]);
        }
    });
}

/// `y = (x - mean) * rstd * weight + bias`; mean and `rstd` are kept per row.
pub fn layer_norm<T: Float>(
    x: &[T],
    weight: &[T],
    bias: &[T],
    eps: f32,
    y: &mut [T],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let _span = profile::moves::<T>("layer_norm", x.len(), 2);
    let dim = weight.len();
    check("layer_norm", bias.len(), dim);
    check("layer_norm", x.len(), y.len());
    check("layer_norm", x.len(), rstd.len() * dim);
    check("layer_norm", mean.len(), rstd.len());
    simd! { fn write<T: Float>(x: &[T], w: &[T], b: &[T], m: f32, r: f32, y: &mut [T]) {
        for (((y, x), w), b) in y.iter_mut().zip(x).zip(w).zip(b) {
            *y = T::from_f32((x.to_f32() - m) * r * w.to_f32() + b.to_f32());
        }
    } }
    let rows = rstd.len();
    let (y, mean, rstd) = (Parts::new(y), Parts::new(mean), Parts::new(rstd));
    parallel_for(rows, (8192 / dim.max(1)).max(1), |range| {
        for r in range {
            let at = r * dim..(r + 1) * dim;
            // SAFETY: each row belongs to one piece.
            let (y, mean, rstd) =
                unsafe { (y.range(at.clone()), mean.range(r..r + 1), rstd.range(r..r + 1)) };
            let x = &x[at];
            mean[0] = crate::reduce::sum(x) / dim as f32;
            rstd[0] = 1.0 / (squares(x, mean[0]) / dim as f32 + eps).sqrt();
            write(x, weight, bias, mean[0], rstd[0], y);
        }
    });
}

/// Gradients of [`layer_norm`]; `dweight` and `dbias` are added to, and `dx` with `accumulate`. `dy` becomes the
/// result of [`layer_norm`] once more, as with [`rms_norm_backward`].
pub fn layer_norm_backward<T: Float>(
    dy: &mut [T],
    x: &[T],
    weight: &[T],
    bias: &[T],
    mean: &[f32],
    rstd: &[f32],
    accumulate: bool,
    dx: &mut [T],
    dweight: &mut [f32],
    dbias: &mut [f32],
) {
    let _span = profile::moves::<T>("layer_norm_backward", x.len(), 4 + usize::from(accumulate));
    let dim = weight.len();
    check("layer_norm_backward", dy.len(), x.len());
    check("layer_norm_backward", dy.len(), rstd.len() * dim);
    check("layer_norm_backward", dweight.len(), dim);
    check("layer_norm_backward", bias.len(), dim);
    check("layer_norm_backward", dbias.len(), dim);
    simd! { fn sums<T: Float>(dy: &[T], x: &[T], w: &[T], m: f32, r: f32) -> [f32; 2] {
        let (mut a, mut b) = ([0.0f32; LANES], [0.0f32; LANES]);
        let [(dy, dy_rest), (x, x_rest), (w, w_rest)] = [dy, x, w].map(|x| x.as_chunks::<LANES>());
        for ((dy, x), w) in dy.iter().zip(x).zip(w) {
            for ((((a, b), dy), x), w) in a.iter_mut().zip(&mut b).zip(dy).zip(x).zip(w) {
                let g = dy.to_f32() * w.to_f32();
                *a += g;
                *b += g * (x.to_f32() - m) * r;
            }
        }
        for ((((a, b), dy), x), w) in a.iter_mut().zip(&mut b).zip(dy_rest).zip(x_rest).zip(w_rest) {
            let g = dy.to_f32() * w.to_f32();
            *a += g;
            *b += g * (x.to_f32() - m) * r;
        }
        [total(a), total(b)]
    } }
    simd! { fn write<T: Float>(y: &mut [T], x: &[T], w: &[T], bias: &[T], stats: [f32; 4], accumulate: bool, dx: &mut [T], dw: &mut [f32], db: &mut [f32]) {
        let [m, r, a, b] = stats;
        let n = dx.len().min(y.len()).min(x.len()).min(w.len()).min(dw.len()).min(db.len());
        for i in 0..n.min(bias.len()) {
            let (dy, xhat) = (y[i].to_f32(), (x[i].to_f32() - m) * r);
            y[i] = T::from_f32(xhat * w[i].to_f32() + bias[i].to_f32());
            let before = if accumulate { dx[i].to_f32() } else { 0.0 };
            dx[i] = T::from_f32(before + r * (dy * w[i].to_f32() - a - xhat * b));
            dw[i] += dy * xhat;
            db[i] += dy;
        }
    } }
    let (dy, dx) = (Parts::new(dy), Parts::new(dx));
    with_partials(rstd.len(), &mut [dweight, dbias], |range, partials| {
        let (dw, db) = partials.split_at_mut(dim);
        for row in range {
            let at = row * dim..(row + 1) * dim;
            // SAFETY: each row belongs to one piece.
            let (dy, dx) = unsafe { (dy.range(at.clone()), dx.range(at.clone())) };
            let (x, m, r) = (&x[at], mean[row], rstd[row]);
            let [a, b] = sums(dy, x, weight, m, r);
            let n = dim as f32;
            write(dy, x, weight, bias, [m, r, a / n, b / n], accumulate, dx, dw, db);
        }
    });
}

/// Runs `f(rows, partial sums)` over a fixed number of pieces, then adds the partial sums to
/// `outputs` in order: the result does not depend on which thread ran what.
fn with_partials(
    rows: usize,
    outputs: &mut [&mut [f32]],
    f: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) {
    let width: usize = outputs.iter().map(|o| o.len()).sum();
    let pieces = if rows < 64 { 1 } else { count().min(16) };
    crate::gemm::with_workspace(pieces * width, |partials| {
        partials.fill(0.0);
        let parts = Parts::new(partials);
        parallel_for(pieces, 1, |range| {
            for p in range {
                // SAFETY: each piece has its own partial sums.
                let partial = unsafe { parts.range(p * width..(p + 1) * width) };
                f(rows * p / pieces..rows * (p + 1) / pieces, partial);
            }
        });
        for partial in partials.chunks_exact(width.max(1)) {
            let mut at = 0;
            for out in outputs.iter_mut() {
                out.iter_mut().zip(&partial[at..]).for_each(|(o, p)| *o += p);
                at += out.len();
            }
        }
    });
}
