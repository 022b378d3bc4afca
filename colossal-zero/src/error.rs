//! What can go wrong while gradients are reduced.

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a gradient could not be taken or reduced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] colossal_comm::Error),
    /// A gradient that is no part of the flat vector.
    #[error("zero: gradient of {len} elements at {offset} {reason}")]
    Gradient {
        /// Where it was said to start.
        offset: usize,
        /// Its length.
        len: usize,
        /// Why it was refused.
        reason: &'static str,
    },
    /// The memory in which gradients are kept failed: a device is lost, or has no room.
    #[error("zero: {0}")]
    Space(String),
    /// A flat vector of another length.
    #[error("zero: made for {expected} elements, given {given}")]
    Length {
        /// Elements of the flat vector.
        expected: usize,
        /// Elements that were given.
        given: usize,
    },
}
