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

use colossal_comm::Group;
use colossal_kernels::{AttentionShape, Float};

use crate::autograd::{pretended, record};
use crate::collectives::{self, InFlight, shift_start};
use crate::device::Device;
use crate::dtype::{Element, float};
use crate::error::{Error, Result, comm};
use crate::kernels;
use crate::ops::{AttentionMask, produce};
use crate::placement::Context;
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

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
        let out = Tensor::pretend(q.scope(), q.shape(), dtype, layout);
        pretend_to_send(k, axes);
        let saved = out.clone();
        return Ok(pretended("ring_attention", out, &[q, k, v], &[q, k, v, &saved]));
    }
    let ring = Ring::new(q, k, mask, axes)?;
    let mut lse = q.scope().room::<f32>(ring.chunks * ring.batch * ring.heads * ring.chunk)?;
    let out = produce(q.scope(), q.shape(), dtype, layout, |out| {
        float!("ring_attention", dtype, T => {
            let (q, k, v) = (q.lend::<T>()?, k.lend::<T>()?, v.lend::<T>()?);
            let qkv = [q.view::<T>(), k.view(), v.view()];
            ring.forward(qkv, out.view_mut(), lse.view_mut())
        })
    })?;
    let (q_saved, k_saved, v_saved, saved) = (q.detach(), k.detach(), v.detach(), out.clone());
    Ok(record("ring_attention", out, &[q, k, v], move |dout, back| {
        let (scope, layout) = (dout.scope().clone(), dout.layout());
        let [mut dk, mut dv] = [
            Buffer::on(scope.device(), k_saved.len() * dtype.bytes())?,
            Buffer::on(scope.device(), v_saved.len() * dtype.bytes())?,
        ];
        let dq = produce(&scope, q_saved.shape(), dtype, layout, |dq| {
            float!("ring_attention", dtype, T => {
                let (q, k, v) = (q_saved.lend::<T>()?, k_saved.lend::<T>()?, v_saved.lend::<T>()?);
                let (out, dout) = (saved.lend::<T>()?, dout.lend::<T>()?);
                ring.backward::<T>(
                    [q.view(), k.view(), v.view(), out.view(), dout.view()],
                    lse.view(),
                    [dq.view_mut(), dk.view_mut(), dv.view_mut()],
                )
            })
        })?;
        back.give(2, Tensor::wrap(&scope, dv, v_saved.shape(), dtype, layout))?;
        back.give(1, Tensor::wrap(&scope, dk, k_saved.shape(), dtype, layout))?;
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
    device: Device,
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
            device: scope.device().clone(),
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

    fn room<T: Element>(&self, len: usize) -> Result<Buffer> {
        Buffer::on(&self.device, len * size_of::<T>())
    }

    /// `[batch, chunks, ..]` to `[chunks, batch, ..]`.
    fn pack<T: Element>(&self, x: View<'_, T>, to: ViewMut<'_, T>) -> Result<()> {
        let (b, c) = (self.batch, self.chunks);
        let run = x.len() / (b * c).max(1);
        kernels::copy_block(x, [c * run, run], [b, c, run], to, [run, b * run])
    }

    fn packed<T: Element>(&self, x: View<'_, T>) -> Result<Buffer> {
        let mut buffer = self.room::<T>(x.len())?;
        self.pack(x, buffer.view_mut())?;
        Ok(buffer)
    }

    /// `[chunks, batch, ..]` in f32 back to `[batch, chunks, ..]` in the tensor's type.
    fn unpack<T: Element + Float>(&self, sum: View<'_, f32>, to: ViewMut<'_, T>) -> Result<()> {
        let (b, c) = (self.batch, self.chunks);
        let run = sum.len() / (b * c).max(1);
        let mut cast = self.room::<T>(sum.len())?;
        kernels::cast(sum, cast.view_mut::<T>())?;
        kernels::copy_block(cast.view::<T>(), [b * run, run], [c, b, run], to, [run, c * run])
    }

    /// Calls `work` on each pair of chunks of which the queries see keys.
    fn pairs(
        &self,
        me: usize,
        owner: usize,
        mut work: impl FnMut(usize, usize, &AttentionShape<'_>) -> Result<()>,
    ) -> Result<()> {
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
                )?;
            }
        }
        Ok(())
    }

    /// Keys and values of this rank as they travel: `[k or v, chunks, batch, ..]`.
    fn keys<T: Element>(&self, k: View<'_, T>, v: View<'_, T>) -> Result<Buffer> {
        let (half, whole) = (k.len(), k.len() + v.len());
        let mut both = self.room::<T>(whole)?;
        self.pack(k, both.view_mut().range(0..half))?;
        self.pack(v, both.view_mut().range(half..whole))?;
        Ok(both)
    }

    /// Walks round the ring(s): `visit(owner, keys, step)` while the next keys are on their way.
    fn travel<T: Element>(
        &self,
        own: Buffer,
        mut visit: impl FnMut(usize, View<'_, T>, usize) -> Result<()>,
    ) -> Result<()> {
        let mut here = Arc::new(own);
        let mut shifts = vec![0; self.groups.len()];
        for step in 0..self.ranks() {
            let turn = self.turn(step);
            let next = (step + 1 < self.ranks())
                .then(|| shift_start::<T>(&self.groups[turn], &here, 1))
                .transpose()?;
            visit(self.owner(&shifts), here.view(), step)?;
            if let Some(next) = next {
                here = Arc::new(next.wait()?);
                shifts[turn] += 1;
            }
        }
        Ok(())
    }

    fn forward<T: Element + Float>(
        &self,
        [q, k, v]: [View<'_, T>; 3],
        out: ViewMut<'_, T>,
        mut lse: ViewMut<'_, f32>,
    ) -> Result<()> {
        let (q_size, kv_size) = self.sizes();
        let rows = self.batch * self.heads * self.chunk;
        let me = self.owner(&vec![0; self.groups.len()]);
        let queries = self.packed(q)?;
        let mut sum = Buffer::zeros_on::<f32>(&self.device, q.len())?;
        let mut part = self.room::<T>(q_size)?;
        let mut part_lse = self.room::<f32>(rows)?;
        kernels::fill(lse.reborrow(), f32::NEG_INFINITY)?;
        self.travel::<T>(self.keys(k, v)?, |owner, keys, _| {
            let [k, v] = [0, keys.len() / 2].map(|at| keys.range(at..at + keys.len() / 2));
            self.pairs(me, owner, |i, j, shape| {
                let q = queries.view::<T>().range(i * q_size..(i + 1) * q_size);
                let [k, v] = [k, v].map(|x| x.range(j * kv_size..(j + 1) * kv_size));
                kernels::flash_attention(shape, q, k, v, part.view_mut(), part_lse.view_mut())?;
                kernels::merge_attention(
                    part.view::<T>(),
                    part_lse.view(),
                    self.heads,
                    self.chunk,
                    sum.view_mut().range(i * q_size..(i + 1) * q_size),
                    lse.reborrow().range(i * rows..(i + 1) * rows),
                )
            })
        })?;
        self.unpack(sum.view(), out)
    }

    fn backward<T: Element + Float>(
        &self,
        [q, k, v, out, dout]: [View<'_, T>; 5],
        lse: View<'_, f32>,
        [dq, dk, dv]: [ViewMut<'_, T>; 3],
    ) -> Result<()> {
        let (q_size, kv_size) = self.sizes();
        let rows = self.batch * self.heads * self.chunk;
        let me = self.owner(&vec![0; self.groups.len()]);
        let (q, out, dout) = (self.packed(q)?, self.packed(out)?, self.packed(dout)?);
        let mut dq_sum = Buffer::zeros_on::<f32>(&self.device, dq.len())?;
        let mut part_q = self.room::<T>(q_size)?;
        let [mut part_k, mut part_v] = [self.room::<T>(kv_size)?, self.room::<T>(kv_size)?];
        let both = 2 * self.chunks * kv_size;
        // The gradients of the block that is here: they follow it, one step behind.
        let mut following: Option<InFlight<f32>> = None;
        let mut home = None;
        self.travel::<T>(self.keys(k, v)?, |owner, keys, step| {
            let [k, v] = [0, keys.len() / 2].map(|at| keys.range(at..at + keys.len() / 2));
            let mut dkv = Buffer::zeros_on::<f32>(&self.device, both)?;
            self.pairs(me, owner, |i, j, shape| {
                let own = i * q_size..(i + 1) * q_size;
                let [q, out, dout] = [&q, &out, &dout].map(|x| x.view::<T>().range(own.clone()));
                let [k, v] = [k, v].map(|x| x.range(j * kv_size..(j + 1) * kv_size));
                let lse = lse.range(i * rows..(i + 1) * rows);
                let (to_q, to_k, to_v) = (part_q.view_mut(), part_k.view_mut(), part_v.view_mut());
                kernels::flash_attention_backward(
                    shape, q, k, v, out, lse, dout, to_q, to_k, to_v,
                )?;
                kernels::add_into(part_q.view::<T>(), dq_sum.view_mut().range(own))?;
                for (at, part) in [(0, &part_k), (both / 2, &part_v)] {
                    let at = at + j * kv_size;
                    kernels::add_into(part.view::<T>(), dkv.view_mut().range(at..at + kv_size))?;
                }
                Ok(())
            })?;
            if let Some(following) = following.take() {
                kernels::add_assign(following.wait()?.view::<f32>(), dkv.view_mut())?;
            }
            if step + 1 < self.ranks() {
                let group = &self.groups[self.turn(step)];
                following = Some(shift_start(group, &Arc::new(dkv), 1)?);
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
                let mut got = self.room::<f32>(both)?;
                collectives::shift(group, dkv.view::<f32>(), got.view_mut(), rest)?;
                dkv = got;
            }
        }
        self.unpack(dq_sum.view(), dq)?;
        self.unpack(dkv.view().range(0..both / 2), dk)?;
        self.unpack(dkv.view().range(both / 2..both), dv)
    }
}
