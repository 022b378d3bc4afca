//! Reductions over ranks whose buffers one device can reach.

use super::launch::Plain;
use super::{Error, Grid, Result, Source, Stream, args, source};

pub(super) static RANKS: Source = source!("ranks");

/// Types, as kernels name them, and their sizes.
pub(super) const TYPES: [(&str, usize); 10] = [
    ("float", 4),
    ("double", 8),
    ("bf16", 2),
    ("f16", 2),
    ("i8", 1),
    ("u8", 1),
    ("int", 4),
    ("u32", 4),
    ("i64", 8),
    ("u64", 8),
];

/// Ranks that one launch takes.
const MOST: usize = 32;

/// What is done with one element of each source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankOp {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// Reduces `len` elements of the type of this kernel name (`"bf16"`) at each source address, in
/// their order, into every target. A target may be a source. Halves are reduced in f32 and rounded
/// once; integers wrap.
///
/// # Errors
/// [`Error::Unsupported`] for more than 32 ranks or a type that is not known.
///
/// # Safety
/// All addresses hold `len` elements that this stream's device can reach, as
/// [`Slice::from_raw`](super::Slice::from_raw) says; nobody else touches them meanwhile.
pub unsafe fn reduce_ranks(
    stream: &Stream,
    ty: &str,
    op: RankOp,
    sources: &[u64],
    targets: &[u64],
    len: usize,
) -> Result<()> {
    let known = TYPES.iter().find(|(name, _)| *name == ty);
    let (Some((ty, size)), ..=MOST, ..=MOST) = (known, sources.len(), targets.len()) else {
        let reason = format!("{} ranks of {ty}; it is built for up to {MOST}", sources.len());
        return Err(Error::Unsupported { kernel: "reduce_ranks", reason });
    };
    let many = |addresses: &[u64]| {
        let mut all = [0u64; MOST];
        all[..addresses.len()].copy_from_slice(addresses);
        Plain(all)
    };
    let f = stream.function(&RANKS, &[("TYPE", ty)], "reduce_ranks")?;
    let grid = Grid::line(len.div_ceil(256 * 16 / size), 256);
    let (n, m) = (sources.len() as u32, targets.len() as u32);
    f.launch(grid, args![many(sources), many(targets), n, m, op as u32, len as u64])
}
