//! Attention to a cache in pages (PagedAttention; Kwon et al., 2023): one query a sequence.
//!
//! The cache is `[pages, page, kv_heads, head_dim]`, keys and values apart; a row of the table
//! `[batch, pages a sequence]` names a sequence's pages in order: the layout that vLLM keeps for
//! flash attention. Entries behind a sequence's length are not read.

use super::{AttentionShape, flash_attention};
use crate::float::Float;

/// Sizes of a [`paged_attention`] call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PagedShape {
    /// Sequences, of one query each.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Keys of a page: a power of two.
    pub page: usize,
    /// Factor of the scores.
    pub scale: f32,
}

impl PagedShape {
    /// Checks sizes of `q, k, v`, `table, lens` and `out, lse`; the number of pages.
    pub(crate) fn check(
        &self,
        qkv: [usize; 3],
        [table, lens]: [usize; 2],
        out: [usize; 2],
    ) -> usize {
        let PagedShape { batch, heads, kv_heads, head_dim, page, .. } = *self;
        assert!(
            page.is_power_of_two(),
            "paged_attention: pages of {page} keys; take a power of two"
        );
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "paged_attention: {heads} query heads are no multiple of {kv_heads} key heads"
        );
        let row = batch * heads * head_dim;
        assert!(
            qkv[0] == row && out == [row, batch * heads],
            "paged_attention: q and out are [batch, heads, head_dim], lse is [batch, heads]"
        );
        let size = (page * kv_heads * head_dim).max(1);
        assert!(
            qkv[1] == qkv[2] && qkv[1].is_multiple_of(size),
            "paged_attention: {} and {} elements are no pages of {page} x {kv_heads} x {head_dim}",
            qkv[1],
            qkv[2]
        );
        assert!(
            lens == batch && table.is_multiple_of(batch.max(1)),
            "paged_attention: {table} pages and {lens} lengths do not belong to {batch} sequences"
        );
        qkv[1] / size
    }

    /// The same on keys that lie together, as many as `pages` in all have.
    pub(crate) fn dense(&self, pages: usize) -> AttentionShape<'static> {
        let PagedShape { batch, heads, kv_heads, head_dim, page, scale } = *self;
        let most = pages / batch.max(1) * page;
        AttentionShape { scale, ..AttentionShape::new(batch, 1, most, heads, kv_heads, head_dim) }
    }
}

/// `out [batch, heads, head_dim] = softmax(scale q kᵀ) v` over the first `lens[b]` keys of each
/// sequence; `lse [batch, heads]` keeps the log-sum-exp. A sequence's keys are gathered into scratch.
///
/// # Panics
/// When sizes do not fit, or a page that is needed does not exist.
pub fn paged_attention<T: Float>(
    s: &PagedShape,
    q: &[T],
    k_pages: &[T],
    v_pages: &[T],
    table: &[i32],
    lens: &[i32],
    out: &mut [T],
    lse: &mut [f32],
) {
    let count = s.check(
        [q.len(), k_pages.len(), v_pages.len()],
        [table.len(), lens.len()],
        [out.len(), lse.len()],
    );
    let (row, key) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
    let most = table.len() / s.batch.max(1);
    let (mut k, mut v) = (vec![], vec![]);
    for (b, len) in lens.iter().enumerate() {
        let len = (*len).max(0) as usize;
        assert!(len <= most * s.page, "paged_attention: {len} keys in {most} pages of {}", s.page);
        k.clear();
        v.clear();
        for (i, id) in table[b * most..][..len.div_ceil(s.page)].iter().enumerate() {
            let id = usize::try_from(*id).ok().filter(|id| *id < count);
            let Some(id) = id else {
                panic!("paged_attention: page {i} of sequence {b} is none of {count}")
            };
            let held = id * s.page * key..(id * s.page + s.page.min(len - i * s.page)) * key;
            k.extend_from_slice(&k_pages[held.clone()]);
            v.extend_from_slice(&v_pages[held]);
        }
        let dense = AttentionShape { batch: 1, kv_len: len, ..s.dense(0) };
        let (q, out) = (&q[b * row..(b + 1) * row], &mut out[b * row..(b + 1) * row]);
        flash_attention(&dense, q, &k, &v, out, &mut lse[b * s.heads..(b + 1) * s.heads]);
    }
}
