//! The conformance suite and the failures on processes: `mpirun -n 4 <this test>`.
//!
//! `cargo test --features mpi --test mpi` starts itself under `mpirun` with 2 and 4 processes.

mod suite;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use colossal_comm::{Config, Error, Group, Launch, ReduceOp};

fn main() {
    let scene = std::env::var("COLOSSAL_SCENE").unwrap_or_default();
    match Launch::from_env().expect("a sound environment") {
        Some(_) => play(&scene),
        None => start(),
    }
}

/// Starts each scene under mpirun.
fn start() {
    let me = std::env::current_exe().expect("this program has a path");
    let failures = [("mismatch", 3), ("leave", 3), ("late", 3), ("panic", 2)];
    let direct = [("conform", 2), ("conform", 4)].into_iter().chain(failures).map(|s| (s, "16"));
    // The rounds of large groups, in small ones.
    let rounds = [("conform", 3)].into_iter().chain(failures).map(|s| (s, "0"));
    for ((scene, n), few) in direct.chain(rounds) {
        // Another launcher, with its arguments: of MPICH, or over hosts.
        let mpirun = std::env::var("COLOSSAL_MPIRUN");
        let mpirun = mpirun.unwrap_or_else(|_| "mpirun --oversubscribe".into());
        let mut words = mpirun.split_whitespace();
        let mut job = Command::new(words.next().expect("a launcher"))
            .args(words)
            .args(["-n", &n.to_string()])
            .arg(&me)
            .env("COLOSSAL_SCENE", scene)
            .env("COLOSSAL_MPI_DIRECT", few)
            // Containers have one user, and no leave to read another process's memory.
            .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
            .envs([("OMPI_MCA_btl_vader_single_copy_mechanism", "none")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("mpirun is needed: apt-get install openmpi-bin libopenmpi-dev libclang-dev");
        let lines = BufReader::new(job.stdout.take().expect("it is piped")).lines();
        let (said, heard) = mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|l| said.send(l)));
        let deadline = Instant::now() + Duration::from_secs(180);
        let (mut good, mut text) = (0, String::new());
        // Until all output is there. Whoever fails a group leaves MPI without its blessing, and
        // Open MPI's mpirun may then wait for ever for processes that are gone: in those scenes
        // the words count, and mpirun is ended.
        while scene == "conform" || good < n {
            match heard.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    good += usize::from(line.contains("scene is good"));
                    text += &line;
                    text.push('\n');
                }
                Err(_) => break,
            }
        }
        let ended = match scene {
            "conform" if Instant::now() < deadline => job.wait().is_ok_and(|s| s.success()),
            _ => {
                std::thread::sleep(Duration::from_secs(1));
                // It may have ended by itself.
                let _ = job.kill();
                job.wait().is_ok() && scene != "conform"
            }
        };
        assert!(good == n && ended, "{scene} on {n}, direct to {few}: {good} good in time\n{text}");
        println!("{scene} on {n} processes, direct to {few} ... ok");
    }
}

fn play(scene: &str) {
    let timeout = if scene == "late" { 1000 } else { 30_000 };
    let g = Group::from_env_with(Config { timeout: Duration::from_millis(timeout) }).unwrap();
    let me = g.rank();
    g.barrier().unwrap();
    match scene {
        "conform" => suite::conformance(&g, g.world_size() > 2),
        "mismatch" => {
            let len = if me == 1 { 5 } else { 4 };
            let e = g.all_reduce(&mut vec![0.0f32; len], ReduceOp::Sum).unwrap_err();
            let text = e.to_string();
            assert!(e.is_mismatch(), "{text}");
            for part in ["all_reduce(4 x f32, Sum) at", "all_reduce(5 x f32, Sum) at", "mpi.rs:"] {
                assert!(text.contains(part), "{text}");
            }
            assert_eq!(g.barrier().unwrap_err(), e, "the group stays failed");
        }
        "leave" => {
            if me != 2 {
                let e = g.all_reduce(&mut vec![0.0f32; 10_000], ReduceOp::Sum).unwrap_err();
                assert!(matches!(e, Error::Gone { rank: 2, .. }), "{e}");
            }
        }
        "late" => {
            if me == 1 {
                std::thread::sleep(Duration::from_millis(2500));
            }
            let first = g.all_gather(&[me as u8], &mut [0; 3]);
            if me == 1 {
                // The others gave up long ago: it learns that now or at the next call.
                let e = first.and_then(|()| g.barrier()).unwrap_err();
                assert!(e.is_gone() || e.is_timeout(), "{e}");
            } else {
                let e = first.unwrap_err();
                assert!(e.is_timeout() && e.to_string().contains("[1]"), "{e}");
                std::thread::sleep(Duration::from_millis(2500));
            }
        }
        "panic" => {
            if me == 1 {
                let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let _group = g;
                    panic!("on purpose");
                }));
                assert!(panic.is_err());
            } else {
                let e = g.barrier().unwrap_err();
                assert!(
                    e.is_gone() && e.to_string().contains("rank 1 is gone (it panicked)"),
                    "{e}"
                );
            }
        }
        other => panic!("there is no scene {other}"),
    }
    println!("scene is good");
    // A rank that is early must not end the job while others still look.
    if scene != "conform" {
        std::thread::sleep(Duration::from_millis(300));
    }
}
