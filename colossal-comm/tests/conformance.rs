//! The conformance suite on threads, for 1 to 8 ranks, and the chaos that groups must survive.

mod suite;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use colossal_comm::{Config, Error, Group, ReduceOp, on_ranks};

#[test]
fn threads_conform() {
    for n in [1, 2, 3, 4, 5, 8] {
        on_ranks(n, |g| suite::conformance(&g, n > 5));
    }
}

fn under(timeout: u64, n: usize, f: impl Fn(Group) -> Option<Error> + Sync) -> Vec<Option<Error>> {
    let groups = Group::threads_with(n, Config { timeout: Duration::from_millis(timeout) });
    std::thread::scope(|s| {
        let f = &f;
        let ranks: Vec<_> = groups.into_iter().map(|g| s.spawn(move || f(g))).collect();
        ranks.into_iter().map(|r| r.join().unwrap_or(None)).collect()
    })
}

/// Some calls that change with `step`, small and large, alike on all ranks.
fn work(g: &Group, step: usize) -> Result<(), Error> {
    let len = if step.is_multiple_of(3) { 30_000 } else { 16 };
    match step % 4 {
        0 => g.all_reduce(&mut vec![1.0f32; len], ReduceOp::Sum),
        1 => g.all_gather(&vec![1u8; len], &mut vec![0; len * g.world_size()]),
        2 => g.all_reduce_start::<f32, _>(vec![1.0; len], ReduceOp::Max).wait().map(drop),
        _ => g.broadcast(&mut vec![1i32; len], 0),
    }
}

/// In each round one rank kills itself, drops out, calls something else or (now and then) stalls,
/// after some calls. Every other rank must get an error that names it, and none may hang.
#[test]
fn chaos_is_an_error_that_names_its_rank() {
    let (n, begin) = (4, Instant::now());
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let rounds = AtomicUsize::new(0);
    for round in 0..2000 {
        let (culprit, calls) = (round % n, round / 7 % 9);
        let kind = if round % 400 == 399 { 3 } else { round / 4 % 3 };
        // A stall must be longer than the time-out, and the time-out longer than a busy machine.
        let timeout = if kind == 3 { 300 } else { 20_000 };
        let errors = under(timeout, n, |g| {
            for step in 0..calls {
                if let Err(e) = work(&g, step) {
                    return Some(e);
                }
            }
            if g.rank() == culprit {
                match kind {
                    0 => panic!("on purpose"),
                    1 => return None,
                    2 => return g.reduce(&mut [1.0f64], ReduceOp::Sum, culprit).err(),
                    _ => std::thread::sleep(Duration::from_millis(500)),
                }
            }
            // Blocking calls only: what is in flight has a rendezvous of its own.
            g.all_reduce(&mut vec![1.0f32; 16 + 9000 * (round % 2)], ReduceOp::Sum).err()
        });
        for (rank, error) in errors.iter().enumerate().filter(|(r, _)| *r != culprit) {
            let error =
                error.as_ref().unwrap_or_else(|| panic!("round {round}: rank {rank} has no error"));
            let text = error.to_string();
            let named = match (kind, error) {
                (0, Error::Gone { rank, how, .. }) => *rank == culprit && how.contains("panicked"),
                (1, Error::Gone { rank, how, .. }) => *rank == culprit && how.contains("dropped"),
                (2, Error::Mismatch { .. }) => {
                    text.contains("reduce(1 x f64, Sum") && text.contains("conformance.rs:")
                }
                (3, Error::Timeout { missing, .. }) => missing.contains(&culprit),
                _ => false,
            };
            assert!(named, "round {round}, kind {kind}, rank {culprit}: {text}");
        }
        rounds.fetch_add(1, Relaxed);
    }
    std::panic::set_hook(quiet);
    eprintln!("{} rounds in {:?}", rounds.load(Relaxed), begin.elapsed());
}
