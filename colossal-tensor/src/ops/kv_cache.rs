//! Keys and values of earlier tokens, for generation.

use colossal_kernels::AttentionShape;

use super::attention::four;
use super::produce;
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;

/// Which of the new tokens of each sequence are real.
#[derive(Debug, Clone)]
pub enum Added {
    /// The first so many of each.
    First(Vec<i32>),
    /// One each, with numbers on the GPU ([`Numbers`](crate::Numbers)), so that the step can be
    /// recorded.
    One {
        /// Tokens of each sequence, the new one included. Their bound is one more than the most that
        /// keys are split for.
        lengths: Tensor,
        /// The row of the cache where the new one goes: `sequence * capacity + position`.
        places: Tensor,
    },
}

/// Keys and values of the tokens seen so far, per layer: `[batch, capacity, kv_heads, head_dim]`.
///
/// Sequences of unequal length sit side by side, each packed from the start, without padding.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<Option<(Buffer, Buffer)>>,
    lengths: Vec<i32>,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `batch` sequences of at most `capacity` tokens in `layers` layers.
    pub fn new(layers: usize, batch: usize, capacity: usize) -> KvCache {
        let layers = (0..layers).map(|_| None).collect();
        KvCache { layers, lengths: vec![0; batch], capacity }
    }

    /// Tokens held for each sequence.
    pub fn lengths(&self) -> &[i32] {
        &self.lengths
    }

    /// Tokens it has room for, per sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// After every layer has attended: these many tokens were added to each sequence.
    pub fn advance(&mut self, added: &[i32]) {
        self.lengths.iter_mut().zip(added).for_each(|(l, a)| *l += a);
    }

    /// Keeps only the sequences at `rows`, in that order: finished ones leave the batch.
    ///
    /// # Errors
    /// [`Error::Cuda`] when a GPU cannot copy them.
    pub fn keep(&mut self, rows: &[usize]) -> Result<()> {
        let batch = self.lengths.len();
        for (k, v) in self.layers.iter_mut().flatten() {
            for buffer in [k, v] {
                let row = buffer.bytes() / batch.max(1);
                let mut kept = Buffer::on(&buffer.device(), row * rows.len())?;
                for (to, from) in rows.iter().enumerate() {
                    let from = buffer.view::<u8>().range(from * row..(from + 1) * row);
                    kept.view_mut().range(to * row..(to + 1) * row).copy(from)?;
                }
                *buffer = kept;
            }
        }
        self.lengths = rows.iter().map(|r| self.lengths[*r]).collect();
        Ok(())
    }

    /// Adds the new tokens of each sequence to `layer`, and attends from their queries to everything
    /// held, causally. No gradient.
    ///
    /// # Errors
    /// [`Error::Shape`] when a sequence would outgrow the capacity.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        added: &Added,
        window: Option<usize>,
    ) -> Result<Tensor> {
        let (batch, q_len, heads, head_dim) = four("kv_cache", q)?;
        let (_, _, kv_heads, _) = four("kv_cache", k)?;
        if k.shape() != v.shape() || k.shape()[..2] != q.shape()[..2] {
            let reason = "q, k, v of the same tokens";
            return Err(Error::shape("kv_cache", q.shape(), k.shape(), reason));
        }
        let layout = propagate("attention", &[q, k, v], propagate::attention)?;
        let row = kv_heads * head_dim;
        let (total, longest) = self.after(added, [batch, q_len])?;
        let stride = self.capacity * row;
        let shape = AttentionShape {
            causal: true,
            window,
            kv_batch_stride: stride,
            ..AttentionShape::new(batch, q_len, longest, heads, kv_heads, head_dim)
        };
        let slot = self
            .layers
            .get_mut(layer)
            .ok_or_else(|| Error::Other(format!("kv_cache: made for fewer layers than {layer}")))?;
        produce(q.scope(), q.shape(), q.dtype(), layout, |out| {
            float!("kv_cache", q.dtype(), T => {
                if slot.is_none() {
                    let room = || Buffer::zeros_on::<T>(q.scope().device(), batch * stride);
                    *slot = Some((room()?, room()?));
                }
                let Some((kc, vc)) = slot else { unreachable!("made above") };
                let mut lse = q.scope().room::<f32>(batch * heads * q_len)?;
                let q = q.lend::<T>()?;
                match added {
                    Added::First(counts) => {
                        for (cache, new) in [(&mut *kc, k), (&mut *vc, v)] {
                            let new = new.lend::<T>()?;
                            for (b, added) in counts.iter().enumerate() {
                                let to = b * stride + self.lengths[b] as usize * row;
                                let from = b * q_len * row;
                                let len = *added as usize * row;
                                let from = new.view::<T>().range(from..from + len);
                                cache.view_mut().range(to..to + len).copy(from)?;
                            }
                        }
                        let (q_lens, kv_lens) = (Some(&counts[..]), Some(&total[..]));
                        kernels::flash_attention(
                            &AttentionShape { q_lens, kv_lens, ..shape },
                            q.view::<T>(),
                            kc.view::<T>(),
                            vc.view::<T>(),
                            out.view_mut::<T>(),
                            lse.view_mut(),
                        )
                    }
                    Added::One { lengths, places } => {
                        let (lengths, places) = (lengths.lend::<i32>()?, places.lend::<i32>()?);
                        for (cache, new) in [(&mut *kc, k), (&mut *vc, v)] {
                            let (new, at) = (new.lend::<T>()?, places.view::<i32>());
                            kernels::scatter_rows(new.view::<T>(), at, row, cache.view_mut())?;
                        }
                        kernels::cached_attention(
                            &shape,
                            lengths.view::<i32>(),
                            q.view::<T>(),
                            kc.view::<T>(),
                            vc.view::<T>(),
                            out.view_mut::<T>(),
                            lse.view_mut(),
                        )
                    }
                }
            })
        })
    }

    /// The length of each sequence with the new tokens, if the host knows it, and the longest there
    /// can be; for `[batch, q_len]` queries.
    fn after(&self, added: &Added, queries: [usize; 2]) -> Result<(Vec<i32>, usize)> {
        let (total, longest, fits) = match added {
            Added::First(counts) => {
                let total: Vec<i32> = self.lengths.iter().zip(counts).map(|(l, a)| l + a).collect();
                let longest = total.iter().copied().max().unwrap_or(0) as usize;
                (total, longest, counts.len() == queries[0])
            }
            Added::One { lengths, places } => {
                let ([lens, rows], [batch, q_len]) = ([lengths.len(), places.len()], queries);
                let rows_fit = places.below().is_some_and(|b| b <= batch * self.capacity);
                let longest = lengths.below().map_or(usize::MAX, |b| b.saturating_sub(1));
                (vec![], longest, q_len == 1 && lens == batch && rows == batch && rows_fit)
            }
        };
        let room = [self.lengths.len(), self.capacity];
        if !fits || self.lengths.len() != queries[0] {
            let reason = "what was added is of each sequence of the cache";
            return Err(Error::shape("kv_cache", &queries, &room, reason));
        }
        if longest > self.capacity {
            let reason = "the cache is too small; make it for prompt + new tokens";
            return Err(Error::shape("kv_cache", &[queries[0], longest], &room, reason));
        }
        Ok((total, longest))
    }

    /// Bytes of one layer's cache for a model, for planning.
    pub fn bytes(
        batch: usize,
        capacity: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: Dtype,
    ) -> usize {
        2 * batch * capacity * kv_heads * head_dim * dtype.bytes()
    }
}
