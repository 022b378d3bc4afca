//! Attention of few queries to many keys: decoding against a cache, keys split among blocks.

use super::attention::Call;
use super::launch::resident;
use super::{Grid, Result, Slice, SliceMut, Source, args, source};
use crate::attention::AttentionShape;
use crate::float::Float;

pub(super) static DECODE: Source = source!("decode", "attention_shape");

/// Rows of queries of a block: `ROWS` of the kernel.
const ROWS: usize = 4;

/// Are there so few queries that keys are split instead?
pub(super) fn fits(s: &AttentionShape<'_>) -> bool {
    s.q_len * (s.heads / s.kv_heads) <= 4 * ROWS
}

pub(super) fn decode<T: Float>(
    call: &Call<'_>,
    s: &AttentionShape<'_>,
    q: Slice<'_, T>,
    k: Slice<'_, T>,
    v: Slice<'_, T>,
    out: SliceMut<'_, T>,
    lse: SliceMut<'_, f32>,
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
        shares.launch(grid, args![q, k, v, scratch.reborrow(), span as u32, call.shape])?;
        let grid = Grid::line(rows.div_ceil(4), 128);
        combine.launch(grid, args![scratch, splits as u32, out, lse, rows as u32, call.shape])
    })
}
