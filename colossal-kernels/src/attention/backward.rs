//! The backward pass, on transposed scores `[keys, queries]`: statistics of queries are vectors,
//! and both gradients of keys read their operand along its rows.

use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::AcqRel};

use super::forward::halves;
use super::narrow::{pair_up, store};
use super::{AttentionShape, Operands, Soon, take};
use crate::float::Float;
use crate::gemm::micro::Kernel;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::math::{exp, exp2};
use crate::profile;
use crate::threads::{Parts, parallel_each};

/// Keys of one block, about: a multiple of the kernel's rows and of two.
const KEYS: usize = 112;

/// Queries of one block, a multiple of any kernel's columns. More of them add to gradients of keys and values
/// less often, which pays where these are far; but longer sums of f32 round more, and the wide registers of
/// AVX-512 gain no more from 256 than from 128.
fn block_of_queries(kernel: &Kernel) -> usize {
    if kernel.nr == 32 && !kernel.pairs { 128 } else { 256 }
}

/// Floats of keys, values and their gradients up to which the caches hand them out fast enough unasked.
const CACHED: usize = 512 << 10;

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
    if s.head_dim == 0 {
        return;
    }
    let to = [Parts::new(dq), Parts::new(dk), Parts::new(dv)];
    let o = Operands::of::<T>(s.head_dim);
    let (heads, rows) = (s.batch * s.kv_heads, block_of_queries(&o.kernel));
    let chunks = s.chunks(heads, rows);
    // Floats of the gradients of a head's keys and values.
    let size = 2 * s.kv_len.next_multiple_of(o.kernel.mr) * o.row_c;
    let shared = if chunks > 1 { heads * chunks * size } else { 0 };
    let unfinished: Vec<_> = (0..heads).map(|_| AtomicUsize::new(chunks)).collect();
    with_workspace(shared, |space| {
        let space = Parts::new(space);
        parallel_each(heads * chunks, |i| {
            let (head, queries) = (i / chunks, s.chunk(i % chunks, chunks, rows));
            let part = Part { s, b: head / s.kv_heads, kv_head: head % s.kv_heads };
            let x = [q, k, v, out, dout];
            if chunks == 1 {
                return with_workspace(size, |sums| {
                    part.run(queries, x, lse, sums, &to);
                    part.store(&[sums], &to);
                });
            }
            // SAFETY: this chunk's own.
            let sums = unsafe { space.range(i * size..(i + 1) * size) };
            part.run(queries, x, lse, sums, &to);
            if unfinished[head].fetch_sub(1, AcqRel) == 1 {
                let of = |chunk: usize| (head * chunks + chunk) * size;
                // SAFETY: all chunks of this head are done with theirs.
                let sums = (0..chunks).map(|c| unsafe { space.shared(of(c)..of(c + 1)) });
                part.store(&sums.collect::<Vec<_>>(), &to);
            }
        });
    });
}

/// One key head of one sequence.
struct Part<'a> {
    s: &'a AttentionShape<'a>,
    b: usize,
    kv_head: usize,
}

impl Part<'_> {
    /// What these queries contribute: their own gradients, and in `dkv` all of those of keys and values
    /// before scaling.
    fn run<T: Float>(
        &self,
        chunk: Range<usize>,
        [q, k, v, out, dout]: [&[T]; 5],
        lse: &[f32],
        dkv: &mut [f32],
        to: &[Parts<T>; 3],
    ) {
        let Part { s, b, kv_head } = *self;
        let o = Operands::of::<T>(s.head_dim);
        let (d, row, kv_row) = (s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let (mr, nr, group) = (o.kernel.mr, o.kernel.nr, s.heads / s.kv_heads);
        let queries = s.q_real(b).min(chunk.end);
        let keys = match queries > chunk.start {
            true => s.visible(b, queries - 1).end,
            false => 0,
        };
        let most = block_of_queries(&o.kernel);
        // From one key's row of a block's queries to the next: long rows crowd into no few sets of the cache.
        let span = if o.kernel.pairs { most + 16 } else { most };
        let kv_at = (b * s.kv_stride() + kv_head * d).min(k.len());
        let block = (KEYS / mr * mr).next_multiple_of(2);
        debug_assert!(block.is_multiple_of(mr) && most.is_multiple_of(nr) && mr <= nr);
        let (blocks, padded) = (keys.div_ceil(block), keys.next_multiple_of(mr));
        let (panel_d, panel_q) = (o.kernel.panel(nr, d), o.kernel.panel(nr, most));
        let panel_k = o.kernel.panel(nr, block);
        let (columns, row_t) = (o.row_c / nr, o.kernel.steps(span));
        let rows_q = most.next_multiple_of(mr);
        // Beyond, a tile of keys fetches the next one.
        let streamed = 5 * padded * o.row_c > CACHED;
        let after = |x: &[f32], row: usize| streamed.then(|| x.as_ptr().wrapping_add(mr * row));
        let (half, pairs, wide) = match o.kernel.pairs {
            true => (mr * row_t, block / 2, mr),
            false => (0, 0, block),
        };
        let sizes = [
            2 * padded * o.row_a,       // keys and values as rows
            blocks * columns * panel_k, // keys as steps
            2 * most / nr * panel_d,    // queries and dout as columns
            2 * columns * panel_q,      // queries and dout as steps
            rows_q * o.row_c,           // gradient of queries
            mr * span,                  // probabilities of a tile of keys, transposed
            wide * span,                // their gradients, of a block or as well of a tile
            2 * half,                   // both of a tile in bf16
            pairs * span,               // the latter of a block by pairs of keys
            2 * most,                   // statistics of queries
        ];
        let mut soon = Soon::default();
        with_workspace(sizes.iter().sum(), |mut space| {
            let [rows, ks, cols, steps, dqa, pt, dst, narrow, pairs, stats] =
                sizes.map(|n| take(&mut space, n));
            let (ka, va) = rows.split_at_mut(padded * o.row_a);
            dkv.fill(0.0);
            let (dka, dva) = dkv.split_at_mut(dkv.len() / 2);
            let (qc, doc) = cols.split_at_mut(most / nr * panel_d);
            let (qs, dos) = steps.split_at_mut(columns * panel_q);
            let (pt16, dst16) = narrow.split_at_mut(half);
            let (lses, deltas) = stats.split_at_mut(most);
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
                for first in (chunk.start..queries).step_by(most) {
                    let n = most.min(queries - first);
                    let at = q_at + first * row;
                    o.columns(&q[at..], n, row, qc);
                    o.columns(&dout[at..], n, row, doc);
                    o.steps(&q[at..], n, row, panel_q, qs);
                    o.steps(&dout[at..], n, row, panel_q, dos);
                    for r in 0..n.next_multiple_of(nr) {
                        // What does not exist, or saw nothing, has probability zero everywhere.
                        let real = r < n && lse[first + r] != f32::NEG_INFINITY;
                        let lse = if real { lse[first + r] * base::<T>() } else { f32::INFINITY };
                        lses[r] = lse;
                        let at = at + r * row;
                        deltas[r] =
                            if real { dot(&dout[at..at + d], &out[at..at + d]) } else { 0.0 };
                    }
                    self.ask(&mut soon, h, first..first + most, [q, k, v, out, dout], to);
                    dqa[..n * o.row_c].fill(0.0);
                    let seen = s.visible(b, first).start..s.visible(b, first + n - 1).end;
                    for i in seen.start / block..seen.end.div_ceil(block) {
                        let from = i * block;
                        let to = seen.end.min(from + block);
                        for tile in (from..to).step_by(mr) {
                            let rows = mr.min(to - tile);
                            // Of the queries that see the tile's first key, whole panels.
                            let unseen = s.first_query(b, tile).saturating_sub(first);
                            let (q_first, end) = (unseen / nr * nr, n.next_multiple_of(nr));
                            let at = if o.kernel.pairs { 0 } else { (tile - from) * span };
                            let dst = &mut dst[at..at + rows * span];
                            let (ka, va) = (&ka[tile * o.row_a..], &va[tile * o.row_a..]);
                            for col in (q_first..n).step_by(nr) {
                                let p = col / nr * panel_d;
                                let (p_to, ds_to) = (&mut pt[col..], &mut dst[col..]);
                                let next = soon.next(after(ka, o.row_a));
                                o.scores(rows, ka, &qc[p..], p_to, span, next);
                                let next = soon.next(after(va, o.row_a));
                                o.scores(rows, va, &doc[p..], ds_to, span, next);
                            }
                            // A scale that is not positive would turn minus infinity round.
                            let mut scale = s.scale;
                            if scale <= 0.0 {
                                for p in pt.chunks_exact_mut(span) {
                                    p[q_first..end].iter_mut().for_each(|x| *x *= scale);
                                }
                                scale = 1.0;
                            }
                            let keys = tile..tile + rows;
                            self.mask(pt, span, scale, h, keys, first..first + n, q_first);
                            // A tile of queries may begin before, of which the last sees the key.
                            let before = q_first.saturating_sub(nr);
                            let scale = scale * base::<T>();
                            for (p, ds) in pt.chunks_exact_mut(span).zip(dst.chunks_exact_mut(span))
                            {
                                ds[before..q_first].fill(0.0);
                                let seen = q_first..end;
                                let (p, ds) = (&mut p[seen.clone()], &mut ds[seen.clone()]);
                                let stats = [&*lses, &*deltas].map(|x| &x[seen.clone()]);
                                gradient::<T>(p, ds, stats, scale);
                            }
                            if o.kernel.pairs {
                                let pairs = &mut pairs[(tile - from) / 2 * span..];
                                let to = [&mut *pt16, &mut *dst16, pairs];
                                pair_up([pt, dst], span, rows, before..end, to);
                            }
                            // dv += p do; dk += ds q; over the queries that see the tile.
                            let skip = if o.kernel.pairs { unseen / 2 } else { unseen };
                            let (pa, da, wide) = match o.kernel.pairs {
                                true => (&*pt16, &*dst16, row_t),
                                false => (&*pt, &*dst, span),
                            };
                            let steps = o.kernel.steps(n).saturating_sub(skip);
                            let (strides, c) = ([wide, 1], tile * o.row_c..);
                            let (pa, dos) = (&pa[skip..], &dos[skip * nr..]);
                            let (da, qs) = (&da[skip..], &qs[skip * nr..]);
                            let to = &mut dva[c.clone()];
                            let next = after(to, o.row_c);
                            o.head(rows, steps, pa, strides, dos, panel_q, to, true, next);
                            let to = &mut dka[c];
                            let next = after(to, o.row_c);
                            o.head(rows, steps, da, strides, qs, panel_q, to, true, next);
                        }
                        // dq += dsᵀ k, over the keys that a tile of queries sees.
                        let ds = if o.kernel.pairs { &*pairs } else { &*dst };
                        for tile in (0..n).step_by(mr) {
                            let rows = mr.min(n - tile);
                            let end = s.visible(b, first + tile + rows - 1).end.min(to);
                            if end <= from {
                                continue;
                            }
                            let ks = &ks[i * columns * panel_k..];
                            let (depth, c) = (o.kernel.steps(end - from), tile * o.row_c);
                            let (a, strides) = (&ds[tile..], [1, span]);
                            o.head(rows, depth, a, strides, ks, panel_k, &mut dqa[c..], true, None);
                        }
                    }
                    for r in 0..n {
                        // SAFETY: this query of this head is ours alone.
                        let to = unsafe { to[0].range(at + r * row..at + r * row + d) };
                        store(&dqa[r * o.row_c..], s.scale, to);
                    }
                }
                for i in queries.max(chunk.start)..chunk.end {
                    // SAFETY: as above.
                    unsafe { to[0].range(q_at + i * row..q_at + i * row + d) }.fill(T::zeroed());
                }
            }
        });
    }

    /// Writes the gradients of keys and values: sums of what [`run`](Part::run) left of each chunk.
    fn store<T: Float>(&self, sums: &[&[f32]], to: &[Parts<T>; 3]) {
        let Part { s, b, kv_head } = *self;
        let (d, row_c) = (s.head_dim, Operands::of::<T>(s.head_dim).row_c);
        let keys = s.kv_real(b);
        let mut total = vec![0.0; if sums.len() > 1 { d } else { 0 }];
        for j in 0..s.kv_len {
            let at = (b * s.kv_len + j) * s.kv_heads * d + kv_head * d;
            for (part, scale) in [s.scale, 1.0].into_iter().enumerate() {
                // SAFETY: this key head is ours alone, once all of its chunks are done.
                let to = unsafe { to[1 + part].range(at..at + d) };
                let row = |sums: &'_ [f32]| part * sums.len() / 2 + j * row_c;
                match sums {
                    _ if j >= keys => to.fill(T::zeroed()),
                    [all] => store(&all[row(all)..], scale, to),
                    [first, rest @ ..] => {
                        total.copy_from_slice(&first[row(first)..][..d]);
                        for sums in rest {
                            add(&mut total, &sums[row(sums)..][..d]);
                        }
                        store(&total, scale, to);
                    }
                    [] => unreachable!("there is at least one chunk"),
                }
            }
        }
    }

    /// Asks for what comes after a block of queries: the next block, its own gradient and, of the
    /// last head, as many keys of the next one and as many gradients of these.
    fn ask<T: Float>(
        &self,
        soon: &mut Soon,
        h: usize,
        block: Range<usize>,
        [q, k, v, out, dout]: [&[T]; 5],
        to: &[Parts<T>; 3],
    ) {
        let Part { s, b, kv_head } = *self;
        let (first, n) = (block.start, block.len());
        let (d, row, kv_row) = (s.head_dim, s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let at = b * s.q_len * row + h * d;
        let next = match block.end < s.q_real(b) {
            true => at + block.end * row,
            // The next head's, or the next sequence's.
            false if h + 1 < s.heads => at + d,
            false => (b + 1) * s.q_len * row,
        };
        for (i, x) in [q, dout, out].into_iter().enumerate() {
            soon.rows(i, x.as_ptr().wrapping_add(next), row, n);
        }
        soon.rows(3, to[0].start().wrapping_add(at + first * row), row, n);
        if (h + 1).is_multiple_of(s.heads / s.kv_heads) {
            let here = b * s.kv_stride() + kv_head * d + first * kv_row;
            let next = match kv_head + 1 < s.kv_heads {
                true => here + d,
                false => (b + 1) * s.kv_stride() + first * kv_row,
            };
            for (i, x) in [k, v].into_iter().enumerate() {
                soon.rows(4 + i, x.as_ptr().wrapping_add(next), kv_row, n);
                soon.rows(6 + i, to[1 + i].start().wrapping_add(here), kv_row, n);
            }
        }
    }

    /// Adds the bias to scores of a tile of keys, transposed, that are to be multiplied by `scale`; what
    /// queries from column `from` on do not see becomes minus infinity.
    fn mask(
        &self,
        scores: &mut [f32],
        row: usize,
        scale: f32,
        h: usize,
        tile: Range<usize>,
        block: Range<usize>,
        from: usize,
    ) {
        let Part { s, b, .. } = *self;
        let unseen = s.first_query(b, tile.end - 1).saturating_sub(block.start);
        if unseen <= from && s.window.is_none() && s.bias.is_none() {
            return;
        }
        for (scores, j) in scores.chunks_exact_mut(row).zip(tile) {
            let seen = self.seen_by(j, block.clone());
            let seen = seen.start.max(from)..seen.end.max(from);
            if let Some(x) = s.bias {
                let at = b * x.batch_stride + h * x.head_stride + j;
                for q in seen.clone() {
                    scores[q] += x.data[at + (block.start + q) * s.kv_len] / scale;
                }
            }
            scores[from..seen.start].fill(f32::NEG_INFINITY);
            scores[seen.end..].fill(f32::NEG_INFINITY);
        }
    }

    /// Queries of the block, counted from its start, that see key `j`.
    fn seen_by(&self, j: usize, block: Range<usize>) -> Range<usize> {
        let n = block.len();
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
    fn add(x: &mut [f32], y: &[f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

simd! {
    fn dot<T: Float>(a: &[T], b: &[T]) -> f32 {
        let mut lanes = [0.0f32; 16];
        let [(a, a_rest), (b, b_rest)] = [a, b].map(|x| x.as_chunks::<16>());
        for (a, b) in a.iter().zip(b) {
            for l in 0..16 {
                lanes[l] += a[l].to_f32() * b[l].to_f32();
            }
        }
        let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
        halves(&lanes, |a, b| a + b) + rest
    }
}

/// Logarithm of e to the base of the exponents: two for the narrow types, e for f32, which would show the
/// rounding of another base.
fn base<T: Float>() -> f32 {
    if size_of::<T>() < size_of::<f32>() { LOG2_E } else { 1.0 }
}

simd! {
    /// Of one key: scores become probabilities, what is in `ds` their gradients `p (dp - delta)`; by
    /// vectors of 16. `scale` and the log-sum-exp are to [`base`].
    fn gradient<T: Float>(p: &mut [f32], ds: &mut [f32], stats: [&[f32]; 2], scale: f32) {
        let [p, ds] = [p, ds].map(|x| x.as_chunks_mut::<16>().0);
        let [lse, delta] = stats.map(|x| x.as_chunks::<16>().0);
        for (((p, ds), lse), delta) in p.iter_mut().zip(ds).zip(lse).zip(delta) {
            for l in 0..16 {
                let x = scale.mul_add(p[l], -lse[l]);
                p[l] = if size_of::<T>() < size_of::<f32>() { exp2::<T>(x) } else { exp(x) };
                ds[l] = p[l] * (ds[l] - delta[l]);
            }
        }
    }
}
