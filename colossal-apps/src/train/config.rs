//! The configuration of a training run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use colossal_comm::Group;
use colossal_models::train::{Decay, LrSchedule, Optimizer, Plan, Rule, Trainer};
use colossal_models::{Head, hf};
use serde::{Deserialize, Serialize};

use crate::chat::ppo::PpoConfig;
use crate::tokenizer::ChatTokenizer;

/// A training run. Every field but `model` and `data` has a default; unknown ones are errors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// A Hugging Face folder, a GGUF file, or a `config.json` alone for fresh weights.
    pub model: PathBuf,
    /// Data files: JSONL; for pretraining also `.txt`, or `.bin` of little-endian u16 token ids.
    pub data: Vec<PathBuf>,
    /// A file of the same kind that is only evaluated, at the end (sft and reward).
    #[serde(default)]
    pub heldout: Option<PathBuf>,
    /// Where the tokenizer is, if not with the model.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// The reward model's folder (ppo only): judge, and beginning of the critic.
    #[serde(default)]
    pub reward_model: Option<PathBuf>,
    /// Conversations that `ppo.ptx_coef` mixes into the policy's loss (ppo only).
    #[serde(default)]
    pub demonstrations: Vec<PathBuf>,
    /// Where results go.
    #[serde(default = "output_dir")]
    pub output_dir: PathBuf,
    /// Optimizer steps.
    #[serde(default = "steps")]
    pub steps: u64,
    /// Sequences (or pairs) a step, of all ranks together.
    #[serde(default = "batch")]
    pub batch: usize,
    /// Longest sequence in tokens; longer conversations are left out.
    #[serde(default = "max_length")]
    pub max_length: usize,
    /// `adamw`, `lion`, `lamb`, `lars`, `adafactor` or `came`, with its published constants. Their
    /// learning rates are not alike: Lion takes a third to a tenth of AdamW's, LARS hundreds of it.
    #[serde(default)]
    pub optimizer: OptimizerName,
    /// Peak learning rate.
    #[serde(default = "lr")]
    pub lr: f32,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// What follows it.
    #[serde(default)]
    pub decay: Decay,
    /// Decoupled weight decay of matrices.
    #[serde(default)]
    pub weight_decay: f32,
    /// Gradients are clipped to this norm; 0 turns it off.
    #[serde(default = "clip")]
    pub clip: f32,
    /// A checkpoint every so many steps (ppo: iterations); 0 is none.
    #[serde(default)]
    pub save_every: u64,
    /// Checkpoints to keep, the newest; 0 keeps all.
    #[serde(default = "save_total_limit")]
    pub save_total_limit: usize,
    /// Seed of everything.
    #[serde(default)]
    pub seed: u64,
    /// How it is spread over ranks.
    #[serde(default)]
    pub plan: Plan,
    /// PPO; its learning rates are `lr`.
    #[serde(default)]
    pub ppo: PpoConfig,
}

/// An optimizer, by name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerName {
    /// Two moments an element.
    #[default]
    AdamW,
    /// The sign of a momentum: half the state.
    Lion,
    /// Adam scaled to each parameter's norm, for large batches.
    Lamb,
    /// Momentum scaled to each parameter's norm, for large batches.
    Lars,
    /// Second moments by row and column: next to no state.
    Adafactor,
    /// Adafactor with a momentum: half the state.
    Came,
}

impl OptimizerName {
    fn rule(self) -> Rule {
        match self {
            OptimizerName::AdamW => Rule::ADAMW,
            OptimizerName::Lion => Rule::LION,
            OptimizerName::Lamb => Rule::LAMB,
            OptimizerName::Lars => Rule::LARS,
            OptimizerName::Adafactor => Rule::ADAFACTOR,
            OptimizerName::Came => Rule::CAME,
        }
    }
}

fn output_dir() -> PathBuf {
    "runs/train".into()
}

fn steps() -> u64 {
    100
}

fn batch() -> usize {
    8
}

fn max_length() -> usize {
    512
}

fn save_total_limit() -> usize {
    2
}

fn lr() -> f32 {
    1e-4
}

fn clip() -> f32 {
    1.0
}

impl TrainConfig {
    pub(super) fn optimizer(&self) -> Optimizer {
        Optimizer {
            rule: self.optimizer.rule(),
            lr: LrSchedule {
                peak: self.lr,
                warmup: self.warmup,
                total: self.steps,
                decay: self.decay,
                floor: 0.1,
            },
            weight_decay: self.weight_decay,
            clip: self.clip,
        }
    }

    /// Where to save next: at the next multiple of `save_every`, or at the end.
    pub(super) fn next_stop(&self, done: u64, end: u64) -> u64 {
        match self.save_every {
            0 => end,
            every => (done / every + 1).saturating_mul(every).min(end),
        }
    }

    pub(super) fn checkpoint(&self, step: u64) -> PathBuf {
        self.output_dir.join(format!("checkpoint-{step}"))
    }

    pub(super) fn open_tokenizer(&self) -> Result<ChatTokenizer> {
        let beside = match self.model.extension() {
            Some(e) if e == "json" => self.model.parent().unwrap_or(Path::new(".")),
            _ => &self.model,
        };
        let path = self.tokenizer.as_deref().unwrap_or(beside);
        ChatTokenizer::open(path).context("tokenizer (name its folder with `tokenizer = ...`)")
    }

    pub(super) fn trainer(&self, world: &Group, head: Option<Head>) -> Result<Trainer> {
        let (plan, optimizer) = (&self.plan, self.optimizer());
        if self.model.extension().is_some_and(|e| e == "json") {
            let config = hf::read_config(&self.model)?;
            let config = match head {
                Some(head) => config.with_head(head),
                None => config,
            };
            return Ok(Trainer::new(world, plan, &config, optimizer, self.seed)?);
        }
        Ok(Trainer::from_pretrained(world, plan, &self.model, head, optimizer, self.seed)?)
    }
}
