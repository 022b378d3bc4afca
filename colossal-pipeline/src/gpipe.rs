//! GPipe (Huang et al., 2019): all microbatches forward, then all backward.

use crate::action::Action;
use crate::schedule::Schedule;

/// One stage per rank. Bubble `(p - 1) / m` of the ideal time; `m` activations alive.
pub fn gpipe(ranks: usize, microbatches: usize) -> Schedule {
    let rank = |stage: usize| {
        let forward =
            (0..microbatches).map(move |microbatch| Action::Forward { stage, microbatch });
        let backward =
            (0..microbatches).map(move |microbatch| Action::Backward { stage, microbatch });
        forward.chain(backward).collect()
    };
    Schedule { ranks: (0..ranks).map(rank).collect(), stages: ranks, microbatches }
}
