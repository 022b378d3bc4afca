//! Benches beside their peers, in the same run: `what  ours  peer  ratio  floor  share`.
//!
//! Both sides are processes that wait at a prompt and take turns, so that a noisy machine
//! disturbs them alike and nobody pays twice for starting. Figures are medians over the turns;
//! the floor is what the machine's multiply-adds or its memory would allow, measured in the same
//! turns. `train` times whole steps, `plans` steps under parallel plans, `decode` generation,
//! `kernels` single kernels; other names run criterion benches.

mod comm;
mod decode;
mod page;
mod prompt;

pub(crate) use page::{keep_of, output};
pub(crate) use prompt::Prompt;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use crate::{cargo, run};

/// What to time.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// `train` (whole steps), `plans` (steps in parallel), `decode` (generation), `kernels`, `comm`
    /// (collectives), or a criterion bench; nothing runs them all.
    name: Option<String>,
    /// Peers: `python=PATH` of a Python that has torch; built on first use: `burn` and `candle` (of
    /// `train` in f32) and `gemm` (products of the crates gemm, faer and rten-gemm, of `kernels`).
    /// May be given more than once.
    #[arg(long)]
    peer: Vec<String>,
    /// Turns each side takes.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Compute threads of each side.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Only cases whose name has this in it, as `bf16` or `gemm`.
    #[arg(long, default_value = "")]
    only: String,
    /// Only the peer as it is installed: no MKL unlocking, no torch.compile.
    #[arg(long)]
    stock: bool,
}

/// Runs the benches.
pub(crate) fn bench(args: &Args) -> Result<()> {
    let rows = match args.name.as_deref() {
        Some("train") => train(args)?,
        Some("plans") => plans(args)?,
        Some("kernels") => kernels(args)?,
        Some("decode") => decode::decode(args)?,
        Some("comm") => comm::comm(args)?,
        Some(name) => return run(&cargo(), &["bench", "--workspace", "--bench", name], &[]),
        None => {
            run(&cargo(), &["bench", "--workspace", "--benches"], &[])?;
            let mut rows = kernels(args)?;
            rows.extend(train(args)?);
            rows.extend(decode::decode(args)?);
            rows.extend(plans(args)?);
            rows
        }
    };
    page::keep(&rows)
}

/// A peer process to start: its name and its environment.
struct Peer {
    name: &'static str,
    arguments: Vec<String>,
    unlocked: bool,
}

impl Peer {
    fn new(name: &'static str, arguments: &[&str], unlocked: bool) -> Peer {
        Peer { name, arguments: arguments.iter().map(ToString::to_string).collect(), unlocked }
    }
}

fn train(args: &Args) -> Result<Vec<Value>> {
    let ours = build("colossal-models", "train_bench")?;
    header("training step, tokens/s");
    let threads = args.threads.to_string();
    let mut rows = Vec::new();
    for model in ["gpt", "llama"] {
        for precision in ["f32", "bf16"] {
            let what = format!("{model}-like {precision}, {threads} threads");
            if !what.contains(&args.only) {
                continue;
            }
            let flags = |mode| {
                ["--model", model, "--threads", &threads, "--dtype", precision, "--mode", mode]
            };
            let mut peers = vec![Peer::new("eager, stock", &flags("eager"), false)];
            if !args.stock {
                peers.push(Peer::new("compile, MKL unlocked", &flags("compile"), true));
            }
            let mut ours = Prompt::start(&ours, &[model, &threads, precision, "serve"], &[])?;
            let mut peers = start(args, "xtask/peers/train_torch.py", &peers)?;
            if precision == "f32" {
                peers.extend(built(args, "train", &[&[model]])?);
            }
            rows.extend(turns(args, &what, "step", &mut ours, &mut peers, "tokens/s")?);
        }
    }
    Ok(rows)
}

/// Tensor parallelism of two ranks with a thread each, and a mixture of experts on one rank with
/// two, beside one rank and beside PyTorch.
fn plans(args: &Args) -> Result<Vec<Value>> {
    let ours = build("colossal-models", "plan_bench")?;
    header("step under a plan, tokens/s");
    let one = "one rank, two threads";
    let mut rows = Vec::new();
    for plan in ["tp 2", "tp 2, split_gather", "tp 2, ring"] {
        let what = format!("llama-like f32, {plan}");
        if !what.contains(&args.only) {
            continue;
        }
        let mut side = Prompt::start(&ours, &["serve", "llama", plan], &[])?;
        let serial = Prompt::start(&ours, &["serve", "llama", one], &[])?;
        let mut peers = vec![(serial.name.clone(), serial)];
        if plan == "tp 2" {
            let peer = best(args, &[]);
            peers.extend(start(args, "xtask/peers/tensor_parallel_torch.py", &[peer])?);
        }
        rows.extend(turns(args, &what, "step", &mut side, &mut peers, "tokens/s")?);
    }
    let what = "mixtral-like f32, dropless";
    if what.contains(&args.only) {
        let mut side = Prompt::start(&ours, &["serve", "moe", one], &[])?;
        let peers = ["eager", "grouped_mm"].map(|kind| best(args, &["--experts", kind]));
        let mut peers = start(args, "xtask/peers/moe_torch.py", &peers)?;
        rows.extend(turns(args, what, "step", &mut side, &mut peers, "tokens/s")?);
    }
    Ok(rows)
}

/// A peer at its best, or as it is installed if asked for.
fn best(args: &Args, arguments: &[&str]) -> Peer {
    let name = if args.stock { "stock" } else { "MKL unlocked" };
    Peer::new(name, arguments, !args.stock)
}

/// Kernel, type, sizes: `m n k` of products, `batch seq heads head_dim` of attention. Skinny products are those
/// of LoRA's layers and their gradients, of a head of one output, and of decoding with GPT-2's weights.
const CASES: [&str; 57] = [
    "gemm f32 512 512 512",
    "gemm f32 1024 1024 1024",
    "gemm f32 2048 2048 2048",
    "gemm f32 1024 768 768",
    "gemm f32 1024 2048 512",
    "gemm f32 4096 768 3072",
    "gemm f32 64 4096 4096",
    "gemm f32 512 4096 4096",
    "gemm bf16 512 512 512",
    "gemm bf16 1024 1024 1024",
    "gemm bf16 2048 2048 2048",
    "gemm bf16 1024 768 768",
    "gemm bf16 1024 2048 512",
    "gemm bf16 4096 768 3072",
    "gemm bf16 64 4096 4096",
    "gemm bf16 512 4096 4096",
    "gemm int8 1024 768 768",
    "gemm int8 64 4096 4096",
    "gemm int8 512 4096 4096",
    "gemm f32 1 4096 4096",
    "gemm f32 4 4096 4096",
    "gemm f32 16 4096 4096",
    "gemm bf16 1 4096 4096",
    "gemm bf16 4 4096 4096",
    "gemm bf16 16 4096 4096",
    "gemm f32 1024 1 1024",
    "gemm f32 1024 16 1024",
    "gemm f32 1024 1024 16",
    "gemm_tn f32 16 1024 1024",
    "gemm_nn f32 1 3072 768",
    "gemm_nn f32 8 3072 768",
    "gemm bf16 1024 1 1024",
    "gemm bf16 1024 16 1024",
    "gemm bf16 1024 1024 16",
    "gemm_tn bf16 16 1024 1024",
    "gemm_nn bf16 1 3072 768",
    "gemm_nn bf16 8 3072 768",
    "attention f32 4 256 8 64",
    "attention f32 1 1024 8 64",
    "attention f32 1 2048 8 64",
    "attention f32 1 4096 8 64",
    "attention f32 1 8192 2 64",
    "attention f32 4 256 8 128",
    "attention f32 1 1024 8 128",
    "attention f32 1 2048 8 128",
    "attention f32 1 8192 2 128",
    "attention bf16 4 256 8 64",
    "attention bf16 1 1024 8 64",
    "attention bf16 1 2048 8 64",
    "attention bf16 1 4096 8 64",
    "attention bf16 1 8192 2 64",
    "attention bf16 4 256 8 128",
    "attention bf16 1 1024 8 128",
    "attention bf16 1 2048 8 128",
    "attention bf16 1 8192 2 128",
    "cross_entropy f32 1024 8192",
    "adamw f32 50000000",
];

fn kernels(args: &Args) -> Result<Vec<Value>> {
    let ours = build("colossal-kernels", "kernel_bench")?;
    header("kernel, calls/s (attention, cross-entropy: forward + backward)");
    let threads = args.threads.to_string();
    let mut ours = Prompt::start(&ours, &[&threads], &[])?;
    let peer = best(args, &["--threads", threads.as_str()]);
    let mut peers = start(args, "xtask/peers/kernels_torch.py", &[peer])?;
    // numpy comes with torch nearly always; its OpenBLAS has products of f32.
    if let Some(python) = python(args)?
        && output(python, &["-c", "import numpy; print('here')"]).is_ok_and(|x| x.ends_with("here"))
    {
        let peer = Peer::new("best kernels", &["--threads", threads.as_str()], false);
        peers.extend(start(args, "xtask/peers/kernels_numpy.py", &[peer])?);
    }
    let libraries = ["gemm", "faer", "rten-gemm"].map(|library| [threads.as_str(), library]);
    peers.extend(built(args, "kernels", &libraries.each_ref().map(|x| &x[..]))?);
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|c| c.contains(&args.only)) {
        // Of DeepSpeed there is one kernel to compare with, if it is installed.
        if case.starts_with("adamw")
            && let Some(python) = python(args)?
            && output(python, &["-c", "import deepspeed; print('here')"])?.ends_with("here")
        {
            let peer = Peer::new("CPUAdam", &["--threads", threads.as_str(), "--deepspeed"], false);
            peers.extend(start(args, "xtask/peers/kernels_torch.py", &[peer])?);
        }
        rows.extend(turns(args, case, case, &mut ours, &mut peers, "calls/s")?);
    }
    Ok(rows)
}

/// Builds an example in release and says where it lies.
fn build(package: &str, example: &str) -> Result<String> {
    run(&cargo(), &["build", "--release", "-p", package, "--example", example], &[])?;
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    Ok(format!("{target}/release/examples/{example}"))
}

/// The peer's Python, if one was given.
fn python(args: &Args) -> Result<Option<&str>> {
    let mut python = None;
    for peer in &args.peer {
        match peer.split_once('=') {
            Some(("python", path)) => python = Some(path),
            None if BUILT.iter().any(|(_, name)| name == peer) => {}
            _ => bail!("--peer takes python=<a Python that has torch>, burn, candle or gemm"),
        }
    }
    Ok(python)
}

/// Peers in Rust, each a program of its own: the bench and the name of `xtask/peers/<bench>_<name>`.
const BUILT: [(&str, &str); 3] = [("train", "burn"), ("train", "candle"), ("kernels", "gemm")];

/// Builds those of a bench that were asked for, for this machine's instructions, and starts each once for
/// every list of arguments.
fn built(args: &Args, bench: &str, arguments: &[&[&str]]) -> Result<Vec<(String, Prompt)>> {
    let threads = args.threads.to_string();
    let mut started = Vec::new();
    let asked = |name: &str| args.peer.iter().any(|p| p == name);
    for (_, name) in BUILT.iter().filter(|(of, name)| *of == bench && asked(name)) {
        let manifest = format!("xtask/peers/{bench}_{name}/Cargo.toml");
        let build =
            ["build", "--release", "--manifest-path", &manifest, "--target-dir", "target/peers"];
        run(&cargo(), &build, &[("RUSTFLAGS", "-Ctarget-cpu=native")])?;
        let program = format!("target/peers/release/{bench}-{name}");
        for arguments in arguments {
            let prompt = Prompt::start(&program, arguments, &[("RAYON_NUM_THREADS", &threads)])?;
            started.push((prompt.name.clone(), prompt));
        }
    }
    Ok(started)
}

/// Starts the peers, if there is a Python to start them with.
fn start(args: &Args, script: &str, peers: &[Peer]) -> Result<Vec<(String, Prompt)>> {
    let Some(python) = python(args)? else { return Ok(vec![]) };
    let mut started = Vec::new();
    for peer in peers {
        let mut arguments = vec![script];
        arguments.extend(peer.arguments.iter().map(String::as_str));
        let preload = if peer.unlocked { unlock()? } else { String::new() };
        let env: &[(&str, &str)] =
            if preload.is_empty() { &[] } else { &[("LD_PRELOAD", preload.as_str())] };
        let prompt = Prompt::start(python, &arguments, env)?;
        started.push((format!("{}, {}", prompt.name, peer.name), prompt));
    }
    Ok(started)
}

/// On AMD, MKL takes its AVX2 kernels although AVX-512 is there, unless these two functions,
/// which PyTorch exports, say otherwise. A comparison with the peer at its best needs them.
fn unlock() -> Result<String> {
    let library = std::env::current_dir()?.join("target/mkl_unlock.so");
    if !library.exists() {
        let source = "xtask/peers/mkl_unlock.c";
        let out = library.to_string_lossy();
        run("cc", &["-shared", "-fPIC", "-O2", source, "-o", out.as_ref()], &[])?;
    }
    Ok(library.to_string_lossy().into_owned())
}

pub(crate) fn header(title: &str) {
    println!(
        "\n{:<32} {:>10}  {:<44} {:>10} {:>6} {:>10} {:>6}",
        title, "ours", "peer", "", "ratio", "floor", "share"
    );
}

/// Ours and the peers answer `line` in turns; one row a peer that knows the case, or one without.
fn turns(
    args: &Args,
    what: &str,
    line: &str,
    ours: &mut Prompt,
    peers: &mut [(String, Prompt)],
    unit: &str,
) -> Result<Vec<Value>> {
    take_turns((args.rounds, args.threads), what, line, ours, peers, unit)
}

/// The same in so many rounds, each side on so many threads.
pub(crate) fn take_turns(
    (rounds, threads): (usize, usize),
    what: &str,
    line: &str,
    ours: &mut Prompt,
    peers: &mut [(String, Prompt)],
    unit: &str,
) -> Result<Vec<Value>> {
    let (mut mine, mut floors) = (vec![], vec![]);
    let mut theirs = vec![vec![]; peers.len()];
    for _ in 0..rounds {
        let answer = ours.ask(line)?.with_context(|| format!("ours knows no case {line}"))?;
        mine.push(answer.speed);
        floors.extend(answer.floor);
        for ((_, peer), theirs) in peers.iter_mut().zip(&mut theirs) {
            theirs.extend(peer.ask(line)?.map(|answer| answer.speed));
        }
    }
    // Not every case has a floor.
    let floor = floors.iter().copied().reduce(f64::max).unwrap_or(f64::NAN);
    let mine = median(&mut mine);
    let share = mine / floor;
    let row = |peer: Option<(&str, f64)>| {
        let (name, speed) = peer.unwrap_or(("", f64::NAN));
        let shown = |x: f64| if x.is_finite() { format!("{x:.0}") } else { "-".into() };
        println!(
            "{what:<32} {mine:>10.0}  {name:<44} {:>10} {:>6.2} {:>10} {:>6}",
            shown(speed),
            mine / speed,
            shown(floor),
            shown(100.0 * share) + if share.is_finite() { "%" } else { "" }
        );
        json!({"what": what, "unit": unit, "ours": mine, "peer_is": name, "peer": speed,
            "ratio": mine / speed, "floor": floor, "share": share, "rounds": rounds,
            "threads": threads})
    };
    if theirs.iter().all(Vec::is_empty) {
        return Ok(vec![row(None)]);
    }
    let known = peers.iter().zip(&mut theirs).filter(|(_, theirs)| !theirs.is_empty());
    Ok(known.map(|(p, theirs)| row(Some((&p.0, median(theirs))))).collect())
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
