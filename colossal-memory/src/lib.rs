#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod chunk;
mod error;
mod eviction;
mod manager;
mod space;
mod state;

pub use chunk::ChunkId;
pub use error::{Error, Result};
pub use manager::{ChunkManager, InUse, Stats};
pub use space::{Budget, Heap, Space, Tier};
pub use state::State;
