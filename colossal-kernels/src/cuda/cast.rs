//! Between float types.

use super::launch::vectors;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::float::Float;

pub(super) static CAST: Source = source!("cast");

/// `y = x` in another type, rounded to nearest even.
pub fn cast<A: Float, B: Float>(
    stream: &Stream,
    x: Slice<'_, A>,
    y: SliceMut<'_, B>,
) -> Result<()> {
    check("cast", x.len(), y.len());
    let f = stream.function(&CAST, &[("FROM", A::CUDA), ("TO", B::CUDA)], "cast")?;
    let grid = match size_of::<A>() < size_of::<B>() {
        true => vectors::<A>(x.len()),
        false => vectors::<B>(x.len()),
    };
    f.launch(grid, args![x, y, x.len() as u64])
}
