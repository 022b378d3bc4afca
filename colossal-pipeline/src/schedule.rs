//! A schedule: for each rank, what it does in order.

use std::collections::HashSet;

use crate::action::Action;
use crate::error::{Error, Result};

/// The actions of every rank. Make one by hand or by [`gpipe`](crate::gpipe) and
/// [`one_f_one_b`](crate::one_f_one_b).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// What each rank does, in order.
    pub ranks: Vec<Vec<Action>>,
    /// Stages of the pipeline.
    pub stages: usize,
    /// Microbatches of a step.
    pub microbatches: usize,
}

impl Schedule {
    /// Every stage runs every microbatch forward and backward exactly once, and the ranks never
    /// wait for one another in a circle.
    pub fn validate(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for action in self.ranks.iter().flatten() {
            if action.stage() >= self.stages || action.microbatch() >= self.microbatches {
                let (stages, microbatches) = (self.stages, self.microbatches);
                return Err(Error::Outside { action: *action, stages, microbatches });
            }
            if !seen.insert(*action) {
                return Err(Error::Twice(*action));
            }
        }
        for stage in 0..self.stages {
            for microbatch in 0..self.microbatches {
                let both =
                    [Action::Forward { stage, microbatch }, Action::Backward { stage, microbatch }];
                if let Some(missing) = both.into_iter().find(|a| !seen.contains(a)) {
                    return Err(Error::Missing(missing));
                }
            }
        }
        self.in_order(|_, _| {})
    }

    /// Calls `visit(rank, action)` in an order that respects every rank's list and every need.
    pub(crate) fn in_order(&self, mut visit: impl FnMut(usize, Action)) -> Result<()> {
        let mut done = HashSet::new();
        let mut next = vec![0; self.ranks.len()];
        loop {
            let mut moved = false;
            for (rank, actions) in self.ranks.iter().enumerate() {
                while let Some(action) = actions.get(next[rank]) {
                    if !action.needs(self.stages).all(|n| done.contains(&n)) {
                        break;
                    }
                    visit(rank, *action);
                    done.insert(*action);
                    next[rank] += 1;
                    moved = true;
                }
            }
            let waiting: Vec<(usize, Action)> = (0..self.ranks.len())
                .filter_map(|r| self.ranks[r].get(next[r]).map(|a| (r, *a)))
                .collect();
            if waiting.is_empty() {
                return Ok(());
            }
            if !moved {
                return Err(Error::Deadlock { waiting });
            }
        }
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (rank, actions) in self.ranks.iter().enumerate() {
            write!(f, "rank {rank}:")?;
            actions.iter().try_for_each(|a| write!(f, " {a}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gpipe, one_f_one_b};

    #[test]
    fn pictures_of_the_papers() {
        assert_eq!(
            gpipe(2, 3).to_string(),
            "rank 0: F0 F1 F2 B0 B1 B2\nrank 1: F0 F1 F2 B0 B1 B2\n"
        );
        assert_eq!(
            one_f_one_b(3, 4).to_string(),
            "rank 0: F0 F1 F2 B0 F3 B1 B2 B3\n\
             rank 1: F0 F1 B0 F2 B1 F3 B2 B3\n\
             rank 2: F0 B0 F1 B1 F2 B2 F3 B3\n"
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut s = gpipe(2, 2);
        let last = s.ranks[1].pop().unwrap();
        assert_eq!(s.validate(), Err(Error::Missing(last)));
        s.ranks[1].extend([last, last]);
        assert_eq!(s.validate(), Err(Error::Twice(last)));
        let mut s = gpipe(2, 2);
        s.microbatches = 1;
        assert!(matches!(s.validate(), Err(Error::Outside { .. })));
        let mut s = gpipe(2, 1);
        s.ranks[0].reverse();
        let text = s.validate().unwrap_err().to_string();
        assert!(text.contains("rank 0 waits") && text.contains("Backward"), "{text}");
    }
}
