//! What is wrong with a schedule.

use crate::action::Action;

/// The result of checking a schedule.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a schedule cannot run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An action is not in any rank's list.
    #[error("{0:?} is missing: every stage runs every microbatch forward and backward once")]
    Missing(Action),
    /// An action is in the lists twice.
    #[error("{0:?} occurs twice")]
    Twice(Action),
    /// An action names a stage or microbatch that does not exist.
    #[error("{action:?} is outside of {stages} stages and {microbatches} microbatches")]
    Outside {
        /// The action.
        action: Action,
        /// Stages of the schedule.
        stages: usize,
        /// Microbatches of the schedule.
        microbatches: usize,
    },
    /// Ranks wait for one another.
    #[error("deadlock: {}", waiting.iter().map(|(r, a)| format!("rank {r} waits to run {a:?}")).collect::<Vec<_>>().join(", "))]
    Deadlock {
        /// Each rank that is stuck, and the action it cannot begin.
        waiting: Vec<(usize, Action)>,
    },
}
