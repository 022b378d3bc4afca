//! The binary `colossal`.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use colossal_apps::chat::rlhf::{Outcome, RlhfConfig};
use colossal_apps::chat::talk::Chat;
use colossal_apps::config::Given;
use colossal_apps::train::{Task, TrainConfig, train};
use colossal_apps::{chat, doctor, flight, launch, model, plan, report};
use colossal_comm::Launch;
use colossal_kernels::{Threads, profile, threads};
use colossal_models::generate::Sampling;
use colossal_models::train::Plan;
use colossal_models::{Device, Dtype};

/// Large models, made cheaper: train, inspect and run them.
#[derive(Debug, Parser)]
#[command(name = "colossal", version, arg_required_else_help = true)]
struct Cli {
    /// Compute threads; as many as cores if not given.
    #[arg(long, global = true)]
    threads: Option<usize>,
    /// Where tensors live: cpu, cuda, cuda:NUMBER, or auto, which is cuda where there is a GPU. Ranks
    /// share the GPUs of a machine, each taking that of its number, counted round.
    #[arg(long, global = true)]
    device: Option<String>,
    /// Write a Chrome trace of all kernels here, and print where the time went against the
    /// machine's floor. For short runs: every call is kept.
    #[arg(long, global = true, value_name = "FILE")]
    profile: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune, train a reward model, align by PPO, and compare answers before and after.
    ///
    /// Without arguments it trains a small model on the data of this repository, on two ranks, in
    /// a few minutes. With --model and --data it does the same with yours: one JSONL file with
    /// prompt, chosen and rejected is enough; conversations and prompts may be given beside it.
    /// A run that was cut off goes on after its last finished stage.
    #[command(after_help = "Any field of the TOML file is a flag too: --sft-steps 50 --plan.dp 1 \
                            --ppo.kl-coef 0.1.\nOUTPUT/config.resolved.toml shows all of them.")]
    Rlhf(Fields),
    /// Train a model; started again, it goes on from its newest checkpoint.
    ///
    /// The TOML file names `model`, `data` and, if wanted, `output_dir`, `steps`, `batch`,
    /// `max_length`, `optimizer` (adamw, lion, lamb, lars, adafactor, came), `lr`, `save_every`, a
    /// `[plan]` (dp, tp, zero, precision, ...) and more: an
    /// unknown field is answered with the list of all.
    #[command(after_help = "Any field of the TOML file is a flag too: --steps 50 --lr 1e-4 \
                            --plan.precision bf16.\nOUTPUT/config.resolved.toml shows all of them.")]
    Train {
        /// What is trained.
        #[arg(value_enum)]
        task: TaskName,
        #[command(flatten)]
        fields: Fields,
    },
    /// Run a command of this binary on N ranks: `colossal run -n 2 train sft --config FILE`.
    ///
    /// Ranks are threads of this process, or with --processes or --hostfile processes (in a build
    /// with the feature mpi); `plan.dp` becomes what N leaves beside the other degrees.
    Run {
        /// How many.
        #[arg(short)]
        n: usize,
        /// A process for each rank: by srun inside a Slurm allocation, else by mpirun.
        #[arg(long)]
        processes: bool,
        /// Processes on these hosts: a line `host slots=N` each, as mpirun reads it.
        #[arg(long)]
        hostfile: Option<PathBuf>,
        /// `train ...` or `rlhf ...`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
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
        /// How numbers are held: less is faster and coarser.
        #[arg(long, value_enum, default_value_t = Weights::F32)]
        dtype: Weights,
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
    /// Look at a plan: what it cuts, holds and sends.
    #[command(subcommand)]
    Plan(plan::PlanCommand),
    /// Look at a checkpoint.
    #[command(subcommand)]
    Model(ModelCommand),
    /// Say what this machine offers, and what to do about what it does not.
    Doctor {
        /// Show what each rank called last, from a file that COLOSSAL_FLIGHT=FOLDER kept of a
        /// failed group.
        #[arg(long)]
        flight: Option<PathBuf>,
    },
}

/// Where a run's configuration comes from.
#[derive(Debug, Clone, clap::Args)]
struct Fields {
    /// A TOML file; flags stand over it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A Hugging Face folder, a GGUF file, or (train) a config.json for fresh weights.
    #[arg(long)]
    model: Option<PathBuf>,
    /// A data file (for rlhf also a folder of them); may be given again.
    #[arg(long)]
    data: Vec<PathBuf>,
    /// Where results go.
    #[arg(long)]
    output_dir: Option<PathBuf>,
    /// Other fields, as --steps 50.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "--FIELD VALUE")]
    others: Vec<String>,
}

impl Fields {
    fn given(&self) -> anyhow::Result<Given> {
        let mut given = match &self.config {
            Some(path) => Given::file(path)?,
            None => Given::default(),
        }
        .flags(&self.others)?;
        let text = |p: &PathBuf| p.to_string_lossy().into_owned();
        if let Some(model) = &self.model {
            given.set("model", text(model))?;
        }
        if !self.data.is_empty() {
            given.set("data", self.data.iter().map(text).collect::<Vec<_>>())?;
        }
        if let Some(dir) = &self.output_dir {
            given.set("output_dir", text(dir))?;
        }
        Ok(given)
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Weights {
    /// As exact as the file.
    F32,
    /// Half of it.
    Bf16,
    /// Linear layers in int8, the rest in bf16: a quarter of it.
    Int8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum TaskName {
    /// A language model on plain text (.txt, JSONL with `text`, .bin of u16 ids).
    Pretrain,
    /// A language model on conversations (JSONL with `messages`).
    Sft,
    /// A reward model on preferences (JSONL with `prompt`, `chosen`, `rejected`).
    Reward,
    /// A policy by PPO on prompts (JSONL with `prompt`), against `reward_model`.
    Ppo,
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
    let mut cli = Cli::parse_from(fields_last(std::env::args().collect()));
    let mut ranks = None;
    if let Command::Run { n, processes, hostfile, command } = &cli.command {
        if *processes || hostfile.is_some() {
            return launch::processes(*n, hostfile.as_deref(), command)
                .unwrap_or_else(|error| failed(&error));
        }
        ranks = Some(*n);
        let words = std::iter::once("colossal".to_string()).chain(command.iter().cloned());
        cli = Cli::parse_from(fields_last(words.collect()));
    }
    match Launch::from_env() {
        Ok(Some(launch)) if launch.world_size > 1 => ranks = Some(launch.world_size),
        Ok(_) => {}
        Err(error) => return failed(&error.into()),
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    threads::set(Threads::new(cli.threads.unwrap_or(cores).max(1)));
    if cli.profile.is_some() {
        profile::start();
    }
    let code = run(&cli, ranks);
    if let Some(path) = &cli.profile {
        match profile::stop().report(path) {
            Ok(table) => print!("{table}"),
            Err(e) => return failed(&anyhow::anyhow!("{}: {e}", path.display())),
        }
    }
    code
}

fn run(cli: &Cli, ranks: Option<usize>) -> ExitCode {
    let device = cli.device.as_deref().unwrap_or("auto");
    let result = match &cli.command {
        Command::Rlhf(fields) => return rlhf(fields, cli.device.as_deref(), ranks),
        _ if ranks.is_some() && !matches!(cli.command, Command::Train { .. }) => {
            Err(anyhow::anyhow!("run -n N starts train and rlhf; the others run on one rank"))
        }
        Command::Run { .. } => Err(anyhow::anyhow!("run starts a command, not another run")),
        Command::Train { task, fields } => {
            run_training(*task, fields, cli.device.as_deref(), ranks)
        }
        Command::Chat {
            model,
            prompt,
            system,
            dtype,
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
            let said = (prompt.as_deref(), system.as_deref());
            talk(model, device, *dtype, said, sampling)
        }
        Command::Plan(command) => plan::run(command).map(|text| print!("{text}")),
        Command::Model(ModelCommand::Info { dir }) => model::info(dir).map(|text| print!("{text}")),
        Command::Model(ModelCommand::Logits { dir, ids, out, loss }) => {
            model::logits(&model::Request { model: dir, ids, loss: *loss, device }, out)
        }
        Command::Doctor { flight: None } => {
            print!("{}", doctor::report());
            Ok(())
        }
        Command::Doctor { flight: Some(path) } => flight::show(path).map(|text| print!("{text}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Moves flags that name a field of the configuration behind those that `--help` lists, so that
/// they may be given in any order.
fn fields_last(words: Vec<String>) -> Vec<String> {
    let mut cli = Cli::command();
    cli.build();
    let Some(command) = words.get(1).and_then(|name| cli.find_subcommand(name)) else {
        return words;
    };
    let command = words.get(2).and_then(|name| command.find_subcommand(name)).unwrap_or(command);
    if command.get_name() == "run" {
        return words;
    }
    let listed =
        |flag: &str| command.get_arguments().any(|a| a.get_long() == Some(flag)) || flag == "help";
    let (mut kept, mut fields) = (vec![], vec![]);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        match word.strip_prefix("--").map(|w| w.split_once('=').map_or(w, |(name, _)| name)) {
            Some(flag) if !flag.is_empty() && !listed(flag) => {
                let alone = word.contains('=');
                fields.push(word);
                if !alone {
                    fields.extend(words.next());
                }
            }
            _ => kept.push(word),
        }
    }
    kept.extend(fields);
    kept
}

/// Sets `plan.dp` so that the plan takes `ranks`.
fn spread(plan: &mut Plan, ranks: Option<usize>) -> anyhow::Result<()> {
    let Some(n) = ranks else { return Ok(()) };
    let others = plan.ranks() / plan.dp.max(1);
    if n == 0 || !n.is_multiple_of(others.max(1)) {
        anyhow::bail!(
            "{n} ranks are no multiple of the {others} that the plan's other degrees take"
        );
    }
    plan.dp = n / others.max(1);
    Ok(())
}

/// Sets `plan.device` if there is a flag for it.
fn place(plan: &mut Plan, device: Option<&str>) {
    if let Some(device) = device {
        plan.device = device.into();
    }
}

fn run_training(
    task: TaskName,
    fields: &Fields,
    device: Option<&str>,
    ranks: Option<usize>,
) -> anyhow::Result<()> {
    let given = fields.given()?;
    if !given.has("model") || !given.has("data") {
        anyhow::bail!("name the model and the data: --model and --data, or in --config FILE");
    }
    let mut config: TrainConfig = given.read(None)?;
    spread(&mut config.plan, ranks)?;
    place(&mut config.plan, device);
    let task = match task {
        TaskName::Pretrain => Task::Pretrain,
        TaskName::Sft => Task::Sft,
        TaskName::Reward => Task::Reward,
        TaskName::Ppo => Task::Ppo,
    };
    let summary = train(task, &config)?;
    if Launch::from_env().ok().flatten().is_none_or(|launch| launch.rank == 0) {
        println!("{summary}");
    }
    Ok(())
}

fn talk(
    model: &Path,
    device: &str,
    weights: Weights,
    (prompt, system): (Option<&str>, Option<&str>),
    sampling: Sampling,
) -> anyhow::Result<()> {
    let dtype = match weights {
        Weights::F32 => Dtype::F32,
        Weights::Bf16 | Weights::Int8 => Dtype::Bf16,
    };
    let mut chat = Chat::open(model, &Device::named(device, 0)?, dtype, system, sampling)?;
    if matches!(weights, Weights::Int8) {
        chat = chat.quantize_int8()?;
    }
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
    eprintln!("{}", launch::failure(error));
    ExitCode::FAILURE
}

/// Runs the pipeline; the exit code says whether alignment worked.
fn rlhf(fields: &Fields, device: Option<&str>, ranks: Option<usize>) -> ExitCode {
    let run = || -> anyhow::Result<Outcome> {
        let given = fields.given()?;
        let defaults = match given.has("model") {
            true => RlhfConfig::pretrained(),
            false => RlhfConfig::default(),
        };
        let mut run = given.read(Some(&defaults))?;
        spread(&mut run.plan, ranks)?;
        place(&mut run.plan, device);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_may_stand_anywhere() {
        Cli::command().debug_assert();
        let line = "colossal train sft --lr 1e-4 --model m --plan.dp=2 --data a --data b";
        let words = fields_last(line.split(' ').map(str::to_string).collect());
        let cli = Cli::parse_from(words);
        let Command::Train { fields, .. } = cli.command else { panic!("train") };
        assert_eq!(fields.data.len(), 2);
        assert_eq!(fields.others, ["--lr", "1e-4", "--plan.dp=2"]);
    }
}
