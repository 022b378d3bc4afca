//! One query against a stream of keys: decoding reads every key and value once.
//!
//! Heads lie side by side in a row of keys, so a thread takes neighbouring heads and goes from row to
//! row: memory sees long runs, not a few lines of each row.

use std::ops::Range;

use super::AttentionShape;
use super::narrow::store;
use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::math::exp;

/// Asks for the row of `len` elements that lies 4096 bytes, or a row, beyond row `j`.
#[inline(always)]
fn prefetch<T>(x: &[T], j: usize, stride: usize, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        const AHEAD: usize = 4096;
        let at = (j + (AHEAD / (len * size_of::<T>())).max(1)) * stride;
        if let Some(row) = x.get(at..at + len) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for line in (0..size_of_val(row)).step_by(64) {
                // SAFETY: the line begins inside the row.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().add(line)) };
            }
        }
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = (x, j, stride, len);
}

/// Query `i` of neighbouring heads of sequence `b`, whose keys begin at `k`: `q` and `out` are these
/// heads' parts of the row. Hands each head's log-sum-exp to `lse`.
pub(super) fn one_query<T: Float>(
    s: &AttentionShape<'_>,
    b: usize,
    heads: Range<usize>,
    i: usize,
    [q, k, v]: [&[T]; 3],
    out: &mut [T],
    mut lse: impl FnMut(usize, f32),
) {
    simd! { fn scores<T: Float>(d: usize, q: &[T], k: &[T], stride: usize, key: &[usize], lanes: &mut [[f32; 16]], p: &mut [f32]) {
        let seen = p.len() / key.len();
        let width = key[key.len() - 1] + d;
        for j in 0..seen {
            prefetch(k, j, stride, width);
            let row = &k[j * stride..j * stride + width];
            for ((q, at), sum) in q.chunks_exact(d).zip(key).zip(lanes.iter_mut()) {
                let ((q16, _), (k16, _)) = (q.as_chunks::<16>(), row[*at..*at + d].as_chunks::<16>());
                let mut acc = [0.0f32; 16];
                for (q, k) in q16.iter().zip(k16) {
                    for l in 0..16 {
                        acc[l] += q[l].to_f32() * k[l].to_f32();
                    }
                }
                *sum = acc;
            }
            // The lanes of all heads are added up when they are in memory: the compiler keeps to
            // whole vectors above.
            for (h, sum) in lanes.iter().enumerate() {
                let [mut eight, mut four] = [[0.0f32; 8], [0.0f32; 8]];
                (0..8).for_each(|l| eight[l] = sum[l] + sum[l + 8]);
                (0..4).for_each(|l| four[l] = eight[l] + eight[l + 4]);
                p[h * seen + j] = (four[0] + four[2]) + (four[1] + four[3]);
            }
            for (h, at) in key.iter().enumerate() {
                for c in d / 16 * 16..d {
                    p[h * seen + j] += q[h * d + c].to_f32() * row[at + c].to_f32();
                }
            }
        }
    } }
    simd! { fn weigh<T: Float>(d: usize, p: &[f32], v: &[T], stride: usize, key: &[usize], acc: &mut [f32]) {
        let seen = p.len() / key.len();
        let width = key[key.len() - 1] + d;
        for j in 0..seen {
            prefetch(v, j, stride, width);
            let row = &v[j * stride..j * stride + width];
            for (h, (acc, at)) in acc.chunks_exact_mut(d).zip(key).enumerate() {
                let p = p[h * seen + j];
                for (a, v) in acc.iter_mut().zip(&row[*at..*at + d]) {
                    *a += p * v.to_f32();
                }
            }
        }
    } }
    let (d, stride, group) = (s.head_dim, s.kv_heads * s.head_dim, s.heads / s.kv_heads);
    let seen = s.visible(b, i);
    if seen.is_empty() {
        out.fill(T::zeroed());
        return heads.for_each(|h| lse(h, f32::NEG_INFINITY));
    }
    // Where each head's key begins in a row, from the first one's on.
    let first = heads.start / group * d;
    let key: Vec<usize> = heads.clone().map(|h| h / group * d - first).collect();
    let from = seen.start * stride + first;
    with_workspace(heads.len() * (16 + seen.len() + d), |space| {
        let (lanes, space) = space.split_at_mut(heads.len() * 16);
        let (p, acc) = space.split_at_mut(heads.len() * seen.len());
        scores(d, q, &k[from..], stride, &key, lanes.as_chunks_mut().0, p);
        acc.fill(0.0);
        let mut inverse = Vec::with_capacity(heads.len());
        for (h, p) in heads.clone().zip(p.chunks_exact_mut(seen.len())) {
            p.iter_mut().for_each(|p| *p *= s.scale);
            if let Some(bias) = s.bias {
                let at = b * bias.batch_stride + h * bias.head_stride + i * s.kv_len + seen.start;
                p.iter_mut().zip(&bias.data[at..]).for_each(|(p, b)| *p += b);
            }
            let max = crate::softmax::row_max(p);
            let sum = exp_row(p, max);
            inverse.push(1.0 / sum);
            lse(h, max + sum.ln());
        }
        weigh(d, p, &v[from..], stride, &key, acc);
        let rows = out.chunks_exact_mut(d).zip(acc.chunks_exact(d));
        rows.zip(inverse).for_each(|((out, acc), scale)| store(acc, scale, out));
    });
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
