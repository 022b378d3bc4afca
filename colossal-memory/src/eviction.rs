//! Who leaves when room is needed.

use crate::chunk::ChunkId;

/// Least recently used: the chunk that was touched longest ago.
pub(crate) fn least_recently_used(
    candidates: impl Iterator<Item = (ChunkId, u64)>,
) -> Option<ChunkId> {
    candidates.min_by_key(|(id, touched)| (*touched, *id)).map(|(id, _)| id)
}
