//! One query against a stream of keys: decoding reads every key and value once.

use super::AttentionShape;
use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::math::exp;

/// Rows that a stream of keys is asked for before it is read: a head's rows lie too far apart
/// for the machine to see the stream itself.
const AHEAD: usize = 12;

/// Asks for `len` elements from `at`; beyond the end nothing happens.
#[inline(always)]
fn prefetch<T>(x: &[T], at: usize, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if let Some(row) = x.get(at..at + len) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        for line in (0..size_of_val(row)).step_by(64) {
            // SAFETY: the line begins inside the row.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().add(line)) };
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = (x, at, len);
}

/// One query against a stream of keys: decoding.
pub(super) fn one_query<T: Float>(
    s: &AttentionShape<'_>,
    b: usize,
    h: usize,
    i: usize,
    q: &[T],
    k: &[T],
    v: &[T],
    out: &mut [T],
) -> f32 {
    simd! { fn scores<T: Float>(q: &[T], k: &[T], stride: usize, scale: f32, out: &mut [f32]) {
        let d = q.len();
        for (j, o) in out.iter_mut().enumerate() {
            prefetch(k, (j + AHEAD) * stride, d);
            let k = &k[j * stride..j * stride + d];
            let mut lanes = [0.0f32; 16];
            let whole = d / 16 * 16;
            for c in (0..whole).step_by(16) {
                for l in 0..16 {
                    lanes[l] += q[c + l].to_f32() * k[c + l].to_f32();
                }
            }
            let rest: f32 = (whole..d).map(|c| q[c].to_f32() * k[c].to_f32()).sum();
            *o = scale * (lanes.iter().sum::<f32>() + rest);
        }
    } }
    simd! { fn weigh<T: Float>(p: &[f32], v: &[T], stride: usize, acc: &mut [f32]) {
        for (j, p) in p.iter().enumerate() {
            prefetch(v, (j + AHEAD) * stride, acc.len());
            for (a, v) in acc.iter_mut().zip(&v[j * stride..]) {
                *a += p * v.to_f32();
            }
        }
    } }
    let (d, stride) = (s.head_dim, s.kv_heads * s.head_dim);
    let seen = s.visible(b, i);
    if seen.is_empty() {
        out.fill(T::zeroed());
        return f32::NEG_INFINITY;
    }
    with_workspace(seen.len() + d, |space| {
        let (p, acc) = space.split_at_mut(seen.len());
        scores(q, &k[seen.start * stride..], stride, s.scale, p);
        if let Some(bias) = s.bias {
            let at = b * bias.batch_stride + h * bias.head_stride + i * s.kv_len + seen.start;
            p.iter_mut().zip(&bias.data[at..]).for_each(|(p, b)| *p += b);
        }
        let max = crate::softmax::row_max(p);
        let sum = exp_row(p, max);
        acc.fill(0.0);
        weigh(p, &v[seen.start * stride..], stride, acc);
        out.iter_mut().zip(&*acc).for_each(|(o, a)| *o = T::from_f32(a / sum));
        max + sum.ln()
    })
}

simd! {
    /// `x = exp(x - max)`; the sum.
    fn exp_row(x: &mut [f32], max: f32) -> f32 {
        let mut lanes = [0.0f32; 16];
        let mut chunks = x.chunks_exact_mut(16);
        for c in &mut chunks {
            for (lane, x) in lanes.iter_mut().zip(c) {
                *x = exp(*x - max);
                *lane += *x;
            }
        }
        let mut rest = 0.0;
        for x in chunks.into_remainder() {
            *x = exp(*x - max);
            rest += *x;
        }
        lanes.iter().sum::<f32>() + rest
    }
}
