//! What can go wrong: who asked, how much, and what is in the way.

use crate::space::Tier;
use crate::state::State;

/// The result of a request.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why memory could not be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A payload larger than a chunk.
    #[error("{key}: {bytes} bytes do not fit a chunk of {chunk}; make chunks larger")]
    TooLarge {
        /// The owner.
        key: String,
        /// What it wants.
        bytes: usize,
        /// A chunk's size.
        chunk: usize,
    },
    /// A key that was inserted twice.
    #[error("{0} is held already")]
    Twice(String),
    /// A key that was never inserted.
    #[error("{0} is not held; insert it first")]
    Unknown(String),
    /// A change of state that does not exist.
    #[error("{key} cannot go from {from:?} to {to:?}")]
    State {
        /// The owner.
        key: String,
        /// Its state.
        from: State,
        /// The state asked for.
        to: State,
    },
    /// No room, and nothing that may leave.
    #[error(
        "{tier:?} tier: no room for {bytes} bytes within its budget of {budget}: {in_use} bytes are \
         in use and cannot move; release some or raise the budget"
    )]
    Full {
        /// Where.
        tier: Tier,
        /// What was wanted.
        bytes: usize,
        /// What it may hold.
        budget: usize,
        /// What cannot move.
        in_use: usize,
    },
}
