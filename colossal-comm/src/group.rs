//! A group of ranks and its verbs, over threads that share memory.
//!
//! Every rank posts the address of its buffer, a barrier makes the posts visible, ranks read
//! their peers' buffers in place, and a second barrier says that everybody is done. Nothing is
//! copied through channels. In an all-reduce rank r reduces slice r of all buffers, in rank
//! order, and writes the result into all of them: one pass, and the same bits everywhere.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::barrier::{Barrier, Broken};
use crate::counters::{Counters, Counting, Verb};
use crate::element::{Element, ReduceOp};
use crate::error::{Error, Result};
use crate::in_flight::{Pending, Stream};
use crate::mailbox::Mailbox;

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
pub struct Group(Arc<Member>);

#[derive(Debug)]
struct Member {
    rank: usize,
    shared: Arc<Shared>,
    flight: Stream,
    counting: Arc<Counting>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shared.leave(self.rank);
    }
}

/// What the ranks of a group share.
#[derive(Debug)]
pub(crate) struct Shared {
    ranks: usize,
    config: Config,
    barrier: Barrier,
    posts: Vec<Mutex<Post>>,
    sequence: Vec<AtomicU64>,
    gone: Vec<AtomicU8>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    mail: Vec<Mailbox>,
    children: Mutex<HashMap<(u64, usize), Pair>>,
}

/// The rendezvous of blocking collectives, and that of those in flight.
type Pair = [Arc<Shared>; 2];

const HERE: u8 = 0;
const LEFT: u8 = 1;
const PANICKED: u8 = 2;

/// What a rank called and where its buffers are.
#[derive(Debug, Clone, Copy)]
struct Post {
    call: Option<Call>,
    input: usize,
}

/// What must agree on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    verb: Verb,
    dtype: &'static str,
    len: usize,
    op: Option<ReduceOp>,
    root: Option<usize>,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}({} x {}", self.verb.name(), self.len, self.dtype)?;
        if let Some(op) = self.op {
            write!(f, ", {op:?}")?;
        }
        if let Some(root) = self.root {
            write!(f, ", root {root}")?;
        }
        f.write_str(")")
    }
}

impl Shared {
    fn new(ranks: usize, config: Config) -> Arc<Shared> {
        let post = Post { call: None, input: 0 };
        Arc::new(Shared {
            ranks,
            config,
            barrier: Barrier::new(ranks),
            posts: (0..ranks).map(|_| Mutex::new(post)).collect(),
            sequence: (0..ranks).map(|_| AtomicU64::new(0)).collect(),
            gone: (0..ranks).map(|_| AtomicU8::new(HERE)).collect(),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            mail: (0..ranks * ranks).map(|_| Mailbox::default()).collect(),
            children: Mutex::new(HashMap::new()),
        })
    }

    /// This rank will call nothing any more.
    pub(crate) fn leave(&self, rank: usize) {
        let how = if std::thread::panicking() { PANICKED } else { LEFT };
        self.gone[rank].store(how, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        self.barrier.wake_sleepers();
        self.mail.iter().for_each(Mailbox::wake);
    }

    /// The first failure wins; everybody gets it.
    fn fail(&self, error: Error) -> Error {
        let first = self.failure.lock().get_or_insert(error).clone();
        self.failed.store(true, Ordering::SeqCst);
        self.wake();
        first
    }

    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::SeqCst)
            && let Some(error) = self.failure.lock().clone()
        {
            return Err(error);
        }
        Ok(())
    }

    fn wait(&self, rank: usize, call: Call, sequence: u64) -> Result<()> {
        let useless = |missing: &[usize]| {
            self.failed.load(Ordering::SeqCst)
                || missing.iter().any(|r| self.gone[*r].load(Ordering::SeqCst) != HERE)
        };
        match self.barrier.wait(rank, self.config.timeout, useless) {
            Ok(()) => Ok(()),
            Err(Broken::Stopped) => {
                self.check()?;
                let who = (0..self.ranks)
                    .find(|r| *r != rank && self.gone[*r].load(Ordering::SeqCst) != HERE)
                    .unwrap_or(rank);
                Err(self.fail(self.gone_error(call.to_string(), sequence, who)))
            }
            Err(Broken::Missing(missing)) => {
                let doing: Vec<String> = missing
                    .iter()
                    .map(|r| match self.posts[*r].lock().call {
                        Some(last) => format!("rank {r} last called {last}"),
                        None => format!("rank {r} has called nothing yet"),
                    })
                    .collect();
                Err(self.fail(Error::Timeout {
                    op: call.to_string(),
                    sequence,
                    rank,
                    missing,
                    seconds: self.config.timeout.as_secs(),
                    doing: doing.join(", "),
                }))
            }
        }
    }

    fn gone_error(&self, op: String, sequence: u64, rank: usize) -> Error {
        let how = match self.gone[rank].load(Ordering::SeqCst) {
            PANICKED => "it panicked",
            _ => "it dropped its group",
        };
        Error::Gone { op, sequence, rank, how: how.into() }
    }

    /// Posts, waits for all, compares, runs `work` on all posts, waits for all again.
    fn collective(
        &self,
        rank: usize,
        call: Call,
        input: usize,
        work: impl FnOnce(&[Post]),
    ) -> Result<()> {
        self.check()?;
        let sequence = self.sequence[rank].fetch_add(1, Ordering::Relaxed);
        *self.posts[rank].lock() = Post { call: Some(call), input };
        self.wait(rank, call, sequence)?;
        let posts: Vec<Post> = self.posts.iter().map(|p| *p.lock()).collect();
        let first = posts[0].call;
        if let Some(other) = posts.iter().position(|p| p.call != first) {
            let show = |c: Option<Call>| c.map_or_else(String::new, |c| c.to_string());
            return Err(self.fail(Error::Mismatch {
                sequence,
                left_rank: 0,
                left: show(first),
                right_rank: other,
                right: show(posts[other].call),
            }));
        }
        work(&posts);
        self.wait(rank, call, sequence)
    }
}

/// The part of a buffer of `len` elements that rank `r` of `n` works on.
fn slice_of(len: usize, r: usize, n: usize) -> std::ops::Range<usize> {
    len * r / n..len * (r + 1) / n
}

/// Elements that are reduced at a time: small enough to stay in the first-level cache.
const BLOCK: usize = 2048;

/// Reduces `range` of all `sources` in rank order and hands each finished block to `store`.
///
/// # Safety
/// Each source is the address of at least `range.end` elements that nobody writes meanwhile
/// (except through `store`, after the block was read).
unsafe fn reduce<T: Element>(
    sources: &[usize],
    range: std::ops::Range<usize>,
    op: ReduceOp,
    mut store: impl FnMut(usize, &[T]),
) {
    let mut acc: Vec<T::Acc> = Vec::with_capacity(BLOCK);
    let mut done: Vec<T> = Vec::with_capacity(BLOCK);
    let mut at = range.start;
    while at < range.end {
        let len = BLOCK.min(range.end - at);
        // SAFETY: by contract the source holds `at + len <= range.end` elements.
        let block = |source: usize| unsafe {
            std::slice::from_raw_parts((source as *const T).add(at), len)
        };
        acc.clear();
        acc.extend(block(sources[0]).iter().map(|x| x.widen()));
        for source in &sources[1..] {
            T::fold(op, &mut acc, block(*source));
        }
        done.clear();
        match op {
            ReduceOp::Avg => {
                done.extend(acc.iter().map(|a| T::narrow(T::divide(*a, sources.len()))));
            }
            _ => done.extend(acc.iter().map(|a| T::narrow(*a))),
        }
        store(at, &done);
        at += len;
    }
}

/// The verbs, on a rank of a shared state: what both the blocking and the in-flight forms run.
impl Shared {
    pub(crate) fn all_reduce<T: Element>(
        &self,
        rank: usize,
        buf: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let (len, n) = (buf.len(), self.ranks);
        let call = Call { verb: Verb::AllReduce, dtype: T::NAME, len, op: Some(op), root: None };
        let address = buf.as_mut_ptr() as usize;
        self.collective(rank, call, address, |posts| {
            let sources: Vec<usize> = posts.iter().map(|p| p.input).collect();
            // SAFETY: every rank posted a buffer of `len` elements and waits at the second
            // barrier; slice `rank` of all buffers is read and written by this rank alone.
            unsafe {
                reduce::<T>(&sources, slice_of(len, rank, n), op, |at, block| {
                    for target in &sources {
                        let to = (*target as *mut T).add(at);
                        std::ptr::copy_nonoverlapping(block.as_ptr(), to, block.len());
                    }
                });
            }
        })
    }

    pub(crate) fn reduce_scatter<T: Element>(
        &self,
        rank: usize,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        let (len, part) = (input.len(), output.len());
        let call =
            Call { verb: Verb::ReduceScatter, dtype: T::NAME, len, op: Some(op), root: None };
        self.collective(rank, call, input.as_ptr() as usize, |posts| {
            let sources: Vec<usize> = posts.iter().map(|p| p.input).collect();
            let range = rank * part..(rank + 1) * part;
            // SAFETY: every rank posted `len = n * part` elements that stay unchanged until the
            // second barrier; only this rank's own output is written.
            unsafe {
                reduce::<T>(&sources, range.clone(), op, |at, block| {
                    let at = at - range.start;
                    output[at..at + block.len()].copy_from_slice(block);
                });
            }
        })
    }

    pub(crate) fn all_gather<T: Element>(
        &self,
        rank: usize,
        input: &[T],
        output: &mut [T],
    ) -> Result<()> {
        let len = input.len();
        let call = Call { verb: Verb::AllGather, dtype: T::NAME, len, op: None, root: None };
        self.collective(rank, call, input.as_ptr() as usize, |posts| {
            for (part, post) in output.chunks_mut(len.max(1)).zip(posts) {
                // SAFETY: every rank posted `len` elements, unchanged until the second barrier.
                part.copy_from_slice(unsafe {
                    std::slice::from_raw_parts(post.input as *const T, len)
                });
            }
        })
    }

    pub(crate) fn broadcast<T: Element>(
        &self,
        rank: usize,
        buf: &mut [T],
        root: usize,
    ) -> Result<()> {
        let len = buf.len();
        let call = Call { verb: Verb::Broadcast, dtype: T::NAME, len, op: None, root: Some(root) };
        let address = buf.as_mut_ptr() as usize;
        self.collective(rank, call, address, |posts| {
            if rank != root {
                // SAFETY: the root's buffer of `len` elements is only read until the second
                // barrier, and ours is another.
                buf.copy_from_slice(unsafe {
                    std::slice::from_raw_parts(posts[root].input as *const T, len)
                });
            }
        })
    }

    pub(crate) fn shift<T: Element>(
        &self,
        rank: usize,
        input: &[T],
        output: &mut [T],
        by: usize,
    ) -> Result<()> {
        let (len, n) = (input.len(), self.ranks);
        let call = Call { verb: Verb::Send, dtype: T::NAME, len, op: None, root: Some(by) };
        self.collective(rank, call, input.as_ptr() as usize, |posts| {
            let from = posts[(rank + n - by) % n].input;
            // SAFETY: every rank posted `len` elements, unchanged until the second barrier.
            output.copy_from_slice(unsafe { std::slice::from_raw_parts(from as *const T, len) });
        })
    }

    pub(crate) fn all_to_all<T: Element>(
        &self,
        rank: usize,
        input: &[T],
        output: &mut [T],
    ) -> Result<()> {
        let (len, n) = (input.len(), self.ranks);
        let call = Call { verb: Verb::AllToAll, dtype: T::NAME, len, op: None, root: None };
        let part = len / n;
        self.collective(rank, call, input.as_ptr() as usize, |posts| {
            for (to, post) in output.chunks_mut(part.max(1)).zip(posts) {
                // SAFETY: every rank posted `n * part` elements, unchanged until the second
                // barrier; part `rank` of each is meant for us.
                to.copy_from_slice(unsafe {
                    std::slice::from_raw_parts((post.input as *const T).add(rank * part), part)
                });
            }
        })
    }
}

impl Group {
    /// A group of one: every verb is a copy or nothing.
    pub fn solo() -> Group {
        Group::threads(1).remove(0)
    }

    /// The handles of `n` ranks, one for each thread that is to be a rank.
    pub fn threads(n: usize) -> Vec<Group> {
        Group::threads_with(n, Config::default())
    }

    /// As [`Group::threads`], with another time-out.
    pub fn threads_with(n: usize, config: Config) -> Vec<Group> {
        let pair = [Shared::new(n, config), Shared::new(n, config)];
        (0..n).map(|rank| Group::member(rank, &pair)).collect()
    }

    fn member(rank: usize, [shared, flight]: &[Arc<Shared>; 2]) -> Group {
        Group(Arc::new(Member {
            rank,
            shared: shared.clone(),
            flight: Stream::new(rank, flight.clone()),
            counting: Arc::default(),
        }))
    }

    /// Which rank this is, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.0.shared.ranks
    }

    /// What this rank has called and sent, both blocking and in flight.
    pub fn counters(&self) -> Counters {
        self.0.counting.read()
    }

    /// Sets the counters to zero.
    pub fn reset_counters(&self) {
        self.0.counting.reset();
    }

    fn count(&self, verb: Verb, bytes: usize) {
        self.0.counting.count(verb, bytes);
    }

    /// Bytes of `n (p - 1) / p` elements.
    fn share<T>(&self, len: usize) -> usize {
        size_of::<T>() * len * (self.world_size() - 1) / self.world_size()
    }

    /// Every rank's buffer becomes the reduction of all.
    pub fn all_reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp) -> Result<()> {
        self.count(Verb::AllReduce, 2 * self.share::<T>(buf.len()));
        if self.world_size() == 1 {
            return Ok(());
        }
        self.0.shared.all_reduce(self.rank(), buf, op)
    }

    /// The reduction of all `input`s is cut in rank order; rank r receives part r.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `input` is `world_size` times as long as `output`.
    pub fn reduce_scatter<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
    ) -> Result<()> {
        self.times("reduce_scatter", "input", input.len(), "output", output.len())?;
        self.count(Verb::ReduceScatter, self.share::<T>(input.len()));
        if self.world_size() == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        self.0.shared.reduce_scatter(self.rank(), input, output, op)
    }

    /// `output` becomes all inputs, in rank order.
    ///
    /// # Errors
    /// [`Error::Argument`] unless `output` is `world_size` times as long as `input`.
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.times("all_gather", "output", output.len(), "input", input.len())?;
        self.count(Verb::AllGather, self.share::<T>(output.len()));
        if self.world_size() == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        self.0.shared.all_gather(self.rank(), input, output)
    }

    /// Part j of rank i's `input` becomes part i of rank j's `output`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless both have one length that divides by `world_size`.
    pub fn all_to_all<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        self.exchange(input.len(), output.len())?;
        self.count(Verb::AllToAll, self.share::<T>(input.len()));
        if self.world_size() == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        self.0.shared.all_to_all(self.rank(), input, output)
    }

    /// Parts of any length: the first `counts[0]` elements of `input` go to rank 0, the next
    /// `counts[1]` to rank 1, and so on. Returns what came, in rank order, and how many from whom.
    ///
    /// # Errors
    /// [`Error::Argument`] unless there is one count per rank and they add up to `input`.
    pub fn all_to_all_v<T: Element>(
        &self,
        input: &[T],
        counts: &[usize],
    ) -> Result<(Vec<T>, Vec<usize>)> {
        let (rank, n) = (self.rank(), self.world_size());
        if counts.len() != n || counts.iter().sum::<usize>() != input.len() {
            let reason = format!(
                "counts {counts:?} must be {n} numbers that add up to the {} elements of input",
                input.len()
            );
            return Err(Error::Argument { op: "all_to_all_v", reason });
        }
        let mine: Vec<u64> = counts.iter().map(|c| *c as u64).collect();
        let mut all = vec![0u64; n * n];
        self.all_gather(&mine, &mut all)?;
        let sent: usize = input.len() - counts[rank];
        self.count(Verb::AllToAll, size_of::<T>() * sent);
        let got: Vec<usize> = (0..n).map(|peer| all[peer * n + rank] as usize).collect();
        let mut output = Vec::with_capacity(got.iter().sum());
        let call = Call { verb: Verb::AllToAll, dtype: T::NAME, len: 0, op: None, root: None };
        self.0.shared.collective(rank, call, input.as_ptr() as usize, |posts| {
            for (peer, post) in posts.iter().enumerate() {
                let skip: usize = (0..rank).map(|r| all[peer * n + r] as usize).sum();
                // SAFETY: the peer posted as many elements as its counts, which everybody has,
                // add up to, unchanged until the second barrier; `got[peer]` after `skip` are ours.
                output.extend_from_slice(unsafe {
                    std::slice::from_raw_parts((post.input as *const T).add(skip), got[peer])
                });
            }
        })?;
        Ok((output, got))
    }

    /// In a ring: `output` becomes the `input` of the rank `by` places before this one.
    ///
    /// # Errors
    /// [`Error::Argument`] unless both have one length.
    pub fn shift<T: Element>(&self, input: &[T], output: &mut [T], by: usize) -> Result<()> {
        self.same_len(input.len(), output.len())?;
        let by = by % self.world_size();
        if by == 0 {
            output.copy_from_slice(input);
            return Ok(());
        }
        self.count(Verb::Send, size_of_val(input));
        self.0.shared.shift(self.rank(), input, output, by)
    }

    /// Every rank's buffer becomes the root's.
    pub fn broadcast<T: Element>(&self, buf: &mut [T], root: usize) -> Result<()> {
        self.has("broadcast", root)?;
        let (rank, len) = (self.rank(), buf.len());
        self.count(Verb::Broadcast, if rank == root { size_of::<T>() * len } else { 0 });
        self.0.shared.broadcast(rank, buf, root)
    }

    /// The root's buffer becomes the reduction of all; others keep theirs.
    pub fn reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        self.has("reduce", root)?;
        let (rank, len) = (self.rank(), buf.len());
        self.count(Verb::Reduce, if rank == root { 0 } else { size_of::<T>() * len });
        let call = Call { verb: Verb::Reduce, dtype: T::NAME, len, op: Some(op), root: Some(root) };
        let address = buf.as_mut_ptr() as usize;
        let n = self.world_size();
        self.0.shared.collective(rank, call, address, |posts| {
            let sources: Vec<usize> = posts.iter().map(|p| p.input).collect();
            // SAFETY: as in all_reduce, but only the root's buffer is written, each slice of it
            // by one rank.
            unsafe {
                reduce::<T>(&sources, slice_of(len, rank, n), op, |at, block| {
                    let to = (sources[root] as *mut T).add(at);
                    std::ptr::copy_nonoverlapping(block.as_ptr(), to, block.len());
                });
            }
        })
    }

    /// The root's `output` becomes all inputs, in rank order; other ranks' is not used.
    ///
    /// # Errors
    /// [`Error::Argument`] at a root whose output is not `world_size` times its input.
    pub fn gather<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        self.has("gather", root)?;
        let (rank, len) = (self.rank(), input.len());
        if rank == root {
            self.times("gather", "output", output.len(), "input", len)?;
        }
        self.count(Verb::Gather, if rank == root { 0 } else { size_of::<T>() * len });
        let call = Call { verb: Verb::Gather, dtype: T::NAME, len, op: None, root: Some(root) };
        self.0.shared.collective(rank, call, input.as_ptr() as usize, |posts| {
            if rank == root {
                for (part, post) in output.chunks_mut(len.max(1)).zip(posts) {
                    // SAFETY: every rank posted `len` elements, unchanged until the second barrier.
                    let from = unsafe { std::slice::from_raw_parts(post.input as *const T, len) };
                    part.copy_from_slice(from);
                }
            }
        })
    }

    /// Part r of the root's `input` becomes rank r's `output`; other ranks' input is not used.
    ///
    /// # Errors
    /// [`Error::Argument`] at a root whose input is not `world_size` times its output.
    pub fn scatter<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        self.has("scatter", root)?;
        let (rank, len) = (self.rank(), output.len());
        if rank == root {
            self.times("scatter", "input", input.len(), "output", len)?;
        }
        self.count(Verb::Scatter, if rank == root { size_of_val(input) } else { 0 });
        let call = Call { verb: Verb::Scatter, dtype: T::NAME, len, op: None, root: Some(root) };
        self.0.shared.collective(rank, call, input.as_ptr() as usize, |posts| {
            // SAFETY: the root posted `n * len` elements, unchanged until the second barrier.
            output.copy_from_slice(unsafe {
                std::slice::from_raw_parts((posts[root].input as *const T).add(rank * len), len)
            });
        })
    }

    /// Waits until every rank is here.
    pub fn barrier(&self) -> Result<()> {
        self.count(Verb::Barrier, 0);
        let call = Call { verb: Verb::Barrier, dtype: "()", len: 0, op: None, root: None };
        self.0.shared.collective(self.rank(), call, 0, |_| {})
    }

    /// Sends to one rank; returns when it has been received.
    pub fn send<T: Element>(&self, buf: &[T], to: usize) -> Result<()> {
        self.has("send", to)?;
        self.not_self("send", to)?;
        self.count(Verb::Send, size_of_val(buf));
        let shared = &self.0.shared;
        shared.check()?;
        let mailbox = &shared.mail[self.rank() * shared.ranks + to];
        let number = mailbox.post(buf.as_ptr() as usize, buf.len(), T::NAME);
        mailbox.until_taken(number, self.give_up(Verb::Send, T::NAME, buf.len(), to))
    }

    /// Receives from one rank what it sent, in order.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when it sent another type or length.
    pub fn recv<T: Element>(&self, buf: &mut [T], from: usize) -> Result<()> {
        self.has("recv", from)?;
        self.not_self("recv", from)?;
        self.count(Verb::Recv, 0);
        let shared = &self.0.shared;
        shared.check()?;
        let (rank, len) = (self.rank(), buf.len());
        let copy = |post: crate::mailbox::Post| {
            if post.len != len || post.dtype != T::NAME {
                return Err(Error::Mismatch {
                    sequence: 0,
                    left_rank: from,
                    left: format!("send({} x {})", post.len, post.dtype),
                    right_rank: rank,
                    right: format!("recv({len} x {})", T::NAME),
                });
            }
            // SAFETY: the sender's buffer of `len` elements stays valid and unchanged until it is
            // told that the post was taken, which happens after this copy.
            buf.copy_from_slice(unsafe {
                std::slice::from_raw_parts(post.address as *const T, len)
            });
            Ok(())
        };
        let mailbox = &shared.mail[from * shared.ranks + rank];
        mailbox
            .take(copy, self.give_up(Verb::Recv, T::NAME, len, from))?
            .map_err(|e| shared.fail(e))
    }

    /// When to stop waiting for `peer`, and why.
    fn give_up(
        &self,
        verb: Verb,
        dtype: &'static str,
        len: usize,
        peer: usize,
    ) -> impl FnMut() -> Option<Error> {
        let (shared, rank) = (self.0.shared.clone(), self.rank());
        let deadline = Instant::now() + shared.config.timeout;
        let op = format!("{}({len} x {dtype}, peer {peer})", verb.name());
        move || {
            if let Err(e) = shared.check() {
                return Some(e);
            }
            if shared.gone[peer].load(Ordering::SeqCst) != HERE {
                return Some(shared.fail(shared.gone_error(op.clone(), 0, peer)));
            }
            (Instant::now() >= deadline).then(|| {
                shared.fail(Error::Timeout {
                    op: op.clone(),
                    sequence: 0,
                    rank,
                    missing: vec![peer],
                    seconds: shared.config.timeout.as_secs(),
                    doing: format!("rank {peer} did not take part"),
                })
            })
        }
    }

    /// New groups of the ranks that name the same colour, in the order of their ranks here.
    pub fn split(&self, color: usize) -> Result<Group> {
        let n = self.world_size();
        let mut colors = vec![0u64; n];
        self.all_gather(&[color as u64], &mut colors)?;
        self.count(Verb::Split, 0);
        let members: Vec<usize> = (0..n).filter(|r| colors[*r] == color as u64).collect();
        let new_rank = members.iter().position(|r| *r == self.rank()).unwrap_or(0);
        let shared = &self.0.shared;
        let key = (shared.sequence[self.rank()].load(Ordering::Relaxed), color);
        let pair = shared
            .children
            .lock()
            .entry(key)
            .or_insert_with(|| {
                [
                    Shared::new(members.len(), shared.config),
                    Shared::new(members.len(), shared.config),
                ]
            })
            .clone();
        // Everybody has a handle: the registry may forget it.
        self.barrier()?;
        shared.children.lock().remove(&key);
        Ok(Group::member(new_rank, &pair))
    }

    /// [`Group::all_reduce`] in flight: the buffer comes back from [`Pending::wait`].
    pub fn all_reduce_start<T: Element, B: AsMut<[T]> + Send + 'static>(
        &self,
        mut buf: B,
        op: ReduceOp,
    ) -> Pending<B> {
        self.count(Verb::AllReduce, 2 * self.share::<T>(buf.as_mut().len()));
        self.0.flight.start(move |shared, rank| {
            shared.all_reduce(rank, buf.as_mut(), op)?;
            Ok(buf)
        })
    }

    /// [`Group::reduce_scatter`] in flight: both buffers come back.
    pub fn reduce_scatter_start<T, B, C>(
        &self,
        input: B,
        mut output: C,
        op: ReduceOp,
    ) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let sizes = (input.as_ref().len(), output.as_mut().len());
        if let Err(e) = self.times("reduce_scatter", "input", sizes.0, "output", sizes.1) {
            return Pending::failed(e);
        }
        self.count(Verb::ReduceScatter, self.share::<T>(sizes.0));
        self.0.flight.start(move |shared, rank| {
            shared.reduce_scatter(rank, input.as_ref(), output.as_mut(), op)?;
            Ok((input, output))
        })
    }

    /// [`Group::all_gather`] in flight: both buffers come back.
    pub fn all_gather_start<T, B, C>(&self, input: B, mut output: C) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        let sizes = (input.as_ref().len(), output.as_mut().len());
        if let Err(e) = self.times("all_gather", "output", sizes.1, "input", sizes.0) {
            return Pending::failed(e);
        }
        self.count(Verb::AllGather, self.share::<T>(sizes.1));
        self.0.flight.start(move |shared, rank| {
            shared.all_gather(rank, input.as_ref(), output.as_mut())?;
            Ok((input, output))
        })
    }

    /// [`Group::all_to_all`] in flight: both buffers come back.
    pub fn all_to_all_start<T, B, C>(&self, input: B, mut output: C) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        if let Err(e) = self.exchange(input.as_ref().len(), output.as_mut().len()) {
            return Pending::failed(e);
        }
        self.count(Verb::AllToAll, self.share::<T>(input.as_ref().len()));
        self.0.flight.start(move |shared, rank| {
            shared.all_to_all(rank, input.as_ref(), output.as_mut())?;
            Ok((input, output))
        })
    }

    /// [`Group::shift`] in flight: both buffers come back.
    pub fn shift_start<T, B, C>(&self, input: B, mut output: C, by: usize) -> Pending<(B, C)>
    where
        T: Element,
        B: AsRef<[T]> + Send + 'static,
        C: AsMut<[T]> + Send + 'static,
    {
        if let Err(e) = self.same_len(input.as_ref().len(), output.as_mut().len()) {
            return Pending::failed(e);
        }
        let by = by % self.world_size();
        if by > 0 {
            self.count(Verb::Send, size_of_val(input.as_ref()));
        }
        self.0.flight.start(move |shared, rank| {
            match by {
                0 => output.as_mut().copy_from_slice(input.as_ref()),
                by => shared.shift(rank, input.as_ref(), output.as_mut(), by)?,
            }
            Ok((input, output))
        })
    }

    /// [`Group::broadcast`] in flight: the buffer comes back.
    pub fn broadcast_start<T: Element, B: AsMut<[T]> + Send + 'static>(
        &self,
        mut buf: B,
        root: usize,
    ) -> Pending<B> {
        if let Err(e) = self.has("broadcast", root) {
            return Pending::failed(e);
        }
        let bytes = if self.rank() == root { size_of_val(buf.as_mut()) } else { 0 };
        self.count(Verb::Broadcast, bytes);
        self.0.flight.start(move |shared, rank| {
            shared.broadcast(rank, buf.as_mut(), root)?;
            Ok(buf)
        })
    }

    fn same_len(&self, input: usize, output: usize) -> Result<()> {
        if input == output {
            return Ok(());
        }
        let reason = format!("input has {input} elements and output {output}; make them equal");
        Err(Error::Argument { op: "shift", reason })
    }

    fn times(
        &self,
        op: &'static str,
        long: &str,
        long_len: usize,
        short: &str,
        short_len: usize,
    ) -> Result<()> {
        let n = self.world_size();
        if long_len == n * short_len {
            return Ok(());
        }
        let reason = format!(
            "{long} has {long_len} elements and {short} {short_len}; with {n} ranks {long} must have {}",
            n * short_len
        );
        Err(Error::Argument { op, reason })
    }

    fn exchange(&self, input: usize, output: usize) -> Result<()> {
        let n = self.world_size();
        if input == output && input.is_multiple_of(n) {
            return Ok(());
        }
        let reason = format!(
            "input has {input} elements and output {output}; both must have one length that divides by {n}"
        );
        Err(Error::Argument { op: "all_to_all", reason })
    }

    fn has(&self, op: &'static str, rank: usize) -> Result<()> {
        if rank < self.world_size() {
            return Ok(());
        }
        let reason = format!("there is no rank {rank}; ranks are 0..{}", self.world_size());
        Err(Error::Argument { op, reason })
    }

    fn not_self(&self, op: &'static str, peer: usize) -> Result<()> {
        if peer != self.rank() {
            return Ok(());
        }
        let reason = format!("rank {peer} cannot exchange messages with itself");
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
                    .spawn_scoped(scope, move || f(group))
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
