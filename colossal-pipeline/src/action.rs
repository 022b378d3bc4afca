//! What a rank does next: a pass of one microbatch through its stage.

/// One step of a rank. Sends and receives follow from the stage: a forward needs the activation
/// of the stage before, a backward the gradient of the stage after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// The forward pass of a microbatch.
    Forward {
        /// Which stage.
        stage: usize,
        /// Which microbatch.
        microbatch: usize,
    },
    /// The backward pass of a microbatch: gradients of inputs and weights.
    Backward {
        /// Which stage.
        stage: usize,
        /// Which microbatch.
        microbatch: usize,
    },
}

impl Action {
    /// The stage it runs.
    pub fn stage(self) -> usize {
        match self {
            Action::Forward { stage, .. } | Action::Backward { stage, .. } => stage,
        }
    }

    /// The microbatch it runs.
    pub fn microbatch(self) -> usize {
        match self {
            Action::Forward { microbatch, .. } | Action::Backward { microbatch, .. } => microbatch,
        }
    }

    /// Actions that must be done before it, on whatever rank.
    pub fn needs(self, stages: usize) -> impl Iterator<Item = Action> {
        let (a, b) = match self {
            Action::Forward { stage: 0, .. } => (None, None),
            Action::Forward { stage, microbatch } => {
                (Some(Action::Forward { stage: stage - 1, microbatch }), None)
            }
            Action::Backward { stage, microbatch } => (
                Some(Action::Forward { stage, microbatch }),
                (stage + 1 < stages).then_some(Action::Backward { stage: stage + 1, microbatch }),
            ),
        };
        a.into_iter().chain(b)
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Action::Forward { microbatch, .. } => write!(f, "F{microbatch}"),
            Action::Backward { microbatch, .. } => write!(f, "B{microbatch}"),
        }
    }
}
