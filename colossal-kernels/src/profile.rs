//! A profile of kernels: what was called, on which sizes, for how long, and how near the floor.
//!
//! ```
//! use colossal_kernels::{Floor, profile};
//! profile::start();
//! let mut y = vec![0.0f32; 1000];
//! colossal_kernels::scale(&vec![1.0; 1000], 2.0, &mut y);
//! let profile = profile::stop();
//! println!("{}", profile.table(&Floor::measure()));
//! assert!(profile.chrome_trace().contains("scale"));
//! ```
//!
//! Off, it costs each kernel one relaxed load. Kernels that a kernel calls count as part of it.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use crate::float::Float;
use crate::floor::Floor;

/// What a call has to do, whoever does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// Floating-point operations of matrix products.
    pub flops: u64,
    /// Bytes read and written, each tensor once.
    pub bytes: u64,
}

/// One call.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The kernel, or the name of a phase.
    pub op: &'static str,
    /// The element type; empty for a phase.
    pub dtype: &'static str,
    /// Its sizes; trailing zeros are unused.
    pub dims: [usize; 3],
    /// What it had to do.
    pub work: Work,
    /// The calling thread (rank), numbered as they come.
    pub thread: u32,
    /// Nanoseconds from the start of the profile.
    pub start: u64,
    /// Nanoseconds it took.
    pub took: u64,
}

/// The calls between [`start`] and [`stop`].
#[derive(Debug, Clone, Default)]
pub struct Profile {
    /// In the order in which they ended.
    pub events: Vec<Event>,
    /// Nanoseconds from start to stop.
    pub wall: u64,
}

/// Calls that are kept: what comes after them counts as outside of kernels.
const MOST: usize = 1 << 22;

static ON: AtomicBool = AtomicBool::new(false);
static EVENTS: Mutex<Option<(Instant, Vec<Event>)>> = Mutex::new(None);

thread_local! {
    /// Inside a kernel: calls are part of it.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    static THREAD: Cell<u32> = const { Cell::new(u32::MAX) };
}

/// Records kernel calls of all threads from now on; what was recorded before is forgotten.
pub fn start() {
    *lock() = Some((Instant::now(), Vec::with_capacity(1 << 14)));
    ON.store(true, Relaxed);
}

/// Ends recording and hands out what was recorded.
pub fn stop() -> Profile {
    ON.store(false, Relaxed);
    match lock().take() {
        Some((start, events)) => Profile { events, wall: start.elapsed().as_nanos() as u64 },
        None => Profile::default(),
    }
}

/// Is a profile being recorded?
#[inline]
pub fn is_on() -> bool {
    ON.load(Relaxed)
}

fn lock() -> std::sync::MutexGuard<'static, Option<(Instant, Vec<Event>)>> {
    EVENTS.lock().unwrap_or_else(|e| e.into_inner())
}

/// Records the time until it is dropped.
#[must_use = "a span ends when it is dropped"]
#[derive(Debug)]
pub struct Span(Option<(Instant, Event)>);

/// A phase of a step, as `forward`: shown in the trace, not in the table.
pub fn phase(name: &'static str) -> Span {
    Span(is_on().then(|| (Instant::now(), event(name, "", [0; 3], Work::default()))))
}

/// A kernel call of this thread; nothing inside of another one or on a helper thread.
#[inline]
pub(crate) fn span<T: Float>(
    op: &'static str,
    dims: [usize; 3],
    work: impl FnOnce() -> Work,
) -> Span {
    span_in(op, T::NAME, dims, work)
}

/// As [`span`], of a kernel that computes in a type of this name.
#[inline]
pub(crate) fn span_in(
    op: &'static str,
    dtype: &'static str,
    dims: [usize; 3],
    work: impl FnOnce() -> Work,
) -> Span {
    if !is_on() || INSIDE.get() {
        return Span(None);
    }
    INSIDE.set(true);
    Span(Some((Instant::now(), event(op, dtype, dims, work()))))
}

/// A kernel that moves memory: `per` tensors of `n` elements of `T` in all.
#[inline]
pub(crate) fn moves<T: Float>(op: &'static str, n: usize, per: usize) -> Span {
    span::<T>(op, [n, 0, 0], || Work { flops: 0, bytes: (n * per * size_of::<T>()) as u64 })
}

/// Calls on this thread are part of somebody else's kernel, for good: it is a helper.
pub(crate) fn helper() {
    INSIDE.set(true);
}

#[cold]
fn event(op: &'static str, dtype: &'static str, dims: [usize; 3], work: Work) -> Event {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    if THREAD.get() == u32::MAX {
        THREAD.set(NEXT.fetch_add(1, Relaxed));
    }
    Event { op, dtype, dims, work, thread: THREAD.get(), start: 0, took: 0 }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some((began, mut event)) = self.0.take() else { return };
        event.took = began.elapsed().as_nanos() as u64;
        if !event.dtype.is_empty() {
            INSIDE.set(false);
        }
        if let Some((start, events)) = &mut *lock()
            && events.len() < MOST
        {
            event.start = began.saturating_duration_since(*start).as_nanos() as u64;
            events.push(event);
        }
    }
}

impl Event {
    /// Nanoseconds that the machine needs for this at best.
    pub fn floor(&self, floor: &Floor) -> f64 {
        let flops = match self.dtype {
            "bf16" => floor.bf16_flops,
            "int8" => floor.int8_flops,
            _ => floor.f32_flops,
        };
        let compute = self.work.flops as f64 / flops;
        1e9 * compute.max(self.work.bytes as f64 / floor.bytes)
    }

    fn label(&self) -> String {
        let mut label = format!("{} {}", self.op, self.dtype);
        for (i, d) in self.dims.iter().take_while(|d| **d > 0).enumerate() {
            let _ = write!(label, "{}{d}", if i == 0 { " " } else { "x" });
        }
        label
    }
}

impl Profile {
    /// Time by kernel and size, largest first, against the floor of the machine: for products
    /// their flops at the peak, for the rest their bytes at the memory's bandwidth (what lies in
    /// a cache can be faster).
    pub fn table(&self, floor: &Floor) -> String {
        #[derive(Default)]
        struct Row {
            calls: u64,
            took: f64,
            floor: f64,
            flops: f64,
            bytes: f64,
        }
        let mut rows: HashMap<String, Row> = HashMap::new();
        let (mut inside, mut least) = (0.0, 0.0);
        let threads = self.events.iter().map(|e| e.thread + 1).max().unwrap_or(1);
        for e in self.events.iter().filter(|e| !e.dtype.is_empty()) {
            let row = rows.entry(e.label()).or_default();
            row.calls += 1;
            row.took += e.took as f64;
            row.floor += e.floor(floor);
            row.flops += e.work.flops as f64;
            row.bytes += e.work.bytes as f64;
            inside += e.took as f64;
            least += e.floor(floor);
        }
        let wall = self.wall as f64 * f64::from(threads);
        let mut rows: Vec<(String, Row)> = rows.into_iter().collect();
        rows.sort_by(|a, b| b.1.took.total_cmp(&a.1.took));
        let mut out = format!(
            "{:<44} {:>6} {:>9} {:>6} {:>16} {:>6}\n",
            "op", "calls", "ms", "time", "speed", "floor"
        );
        for (label, r) in &rows {
            let speed = match r.flops > 0.0 {
                true => format!("{:.1} GFLOP/s", r.flops / r.took),
                false => format!("{:.1} GB/s", r.bytes / r.took),
            };
            let _ = writeln!(
                out,
                "{label:<44} {:>6} {:>9.2} {:>5.1}% {speed:>16} {:>5.0}%",
                r.calls,
                r.took / 1e6,
                100.0 * r.took / wall,
                100.0 * r.floor / r.took
            );
        }
        let _ = writeln!(
            out,
            "{:<44} {:>6} {:>9.2} {:>5.1}%",
            "outside of kernels",
            "",
            (wall - inside) / 1e6,
            100.0 * (wall - inside) / wall
        );
        let _ = writeln!(
            out,
            "{:<44} {:>6} {:>9.2} {:>6} {:>16} {:>5.0}%",
            "all",
            "",
            wall / 1e6,
            "",
            "",
            100.0 * least / wall
        );
        let _ = writeln!(
            out,
            "floor: {:.0} GFLOP/s f32, {:.0} bf16, {:.1} GB/s",
            floor.f32_flops / 1e9,
            floor.bf16_flops / 1e9,
            floor.bytes / 1e9
        );
        out
    }

    /// The calls as a Chrome trace (`chrome://tracing`, Perfetto): JSON of complete events.
    pub fn chrome_trace(&self) -> String {
        let mut out = String::from("{\"traceEvents\":[\n");
        for (i, e) in self.events.iter().enumerate() {
            let _ = write!(
                out,
                "{}{{\"name\":\"{}\",\"cat\":\"{}\",\"ph\":\"X\",\"pid\":0,\"tid\":{},\"ts\":{:.3},\
                 \"dur\":{:.3},\"args\":{{\"flops\":{},\"bytes\":{}}}}}",
                if i == 0 { "" } else { ",\n" },
                e.label().trim_end(),
                if e.dtype.is_empty() { "phase" } else { "kernel" },
                e.thread,
                e.start as f64 / 1e3,
                e.took as f64 / 1e3,
                e.work.flops,
                e.work.bytes
            );
        }
        out.push_str("\n]}\n");
        out
    }

    /// Writes the trace to `path` and returns the table against this machine's floor, measured
    /// once a process.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn report(&self, path: &std::path::Path) -> std::io::Result<String> {
        static FLOOR: OnceLock<Floor> = OnceLock::new();
        std::fs::write(path, self.chrome_trace())?;
        Ok(self.table(FLOOR.get_or_init(Floor::measure)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionShape, Threads, flash_attention, threads};

    #[test]
    fn a_kernel_is_one_event_whatever_it_calls_and_wherever() {
        threads::set(Threads::new(2));
        let s = AttentionShape::new(1, 37, 37, 4, 4, 8);
        let (x, mut out, mut lse) = (vec![0.1f32; 37 * 32], vec![0.0; 37 * 32], vec![0.0; 4 * 37]);
        let mut call = || flash_attention(&s, &x, &x, &x, &mut out, &mut lse);
        call();
        start();
        let phase = phase("all");
        call();
        drop(phase);
        let profile = stop();
        call();
        let me = THREAD.get();
        let own: Vec<&Event> = profile.events.iter().filter(|e| e.thread == me).collect();
        assert_eq!(own.iter().map(|e| e.op).collect::<Vec<_>>(), ["attention", "all"]);
        assert_eq!(own[0].dims, [4, 37, 37]);
        assert_eq!(own[0].work.flops, 2 * 2 * 4 * 8 * (37 * 38 / 2));
        assert!(own[0].took <= own[1].took && own[1].start <= own[0].start);
        let table = profile.table(&Floor {
            f32_flops: 1e9,
            bf16_flops: 2e9,
            int8_flops: 4e9,
            bytes: 1e9,
            read: 1e9,
        });
        assert!(table.contains("attention f32 4x37x37"), "{table}");
    }
}
