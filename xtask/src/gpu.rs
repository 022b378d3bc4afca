//! The GPU suite: packed here, run on a machine that has a GPU and no cargo.
//!
//! `cargo xtask gpu` builds test and bench programs, this one among them, into `target/gpu`.
//! There, in a copy of the working tree, `target/gpu/xtask gpu --here` runs all tests, then times
//! kernels and training steps in turns with PyTorch if a Python has it, prints one table, and
//! leaves what belongs under `bench/runs`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args as Arguments;
use serde_json::Value;

use crate::bench::{self, Prompt, median, take_turns};
use crate::{cargo, run};

/// Packing, or running what was packed.
#[derive(Debug, Arguments)]
pub(crate) struct Args {
    /// Run what was packed, on this machine.
    #[arg(long)]
    here: bool,
    /// A Python with torch, to compare with.
    #[arg(long, default_value = "python3")]
    python: String,
    /// Where the file of figures goes.
    #[arg(long, default_value = "bench/runs")]
    out: PathBuf,
    /// Only tests.
    #[arg(long)]
    no_bench: bool,
    /// Only benches whose name has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// Turns each side takes.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

const FOLDER: &str = "target/gpu";

/// Test programs: package, target, and the tests to run (all if none).
const TESTS: [(&str, &str, &[&str]); 3] = [
    ("colossal-kernels", "cuda", &[]),
    ("colossal-models", "it", &["goldens", "checkpoints", "plans", "optimizers", "memory"]),
    ("colossal-apps", "cuda", &[]),
];

/// Kernels: sizes of LLaMA and of what a GPU is judged by.
const KERNELS: [&str; 26] = [
    "gemm bf16 8192 8192 8192",
    "gemm bf16 4096 4096 4096",
    "gemm bf16 4096 14336 4096",
    "gemm bf16 4096 4096 14336",
    "gemm_bias bf16 4096 6144 4096",
    "gemm f32 4096 4096 4096",
    "attention_forward bf16 1 8192 32 8 128",
    "attention_forward bf16 4 4096 16 16 64",
    "attention_forward bf16 16 1024 12 12 64",
    "attention_backward bf16 1 8192 32 8 128",
    "attention_backward bf16 4 4096 16 16 64",
    "attention_backward bf16 16 1024 12 12 64",
    "rms_norm bf16 16384 4096",
    "layer_norm bf16 16384 4096",
    "swiglu bf16 16384 14336",
    "cross_entropy bf16 8192 50304",
    "cross_entropy bf16 8192 128256",
    "adamw f32 100000000",
    "gemm_int8 bf16 1 4096 14336",
    "gemm_int8 bf16 4096 4096 4096",
    "gemm_fp8 bf16 8192 8192 8192",
    "gemm_fp8_blocks bf16 4096 4096 4096",
    "paged_attention bf16 32 4096 32 8 128",
    "conv2d bf16 8 320 320 64 3",
    "conv2d bf16 8 128 128 256 3",
    "embedding_backward bf16 16384 128256 4096",
];

/// Packs or runs.
pub(crate) fn gpu(args: &Args) -> Result<()> {
    match args.here {
        false => pack(),
        true => here(args),
    }
}

fn pack() -> Result<()> {
    let folder = Path::new(FOLDER);
    std::fs::create_dir_all(folder)?;
    let cargo = cargo();
    run(&cargo, &["build", "--release", "-p", "xtask", "-p", "colossal-apps"], &[])?;
    let examples = [("colossal-kernels", "cuda_bench"), ("colossal-models", "train_bench")];
    for (package, example) in examples {
        run(&cargo, &["build", "--release", "-p", package, "--example", example], &[])?;
        take(Path::new(&format!("target/release/examples/{example}")), example)?;
    }
    take(Path::new("target/release/xtask"), "xtask")?;
    take(Path::new("target/release/colossal"), "colossal")?;
    for (package, target, _) in TESTS {
        take(&test_program(package, target)?, &format!("{package}-{target}"))?;
    }
    // Tests find their files by the path of the tree that they were built in.
    let root = std::env::current_dir()?;
    std::fs::write(folder.join("root"), root.to_str().context("a path in UTF-8")?)?;
    let entries = std::fs::read_dir(folder)?.filter_map(|e| e.ok()?.metadata().ok());
    let bytes: u64 = entries.map(|m| m.len()).sum();
    println!(
        "\npacked {} MiB in {FOLDER}. On a machine with a GPU, in a copy of this tree:",
        bytes >> 20
    );
    println!("    {FOLDER}/xtask gpu --here [--python python3]");
    Ok(())
}

/// Builds a test program in release and says where it lies.
fn test_program(package: &str, target: &str) -> Result<PathBuf> {
    let output = Command::new(cargo())
        .args(["test", "--release", "--no-run", "--message-format", "json"])
        .args(["-p", package, "--test", target])
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("cargo test --no-run -p {package} failed");
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs = messages.filter(|m| m["target"]["name"] == target && !m["executable"].is_null());
    let program =
        programs.filter_map(|m| Some(PathBuf::from(m["executable"].as_str()?))).next_back();
    program.with_context(|| format!("cargo built no test {target} of {package}"))
}

/// Copies a program, without its symbols if there is a tool for it.
fn take(program: &Path, name: &str) -> Result<()> {
    let to = Path::new(FOLDER).join(name);
    std::fs::copy(program, &to).with_context(|| program.display().to_string())?;
    // Not stripped is no error: it is only larger.
    let _ = Command::new("strip").arg(&to).status();
    Ok(())
}

fn here(args: &Args) -> Result<()> {
    let folder = std::env::current_dir()?.join(FOLDER);
    let program = |name: &str| folder.join(name).to_string_lossy().into_owned();
    meet(&folder)?;
    let mut failed = vec![];
    for (package, target, only) in TESTS {
        let name = format!("{package}-{target}");
        let mut arguments = vec!["--test-threads", "2"];
        arguments.extend(only);
        let colossal = program("colossal");
        let env = [("COLOSSAL_CUDA", "required"), ("COLOSSAL_PROGRAM", &colossal)];
        if run(&program(&name), &arguments, &env).is_err() {
            failed.push(name);
        }
    }
    if !args.no_bench {
        let rows = benches(args, &program)?;
        bench::keep_of(&args.out, &gpu_name()?, &rows)?;
    }
    if !failed.is_empty() {
        bail!("tests failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Makes the tree that programs were built in be this one.
fn meet(folder: &Path) -> Result<()> {
    let root = PathBuf::from(std::fs::read_to_string(folder.join("root"))?);
    if root.exists() {
        return Ok(());
    }
    if let Some(parent) = root.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let link = std::os::unix::fs::symlink(std::env::current_dir()?, &root);
    link.with_context(|| format!("tests look for their files under {}", root.display()))
}

fn benches(args: &Args, program: &dyn Fn(&str) -> String) -> Result<Vec<Value>> {
    let look = ["-c", "import torch; torch.zeros(1).cuda()"];
    let python = match Command::new(&args.python).args(look).status() {
        Ok(status) if status.success() => Some(args.python.as_str()),
        _ => {
            println!("{} has no torch that sees a GPU: figures stand alone", args.python);
            None
        }
    };
    let peer = |script: &str, more: &[&str]| -> Result<Vec<(String, Prompt)>> {
        let Some(python) = python else { return Ok(vec![]) };
        let prompt = Prompt::start(python, &[&[script], more].concat(), &[])?;
        Ok(vec![(prompt.name.clone(), prompt)])
    };
    let mut rows = vec![];
    bench::header("kernel on the GPU, calls/s");
    {
        let mut ours = Prompt::start(&program("cuda_bench"), &[], &[])?;
        let mut peers = peer("xtask/peers/kernels_cuda_torch.py", &[])?;
        for case in KERNELS.iter().filter(|c| c.contains(&args.only)) {
            match take_turns((args.rounds, 0), case, case, &mut ours, &mut peers, "calls/s") {
                Ok(more) => rows.extend(more),
                Err(e) => println!("{case}: {e}"),
            }
        }
    }
    bench::header("training step on the GPU, tokens/s");
    // In fp8 too beside PyTorch in bf16.
    for (model, precision) in [
        ("gpt2-124m", "bf16"),
        ("llama-1b", "bf16"),
        ("llama-1b", "fp8"),
        ("llama-1b", "fp8_block"),
    ] {
        let what = format!("{model} {precision}");
        if !what.contains(&args.only) {
            continue;
        }
        let ours = [model, "2", precision, "serve"];
        let mut ours = Prompt::start(&program("train_bench"), &ours, &[])?;
        let flags = ["--device", "cuda", "--model", model, "--dtype", "bf16", "--mode", "compile"];
        let mut peers = peer("xtask/peers/train_torch.py", &flags)?;
        match take_turns((args.rounds, 0), &what, "step", &mut ours, &mut peers, "tokens/s") {
            Ok(more) => rows.extend(more),
            Err(e) => println!("{what}: {e}"),
        }
    }
    let mut shares: Vec<f64> = rows.iter().filter_map(|r| r["share"].as_f64()).collect();
    println!("\nmedian share of the floor: {:.0} %", 100.0 * median(&mut shares));
    Ok(rows)
}

fn gpu_name() -> Result<String> {
    let query = ["--query-gpu=name", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let name = text.lines().next().unwrap_or("").trim().to_lowercase().replace(' ', "-");
    Ok(if name.is_empty() { "gpu".into() } else { name })
}
