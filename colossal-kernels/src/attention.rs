//! Attention without the s×s matrix (FlashAttention; Dao et al., 2022; Dao, 2023).
//!
//! Forward walks over blocks of keys with a running maximum and sum; backward recomputes the
//! probabilities from the log-sum-exp that forward kept. Blocks that the mask hides entirely are
//! skipped. One piece of work is a (sequence, head) pair, in backward a (sequence, key head)
//! pair, whose query heads add to the same keys.

use crate::float::Float;
use crate::gemm::{Epilogue, Mat, MatMut, gemm, with_workspace};
use crate::isa::simd;
use crate::math::exp;
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for};

/// Sizes and mask of an attention call.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    /// Sequences.
    pub batch: usize,
    /// Queries per sequence.
    pub q_len: usize,
    /// Keys per sequence.
    pub kv_len: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Elements from one sequence's keys to the next; 0 is dense. A KV cache has room to grow.
    pub kv_batch_stride: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// A query sees keys at or before its own position only; the last query is at the last key.
    pub causal: bool,
    /// With `causal`: a query sees the last this many keys only, its own included.
    pub window: Option<usize>,
    /// Real queries of each sequence; rows beyond get zeros.
    pub q_lens: Option<&'a [i32]>,
    /// Real keys of each sequence.
    pub kv_lens: Option<&'a [i32]>,
    /// Added to the scores.
    pub bias: Option<AttentionBias<'a>>,
}

/// A bias of the scores: element `(b, h, i, j)` at `b * batch_stride + h * head_stride +
/// i * kv_len + j`; stride 0 broadcasts. It has no gradient.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBias<'a> {
    /// The values.
    pub data: &'a [f32],
    /// Distance between sequences.
    pub batch_stride: usize,
    /// Distance between heads.
    pub head_stride: usize,
}

impl AttentionShape<'_> {
    /// Causal, everything real, scaled by `1 / sqrt(head_dim)`.
    pub fn new(
        batch: usize,
        q_len: usize,
        kv_len: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> AttentionShape<'static> {
        AttentionShape {
            batch,
            q_len,
            kv_len,
            heads,
            kv_heads,
            head_dim,
            kv_batch_stride: 0,
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: true,
            window: None,
            q_lens: None,
            kv_lens: None,
            bias: None,
        }
    }

    pub(crate) fn q_real(&self, b: usize) -> usize {
        self.q_lens.map_or(self.q_len, |l| (l[b].max(0) as usize).min(self.q_len))
    }

    pub(crate) fn kv_real(&self, b: usize) -> usize {
        self.kv_lens.map_or(self.kv_len, |l| (l[b].max(0) as usize).min(self.kv_len))
    }

    pub(crate) fn kv_stride(&self) -> usize {
        match self.kv_batch_stride {
            0 => self.kv_len * self.kv_heads * self.head_dim,
            stride => stride,
        }
    }

    /// Keys that query `i` of sequence `b` sees.
    pub(crate) fn visible(&self, b: usize, i: usize) -> std::ops::Range<usize> {
        let (q, kv) = (self.q_real(b), self.kv_real(b));
        if !self.causal {
            return 0..kv;
        }
        let end = (kv + i + 1).saturating_sub(q).min(kv);
        let start = self.window.map_or(0, |w| end.saturating_sub(w));
        start..end
    }

    /// Products of `products` matrices per visible pair of a query and a key.
    fn work<T>(&self, products: usize, tensors: usize) -> Work {
        let pairs: usize = (0..self.batch)
            .map(|b| (0..self.q_real(b)).map(|i| self.visible(b, i).len()).sum::<usize>())
            .sum();
        let element = self.head_dim * size_of::<T>();
        let kv = self.kv_len * self.kv_heads;
        Work {
            flops: (2 * products * pairs * self.heads * self.head_dim) as u64,
            bytes: (tensors * self.batch * (self.q_len * self.heads + kv) * element) as u64,
        }
    }

    fn check(&self, q: usize, k: usize, v: usize, out: usize, lse: usize) {
        let row = self.heads * self.head_dim;
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention: {} query heads are no multiple of {} key heads",
            self.heads,
            self.kv_heads
        );
        assert_eq!(
            q,
            self.batch * self.q_len * row,
            "attention: q is [batch, q_len, heads, head_dim]"
        );
        assert_eq!(out, q, "attention: out is as long as q");
        assert_eq!(
            lse,
            self.batch * self.heads * self.q_len,
            "attention: lse is [batch, heads, q_len]"
        );
        let needed = match self.batch {
            0 => 0,
            b => (b - 1) * self.kv_stride() + self.kv_len * self.kv_heads * self.head_dim,
        };
        assert!(
            k >= needed && v >= needed,
            "attention: k and v reach over [batch, kv_len, kv_heads, head_dim]"
        );
        for lens in [self.q_lens, self.kv_lens].into_iter().flatten() {
            assert_eq!(lens.len(), self.batch, "attention: one length per sequence");
        }
    }
}

/// Queries of one block.
const BQ: usize = 64;
/// Keys of one block.
const BK: usize = 128;

/// `out = softmax(scale q kᵀ + mask) v`; `lse [batch, heads, q_len]` keeps the log-sum-exp.
///
/// `q`, `out`: `[batch, q_len, heads, head_dim]`; `k`, `v`: `[batch, kv_len, kv_heads, head_dim]`.
pub fn flash_attention<T: Float>(
    s: &AttentionShape<'_>,
    q: &[T],
    k: &[T],
    v: &[T],
    out: &mut [T],
    lse: &mut [f32],
) {
    s.check(q.len(), k.len(), v.len(), out.len(), lse.len());
    let dims = [s.batch * s.heads, s.q_len, s.kv_len];
    let _span = profile::span::<T>("attention", dims, || s.work::<T>(2, 2));
    let (d, row) = (s.head_dim, s.heads * s.head_dim);
    let (out, lse) = (Parts::new(out), Parts::new(lse));
    parallel_for(s.batch * s.heads, 1, |range| {
        for bh in range {
            let (b, h) = (bh / s.heads, bh % s.heads);
            let q_at = b * s.q_len * row + h * d;
            let kv_at = (b * s.kv_stride() + h / (s.heads / s.kv_heads) * d).min(k.len());
            // SAFETY: this (sequence, head) pair is ours alone; rows are written one at a time.
            let out_row = |i: usize| unsafe { out.range(q_at + i * row..q_at + i * row + d) };
            // SAFETY: as above.
            let lse = unsafe { lse.range(bh * s.q_len..(bh + 1) * s.q_len) };
            let real = s.q_real(b);
            for (i, lse) in lse.iter_mut().enumerate().skip(real) {
                out_row(i).fill(T::zeroed());
                *lse = f32::NEG_INFINITY;
            }
            if real <= 4 {
                for i in 0..real {
                    let q = &q[q_at + i * row..q_at + i * row + d];
                    lse[i] = one_query(s, b, h, i, q, &k[kv_at..], &v[kv_at..], out_row(i));
                }
                continue;
            }
            for first in (0..real).step_by(BQ) {
                let rows = BQ.min(real - first);
                query_block(
                    s,
                    [b, h, first, rows],
                    q,
                    q_at,
                    &k[kv_at..],
                    &v[kv_at..],
                    &out_row,
                    lse,
                );
            }
        }
    });
}

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
fn one_query<T: Float>(
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

/// A block of rows, as f32: `rows` of `d` that lie `stride` apart.
fn gather<T: Float>(x: &[T], rows: usize, stride: usize, d: usize, scale: f32, out: &mut [f32]) {
    simd! { fn row<T: Float>(x: &[T], scale: f32, out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = scale * x.to_f32();
        }
    } }
    for (i, out) in out.chunks_exact_mut(d).enumerate().take(rows) {
        row(&x[i * stride..i * stride + d], scale, out);
    }
}

/// Scores of a block of queries (already scaled) against a block of keys, masked and biased.
fn block_scores(
    s: &AttentionShape<'_>,
    [b, h, first_q, rows]: [usize; 4],
    [first_k, cols]: [usize; 2],
    q: &[f32],
    k: &[f32],
    scores: &mut [f32],
) {
    let d = s.head_dim;
    let c = MatMut::new(&mut *scores, rows, cols);
    gemm(Mat::new(q, rows, d), Mat::new(k, cols, d).t(), c, &Epilogue::default());
    for (r, scores) in scores.chunks_exact_mut(cols).enumerate().take(rows) {
        if let Some(bias) = s.bias {
            let at =
                b * bias.batch_stride + h * bias.head_stride + (first_q + r) * s.kv_len + first_k;
            scores.iter_mut().zip(&bias.data[at..]).for_each(|(x, b)| *x += b);
        }
        let seen = s.visible(b, first_q + r);
        let start = seen.start.clamp(first_k, first_k + cols) - first_k;
        let end = seen.end.clamp(first_k, first_k + cols) - first_k;
        scores[..start].fill(f32::NEG_INFINITY);
        scores[end.max(start)..].fill(f32::NEG_INFINITY);
    }
}

/// Keys that any query of a block sees.
fn block_range(
    s: &AttentionShape<'_>,
    b: usize,
    first: usize,
    rows: usize,
) -> std::ops::Range<usize> {
    s.visible(b, first).start..s.visible(b, first + rows - 1).end
}

fn query_block<'o, T: Float>(
    s: &AttentionShape<'_>,
    block: [usize; 4],
    q: &[T],
    q_at: usize,
    k: &[T],
    v: &[T],
    out_row: &impl Fn(usize) -> &'o mut [T],
    lse: &mut [f32],
) {
    let [b, _, first, rows] = block;
    let (d, row, kv_row) = (s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim);
    simd! { fn rescale(acc: &mut [f32], factor: f32) {
        acc.iter_mut().for_each(|a| *a *= factor);
    } }
    with_workspace(BQ * d * 2 + 2 * BK * d + BQ * BK + 2 * BQ, |space| {
        let (qb, space) = space.split_at_mut(BQ * d);
        let (acc, space) = space.split_at_mut(BQ * d);
        let (kb, space) = space.split_at_mut(BK * d);
        let (vb, space) = space.split_at_mut(BK * d);
        let (scores, space) = space.split_at_mut(BQ * BK);
        let (max, sum) = space.split_at_mut(BQ);
        gather(&q[q_at + first * row..], rows, row, d, s.scale, qb);
        acc[..rows * d].fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        let keys = block_range(s, b, first, rows);
        for first_k in keys.clone().step_by(BK) {
            let cols = BK.min(keys.end - first_k);
            gather(&k[first_k * kv_row..], cols, kv_row, d, 1.0, kb);
            gather(&v[first_k * kv_row..], cols, kv_row, d, 1.0, vb);
            block_scores(s, block, [first_k, cols], &qb[..rows * d], &kb[..cols * d], scores);
            for (r, p) in scores.chunks_exact_mut(cols).enumerate().take(rows) {
                let new = crate::softmax::row_max(p).max(max[r]);
                if new == f32::NEG_INFINITY {
                    // Nothing seen yet.
                    p.fill(0.0);
                    continue;
                }
                let factor = exp(max[r] - new);
                sum[r] = sum[r] * factor + exp_row(p, new);
                if factor != 1.0 {
                    rescale(&mut acc[r * d..(r + 1) * d], factor);
                }
                max[r] = new;
            }
            let add = Epilogue { accumulate: true, ..Epilogue::default() };
            let (p, v) =
                (Mat::new(&scores[..rows * cols], rows, cols), Mat::new(&vb[..cols * d], cols, d));
            gemm(p, v, MatMut::new(&mut acc[..rows * d], rows, d), &add);
        }
        for r in 0..rows {
            let scale = if sum[r] > 0.0 { 1.0 / sum[r] } else { 0.0 };
            let acc = &acc[r * d..(r + 1) * d];
            out_row(first + r).iter_mut().zip(acc).for_each(|(o, a)| *o = T::from_f32(a * scale));
            lse[first + r] = max[r] + sum[r].ln();
        }
    });
}

/// Gradients of [`flash_attention`]: `dq`, `dk`, `dv` are overwritten. Keys must be dense.
pub fn flash_attention_backward<T: Float>(
    s: &AttentionShape<'_>,
    q: &[T],
    k: &[T],
    v: &[T],
    out: &[T],
    lse: &[f32],
    dout: &[T],
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    s.check(q.len(), k.len(), v.len(), out.len(), lse.len());
    let dims = [s.batch * s.heads, s.q_len, s.kv_len];
    let _span = profile::span::<T>("attention_backward", dims, || s.work::<T>(5, 4));
    assert!(
        dout.len() == q.len() && dq.len() == q.len() && dk.len() == k.len() && dv.len() == v.len(),
        "attention_backward: gradients are as long as what they belong to"
    );
    assert_eq!(s.kv_batch_stride, 0, "attention_backward: keys must be dense");
    let (d, row, kv_row) = (s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let group = s.heads / s.kv_heads;
    let (dq, dk, dv) = (Parts::new(dq), Parts::new(dk), Parts::new(dv));
    simd! { fn dot<T: Float>(a: &[T], b: &[T]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a.to_f32() * b.to_f32()).sum()
    } }
    simd! { fn probabilities(x: &mut [f32], lse: f32) {
        x.iter_mut().for_each(|x| *x = exp(*x - lse));
    } }
    simd! { fn score_gradient(p: &[f32], dp: &mut [f32], delta: f32) {
        for (dp, p) in dp.iter_mut().zip(p) {
            *dp = p * (*dp - delta);
        }
    } }
    parallel_for(s.batch * s.kv_heads, 1, |range| {
        for bh in range {
            let (b, kv_head) = (bh / s.kv_heads, bh % s.kv_heads);
            let (real_q, real_k) = (s.q_real(b), s.kv_real(b));
            let kv_at = b * s.kv_stride() + kv_head * d;
            let sizes =
                2 * s.q_len * d + 2 * s.kv_len * d + 3 * BQ * d + 2 * s.kv_len * d + 2 * BQ * BK;
            with_workspace(sizes, |space| {
                let (dka, space) = space.split_at_mut(s.kv_len * d);
                let (dva, space) = space.split_at_mut(s.kv_len * d);
                let (ka, space) = space.split_at_mut(s.kv_len * d);
                let (va, space) = space.split_at_mut(s.kv_len * d);
                let (qb, space) = space.split_at_mut(BQ * d);
                let (dob, space) = space.split_at_mut(BQ * d);
                let (dqb, space) = space.split_at_mut(BQ * d);
                let (p, space) = space.split_at_mut(BQ * BK);
                let (dp, _) = space.split_at_mut(BQ * BK);
                dka.fill(0.0);
                dva.fill(0.0);
                gather(&k[kv_at.min(k.len())..], real_k, kv_row, d, 1.0, ka);
                gather(&v[kv_at.min(v.len())..], real_k, kv_row, d, 1.0, va);
                for h in kv_head * group..(kv_head + 1) * group {
                    let q_at = b * s.q_len * row + h * d;
                    let lse = &lse[(b * s.heads + h) * s.q_len..][..s.q_len];
                    for first in (0..real_q).step_by(BQ) {
                        let rows = BQ.min(real_q - first);
                        let at = q_at + first * row;
                        gather(&q[at..], rows, row, d, s.scale, qb);
                        gather(&dout[at..], rows, row, d, 1.0, dob);
                        let mut delta = [0.0f32; BQ];
                        for (r, delta) in delta.iter_mut().enumerate().take(rows) {
                            let at = at + r * row;
                            *delta = dot(&dout[at..at + d], &out[at..at + d]);
                        }
                        dqb[..rows * d].fill(0.0);
                        let keys = block_range(s, b, first, rows);
                        for first_k in keys.clone().step_by(BK) {
                            let cols = BK.min(keys.end - first_k);
                            let span = first_k * d..(first_k + cols) * d;
                            let block = [b, h, first, rows];
                            block_scores(
                                s,
                                block,
                                [first_k, cols],
                                &qb[..rows * d],
                                &ka[span.clone()],
                                p,
                            );
                            for (r, p) in p.chunks_exact_mut(cols).enumerate().take(rows) {
                                match lse[first + r] {
                                    f32::NEG_INFINITY => p.fill(0.0),
                                    lse => probabilities(p, lse),
                                }
                            }
                            let add = Epilogue { accumulate: true, ..Epilogue::default() };
                            let (pm, dom) = (
                                Mat::new(&p[..rows * cols], rows, cols),
                                Mat::new(&dob[..rows * d], rows, d),
                            );
                            // dv += pᵀ do
                            gemm(pm.t(), dom, MatMut::new(&mut dva[span.clone()], cols, d), &add);
                            // dp = do vᵀ, then ds = p (dp - delta)
                            let vt = Mat::new(&va[span.clone()], cols, d).t();
                            gemm(
                                dom,
                                vt,
                                MatMut::new(&mut dp[..rows * cols], rows, cols),
                                &Epilogue::default(),
                            );
                            for (r, dp) in dp.chunks_exact_mut(cols).enumerate().take(rows) {
                                score_gradient(&p[r * cols..(r + 1) * cols], dp, delta[r]);
                            }
                            let ds = Mat::new(&dp[..rows * cols], rows, cols);
                            // dq += ds k; dk += dsᵀ q, where q carries the scale already
                            let km = Mat::new(&ka[span.clone()], cols, d);
                            gemm(ds, km, MatMut::new(&mut dqb[..rows * d], rows, d), &add);
                            let qm = Mat::new(&qb[..rows * d], rows, d);
                            gemm(ds.t(), qm, MatMut::new(&mut dka[span], cols, d), &add);
                        }
                        for r in 0..rows {
                            let at = at + r * row;
                            // SAFETY: this head's queries are ours alone.
                            let to = unsafe { dq.range(at..at + d) };
                            let from = &dqb[r * d..(r + 1) * d];
                            to.iter_mut()
                                .zip(from)
                                .for_each(|(t, f)| *t = T::from_f32(f * s.scale));
                        }
                    }
                    for i in real_q..s.q_len {
                        // SAFETY: as above.
                        unsafe { dq.range(q_at + i * row..q_at + i * row + d) }.fill(T::zeroed());
                    }
                }
                for j in 0..s.kv_len {
                    let at = kv_at + j * kv_row;
                    // SAFETY: this key head is ours alone.
                    let (tk, tv) = unsafe { (dk.range(at..at + d), dv.range(at..at + d)) };
                    let real = j < real_k;
                    for c in 0..d {
                        tk[c] = if real { T::from_f32(dka[j * d + c]) } else { T::zeroed() };
                        tv[c] = if real { T::from_f32(dva[j * d + c]) } else { T::zeroed() };
                    }
                }
            });
        }
    });
}
