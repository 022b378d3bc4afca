//! Attention of few queries to many keys: decoding against a cache, dense or in pages, keys split among
//! blocks.

use super::attention::{Call, Lengths};
use super::launch::{Plain, resident};
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::attention::{AttentionShape, PagedShape};
use crate::float::Float;

pub(super) static DECODE: Source = source!("decode", "attention_shape");

/// Rows of queries of a block: `ROWS` of the kernel.
const ROWS: usize = 4;

/// Are there so few queries that keys are split instead?
pub(super) fn fits(s: &AttentionShape<'_>) -> bool {
    s.q_len * (s.heads / s.kv_heads) <= 4 * ROWS
}

/// `Pages` of the kernel.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Pages {
    table: u64,
    row: u32,
    shift: u32,
    count: u32,
    padding: u32,
}

/// One query a sequence against a cache in pages: the twin of
/// [`paged_attention`](crate::paged_attention). Lengths and tables are on the device, and may change under
/// a captured graph. A page that does not exist gives NaN.
///
/// # Errors
/// As [`flash_attention`](super::flash_attention).
pub fn paged_attention<T: Float>(
    stream: &Stream,
    s: &PagedShape,
    q: Slice<'_, T>,
    k_pages: Slice<'_, T>,
    v_pages: Slice<'_, T>,
    table: Slice<'_, i32>,
    lens: Slice<'_, i32>,
    out: SliceMut<'_, T>,
    lse: SliceMut<'_, f32>,
) -> Result<()> {
    let count = s.check(
        [q.len(), k_pages.len(), v_pages.len()],
        [table.len(), lens.len()],
        [out.len(), lse.len()],
    );
    let pages = Pages {
        table: table.address(),
        row: (table.len() / s.batch.max(1)) as u32,
        shift: s.page.trailing_zeros(),
        count: count as u32,
        padding: 0,
    };
    let dense = s.dense(table.len());
    Call::with::<T>(stream, &dense, Lengths::There(lens), |call| {
        decode(call, &dense, q, k_pages, v_pages, out, lse, pages)
    })
}

/// One query a sequence against a cache: [`flash_attention`](super::flash_attention) where the numbers of
/// keys are on the device, and may change under a captured graph. `s.kv_len` is the most there may be, by
/// which keys are split among blocks.
///
/// # Errors
/// As [`flash_attention`](super::flash_attention).
///
/// # Panics
/// When sizes do not fit, for more than one query, and for lengths on the host.
pub fn cached_attention<T: Float>(
    stream: &Stream,
    s: &AttentionShape<'_>,
    lens: Slice<'_, i32>,
    q: Slice<'_, T>,
    k: Slice<'_, T>,
    v: Slice<'_, T>,
    out: SliceMut<'_, T>,
    lse: SliceMut<'_, f32>,
) -> Result<()> {
    s.check(q.len(), k.len(), v.len(), out.len(), lse.len());
    assert!(
        s.q_len == 1 && lens.len() == s.batch && s.q_lens.is_none() && s.kv_lens.is_none(),
        "cached_attention: one query and one length a sequence, lengths on the device alone"
    );
    Call::with::<T>(stream, s, Lengths::There(lens), |call| {
        decode(call, s, q, k, v, out, lse, Pages::default())
    })
}

pub(super) fn decode<T: Float>(
    call: &Call<'_>,
    s: &AttentionShape<'_>,
    q: Slice<'_, T>,
    k: Slice<'_, T>,
    v: Slice<'_, T>,
    out: SliceMut<'_, T>,
    lse: SliceMut<'_, f32>,
    pages: Pages,
) -> Result<()> {
    let rows = lse.len();
    if rows == 0 {
        return Ok(());
    }
    let heads = s.kv_heads * (s.q_len * (s.heads / s.kv_heads)).div_ceil(ROWS);
    // Enough blocks for the device, of at least 64 keys each.
    let most = resident(call.stream).div_ceil(heads * s.batch);
    let span = s.kv_len.div_ceil(most).next_multiple_of(64).max(64);
    let splits = s.kv_len.div_ceil(span).max(1);
    let defines = [("TYPE", call.ty), ("D", call.label)];
    let shares = call.stream.function(&DECODE, &defines, "decode")?;
    let combine = call.stream.function(&DECODE, &defines, "decode_combine")?;
    let room = rows * splits * (call.room + 2);
    call.stream.with_scratch(room, |mut scratch: SliceMut<'_, f32>| {
        let blocks = [splits as u32, heads as u32, s.batch as u32];
        let grid = Grid { blocks, threads: [128, 1, 1], shared: 0 };
        let scratch = scratch.reborrow();
        shares.launch(grid, args![q, k, v, scratch, span as u32, call.shape, Plain(pages)])?;
        let grid = Grid::line(rows.div_ceil(4), 128);
        combine.launch(grid, args![scratch, splits as u32, out, lse, rows as u32, call.shape])
    })
}
