//! The pipeline: tokenizer, fine-tuning, reward model, PPO, answers before and after.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use colossal_comm::{Group, on_ranks};
use colossal_models::generate::{Sampling, generate};
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Decay, LrSchedule, Plan, Trainer};
use colossal_models::{CausalLm, DecoderConfig, Head, hf};
use colossal_tensor::safetensors::write_atomic;
use serde::{Deserialize, Serialize};

use super::corpus::{self, Corpus, Split};
use super::ppo::{Models, PpoConfig, Run, ppo};
use super::reward::{TokenPair, accuracy, reward, score};
use super::rule_score::rule_score;
use super::sft::{Talk, evaluate, sft};
use super::{Point, Progress};
use crate::dataset::Message;
use crate::tokenizer::ChatTokenizer;

/// A whole run. Every field has a default; a TOML file or flags may give any of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RlhfConfig {
    /// A Hugging Face folder or a GGUF file to start from; a new small model if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// JSONL files, and folders of them: conversations, preferences, prompts (see `corpus`).
    pub data: Vec<PathBuf>,
    /// Where results go.
    pub output_dir: PathBuf,
    /// Longest sequence in tokens; longer entries are left out.
    pub max_length: usize,
    /// Entries of a new tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of a new model.
    pub hidden_size: usize,
    /// Blocks of a new model.
    pub layers: usize,
    /// Heads of a new model.
    pub heads: usize,
    /// Fine-tuning steps.
    pub sft_steps: u64,
    /// Reward model steps.
    pub reward_steps: u64,
    /// Conversations (or pairs) a step.
    pub batch: usize,
    /// Peak learning rate of fine-tuning.
    pub sft_lr: f32,
    /// Peak learning rate of the reward model.
    pub reward_lr: f32,
    /// Learning rate of the actor.
    pub actor_lr: f32,
    /// Learning rate of the critic.
    pub critic_lr: f32,
    /// Seed of everything.
    pub seed: u64,
    /// How the models are trained.
    pub plan: Plan,
    /// PPO.
    pub ppo: PpoConfig,
}

impl Default for RlhfConfig {
    fn default() -> RlhfConfig {
        RlhfConfig {
            model: None,
            data: vec!["data/rlhf".into()],
            output_dir: "runs/rlhf".into(),
            max_length: 256,
            vocab_size: 512,
            hidden_size: 192,
            layers: 4,
            heads: 6,
            sft_steps: 250,
            reward_steps: 80,
            batch: 32,
            sft_lr: 2e-3,
            reward_lr: 5e-4,
            actor_lr: 2e-4,
            critic_lr: 5e-4,
            seed: 42,
            plan: Plan { dp: 2, zero: 1, ..Plan::default() },
            ppo: PpoConfig::default(),
        }
    }
}

impl RlhfConfig {
    /// Defaults for a model that has learnt already: smaller steps, and one rank, since four
    /// models and their moments take much more memory than the default run's.
    pub fn pretrained() -> RlhfConfig {
        RlhfConfig {
            max_length: 512,
            sft_steps: 100,
            reward_steps: 100,
            batch: 8,
            sft_lr: 2e-5,
            reward_lr: 2e-5,
            actor_lr: 3e-6,
            critic_lr: 1e-5,
            plan: Plan::default(),
            ppo: PpoConfig { rollouts: 16, ..PpoConfig::default() },
            ..RlhfConfig::default()
        }
    }

    /// Is this the data that the repository holds, whose answers a rule can score?
    fn has_rule(&self) -> bool {
        self.data == RlhfConfig::default().data
    }
}

/// Weights larger than this are split over files, as transformers does.
const SHARD_BYTES: usize = 5 << 30;

/// What came out: on prompts and pairs that no step has seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Loss of fine-tuning on held-out conversations.
    pub sft_loss: f64,
    /// Share of held-out pairs that the reward model orders rightly.
    pub reward_accuracy: f64,
    /// Mean reward of answers before and after PPO.
    pub reward: [f64; 2],
    /// Mean score by rule before and after; only the data of the repository has a rule.
    pub rule: Option<[f64; 2]>,
    /// Divergence of the last rollouts from the reference, in nats per answer.
    pub kl: f64,
    /// Prompts with both answers.
    pub answers: Vec<[String; 3]>,
    /// All numbers of the run.
    #[serde(skip)]
    pub points: Vec<Point>,
}

impl Outcome {
    /// Did alignment work? The reward model orders pairs, PPO raises both the reward and the
    /// score that it never saw. On other data: it orders more pairs than a coin, reward rises.
    pub fn aligned(&self) -> bool {
        let (accuracy, scored) = match self.rule {
            Some([before, after]) => (0.8, after > before + 0.05),
            None => (0.5, true),
        };
        self.reward_accuracy > accuracy && self.reward[1] > self.reward[0] && scored
    }
}

/// Tokenised data of a run.
#[derive(Debug)]
struct Data {
    tokenizer: ChatTokenizer,
    talks: Split<Talk>,
    pairs: Split<TokenPair>,
    prompts: Split<Vec<i32>>,
    /// The last turn of every held-out prompt.
    questions: Vec<String>,
}

/// Runs the pipeline on `plan.ranks()` ranks (threads).
///
/// A run that was cut off goes on after its last finished stage, if its configuration is the same.
pub fn rlhf(config: &RlhfConfig) -> Result<Outcome> {
    config.plan.validate()?;
    if !config.batch.is_multiple_of(config.plan.dp)
        || !config.ppo.rollouts.is_multiple_of(config.plan.dp)
    {
        bail!(
            "batch {} and ppo.rollouts {} must be multiples of plan.dp {}",
            config.batch,
            config.ppo.rollouts,
            config.plan.dp
        );
    }
    if config.plan.microbatches > 1 {
        bail!("plan.microbatches is for pretraining and fine-tuning alone; set it to 1");
    }
    let resolved = toml::to_string_pretty(config)?;
    let resolved_path = config.output_dir.join("config.resolved.toml");
    let same = std::fs::read_to_string(&resolved_path).is_ok_and(|old| old == resolved);
    let resumed = same && !config.output_dir.join("outcome.json").exists();
    let data = read(config)?;
    for stage in ["sft", "reward", "ppo"] {
        let folder = config.output_dir.join(stage);
        if !resumed {
            begin(config, &folder)?;
        }
        data.tokenizer.save(&folder)?;
    }
    let outcome = config.output_dir.join("outcome.json");
    if outcome.exists() {
        std::fs::remove_file(&outcome).with_context(|| outcome.display().to_string())?;
    }
    write_atomic(&resolved_path, resolved.as_bytes())?;
    let results = on_ranks(config.plan.ranks(), |world| on_rank(config, &data, resumed, &world));
    let mut first = None;
    for (rank, result) in results.into_iter().enumerate() {
        let outcome = result.with_context(|| format!("rank {rank}"))?;
        first.get_or_insert(outcome);
    }
    first.ok_or_else(|| anyhow!("the plan has no rank"))
}

/// Makes way for a new run's stage: what an earlier run wrote there no longer counts as done.
///
/// # Errors
/// When the folder is no earlier run's, or the run starts from the model in it.
fn begin(config: &RlhfConfig, folder: &Path) -> Result<()> {
    let shown = folder.display();
    let inside = config.model.as_ref().and_then(|m| m.canonicalize().ok());
    if let (Some(model), Ok(folder)) = (inside, folder.canonicalize())
        && model.starts_with(folder)
    {
        bail!(
            "{shown}: the run starts from this model and would overwrite it; choose another output_dir"
        );
    }
    if folder.exists() && !config.output_dir.join("config.resolved.toml").exists() {
        bail!("{shown}: is there, and no run of rlhf wrote it; choose another output_dir");
    }
    let done = folder.join("config.json");
    if done.exists() {
        std::fs::remove_file(&done).with_context(|| done.display().to_string())?;
    }
    Ok(())
}

fn read(config: &RlhfConfig) -> Result<Data> {
    let corpus = Corpus::read(&config.data)?;
    let tokenizer = match &config.model {
        Some(path) => ChatTokenizer::open(path)?,
        None => {
            let said = corpus.talks.train.iter().flatten().map(|m| m.content.clone());
            ChatTokenizer::train(&said.collect::<Vec<_>>(), config.vocab_size)?
        }
    };
    let (t, max, room) = (&tokenizer, config.max_length, config.ppo.max_new_tokens);
    let fits = |p: &Vec<Message>| t.prompt(p).is_ok_and(|ids| ids.len() + room <= max);
    let held: Vec<Vec<Message>> = corpus.prompts.held.into_iter().filter(fits).take(64).collect();
    Ok(Data {
        talks: Split {
            train: corpus::talks(t, &corpus.talks.train, max)?,
            held: corpus::talks(t, &corpus.talks.held, max)?,
        },
        pairs: Split {
            train: corpus::pairs(t, &corpus.pairs.train, max)?,
            held: corpus::pairs(t, &corpus.pairs.held, max)?,
        },
        prompts: Split {
            train: corpus::prompts(t, &corpus.prompts.train, room, max)?,
            held: corpus::prompts(t, &held, room, max)?,
        },
        questions: held
            .iter()
            .map(|m| m.last().map_or_else(String::new, |m| m.content.clone()))
            .collect(),
        tokenizer,
    })
}

fn on_rank(config: &RlhfConfig, data: &Data, resumed: bool, world: &Group) -> Result<Outcome> {
    let first = world.rank() == 0;
    let (plan, seed) = (&config.plan, config.seed);
    let mut progress = Progress::open(&config.output_dir, first, resumed)?;
    let rule = |peak: f32, total: u64, decay: Decay| AdamW {
        lr: LrSchedule { peak, warmup: (total / 20).max(1), total, decay, floor: 0.1 },
        weight_decay: 0.01,
        ..AdamW::default()
    };
    let open = |dir: &Path, head, optimizer| {
        Trainer::from_pretrained(world, plan, dir, head, optimizer, seed)
    };
    let folder = |stage: &str| config.output_dir.join(stage);
    let done = |stage: &str| folder(stage).join("config.json").exists();
    // Every rank must have looked before any writes.
    let (sft_done, reward_done) = (done("sft"), done("reward"));
    world.barrier()?;

    // Fine-tuning.
    let optimizer = rule(config.sft_lr, config.sft_steps, Decay::Cosine);
    let trainer = if sft_done {
        open(&folder("sft"), None, optimizer)?
    } else {
        progress.stage("sft", config.sft_steps);
        let mut trainer = match &config.model {
            Some(path) => open(path, None, optimizer)?,
            None => Trainer::new(world, plan, &small(config, data), optimizer, seed)?,
        };
        let limit = trainer.model.config.max_positions();
        if config.max_length > limit {
            bail!("max_length {} is beyond the model's {limit} positions", config.max_length);
        }
        sft(&mut trainer, &data.talks.train, config.batch, config.sft_steps, &mut progress)?;
        hf::save(&trainer.model, &folder("sft"), SHARD_BYTES)?;
        world.barrier()?;
        trainer
    };
    let sft_loss = evaluate(&trainer, &data.talks.held)?;
    // Moments are of no use any more: only the model stays, as PPO's reference.
    let reference = trainer.into_model().freeze();

    // The reward model starts from the fine-tuned one, with a fresh head.
    let optimizer = rule(config.reward_lr, config.reward_steps, Decay::Cosine);
    let rewarder = if reward_done {
        open(&folder("reward"), None, optimizer)?
    } else {
        progress.stage("reward", config.reward_steps);
        let mut rewarder = open(&folder("sft"), Some(Head::Score), optimizer)?;
        reward(&mut rewarder, &data.pairs.train, config.batch, config.reward_steps, &mut progress)?;
        hf::save(&rewarder.model, &folder("reward"), SHARD_BYTES)?;
        world.barrier()?;
        rewarder
    };
    let judge = rewarder.into_model().freeze();
    let reward_accuracy = accuracy(&judge, &data.pairs.held)?;

    // PPO: the critic starts from the reward model, the reference stays where the actor started.
    let (before, before_reward) = answer(&reference, &judge, data, config)?;
    progress.stage("ppo", config.ppo.iterations);
    let constant = |lr| AdamW { lr: LrSchedule::constant(lr), ..AdamW::default() };
    let mut actor = open(&folder("sft"), None, constant(config.actor_lr))?;
    let mut critic = open(&folder("reward"), None, constant(config.critic_lr))?;
    let scored = |rows: &[&[i32]]| score(&judge, rows);
    let mut models =
        Models { actor: &mut actor, critic: &mut critic, reference: &reference, judge: &scored };
    let run = Run {
        prompts: &data.prompts.train,
        demonstrations: &data.talks.train,
        end_of_turn: data.tokenizer.end_of_turn(),
        config: &config.ppo,
    };
    ppo(&mut models, &run, 0..config.ppo.iterations, &mut progress)?;
    let (after, after_reward) = answer(&actor.model, &judge, data, config)?;
    hf::save(&actor.model, &folder("ppo"), SHARD_BYTES)?;
    progress.finish();

    let mean_rule = |answers: &[String]| {
        let scores = data.questions.iter().zip(answers).map(|(q, a)| rule_score(q, a));
        scores.sum::<f64>() / answers.len().max(1) as f64
    };
    Ok(Outcome {
        sft_loss,
        reward_accuracy,
        reward: [before_reward, after_reward],
        rule: config.has_rule().then(|| [mean_rule(&before), mean_rule(&after)]),
        kl: progress.last("objective/kl").unwrap_or(0.0),
        answers: data
            .questions
            .iter()
            .zip(before.into_iter().zip(after))
            .map(|(q, (b, a))| [q.clone(), b, a])
            .collect(),
        points: std::mem::take(&mut progress.points),
    })
}

/// The new model of a run without `model`.
fn small(config: &RlhfConfig, data: &Data) -> DecoderConfig {
    let (vocab, width) = (data.tokenizer.vocab_size(), config.hidden_size);
    DecoderConfig::Llama(LlamaConfig {
        max_position_embeddings: config.max_length,
        tie_word_embeddings: true,
        ..LlamaConfig::sized(vocab, width, config.layers, config.heads)
    })
}

/// Answers to the held-out prompts, drawn at temperature 1, and their mean reward.
fn answer(
    model: &CausalLm,
    judge: &CausalLm,
    data: &Data,
    config: &RlhfConfig,
) -> Result<(Vec<String>, f64)> {
    let sampling = Sampling {
        temperature: 1.0,
        max_new_tokens: config.ppo.max_new_tokens,
        stop: vec![data.tokenizer.end_of_turn()],
        seed: config.seed,
        ..Sampling::default()
    };
    let answers = generate(model, &data.prompts.held, &sampling, |_, _| {})?;
    let whole: Vec<Vec<i32>> =
        data.prompts.held.iter().zip(&answers).map(|(p, a)| [&p[..], &a.ids].concat()).collect();
    let scores = score(judge, &whole.iter().map(|r| &r[..]).collect::<Vec<_>>())?;
    let texts =
        answers.iter().map(|a| data.tokenizer.decode(&a.ids)).collect::<Result<Vec<_>>>()?;
    Ok((texts, scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len().max(1) as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(dir: &Path) -> RlhfConfig {
        let data = dir.join("mine.jsonl");
        let line = |i: usize| {
            let (q, a) = (format!("Say word {}", i % 25), format!("Word {}.", i % 25));
            format!(r#"{{"prompt":"{q}","chosen":"{a}","rejected":"No no no."}}"#)
        };
        let text: Vec<String> = (0..100).map(line).collect();
        std::fs::write(&data, text.join("\n")).unwrap();
        RlhfConfig {
            data: vec![data],
            output_dir: dir.join("out"),
            hidden_size: 32,
            layers: 1,
            heads: 2,
            sft_steps: 20,
            reward_steps: 20,
            batch: 8,
            ppo: PpoConfig { iterations: 3, rollouts: 8, ..PpoConfig::default() },
            ..RlhfConfig::default()
        }
    }

    #[test]
    fn it_runs_on_a_file_of_ones_own_and_on_the_model_it_wrote_and_goes_on_where_it_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let config = own(dir.path());
        let whole = rlhf(&config).unwrap();
        assert!(whole.rule.is_none() && !whole.answers.is_empty());
        assert!(whole.reward_accuracy > 0.9, "{}", whole.reward_accuracy);
        // Without the outcome, only PPO is done again, and ends the same.
        let sft = config.output_dir.join("sft/model.safetensors");
        let written = std::fs::metadata(&sft).unwrap().modified().unwrap();
        let again = rlhf(&config).unwrap();
        assert_eq!((again.reward, &again.answers), (whole.reward, &whole.answers));
        assert_eq!(std::fs::metadata(&sft).unwrap().modified().unwrap(), written);
        assert!(again.points.iter().any(|p| p.stage == "sft"), "earlier numbers are in the report");
        // Another configuration begins anew.
        let other = RlhfConfig {
            model: Some(config.output_dir.join("ppo")),
            output_dir: dir.path().join("second"),
            sft_steps: 2,
            reward_steps: 2,
            ..config
        };
        let second = rlhf(&other).unwrap();
        assert_eq!(second.answers.len(), whole.answers.len());
        // What is not ours to overwrite stays.
        let onto = RlhfConfig { output_dir: dir.path().join("out"), ..other.clone() };
        let e = format!("{:#}", rlhf(&onto).unwrap_err());
        assert!(e.contains("starts from this model"), "{e}");
        let theirs = dir.path().join("theirs");
        std::fs::create_dir_all(theirs.join("sft")).unwrap();
        let e = rlhf(&RlhfConfig { output_dir: theirs, ..other.clone() }).unwrap_err();
        assert!(format!("{e:#}").contains("no run of rlhf wrote it"), "{e:#}");
        let long = RlhfConfig { max_length: 300, ..other };
        let e = format!("{:#}", rlhf(&long).unwrap_err());
        assert!(e.contains("beyond the model's 256"), "{e}");
    }
}
