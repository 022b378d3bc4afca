//! The conformance suite and the failures over NCCL's interface, on a stand-in (`stand_in/nccl.rs`)
//! whose ranks are threads: no GPU is needed, and none is proven to work.
//!
//! Each test starts itself again with the stand-in's path in the environment.

mod suite;

use std::ffi::c_void;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use colossal_comm::{
    Config, DeviceMessage, DeviceSlice, DeviceSliceMut, Error, Group, Launch, Launcher, ReduceOp,
};

/// Builds the stand-in; tests are processes of their own, so each finds or makes the same file.
fn stand_in() -> PathBuf {
    static BUILDS: Mutex<()> = Mutex::new(());
    let _builds = BUILDS.lock();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/nccl.rs");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join("libstand_in_nccl.so");
    let age = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    if age(&library) > age(&source) {
        return library;
    }
    let part = folder.join(format!("stand_in_{}.so", std::process::id()));
    let status = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()))
        .args([
            "--edition",
            "2024",
            "--crate-type",
            "cdylib",
            "--crate-name",
            "stand_in",
            "-O",
            "-o",
        ])
        .arg(&part)
        .arg(&source)
        .status()
        .expect("rustc is where cargo is");
    assert!(status.success(), "the stand-in does not compile");
    std::fs::rename(&part, &library).expect("the folder is ours");
    library
}

/// Runs `scene` in a process that has the stand-in.
fn scene(name: &str, env: &[(&str, &str)], play: fn()) {
    if std::env::var_os("COLOSSAL_SCENE").is_some() {
        return play();
    }
    let library = stand_in();
    let out = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", name, "--nocapture"])
        .envs([("COLOSSAL_NCCL", &library), ("COLOSSAL_DRIVER", &library)])
        .env("COLOSSAL_SCENE", name)
        .envs(env.iter().copied())
        .output()
        .expect("this program runs");
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name}:\n{}{text}", String::from_utf8_lossy(&out.stdout));
}

/// Runs `f` on `n` ranks; what each returns.
fn ranks<R: Send>(n: usize, timeout: u64, f: impl Fn(Group) -> R + Sync) -> Vec<Option<R>> {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = free.local_addr().expect("it is bound").to_string();
    drop(free);
    let config = Config { timeout: Duration::from_millis(timeout) };
    std::thread::scope(|s| {
        let rank = |rank: usize| {
            let (f, address) = (&f, &address);
            s.spawn(move || {
                let launcher = Launcher::Torchrun;
                let launch = Launch { launcher, rank, world_size: n, local_rank: rank };
                f(Group::nccl(launch, address, config).unwrap())
            })
        };
        let all: Vec<_> = (0..n).map(rank).collect();
        all.into_iter().map(|t| t.join().ok()).collect()
    })
}

const LONG: u64 = 60_000;

#[test]
fn nccl_conforms() {
    scene("nccl_conforms", &[], || {
        for n in [2, 3] {
            let done = ranks(n, LONG, |g| suite::conformance(&g, true));
            assert!(done.iter().all(Option::is_some));
        }
    });
}

/// Memory of the stand-in's device is the host's.
fn on_device<T: suite::Number>(g: &Group, part: usize) {
    let (me, n) = (g.rank(), g.world_size());
    let stream = stream();
    // SAFETY: a stream of the stand-in, which lives as long as the process.
    let on = unsafe { g.on(stream) }.unwrap();
    let read = |x: &[T]| -> DeviceSlice<'_, T> {
        // SAFETY: as long as the vector, which lives until the stream was waited for.
        unsafe { DeviceSlice::from_raw(x.as_ptr() as u64, x.len()) }
    };
    fn write<T: suite::Number>(x: &mut [T]) -> DeviceSliceMut<'_, T> {
        // SAFETY: as above.
        unsafe { DeviceSliceMut::from_raw(x.as_mut_ptr() as u64, x.len()) }
    }
    let mine: Vec<T> = suite::row(me, 0..n * part);
    let zeros = |len: usize| vec![T::zeroed(); len];
    let (mut sum, mut least) = (mine.clone(), mine.clone());
    let (mut piece, mut all, mut turned) = (zeros(part), zeros(n * part), zeros(n * part));
    let (mut whole, mut one, mut shifted) = (zeros(n * part), zeros(part), zeros(n * part));
    let mut root = mine.clone();
    on.all_reduce(&mut write(&mut sum), ReduceOp::Sum).unwrap();
    on.reduce(&mut write(&mut least), ReduceOp::Min, 1).unwrap();
    on.reduce_scatter(read(&mine), &mut write(&mut piece), ReduceOp::Max).unwrap();
    // In the order of the stream: this reads what the call before it wrote.
    on.all_gather(read(&piece), &mut write(&mut all)).unwrap();
    on.all_to_all(read(&mine), &mut write(&mut turned)).unwrap();
    on.broadcast(&mut write(&mut root), 1).unwrap();
    on.gather(read(&mine[..part]), &mut write(&mut whole), 0).unwrap();
    on.scatter(read(&mine), &mut write(&mut one), 1).unwrap();
    on.shift(read(&mine), &mut write(&mut shifted), 1).unwrap();
    let counts: Vec<usize> = (0..n).map(|r| if r == 1 { 0 } else { part + r }).collect();
    let total = counts.iter().sum();
    let ragged: Vec<T> = suite::row(me, 0..counts[me]);
    let (mut joined, mut cut) = (zeros(total), zeros(counts[me]));
    on.all_gather_v(read(&ragged), &mut write(&mut joined), &counts).unwrap();
    on.reduce_scatter_v(read(&joined), &mut write(&mut cut), &counts, ReduceOp::Max).unwrap();
    let mut got = zeros(part);
    let (next, before) = ((me + 1) % n, (me + n - 1) % n);
    on.batch(&mut [
        DeviceMessage::Recv(write(&mut got), before),
        DeviceMessage::Send(read(&mine[..part]), next),
    ])
    .unwrap();
    on.wait().unwrap();
    let want = |op, range: std::ops::Range<usize>| -> Vec<f64> {
        range.map(|i| suite::reduced::<T>(op, n, i)).collect()
    };
    assert_eq!(suite::values(&sum), want(ReduceOp::Sum, 0..n * part));
    if me == 1 {
        assert_eq!(suite::values(&least), want(ReduceOp::Min, 0..n * part));
    }
    assert_eq!(suite::values(&all), want(ReduceOp::Max, 0..n * part));
    let block = me * part..(me + 1) * part;
    let across: Vec<T> = (0..n).flat_map(|r| suite::row::<T>(r, block.clone())).collect();
    assert_eq!(turned, across);
    assert_eq!(root, suite::row(1, 0..n * part));
    if me == 0 {
        let all: Vec<T> = (0..n).flat_map(|r| suite::row::<T>(r, 0..part)).collect();
        assert_eq!(whole, all);
    }
    assert_eq!(one, suite::row(1, block));
    assert_eq!(shifted, suite::row(before, 0..n * part));
    let wanted: Vec<T> = (0..n).flat_map(|r| suite::row::<T>(r, 0..counts[r])).collect();
    assert_eq!(joined, wanted);
    assert_eq!(cut, suite::row(me, 0..counts[me]));
    assert_eq!(got, suite::row(before, 0..part));
}

/// A stream of the stand-in, as a runtime for GPUs would bring one.
fn stream() -> *mut c_void {
    static LIBRARY: Mutex<Option<libloading::Library>> = Mutex::new(None);
    let path = std::env::var("COLOSSAL_DRIVER").unwrap();
    let mut library = LIBRARY.lock().unwrap();
    // SAFETY: the stand-in has no initialisers, and these functions have these types.
    unsafe {
        let library = library.get_or_insert_with(|| libloading::Library::new(path).unwrap());
        let create: libloading::Symbol<unsafe extern "C" fn(*mut *mut c_void, u32) -> i32> =
            library.get(b"cuStreamCreate\0").unwrap();
        let mut stream = std::ptr::null_mut();
        assert_eq!(create(&raw mut stream, 1), 0);
        stream
    }
}

#[test]
fn device_buffers_in_the_order_of_their_stream() {
    for check in ["0", "1"] {
        scene("device_buffers_in_the_order_of_their_stream", &[("COLOSSAL_CHECK", check)], || {
            let done = ranks(3, LONG, |g| {
                on_device::<f32>(&g, 1000);
                on_device::<half::bf16>(&g, 7);
                on_device::<u64>(&g, 1);
                let half = g.split(g.rank() % 2).unwrap();
                if half.world_size() > 1 {
                    on_device::<f32>(&half, 33);
                }
            });
            assert!(done.iter().all(Option::is_some));
        });
    }
}

#[test]
fn a_peer_that_does_not_come_is_aborted_and_named() {
    scene("a_peer_that_does_not_come_is_aborted_and_named", &[], || {
        let errors = ranks(3, 2000, |g| {
            g.barrier().unwrap();
            if g.rank() == 1 {
                std::thread::sleep(Duration::from_millis(3500));
            }
            let begun = Instant::now();
            let e = g.all_reduce(&mut vec![1.0f32; 9000], ReduceOp::Sum).unwrap_err();
            assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
            assert_eq!(g.barrier().unwrap_err(), e, "the group stays failed");
            e
        });
        for (rank, e) in errors.iter().enumerate() {
            let e = e.as_ref().unwrap();
            match e {
                Error::Timeout { missing, .. } if rank != 1 => assert_eq!(missing, &[1], "{e}"),
                Error::Gone { how, .. } => assert!(how.contains("group had failed"), "{e}"),
                e => panic!("rank {rank}: {e}"),
            }
        }
    });
}

#[test]
fn device_calls_that_differ_or_miss_a_rank_are_named() {
    scene("device_calls_that_differ_or_miss_a_rank_are_named", &[], || {
        // Lengths differ: NCCL hangs, and the store knows both lines.
        let errors = ranks(3, LONG, |g| {
            let mut x = vec![1.0f32; if g.rank() == 2 { 5 } else { 4 }];
            // SAFETY: memory and stream live until the wait has ended.
            unsafe {
                let on = g.on(stream()).unwrap();
                let mut x = DeviceSliceMut::<f32>::from_raw(x.as_mut_ptr() as u64, x.len());
                on.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                on.wait().unwrap_err()
            }
        });
        for e in &errors {
            let e = e.as_ref().unwrap();
            let text = e.to_string();
            assert!(e.is_mismatch(), "{text}");
            for part in ["all_reduce(4 x f32, Sum) at", "all_reduce(5 x f32, Sum) at", "nccl.rs:"] {
                assert!(text.contains(part), "{text}");
            }
            assert_eq!(e, errors[0].as_ref().unwrap(), "the same on all ranks");
        }
        // A rank never comes; nobody on the host waits, and the next call says so.
        let errors = ranks(2, 1000, |g| {
            if g.rank() == 1 {
                std::thread::sleep(Duration::from_millis(2500));
                return None;
            }
            let mut x = vec![1.0f32; 4];
            // SAFETY: as above.
            unsafe {
                let on = g.on(stream()).unwrap();
                let mut x = DeviceSliceMut::<f32>::from_raw(x.as_mut_ptr() as u64, x.len());
                on.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                std::thread::sleep(Duration::from_millis(3800));
                on.all_reduce(&mut x, ReduceOp::Sum).err()
            }
        });
        let e = errors[0].clone().unwrap().unwrap();
        assert!(e.is_timeout() && e.to_string().contains("[1]"), "{e}");
    });
}

#[test]
fn who_panics_leaves_or_sends_something_else_is_named() {
    scene("who_panics_leaves_or_sends_something_else_is_named", &[], || {
        for panics in [false, true] {
            let errors = ranks(3, LONG, |g| {
                g.barrier().unwrap();
                match g.rank() {
                    1 if panics => panic!("on purpose"),
                    1 => None,
                    _ => g.all_reduce(&mut vec![0.0f32; 9000], ReduceOp::Sum).err(),
                }
            });
            let e = errors[0].clone().unwrap().unwrap();
            let how = if panics { "it panicked" } else { "dropped its group" };
            assert!(e.is_gone() && e.to_string().contains(how), "{e}");
        }
        let errors = ranks(2, LONG, |g| match g.rank() {
            0 => g.send(&[1.0f32; 3], 1).unwrap_err(),
            _ => g.recv(&mut [0.0f64; 3], 0).unwrap_err(),
        });
        for e in errors {
            let e = e.unwrap();
            let text = e.to_string();
            assert!(e.is_mismatch() && text.contains("send(3 x f32, to 1)"), "{text}");
            assert!(text.contains("recv(3 x f64, from 0)"), "{text}");
        }
        let errors = ranks(2, LONG, |g| {
            let len = 3 + g.rank();
            g.all_reduce(&mut vec![0.0f32; len], ReduceOp::Sum).unwrap_err()
        });
        assert!(errors.iter().all(|e| e.as_ref().unwrap().is_mismatch()));
    });
}

#[test]
fn what_nccl_finds_wrong_ends_the_group() {
    // The fourth launch on rank 1's communicator, and all of them hang with it.
    scene("what_nccl_finds_wrong_ends_the_group", &[("STAND_IN_FAULT", "1:3")], || {
        let errors = ranks(2, LONG, |g| {
            (0..9).find_map(|_| g.all_reduce(&mut vec![0.0f32; 9000], ReduceOp::Sum).err())
        });
        let text = errors[1].clone().unwrap().unwrap().to_string();
        assert!(text.contains("NCCL error 6") && text.contains("all_reduce(9000"), "{text}");
        let e = errors[0].clone().unwrap().unwrap();
        assert!(e.is_gone() && e.to_string().contains("NCCL error 6"), "{e}");
    });
}

#[test]
fn old_or_missing_libraries_are_named() {
    fn alone() -> Error {
        let launcher = Launcher::Torchrun;
        let launch = Launch { launcher, rank: 0, world_size: 2, local_rank: 0 };
        Group::nccl(launch, "127.0.0.1:1", Config::default()).unwrap_err()
    }
    let name = "old_or_missing_libraries_are_named";
    scene(name, &[("STAND_IN_VERSION", "21705")], || {
        let text = alone().to_string();
        if std::env::var("COLOSSAL_NCCL").unwrap().contains("nowhere") {
            assert!(text.contains("NCCL is not here") && text.contains("nowhere.so"), "{text}");
        } else {
            assert!(text.contains("NCCL here is 2.17.5; 2.18.0 or newer"), "{text}");
        }
    });
    scene(name, &[("COLOSSAL_NCCL", "nowhere.so")], || {
        let text = alone().to_string();
        assert!(text.contains("not here") || text.contains("2.17.5"), "{text}");
    });
}

#[test]
fn who_never_joins_is_named() {
    scene("who_never_joins_is_named", &[], || {
        let launcher = Launcher::Torchrun;
        let launch = Launch { launcher, rank: 0, world_size: 3, local_rank: 0 };
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let config = Config { timeout: Duration::from_millis(500) };
        let text = Group::nccl(launch, &free, config).unwrap_err().to_string();
        assert!(text.contains("[1, 2] of 3 did not join"), "{text}");
        let far = Launch { local_rank: 8, ..launch };
        let text = Group::nccl(far, &free, config).unwrap_err().to_string();
        assert!(text.contains("shows 8 GPU(s)"), "{text}");
    });
}
