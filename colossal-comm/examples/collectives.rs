//! Times collectives: a line `verb bytes microseconds` for each verb and size.
//!
//! `collectives [RANKS] [LARGEST_BYTES]`; sizes are of the full buffer of one rank, in f32. Calls
//! go back to back; the figure is the slowest rank's, the median of five turns. At the end the
//! alpha-beta model that fits them. `cargo xtask bench comm` puts it
//! beside the same program in C over MPI.

use std::time::Instant;

use colossal_comm::{Cost, Group, Launch, ReduceOp, Result, on_ranks};

const SIZES: [(usize, usize); 5] =
    [(1 << 10, 1000), (64 << 10, 300), (1 << 20, 60), (16 << 20, 6), (64 << 20, 2)];
/// `copy` is none: each rank copies a buffer, which is what the machine's memory allows.
const VERBS: [&str; 10] = [
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "shift",
    "copy",
];

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|n| n.parse().ok()).collect();
    let ranks = numbers.first().copied().unwrap_or(2);
    let largest = numbers.get(1).copied().unwrap_or(16 << 20);
    // Started by mpirun or srun, this process is one rank; alone, it has all of them.
    let lines = match Launch::from_env() {
        Ok(None) => on_ranks(ranks, |group| time(&group, largest)).remove(0),
        _ => Group::from_env().and_then(|group| {
            let lines = time(&group, largest)?;
            Ok(if group.rank() == 0 { lines } else { vec![] })
        }),
    };
    match lines {
        Ok(lines) => lines.iter().for_each(|line| println!("{line}")),
        Err(e) => eprintln!("{e}"),
    }
}

fn time(group: &Group, largest: usize) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut measured = vec![Vec::new(); VERBS.len()];
    for (bytes, repeats) in SIZES.into_iter().filter(|(bytes, _)| *bytes <= largest) {
        let n = bytes / 4;
        let (mut full, mut other) = (vec![1e-30f32; n], vec![1e-30f32; n]);
        let mut part = vec![1e-30f32; n / group.world_size()];
        for (verb, measured) in VERBS.iter().zip(&mut measured) {
            let mut call = || match *verb {
                "all_reduce" => group.all_reduce(&mut full, ReduceOp::Sum),
                "all_gather" => group.all_gather(&part, &mut other),
                "reduce_scatter" => group.reduce_scatter(&full, &mut part, ReduceOp::Sum),
                "all_to_all" => group.all_to_all(&full, &mut other),
                "broadcast" => group.broadcast(&mut full, 0),
                "reduce" => group.reduce(&mut full, ReduceOp::Sum, 0),
                "gather" => group.gather(&part, &mut other, 0),
                "scatter" => group.scatter(&full, &mut part, 0),
                "shift" => group.shift(&full, &mut other, 1),
                _ => {
                    other.copy_from_slice(std::hint::black_box(&full));
                    Ok(())
                }
            };
            call()?;
            call()?;
            let mut turns = [0.0f64; 5];
            for turn in &mut turns {
                group.barrier()?;
                let start = Instant::now();
                for _ in 0..repeats {
                    call()?;
                }
                let mut slowest = [start.elapsed().as_secs_f64() / repeats as f64];
                group.all_reduce(&mut slowest, ReduceOp::Max)?;
                *turn = slowest[0];
            }
            turns.sort_by(f64::total_cmp);
            measured.push((bytes, turns[2]));
            lines.push(format!("{verb} {bytes} {:.2}", turns[2] * 1e6));
        }
    }
    let mut turns = [0.0f64; 5];
    for turn in &mut turns {
        let start = Instant::now();
        for _ in 0..1000 {
            group.barrier()?;
        }
        *turn = start.elapsed().as_secs_f64() / 1000.0;
    }
    turns.sort_by(f64::total_cmp);
    lines.push(format!("barrier 0 {:.2}", turns[2] * 1e6));
    for (verb, measured) in VERBS.iter().zip(&measured).filter(|(verb, _)| **verb != "copy") {
        if let Some(cost) = Cost::fit(measured) {
            let (alpha, rate) = (cost.alpha * 1e6, 1e-9 / cost.beta);
            lines.push(format!("cost {verb} alpha {alpha:.2} us, 1/beta {rate:.1} GB/s"));
        }
    }
    Ok(lines)
}
