//! Rows of a table, and gradients scattered back.

use super::launch::per_row;
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;

pub(super) static EMBEDDING: Source = source!("embedding");

/// `y[i] = table[ids[i]]`; ids outside the table give zeros (another rank holds that row).
pub fn embedding<T: Float>(
    stream: &Stream,
    ids: Slice<'_, i32>,
    table: Slice<'_, T>,
    dim: usize,
    y: SliceMut<'_, T>,
) -> Result<()> {
    assert_eq!(y.len(), ids.len() * dim, "embedding: y must have one row per id");
    let entries = table.len().checked_div(dim).unwrap_or(0) as u64;
    let f = stream.function(&EMBEDDING, &[("TYPE", T::CUDA)], "embedding")?;
    f.launch(per_row::<T>(ids.len(), dim, 256), args![ids, table, entries, dim as u32, y])
}

/// `dtable[ids[i]] += dy[i]`; ids outside the table are skipped. Repeated ids are added in order.
pub fn embedding_backward<T: Float>(
    stream: &Stream,
    ids: Slice<'_, i32>,
    dy: Slice<'_, T>,
    dim: usize,
    dtable: SliceMut<'_, f32>,
) -> Result<()> {
    assert_eq!(dy.len(), ids.len() * dim, "embedding_backward: dy must have one row per id");
    let entries = dtable.len().checked_div(dim).unwrap_or(0);
    let (tokens, types) = (ids.len(), [("TYPE", T::CUDA)]);
    let columns = dim.div_ceil(256 * 16 / size_of::<T>()) as u32;
    let grid = Grid { blocks: [tokens as u32, columns, 1], ..Grid::line(1, 256) };
    // Three numbers of each id, how much of the lists is taken, and the lists.
    let known = 3 * entries + 1;
    stream.with_scratch(known + tokens, |mut scratch: SliceMut<'_, u32>| {
        stream.zero(scratch.reborrow().range(0..known))?;
        let of = scratch.address();
        let (taken, list) = (of + 12 * entries as u64, of + 4 * known as u64);
        let each = Grid::line(tokens.div_ceil(256), 256);
        let (n, entries) = (tokens as u32, entries as u64);
        let f = |name| stream.function(&EMBEDDING, &types, name);
        f("embedding_count")?.launch(each, args![ids, n, entries, of])?;
        f("embedding_room")?.launch(each, args![ids, n, entries, of, taken])?;
        f("embedding_list")?.launch(each, args![ids, n, entries, of, list])?;
        let args = args![ids, n, dy, dim as u32, dtable, entries, of, list];
        f("embedding_backward")?.launch(grid, args)
    })
}
