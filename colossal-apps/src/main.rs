//! The binary `colossal`.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use colossal_apps::chat::rlhf::{Outcome, RlhfConfig};
use colossal_apps::chat::talk::Chat;
use colossal_apps::{chat, doctor, model, report};
use colossal_kernels::{Threads, threads};
use colossal_models::Dtype;
use colossal_models::generate::Sampling;

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
    /// Fine-tune, train a reward model, align by PPO, and compare answers before and after.
    ///
    /// Without arguments it runs on the data of this repository, on two ranks, in a few minutes.
    Rlhf {
        /// A TOML file; every field has a default, and an unknown one is an error.
        #[arg(long)]
        config: Option<PathBuf>,
        /// Where results go, instead of runs/rlhf.
        #[arg(long)]
        output_dir: Option<PathBuf>,
    },
    /// Talk to a model in the terminal.
    Chat {
        /// A Hugging Face folder with its tokenizer, or a GGUF file.
        #[arg(long)]
        model: PathBuf,
        /// Answer this and leave, instead of reading turns from the terminal.
        #[arg(long)]
        prompt: Option<String>,
        /// What the model is told before the first turn.
        #[arg(long)]
        system: Option<String>,
        /// 0 takes the likeliest token each time.
        #[arg(long, default_value_t = 0.7)]
        temperature: f32,
        /// Draw from the `k` likeliest tokens; 0 is all.
        #[arg(long, default_value_t = 0)]
        top_k: usize,
        /// Draw from the likeliest tokens that together have this probability.
        #[arg(long, default_value_t = 0.9)]
        top_p: f32,
        /// Longest answer, in tokens.
        #[arg(long, default_value_t = 512)]
        max_new_tokens: usize,
        /// Seed of the draws.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
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
        Command::Rlhf { config, output_dir } => {
            return rlhf(config.as_deref(), output_dir.as_deref());
        }
        Command::Chat {
            model,
            prompt,
            system,
            temperature,
            top_k,
            top_p,
            max_new_tokens,
            seed,
        } => {
            let sampling = Sampling {
                temperature: *temperature,
                top_k: *top_k,
                top_p: *top_p,
                max_new_tokens: *max_new_tokens,
                seed: *seed,
                ..Sampling::default()
            };
            talk(model, prompt.as_deref(), system.as_deref(), sampling)
        }
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
        Err(error) => failed(&error),
    }
}

fn talk(
    model: &Path,
    prompt: Option<&str>,
    system: Option<&str>,
    sampling: Sampling,
) -> anyhow::Result<()> {
    let mut chat = Chat::open(model, Dtype::F32, system, sampling)?;
    let mut out = std::io::stdout();
    match prompt {
        Some(prompt) => {
            chat.answer(prompt, &mut out)?;
            println!();
            Ok(())
        }
        None => chat.talk(std::io::stdin().lock(), &mut out),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

/// Runs the pipeline; the exit code says whether alignment worked.
fn rlhf(config: Option<&Path>, output_dir: Option<&Path>) -> ExitCode {
    let run = || -> anyhow::Result<Outcome> {
        let mut run = match config {
            None => RlhfConfig::default(),
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
                toml::from_str(&text).with_context(|| path.display().to_string())?
            }
        };
        if let Some(dir) = output_dir {
            run.output_dir = dir.into();
        }
        let outcome = chat::rlhf::rlhf(&run)?;
        let path = report::write(&run, &outcome)?;
        println!("{}", report::summary(&outcome));
        println!("report: {}", path.display());
        Ok(outcome)
    };
    match run() {
        Ok(outcome) if outcome.aligned() => ExitCode::SUCCESS,
        Ok(_) => {
            eprintln!("alignment did not work: see the table above");
            ExitCode::FAILURE
        }
        Err(error) => failed(&error),
    }
}
