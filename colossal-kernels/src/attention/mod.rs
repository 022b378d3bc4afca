//! Attention without the s×s matrix (FlashAttention; Dao et al., 2022; Dao, 2023).
//!
//! Forward walks over blocks of keys with a running maximum and sum; backward recomputes the
//! probabilities from the log-sum-exp that forward kept. All products are tiles of the
//! micro-kernel of matrix products; tiles that the mask hides are not computed. With AVX-512 BF16
//! probabilities and their gradients are rounded to bf16 on the way into the next product, sums
//! stay in f32. One piece of work is a (sequence, head) pair, in backward a (sequence, key head)
//! pair, whose query heads add to the same keys; of long sequences whose heads do not share out evenly
//! among the threads it is a chunk of the pair's queries, whose gradients of keys are added up by who
//! finishes last.

mod backward;
mod decode;
mod forward;
mod narrow;
mod paged;

use std::ops::Range;

use crate::float::Float;
use crate::gemm::Mat;
use crate::gemm::micro::{Ahead, Kernel};
use crate::gemm::pack::panel;
use crate::isa::simd;
use crate::profile::Work;
use crate::threads::count;

pub use backward::flash_attention_backward;
pub use forward::flash_attention;
pub use paged::{PagedShape, paged_attention};

/// Queries of a sequence up to which keys are not packed.
const FEW: usize = 4;
/// Queries of a chunk at least: beside their scores, packing the keys again is little.
const CHUNK: usize = 512;

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

    /// The first query of sequence `b` that sees key `j`, if any later one does too.
    fn first_query(&self, b: usize, j: usize) -> usize {
        let (q, kv) = (self.q_real(b), self.kv_real(b));
        if self.causal { (j + q).saturating_sub(kv) } else { 0 }
    }

    pub(crate) fn kv_stride(&self) -> usize {
        match self.kv_batch_stride {
            0 => self.kv_len * self.kv_heads * self.head_dim,
            stride => stride,
        }
    }

    /// Keys that query `i` of sequence `b` sees.
    pub(crate) fn visible(&self, b: usize, i: usize) -> Range<usize> {
        let (q, kv) = (self.q_real(b), self.kv_real(b));
        if !self.causal {
            return 0..kv;
        }
        let end = (kv + i + 1).saturating_sub(q).min(kv);
        let start = self.window.map_or(0, |w| end.saturating_sub(w));
        start..end
    }

    /// Into how many chunks the queries of each of `heads` are cut, whole numbers of `rows`: one, unless
    /// threads would wait for those that have a head more. A chunk packs the keys that it sees anew.
    fn chunks(&self, heads: usize, rows: usize) -> usize {
        let threads = count();
        if heads == 0 || heads >= 4 * threads || self.q_len <= FEW {
            return 1;
        }
        let most = self.q_len.div_ceil(CHUNK.next_multiple_of(rows));
        let most = (4 * threads).div_ceil(heads).min(most);
        (1..most).find(|chunks| (heads * chunks).is_multiple_of(threads)).unwrap_or(most)
    }

    /// The queries of a chunk. All chunks see about as many keys.
    fn chunk(&self, chunk: usize, chunks: usize, rows: usize) -> Range<usize> {
        let bound = |i: usize| {
            let (part, all) = (i as f64 / chunks as f64, self.q_len as f64);
            let query = match self.causal && self.window.is_none() {
                // The first queries see so many keys each, the next ones one more each.
                true => {
                    let seen = self.kv_len.saturating_sub(self.q_len) as f64;
                    (seen * seen + part * all * (all + 2.0 * seen)).sqrt() - seen
                }
                false => part * all,
            };
            match i == chunks {
                true => self.q_len,
                false => ((query / rows as f64).round() as usize * rows).min(self.q_len),
            }
        };
        bound(chunk)..bound(chunk + 1)
    }

    /// `q`, `k` and `v` from the first rows of a (sequence, head) pair on.
    fn of_pair<'x, T>(&self, pair: usize, [q, k, v]: [&'x [T]; 3]) -> [&'x [T]; 3] {
        let (b, h) = (pair / self.heads, pair % self.heads);
        let q_at = (b * self.q_len * self.heads + h) * self.head_dim;
        let kv_at = b * self.kv_stride() + h / (self.heads / self.kv_heads) * self.head_dim;
        [&q[q_at.min(q.len())..], &k[kv_at.min(k.len())..], &v[kv_at.min(v.len())..]]
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

    pub(crate) fn check(&self, q: usize, k: usize, v: usize, out: usize, lse: usize) {
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

/// A head's operands in the form that the micro-kernel reads.
struct Operands {
    kernel: Kernel,
    /// Size of a head, and the room for it in a row of `a` and in a row of `c`.
    dim: usize,
    row_a: usize,
    row_c: usize,
}

impl Operands {
    fn of<T: Float>(dim: usize) -> Operands {
        let kernel = Kernel::of::<T>();
        Operands { kernel, dim, row_a: kernel.steps(dim), row_c: dim.next_multiple_of(kernel.nr) }
    }

    /// Rows as operand `a`, dense: `rows` of them that lie `stride` apart, zeros up to a tile.
    fn rows<T: Float>(&self, x: &[T], rows: usize, stride: usize, out: &mut [f32]) {
        simd! { fn widen<T: Float>(x: &[T], out: &mut [f32]) {
            for (o, x) in out.iter_mut().zip(x) {
                *o = x.to_f32();
            }
        } }
        let (whole, rest) = out.split_at_mut(rows * self.row_a);
        for (i, out) in whole.chunks_exact_mut(self.row_a.max(1)).enumerate() {
            let x = &x[i * stride..i * stride + self.dim];
            if self.kernel.pairs {
                let out: &mut [T] = bytemuck::cast_slice_mut(out);
                out[..self.dim].copy_from_slice(x);
                out[self.dim..].fill(T::zeroed());
            } else {
                widen(x, out);
            }
        }
        let padding = rows.next_multiple_of(self.kernel.mr) - rows;
        rest[..padding * self.row_a].fill(0.0);
    }

    /// Rows as columns of operand `b`, panel by panel, along the size of a head.
    fn columns<T: Float>(&self, x: &[T], rows: usize, stride: usize, out: &mut [f32]) {
        let x = Mat { data: x, rows, cols: self.dim, row_stride: stride, col_stride: 1 };
        let size = self.kernel.panel(self.kernel.nr, self.dim);
        for (p, out) in out.chunks_exact_mut(size.max(1)).enumerate() {
            if p * self.kernel.nr < rows {
                panel(&self.kernel, x, p * self.kernel.nr, self.kernel.nr, out);
            }
        }
    }

    /// Rows as steps of operand `b`; a panel begins `size` floats behind the one before.
    fn steps<T: Float>(&self, x: &[T], rows: usize, stride: usize, size: usize, out: &mut [f32]) {
        let x = Mat { data: x, rows: self.dim, cols: rows, row_stride: 1, col_stride: stride };
        for (p, out) in out.chunks_mut(size.max(1)).enumerate() {
            if p * self.kernel.nr < self.dim {
                panel(&self.kernel, x, p * self.kernel.nr, self.kernel.nr, out);
            }
        }
    }

    /// `c [rows, nr] = a b`, the depth of a head: `a` as [`rows`](Self::rows), a panel of
    /// [`columns`](Self::columns).
    fn scores(&self, rows: usize, a: &[f32], b: &[f32], c: &mut [f32], stride: usize, next: Ahead) {
        self.kernel.tile(rows, self.row_a, a, [self.row_a, 1], b, c, stride, false, next);
    }

    /// `c [rows, head] = a b`, or `c += a b` with `add`, over `steps` of depth; panels of `b` lie `panel`
    /// apart. Lines from `next` on, if any, are fetched meanwhile.
    fn head(
        &self,
        rows: usize,
        steps: usize,
        a: &[f32],
        strides: [usize; 2],
        b: &[f32],
        panel: usize,
        c: &mut [f32],
        add: bool,
        next: Option<*const f32>,
    ) {
        for (p, col) in (0..self.row_c).step_by(self.kernel.nr).enumerate() {
            self.kernel.tile(
                rows,
                steps,
                a,
                strides,
                &b[p * panel..],
                &mut c[col..],
                self.row_c,
                add,
                Ahead::lines(next.map_or(a.as_ptr(), |x| x.wrapping_add(p * steps * 16))),
            );
        }
    }
}

/// Rows that are read or written soon, of some matrices: each tile of scores fetches sixteen into the
/// second-level cache, because rows of a head lie too far apart for the machine to foresee.
struct Soon {
    /// Where rows begin, bytes from one to the next, how many.
    of: [(*const u8, usize, usize); 8],
    /// Whose turn it is.
    turn: usize,
}

impl Default for Soon {
    fn default() -> Soon {
        Soon { of: [(std::ptr::null(), 0, 0); 8], turn: 0 }
    }
}

impl Soon {
    /// Fetch `n` rows from `x` on that lie `stride` elements apart, as the `i`th.
    fn rows<T>(&mut self, i: usize, x: *const T, stride: usize, n: usize) {
        self.of[i] = (x.cast(), stride * size_of::<T>(), n);
        self.turn = 0;
    }

    /// What one tile fetches: if nothing is left, lines from `other` on, if any.
    fn next(&mut self, other: Option<*const f32>) -> Ahead {
        while let Some((at, stride, n)) = self.of.get_mut(self.turn) {
            if *n > 0 {
                let next = Ahead::strided(*at, *stride);
                *at = at.wrapping_add(16 * *stride);
                *n = n.saturating_sub(16);
                return next;
            }
            self.turn += 1;
        }
        other.map_or(Ahead::strided(self.of[0].0, 0), Ahead::lines)
    }
}

/// Cuts `n` floats off the front.
fn take<'a>(space: &mut &'a mut [f32], n: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(space).split_at_mut(n);
    *space = rest;
    front
}
