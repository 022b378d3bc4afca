//! Ring attention (Liu et al., 2023) with zigzag placement (Zhu, 2024) and double rings
//! (LoongTrain; Gu et al., 2024): calls `comm`.
//!
//! Each rank keeps its queries; blocks of keys and values travel round the ring, one message
//! ahead of the computation. Partial results are merged by their log-sum-exp:
//! `lse = ln(e^a + e^b)`, `out = out_a e^(a - lse) + out_b e^(b - lse)`. Backward lets them
//! travel again, followed by the sums of their gradients, which go home at the end.
//!
//! Under a causal mask rank r of p holds chunks r and 2p - 1 - r of each sequence; in every step
//! it then computes two of the four pairs of chunks, whoever's keys are there. Nothing longer
//! than a rank's own part of the sequence is ever held.
//!
//! Sent per rank: forward `(p - 1) * kv`, backward `(p - 1) * kv + p * kv` (gradients in f32),
//! with `kv` the keys and values of one rank.

use std::sync::Arc;

use bytemuck::Pod;
use colossal_comm::{Group, Pending};
use colossal_kernels::{self as kernels, AttentionShape, Float};

use crate::autograd::{pretended, record};
use crate::dtype::{Element, float};
use crate::error::{Error, Result, comm};
use crate::ops::{AttentionMask, produce_on_host};
use crate::placement::Context;
use crate::redistribute::swap_outer;
use crate::storage::{Buffer, Lent, Typed};
use crate::tensor::Tensor;

/// Attention of queries to the keys of all ranks along `axes` (the outer ring first).
pub(crate) fn ring_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &AttentionMask,
    axes: &[usize],
) -> Result<Tensor> {
    if mask.window.is_some() {
        let text =
            "ring attention: a window of keys is not built; use ulysses (all_to_all) instead";
        return Err(Error::Other(text.into()));
    }
    let (layout, dtype) = (q.layout(), q.dtype());
    if q.scope().is_fake() {
        let out = produce_on_host(q.scope(), q.shape(), dtype, layout, |_| Ok(()))?;
        pretend_to_send(k, axes);
        let saved = out.clone();
        return Ok(pretended("ring_attention", out, &[q, k, v], &[q, k, v, &saved]));
    }
    let ring = Ring::new(q, k, mask, axes)?;
    let mut lse = Buffer::new::<f32>(ring.chunks * ring.batch * ring.heads * ring.chunk);
    let out = produce_on_host(q.scope(), q.shape(), dtype, layout, |out| {
        float!("ring_attention", dtype, T => {
            let (q, k, v) = (q.read::<T>()?, k.read::<T>()?, v.read::<T>()?);
            let (q, k, v) = (q.as_slice::<T>(), k.as_slice::<T>(), v.as_slice::<T>());
            ring.forward(q, k, v, out.as_mut_slice(), lse.as_mut_slice())
        })
    })?;
    let (q_saved, k_saved, v_saved, saved) = (q.detach(), k.detach(), v.detach(), out.clone());
    Ok(record("ring_attention", out, &[q, k, v], move |dout, back| {
        let scope = dout.scope().clone();
        let mut dk = Buffer::with_bytes(k_saved.len() * dtype.bytes());
        let mut dv = Buffer::with_bytes(v_saved.len() * dtype.bytes());
        let dq = produce_on_host(&scope, q_saved.shape(), dtype, dout.layout(), |dq| {
            float!("ring_attention", dtype, T => {
                ring.backward(
                    [
                        q_saved.read::<T>()?.as_slice::<T>(),
                        k_saved.read::<T>()?.as_slice::<T>(),
                        v_saved.read::<T>()?.as_slice::<T>(),
                        saved.read::<T>()?.as_slice::<T>(),
                        dout.read::<T>()?.as_slice::<T>(),
                    ],
                    lse.as_slice(),
                    [dq.as_mut_slice(), dk.as_mut_slice(), dv.as_mut_slice()],
                )
            })
        })?;
        back.give(2, Tensor::place(&scope, dv, v_saved.shape(), dtype, dout.layout())?)?;
        back.give(1, Tensor::place(&scope, dk, k_saved.shape(), dtype, dout.layout())?)?;
        back.give(0, dq)
    }))
}

/// Enters what the rings send in the account of a pretended mesh: keys and values forward and
/// backward, their gradients in f32, and the way home.
fn pretend_to_send(k: &Tensor, axes: &[usize]) {
    let scope = k.scope();
    let sizes: Vec<usize> = axes.iter().map(|a| scope.axis(*a).1).collect();
    let inner = sizes.last().copied().unwrap_or(1);
    let outer = sizes.iter().product::<usize>() / inner;
    let steps = [outer - 1, outer * (inner - 1)];
    let (kv, gradients) = (2 * k.len() * k.dtype().bytes(), 2 * k.len() * size_of::<f32>());
    for ((axis, n), steps) in axes.iter().zip(&sizes).zip(&steps[2 - axes.len()..]) {
        let home = usize::from(steps % n != 0);
        let back = steps * kv + (steps + home) * gradients;
        let back = if k.requires_grad() { back } else { 0 };
        scope.sends("ring_attention", *axis, steps * kv, back);
    }
}

/// Sizes, places and groups of one call.
struct Ring {
    /// The outer ring first.
    groups: Vec<Group>,
    batch: usize,
    /// Chunks of a sequence on a rank, and tokens of a chunk.
    chunks: usize,
    chunk: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    mask: AttentionMask,
}

impl Ring {
    fn new(q: &Tensor, k: &Tensor, mask: &AttentionMask, axes: &[usize]) -> Result<Ring> {
        let scope = q.scope();
        let zigzag = axes.iter().any(|a| {
            scope.role(*a).and_then(|r| r.context) == Some(Context::Ring { zigzag: true })
        });
        let groups: Result<Vec<Group>> = axes
            .iter()
            .map(|a| Ok(scope.mesh().group(&scope.axis(*a).0).map_err(comm)?.clone()))
            .collect();
        let [batch, tokens, heads, head_dim] = [0, 1, 2, 3].map(|d| q.shape()[d]);
        let chunks = if zigzag { 2 } else { 1 };
        if k.shape()[1] != tokens || !tokens.is_multiple_of(chunks) {
            let reason = "as many keys as queries on a rank, in whole chunks";
            return Err(Error::shape("ring attention", q.shape(), k.shape(), reason));
        }
        Ok(Ring {
            groups: groups?,
            batch,
            chunks,
            chunk: tokens / chunks,
            heads,
            kv_heads: k.shape()[2],
            head_dim,
            mask: mask.clone(),
        })
    }

    fn ranks(&self) -> usize {
        self.groups.iter().map(Group::world_size).product()
    }

    /// The rank along all rings whose block is here after so many shifts along each.
    fn owner(&self, shifts: &[usize]) -> usize {
        self.groups.iter().zip(shifts).fold(0, |owner, (group, shifted)| {
            let (n, rank) = (group.world_size(), group.rank());
            owner * n + (rank + n - shifted % n) % n
        })
    }

    /// The place in the sequence of chunk `i` of a rank.
    fn place(&self, rank: usize, i: usize) -> usize {
        match (self.chunks, i) {
            (1, _) | (_, 0) => rank,
            _ => 2 * self.ranks() - 1 - rank,
        }
    }

    /// Along which ring blocks move after step `step`: the inner one, unless it has gone round.
    fn turn(&self, step: usize) -> usize {
        let last = self.groups.len() - 1;
        let inner = self.groups[last].world_size();
        if last > 0 && (step + 1).is_multiple_of(inner) { 0 } else { last }
    }

    /// Elements of a chunk of queries, and of keys.
    fn sizes(&self) -> (usize, usize) {
        let rows = self.batch * self.chunk * self.head_dim;
        (rows * self.heads, rows * self.kv_heads)
    }

    /// `[batch, chunks, ..]` to `[chunks, batch, ..]`.
    fn pack<T: Copy>(&self, x: &[T], heads: usize, to: &mut [T]) {
        swap_outer(x, to, self.batch, self.chunks, self.chunk * heads * self.head_dim);
    }

    fn packed<T: Pod>(&self, x: &[T], heads: usize) -> Buffer {
        let mut buffer = Buffer::new::<T>(x.len());
        self.pack(x, heads, buffer.as_mut_slice());
        buffer
    }

    /// Calls `work` on each pair of chunks of which the queries see keys.
    fn pairs(
        &self,
        me: usize,
        owner: usize,
        mut work: impl FnMut(usize, usize, &AttentionShape<'_>),
    ) {
        for i in 0..self.chunks {
            for j in 0..self.chunks {
                let (at, key_at) = (self.place(me, i), self.place(owner, j));
                if self.mask.causal && key_at > at {
                    continue;
                }
                let real = |place: usize| -> Option<Vec<i32>> {
                    let start = (place * self.chunk) as i32;
                    let lengths = self.mask.lengths.as_ref()?;
                    Some(lengths.iter().map(|l| (l - start).clamp(0, self.chunk as i32)).collect())
                };
                let (q_lens, kv_lens) = (real(at), real(key_at));
                work(
                    i,
                    j,
                    &AttentionShape {
                        causal: self.mask.causal && key_at == at,
                        q_lens: q_lens.as_deref(),
                        kv_lens: kv_lens.as_deref(),
                        ..AttentionShape::new(
                            self.batch,
                            self.chunk,
                            self.chunk,
                            self.heads,
                            self.kv_heads,
                            self.head_dim,
                        )
                    },
                );
            }
        }
    }

    /// Keys and values of this rank as they travel: `[k or v, chunks, batch, ..]`.
    fn keys<T: Element>(&self, k: &[T], v: &[T]) -> Buffer {
        let mut both = Buffer::new::<T>(k.len() + v.len());
        let (to_k, to_v) = both.as_mut_slice::<T>().split_at_mut(k.len());
        self.pack(k, self.kv_heads, to_k);
        self.pack(v, self.kv_heads, to_v);
        both
    }

    /// Walks round the ring(s): `visit(owner, keys, step)` while the next keys are on their way.
    fn travel<T: Element>(
        &self,
        own: Buffer,
        mut visit: impl FnMut(usize, &[T], usize) -> Result<()>,
    ) -> Result<()> {
        let mut here = Arc::new(own);
        let mut shifts = vec![0; self.groups.len()];
        for step in 0..self.ranks() {
            let next = (step + 1 < self.ranks()).then(|| {
                let room = Typed::<T>::new(Buffer::new::<T>(here.bytes() / size_of::<T>()));
                let lent = Lent::<T>::new(&here);
                (self.turn(step), self.groups[self.turn(step)].shift_start(lent, room, 1))
            });
            visit(self.owner(&shifts), here.as_slice(), step)?;
            if let Some((turn, next)) = next {
                let (_, got) = next.wait().map_err(comm)?;
                here = Arc::new(got.0);
                shifts[turn] += 1;
            }
        }
        Ok(())
    }

    fn forward<T: Element + Float>(
        &self,
        q: &[T],
        k: &[T],
        v: &[T],
        out: &mut [T],
        lse: &mut [f32],
    ) -> Result<()> {
        let (q_size, kv_size) = self.sizes();
        let rows = self.batch * self.heads * self.chunk;
        let me = self.owner(&vec![0; self.groups.len()]);
        let queries = self.packed(q, self.heads);
        let queries = queries.as_slice::<T>();
        let mut sum = Buffer::zeros::<f32>(q.len());
        let mut part = Buffer::new::<T>(q_size);
        let mut part_lse = Buffer::new::<f32>(rows);
        lse.fill(f32::NEG_INFINITY);
        self.travel::<T>(self.keys(k, v), |owner, keys, _| {
            let (k, v) = keys.split_at(keys.len() / 2);
            self.pairs(me, owner, |i, j, shape| {
                let (part, part_lse) = (part.as_mut_slice::<T>(), part_lse.as_mut_slice::<f32>());
                kernels::flash_attention(
                    shape,
                    &queries[i * q_size..][..q_size],
                    &k[j * kv_size..][..kv_size],
                    &v[j * kv_size..][..kv_size],
                    part,
                    part_lse,
                );
                let lse = &mut lse[i * rows..][..rows];
                self.merge(
                    &mut sum.as_mut_slice::<f32>()[i * q_size..][..q_size],
                    lse,
                    part,
                    part_lse,
                );
            });
            Ok(())
        })?;
        // Back to [batch, chunks, ..], in the tensor's type.
        let sum = sum.as_slice::<f32>();
        let run = self.chunk * self.heads * self.head_dim;
        for b in 0..self.batch {
            for i in 0..self.chunks {
                let from = &sum[(i * self.batch + b) * run..][..run];
                let to = &mut out[(b * self.chunks + i) * run..][..run];
                kernels::cast(from, to);
            }
        }
        Ok(())
    }

    /// Adds a partial result `[batch, chunk, heads, d]` with its `lse [batch, heads, chunk]`.
    fn merge<T: Element + Float>(
        &self,
        sum: &mut [f32],
        lse: &mut [f32],
        part: &[T],
        part_lse: &[f32],
    ) {
        let d = self.head_dim;
        for b in 0..self.batch {
            for h in 0..self.heads {
                for t in 0..self.chunk {
                    let row = (b * self.heads + h) * self.chunk + t;
                    let (old, new) = (lse[row], part_lse[row]);
                    if new == f32::NEG_INFINITY {
                        continue;
                    }
                    let top = old.max(new);
                    let both = top + ((old - top).exp() + (new - top).exp()).ln();
                    let (keep, add) = ((old - both).exp(), (new - both).exp());
                    let at = ((b * self.chunk + t) * self.heads + h) * d;
                    for (s, p) in sum[at..at + d].iter_mut().zip(&part[at..at + d]) {
                        *s = *s * keep + p.to_f32() * add;
                    }
                    lse[row] = both;
                }
            }
        }
    }

    fn backward<T: Element + Float>(
        &self,
        [q, k, v, out, dout]: [&[T]; 5],
        lse: &[f32],
        [dq, dk, dv]: [&mut [T]; 3],
    ) -> Result<()> {
        let (q_size, kv_size) = self.sizes();
        let rows = self.batch * self.heads * self.chunk;
        let me = self.owner(&vec![0; self.groups.len()]);
        let [q, out, dout] = [q, out, dout].map(|x| self.packed(x, self.heads));
        let block = |i: usize| i * q_size..(i + 1) * q_size;
        let mut dq_sum = Buffer::zeros::<f32>(dq.len());
        let mut part = Buffer::new::<T>(q_size + 2 * kv_size);
        let both = 2 * self.chunks * kv_size;
        // The gradients of the block that is here: they follow it, one step behind.
        let mut following: Option<Pending<(Typed<f32>, Typed<f32>)>> = None;
        let mut home = None;
        self.travel::<T>(self.keys(k, v), |owner, keys, step| {
            let (k, v) = keys.split_at(keys.len() / 2);
            let mut dkv = Buffer::zeros::<f32>(both);
            self.pairs(me, owner, |i, j, shape| {
                let (part_q, part_kv) = part.as_mut_slice::<T>().split_at_mut(q_size);
                let (part_k, part_v) = part_kv.split_at_mut(kv_size);
                kernels::flash_attention_backward(
                    shape,
                    &q.as_slice::<T>()[block(i)],
                    &k[j * kv_size..][..kv_size],
                    &v[j * kv_size..][..kv_size],
                    &out.as_slice::<T>()[block(i)],
                    &lse[i * rows..][..rows],
                    &dout.as_slice::<T>()[block(i)],
                    part_q,
                    part_k,
                    part_v,
                );
                let dq = &mut dq_sum.as_mut_slice::<f32>()[i * q_size..][..q_size];
                kernels::add_into(part_q, dq);
                let (dk, dv) = dkv.as_mut_slice::<f32>().split_at_mut(both / 2);
                kernels::add_into(part_k, &mut dk[j * kv_size..][..kv_size]);
                kernels::add_into(part_v, &mut dv[j * kv_size..][..kv_size]);
            });
            if let Some(following) = following.take() {
                let (_, got) = following.wait().map_err(comm)?;
                kernels::add_assign(got.0.as_slice::<f32>(), dkv.as_mut_slice());
            }
            if step + 1 < self.ranks() {
                let room = Typed::new(Buffer::new::<f32>(both));
                let group = &self.groups[self.turn(step)];
                following = Some(group.shift_start(Typed::new(dkv), room, 1));
            } else {
                home = Some(dkv);
            }
            Ok(())
        })?;
        let mut dkv = home.expect("a ring has a last step");
        // How far blocks have come along each ring; the rest of the way takes them home.
        let inner = self.groups.last().map_or(1, Group::world_size);
        let outer = self.ranks() / inner;
        let gone = [outer - 1, outer * (inner - 1)];
        for (group, gone) in self.groups.iter().zip(&gone[2 - self.groups.len()..]) {
            let n = group.world_size();
            let rest = (n - gone % n) % n;
            if rest > 0 {
                let mut got = Buffer::new::<f32>(both);
                group.shift(dkv.as_slice::<f32>(), got.as_mut_slice(), rest).map_err(comm)?;
                dkv = got;
            }
        }
        let (dk_sum, dv_sum) = dkv.as_slice::<f32>().split_at(both / 2);
        for (sum, heads, to) in [
            (dq_sum.as_slice::<f32>(), self.heads, dq),
            (dk_sum, self.kv_heads, dk),
            (dv_sum, self.kv_heads, dv),
        ] {
            let run = self.chunk * heads * self.head_dim;
            for b in 0..self.batch {
                for i in 0..self.chunks {
                    let from = &sum[(i * self.batch + b) * run..][..run];
                    kernels::cast(from, &mut to[(b * self.chunks + i) * run..][..run]);
                }
            }
        }
        Ok(())
    }
}
