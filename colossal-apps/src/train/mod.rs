//! `colossal train`: one TOML file names the model, the data and the plan.
//!
//! A run leaves `metrics.jsonl`, `checkpoint-<step>/` folders, and at the end the model with its
//! tokenizer in `output_dir`, as transformers loads it. Started again, it goes on from its newest
//! checkpoint, bit for bit.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use colossal_comm::{Config, Group, Launch, launched_by};
use colossal_models::train::{
    Batch, LrSchedule, Optimizer, Sequences, Trainer, load_checkpoint, save_checkpoint,
};
use colossal_models::{Device, Head, hf};
use colossal_tensor::safetensors::write_atomic;

use crate::chat::Progress;
use crate::chat::corpus::{self, Split};
use crate::chat::ppo::{Models, Run, ppo};
use crate::chat::reward::{TokenPair, accuracy, reward, score};
use crate::chat::sft::{Talk, evaluate, sft};
use crate::dataset;
use crate::tokenizer::ChatTokenizer;

mod config;

pub use config::{OptimizerName, TrainConfig};

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// A language model on plain text.
    Pretrain,
    /// A language model on conversations: the assistant's words.
    Sft,
    /// A reward model on pairs of answers.
    Reward,
    /// A policy, by PPO against a reward model.
    Ppo,
}

/// What a task learns from, as ids.
#[derive(Debug)]
enum Data {
    Stream(Vec<i32>),
    Talks(Split<Talk>),
    Pairs(Split<TokenPair>),
    Prompts(Vec<Vec<i32>>, Vec<Talk>),
}

/// Runs a task on `plan.ranks()` ranks (threads); gives the last numbers as text.
pub fn train(task: Task, config: &TrainConfig) -> Result<String> {
    config.plan.validate()?;
    let parts = config.plan.batch_parts() * config.plan.microbatches;
    if config.batch == 0 || !config.batch.is_multiple_of(parts) {
        bail!(
            "batch {} is no multiple of {parts}, the parts into which the plan cuts it",
            config.batch
        );
    }
    if task == Task::Ppo && !config.ppo.rollouts.is_multiple_of(config.plan.dp) {
        bail!("ppo.rollouts {} is no multiple of plan.dp {}", config.ppo.rollouts, config.plan.dp);
    }
    if task == Task::Ppo && config.ppo.ptx_coef > 0.0 && config.demonstrations.is_empty() {
        bail!("ppo.ptx_coef mixes conversations in: name their files in `demonstrations`");
    }
    if task != Task::Sft && task != Task::Pretrain && config.plan.microbatches > 1 {
        bail!("plan.microbatches is for sft and pretrain; set it to 1");
    }
    let tokens_only = task == Task::Pretrain && config.data.iter().all(|p| is(p, "bin"));
    let tokenizer = if tokens_only { None } else { Some(config.open_tokenizer()?) };
    let data = read(task, config, tokenizer.as_ref())?;
    let resolved = toml::to_string_pretty(config)?;
    write_atomic(&config.output_dir.join("config.resolved.toml"), resolved.as_bytes())?;
    let end = tokenizer.as_ref().map_or(-1, ChatTokenizer::end_of_turn);
    // Processes with a GPU each talk over NCCL, others over MPI.
    let local = Launch::from_env()?.map_or(0, |launch| launch.local_rank);
    let gpus = Device::named(&config.plan.device, local)? != Device::Cpu;
    let world = || match gpus {
        true => Group::nccl_from_env(Config::default()),
        false => Group::from_env(),
    };
    let run = |world: Group| on_rank(task, config, &data, end, &world);
    let results = launched_by(config.plan.ranks(), world, run)?;
    let mut text = String::new();
    for (rank, result) in results.into_iter().enumerate() {
        let said = result.with_context(|| format!("rank {rank}"))?;
        if rank == 0 {
            text = said;
        }
    }
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(&config.output_dir)?;
    }
    Ok(text)
}

fn is(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

fn read(task: Task, config: &TrainConfig, tokenizer: Option<&ChatTokenizer>) -> Result<Data> {
    if config.data.is_empty() {
        bail!("data names no file");
    }
    let need = || tokenizer.ok_or_else(|| anyhow!("this data needs a tokenizer"));
    let held: Vec<PathBuf> = config.heldout.iter().cloned().collect();
    let max = config.max_length;
    match task {
        Task::Pretrain => {
            let mut stream = vec![];
            for path in &config.data {
                if is(path, "bin") {
                    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
                    let (ids, rest) = bytes.as_chunks::<2>();
                    if !rest.is_empty() {
                        bail!("{}: an odd number of bytes; u16 ids take two", path.display());
                    }
                    stream.extend(ids.iter().map(|b| i32::from(u16::from_le_bytes(*b))));
                    continue;
                }
                let tokenizer = need()?;
                for text in dataset::texts(path)? {
                    stream.extend(tokenizer.encode(&text)?);
                    stream.push(tokenizer.end_of_turn());
                }
            }
            if stream.len() < max + 1 {
                bail!("the data has {} tokens; one window takes {}", stream.len(), max + 1);
            }
            Ok(Data::Stream(stream))
        }
        Task::Sft => {
            let talks = |paths: &[PathBuf]| -> Result<Vec<Talk>> {
                corpus::talks(need()?, &all(paths, dataset::conversations)?, max)
            };
            Ok(Data::Talks(Split { train: talks(&config.data)?, held: talks(&held)? }))
        }
        Task::Reward => {
            let pairs = |paths: &[PathBuf]| -> Result<Vec<TokenPair>> {
                corpus::pairs(need()?, &all(paths, dataset::preferences)?, max)
            };
            Ok(Data::Pairs(Split { train: pairs(&config.data)?, held: pairs(&held)? }))
        }
        Task::Ppo => {
            let prompts = all(&config.data, dataset::prompts)?;
            let room = config.ppo.max_new_tokens;
            let prompts = corpus::prompts(need()?, &prompts, room, max)?;
            let talks = all(&config.demonstrations, dataset::conversations)?;
            Ok(Data::Prompts(prompts, corpus::talks(need()?, &talks, max)?))
        }
    }
}

/// The entries of all these files.
fn all<T>(paths: &[PathBuf], read: impl Fn(&Path) -> Result<Vec<T>>) -> Result<Vec<T>> {
    paths.iter().try_fold(vec![], |mut entries, path| {
        entries.extend(read(path)?);
        Ok(entries)
    })
}

fn on_rank(
    task: Task,
    config: &TrainConfig,
    data: &Data,
    end: i32,
    world: &Group,
) -> Result<String> {
    let first = world.rank() == 0;
    let head = if task == Task::Reward { Some(Head::Score) } else { None };
    let mut trainer = config.trainer(world, head)?;
    let limit = trainer.model.config.max_positions();
    if config.max_length > limit {
        bail!("max_length {} is beyond the model's {limit} positions", config.max_length);
    }
    if let (Data::Stream(ids), vocab) = (data, trainer.model.config.vocab_size())
        && let Some(id) = ids.iter().find(|id| **id as usize >= vocab)
    {
        bail!("token {id} is beyond the model's vocabulary of {vocab}: another tokenizer's?");
    }
    if let Data::Prompts(prompts, demonstrations) = data {
        return align(trainer, config, (prompts, demonstrations), end, world);
    }
    let newest = checkpoints(&config.output_dir, |_| true).pop();
    if let Some((step, path)) = &newest {
        load_checkpoint(&mut trainer, path)?;
        if first {
            eprintln!("going on from step {step} of {}", path.display());
        }
    }
    let mut progress = Progress::open(&config.output_dir, first, newest.is_some())?;
    progress.stage(name(task), config.steps);
    while trainer.steps() < config.steps {
        let upto = config.next_stop(trainer.steps(), config.steps);
        let went = match data {
            Data::Stream(ids) => pretrain(&mut trainer, ids, config, upto, &mut progress),
            Data::Talks(talks) => {
                sft(&mut trainer, &talks.train, config.batch, upto, &mut progress).map(|_| ())
            }
            Data::Pairs(pairs) => {
                reward(&mut trainer, &pairs.train, config.batch, upto, &mut progress).map(|_| ())
            }
            Data::Prompts(..) => Ok(()),
        };
        if let Err(error) = went {
            return Err(keep(&trainer, config, error));
        }
        if config.save_every > 0 {
            save_checkpoint(&trainer, &config.checkpoint(upto))?;
            forget_old(config, first)?;
        }
    }
    progress.finish();
    hf::save(&trainer.model, &config.output_dir, 5 << 30)?;
    let mut text =
        format!("{} steps; the model is in {}", config.steps, config.output_dir.display());
    match data {
        Data::Talks(Split { held, .. }) if !held.is_empty() => {
            text += &format!("\nheld-out loss {:.4}", evaluate(&trainer, held)?);
        }
        Data::Pairs(Split { held, .. }) if !held.is_empty() => {
            text += &format!("\nheld-out accuracy {:.4}", accuracy(&trainer.model, held)?);
        }
        _ => {}
    }
    Ok(text)
}

/// A run failed: what it has learnt is kept, if its parameters are whole and can be read.
fn keep(trainer: &Trainer, config: &TrainConfig, error: anyhow::Error) -> anyhow::Error {
    let steps = trainer.steps();
    let alone = trainer.world().world_size() == 1;
    let known = checkpoints(&config.output_dir, |_| true).pop();
    if known.as_ref().is_some_and(|(step, _)| *step >= steps) || steps == 0 {
        return error;
    }
    if alone && trainer.is_whole() && save_checkpoint(trainer, &config.checkpoint(steps)).is_ok() {
        let path = config.checkpoint(steps);
        return error.context(format!(
            "stopped after step {steps}, which is kept in {}: the same command goes on from there",
            path.display()
        ));
    }
    match known {
        Some((step, path)) => error.context(format!(
            "stopped after step {steps}; the same command goes on from step {step} in {}",
            path.display()
        )),
        None => error,
    }
}

fn name(task: Task) -> &'static str {
    match task {
        Task::Pretrain => "pretrain",
        Task::Sft => "sft",
        Task::Reward => "reward",
        Task::Ppo => "ppo",
    }
}

/// Steps on windows of `max_length` tokens.
fn pretrain(
    trainer: &mut Trainer,
    ids: &[i32],
    config: &TrainConfig,
    upto: u64,
    progress: &mut Progress,
) -> Result<()> {
    let (seq, batch) = (config.max_length, config.batch);
    let order = Sequences::new((ids.len() - 1) / seq, config.seed);
    while trainer.steps() < upto {
        let picked = order.take(trainer.steps() * batch as u64, batch);
        let windows: Vec<&[i32]> =
            picked.iter().map(|i| &ids[i * seq..(i + 1) * seq + 1]).collect();
        let report = trainer.step(&Batch::windows(&windows)?)?;
        progress.step(
            "pretrain",
            report.step,
            &[
                ("loss", f64::from(report.loss)),
                ("tokens_per_second", report.tokens_per_second),
                ("mfu", report.mfu),
                ("lr", f64::from(report.lr)),
                ("grad_norm", f64::from(report.grad_norm)),
                ("peak_bytes", report.peak_bytes as f64),
                ("sent_bytes", report.sent_bytes as f64),
            ],
        );
    }
    Ok(())
}

/// PPO from `model` against `reward_model`.
fn align(
    mut actor: Trainer,
    config: &TrainConfig,
    (prompts, demonstrations): (&[Vec<i32>], &[Talk]),
    end: i32,
    world: &Group,
) -> Result<String> {
    let Some(judge) = &config.reward_model else {
        bail!("reward_model is missing: the folder that `colossal train reward` wrote");
    };
    let plan = &config.plan;
    let scope = plan.scope(world)?;
    let dtype = plan.precision.dtype();
    let reward = hf::load(judge, &scope, dtype, None)?.freeze();
    if reward.config.head() != Head::Score {
        bail!("{}: is no reward model; `colossal train reward` makes one", judge.display());
    }
    if reward.config.vocab_size() != actor.model.config.vocab_size() {
        bail!("{}: has another vocabulary than the model", judge.display());
    }
    let constant = Optimizer { lr: LrSchedule::constant(config.lr), ..config.optimizer() };
    actor.optimizer = constant;
    let mut critic = Trainer::from_pretrained(world, plan, judge, None, constant, config.seed)?;
    let reference = hf::load(&config.model, &scope, dtype, None)?.freeze();
    let first = world.rank() == 0;
    // The actor's part is written last: with it a checkpoint is whole.
    let newest = checkpoints(&config.output_dir, |path| path.join("actor").exists()).pop();
    let mut done = 0;
    if let Some((iteration, path)) = &newest {
        load_checkpoint(&mut actor, &path.join("actor"))?;
        load_checkpoint(&mut critic, &path.join("critic"))?;
        done = *iteration;
        if first {
            eprintln!("going on from iteration {done} of {}", path.display());
        }
    }
    let mut progress = Progress::open(&config.output_dir, first, newest.is_some())?;
    progress.stage("ppo", config.ppo.iterations);
    let run = Run { prompts, demonstrations, end_of_turn: end, config: &config.ppo };
    let scored = |rows: &[&[i32]]| score(&reward, rows);
    while done < config.ppo.iterations {
        let upto = config.next_stop(done, config.ppo.iterations);
        let mut models = Models {
            actor: &mut actor,
            critic: &mut critic,
            reference: &reference,
            judge: &scored,
        };
        ppo(&mut models, &run, done..upto, &mut progress)?;
        done = upto;
        if config.save_every > 0 {
            let folder = config.checkpoint(done);
            save_checkpoint(&critic, &folder.join("critic"))?;
            save_checkpoint(&actor, &folder.join("actor"))?;
            forget_old(config, first)?;
        }
    }
    progress.finish();
    hf::save(&actor.model, &config.output_dir, 5 << 30)?;
    let of = |name: &str| {
        let mut values = progress.points.iter().filter(|p| p.name == name).map(|p| p.value);
        let first = values.next().unwrap_or(0.0);
        format!("{name} {first:.4} -> {:.4}", values.next_back().unwrap_or(first))
    };
    Ok(format!(
        "{} iterations; the model is in {}\n{}\n{}",
        config.ppo.iterations,
        config.output_dir.display(),
        of("objective/scores"),
        of("objective/kl")
    ))
}

/// Checkpoints in a folder, by step, those that are whole.
fn checkpoints(folder: &Path, whole: impl Fn(&Path) -> bool) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut all: Vec<(u64, PathBuf)> = entries
        .filter_map(|e| {
            let step = e.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            Some((step, e.path()))
        })
        .filter(|(_, path)| whole(path))
        .collect();
    all.sort();
    all
}

/// Removes checkpoints beyond `save_total_limit`, the oldest first.
fn forget_old(config: &TrainConfig, first: bool) -> Result<()> {
    if !first || config.save_total_limit == 0 {
        return Ok(());
    }
    let mut all = checkpoints(&config.output_dir, |_| true);
    all.truncate(all.len().saturating_sub(config.save_total_limit));
    for (_, path) in all {
        std::fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let texts: Vec<String> =
            (0..60).map(|i| format!("Dear Anna, the walk is on day {}. Bye.", i % 7)).collect();
        std::fs::write(dir.path().join("text.txt"), texts.join("\n")).unwrap();
        let tokenizer = ChatTokenizer::train(&texts, 300).unwrap();
        tokenizer.save(dir.path()).unwrap();
        let vocab = tokenizer.vocab_size();
        let config = format!(
            r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": 32,
               "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
               "max_position_embeddings": 128}}"#
        );
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        dir
    }

    fn config(dir: &Path, more: &str) -> TrainConfig {
        let d = dir.display();
        toml::from_str(&format!(
            "model = '{d}/config.json'\ndata = ['{d}/text.txt']\noutput_dir = '{d}/out'\n{more}"
        ))
        .unwrap()
    }

    fn losses(dir: &Path) -> Vec<f64> {
        let text = std::fs::read_to_string(dir.join("out/metrics.jsonl")).unwrap();
        text.lines()
            .map(|l| {
                serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap()
            })
            .collect()
    }

    const RUN: &str = "steps = 20\nbatch = 4\nmax_length = 24\nlr = 1e-2\nsave_every = 10\n\
                       [plan]\ndp = 2\nzero = 1\n";

    #[test]
    fn pretraining_learns_and_a_run_that_was_cut_off_goes_on_bit_for_bit() {
        let (whole, cut) = (folder(), folder());
        train(Task::Pretrain, &config(whole.path(), RUN)).unwrap();
        let all = losses(whole.path());
        assert!(all.len() == 20 && all[19] < 0.5 * all[0], "{all:?}");

        // As if it had died at step 10: the schedule is that of 20 steps, the folder ends there.
        train(Task::Pretrain, &config(cut.path(), RUN)).unwrap();
        std::fs::remove_dir_all(cut.path().join("out/checkpoint-20")).unwrap();
        std::fs::remove_file(cut.path().join("out/model.safetensors")).unwrap();
        train(Task::Pretrain, &config(cut.path(), RUN)).unwrap();
        let read = |d: &Path| std::fs::read(d.join("out/model.safetensors")).unwrap();
        assert_eq!(read(whole.path()), read(cut.path()));
        let again = losses(cut.path());
        assert_eq!((again.len(), &again[20..]), (30, &all[10..]));
    }

    #[test]
    fn optimizers_are_chosen_by_name() {
        let optimizers = ["adamw", "lion", "lamb", "lars", "adafactor", "came"];
        for name in optimizers {
            let c = config(Path::new("/tmp"), &format!("optimizer = '{name}'"));
            assert_eq!(c.optimizer().rule.name(), name);
        }
        let text = "model = ''\ndata = []\noptimizer = 'adam'";
        let e = toml::from_str::<TrainConfig>(text).unwrap_err().to_string();
        assert!(optimizers.iter().all(|name| e.contains(name)), "{e}");
        let dir = folder();
        let run = format!("optimizer = 'adafactor'\n{RUN}");
        train(Task::Pretrain, &config(dir.path(), &run)).unwrap();
        let all = losses(dir.path());
        assert!(all[19] < 0.5 * all[0], "{all:?}");
    }

    #[test]
    fn conversations_pairs_and_prompts_go_through_all_three_stages() {
        let dir = folder();
        let d = dir.path();
        let line = |i: usize| {
            format!(
                r#"{{"prompt":"Write to Anna {i}","chosen":"Dear Anna, bye.","rejected":"No no no no."}}"#
            )
        };
        let pairs: Vec<String> = (0..16).map(line).collect();
        std::fs::write(d.join("pairs.jsonl"), pairs.join("\n")).unwrap();
        let talks = pairs.join("\n").replace("chosen", "completion");
        std::fs::write(d.join("talks.jsonl"), talks).unwrap();
        let stage = |name: &str, model: &str, data: &str, more: &str| -> TrainConfig {
            let d = d.display();
            toml::from_str(&format!(
                "model = '{d}/{model}'\ndata = ['{d}/{data}']\noutput_dir = '{d}/{name}'\n\
                 tokenizer = '{d}'\nbatch = 4\nmax_length = 96\nlr = 1e-2\n{more}"
            ))
            .unwrap()
        };
        let held = format!("heldout = '{}/talks.jsonl'\nsteps = 25", d.display());
        let said = train(Task::Sft, &stage("sft", "config.json", "talks.jsonl", &held)).unwrap();
        let loss: f64 = said.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(loss < 1.0, "{said}");
        let held = format!("heldout = '{}/pairs.jsonl'\nsteps = 25", d.display());
        let said = train(Task::Reward, &stage("judge", "sft", "pairs.jsonl", &held)).unwrap();
        assert!(said.ends_with("accuracy 1.0000"), "{said}");
        let more = format!(
            "reward_model = '{}/judge'\n[ppo]\niterations = 2\nrollouts = 4\nmax_new_tokens = 8",
            d.display()
        );
        let said = train(Task::Ppo, &stage("ppo", "sft", "pairs.jsonl", &more)).unwrap();
        assert!(said.contains("objective/scores"), "{said}");
        // Cut off after the first iteration, it ends with the same weights.
        let read = |d: &Path| std::fs::read(d.join("ppo/model.safetensors")).unwrap();
        let whole = read(d);
        let ppo_run = || stage("ppo", "sft", "pairs.jsonl", &format!("save_every = 1\n{more}"));
        train(Task::Ppo, &ppo_run()).unwrap();
        assert_eq!(read(d), whole);
        std::fs::remove_dir_all(d.join("ppo/checkpoint-2/actor")).unwrap();
        std::fs::remove_file(d.join("ppo/model.safetensors")).unwrap();
        train(Task::Ppo, &ppo_run()).unwrap();
        assert_eq!(read(d), whole);
        // What came out is a model with its tokenizer.
        ChatTokenizer::open(&d.join("ppo")).unwrap();
        hf::load(
            &d.join("ppo"),
            &colossal_models::Scope::solo(),
            colossal_models::Dtype::F32,
            None,
        )
        .unwrap();
        // Demonstrations mixed in change the policy; without any the coefficient is a mistake.
        let mixed = format!("{more}\nptx_coef = 0.5");
        let e = train(Task::Ppo, &stage("mixed", "sft", "pairs.jsonl", &mixed)).unwrap_err();
        assert!(format!("{e:#}").contains("`demonstrations`"), "{e:#}");
        let mixed = format!("demonstrations = ['{}/talks.jsonl']\n{mixed}", d.display());
        train(Task::Ppo, &stage("mixed", "sft", "pairs.jsonl", &mixed)).unwrap();
        assert_ne!(std::fs::read(d.join("mixed/model.safetensors")).unwrap(), whole);
        // A judge is asked for by name, and a language model is none.
        let e = train(Task::Ppo, &stage("x", "sft", "pairs.jsonl", "")).unwrap_err();
        assert!(format!("{e:#}").contains("reward_model is missing"), "{e:#}");
        let more = format!("reward_model = '{}/sft'", d.display());
        let e = train(Task::Ppo, &stage("x", "sft", "pairs.jsonl", &more)).unwrap_err();
        assert!(format!("{e:#}").contains("no reward model"), "{e:#}");
    }

    /// SmolLM2-135M-Instruct through all three stages, on the data of the repository.
    #[test]
    fn a_real_model_is_fine_tuned_judged_and_aligned() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let gguf = root.join("assets/smollm2/model.gguf");
        if !gguf.is_file() {
            eprintln!("skipped: {} is not there; `cargo xtask assets` fetches it", gguf.display());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (d, data) = (dir.path(), root.join("data/rlhf"));
        let run = |task: Task, model: &Path, file: &str, more: &str| {
            let out = d.join(name(task));
            let text = format!(
                "model = '{}'\ndata = ['{}']\noutput_dir = '{}'\nbatch = 4\nmax_length = 96\n{more}",
                model.display(),
                data.join(file).display(),
                out.display()
            );
            let said = train(task, &toml::from_str(&text).unwrap()).unwrap();
            let log = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
            (said, log)
        };
        let (_, log) = run(Task::Sft, &gguf, "sft.jsonl", "steps = 3\nlr = 1e-4");
        let losses: Vec<f64> = log
            .lines()
            .map(|l| {
                serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64().unwrap()
            })
            .collect();
        // A model that knows English, not a random one (ln 49152 = 10.8); and it learns.
        assert!(losses[0] < 4.0 && losses[2] < losses[0] - 0.2, "{losses:?}");
        let sft = d.join("sft");
        run(Task::Reward, &sft, "preferences.jsonl", "steps = 2");
        let more = format!(
            "reward_model = '{}'\n[ppo]\niterations = 1\nrollouts = 4\nminibatches = 1\n\
             epochs = 1\nmax_new_tokens = 24",
            d.join("reward").display()
        );
        let (said, _) = run(Task::Ppo, &sft, "prompts.jsonl", &more);
        assert!(said.contains("objective/scores"), "{said}");
        assert!(ChatTokenizer::open(&d.join("ppo")).is_ok() && d.join("ppo/config.json").exists());
    }

    #[test]
    fn mistakes_are_named() {
        let dir = folder();
        let e =
            toml::from_str::<TrainConfig>("model = ''\ndata = []\nlearning_rate = 1").unwrap_err();
        assert!(e.to_string().contains("unknown field `learning_rate`"), "{e}");
        for (more, words) in [
            ("batch = 3\n[plan]\ndp = 2", "no multiple"),
            ("max_length = 4000", "one window takes 4001"),
            ("max_length = 200", "beyond the model's 128"),
            ("tokenizer = '/nowhere'", "tokenizer = ..."),
            ("[plan]\ndp = 0", "dp must be at least 1"),
        ] {
            let e = format!("{:#}", train(Task::Pretrain, &config(dir.path(), more)).unwrap_err());
            assert!(e.contains(words), "{more}: {e}");
        }
        let bin = dir.path().join("ids.bin");
        std::fs::write(&bin, [255u8; 200]).unwrap();
        let mut c = config(dir.path(), "max_length = 8");
        c.data = vec![bin];
        let e = format!("{:#}", train(Task::Pretrain, &c).unwrap_err());
        assert!(e.contains("token 65535 is beyond"), "{e}");
    }
}
