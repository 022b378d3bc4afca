//! Benches beside their peers, in the same run: `what  ours  peer  ratio`.
//!
//! `bench train` times whole training steps of the two reference models against PyTorch, taking
//! turns so that a noisy machine disturbs both alike. Other names run that criterion bench.

use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use crate::{cargo, run};

/// What to time.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// `train` for whole steps; any other name is a criterion bench; nothing runs everything.
    name: Option<String>,
    /// A peer: `python=PATH` of a Python that has torch and transformers.
    #[arg(long)]
    peer: Option<String>,
    /// Turns each side takes.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Compute threads of each side.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Runs the benches.
pub(crate) fn bench(args: &Args) -> Result<()> {
    match args.name.as_deref() {
        Some("train") => train(args),
        Some(name) => run(&cargo(), &["bench", "--workspace", "--bench", name], &[]),
        None => {
            run(&cargo(), &["bench", "--workspace", "--benches"], &[])?;
            train(args)
        }
    }
}

fn train(args: &Args) -> Result<()> {
    let python = match args.peer.as_deref().map(|p| p.split_once('=')) {
        None => None,
        Some(Some(("python", path))) => Some(path.to_string()),
        Some(_) => bail!("--peer takes python=<path to a Python that has torch>"),
    };
    run(
        &cargo(),
        &["build", "--release", "-p", "colossal-models", "--example", "train_bench"],
        &[],
    )?;
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    let ours = format!("{target}/release/examples/train_bench");
    let threads = args.threads.to_string();
    println!(
        "\n{:<28} {:>12} {:>12} {:>8}",
        "training step, f32", "ours tok/s", "peer tok/s", "ratio"
    );
    let mut rows = Vec::new();
    for model in ["gpt", "llama"] {
        let (mut mine, mut theirs, mut version) = (vec![], vec![], String::new());
        for _ in 0..args.rounds {
            mine.push(number(&output(&ours, &[model, &threads])?)?);
            if let Some(python) = &python {
                let script = "xtask/peers/train_torch.py";
                let text = output(python, &[script, "--model", model, "--threads", &threads])?;
                version = text.split_whitespace().nth(1).unwrap_or("").to_string();
                theirs.push(number(&text)?);
            }
        }
        let (mine, theirs) = (median(&mut mine), median(&mut theirs));
        let shown = theirs.map_or("-".into(), |t| format!("{t:.0}"));
        let ratio = mine.zip(theirs).map(|(a, b)| a / b);
        let ratio_shown = ratio.map_or("-".into(), |r| format!("{r:.2}"));
        let name = format!("{model}-like, {threads} threads");
        println!("{name:<28} {:>12.0} {shown:>12} {ratio_shown:>8}", mine.unwrap_or(0.0));
        rows.push(json!({"what": name, "ours": mine, "peer": theirs, "ratio": ratio,
            "unit": "tokens/s", "peer_is": format!("PyTorch {version} eager, stock")}));
    }
    keep(&rows)
}

/// Keeps the figures as `bench/runs/<date>-<machine>.json`.
fn keep(rows: &[Value]) -> Result<()> {
    let date = output("date", &["+%Y-%m-%d"])?;
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or(": unknown");
    let cpu = cpu.trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let machine = format!("{}-{cores}c", cpu.to_lowercase().replace(' ', "-"));
    let path = format!("bench/runs/{}-{machine}.json", date.trim());
    std::fs::create_dir_all("bench/runs")?;
    let run = json!({"date": date.trim(), "cpu": cpu, "cores": cores, "rows": rows});
    std::fs::write(&path, serde_json::to_string_pretty(&run)? + "\n")?;
    println!("kept in {path}");
    Ok(())
}

fn output(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !out.status.success() {
        bail!(
            "{program} {}: {}\n{}",
            args.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// The first word of the last line is the figure.
fn number(text: &str) -> Result<f64> {
    let line = text.trim().lines().last().unwrap_or_default();
    let word = line.split_whitespace().next().unwrap_or_default();
    word.parse().with_context(|| format!("no figure in {line:?}"))
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
