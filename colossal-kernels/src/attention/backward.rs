//! The backward pass, on transposed scores `[keys, queries]`: statistics of queries are vectors,
//! and both gradients of keys read their operand along its rows.

use std::ops::Range;

use super::forward::store;
use super::{AttentionShape, Operands, take};
use crate::cast::round;
use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::math::{LANES, exp, total};
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// Queries of one block; a multiple of every kernel's columns.
const QUERIES: usize = 64;
/// Keys of one block, about: a multiple of the kernel's rows and of two.
const KEYS: usize = 112;

/// Gradients of [`flash_attention`](super::flash_attention): `dq`, `dk`, `dv` are overwritten.
/// Keys must be dense.
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
    let (dq, dk, dv) = (Parts::new(dq), Parts::new(dk), Parts::new(dv));
    parallel_for(s.batch * s.kv_heads, 1, |range| {
        for bh in range {
            let part = Part { s, b: bh / s.kv_heads, kv_head: bh % s.kv_heads };
            part.run([q, k, v, out, dout], lse, |to, at, values: Option<(&[f32], f32)>| {
                // SAFETY: this key head and its query heads are ours alone; rows are written one
                // at a time.
                let to = unsafe { [&dq, &dk, &dv][to].range(at..at + s.head_dim) };
                match values {
                    Some((values, scale)) => store(values, scale, to),
                    None => to.fill(T::zeroed()),
                }
            });
        }
    });
}

/// One key head of one sequence.
struct Part<'a> {
    s: &'a AttentionShape<'a>,
    b: usize,
    kv_head: usize,
}

impl Part<'_> {
    /// `write(0, 1 or 2 for q, k or v, start of the row, values and their factor)`.
    fn run<T: Float>(
        &self,
        [q, k, v, out, dout]: [&[T]; 5],
        lse: &[f32],
        write: impl Fn(usize, usize, Option<(&[f32], f32)>),
    ) {
        let Part { s, b, kv_head } = *self;
        let o = Operands::of::<T>(s.head_dim);
        let (d, row, kv_row) = (s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let (mr, nr, group) = (o.kernel.mr, o.kernel.nr, s.heads / s.kv_heads);
        let (queries, keys) = (s.q_real(b), s.kv_real(b));
        let kv_at = (b * s.kv_stride() + kv_head * d).min(k.len());
        let block = (KEYS / mr * mr).next_multiple_of(2);
        debug_assert!(block.is_multiple_of(mr) && QUERIES.is_multiple_of(nr));
        let (blocks, padded) = (keys.div_ceil(block), keys.next_multiple_of(mr));
        let (panel_d, panel_q) = (o.kernel.panel(nr, d), o.kernel.panel(nr, QUERIES));
        let panel_k = o.kernel.panel(nr, block);
        let (columns, row_t) = (o.row_c / nr, o.kernel.steps(QUERIES));
        let rows_q = QUERIES.next_multiple_of(mr);
        let half = if o.kernel.pairs { block * row_t } else { 0 };
        let sizes = [
            2 * padded * o.row_a,       // keys and values as rows
            blocks * columns * panel_k, // keys as steps
            2 * padded * o.row_c,       // gradients of keys and values
            2 * QUERIES / nr * panel_d, // queries and dout as columns
            2 * columns * panel_q,      // queries and dout as steps
            rows_q * o.row_c,           // gradient of queries
            2 * block * QUERIES + mr,   // probabilities and their gradients, transposed
            3 * half + mr,              // both in bf16; the latter also by pairs of keys
            2 * QUERIES,                // statistics of queries
        ];
        with_workspace(sizes.iter().sum(), |mut space| {
            let [rows, ks, dkv, cols, steps, dqa, scores, halves, stats] =
                sizes.map(|n| take(&mut space, n));
            let (ka, va) = rows.split_at_mut(padded * o.row_a);
            let (dka, dva) = dkv.split_at_mut(padded * o.row_c);
            let (qc, doc) = cols.split_at_mut(QUERIES / nr * panel_d);
            let (qs, dos) = steps.split_at_mut(columns * panel_q);
            let (pt, dst) = scores.split_at_mut(block * QUERIES);
            let (pt16, rest) = halves.split_at_mut(half);
            let (dst16, pairs) = rest.split_at_mut(half);
            let (lses, deltas) = stats.split_at_mut(QUERIES);
            dka.fill(0.0);
            dva.fill(0.0);
            o.rows(&k[kv_at..], keys, kv_row, ka);
            o.rows(&v[kv_at..], keys, kv_row, va);
            for i in 0..blocks {
                let n = block.min(keys - i * block);
                let to = &mut ks[i * columns * panel_k..][..columns * panel_k];
                o.steps(&k[kv_at + i * block * kv_row..], n, kv_row, panel_k, to);
            }
            for h in kv_head * group..(kv_head + 1) * group {
                let q_at = b * s.q_len * row + h * d;
                let lse = &lse[(b * s.heads + h) * s.q_len..][..s.q_len];
                for first in (0..queries).step_by(QUERIES) {
                    let n = QUERIES.min(queries - first);
                    let at = q_at + first * row;
                    o.columns(&q[at..], n, row, qc);
                    o.columns(&dout[at..], n, row, doc);
                    o.steps(&q[at..], n, row, panel_q, qs);
                    o.steps(&dout[at..], n, row, panel_q, dos);
                    for r in 0..QUERIES {
                        // What does not exist, or saw nothing, has probability zero everywhere.
                        let real = r < n && lse[first + r] != f32::NEG_INFINITY;
                        lses[r] = if real { lse[first + r] } else { f32::INFINITY };
                        let at = at + r * row;
                        deltas[r] =
                            if real { dot(&dout[at..at + d], &out[at..at + d]) } else { 0.0 };
                    }
                    dqa.fill(0.0);
                    let seen = s.visible(b, first).start..s.visible(b, first + n - 1).end;
                    for i in seen.start / block..seen.end.div_ceil(block) {
                        let from = i * block;
                        let to = seen.end.min(from + block);
                        for tile in (from..to).step_by(mr) {
                            let rows = mr.min(to - tile);
                            let unseen = s.first_query(b, tile).saturating_sub(first);
                            let q_first = unseen / nr * nr;
                            let at = (tile - from) * QUERIES;
                            let (ka, va) = (&ka[tile * o.row_a..], &va[tile * o.row_a..]);
                            for col in (q_first..n).step_by(nr) {
                                let p = col / nr * panel_d;
                                let (qc, doc) = (&qc[p..], &doc[p..]);
                                let strides = [o.row_a, 1];
                                let c = at + col;
                                o.kernel.tile(
                                    rows,
                                    o.row_a,
                                    ka,
                                    strides,
                                    qc,
                                    &mut pt[c..],
                                    QUERIES,
                                    false,
                                    crate::gemm::micro::Ahead::lines(ka.as_ptr()),
                                );
                                o.kernel.tile(
                                    rows,
                                    o.row_a,
                                    va,
                                    strides,
                                    doc,
                                    &mut dst[c..],
                                    QUERIES,
                                    false,
                                    crate::gemm::micro::Ahead::lines(ka.as_ptr()),
                                );
                            }
                            let end = n.next_multiple_of(nr);
                            for j in tile..(tile + mr) {
                                let at = (j - from) * QUERIES;
                                let (p, ds) =
                                    (&mut pt[at..at + QUERIES], &mut dst[at..at + QUERIES]);
                                let seen = self.seen_by(j, first..first + n, keys);
                                let seen = seen.start.max(q_first)..seen.end;
                                if let Some(x) = s.bias {
                                    let at = b * x.batch_stride + h * x.head_stride + j;
                                    for q in seen.clone() {
                                        p[q] += x.data[at + (first + q) * s.kv_len] / s.scale;
                                    }
                                }
                                gradient(p, ds, lses, deltas, s.scale, seen, end);
                                if o.kernel.pairs {
                                    let at = (j - from) * row_t;
                                    let span = at..at + row_t;
                                    round(p, bytemuck::cast_slice_mut(&mut pt16[span.clone()]));
                                    round(ds, bytemuck::cast_slice_mut(&mut dst16[span]));
                                }
                            }
                            // dv += p do; dk += ds q; over the queries that see the tile.
                            let skip = if o.kernel.pairs { unseen / 2 } else { unseen };
                            let depth = o.kernel.steps(n);
                            if skip >= depth {
                                continue;
                            }
                            let (pa, da, wide) = match o.kernel.pairs {
                                true => (&*pt16, &*dst16, row_t),
                                false => (&*pt, &*dst, QUERIES),
                            };
                            let at = (tile - from) * wide + skip;
                            let (depth, strides, c) = (depth - skip, [wide, 1], tile * o.row_c);
                            let (qs, dos) = (&qs[skip * nr..], &dos[skip * nr..]);
                            o.head(
                                rows,
                                depth,
                                &pa[at..],
                                strides,
                                dos,
                                panel_q,
                                &mut dva[c..],
                                true,
                            );
                            o.head(
                                rows,
                                depth,
                                &da[at..],
                                strides,
                                qs,
                                panel_q,
                                &mut dka[c..],
                                true,
                            );
                        }
                        // dq += dsᵀ k, over the keys that a tile of queries sees.
                        if o.kernel.pairs {
                            interleave(dst16, row_t, (to - from).next_multiple_of(mr), pairs);
                        }
                        for tile in (0..n).step_by(mr) {
                            let rows = mr.min(n - tile);
                            let end = s.visible(b, first + tile + rows - 1).end.min(to);
                            if end <= from {
                                continue;
                            }
                            let a = if o.kernel.pairs { &pairs[tile..] } else { &dst[tile..] };
                            let ks = &ks[i * columns * panel_k..];
                            let (depth, c) = (o.kernel.steps(end - from), tile * o.row_c);
                            o.head(rows, depth, a, [1, QUERIES], ks, panel_k, &mut dqa[c..], true);
                        }
                    }
                    for r in 0..n {
                        write(0, at + r * row, Some((&dqa[r * o.row_c..], s.scale)));
                    }
                }
                for i in queries..s.q_len {
                    write(0, q_at + i * row, None);
                }
            }
            for j in 0..s.kv_len {
                let (at, c) = (kv_at + j * kv_row, j * o.row_c);
                write(1, at, (j < keys).then(|| (&dka[c..], s.scale)));
                write(2, at, (j < keys).then(|| (&dva[c..], 1.0)));
            }
        });
    }

    /// Queries of the block, counted from its start, that see key `j`.
    fn seen_by(&self, j: usize, block: Range<usize>, keys: usize) -> Range<usize> {
        let n = block.len();
        if j >= keys {
            return 0..0;
        }
        let start = self.s.first_query(self.b, j).saturating_sub(block.start).min(n);
        let end = match self.s.window {
            Some(_) => {
                (start..n).find(|q| self.s.visible(self.b, block.start + q).start > j).unwrap_or(n)
            }
            None => n,
        };
        start..end
    }
}

simd! {
    fn dot<T: Float>(a: &[T], b: &[T]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let [(a, a_rest), (b, b_rest)] = [a, b].map(|x| x.as_chunks::<LANES>());
        for (a, b) in a.iter().zip(b) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a.to_f32() * b.to_f32();
            }
        }
        for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
            *lane += a.to_f32() * b.to_f32();
        }
        total(lanes)
    }
}

simd! {
    /// Of one key: scores become probabilities, their gradients `p (dp - delta)`; zeros for
    /// queries up to `end` that do not see it.
    fn gradient(p: &mut [f32], ds: &mut [f32], lse: &[f32], delta: &[f32], scale: f32, seen: Range<usize>, end: usize) {
        let (start, stop) = (seen.start.min(end), seen.end.min(end));
        if start >= stop {
            p[..end].fill(0.0);
            ds[..end].fill(0.0);
            return;
        }
        p[..start].fill(0.0);
        ds[..start].fill(0.0);
        p[stop..end].fill(0.0);
        ds[stop..end].fill(0.0);
        let (p, ds) = (&mut p[start..stop], &mut ds[start..stop]);
        for (((p, ds), lse), delta) in p.iter_mut().zip(ds).zip(&lse[start..stop]).zip(&delta[start..stop]) {
            *p = exp(scale.mul_add(*p, -lse));
            *ds = *p * (*ds - delta);
        }
    }
}

simd! {
    /// Rows of bf16, `words` words of two each, as pairs of neighbouring rows side by side.
    fn interleave(rows: &[f32], words: usize, n: usize, out: &mut [f32]) {
        let rows: &[u16] = bytemuck::cast_slice(rows);
        let out: &mut [u32] = bytemuck::cast_slice_mut(out);
        let width = 2 * words;
        for (pair, out) in out.chunks_exact_mut(width).enumerate().take(n.div_ceil(2)) {
            let low = &rows[2 * pair * width..(2 * pair + 1) * width];
            match rows.get((2 * pair + 1) * width..(2 * pair + 2) * width) {
                Some(high) if 2 * pair + 1 < n => {
                    for ((o, l), h) in out.iter_mut().zip(low).zip(high) {
                        *o = u32::from(*l) | u32::from(*h) << 16;
                    }
                }
                _ => out.iter_mut().zip(low).for_each(|(o, l)| *o = u32::from(*l)),
            }
        }
    }
}
