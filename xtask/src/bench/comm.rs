//! Collectives beside Open MPI and MPICH (the same program in C) and gloo, in turns.
//!
//! Threads of one process against processes; with MPI installed, our MPI engine against the same
//! program in C as well. The floor of a verb is the bytes that must be read and written, over the
//! speed at which the ranks copy buffers of the same size; what works in place writes lines that it
//! has just read, and can be faster than copies. Then the cost model fitted to ours.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::page::output;
use super::{Args, median, python};
use crate::{cargo, exists, run};

/// Figures of one program: microseconds of each verb and size, over the turns.
type Times = BTreeMap<(usize, String), Vec<f64>>;

/// A program and its arguments.
struct Side {
    name: String,
    line: Vec<String>,
    times: Times,
}

impl Side {
    fn new(name: &str, line: &[&str]) -> Side {
        let line = line.iter().map(ToString::to_string).collect();
        Side { name: name.into(), line, times: Times::new() }
    }

    fn turn(&mut self) -> Result<String> {
        let arguments: Vec<&str> = self.line[1..].iter().map(String::as_str).collect();
        let text = output(&self.line[0], &arguments)?;
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [verb, bytes, time] = words[..] {
                let time: f64 = time.parse().with_context(|| format!("no figure in {line:?}"))?;
                self.times.entry((bytes.parse()?, verb.into())).or_default().push(time);
            }
        }
        if self.times.is_empty() {
            bail!("{} gave no figures; run it by hand: {}", self.name, self.line.join(" "));
        }
        Ok(text)
    }

    fn median(&self, bytes: usize, verb: &str) -> Option<f64> {
        self.times.get(&(bytes, verb.to_string())).map(|times| median(&mut times.clone()))
    }
}

/// Runs all sides in turns for 2 and 4 ranks; `--only "2 ranks"` for one of them.
pub(super) fn comm(args: &Args) -> Result<Vec<Value>> {
    let example = ["build", "--release", "-p", "colossal-comm", "--example", "collectives"];
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    let built = format!("{target}/release/examples/collectives");
    let (threads, processes) =
        (format!("{target}/collectives"), format!("{target}/collectives_mpi"));
    let mpi = exists("mpicc", "--version");
    if mpi {
        run(&cargo(), &[&example[..], &["--features", "mpi"]].concat(), &[])?;
        std::fs::copy(&built, &processes)?;
    } else {
        println!(
            "MPI is not installed; to compare with it: apt-get install openmpi-bin libopenmpi-dev libclang-dev mpich libmpich-dev"
        );
    }
    run(&cargo(), &example, &[])?;
    std::fs::copy(&built, &threads)?;
    let c = |name: &str, compiler: &str| -> Result<Option<String>> {
        let peer = format!("{target}/collectives_{name}");
        if !exists(compiler, "--version") {
            return Ok(None);
        }
        let source = "xtask/peers/collectives_mpi.c";
        run(compiler, &["-O3", "-march=native", source, "-o", &peer], &[])?;
        Ok(Some(peer))
    };
    let (openmpi, mpich) = (c("openmpi", "mpicc.openmpi")?, c("mpich", "mpicc.mpich")?);
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut rows = Vec::new();
    let wanted = |ranks: &usize| format!("{ranks} ranks").contains(&args.only);
    for ranks in [2usize, 4].into_iter().filter(wanted) {
        let n = ranks.to_string();
        // Ranks that share cores are about latency, and gloo takes minutes for large buffers.
        let largest = if ranks > cores { "16777216" } else { "67108864" };
        // Containers have one user, and no leave to read another process's memory.
        let mut mpirun = vec!["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe"];
        mpirun.extend(["--mca", "btl_vader_single_copy_mechanism", "none", "-n", &n]);
        let mut ours = Side::new("threads", &[&threads, &n, largest]);
        let mut peers = Vec::new();
        let mut engine = None;
        if let Some(peer) = &openmpi {
            peers.push(Side::new("Open MPI", &[&mpirun[..], &[peer, largest]].concat()));
            engine = Some(Side::new("mpi", &[&mpirun[..], &[&processes, &n, largest]].concat()));
        }
        if let Some(peer) = &mpich {
            // It spins: with more ranks than cores a call takes milliseconds, and a run for ever.
            if ranks <= cores {
                peers.push(Side::new("MPICH", &["mpirun.mpich", "-n", &n, peer, largest]));
            }
        }
        if let Some(python) = python(args)? {
            let line = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"];
            let script = ["xtask/peers/collectives_gloo.py", largest];
            peers.push(Side::new("gloo", &[&line[..], &[&n], &script].concat()));
        }
        let mut costs = String::new();
        for _ in 0..args.rounds {
            costs = ours.turn()?;
            for side in peers.iter_mut().chain(&mut engine) {
                side.turn()?;
            }
        }
        println!(
            "\n{:<34} {:>9} {:>10} {:>9} {:>7} {:>9} {:>6} {:>9}",
            format!("{ranks} ranks, microseconds"),
            "ours",
            "peer",
            "",
            "ratio",
            "floor",
            "share",
            "possible"
        );
        for peer in &peers {
            rows.extend(compare(ranks, &ours, &ours, peer));
        }
        if let (Some(engine), [c, ..]) = (&engine, &peers[..]) {
            rows.extend(compare(ranks, engine, &ours, c));
        }
        println!("\ncost of threads: seconds = alpha + beta * bytes");
        costs.lines().filter(|l| l.starts_with("cost ")).for_each(|line| println!("  {line}"));
    }
    Ok(rows)
}

/// Bytes of memory that a verb must read and write, all ranks together, in buffers of one rank.
fn traffic(verb: &str, p: f64) -> f64 {
    match verb {
        "reduce_scatter" | "reduce" => p + 1.0,
        "broadcast" => 2.0 * (p - 1.0),
        "gather" | "scatter" => 2.0,
        // Each rank's buffer is read once and written once.
        _ => 2.0 * p,
    }
}

/// A row for each verb and size that both have; `copies` has the speed of the machine.
fn compare(ranks: usize, ours: &Side, copies: &Side, peer: &Side) -> Vec<Value> {
    let mut rows = Vec::new();
    for (bytes, verb) in ours.times.keys() {
        let (Some(mine), Some(theirs)) = (ours.median(*bytes, verb), peer.median(*bytes, verb))
        else {
            continue;
        };
        let p = ranks as f64;
        // Where payloads are larger than a cache's share of them: below it latency is all.
        let copy = copies.median(*bytes, "copy").filter(|_| *bytes >= 1 << 20);
        let floor = copy.map(|copy| copy * traffic(verb, p) / (2.0 * p));
        let size = match *bytes {
            0 => String::new(),
            1..0x10_0000 => format!(" {} KiB", bytes >> 10),
            _ => format!(" {} MiB", bytes >> 20),
        };
        let what = format!("{}: {verb}{size}, {ranks} ranks", ours.name);
        let shown =
            |x: Option<f64>, digits: usize| x.map_or_else(String::new, |x| format!("{x:.digits$}"));
        let (share, possible) = (floor.map(|f| f / mine), floor.map(|f| theirs / f));
        println!(
            "{what:<34} {mine:>9.2} {:>10} {theirs:>9.2} {:>7.2} {:>9} {:>6} {:>9}",
            peer.name,
            theirs / mine,
            shown(floor, 1),
            shown(share, 2),
            shown(possible, 1)
        );
        // As speeds, which the page of all benches expects.
        let rate = |us: f64| if *bytes == 0 { 1.0 / us } else { *bytes as f64 / us };
        let unit = if *bytes == 0 { "calls/us" } else { "MB/s" };
        rows.push(json!({"what": what, "unit": unit, "ours": rate(mine), "ours_us": mine,
            "peer_is": peer.name, "peer": rate(theirs), "peer_us": theirs,
            "ratio": theirs / mine, "floor": floor.map(rate), "share": share}));
    }
    rows
}
