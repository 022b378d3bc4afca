//! What can go wrong between ranks: which op, who is missing, what each side called and where.

use std::sync::Arc;
use std::time::Duration;

/// The result of a collective.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a collective could not be completed. After any of these but [`Error::Argument`] the group
/// is unusable: every later call on it, on every rank, returns the first failure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Ranks did not arrive in time.
    #[error(
        "{op} (call {sequence} of group {group}): rank {rank} waited {waited:?} for rank(s) {missing:?}; {doing}"
    )]
    Timeout {
        /// What was called, and where.
        op: String,
        /// The name of the group.
        group: Arc<str>,
        /// Which call of this group it was, counted from 0.
        sequence: u64,
        /// Who gave up.
        rank: usize,
        /// Who did not come.
        missing: Vec<usize>,
        /// How long it waited.
        waited: Duration,
        /// What every rank is in, or did last.
        doing: String,
    },
    /// Ranks called different things.
    #[error(
        "call {sequence} of group {group}: rank {left_rank} called {left}, rank {right_rank} called {right}; every rank must call the same collective with the same type and length"
    )]
    Mismatch {
        /// The name of the group.
        group: Arc<str>,
        /// Which call of this group it was.
        sequence: u64,
        /// One rank.
        left_rank: usize,
        /// What it called, and where.
        left: String,
        /// Another rank.
        right_rank: usize,
        /// What it called, and where.
        right: String,
    },
    /// A rank panicked, or dropped its group, while others waited for it.
    #[error(
        "{op} (call {sequence} of group {group}): rank {rank} is gone ({how}); it will never arrive"
    )]
    Gone {
        /// What was called, and where.
        op: String,
        /// The name of the group.
        group: Arc<str>,
        /// Which call of this group it was.
        sequence: u64,
        /// Who is gone.
        rank: usize,
        /// Panicked, or dropped its group.
        how: String,
    },
    /// The library under an engine refused, or could not be used.
    #[error("{op}: {reason}")]
    Engine {
        /// What was called.
        op: String,
        /// What it said, and what to do.
        reason: String,
    },
    /// An argument of this rank alone is wrong; nothing was sent and the group stays usable.
    #[error("{op}: {reason}")]
    Argument {
        /// What was called.
        op: &'static str,
        /// What is wrong and what would fit.
        reason: String,
    },
}

impl Error {
    /// Did ranks not arrive in time?
    pub fn is_timeout(&self) -> bool {
        matches!(self, Error::Timeout { .. })
    }

    /// Did ranks call different things?
    pub fn is_mismatch(&self) -> bool {
        matches!(self, Error::Mismatch { .. })
    }

    /// Did a rank leave?
    pub fn is_gone(&self) -> bool {
        matches!(self, Error::Gone { .. })
    }
}
