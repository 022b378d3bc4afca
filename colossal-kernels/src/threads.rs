//! A rank's own compute threads.
//!
//! A rank is a thread; it may own helpers that run pieces of its kernels. Kernels ask for the
//! calling thread's helpers, so ranks never share or fight for them. A rank without helpers (the
//! default) runs everything inline. Helpers look for work for a few microseconds, then sleep; a
//! rank never waits for a helper that has not begun: it does the work itself.
//!
//! Pieces have a home: thread `t` begins with its own share of them and then takes from others.
//! What one kernel wrote is so mostly read by the same core in the next, whose cache has it.

use std::cell::RefCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};

/// A set of compute threads: the calling one and its helpers.
#[derive(Debug, Clone)]
pub struct Threads(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Bits 32..: job number; bit 31: closed; bits 0..31: helpers inside the job.
    state: AtomicU64,
    job: Mutex<Job>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    /// Of the job under way, the next piece of each thread's share.
    shares: Box<[Share]>,
}

/// A counter on a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Share(AtomicUsize);

const CLOSED: u64 = 1 << 31;
const INSIDE: u64 = CLOSED - 1;

/// A borrowed closure and the counter of its pieces; valid while its job is open or has helpers.
#[derive(Debug, Clone, Copy)]
struct Job {
    work: Option<&'static Work>,
}

struct Work {
    run: *const (dyn Fn(usize) + Sync),
    pieces: usize,
    panicked: AtomicBool,
}

impl std::fmt::Debug for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Work").field("pieces", &self.pieces).finish()
    }
}

// SAFETY: `run` points to a Sync closure that outlives the job (see `Threads::run`).
unsafe impl Send for Work {}
// SAFETY: as above; the other fields are atomics.
unsafe impl Sync for Work {}

impl Work {
    /// Works as thread `home`: on its own share, then on what others have not begun.
    fn help(&self, shares: &[Share], home: usize) {
        let threads = shares.len();
        for share in (home..threads).chain(0..home) {
            let end = self.pieces * (share + 1) / threads;
            loop {
                let piece = shares[share].0.fetch_add(1, SeqCst);
                if piece >= end {
                    break;
                }
                // SAFETY: the closure lives until the caller of `run` has seen every helper leave.
                let run = unsafe { &*self.run };
                if catch_unwind(AssertUnwindSafe(|| run(piece))).is_err() {
                    self.panicked.store(true, SeqCst);
                }
            }
        }
    }
}

impl Threads {
    /// This thread and `n - 1` helpers.
    pub fn new(n: usize) -> Threads {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(CLOSED),
            job: Mutex::new(Job { work: None }),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            shares: (0..n.max(1)).map(|_| Share(AtomicUsize::new(0))).collect(),
        });
        let helpers = (1..n)
            .map(|i| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("compute {i}"))
                    .spawn(move || {
                        crate::profile::helper();
                        shared.serve(i);
                    })
                    .expect("the system can start the compute threads that were asked for")
            })
            .collect();
        Threads(Arc::new(Pool { shared, helpers }))
    }

    /// How many threads compute, the calling one included.
    pub fn count(&self) -> usize {
        self.0.helpers.len() + 1
    }

    /// Runs `f(0) .. f(pieces - 1)` over all threads; returns when all are done.
    fn run(&self, pieces: usize, f: &(dyn Fn(usize) + Sync)) {
        let shared = &self.0.shared;
        // SAFETY: only the lifetime is changed; `work` below is not used after this function.
        let run: *const (dyn Fn(usize) + Sync) = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(f)
        };
        let work = Work { run, pieces, panicked: AtomicBool::new(false) };
        // The last job is closed and all have left it: nobody counts now.
        let threads = self.count();
        for (thread, share) in shared.shares.iter().enumerate() {
            share.0.store(pieces * thread / threads, SeqCst);
        }
        // SAFETY: helpers reach `work` only between joining an open job and leaving it; before
        // this function returns the job is closed and every helper has left.
        let borrowed: &'static Work = unsafe { &*std::ptr::from_ref(&work) };
        shared.job.lock().unwrap_or_else(|e| e.into_inner()).work = Some(borrowed);
        let number = (shared.state.load(SeqCst) >> 32) + 1;
        shared.state.store(number << 32, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            drop(shared.lock.lock().unwrap_or_else(|e| e.into_inner()));
            shared.wake.notify_all();
        }
        work.help(&shared.shares, 0);
        shared.state.fetch_or(CLOSED, SeqCst);
        let mut looks = 0u32;
        while shared.state.load(SeqCst) & INSIDE != 0 {
            looks += 1;
            if looks < 20_000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        shared.job.lock().unwrap_or_else(|e| e.into_inner()).work = None;
        assert!(!work.panicked.load(SeqCst), "a piece of a kernel panicked; see the message above");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(self.shared.lock.lock().unwrap_or_else(|e| e.into_inner()));
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper cannot panic outside of `help`, which catches.
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        loop {
            let state = self.await_job(seen);
            if self.stop.load(SeqCst) {
                return;
            }
            seen = state >> 32;
            // Join only while the job is open.
            let mut state = state;
            let joined = loop {
                if state & CLOSED != 0 || state >> 32 != seen {
                    break false;
                }
                match self.state.compare_exchange(state, state + 1, SeqCst, SeqCst) {
                    Ok(_) => break true,
                    Err(now) => state = now,
                }
            };
            if joined {
                let work = self.job.lock().unwrap_or_else(|e| e.into_inner()).work;
                if let Some(work) = work {
                    work.help(&self.shares, thread);
                }
                self.state.fetch_sub(1, SeqCst);
            }
        }
    }

    /// Waits for a job that is newer than `seen`.
    fn await_job(&self, seen: u64) -> u64 {
        let new = || {
            let state = self.state.load(SeqCst);
            (state >> 32 != seen || self.stop.load(SeqCst)).then_some(state)
        };
        for _ in 0..20_000 {
            if let Some(state) = new() {
                return state;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        self.sleepers.fetch_add(1, SeqCst);
        let state = loop {
            if let Some(state) = new() {
                break state;
            }
            guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
        };
        self.sleepers.fetch_sub(1, SeqCst);
        state
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Threads>> = const { RefCell::new(None) };
    static BUSY: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Gives this thread (rank) its compute threads; the ones it had before.
pub fn set(threads: Threads) -> Option<Threads> {
    CURRENT.replace(Some(threads))
}

/// The compute threads of this thread (rank); one, itself, by default.
pub fn current() -> Threads {
    CURRENT.with_borrow(|c| c.clone()).unwrap_or_else(|| Threads::new(1))
}

/// How many threads kernels called from here use: one within a piece of another kernel.
pub fn count() -> usize {
    if BUSY.get() { 1 } else { CURRENT.with_borrow(|c| c.as_ref().map_or(1, Threads::count)) }
}

/// Splits `0..n` into pieces of at least `grain` and runs `f` on each, over the rank's threads.
pub fn parallel_for(n: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
    let threads = CURRENT.with_borrow(|c| c.clone());
    let Some(threads) = threads.filter(|t| t.count() > 1 && n > grain && !BUSY.get()) else {
        if n > 0 {
            f(0..n);
        }
        return;
    };
    // A few pieces a thread even out what the system takes from one of them.
    let pieces = n.div_ceil(grain.max(1)).min(4 * threads.count());
    spread(&threads, pieces, &|i| f(n * i / pieces..n * (i + 1) / pieces));
}

/// Runs `f(0) .. f(n - 1)`, each when a thread of the rank is free for it.
pub(crate) fn parallel_each(n: usize, f: impl Fn(usize) + Sync) {
    let threads = CURRENT.with_borrow(|c| c.clone());
    match threads.filter(|t| t.count() > 1 && n > 1 && !BUSY.get()) {
        Some(threads) => spread(&threads, n, &f),
        None => (0..n).for_each(f),
    }
}

/// Runs the pieces; kernels that they call stay on their thread.
fn spread(threads: &Threads, pieces: usize, f: &(dyn Fn(usize) + Sync)) {
    struct Free;
    impl Drop for Free {
        fn drop(&mut self) {
            BUSY.set(false);
        }
    }
    BUSY.set(true);
    let _free = Free;
    threads.run(pieces, f);
}

/// A mutable slice of which several threads write disjoint parts.
pub(crate) struct Parts<T>(*mut T, usize);

// SAFETY: access goes through `range`, whose callers promise disjoint ranges.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    pub(crate) fn new(slice: &mut [T]) -> Parts<T> {
        Parts(slice.as_mut_ptr(), slice.len())
    }

    pub(crate) fn len(&self) -> usize {
        self.1
    }

    /// Where it starts.
    pub(crate) fn start(&self) -> *mut T {
        self.0
    }

    /// The same promise for `range` alone.
    pub(crate) fn part(&self, range: Range<usize>) -> Parts<T> {
        Parts(self.at(range.clone()), range.len())
    }

    /// Where `range` starts, checked to be in bounds.
    pub(crate) fn at(&self, range: Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.1);
        self.0.wrapping_add(range.start)
    }

    /// The elements of `range`, to be read.
    ///
    /// # Safety
    /// Nobody writes them while the result lives.
    pub(crate) unsafe fn shared(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.1);
        // SAFETY: in bounds by the assertion, not written by contract.
        unsafe { std::slice::from_raw_parts(self.0.add(range.start), range.len()) }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No two live results overlap, and all are dropped before the slice is used again.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.1);
        // SAFETY: in bounds by the assertion, disjoint by contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(range.start), range.len()) }
    }
}

/// Runs `f(first_row, rows of x, rows of y)` over the rank's threads: rows of `xs` and `ys`
/// elements. For the many kernels that map rows to rows.
pub(crate) fn rows<A: Sync, B: Send>(
    x: &[A],
    xs: usize,
    y: &mut [B],
    ys: usize,
    f: impl Fn(usize, &[A], &mut [B]) + Sync,
) {
    let n = y.len().checked_div(ys).unwrap_or(0);
    let grain = (16384 / (xs + ys).max(1)).max(1);
    let parts = Parts::new(y);
    parallel_for(n, grain, |range| {
        // SAFETY: ranges of different pieces are disjoint.
        let y = unsafe { parts.range(range.start * ys..range.end * ys) };
        f(range.start, &x[range.start * xs..range.end * xs], y);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_on_any_number_of_threads() {
        for n in [1, 2, 3] {
            set(Threads::new(n));
            for round in 0..200 {
                let counts: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
                parallel_for(97, 1 + round % 7, |range| {
                    range.for_each(|i| {
                        counts[i].fetch_add(1, SeqCst);
                    });
                });
                assert!(counts.iter().all(|c| c.load(SeqCst) == 1));
            }
        }
        CURRENT.replace(None);
    }

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller_and_the_pool_survives() {
        set(Threads::new(2));
        let result = catch_unwind(AssertUnwindSafe(|| {
            parallel_for(8, 1, |r| assert!(!r.contains(&5), "piece five"));
        }));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        parallel_for(8, 1, |r| {
            done.fetch_add(r.len(), SeqCst);
        });
        assert_eq!(done.load(SeqCst), 8);
        CURRENT.replace(None);
    }
}
