//! DeepSpeed-Ulysses (Jacobs et al., 2023): attention over sequences that are cut into slices.
//!
//! An all-to-all over heads turns `[batch, seq / u, heads, d]` into `[batch, seq, heads / u, d]`
//! for q, k and v; attention then sees whole sequences; another one turns its result back.
//! Volume per rank and layer: `(q + k + v + out) * (u - 1) / u`, whatever u. With fewer key
//! heads than ranks each is sent to all the ranks whose queries read it.

use crate::error::{Error, Result};
use crate::placement::Placement::Shard;
use crate::tensor::Tensor;

/// Trades tokens for heads along `axis`.
pub(crate) fn to_heads(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    axis: usize,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (name, ranks) = q.scope().axis(axis);
    let (heads, kv) = (q.shape()[2], k.shape()[2]);
    let copies = if kv.is_multiple_of(ranks) { 1 } else { ranks / kv };
    if !heads.is_multiple_of(ranks) || !(kv * copies).is_multiple_of(ranks) {
        return Err(Error::Other(format!(
            "ulysses: {heads} query heads and {kv} key heads on a rank cannot be shared by the {ranks} ranks \
             of axis {name}; query heads must divide by it, and key heads divide it or divide by it"
        )));
    }
    let (k, v) = (k.repeat_heads(copies)?, v.repeat_heads(copies)?);
    Ok((q.exchange(axis, Shard(2))?, k.exchange(axis, Shard(2))?, v.exchange(axis, Shard(2))?))
}

/// Trades heads for tokens again.
pub(crate) fn to_tokens(out: &Tensor, axis: usize) -> Result<Tensor> {
    out.exchange(axis, Shard(1))
}
