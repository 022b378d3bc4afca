//! A large collective, once everybody has posted: chunks that anybody may work on.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::count::Wait;
use super::{Shared, Turn};
use crate::layout::Layout;

/// Bytes of a chunk: large beside a claim, small beside what a rank does in a time slice.
const CHUNK: usize = 64 << 10;

/// A call whose buffers all ranks have posted.
pub(super) struct Work<'a> {
    pub(super) shared: &'a Shared,
    pub(super) layout: &'a Layout<'a>,
}

impl Work<'_> {
    /// A large payload: takes chunks until none is left, and waits for those others took.
    ///
    /// # Safety
    /// Every rank has posted buffers as the call says and comes here, or finds nothing left.
    pub(super) unsafe fn share(&self, rank: usize, turn: &mut Turn) {
        let n = self.shared.ranks;
        let chunk = (CHUNK / self.layout.call.dtype.size()).max(1);
        let (mut mine, mut all) = (0, 0);
        for r in (rank..n).chain(0..rank) {
            let region = self.layout.region(r);
            let (first, count) = (turn.claimed[r], region.div_ceil(chunk) as u64);
            while let Some(claim) = self.claim(r, first + count) {
                let at = (claim - first) as usize * chunk;
                // SAFETY: the claim is ours alone.
                unsafe { self.layout.run(r, at, chunk.min(region - at)) };
                mine += 1;
            }
            turn.claimed[r] += count;
            all += count;
        }
        turn.done += all;
        if mine > 0 {
            self.shared.done.add(mine, turn.done);
        }
        if all > 0 {
            // Whoever holds a chunk runs nothing but the lines above: this ends.
            let nap = Duration::from_secs(1);
            let wait = self.shared.done.wait(turn.done, self.shared.patience, nap, || false);
            debug_assert_eq!(wait, Wait::Reached);
        }
    }

    /// The next chunk of region `r`, counted since the group was made.
    fn claim(&self, r: usize, end: u64) -> Option<u64> {
        let claims = &self.shared.claims[r].0;
        let mut next = claims.load(Relaxed);
        while next < end {
            match claims.compare_exchange_weak(next, next + 1, Relaxed, Relaxed) {
                Ok(_) => return Some(next),
                Err(now) => next = now,
            }
        }
        None
    }
}
