//! States of a payload, and the legal moves between them.

/// What its owner does with a payload (PatrickStar's words).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// In use now: its chunk is in the fast tier and does not move.
    Compute,
    /// Its values matter; its chunk may move.
    Hold,
    /// Its values do not matter; a chunk of only these is dropped instead of moved.
    Free,
}

impl State {
    /// May a payload go from here to `to`? Everything but being taken into use twice.
    pub fn may_become(self, to: State) -> bool {
        !(self == State::Compute && to == State::Compute)
    }
}
