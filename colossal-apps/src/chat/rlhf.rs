//! The pipeline: tokenizer, fine-tuning, reward model, PPO, answers before and after.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use colossal_comm::{Group, on_ranks};
use colossal_models::generate::{Sampling, generate};
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Decay, LrSchedule, Plan, Trainer};
use colossal_models::{CausalLm, DecoderConfig, Head, hf};
use serde::{Deserialize, Serialize};

use super::ppo::{Models, PpoConfig, ppo};
use super::reward::{TokenPair, accuracy, reward, score};
use super::rule_score::rule_score;
use super::sft::{Talk, evaluate, sft};
use super::{Point, Progress};
use crate::dataset::{self, Message};
use crate::tokenizer::ChatTokenizer;

/// A whole run. Every field has a default; a TOML file may give any of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RlhfConfig {
    /// Folder of the data: sft, preferences and prompts, each with a `.heldout` part.
    pub data: PathBuf,
    /// Where results go.
    pub output_dir: PathBuf,
    /// How the models are trained.
    pub plan: Plan,
    /// Entries of the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the model.
    pub hidden_size: usize,
    /// Blocks of the model.
    pub layers: usize,
    /// Heads of the model.
    pub heads: usize,
    /// Fine-tuning steps.
    pub sft_steps: u64,
    /// Reward model steps.
    pub reward_steps: u64,
    /// Conversations a step.
    pub batch: usize,
    /// Peak learning rate of fine-tuning.
    pub sft_lr: f32,
    /// Peak learning rate of the reward model.
    pub reward_lr: f32,
    /// Learning rate of the actor.
    pub actor_lr: f32,
    /// Learning rate of the critic.
    pub critic_lr: f32,
    /// PPO.
    pub ppo: PpoConfig,
    /// Seed of everything.
    pub seed: u64,
}

impl Default for RlhfConfig {
    fn default() -> RlhfConfig {
        RlhfConfig {
            data: "data/rlhf".into(),
            output_dir: "runs/rlhf".into(),
            plan: Plan { dp: 2, zero: 1, ..Plan::default() },
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
            ppo: PpoConfig::default(),
            seed: 42,
        }
    }
}

/// What came out: on prompts and pairs that no step has seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Loss of fine-tuning on held-out conversations.
    pub sft_loss: f64,
    /// Share of held-out pairs that the reward model orders rightly.
    pub reward_accuracy: f64,
    /// Mean reward of answers before and after PPO.
    pub reward: [f64; 2],
    /// Mean score by rule before and after.
    pub rule: [f64; 2],
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
    /// score that it never saw.
    pub fn aligned(&self) -> bool {
        self.reward_accuracy >= 0.8
            && self.reward[1] > self.reward[0]
            && self.rule[1] > self.rule[0] + 0.05
    }
}

/// Tokenised data of a run.
#[derive(Debug)]
struct Data {
    tokenizer: ChatTokenizer,
    sft: [Vec<Talk>; 2],
    pairs: [Vec<TokenPair>; 2],
    prompts: [Vec<Vec<i32>>; 2],
    questions: Vec<String>,
}

/// Runs the pipeline on `plan.ranks()` ranks (threads).
pub fn rlhf(config: &RlhfConfig) -> Result<Outcome> {
    config.plan.validate()?;
    if !config.batch.is_multiple_of(config.plan.dp * config.plan.microbatches)
        || !config.ppo.rollouts.is_multiple_of(config.plan.dp)
    {
        bail!("batch and ppo.rollouts must be multiples of plan.dp x plan.microbatches");
    }
    let data = read(config)?;
    data.tokenizer.save(&config.output_dir.join("sft"))?;
    data.tokenizer.save(&config.output_dir.join("ppo"))?;
    on_ranks(config.plan.ranks(), |world| on_rank(config, &data, &world))
        .into_iter()
        .next()
        .ok_or_else(|| anyhow!("the plan has no rank"))?
}

fn read(config: &RlhfConfig) -> Result<Data> {
    let file = |name: &str| config.data.join(name);
    let talks = |name: &str| dataset::conversations(&file(name));
    let pairs = |name: &str| dataset::preferences(&file(name));
    let prompts = |name: &str| dataset::prompts(&file(name));
    let (sft, held) = (talks("sft.jsonl")?, talks("sft.heldout.jsonl")?);
    let texts: Vec<String> = sft.iter().flatten().map(|m| m.content.clone()).collect();
    let tokenizer = ChatTokenizer::train(&texts, config.vocab_size)?;
    let talk = |all: &[Vec<Message>]| -> Result<Vec<Talk>> {
        all.iter().map(|m| tokenizer.conversation(m)).collect()
    };
    let pair = |all: Vec<dataset::Pair>| -> Result<Vec<TokenPair>> {
        all.iter()
            .map(|p| {
                let answered = |a| tokenizer.answered(&p.prompt, a);
                Ok((answered(&p.chosen)?, answered(&p.rejected)?))
            })
            .collect()
    };
    let ids = |all: &[Vec<Message>]| -> Result<Vec<Vec<i32>>> {
        all.iter().map(|m| tokenizer.prompt(m)).collect()
    };
    let held_prompts = prompts("prompts.heldout.jsonl")?;
    Ok(Data {
        sft: [talk(&sft)?, talk(&held)?],
        pairs: [pair(pairs("preferences.jsonl")?)?, pair(pairs("preferences.heldout.jsonl")?)?],
        prompts: [ids(&prompts("prompts.jsonl")?)?, ids(&held_prompts)?],
        questions: held_prompts
            .iter()
            .map(|m| m.last().map_or_else(String::new, |m| m.content.clone()))
            .collect(),
        tokenizer,
    })
}

fn on_rank(config: &RlhfConfig, data: &Data, world: &Group) -> Result<Outcome> {
    let first = world.rank() == 0;
    let plan = &config.plan;
    let mut progress = Progress::new(&config.output_dir, first)?;
    let rule = |peak: f32, total: u64, decay: Decay| AdamW {
        lr: LrSchedule { peak, warmup: (total / 20).max(1), total, decay, floor: 0.1 },
        weight_decay: 0.01,
        ..AdamW::default()
    };
    let shape = DecoderConfig::Llama(LlamaConfig {
        max_position_embeddings: 256,
        tie_word_embeddings: true,
        ..LlamaConfig::sized(
            data.tokenizer.vocab_size(),
            config.hidden_size,
            config.layers,
            config.heads,
        )
    });

    // Fine-tuning.
    progress.stage("sft", config.sft_steps);
    let optimizer = rule(config.sft_lr, config.sft_steps, Decay::Cosine);
    let mut trainer = Trainer::new(world, plan, &shape, optimizer, config.seed)?;
    sft(&mut trainer, &data.sft[0], config.batch, config.sft_steps, &mut progress)?;
    let sft_loss = evaluate(&trainer, &data.sft[1])?;
    let sft_dir = config.output_dir.join("sft");
    hf::save(&trainer.model, &sft_dir, usize::MAX)?;
    world.barrier()?;

    // The reward model starts from the fine-tuned one, with a fresh head.
    progress.stage("reward", config.reward_steps);
    let optimizer = rule(config.reward_lr, config.reward_steps, Decay::Cosine);
    let mut rewarder =
        Trainer::from_pretrained(world, plan, &sft_dir, Some(Head::Score), optimizer, config.seed)?;
    reward(&mut rewarder, &data.pairs[0], config.batch, config.reward_steps, &mut progress)?;
    let reward_accuracy = accuracy(&rewarder.model, &data.pairs[1])?;
    let reward_dir = config.output_dir.join("reward");
    hf::save(&rewarder.model, &reward_dir, usize::MAX)?;
    world.barrier()?;
    let judge = rewarder.model.freeze();

    // PPO: the critic starts from the reward model, the reference stays where the actor started.
    let (before, before_reward) = answer(&trainer.model, &judge, data, config)?;
    progress.stage("ppo", config.ppo.iterations);
    let constant = |lr| AdamW { lr: LrSchedule::constant(lr), ..AdamW::default() };
    let open = |dir: &Path, lr| {
        Trainer::from_pretrained(world, plan, dir, None, constant(lr), config.seed)
    };
    let mut actor = open(&sft_dir, config.actor_lr)?;
    let mut critic = open(&reward_dir, config.critic_lr)?;
    let reference = trainer.model.freeze();
    let mut models =
        Models { actor: &mut actor, critic: &mut critic, reference: &reference, reward: &judge };
    let end = data.tokenizer.end_of_turn();
    ppo(&mut models, &data.prompts[0], &data.sft[0], end, &config.ppo, &mut progress)?;
    let (after, after_reward) = answer(&actor.model, &judge, data, config)?;
    hf::save(&actor.model, &config.output_dir.join("ppo"), usize::MAX)?;
    progress.finish();

    let mean_rule = |answers: &[String]| {
        let scores = data.questions.iter().zip(answers).map(|(q, a)| rule_score(q, a));
        scores.sum::<f64>() / answers.len().max(1) as f64
    };
    let kl =
        progress.points.iter().rev().find(|p| p.name == "objective/kl").map_or(0.0, |p| p.value);
    Ok(Outcome {
        sft_loss,
        reward_accuracy,
        reward: [before_reward, after_reward],
        rule: [mean_rule(&before), mean_rule(&after)],
        kl,
        answers: data
            .questions
            .iter()
            .zip(before.into_iter().zip(after))
            .map(|(q, (b, a))| [q.clone(), b, a])
            .collect(),
        points: std::mem::take(&mut progress.points),
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
    let answers = generate(model, &data.prompts[1], &sampling, |_, _| {})?;
    let whole: Vec<Vec<i32>> =
        data.prompts[1].iter().zip(&answers).map(|(p, a)| [&p[..], &a.ids].concat()).collect();
    let scores = score(judge, &whole.iter().map(|r| &r[..]).collect::<Vec<_>>())?;
    let texts =
        answers.iter().map(|a| data.tokenizer.decode(&a.ids)).collect::<Result<Vec<_>>>()?;
    Ok((texts, scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len().max(1) as f64))
}
