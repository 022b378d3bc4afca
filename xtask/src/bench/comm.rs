//! Collectives beside Open MPI or MPICH (the same program in C) and gloo, in turns.
//!
//! Threads of one process against processes; with MPI installed, our MPI engine against the same
//! program in C as well. Then the cost model that was fitted to ours.

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
}

/// Runs all sides in turns for 2 and 4 ranks.
pub(super) fn comm(args: &Args) -> Result<Vec<Value>> {
    let example = ["build", "--release", "-p", "colossal-comm", "--example", "collectives"];
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    let built = format!("{target}/release/examples/collectives");
    let (threads, processes) =
        (format!("{target}/collectives"), format!("{target}/collectives_mpi"));
    let peer = format!("{target}/collectives_peer");
    let mpi = exists("mpicc", "--version");
    if mpi {
        run(&cargo(), &[&example[..], &["--features", "mpi"]].concat(), &[])?;
        std::fs::copy(&built, &processes)?;
        let source = "xtask/peers/collectives_mpi.c";
        run("mpicc", &["-O3", "-march=native", source, "-o", &peer], &[])?;
    } else {
        println!(
            "MPI is not installed; to compare with it: apt-get install openmpi-bin libopenmpi-dev libclang-dev"
        );
    }
    run(&cargo(), &example, &[])?;
    std::fs::copy(&built, &threads)?;
    let mut rows = Vec::new();
    for ranks in ["2", "4"] {
        let largest = "16777216";
        // Containers have one user.
        let mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", ranks];
        let mut ours = Side::new("threads", &[&threads, ranks, largest]);
        let mut peers = Vec::new();
        let mut engine = None;
        if mpi {
            let version = output("mpirun", &["--version"])?;
            let name =
                version.lines().next().unwrap_or("MPI").replace("mpirun (", "").replace(')', "");
            peers.push(Side::new(&name, &[&mpirun[..], &[&peer, largest]].concat()));
            engine = Some(Side::new("mpi", &[&mpirun[..], &[&processes, ranks, largest]].concat()));
        }
        if let Some(python) = python(args)? {
            let line = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"];
            let script = ["xtask/peers/collectives_gloo.py", largest];
            peers.push(Side::new("gloo", &[&line[..], &[ranks], &script].concat()));
        }
        let mut costs = String::new();
        for _ in 0..args.rounds {
            costs = ours.turn()?;
            for side in peers.iter_mut().chain(&mut engine) {
                side.turn()?;
            }
        }
        println!(
            "\n{:<36} {:>10} {:>18} {:>10} {:>7}",
            format!("{ranks} ranks, MB/s of buffer"),
            "ours",
            "peer",
            "",
            "ratio"
        );
        for peer in &mut peers {
            rows.extend(compare(ranks, &mut ours, peer));
        }
        if let (Some(engine), [c, ..]) = (&mut engine, &mut peers[..]) {
            rows.extend(compare(ranks, engine, c));
        }
        println!("\ncost of threads: seconds = alpha + beta * bytes");
        costs.lines().filter(|l| l.starts_with("cost ")).for_each(|line| println!("  {line}"));
    }
    Ok(rows)
}

fn compare(ranks: &str, ours: &mut Side, peer: &mut Side) -> Vec<Value> {
    let mut rows = Vec::new();
    for ((bytes, verb), mine) in &mut ours.times {
        let Some(theirs) = peer.times.get_mut(&(*bytes, verb.clone())) else { continue };
        let speed = |times: &mut Vec<f64>| *bytes as f64 / median(times);
        let (mine, theirs) = (speed(mine), speed(theirs));
        let size = if *bytes < 1 << 20 { bytes >> 10 } else { bytes >> 20 };
        let unit = if *bytes < 1 << 20 { "KiB" } else { "MiB" };
        let what = format!("{}: {verb} {size} {unit}, {ranks} ranks", ours.name);
        println!("{what:<36} {mine:>10.0} {:>18} {theirs:>10.0} {:>7.2}", peer.name, mine / theirs);
        rows.push(json!({"what": what, "unit": "MB/s", "ours": mine, "peer_is": peer.name,
            "peer": theirs, "ratio": mine / theirs}));
    }
    rows
}
