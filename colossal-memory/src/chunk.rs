//! A run of memory that holds several payloads and moves as one.

use crate::space::Tier;

/// Which chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(pub(crate) usize);

#[derive(Debug)]
pub(crate) struct Chunk<P> {
    /// Absent while every payload is free and the memory was dropped.
    pub(crate) memory: Option<(Tier, P)>,
    /// Bytes given out, from the start.
    pub(crate) used: usize,
    /// Payloads in `Compute`.
    pub(crate) computing: usize,
    /// Payloads whose values matter.
    pub(crate) holding: usize,
    /// When it was last used.
    pub(crate) touched: u64,
}
