//! The forward pass: blocks of queries against blocks of keys.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use half::bf16;

use super::decode::one_query;
use super::narrow::store;
use super::{AttentionShape, FEW, Operands, Soon, take};
use crate::cast::round;
use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::math::{exp2, log_sum_exp};
use crate::profile;
use crate::threads::{Parts, count, parallel_each, parallel_for};

/// Tiles of queries of one block at most …
const TILES: usize = 9;
/// … and queries.
const QUERIES: usize = 56;
/// Keys of one block.
const KEYS: usize = 256;

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
    // Neighbouring heads of a sequence, and queries of theirs: all of them, unless it is one head.
    let piece = |pairs: Range<usize>, queries: Range<usize>| {
        let (b, h) = (pairs.start / s.heads, pairs.start % s.heads);
        let real = s.q_real(b);
        let (heads, start) = (h..h + pairs.len(), queries.start);
        let q_at = b * s.q_len * row + h * d;
        // SAFETY: these queries of these heads are ours alone; rows are written one at a time.
        let out_row =
            |i: usize| unsafe { out.range(q_at + i * row..q_at + i * row + heads.len() * d) };
        let [first, last] = [(pairs.start, start), (pairs.end - 1, queries.end)];
        // SAFETY: as above.
        let lse = unsafe { lse.range(first.0 * s.q_len + first.1..last.0 * s.q_len + last.1) };
        for i in real.max(start)..queries.end {
            out_row(i).fill(T::zeroed());
            (0..heads.len()).for_each(|h| lse[h * s.q_len + i - start] = f32::NEG_INFINITY);
        }
        if real <= FEW && d > 0 {
            let kv_at = (b * s.kv_stride()).min(k.len());
            for i in start..real {
                let q = &q[q_at + i * row..q_at + i * row + heads.len() * d];
                let of = |h: usize, x| lse[(h - heads.start) * s.q_len + i - start] = x;
                let x = [q, &k[kv_at..], &v[kv_at..]];
                one_query(s, b, heads.clone(), i, x, out_row(i), of);
            }
        } else {
            packed(s, pairs, queries, [q, k, v], &out_row, lse);
        }
    };
    let (pairs, rows) = (s.batch * s.heads, block_rows(Operands::of::<T>(d).kernel.mr));
    let chunks = s.chunks(pairs, rows);
    if chunks > 1 {
        let pair = |i: usize| i / chunks..i / chunks + 1;
        return parallel_each(pairs * chunks, |i| {
            piece(pair(i), s.chunk(i % chunks, chunks, rows))
        });
    }
    // Decoding reads keys row by row: a thread takes as many heads of a sequence as it can.
    let grain = if s.q_len <= FEW { s.heads.div_ceil(count()) } else { 1 };
    parallel_for(pairs, grain, |range| {
        let mut at = range.start;
        while at < range.end {
            // All that this piece has of the sequence, or of those that share a key head.
            let group = if s.q_real(at / s.heads) <= FEW { s.heads } else { s.heads / s.kv_heads };
            let end = range.end.min(at - at % s.heads % group + group);
            piece(at..end, 0..s.q_len);
            at = end;
        }
    });
}

/// These queries of (sequence, head) pairs that share their keys, whose parts of a row of `out` lie
/// together.
fn packed<'o, T: Float>(
    s: &AttentionShape<'_>,
    pairs: Range<usize>,
    queries: Range<usize>,
    qkv: [&[T]; 3],
    out_row: &impl Fn(usize) -> &'o mut [T],
    lse: &mut [f32],
) {
    let (b, o) = (pairs.start / s.heads, Operands::of::<T>(s.head_dim));
    let (row, kv_row) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let (mr, nr, real, keys) = (o.kernel.mr, o.kernel.nr, s.q_real(b), s.kv_real(b));
    let blocks = keys.div_ceil(KEYS);
    // Panels of one block of keys, and of one block of values.
    let panel_k = o.kernel.panel(nr, s.head_dim);
    let size_k = KEYS / nr * panel_k;
    let panel_v = o.kernel.panel(nr, KEYS);
    let size_v = o.row_c / nr * panel_v;
    let rows = block_rows(mr);
    let sizes = [
        blocks * size_k,
        blocks * size_v,
        rows * o.row_a,
        rows * o.row_c,
        mr * KEYS,
        mr * o.kernel.steps(KEYS),
    ];
    let (real, all) = (real.min(queries.end), queries.len() == s.q_len);
    let after = (all && pairs.end < s.batch * s.heads).then(|| s.of_pair(pairs.end, qkv));
    let mut soon = Soon::default();
    with_workspace(sizes.iter().sum(), |mut space| {
        let [kp, vp, qa, acc, scores, p] = sizes.map(|n| take(&mut space, n));
        // Blocks of keys that are packed, or that nobody sees.
        let mut ready = s.visible(b, queries.start).start / KEYS;
        for pair in pairs.clone() {
            let (h, [q, k, v]) = (pair % s.heads, s.of_pair(pair, qkv));
            let part = (pair - pairs.start) * s.head_dim;
            let lse = &mut lse[(pair - pairs.start) * s.q_len..];
            for first in (queries.start..real).step_by(rows) {
                let rows = rows.min(real - first);
                o.rows(&q[first * row..], rows, row, qa);
                match (first + rows < real, after) {
                    (true, _) => soon.rows(0, q[(first + rows) * row..].as_ptr(), row, rows),
                    (false, Some([q, ..])) => soon.rows(0, q.as_ptr(), row, rows),
                    _ => {}
                }
                soon.rows(1, out_row(first)[part..].as_ptr(), row, rows);
                let mut state = [State::new(); TILES];
                let seen = s.visible(b, first).start..s.visible(b, first + rows - 1).end;
                for block in seen.start / KEYS..seen.end.div_ceil(KEYS) {
                    let at = block * KEYS;
                    while ready <= block {
                        let (from, n) = (ready * KEYS * kv_row, KEYS.min(keys - ready * KEYS));
                        o.columns(&k[from..], n, kv_row, &mut kp[ready * size_k..][..size_k]);
                        let to = &mut vp[ready * size_v..][..size_v];
                        o.steps(&v[from..], n, kv_row, panel_v, to);
                        ready += 1;
                        let next = match after {
                            _ if ready < blocks => [k, v].map(|x| &x[from + n * kv_row..]),
                            Some([_, k, v]) => [k, v],
                            None => continue,
                        };
                        soon.rows(2, next[0].as_ptr(), kv_row, n);
                        soon.rows(3, next[1].as_ptr(), kv_row, n);
                    }
                    for (tile, state) in (0..rows).step_by(mr).zip(&mut state) {
                        let in_tile = mr.min(rows - tile);
                        let i = first + tile;
                        // From what the first row sees to what the last one sees, in whole panels.
                        let [top, last] = [i, i + in_tile - 1].map(|i| s.visible(b, i));
                        if last.end <= at || top.start >= at + KEYS {
                            continue;
                        }
                        let low = top.start.saturating_sub(at) / nr * nr;
                        let n = (last.end - at).min(KEYS) - low;
                        let (at, width) = (at + low, n.next_multiple_of(nr));
                        let scores = &mut scores[..in_tile * width];
                        let qa = &qa[tile * o.row_a..];
                        let kp = &kp[block * size_k + low / nr * panel_k..];
                        for col in (0..width).step_by(nr) {
                            // The first row that sees the panel's first key; the mask hides it from those above.
                            let skip = s.first_query(b, at + col).saturating_sub(i);
                            let (qa, kp) = (&qa[skip * o.row_a..], &kp[col / nr * panel_k..]);
                            let to = &mut scores[skip * width + col..];
                            o.scores(in_tile - skip, qa, kp, to, width, soon.next(None));
                        }
                        let mut scale = s.scale;
                        if s.bias.is_some() || scale <= 0.0 {
                            scores.iter_mut().for_each(|x| *x *= scale);
                            scale = 1.0;
                        }
                        if s.bias.is_some() || last.start > at || top.end < at + width {
                            for (scores, i) in scores.chunks_exact_mut(width).zip(i..) {
                                let seen = s.visible(b, i);
                                let [start, end] =
                                    [seen.start, seen.end].map(|j| j.clamp(at, at + width) - at);
                                if let Some(x) = s.bias {
                                    let row = b * x.batch_stride + h * x.head_stride + i * s.kv_len;
                                    let bias = &x.data[row + at + start..row + at + end];
                                    let scores = scores[start..end].iter_mut();
                                    scores.zip(bias).for_each(|(x, b)| *x += b);
                                }
                                scores[..start].fill(f32::NEG_INFINITY);
                                scores[end..].fill(f32::NEG_INFINITY);
                            }
                        }
                        let acc = &mut acc[tile * o.row_c..][..in_tile * o.row_c];
                        online_softmax::<T>(scores, width, scale * LOG2_E, state);
                        if state.begun {
                            rescale(acc, o.row_c, &state.factor);
                        }
                        let (p, wide) = match o.kernel.pairs {
                            true => {
                                let p = &mut p[..in_tile * width / 2];
                                round::<bf16>(scores, bytemuck::cast_slice_mut(p));
                                (&*p, width / 2)
                            }
                            false => (&*scores, width),
                        };
                        let vp = &vp[block * size_v + o.kernel.steps(low) * nr..];
                        let depth = o.kernel.steps(n);
                        o.head(in_tile, depth, p, [wide, 1], vp, panel_v, acc, state.begun, None);
                        state.begun = true;
                    }
                }
                for (tile, state) in (0..rows).step_by(mr).zip(&state) {
                    let mut lses = [0.0; ROWS];
                    state.log_sum_exp(&mut lses);
                    for r in tile..rows.min(tile + mr) {
                        let (out, sum) = (&mut out_row(first + r)[part..], state.sum[r - tile]);
                        let out = &mut out[..s.head_dim];
                        match sum > 0.0 {
                            true => store(&acc[r * o.row_c..], 1.0 / sum, out),
                            false => out.fill(T::zeroed()),
                        }
                        lse[first - queries.start + r] = lses[r - tile];
                    }
                }
            }
        }
    });
}

/// Queries of one block, in whole tiles.
fn block_rows(mr: usize) -> usize {
    (QUERIES / mr).min(TILES) * mr
}

/// Rows of a tile at most.
const ROWS: usize = 16;

/// What a tile of queries has seen, by row; maxima are of scores to base 2.
#[derive(Clone, Copy)]
struct State {
    max: [f32; ROWS],
    sum: [f32; ROWS],
    /// By how much what came before the last block has shrunk beside it.
    factor: [f32; ROWS],
    /// Has there been a block?
    begun: bool,
}

impl State {
    fn new() -> State {
        let (max, zero) = ([f32::NEG_INFINITY; ROWS], [0.0; ROWS]);
        State { max, sum: zero, factor: zero, begun: false }
    }

    fn log_sum_exp(&self, to: &mut [f32; ROWS]) {
        simd! { fn all(max: &[f32; ROWS], sum: &[f32; ROWS], to: &mut [f32; ROWS]) {
            for r in 0..ROWS {
                to[r] = log_sum_exp(max[r], sum[r]);
            }
        } }
        all(&self.max, &self.sum, to);
    }
}

simd! {
    /// Rows of `width` scores, in vectors of 16, become probabilities relative to the running maximum.
    /// What is not seen has score minus infinity. All rows are at the same stage, so that they do not
    /// wait for each other's sums.
    fn online_softmax<T: Float>(scores: &mut [f32], width: usize, scale: f32, state: &mut State) {
        let mut tops = [[f32::NEG_INFINITY; 16]; ROWS];
        for (row, lanes) in scores.chunks_exact(width).zip(&mut tops) {
            let mut top = [f32::NEG_INFINITY; 16];
            for c in row.as_chunks::<16>().0 {
                for l in 0..16 {
                    top[l] = larger(c[l], top[l]);
                }
            }
            *lanes = top;
        }
        let (mut new, mut sums) = (state.max, [0.0; ROWS]);
        for (r, row) in scores.chunks_exact_mut(width).enumerate().take(ROWS) {
            new[r] = larger(scale * halves(&tops[r], larger), new[r]);
            let base = finite(new[r]);
            let mut lanes = [0.0; 16];
            for c in row.as_chunks_mut::<16>().0 {
                for l in 0..16 {
                    c[l] = exp2::<T>(scale.mul_add(c[l], -base));
                    lanes[l] += c[l];
                }
            }
            sums[r] = halves(&lanes, |a, b| a + b);
        }
        for r in 0..ROWS {
            state.factor[r] = exp2::<f32>(state.max[r] - finite(new[r]));
            state.sum[r] = state.sum[r].mul_add(state.factor[r], sums[r]);
        }
        state.max = new;
    }
}

/// Where nothing has been seen yet, all scores are minus infinity: zero serves as the maximum.
#[inline(always)]
fn finite(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// All lanes together, by halves.
#[inline(always)]
pub(super) fn halves(x: &[f32; 16], f: impl Fn(f32, f32) -> f32) -> f32 {
    let [mut eight, mut four] = [[0.0f32; 8], [0.0f32; 8]];
    (0..8).for_each(|l| eight[l] = f(x[l], x[l + 8]));
    (0..4).for_each(|l| four[l] = f(eight[l], eight[l + 4]));
    f(f(four[0], four[2]), f(four[1], four[3]))
}

simd! {
    /// Rows of `width` times their factors.
    fn rescale(rows: &mut [f32], width: usize, factor: &[f32; ROWS]) {
        for (row, factor) in rows.chunks_exact_mut(width.max(1)).zip(factor) {
            if *factor != 1.0 {
                row.iter_mut().for_each(|x| *x *= factor);
            }
        }
    }
}
