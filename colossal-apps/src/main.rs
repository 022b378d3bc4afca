//! The binary `colossal`.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use colossal_apps::{doctor, model};
use colossal_kernels::{Threads, threads};

/// Large models, made cheaper: train, inspect and run them.
#[derive(Debug, Parser)]
#[command(name = "colossal", version, arg_required_else_help = true)]
struct Cli {
    /// Compute threads; as many as cores if not given.
    #[arg(long, global = true)]
    threads: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Look at a checkpoint.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Say what this machine offers, and what to do about what it does not.
    Doctor,
}

#[derive(Debug, Subcommand)]
enum ModelCommand {
    /// Family, sizes and parameters of a Hugging Face folder.
    Info {
        /// The folder: config.json and model.safetensors (or its shards).
        dir: PathBuf,
    },
    /// Logits of token ids, as safetensors: what parity checks and bug reports need.
    Logits {
        /// The folder: config.json and model.safetensors (or its shards).
        dir: PathBuf,
        /// JSON: a list of equally long lists of token ids.
        #[arg(long)]
        ids: PathBuf,
        /// Where to write.
        #[arg(long)]
        out: PathBuf,
        /// Also the mean next-token loss and the gradient of every parameter.
        #[arg(long)]
        loss: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    threads::set(Threads::new(cli.threads.unwrap_or(cores).max(1)));
    let result = match &cli.command {
        Command::Model(ModelCommand::Info { dir }) => model::info(dir).map(|text| print!("{text}")),
        Command::Model(ModelCommand::Logits { dir, ids, out, loss }) => {
            model::logits(&model::Request { model: dir, ids, loss: *loss }, out)
        }
        Command::Doctor => {
            print!("{}", doctor::report());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
