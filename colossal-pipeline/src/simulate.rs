//! How long a schedule takes and how much it holds, before it runs.

use std::collections::HashMap;

use crate::action::Action;
use crate::error::Result;
use crate::schedule::Schedule;

/// What actions cost, in any unit of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// A forward pass of one microbatch through one stage.
    pub forward: f64,
    /// A backward pass.
    pub backward: f64,
}

/// A simulated step.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// From the first start to the last end.
    pub makespan: f64,
    /// Idle time over ideal time: `makespan / ideal - 1`.
    pub bubble: f64,
    /// Most microbatches each rank holds activations of at once.
    pub peak_activations: Vec<usize>,
    /// `(rank, action, start, end)`, by start.
    pub spans: Vec<(usize, Action, f64, f64)>,
}

impl Schedule {
    /// Runs the schedule in thought: every action begins when its rank is free and what it needs
    /// is done.
    ///
    /// # Errors
    /// [`Error::Deadlock`](crate::Error::Deadlock).
    pub fn simulate(&self, cost: &Cost) -> Result<Timeline> {
        let mut ends: HashMap<Action, f64> = HashMap::new();
        let mut free = vec![0.0f64; self.ranks.len()];
        let mut held = vec![0usize; self.ranks.len()];
        let mut peak = held.clone();
        let mut spans = Vec::new();
        self.in_order(|rank, action| {
            let ready =
                action.needs(self.stages).filter_map(|n| ends.get(&n)).fold(0.0, |a, b| b.max(a));
            let start = free[rank].max(ready);
            let end = match action {
                Action::Forward { .. } => {
                    held[rank] += 1;
                    peak[rank] = peak[rank].max(held[rank]);
                    start + cost.forward
                }
                Action::Backward { .. } => {
                    held[rank] -= 1;
                    start + cost.backward
                }
            };
            free[rank] = end;
            ends.insert(action, end);
            spans.push((rank, action, start, end));
        })?;
        spans.sort_by(|a, b| a.2.total_cmp(&b.2).then(a.0.cmp(&b.0)));
        let makespan = free.into_iter().fold(0.0, f64::max);
        let per_rank = (self.stages * self.microbatches) as f64 / self.ranks.len() as f64;
        let ideal = per_rank * (cost.forward + cost.backward);
        Ok(Timeline { makespan, bubble: makespan / ideal - 1.0, peak_activations: peak, spans })
    }
}

impl std::fmt::Display for Timeline {
    /// One line a rank, one column a unit of time, the microbatch's last digit where it is busy;
    /// backward passes are in brackets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self.makespan.ceil() as usize;
        for rank in 0..self.peak_activations.len() {
            let mut line = vec![' '; width];
            for (_, action, start, end) in self.spans.iter().filter(|s| s.0 == rank) {
                let digit = char::from(b'0' + (action.microbatch() % 10) as u8);
                let (first, last) = (*start as usize, (end.ceil() as usize).min(width));
                line[first..last].fill(digit);
                if matches!(action, Action::Backward { .. }) && last - first > 1 {
                    line[first..last - 1].fill('[');
                }
            }
            writeln!(f, "rank {rank} |{}|", line.iter().collect::<String>())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{gpipe, one_f_one_b};

    proptest! {
        #[test]
        fn bubble_and_activations_follow_the_formulas(
            p in 1usize..8, m in 1usize..12, f in 1u32..5, b in 1u32..9,
        ) {
            let cost = Cost { forward: f64::from(f), backward: f64::from(b) };
            for schedule in [gpipe(p, m), one_f_one_b(p, m)] {
                schedule.validate().unwrap();
                let t = schedule.simulate(&cost).unwrap();
                prop_assert!((t.bubble - (p - 1) as f64 / m as f64).abs() < 1e-9, "{}", t);
            }
            let peaks = gpipe(p, m).simulate(&cost).unwrap().peak_activations;
            prop_assert_eq!(peaks, vec![m; p]);
            let peaks = one_f_one_b(p, m).simulate(&cost).unwrap().peak_activations;
            prop_assert_eq!(peaks, (0..p).map(|i| m.min(p - i)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_drawing_of_1f1b() {
        let t = one_f_one_b(2, 2).simulate(&Cost { forward: 1.0, backward: 2.0 }).unwrap();
        assert_eq!(t.to_string(), "rank 0 |01  [0 [1|\nrank 1 | 0[01[1  |\n");
    }
}
