//! The one synchronisation primitive: a barrier that knows who is missing and never hangs.
//!
//! A rank arrives by adding itself to a counter; the last one resets it and starts the next
//! generation. Waiters look for a few microseconds (only when every rank can have a core), yield,
//! then sleep on a condition variable. A waiter counts itself as a sleeper and looks at the
//! generation a last time under the lock; the last arrival takes the lock after it has changed
//! the generation. Whoever is second sees what the first did, so no wake-up is lost; when nobody
//! sleeps, nobody is woken. Checked by loom.

#[cfg(loom)]
use loom::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
};
#[cfg(not(loom))]
use std::sync::{
    Condvar, Mutex,
    atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Barrier {
    ranks: usize,
    arrived: AtomicUsize,
    generation: AtomicU64,
    /// Generations each rank has arrived for: who is missing is who lags.
    progress: Vec<AtomicU64>,
    /// How many sleep.
    sleepers: Mutex<usize>,
    wake: Condvar,
    #[cfg_attr(loom, allow(dead_code))]
    spin: u32,
}

/// Why a wait ended without everybody.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// These ranks did not come in time.
    Missing(Vec<usize>),
    /// Somebody declared the group failed.
    Stopped,
}

impl Barrier {
    pub(crate) fn new(ranks: usize) -> Barrier {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Barrier {
            ranks,
            arrived: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            progress: (0..ranks).map(|_| AtomicU64::new(0)).collect(),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
            spin: if ranks <= cores { 2000 } else { 0 },
        }
    }

    /// Waits until every rank has arrived, or `stopped()` says that it is useless.
    pub(crate) fn wait(
        &self,
        rank: usize,
        timeout: Duration,
        stopped: impl Fn(&[usize]) -> bool,
    ) -> Result<(), Broken> {
        let generation = self.generation.load(SeqCst);
        self.progress[rank].store(generation + 1, SeqCst);
        if self.arrived.fetch_add(1, SeqCst) + 1 == self.ranks {
            self.arrived.store(0, SeqCst);
            self.generation.store(generation + 1, SeqCst);
            self.wake_sleepers();
            return Ok(());
        }
        let passed = || self.generation.load(SeqCst) != generation;
        #[cfg(not(loom))]
        {
            for _ in 0..self.spin {
                if passed() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            for _ in 0..4 {
                std::thread::yield_now();
                if passed() {
                    return Ok(());
                }
            }
        }
        self.sleep(generation, passed, timeout, stopped)
    }

    fn sleep(
        &self,
        generation: u64,
        passed: impl Fn() -> bool,
        timeout: Duration,
        stopped: impl Fn(&[usize]) -> bool,
    ) -> Result<(), Broken> {
        #[cfg(not(loom))]
        let deadline = std::time::Instant::now() + timeout;
        #[cfg(loom)]
        let _ = timeout;
        let mut guard = self.sleepers.lock().unwrap_or_else(|e| e.into_inner());
        *guard += 1;
        let result = loop {
            if passed() {
                break Ok(());
            }
            if stopped(&self.missing(generation)) {
                // Everybody may have arrived while we looked.
                break if passed() { Ok(()) } else { Err(Broken::Stopped) };
            }
            #[cfg(not(loom))]
            {
                let now = std::time::Instant::now();
                if now >= deadline {
                    break Err(Broken::Missing(self.missing(generation)));
                }
                guard = match self.wake.wait_timeout(guard, deadline - now) {
                    Ok((guard, _)) => guard,
                    Err(e) => e.into_inner().0,
                };
            }
            #[cfg(loom)]
            {
                guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
            }
        };
        *guard -= 1;
        result
    }

    /// Wakes everybody who sleeps, to look again.
    pub(crate) fn wake_sleepers(&self) {
        let anybody = *self.sleepers.lock().unwrap_or_else(|e| e.into_inner()) > 0;
        if anybody {
            self.wake.notify_all();
        }
    }

    /// Who has not arrived for this generation.
    fn missing(&self, generation: u64) -> Vec<usize> {
        (0..self.ranks).filter(|r| self.progress[*r].load(SeqCst) <= generation).collect()
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    /// Everybody who passes the barrier sees what everybody wrote before it, twice in a row.
    #[test]
    fn loom_no_wake_up_is_lost() {
        loom::model(|| {
            let barrier = Arc::new(Barrier::new(2));
            let written = Arc::new(AtomicUsize::new(0));
            let other = {
                let (barrier, written) = (barrier.clone(), written.clone());
                loom::thread::spawn(move || {
                    for round in 1..=2 {
                        written.fetch_add(1, SeqCst);
                        barrier.wait(1, LONG, |_| false).unwrap();
                        assert!(written.load(SeqCst) >= 2 * round);
                    }
                })
            };
            for round in 1..=2 {
                written.fetch_add(1, SeqCst);
                barrier.wait(0, LONG, |_| false).unwrap();
                assert!(written.load(SeqCst) >= 2 * round);
            }
            other.join().unwrap();
        });
    }

    /// A rank that fails instead of arriving wakes the one that waits.
    #[test]
    fn loom_a_failure_wakes_the_waiter() {
        loom::model(|| {
            let barrier = Arc::new(Barrier::new(2));
            let failed = Arc::new(AtomicUsize::new(0));
            let other = {
                let (barrier, failed) = (barrier.clone(), failed.clone());
                loom::thread::spawn(move || {
                    failed.store(1, SeqCst);
                    barrier.wake_sleepers();
                })
            };
            let result = barrier.wait(0, LONG, |_| failed.load(SeqCst) == 1);
            assert_eq!(result, Err(Broken::Stopped));
            other.join().unwrap();
        });
    }
}
