//! 1F1B (PipeDream-flush; Narayanan et al., 2021): after a warm-up, one forward, one backward.

use crate::action::Action;
use crate::schedule::Schedule;

/// One stage per rank. Bubble as GPipe's, `(p - 1) / m`; stage `i` holds `min(m, p - i)`
/// activations.
pub fn one_f_one_b(ranks: usize, microbatches: usize) -> Schedule {
    let rank = |stage: usize| {
        let warm_up = (ranks - stage).min(microbatches);
        let mut actions: Vec<Action> =
            (0..warm_up).map(|microbatch| Action::Forward { stage, microbatch }).collect();
        for microbatch in 0..microbatches {
            actions.push(Action::Backward { stage, microbatch });
            if warm_up + microbatch < microbatches {
                actions.push(Action::Forward { stage, microbatch: warm_up + microbatch });
            }
        }
        actions
    };
    Schedule { ranks: (0..ranks).map(rank).collect(), stages: ranks, microbatches }
}
