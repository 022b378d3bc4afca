//! The forward pass: blocks of queries against blocks of keys.

use super::decode::one_query;
use super::{AttentionShape, Operands, take};
use crate::cast::round;
use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::math::exp;
use crate::profile;
use crate::threads::{Parts, count, parallel_for};

/// Queries of a sequence up to which keys are not packed.
const FEW: usize = 4;
/// Tiles of queries of one block.
const TILES: usize = 4;
/// Keys of one block.
const KEYS: usize = 128;

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
    // Decoding reads keys row by row: a thread takes as many heads of a sequence as it can.
    let grain = if s.q_len <= FEW { s.heads.div_ceil(count()) } else { 1 };
    parallel_for(s.batch * s.heads, grain, |range| {
        let mut at = range.start;
        while at < range.end {
            let (b, real) = (at / s.heads, s.q_real(at / s.heads));
            // The next head, or all that this piece has of the sequence.
            let end = if real <= FEW { range.end.min((b + 1) * s.heads) } else { at + 1 };
            let heads = at - b * s.heads..end - b * s.heads;
            let q_at = b * s.q_len * row + heads.start * d;
            let kv_at = (b * s.kv_stride()).min(k.len());
            // SAFETY: these (sequence, head) pairs are ours alone; rows are written one at a time.
            let out_row =
                |i: usize| unsafe { out.range(q_at + i * row..q_at + i * row + heads.len() * d) };
            // SAFETY: as above.
            let lse = unsafe { lse.range(at * s.q_len..end * s.q_len) };
            for i in real..s.q_len {
                out_row(i).fill(T::zeroed());
                (0..heads.len()).for_each(|h| lse[h * s.q_len + i] = f32::NEG_INFINITY);
            }
            if real <= FEW {
                for i in 0..real {
                    let q = &q[q_at + i * row..q_at + i * row + heads.len() * d];
                    let of = |h: usize, x| lse[(h - heads.start) * s.q_len + i] = x;
                    let x = [q, &k[kv_at..], &v[kv_at..]];
                    one_query(s, b, heads.clone(), i, x, out_row(i), of);
                }
            } else {
                let h = heads.start;
                let kv_at = (kv_at + h / (s.heads / s.kv_heads) * d).min(k.len());
                head(s, [b, h, real], &q[q_at..], &k[kv_at..], &v[kv_at..], &out_row, lse);
            }
            at = end;
        }
    });
}

/// All queries of one head.
fn head<'o, T: Float>(
    s: &AttentionShape<'_>,
    [b, h, real]: [usize; 3],
    q: &[T],
    k: &[T],
    v: &[T],
    out_row: &impl Fn(usize) -> &'o mut [T],
    lse: &mut [f32],
) {
    let o = Operands::of::<T>(s.head_dim);
    let (row, kv_row) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let (mr, nr, keys) = (o.kernel.mr, o.kernel.nr, s.kv_real(b));
    let blocks = keys.div_ceil(KEYS);
    // Panels of one block of keys, and of one block of values.
    let size_k = KEYS / nr * o.kernel.panel(nr, s.head_dim);
    let panel_v = o.kernel.panel(nr, KEYS);
    let size_v = o.row_c / nr * panel_v;
    let (rows, row_p) = (TILES * mr, o.kernel.steps(KEYS));
    let sizes = [
        blocks * size_k,
        blocks * size_v,
        rows * o.row_a,
        rows * o.row_c,
        mr * KEYS,
        mr * row_p,
        2 * rows,
    ];
    with_workspace(sizes.iter().sum(), |mut space| {
        let [kp, vp, qa, acc, scores, p, state] = sizes.map(|n| take(&mut space, n));
        let (max, sum) = state.split_at_mut(rows);
        for block in 0..blocks {
            let at = block * KEYS;
            let n = KEYS.min(keys - at);
            o.columns(&k[at * kv_row..], n, kv_row, &mut kp[block * size_k..][..size_k]);
            o.steps(&v[at * kv_row..], n, kv_row, KEYS, &mut vp[block * size_v..][..size_v]);
        }
        for first in (0..real).step_by(rows) {
            let rows = rows.min(real - first);
            o.rows(&q[first * row..], rows, row, qa);
            acc.fill(0.0);
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let seen = s.visible(b, first).start..s.visible(b, first + rows - 1).end;
            for block in seen.start / KEYS..seen.end.div_ceil(KEYS) {
                let at = block * KEYS;
                for tile in (0..rows).step_by(mr) {
                    let in_tile = mr.min(rows - tile);
                    // What the last row sees is what the tile computes.
                    let end = s.visible(b, first + tile + in_tile - 1).end;
                    if end <= at || s.visible(b, first + tile).start >= at + KEYS {
                        continue;
                    }
                    let n = (end - at).min(KEYS);
                    let depth = o.kernel.steps(n);
                    let qa = &qa[tile * o.row_a..];
                    for (i, col) in (0..n).step_by(nr).enumerate() {
                        let panel = o.kernel.panel(nr, s.head_dim);
                        let kp = &kp[block * size_k + i * panel..];
                        o.kernel.tile(
                            in_tile,
                            o.row_a,
                            qa,
                            [o.row_a, 1],
                            kp,
                            &mut scores[col..],
                            KEYS,
                            false,
                        );
                    }
                    for r in 0..in_tile {
                        let i = first + tile + r;
                        let scores = &mut scores[r * KEYS..(r + 1) * KEYS];
                        let seen = s.visible(b, i);
                        let seen =
                            seen.start.clamp(at, at + n) - at..seen.end.clamp(at, at + n) - at;
                        let bias = s.bias.map(|x| {
                            let row = b * x.batch_stride + h * x.head_stride + i * s.kv_len + at;
                            &x.data[row + seen.start..row + seen.end.max(seen.start)]
                        });
                        let acc = &mut acc[(tile + r) * o.row_c..(tile + r + 1) * o.row_c];
                        let (max, sum) = (&mut max[tile + r], &mut sum[tile + r]);
                        online_softmax(scores, seen, s.scale, bias, max, sum, acc);
                        if o.kernel.pairs {
                            scores[n..2 * depth].fill(0.0);
                            let p = &mut p[r * row_p..r * row_p + depth];
                            round(&scores[..2 * depth], bytemuck::cast_slice_mut(p));
                        }
                    }
                    let (p, row) = if o.kernel.pairs { (&*p, row_p) } else { (&*scores, KEYS) };
                    let vp = &vp[block * size_v..];
                    o.head(in_tile, depth, p, [row, 1], vp, panel_v, &mut acc[tile * o.row_c..]);
                }
            }
            for r in 0..rows {
                let scale = if sum[r] > 0.0 { 1.0 / sum[r] } else { 0.0 };
                store(&acc[r * o.row_c..], scale, out_row(first + r));
                lse[first + r] = max[r] + sum[r].ln();
            }
        }
    });
}

simd! {
    /// `y = scale x`.
    pub(super) fn store<T: Float>(x: &[f32], scale: f32, y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(scale * x);
        }
    }
}

simd! {
    /// Scores become probabilities relative to the running maximum (zeros outside of `seen`), and
    /// what was accumulated before is scaled to it.
    fn online_softmax(scores: &mut [f32], seen: std::ops::Range<usize>, scale: f32, bias: Option<&[f32]>, max: &mut f32, sum: &mut f32, acc: &mut [f32]) {
        let (start, end) = (seen.start, seen.end.max(seen.start));
        let mut scale = scale;
        if bias.is_some() || scale <= 0.0 {
            scores[start..end].iter_mut().for_each(|x| *x *= scale);
            scale = 1.0;
        }
        if let Some(bias) = bias {
            scores[start..end].iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
        // Whole vectors: what is not seen has score minus infinity, probability zero.
        let (low, high) = (start / 16 * 16, end.next_multiple_of(16).min(scores.len()));
        scores[..low].fill(0.0);
        scores[low..start].fill(f32::NEG_INFINITY);
        scores[end..high].fill(f32::NEG_INFINITY);
        scores[high..].fill(0.0);
        let (row, _) = scores[low..high].as_chunks_mut::<16>();
        let mut lanes = [f32::NEG_INFINITY; 16];
        for c in row.iter() {
            for l in 0..16 {
                lanes[l] = if c[l] > lanes[l] { c[l] } else { lanes[l] };
            }
        }
        let top = lanes.iter().copied().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b });
        let new = (scale * top).max(*max);
        if new == f32::NEG_INFINITY {
            // Nothing seen yet.
            row.as_flattened_mut().fill(0.0);
            return;
        }
        let mut lanes = [0.0f32; 16];
        for c in row {
            for l in 0..16 {
                c[l] = exp(scale.mul_add(c[l], -new));
                lanes[l] += c[l];
            }
        }
        let factor = exp(*max - new);
        *sum = *sum * factor + lanes.iter().sum::<f32>();
        if factor != 1.0 {
            acc.iter_mut().for_each(|a| *a *= factor);
        }
        *max = new;
    }
}
