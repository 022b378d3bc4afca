//! The one synchronisation primitive: a count that everybody waits for, that either reaches its
//! target or fails, never both, and whose waiters sleep.
//!
//! One word holds the count, whether it has failed, and whether somebody sleeps. Whoever brings
//! the count to its target takes the sleepers' bit away in the same exchange and, if it was set,
//! wakes them under the lock. A waiter sets the bit under the lock, looks once more, and sleeps:
//! an arrival before the bit is seen by the look, one after it sees the bit. Targets only grow,
//! and nobody waits for the next before all have come to this one. Checked by loom.

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, Ordering::*},
};
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, Ordering::*},
};
use std::time::Duration;

const SLEEPING: u64 = 1;
const FAILED: u64 = 2;
const ONE: u64 = 4;

/// A count that only grows.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(align(128)))]
pub(crate) struct Count {
    word: AtomicU64,
    lock: Mutex<()>,
    wake: Condvar,
}

/// How a wait ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// The target was reached.
    Reached,
    /// Somebody declared the count failed before that.
    Failed,
    /// The caller's `stop` said that it is useless.
    Stopped,
}

/// How long a waiter looks before it sleeps.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(loom, allow(dead_code))]
pub(crate) struct Patience {
    /// Looks with the core kept.
    pub(crate) spins: u32,
    /// Looks with the core offered to others.
    pub(crate) yields: u32,
}

impl Count {
    pub(crate) fn new() -> Count {
        Count { word: AtomicU64::new(0), lock: Mutex::new(()), wake: Condvar::new() }
    }

    /// Adds `n` on the way to `target`; false when the count has failed.
    pub(crate) fn add(&self, n: u64, target: u64) -> bool {
        let mut word = self.word.load(Relaxed);
        loop {
            if word & FAILED != 0 {
                return false;
            }
            let mut next = word + n * ONE;
            if next / ONE == target {
                next &= !SLEEPING;
            }
            match self.word.compare_exchange_weak(word, next, AcqRel, Relaxed) {
                Ok(_) if word & SLEEPING != next & SLEEPING => {
                    self.wake_sleepers();
                    return true;
                }
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
    }

    /// Fails the count unless it has reached `target`; false when it has.
    pub(crate) fn fail(&self, target: u64) -> bool {
        let mut word = self.word.load(Acquire);
        loop {
            if word / ONE >= target {
                return false;
            }
            match self.word.compare_exchange_weak(word, word | FAILED, AcqRel, Acquire) {
                Ok(_) => {
                    self.wake_sleepers();
                    return true;
                }
                Err(now) => word = now,
            }
        }
    }

    /// Has it failed?
    pub(crate) fn has_failed(&self) -> bool {
        self.word.load(Acquire) & FAILED != 0
    }

    /// Waits until the count is at `target`. A sleeper asks `stop` when it is woken, and at least
    /// once in `nap`.
    pub(crate) fn wait(
        &self,
        target: u64,
        patience: Patience,
        nap: Duration,
        mut stop: impl FnMut() -> bool,
    ) -> Wait {
        let over = |word: u64| {
            if word / ONE >= target {
                Some(Wait::Reached)
            } else if word & FAILED != 0 {
                Some(Wait::Failed)
            } else {
                None
            }
        };
        #[cfg(not(loom))]
        {
            for _ in 0..patience.spins {
                if let Some(wait) = over(self.word.load(Acquire)) {
                    return wait;
                }
                std::hint::spin_loop();
            }
            for _ in 0..patience.yields {
                if let Some(wait) = over(self.word.load(Acquire)) {
                    return wait;
                }
                std::thread::yield_now();
            }
        }
        #[cfg(loom)]
        let _ = (patience, nap);
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(wait) = over(self.word.fetch_or(SLEEPING, AcqRel)) {
                return wait;
            }
            if stop() {
                // The caller decides by `fail`, which knows whether the target was reached.
                return Wait::Stopped;
            }
            #[cfg(not(loom))]
            {
                guard = match self.wake.wait_timeout(guard, nap) {
                    Ok((guard, _)) => guard,
                    Err(e) => e.into_inner().0,
                };
            }
            #[cfg(loom)]
            {
                guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
            }
        }
    }

    /// Wakes everybody who sleeps, to look again.
    pub(crate) fn wake_sleepers(&self) {
        drop(self.lock.lock());
        self.wake.notify_all();
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    use super::*;

    const NOW: Patience = Patience { spins: 0, yields: 0 };
    const LONG: Duration = Duration::from_secs(3600);

    /// Everybody who is past the count sees what everybody wrote before it, twice in a row.
    #[test]
    fn loom_no_wake_up_is_lost() {
        // Every interleaving with up to three preemptions: all of them take minutes.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let count = Arc::new(Count::new());
            let written = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
            let rank = |me: usize, count: &Count, written: &[AtomicUsize; 2]| {
                for round in 1..=2 {
                    written[me].store(round, Relaxed);
                    assert!(count.add(1, 2 * round as u64));
                    assert_eq!(count.wait(2 * round as u64, NOW, LONG, || false), Wait::Reached);
                    assert!(written[1 - me].load(Relaxed) >= round);
                }
            };
            let other = {
                let (count, written) = (count.clone(), written.clone());
                loom::thread::spawn(move || rank(1, &count, &written))
            };
            rank(0, &count, &written);
            other.join().unwrap();
        });
    }

    /// A rank that arrives and one that gives up agree on what happened.
    #[test]
    fn loom_reached_or_failed_never_both() {
        loom::model(|| {
            let count = Arc::new(Count::new());
            let other = {
                let count = count.clone();
                loom::thread::spawn(move || count.add(1, 2))
            };
            assert!(count.add(1, 2));
            let gave_up = count.fail(2);
            let arrived = other.join().unwrap();
            assert_ne!(gave_up, arrived);
            assert_eq!(count.has_failed(), gave_up);
        });
    }

    /// A failure wakes the one that waits.
    #[test]
    fn loom_a_failure_wakes_the_waiter() {
        loom::model(|| {
            let count = Arc::new(Count::new());
            let other = {
                let count = count.clone();
                loom::thread::spawn(move || count.fail(2))
            };
            assert_eq!(count.wait(2, NOW, LONG, || false), Wait::Failed);
            assert!(other.join().unwrap());
        });
    }

    /// So does a rank that leaves, which is told by a flag beside the count.
    #[test]
    fn loom_a_leaver_wakes_the_waiter() {
        loom::model(|| {
            let count = Arc::new(Count::new());
            let gone = Arc::new(AtomicUsize::new(0));
            let other = {
                let (count, gone) = (count.clone(), gone.clone());
                loom::thread::spawn(move || {
                    gone.store(1, Release);
                    count.wake_sleepers();
                })
            };
            assert_eq!(count.wait(2, NOW, LONG, || gone.load(Acquire) == 1), Wait::Stopped);
            other.join().unwrap();
        });
    }
}
