//! A stand-in for `libnccl.so.2` and `libcuda.so.1`, built by `tests/nccl.rs`: ranks are threads
//! of one process, and device memory is the host's.
//!
//! It keeps what matters to a caller: a stream is a thread that works in order, calls return
//! before they are done, a collective waits for all ranks for ever and only an abort ends it,
//! initialisation does not block. `STAND_IN_VERSION` sets its version, `STAND_IN_FAULT=rank:op`
//! makes a rank's operation number `op` hang and report a remote error. Types and operations are
//! those of the real header.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::not_unsafe_ptr_arg_deref)]

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::Duration;

// ---- CUDA: streams are threads, events are flags, memory is the host's.

type Job = Box<dyn FnOnce() + Send>;

struct Stream(Sender<Job>);

type Event = Arc<Mutex<Arc<AtomicBool>>>;

fn on(stream: *mut c_void, job: impl FnOnce() + Send + 'static) {
    let stream = unsafe { &*stream.cast::<Stream>() };
    stream.0.send(Box::new(job)).expect("a stream's thread never ends");
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_: c_uint) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    unsafe { *count = 8 };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    unsafe { *device = ordinal };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    unsafe { *context = (device as usize + 1) as *mut c_void };
    0
}

thread_local! {
    static CONTEXT: RefCell<usize> = const { RefCell::new(0) };
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    CONTEXT.with(|c| *c.borrow_mut() = context as usize);
    0
}

/// `CUDA_ERROR_INVALID_CONTEXT`, as the driver says to a thread that has none.
fn no_context() -> bool {
    CONTEXT.with(|c| *c.borrow() == 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _: c_uint) -> c_int {
    if no_context() {
        return 201;
    }
    let (send, jobs) = channel::<Job>();
    std::thread::spawn(move || jobs.iter().for_each(|job| job()));
    unsafe { *stream = Box::into_raw(Box::new(Stream(send))).cast() };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> c_int {
    if no_context() {
        return 201;
    }
    // Not zero: whoever reads what was not written sees it.
    let memory = vec![0xa5a5_a5a5_a5a5_a5a5u64; bytes.div_ceil(8)].into_boxed_slice();
    unsafe { *address = Box::leak(memory).as_ptr() as u64 };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(_: u64) -> c_int {
    0
}

fn copy(stream: *mut c_void, to: usize, from: usize, bytes: usize) -> c_int {
    if no_context() {
        return 201;
    }
    on(stream, move || unsafe {
        std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
    });
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    copy(stream, to as usize, from as usize, bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    copy(stream, to as usize, from as usize, bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: *mut *mut c_void, _: c_uint) -> c_int {
    let new: Event = Arc::default();
    unsafe { *event = Box::into_raw(Box::new(new)).cast() };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> c_int {
    let flag = Arc::new(AtomicBool::new(false));
    *unsafe { &*event.cast::<Event>() }.lock().unwrap() = flag.clone();
    on(stream, move || flag.store(true, SeqCst));
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: *mut c_void) -> c_int {
    let done = unsafe { &*event.cast::<Event>() }.lock().unwrap().load(SeqCst);
    if done { 0 } else { 600 }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    drop(unsafe { Box::from_raw(event.cast::<Event>()) });
    0
}

// ---- NCCL: a place where ranks meet, by communicator and number of the operation.

/// What a rank brings to a meeting.
type Gift = Arc<dyn Any + Send + Sync>;

#[derive(Default)]
struct Hall {
    meetings: Mutex<HashMap<(u64, String), HashMap<usize, Gift>>>,
    changed: Condvar,
}

static HALL: LazyLock<Hall> = LazyLock::new(Hall::default);

struct Comm {
    id: u64,
    rank: usize,
    ranks: usize,
    aborted: AtomicBool,
    /// 0, 7 (in progress) or an error.
    state: AtomicI32,
    ops: AtomicU64,
    splits: AtomicU64,
    messages: Mutex<HashMap<(usize, usize), u64>>,
}

type Handle = *mut c_void;

fn comm(handle: Handle) -> Arc<Comm> {
    unsafe { &*handle.cast::<Arc<Mutex<Arc<Comm>>>>() }.lock().unwrap().clone()
}

impl Comm {
    fn new(id: u64, rank: usize, ranks: usize, state: i32) -> Arc<Comm> {
        Arc::new(Comm {
            id,
            rank,
            ranks,
            aborted: AtomicBool::new(false),
            state: AtomicI32::new(state),
            ops: AtomicU64::new(0),
            splits: AtomicU64::new(0),
            messages: Mutex::default(),
        })
    }

    /// Waits for `ranks` gifts under `key`, for ever, or until this rank aborts: then none.
    fn meet(&self, key: String, who: usize, ranks: usize, gift: Gift) -> Option<Vec<Gift>> {
        let key = (self.id, key);
        let mut meetings = HALL.meetings.lock().unwrap();
        meetings.entry(key.clone()).or_default().insert(who, gift);
        HALL.changed.notify_all();
        loop {
            let here = &meetings[&key];
            if here.len() == ranks {
                let mut all: Vec<_> = here.iter().map(|(r, g)| (*r, g.clone())).collect();
                all.sort_by_key(|(r, _)| *r);
                return Some(all.into_iter().map(|(_, g)| g).collect());
            }
            if self.aborted.load(SeqCst) {
                return None;
            }
            let nap = Duration::from_millis(5);
            meetings = HALL.changed.wait_timeout(meetings, nap).unwrap().0;
        }
    }
}

fn handle(comm: Arc<Comm>) -> Handle {
    Box::into_raw(Box::new(Arc::new(Mutex::new(comm)))).cast()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    let set = std::env::var("STAND_IN_VERSION").ok().and_then(|v| v.parse().ok());
    unsafe { *version = set.unwrap_or(2_23_04) };
    0
}

#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([u8; 128]);

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut bytes = [0u8; 128];
    bytes[..8].copy_from_slice(&(NEXT.fetch_add(1, SeqCst) << 32).to_le_bytes());
    unsafe { *id = UniqueId(bytes) };
    0
}

/// The head of `ncclConfig_t`.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

fn sound(config: *const Config) -> bool {
    let c = unsafe { &*config };
    c.size >= 24 && c.magic == 0xcafe_beef && c.version >= 2_14_00 && c.blocking == 0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRankConfig(
    new: *mut Handle,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const Config,
) -> c_int {
    if !sound(config) || no_context() {
        return 4;
    }
    let mut word = [0u8; 8];
    word.copy_from_slice(&id.0[..8]);
    let (rank, ranks) = (rank as usize, ranks as usize);
    let made = Comm::new(u64::from_le_bytes(word), rank, ranks, 7);
    unsafe { *new = handle(made.clone()) };
    std::thread::spawn(move || {
        if made.meet("init".into(), rank, ranks, Arc::new(())).is_some() {
            made.state.store(0, SeqCst);
        }
    });
    7
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommSplit(
    parent: Handle,
    color: c_int,
    key: c_int,
    new: *mut Handle,
    config: *const Config,
) -> c_int {
    if !sound(config) {
        return 4;
    }
    let parent = comm(parent);
    let number = parent.splits.fetch_add(1, SeqCst);
    let cell = Arc::new(Mutex::new(Comm::new(0, 0, 1, 7)));
    unsafe { *new = Box::into_raw(Box::new(cell.clone())).cast() };
    parent.state.store(7, SeqCst);
    std::thread::spawn(move || {
        let gift: Gift = Arc::new((color, key, parent.rank));
        let all = parent.meet(format!("split {number}"), parent.rank, parent.ranks, gift);
        let Some(all) = all else { return };
        let mut same: Vec<(c_int, c_int, usize)> = all
            .iter()
            .map(|g| *g.downcast_ref::<(c_int, c_int, usize)>().unwrap())
            .filter(|(c, ..)| *c == color)
            .collect();
        same.sort_by_key(|(_, key, rank)| (*key, *rank));
        let rank = same.iter().position(|(.., r)| *r == parent.rank).unwrap();
        // The same on all members, and nobody else's.
        let id = [number, color as u64].iter().fold(parent.id, |id, word| {
            (id ^ (word + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        });
        *cell.lock().unwrap() = Comm::new(id, rank, same.len(), 0);
        parent.state.store(0, SeqCst);
    });
    7
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(handle: Handle, state: *mut c_int) -> c_int {
    unsafe { *state = comm(handle).state.load(SeqCst) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(_: Handle) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(_: Handle) -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(handle: Handle) -> c_int {
    comm(handle).aborted.store(true, SeqCst);
    HALL.changed.notify_all();
    0
}

// ---- Operations. Inside a group they are gathered, and run as one job of their stream.

#[derive(Clone, Copy)]
struct Op {
    kind: Kind,
    from: usize,
    to: usize,
    count: usize,
    t: c_int,
    op: c_int,
    /// Root or peer.
    root: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    AllReduce,
    ReduceScatter,
    Reduce,
    AllGather,
    Broadcast,
    Send,
    Recv,
}

type Gathered = Option<Vec<(Arc<Comm>, usize, Op)>>;

thread_local! {
    static GROUP: RefCell<Gathered> = const { RefCell::new(None) };
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with(|g| *g.borrow_mut() = Some(vec![]));
    0
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> c_int {
    let Some(all) = GROUP.with(|g| g.borrow_mut().take()) else { return 5 };
    launch(all)
}

fn submit(handle: Handle, stream: *mut c_void, op: Op) -> c_int {
    if no_context() {
        return 1;
    }
    let comm = comm(handle);
    if comm.state.load(SeqCst) == 7 || comm.aborted.load(SeqCst) {
        return 4;
    }
    let one = (comm, stream as usize, op);
    GROUP.with(|g| match &mut *g.borrow_mut() {
        Some(all) => {
            all.push(one);
            7
        }
        None => launch(vec![one]),
    })
}

fn launch(all: Vec<(Arc<Comm>, usize, Op)>) -> c_int {
    let Some((comm, stream, _)) = all.first().cloned() else { return 0 };
    let number = comm.ops.fetch_add(1, SeqCst);
    let fault = std::env::var("STAND_IN_FAULT").ok();
    let faulty = fault.is_some_and(|f| f == format!("{}:{number}", comm.rank));
    // Messages count by pair and direction, so that groups may differ between ranks.
    let mut messages = comm.messages.lock().unwrap();
    let numbered: Vec<(Op, u64)> = all
        .iter()
        .map(|(_, _, op)| match op.kind {
            Kind::Send | Kind::Recv => {
                let pair = match op.kind {
                    Kind::Send => (comm.rank, op.root),
                    _ => (op.root, comm.rank + comm.ranks),
                };
                let next = messages.entry(pair).or_default();
                *next += 1;
                (*op, *next)
            }
            _ => (*op, 0),
        })
        .collect();
    drop(messages);
    let worker = comm.clone();
    on(stream as *mut c_void, move || {
        if faulty {
            worker.state.store(6, SeqCst);
            while !worker.aborted.load(SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            return;
        }
        // Sends and receives of one group never wait for each other.
        std::thread::scope(|s| {
            let (worker, numbered) = (&worker, &numbered);
            let (small, large): (Vec<_>, Vec<_>) = numbered
                .iter()
                .enumerate()
                .partition(|(_, (op, _))| matches!(op.kind, Kind::Send | Kind::Recv));
            for (_, (op, n)) in small {
                s.spawn(move || message(worker, *op, *n));
            }
            for (i, (op, _)) in large {
                collective(worker, format!("op {number}.{i}"), *op);
            }
        });
    });
    7
}

fn size(t: c_int) -> usize {
    [1, 1, 4, 4, 8, 8, 2, 4, 8, 2][t as usize]
}

fn message(comm: &Comm, op: Op, number: u64) {
    let (from, to) = match op.kind {
        Kind::Send => (comm.rank, op.root),
        _ => (op.root, comm.rank),
    };
    let who = usize::from(op.kind == Kind::Recv);
    let key = format!("message {from} {to} {number}");
    let Some(both) = comm.meet(key.clone(), who, 2, Arc::new(op)) else { return };
    let op_of = |i: usize| *both[i].downcast_ref::<Op>().unwrap();
    let (send, recv) = (op_of(0), op_of(1));
    if send.count * size(send.t) != recv.count * size(recv.t) {
        // As the real one: it hangs.
        comm.meet(format!("never {key}"), who, 3, Arc::new(()));
        return;
    }
    if who == 1 {
        let bytes = recv.count * size(recv.t);
        unsafe {
            std::ptr::copy_nonoverlapping(send.from as *const u8, recv.to as *mut u8, bytes);
        }
    }
    comm.meet(format!("{key} done"), who, 2, Arc::new(()));
}

fn collective(comm: &Comm, key: String, op: Op) {
    let (me, n) = (comm.rank, comm.ranks);
    let Some(all) = comm.meet(key.clone(), me, n, Arc::new(op)) else { return };
    let ops: Vec<Op> = all.iter().map(|g| *g.downcast_ref::<Op>().unwrap()).collect();
    let alike = |o: &Op| (o.kind == op.kind) && (o.count, o.t, o.root) == (op.count, op.t, op.root);
    if !ops.iter().all(alike) {
        comm.meet(format!("never {key}"), me, n + 1, Arc::new(()));
        return;
    }
    let bytes = op.count * size(op.t);
    let read = |r: usize, at: usize| unsafe {
        std::slice::from_raw_parts((ops[r].from as *const u8).add(at), bytes)
    };
    let parts = |at: usize| -> Vec<&[u8]> { (0..n).map(|r| read(r, at)).collect() };
    let result = match op.kind {
        Kind::AllReduce => reduce(&parts(0), op),
        Kind::Reduce if me == op.root => reduce(&parts(0), op),
        Kind::ReduceScatter => reduce(&parts(me * bytes), op),
        Kind::AllGather => parts(0).concat(),
        Kind::Broadcast => read(op.root, 0).to_vec(),
        _ => vec![],
    };
    // Nobody writes before all have read.
    if comm.meet(format!("{key} read"), me, n, Arc::new(())).is_some() {
        let to = op.to as *mut u8;
        unsafe { std::ptr::copy_nonoverlapping(result.as_ptr(), to, result.len()) };
    }
}

macro_rules! reduce_as {
    ($parts:expr, $op:expr, $t:ty, $wide:ty, $widen:expr, $plus:expr, $narrow:expr) => {{
        let size = size_of::<$t>();
        let read = |part: &[u8], i: usize| -> $wide {
            let mut word = [0u8; size_of::<$t>()];
            word.copy_from_slice(&part[i * size..(i + 1) * size]);
            $widen(<$t>::from_le_bytes(word))
        };
        let mut out = Vec::with_capacity($parts[0].len());
        for i in 0..$op.count {
            let mut acc: $wide = read($parts[0], i);
            for part in &$parts[1..] {
                let x: $wide = read(part, i);
                acc = match $op.op {
                    2 => {
                        if x > acc {
                            x
                        } else {
                            acc
                        }
                    }
                    3 => {
                        if x < acc {
                            x
                        } else {
                            acc
                        }
                    }
                    _ => $plus(acc, x),
                };
            }
            if $op.op == 4 {
                acc /= $parts.len() as $wide;
            }
            out.extend_from_slice(&<$t>::to_le_bytes($narrow(acc)));
        }
        out
    }};
}

fn reduce(parts: &[&[u8]], op: Op) -> Vec<u8> {
    match op.t {
        0 => reduce_as!(parts, op, i8, i8, |x| x, i8::wrapping_add, |x| x),
        1 => reduce_as!(parts, op, u8, u8, |x| x, u8::wrapping_add, |x| x),
        2 => reduce_as!(parts, op, i32, i32, |x| x, i32::wrapping_add, |x| x),
        3 => reduce_as!(parts, op, u32, u32, |x| x, u32::wrapping_add, |x| x),
        4 => reduce_as!(parts, op, i64, i64, |x| x, i64::wrapping_add, |x| x),
        5 => reduce_as!(parts, op, u64, u64, |x| x, u64::wrapping_add, |x| x),
        6 => reduce_as!(parts, op, u16, f32, f16_up, |a, b| a + b, f16_down),
        7 => reduce_as!(parts, op, f32, f32, |x| x, |a, b| a + b, |x| x),
        8 => reduce_as!(parts, op, f64, f64, |x| x, |a, b| a + b, |x| x),
        _ => reduce_as!(parts, op, u16, f32, bf16_up, |a, b| a + b, bf16_down),
    }
}

fn bf16_up(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

fn bf16_down(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// Numbers of the suite: finite and normal, or zero.
fn f16_up(x: u16) -> f32 {
    let (sign, exponent, fraction) =
        (u32::from(x >> 15), u32::from(x >> 10 & 31), u32::from(x & 1023));
    if exponent == 0 {
        return f32::from_bits(sign << 31);
    }
    f32::from_bits(sign << 31 | (exponent + 112) << 23 | fraction << 13)
}

fn f16_down(x: f32) -> u16 {
    let bits = x.to_bits();
    let (sign, rest) = ((bits >> 16 & 0x8000) as u16, bits & 0x7fff_ffff);
    if rest == 0 {
        return sign;
    }
    // To the nearest, ties to even.
    let rounded = rest + 0xfff + (rest >> 13 & 1);
    sign | ((rounded - (112 << 23)) >> 13) as u16
}

macro_rules! operations {
    ($($name:ident($($argument:ident: $t:ty),*) = $kind:ident($($value:expr),*);)*) => { $(
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $t,)* comm: Handle, stream: *mut c_void) -> c_int {
            submit(comm, stream, op(Kind::$kind, $($value),*))
        }
    )* };
}

fn op(kind: Kind, from: P, to: P, count: usize, t: c_int, op: c_int, root: c_int) -> Op {
    Op { kind, from: from as usize, to: to as usize, count, t, op, root: root as usize }
}

type P = *mut c_void;

const NONE: P = std::ptr::null_mut();

operations! {
    ncclAllReduce(a: P, b: P, n: usize, t: c_int, o: c_int) = AllReduce(a, b, n, t, o, 0);
    ncclReduceScatter(a: P, b: P, n: usize, t: c_int, o: c_int) = ReduceScatter(a, b, n, t, o, 0);
    ncclReduce(a: P, b: P, n: usize, t: c_int, o: c_int, r: c_int) = Reduce(a, b, n, t, o, r);
    ncclAllGather(a: P, b: P, n: usize, t: c_int) = AllGather(a, b, n, t, 0, 0);
    ncclBroadcast(a: P, b: P, n: usize, t: c_int, r: c_int) = Broadcast(a, b, n, t, 0, r);
    ncclSend(a: P, n: usize, t: c_int, peer: c_int) = Send(a, NONE, n, t, 0, peer);
    ncclRecv(a: P, n: usize, t: c_int, peer: c_int) = Recv(NONE, a, n, t, 0, peer);
}
