//! A group of ranks and its verbs on typed slices.
//!
//! Here are the blocking verbs with parts of one length; beside it `ragged.rs` (parts of any
//! length), `start.rs` (in flight), `message.rs` (from one rank to another), `bucket.rs` (many
//! small buffers at once) and `compress.rs` (fewer bytes).

use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

use crate::call::{Call, Verb};
use crate::counters::{Counters, Counting};
use crate::element::{DType, Element, ReduceOp};
use crate::engine::{Engine, Engines, Io, Parts, Solo};
use crate::error::{Error, Result};
use crate::in_flight::Stream;
use crate::threads::Threads;

/// How a group behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// How long a rank waits for the others.
    pub timeout: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config { timeout: Duration::from_secs(60) }
    }
}

/// This rank's handle on a group of ranks. Cloning is cheap; all clones are the same rank.
#[derive(Debug, Clone)]
pub struct Group(pub(crate) Arc<Member>);

#[derive(Debug)]
pub(crate) struct Member {
    rank: usize,
    ranks: usize,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) flight: Stream,
    counting: Counting,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.engine.leave();
    }
}

/// Runs a call on typed buffers.
pub(crate) fn run<T: Element>(
    engine: &dyn Engine,
    call: &Call,
    input: &[T],
    output: &mut [T],
    send: Parts<'_>,
    recv: Parts<'_>,
) -> Result<()> {
    let io = Io { input: input.as_ptr().cast(), output: output.as_mut_ptr().cast(), send, recv };
    // SAFETY: the lengths were compared with the call when it was made; both buffers are borrowed
    // until the engine returns, when nobody uses them any more.
    unsafe { engine.collective(call, io) }
}

/// Runs a call that works in place.
pub(crate) fn run_in_place<T: Element>(
    engine: &dyn Engine,
    call: &Call,
    buf: &mut [T],
) -> Result<()> {
    let (output, none) = (buf.as_mut_ptr().cast::<u8>(), Parts::Even(0));
    let io = Io { input: output.cast_const(), output, send: none, recv: none };
    // SAFETY: as in `run`.
    unsafe { engine.collective(call, io) }
}

impl Group {
    /// A group of one: every verb is a copy or nothing.
    pub fn solo() -> Group {
        Group::of(0, 1, [Arc::new(Solo), Arc::new(Solo)])
    }

    /// The handles of `n` ranks, one for each thread that is to be a rank.
    pub fn threads(n: usize) -> Vec<Group> {
        Group::threads_with(n, Config::default())
    }

    /// As [`Group::threads`], with another time-out.
    pub fn threads_with(n: usize, config: Config) -> Vec<Group> {
        if n == 1 {
            return vec![Group::solo()];
        }
        let ranks = Threads::ranks(n, config).into_iter().enumerate();
        ranks.map(|(rank, engines)| Group::of(rank, n, engines)).collect()
    }

    pub(crate) fn of(rank: usize, ranks: usize, [engine, flight]: Engines) -> Group {
        let flight = Stream::new(rank, ranks, flight);
        Group(Arc::new(Member { rank, ranks, engine, flight, counting: Counting::default() }))
    }

    /// Which rank this is, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.0.ranks
    }

    /// The name in messages: `world`, and below it what split it.
    pub fn name(&self) -> &str {
        self.0.engine.name()
    }

    /// What this rank has called and sent, both blocking and in flight.
    pub fn counters(&self) -> Counters {
        self.0.counting.read()
    }

    /// Sets the counters to zero.
    pub fn reset_counters(&self) {
        self.0.counting.reset();
    }

    /// The last calls of each rank that this process can see, as JSON: the flight recorder, for
    /// blocking calls and for those in flight. See the crate's page for when it is written to a
    /// file.
    pub fn flight_report(&self) -> serde_json::Value {
        serde_json::json!([self.0.engine.report(), self.0.flight.engine().report()])
    }

    pub(crate) fn count(&self, verb: Verb, bytes: usize) {
        self.0.counting.count(verb, bytes);
    }

    /// Bytes of `n (p - 1) / p` elements.
    pub(crate) fn share<T>(&self, len: usize) -> usize {
        size_of::<T>() * len * (self.world_size() - 1) / self.world_size()
    }

    fn engine(&self) -> &dyn Engine {
        &*self.0.engine
    }

    /// Every rank's buffer becomes the reduction of all.
    #[track_caller]
    pub fn all_reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp) -> Result<()> {
        run_in_place(self.engine(), &self.all_reduce_call::<T>(buf.len(), op), buf)
    }

    /// The reduction of all `input`s is cut in rank order; rank r receives part r.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `input` is `world_size` times as long as `output`.
    #[track_caller]
    pub fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let call = self.reduce_scatter_call::<T>(input.len(), output.len(), op)?;
        let parts = Parts::Even(output.len());
        run(self.engine(), &call, input, output, parts, parts)
    }

    /// `output` becomes all inputs, in rank order.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `output` is `world_size` times as long as `input`.
    #[track_caller]
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        let call = self.all_gather_call::<T>(input.len(), output.len())?;
        let parts = Parts::Even(input.len());
        run(self.engine(), &call, input, output, parts, parts)
    }

    /// Part j of rank i's `input` becomes part i of rank j's `output`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless both have one length that divides by `world_size`.
    #[track_caller]
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        let call = self.all_to_all_call::<T>(input.len(), output.len())?;
        let parts = Parts::Even(input.len() / self.world_size());
        run(self.engine(), &call, input, output, parts, parts)
    }

    /// Every rank's buffer becomes the root's.
    #[track_caller]
    pub fn broadcast<T: Element>(&self, buf: &mut [T], root: usize) -> Result<()> {
        run_in_place(self.engine(), &self.broadcast_call::<T>(buf.len(), root)?, buf)
    }

    /// The root's buffer becomes the reduction of all; others keep theirs.
    #[track_caller]
    pub fn reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        run_in_place(self.engine(), &self.reduce_call::<T>(buf.len(), op, root)?, buf)
    }

    /// The root's `output` becomes all inputs, in rank order; other ranks' is not used.
    ///
    /// # Errors
    /// [`Error::Argument`] at a root whose output is not `world_size` times its input.
    #[track_caller]
    pub fn gather<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        let call = self.gather_call::<T>(input.len(), output.len(), root)?;
        let parts = Parts::Even(input.len());
        run(self.engine(), &call, input, output, parts, parts)
    }

    /// Part r of the root's `input` becomes rank r's `output`; other ranks' input is not used.
    ///
    /// # Errors
    /// [`Error::Argument`] at a root whose input is not `world_size` times its output.
    #[track_caller]
    pub fn scatter<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        let call = self.scatter_call::<T>(input.len(), output.len(), root)?;
        let parts = Parts::Even(output.len());
        run(self.engine(), &call, input, output, parts, parts)
    }

    /// In a ring: `output` becomes the `input` of the rank `by` places before this one.
    ///
    /// # Errors
    /// [`Error::Argument`] unless both have one length.
    #[track_caller]
    pub fn shift<T: Element>(&self, input: &[T], output: &mut [T], by: usize) -> Result<()> {
        let call = self.shift_call::<T>(input.len(), output.len(), by)?;
        let parts = Parts::Even(0);
        run(self.engine(), &call, input, output, parts, parts)
    }

    /// Waits until every rank is here.
    #[track_caller]
    pub fn barrier(&self) -> Result<()> {
        self.count(Verb::Barrier, 0);
        let call = Call::new(Verb::Barrier, DType::U8, 0, Location::caller());
        run_in_place::<u8>(self.engine(), &call, &mut [])
    }

    /// New groups of the ranks that name the same colour, in the order of their ranks here.
    #[track_caller]
    pub fn split(&self, color: usize) -> Result<Group> {
        self.split_named(color, &format!("color {color}"))
    }

    #[track_caller]
    pub(crate) fn split_named(&self, color: usize, name: &str) -> Result<Group> {
        let n = self.world_size();
        self.count(Verb::Split, 0);
        let mut colors = vec![0u64; n];
        let call = Call::new(Verb::AllGather, DType::U64, n, Location::caller());
        let parts = Parts::Even(1);
        run(self.engine(), &call, &[color as u64], &mut colors, parts, parts)?;
        let members: Vec<usize> = (0..n).filter(|r| colors[*r] == color as u64).collect();
        let rank = members.iter().position(|r| *r == self.rank()).unwrap_or(0);
        let name = format!("{}/{name}", self.name());
        let engines = self.engine().split(color, &members, name, Location::caller())?;
        if members.len() == 1 {
            return Ok(Group::solo());
        }
        Ok(Group::of(rank, members.len(), engines))
    }
}

/// The signature of each verb: arguments checked, call counted.
impl Group {
    #[track_caller]
    pub(crate) fn all_reduce_call<T: Element>(&self, len: usize, op: ReduceOp) -> Call {
        self.count(Verb::AllReduce, 2 * self.share::<T>(len));
        Call::new(Verb::AllReduce, T::TYPE, len, Location::caller()).op(op)
    }

    #[track_caller]
    pub(crate) fn reduce_scatter_call<T: Element>(
        &self,
        input: usize,
        output: usize,
        op: ReduceOp,
    ) -> Result<Call> {
        self.times("reduce_scatter", ("input", input), ("output", output))?;
        self.count(Verb::ReduceScatter, self.share::<T>(input));
        Ok(Call::new(Verb::ReduceScatter, T::TYPE, input, Location::caller()).op(op))
    }

    #[track_caller]
    pub(crate) fn all_gather_call<T: Element>(&self, input: usize, output: usize) -> Result<Call> {
        self.times("all_gather", ("output", output), ("input", input))?;
        self.count(Verb::AllGather, self.share::<T>(output));
        Ok(Call::new(Verb::AllGather, T::TYPE, output, Location::caller()))
    }

    #[track_caller]
    pub(crate) fn all_to_all_call<T: Element>(&self, input: usize, output: usize) -> Result<Call> {
        let n = self.world_size();
        if input != output || !input.is_multiple_of(n) {
            let reason = format!(
                "input has {input} elements and output {output}; both must have one length that divides by {n}"
            );
            return Err(Error::Argument { op: "all_to_all", reason });
        }
        self.count(Verb::AllToAll, self.share::<T>(input));
        Ok(Call::new(Verb::AllToAll, T::TYPE, input, Location::caller()))
    }

    #[track_caller]
    pub(crate) fn broadcast_call<T: Element>(&self, len: usize, root: usize) -> Result<Call> {
        self.has("broadcast", root)?;
        let sends = self.rank() == root && self.world_size() > 1;
        self.count(Verb::Broadcast, if sends { size_of::<T>() * len } else { 0 });
        Ok(Call::new(Verb::Broadcast, T::TYPE, len, Location::caller()).root(root))
    }

    #[track_caller]
    pub(crate) fn reduce_call<T: Element>(
        &self,
        len: usize,
        op: ReduceOp,
        root: usize,
    ) -> Result<Call> {
        self.has("reduce", root)?;
        self.count(Verb::Reduce, if self.rank() == root { 0 } else { size_of::<T>() * len });
        Ok(Call::new(Verb::Reduce, T::TYPE, len, Location::caller()).op(op).root(root))
    }

    #[track_caller]
    pub(crate) fn gather_call<T: Element>(
        &self,
        input: usize,
        output: usize,
        root: usize,
    ) -> Result<Call> {
        self.has("gather", root)?;
        if self.rank() == root {
            self.times("gather", ("output", output), ("input", input))?;
        }
        self.count(Verb::Gather, if self.rank() == root { 0 } else { size_of::<T>() * input });
        let len = self.world_size() * input;
        Ok(Call::new(Verb::Gather, T::TYPE, len, Location::caller()).root(root))
    }

    #[track_caller]
    pub(crate) fn scatter_call<T: Element>(
        &self,
        input: usize,
        output: usize,
        root: usize,
    ) -> Result<Call> {
        self.has("scatter", root)?;
        if self.rank() == root {
            self.times("scatter", ("input", input), ("output", output))?;
        }
        let len = self.world_size() * output;
        self.count(Verb::Scatter, if self.rank() == root { self.share::<T>(len) } else { 0 });
        Ok(Call::new(Verb::Scatter, T::TYPE, len, Location::caller()).root(root))
    }

    #[track_caller]
    pub(crate) fn shift_call<T: Element>(
        &self,
        input: usize,
        output: usize,
        by: usize,
    ) -> Result<Call> {
        if input != output {
            let reason = format!("input has {input} elements and output {output}; make them equal");
            return Err(Error::Argument { op: "shift", reason });
        }
        let by = by % self.world_size();
        self.count(Verb::Shift, if by == 0 { 0 } else { size_of::<T>() * input });
        Ok(Call::new(Verb::Shift, T::TYPE, input, Location::caller()).root(by))
    }

    pub(crate) fn times(
        &self,
        op: &'static str,
        long: (&str, usize),
        short: (&str, usize),
    ) -> Result<()> {
        let n = self.world_size();
        if long.1 == n * short.1 {
            return Ok(());
        }
        let reason = format!(
            "{} has {} elements and {} {}; with {n} ranks {} must have {}",
            long.0,
            long.1,
            short.0,
            short.1,
            long.0,
            n * short.1
        );
        Err(Error::Argument { op, reason })
    }

    pub(crate) fn has(&self, op: &'static str, rank: usize) -> Result<()> {
        if rank < self.world_size() {
            return Ok(());
        }
        let reason = format!("there is no rank {rank}; ranks are 0..{}", self.world_size());
        Err(Error::Argument { op, reason })
    }
}

/// Runs `f` on `n` ranks, each a thread, and returns their results in rank order.
///
/// # Panics
/// When a rank panics: with that rank's panic.
pub fn on_ranks<R: Send>(n: usize, f: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let f = &f;
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Group::threads(n)
            .into_iter()
            .map(|group| {
                std::thread::Builder::new()
                    .name(format!("rank {}", group.rank()))
                    .stack_size(8 << 20)
                    .spawn_scoped(scope, move || {
                        place(group.rank(), group.world_size());
                        f(group)
                    })
                    .expect("the system can start a thread for each rank")
            })
            .collect();
        let results: Vec<_> = ranks.into_iter().map(|r| r.join()).collect();
        results
            .into_iter()
            .map(|r| r.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Starts a rank on a core of its own, where there are as many, and leaves it free to move: new
/// threads begin on their parent's core, and a busy machine may leave them there.
fn place(rank: usize, ranks: usize) {
    #[cfg(all(target_os = "linux", not(miri)))]
    // SAFETY: the sets are valid for the calls, which touch this thread's affinity only.
    unsafe {
        let size = size_of::<libc::cpu_set_t>();
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size, &raw mut allowed) != 0 {
            return;
        }
        let cores = (0..8 * size).filter(|core| libc::CPU_ISSET(*core, &allowed));
        if ranks > cores.clone().count() {
            return;
        }
        if let Some(core) = cores.clone().nth(rank) {
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(core, &mut one);
            libc::sched_setaffinity(0, size, &raw const one);
            libc::sched_setaffinity(0, size, &raw const allowed);
        }
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    let _ = (rank, ranks);
}
