//! The few calls of MPI that the engine needs, all of which return at once.
//!
//! One lock is held around calls ([`Calls`] is its proof), so `MPI_THREAD_SERIALIZED` is enough; a
//! thread that waits polls, and hands the lock on to whoever waits for it.

use std::ffi::{c_int, c_void};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use mpi::ffi;
use parking_lot::{Mutex, MutexGuard};

use super::PARTS;
use crate::error::{Error, Result};
use crate::header::{HEADER, Header};

static LOCK: Mutex<()> = Mutex::new(());

/// The right to call MPI.
pub(super) struct Calls(MutexGuard<'static, ()>);

/// Waits for the right to call MPI.
pub(super) fn calls() -> Calls {
    Calls(LOCK.lock())
}

/// Was a group given up? Then requests are left behind, and a finalize could wait for ever.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Initialises MPI, once in a process; it ends with the process.
fn initialise() -> Result<()> {
    let _calls = calls();
    let (mut before, mut provided) = (0, 0);
    // SAFETY: these calls are allowed before MPI is initialised, and after its end; the pointers
    // are valid, and null arguments are allowed since MPI 2.
    unsafe {
        check("MPI_Initialized", ffi::MPI_Initialized(&raw mut before))?;
        if before != 0 {
            let reason = "MPI was initialised before: it can be used once in a process; clone the group instead";
            return Err(Error::Engine { op: "from_env".into(), reason: reason.into() });
        }
        let level = ffi::RSMPI_THREAD_SERIALIZED;
        let none = std::ptr::null_mut();
        let code = ffi::MPI_Init_thread(none, std::ptr::null_mut(), level, &raw mut provided);
        check("MPI_Init_thread", code)?;
        if provided < level {
            let reason = "this MPI was built without threads; install one with MPI_THREAD_SERIALIZED (Open MPI and MPICH of Debian have it)";
            return Err(Error::Engine { op: "from_env".into(), reason: reason.into() });
        }
        // Threads of calls in flight may outlive `main`, so no handle can be the last.
        libc::atexit(finalise);
    }
    Ok(())
}

extern "C" fn finalise() {
    if FAILED.load(Relaxed) {
        return;
    }
    // Kept for ever: a thread that comes now must not call MPI any more.
    std::mem::forget(calls());
    // SAFETY: MPI was initialised, and nobody calls it after this.
    unsafe { ffi::MPI_Finalize() };
}

/// A group was given up.
pub(super) fn give_up() {
    FAILED.store(true, Relaxed);
}

fn check(op: &str, code: c_int) -> Result<()> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = vec![0u8; 1024];
    let mut len = 0;
    // SAFETY: the buffer is longer than MPI_MAX_ERROR_STRING of any implementation.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &raw mut len) };
    text.truncate(len.max(0) as usize);
    let reason = String::from_utf8_lossy(&text).into_owned();
    Err(Error::Engine { op: op.into(), reason })
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Request(ffi::MPI_Request);

// SAFETY: a request may be tested by any thread, one at a time (the lock).
unsafe impl Send for Request {}

impl Request {
    /// Has it ended?
    pub(super) fn test(&mut self, _: &Calls) -> Result<bool> {
        let mut flag = 0;
        // SAFETY: the request is ours; one that has ended is null, which may be tested.
        let code =
            unsafe { ffi::MPI_Test(&raw mut self.0, &raw mut flag, ffi::RSMPI_STATUS_IGNORE) };
        check("MPI_Test", code)?;
        Ok(flag != 0)
    }
}

/// Looks before a waiter offers its core: many when the ranks of this host have a core each, for a
/// yield on a busy machine costs a time slice of somebody else; few when they share cores.
static KEEP: LazyLock<u64> = LazyLock::new(|| {
    let number = |name| std::env::var(name).ok()?.parse::<usize>().ok();
    let here = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"];
    let here = here.into_iter().find_map(number);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    if here.is_some_and(|n| n <= cores) { 5000 } else { 100 }
});

/// A look that takes longer than this has moved a part of a payload: MPI works while it is looked at.
const MOVED: Duration = Duration::from_micros(2);

/// Polls `done` until it is true (then true) or `timeout` has passed (then false): looks, and after
/// many looks at which nothing moved offers the core, then naps.
pub(super) fn poll(
    calls: &mut Calls,
    timeout: Duration,
    mut done: impl FnMut(&Calls) -> Result<bool>,
) -> Result<bool> {
    let (keep, mut deadline, mut idle) = (*KEEP, None, 0u64);
    for look in 1u64.. {
        // Short waits are not timed.
        let began = (look > 256).then(Instant::now);
        if done(calls)? {
            return Ok(true);
        }
        idle = if began.is_some_and(|t| t.elapsed() > MOVED) { 0 } else { idle + 1 };
        match idle {
            _ if idle < keep && look % 16 == 0 => MutexGuard::bump(&mut calls.0),
            _ if idle < keep => std::hint::spin_loop(),
            _ if idle < keep + 4000 => MutexGuard::unlocked(&mut calls.0, std::thread::yield_now),
            _ => MutexGuard::unlocked(&mut calls.0, || {
                std::thread::sleep(Duration::from_micros(50));
            }),
        }
        if look % 64 == 0 {
            let now = Instant::now();
            if now >= *deadline.get_or_insert(now + timeout) {
                return Ok(false);
            }
        }
    }
    Ok(false)
}

/// Tests requests until one is under way; true when all have ended.
pub(super) fn test_all(calls: &Calls, requests: &mut Vec<Request>) -> Result<bool> {
    while let Some(request) = requests.last_mut() {
        if !request.test(calls)? {
            return Ok(false);
        }
        requests.pop();
    }
    Ok(true)
}

/// A communicator of ours.
#[derive(Debug)]
pub(super) struct Comm {
    raw: ffi::MPI_Comm,
    pub(super) rank: usize,
    pub(super) size: usize,
}

// SAFETY: every use of the handle holds the lock.
unsafe impl Send for Comm {}

// SAFETY: as above.
unsafe impl Sync for Comm {}

/// Lengths and offsets of a ragged collective, in elements.
pub(super) struct Cuts {
    pub(super) lens: Vec<c_int>,
    pub(super) offsets: Vec<c_int>,
}

impl Cuts {
    /// Parts that lie one after the other.
    pub(super) fn new(lens: impl Iterator<Item = usize>) -> Result<Cuts> {
        let mut cuts = Cuts { lens: Vec::new(), offsets: Vec::new() };
        let mut at = 0usize;
        for len in lens {
            cuts.lens.push(count(len)?);
            cuts.offsets.push(count(at)?);
            at += len;
        }
        count(at)?;
        Ok(cuts)
    }

    /// The same `len` elements, `n` times.
    pub(super) fn same(len: usize, n: usize) -> Result<Cuts> {
        Cuts::strided(len, 0, n)
    }

    /// `n` parts of `len` elements that begin `stride` apart.
    pub(super) fn strided(len: usize, stride: usize, n: usize) -> Result<Cuts> {
        let offsets = (0..n).map(|r| count(r * stride)).collect::<Result<_>>()?;
        Ok(Cuts { lens: vec![count(len)?; n], offsets })
    }
}

/// Bytes of the longest message.
const LONGEST: usize = 1 << 30;

/// MPI counts in 32 bits.
fn count(len: usize) -> Result<c_int> {
    c_int::try_from(len).map_err(|_| Error::Engine {
        op: "mpi".into(),
        reason: format!(
            "a buffer of {len} elements; MPI counts to {}: send it in pieces",
            c_int::MAX
        ),
    })
}

/// The unsigned type of a size: bytes are moved, never reduced.
fn datatype(size: usize) -> ffi::MPI_Datatype {
    // SAFETY: constants of the library, set when it is loaded.
    unsafe {
        match size {
            2 => ffi::RSMPI_UINT16_T,
            4 => ffi::RSMPI_UINT32_T,
            8 => ffi::RSMPI_UINT64_T,
            _ => ffi::RSMPI_UINT8_T,
        }
    }
}

/// The address, unless it is that of an empty slice, which MPI could take for `MPI_IN_PLACE` or
/// refuse: then one of a byte that is not used.
fn solid(address: *const u8) -> *const u8 {
    static NOTHING: u64 = 0;
    if address.addr() < 4096 { (&raw const NOTHING).cast() } else { address }
}

/// Starts a request.
macro_rules! start {
    ($name:ident, $($argument:expr),* $(,)?) => {{
        let mut request = ffi::RSMPI_REQUEST_NULL;
        let code = ffi::$name($($argument),*, &raw mut request);
        check(stringify!($name), code)?;
        Ok(Request(request))
    }};
}

/// # Safety of the `unsafe` functions
/// Buffers hold what the lengths say, in elements of `size` bytes, and stay valid and are left
/// alone (senders': may be read) until the request has ended.
impl Comm {
    /// Two communicators over all processes: for blocking calls and for those in flight.
    pub(super) fn world() -> Result<[Comm; 2]> {
        initialise()?;
        // SAFETY: a constant of the library.
        let all = unsafe { ffi::RSMPI_COMM_WORLD };
        Ok([Comm::dup(all)?, Comm::dup(all)?])
    }

    fn dup(of: ffi::MPI_Comm) -> Result<Comm> {
        let calls = calls();
        // SAFETY: a valid communicator; every process calls this in the same order.
        let raw = unsafe {
            let mut raw = of;
            check("MPI_Comm_dup", ffi::MPI_Comm_dup(of, &raw mut raw))?;
            raw
        };
        drop(calls);
        Comm::of(raw)
    }

    fn of(raw: ffi::MPI_Comm) -> Result<Comm> {
        let _calls = calls();
        let (mut rank, mut size) = (0, 0);
        // SAFETY: a valid communicator and valid pointers.
        unsafe {
            let handler = ffi::RSMPI_ERRORS_RETURN;
            check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(raw, handler))?;
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(raw, &raw mut rank))?;
            check("MPI_Comm_size", ffi::MPI_Comm_size(raw, &raw mut size))?;
        }
        Ok(Comm { raw, rank: rank as usize, size: size as usize })
    }

    /// Communicators of the ranks that name the same colour, all of whom are known to be here.
    pub(super) fn split(&self, color: usize) -> Result<[Comm; 2]> {
        let calls = calls();
        // SAFETY: a valid communicator; every rank is here.
        let raw = unsafe {
            let mut raw = self.raw;
            let code =
                ffi::MPI_Comm_split(self.raw, count(color)?, count(self.rank)?, &raw mut raw);
            check("MPI_Comm_split", code)?;
            raw
        };
        drop(calls);
        let first = Comm::of(raw)?;
        let second = Comm::dup(raw)?;
        Ok([first, second])
    }

    /// Ends all processes: a rank died where no error can be returned.
    pub(super) fn abort(&self) -> ! {
        // SAFETY: a valid communicator; the lock is left out, because nothing comes after.
        unsafe { ffi::MPI_Abort(self.raw, 1) };
        std::process::abort()
    }

    pub(super) unsafe fn send(
        &self,
        _: &Calls,
        from: *const u8,
        bytes: usize,
        to: usize,
        tag: i32,
        synchronous: bool,
    ) -> Result<Request> {
        let (len, to, from) = (count(bytes)?, count(to)?, from.cast::<c_void>());
        // SAFETY: the caller's contract.
        unsafe {
            if synchronous {
                start!(MPI_Issend, from, len, datatype(1), to, tag, self.raw)
            } else {
                start!(MPI_Isend, from, len, datatype(1), to, tag, self.raw)
            }
        }
    }

    pub(super) unsafe fn recv(
        &self,
        _: &Calls,
        to: *mut u8,
        bytes: usize,
        from: usize,
        tag: i32,
    ) -> Result<Request> {
        let (len, from) = (count(bytes)?, count(from)?);
        // SAFETY: the caller's contract.
        unsafe { start!(MPI_Irecv, to.cast(), len, datatype(1), from, tag, self.raw) }
    }

    /// A word that has come with this tag, and from whom.
    pub(super) fn take_word(&self, _: &Calls, tag: i32) -> Result<Option<(usize, Header)>> {
        let (mut flag, mut header) = (0, Header::zeroed());
        // SAFETY: valid pointers, for as many bytes; what was seen by the probe is received by the
        // next call, for nobody else receives (the lock).
        unsafe {
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            let any = ffi::RSMPI_ANY_SOURCE;
            let code = ffi::MPI_Iprobe(any, tag, self.raw, &raw mut flag, &raw mut status);
            check("MPI_Iprobe", code)?;
            if flag == 0 {
                return Ok(None);
            }
            let (from, ignore) = (status.MPI_SOURCE, ffi::RSMPI_STATUS_IGNORE);
            let (to, t) = ((&raw mut header).cast(), datatype(1));
            let code = ffi::MPI_Recv(to, HEADER as c_int, t, from, tag, self.raw, ignore);
            check("MPI_Recv", code)?;
            Ok(Some((from as usize, header)))
        }
    }

    pub(super) unsafe fn broadcast(
        &self,
        _: &Calls,
        buffer: *mut u8,
        len: usize,
        size: usize,
        root: usize,
    ) -> Result<Request> {
        let (len, root) = (count(len)?, count(root)?);
        // SAFETY: the caller's contract.
        unsafe { start!(MPI_Ibcast, buffer.cast(), len, datatype(size), root, self.raw) }
    }

    pub(super) unsafe fn gather(
        &self,
        _: &Calls,
        input: *const u8,
        output: *mut u8,
        cuts: &Cuts,
        size: usize,
        root: usize,
    ) -> Result<Request> {
        let (mine, t, root) = (cuts.lens[self.rank], datatype(size), count(root)?);
        let (lens, offsets) = (cuts.lens.as_ptr(), cuts.offsets.as_ptr());
        // SAFETY: the caller's contract, which holds for the cuts as well.
        unsafe {
            start!(
                MPI_Igatherv,
                solid(input).cast(),
                mine,
                t,
                solid(output.cast_const()).cast_mut().cast(),
                lens,
                offsets,
                t,
                root,
                self.raw
            )
        }
    }

    pub(super) unsafe fn scatter(
        &self,
        _: &Calls,
        input: *const u8,
        output: *mut u8,
        cuts: &Cuts,
        size: usize,
        root: usize,
    ) -> Result<Request> {
        let (mine, t, root) = (cuts.lens[self.rank], datatype(size), count(root)?);
        let (lens, offsets) = (cuts.lens.as_ptr(), cuts.offsets.as_ptr());
        // SAFETY: the caller's contract, which holds for the cuts as well.
        unsafe {
            start!(
                MPI_Iscatterv,
                solid(input).cast(),
                lens,
                offsets,
                t,
                solid(output.cast_const()).cast_mut().cast(),
                mine,
                t,
                root,
                self.raw
            )
        }
    }

    /// Each rank's part to it, and a part of each: messages, which for large parts cost less than
    /// the collective (Open MPI 4.1, two ranks, 64 KiB). Nothing goes to this rank itself.
    pub(super) unsafe fn all_to_all(
        &self,
        calls: &Calls,
        input: *const u8,
        send: &Cuts,
        output: *mut u8,
        recv: &Cuts,
        size: usize,
    ) -> Result<Vec<Request>> {
        let (me, n) = (self.rank, self.size);
        let mut requests = Vec::with_capacity(2 * (n - 1));
        // Where a peer's part lies, in pieces whose bytes MPI can count.
        let pieces = |cuts: &Cuts, peer: usize| {
            let (at, len) = (cuts.offsets[peer] as usize * size, cuts.lens[peer] as usize * size);
            (0..len).step_by(LONGEST).map(move |i| (at + i, LONGEST.min(len - i)))
        };
        // SAFETY: the caller's contract, which holds for the cuts as well.
        unsafe {
            for peer in (1..n).map(|by| (me + n - by) % n) {
                for (at, bytes) in pieces(recv, peer) {
                    requests.push(self.recv(calls, output.add(at), bytes, peer, PARTS)?);
                }
            }
            for peer in (1..n).map(|by| (me + by) % n) {
                for (at, bytes) in pieces(send, peer) {
                    requests.push(self.send(calls, input.add(at), bytes, peer, PARTS, false)?);
                }
            }
        }
        Ok(requests)
    }
}
