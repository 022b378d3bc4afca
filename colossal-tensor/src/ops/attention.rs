//! Attention without the s×s matrix (FlashAttention; Dao et al., 2022).

use std::sync::Arc;

use colossal_kernels::AttentionShape;

use super::{produce, same_dtype};
use crate::autograd::record;
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::placement::{Context, Placement};
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;

/// Which keys a query sees.
#[derive(Debug, Clone, Default)]
pub struct AttentionMask {
    /// Only keys at or before the query's own position.
    pub causal: bool,
    /// Only the last this many keys (with `causal`).
    pub window: Option<usize>,
    /// The number of real tokens of each sequence; what follows is padding.
    pub lengths: Option<Arc<Vec<i32>>>,
}

impl AttentionMask {
    /// Causal, everything real.
    pub fn causal() -> AttentionMask {
        AttentionMask { causal: true, ..AttentionMask::default() }
    }
}

impl Tensor {
    /// Scaled dot-product attention: `self` are queries `[batch, seq, heads, head_dim]`, `k` and
    /// `v` are `[batch, seq, kv_heads, head_dim]`; `kv_heads` divides `heads` (grouped queries).
    ///
    /// Along an axis that cuts the tokens it communicates, as the axis' role says: Ulysses or a
    /// ring. Where an axis cuts the query heads and key heads are whole (fewer of them than
    /// ranks), it reads those its queries need.
    pub fn attention(&self, k: &Tensor, v: &Tensor, mask: &AttentionMask) -> Result<Tensor> {
        four("attention", self)?;
        let (k, v) = (own_heads(self, k)?, own_heads(self, v)?);
        let context = |axis: usize| match self.layout()[axis] {
            Placement::Shard(1) => self.scope().role(axis).and_then(|r| r.context),
            _ => None,
        };
        let (mut ulysses, mut ring) = (vec![], vec![]);
        for axis in self.scope().wide_axes() {
            match context(axis) {
                None => continue,
                Some(Context::Ulysses) => ulysses.push(axis),
                Some(Context::Ring { .. }) => ring.push(axis),
            }
        }
        if ulysses.is_empty() && ring.is_empty() {
            return self.local_attention(&k, &v, mask);
        }
        propagate("attention", &[self, &k, &v], |p| match p {
            [Placement::Shard(1), Placement::Shard(1), Placement::Shard(1)] => Some(p[0]),
            p => propagate::attention(p),
        })?;
        let (mut q, mut k, mut v) = (self.clone(), k, v);
        for axis in &ulysses {
            (q, k, v) = crate::ulysses::to_heads(&q, &k, &v, *axis)?;
        }
        let mut out = match ring[..] {
            [] => q.local_attention(&k, &v, mask)?,
            _ => crate::ring_attention::ring_attention(&q, &k, &v, mask, &ring)?,
        };
        for axis in ulysses.iter().rev() {
            out = crate::ulysses::to_tokens(&out, *axis)?;
        }
        Ok(out)
    }

    /// Attention within what this rank holds.
    fn local_attention(&self, k: &Tensor, v: &Tensor, mask: &AttentionMask) -> Result<Tensor> {
        let (batch, q_len, heads, head_dim) = four("attention", self)?;
        let (kb, kv_len, kv_heads, kd) = four("attention", k)?;
        if k.shape() != v.shape() || kb != batch || kd != head_dim || heads % kv_heads != 0 {
            let reason = "equal batch and head size, k and v of one shape, kv_heads divides heads";
            return Err(Error::shape("attention", self.shape(), k.shape(), reason));
        }
        same_dtype("attention", self, k)?;
        same_dtype("attention", self, v)?;
        let layout = propagate("attention", &[self, k, v], propagate::attention)?;
        let mut mask = mask.clone();
        let from = self.scope().sharding().batch();
        if crate::redistribute::rows_moved(from, self) && !self.scope().is_fake() {
            // Under a causal mask nothing real sees the padding that follows it; otherwise all
            // ranks have lengths, or none.
            mask.lengths = match mask.lengths {
                Some(lengths) if !mask.causal => {
                    Some(Arc::new(crate::redistribute::follow_rows(&lengths, from, self)?))
                }
                _ => None,
            };
        }
        let mask = &mask;
        let sizes = [batch, q_len, kv_len, heads, kv_heads, head_dim];
        let mut lse = self.scope().room::<f32>(batch * heads * q_len)?;
        let out = produce(self.scope(), self.shape(), self.dtype(), layout, |out| {
            float!("attention", self.dtype(), T => {
                let (q, k, v) = (self.lend::<T>()?, k.lend::<T>()?, v.lend::<T>()?);
                kernels::flash_attention(
                    &shape(sizes, mask),
                    q.view::<T>(),
                    k.view::<T>(),
                    v.view::<T>(),
                    out.view_mut::<T>(),
                    lse.view_mut(),
                )
            })
        })?;
        let (q, k_saved, v_saved) = (self.detach(), k.detach(), v.detach());
        let (saved, mask) = (out.clone(), mask.clone());
        Ok(record("attention", out, &[self, k, v], move |dout, back| {
            let (scope, dtype, layout) = (dout.scope().clone(), dout.dtype(), dout.layout());
            let room = |like: &Tensor| Buffer::on(scope.device(), like.len() * dtype.bytes());
            let mut dk = room(&k_saved)?;
            let mut dv = room(&v_saved)?;
            let dq = produce(&scope, q.shape(), dtype, layout, |dq| {
                float!("attention", dtype, T => {
                    kernels::flash_attention_backward(
                        &shape(sizes, &mask),
                        q.lend::<T>()?.view::<T>(),
                        k_saved.lend::<T>()?.view::<T>(),
                        v_saved.lend::<T>()?.view::<T>(),
                        saved.lend::<T>()?.view::<T>(),
                        lse.view(),
                        dout.lend::<T>()?.view::<T>(),
                        dq.view_mut::<T>(),
                        dk.view_mut::<T>(),
                        dv.view_mut::<T>(),
                    )
                })
            })?;
            back.give(2, Tensor::wrap(&scope, dv, v_saved.shape(), dtype, layout))?;
            back.give(1, Tensor::wrap(&scope, dk, k_saved.shape(), dtype, layout))?;
            back.give(0, dq)
        }))
    }
}

/// The key heads that this rank's query heads read, where an axis cuts the latter only.
fn own_heads(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let (_, _, heads, _) = four("attention", q)?;
    let (_, _, kv_heads, _) = four("attention", k)?;
    let mut layout = k.layout();
    let mut place = (0, 1);
    for axis in q.scope().wide_axes() {
        if (q.layout()[axis], layout[axis]) == (Placement::Shard(2), Placement::Replicate) {
            let ranks = q.scope().axis(axis).1;
            place = (place.0 * ranks + q.scope().coord(axis), place.1 * ranks);
            layout[axis] = Placement::Shard(2);
        }
    }
    if place.1 == 1 {
        return Ok(k.clone());
    }
    // Query heads per key head, in the part of the heads that these axes share.
    let group = (heads * place.1 / kv_heads.max(1)).max(1);
    let first = place.0 * heads;
    if heads * place.1 % kv_heads.max(1) != 0 || (group % heads != 0 && heads % group != 0) {
        return Err(Error::Other(format!(
            "attention: {heads} query heads a rank read parts of the groups of {kv_heads} key heads; \
             choose a degree of tensor parallelism that divides them or is a multiple of them"
        )));
    }
    k.take_heads(first / group..(first + heads).div_ceil(group), layout)
}

fn shape(sizes: [usize; 6], mask: &AttentionMask) -> AttentionShape<'_> {
    let [batch, q_len, kv_len, heads, kv_heads, head_dim] = sizes;
    let lengths = mask.lengths.as_ref().map(|l| l.as_slice());
    AttentionShape {
        causal: mask.causal,
        window: mask.window,
        q_lens: lengths,
        kv_lens: lengths,
        ..AttentionShape::new(batch, q_len, kv_len, heads, kv_heads, head_dim)
    }
}

pub(super) fn four(op: &'static str, x: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *x.shape() {
        [b, s, h, d] => Ok((b, s, h, d)),
        _ => Err(Error::shape(op, x.shape(), &[], "needs [batch, seq, heads, head_dim]")),
    }
}
