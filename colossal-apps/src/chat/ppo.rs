//! Proximal policy optimisation from a reward model (Schulman et al., 2017; Ouyang et al., 2022).
//!
//! An iteration reads from top to bottom: roll out, score, subtract the divergence from the
//! reference, estimate advantages, take the clipped policy and value steps.

use std::ops::Range;

use anyhow::Result;
use colossal_comm::ReduceOp;
use colossal_models::generate::{Sampling, generate};
use colossal_models::train::{Sequences, Trainer, lm_loss};
use colossal_models::{CausalLm, Tensor, Tokens, no_grad};
use colossal_tensor::IGNORE;
use serde::{Deserialize, Serialize};

use super::Progress;
use super::advantage::{gae, moments, whiten};
use super::kl::{k1, penalised_rewards};
use super::policy_loss::{policy_loss, value_loss};
use super::reward::{pad, token_scores};
use super::sft::{Talk, together};

/// Hyper-parameters of PPO; defaults follow ColossalChat and TRL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PpoConfig {
    /// Iterations.
    pub iterations: u64,
    /// Prompts answered in each, by all ranks together.
    pub rollouts: usize,
    /// Passes over the rollouts.
    pub epochs: usize,
    /// Minibatches of a pass.
    pub minibatches: usize,
    /// Coefficient of the divergence in the reward.
    pub kl_coef: f32,
    /// Discount.
    pub gamma: f32,
    /// Decay of the advantage estimator.
    pub lambda: f32,
    /// Clip of the policy's ratio.
    pub clip: f32,
    /// Clip of the critic's change.
    pub value_clip: f32,
    /// Taken from the reward of an answer that did not end.
    pub missing_eos_penalty: f32,
    /// Coefficient of the language-modelling loss on demonstrations.
    pub ptx_coef: f32,
    /// A pass ends early when the policy has moved this far from the one that rolled out.
    pub target_kl: f32,
    /// Longest answer.
    pub max_new_tokens: usize,
}

impl Default for PpoConfig {
    fn default() -> PpoConfig {
        PpoConfig {
            iterations: 30,
            rollouts: 64,
            epochs: 2,
            minibatches: 2,
            kl_coef: 0.1,
            gamma: 1.0,
            lambda: 0.95,
            clip: 0.2,
            value_clip: 0.2,
            missing_eos_penalty: 1.0,
            ptx_coef: 0.0,
            target_kl: 0.2,
            max_new_tokens: 48,
        }
    }
}

/// An answer and all that is known of its tokens.
#[derive(Debug, Clone)]
struct Rollout {
    ids: Vec<i32>,
    prompt: usize,
    score: f32,
    logprobs: Vec<f32>,
    values: Vec<f32>,
    advantages: Vec<f32>,
    returns: Vec<f32>,
    divergence: f32,
}

/// What judges whole conversations, one reward each: a model (see `score`) or any rule.
pub type Judge<'a> = dyn Fn(&[&[i32]]) -> Result<Vec<f32>> + 'a;

/// The models of PPO: two in training, one frozen, and the judge.
pub struct Models<'a> {
    /// The policy.
    pub actor: &'a mut Trainer,
    /// One value per token.
    pub critic: &'a mut Trainer,
    /// The policy before.
    pub reference: &'a CausalLm,
    /// One reward per answer.
    pub judge: &'a Judge<'a>,
}

impl std::fmt::Debug for Models<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (actor, critic) = (&self.actor, &self.critic);
        f.debug_struct("Models")
            .field("actor", actor)
            .field("critic", critic)
            .finish_non_exhaustive()
    }
}

/// What PPO learns from.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// Prompts to answer.
    pub prompts: &'a [Vec<i32>],
    /// Conversations, mixed in with `ptx_coef`.
    pub demonstrations: &'a [Talk],
    /// The token that ends an answer.
    pub end_of_turn: i32,
    /// Hyper-parameters.
    pub config: &'a PpoConfig,
}

/// Trains the actor on its own answers. An iteration is a function of the models and its number,
/// so a run may be cut into ranges of iterations.
pub fn ppo(
    models: &mut Models<'_>,
    run: &Run<'_>,
    iterations: Range<u64>,
    progress: &mut Progress,
) -> Result<()> {
    let config = run.config;
    models.actor.plan.whole_sequences("ppo")?;
    let order = Sequences::new(run.prompts.len(), models.actor.seed());
    let (part, parts) = models.actor.data_part();
    let own = config.rollouts / parts;
    for iteration in iterations {
        let picked = order.take(iteration * config.rollouts as u64, config.rollouts);
        let picked = &picked[part * own..(part + 1) * own];
        let picked: Vec<Vec<i32>> = picked.iter().map(|i| run.prompts[*i].clone()).collect();
        let seed = (iteration * parts as u64 + part as u64) ^ (models.actor.seed() << 32);
        let mut rollouts = roll_out(models, &picked, run.end_of_turn, seed, config)?;

        // Whitened over all tokens of all ranks, after the returns were formed.
        let mut sums = moments(rollouts.iter().flat_map(|r| &r.advantages));
        models.actor.world().all_reduce(&mut sums, ReduceOp::Sum)?;
        rollouts.iter_mut().for_each(|r| whiten(&mut r.advantages, sums));

        let (mut policy, mut value, mut clipped, mut moved) = (0.0, 0.0, 0.0, 0.0);
        let mut updates = 0.0;
        'passes: for epoch in 0..config.epochs {
            let shuffled = Sequences::new(own, seed ^ 0x5eed).take((epoch * own) as u64, own);
            for minibatch in shuffled.chunks(own.div_ceil(config.minibatches)) {
                let batch: Vec<&Rollout> = minibatch.iter().map(|i| &rollouts[*i]).collect();
                let at = (iteration, updates as u64);
                let update = update(models, &batch, run.demonstrations, at, config)?;
                policy += update.policy;
                value += update.value;
                clipped += update.clipped;
                moved = update.divergence;
                updates += 1.0;
                if moved > f64::from(config.target_kl) {
                    break 'passes;
                }
            }
        }
        let mut means = [0.0f64; 4];
        for r in &rollouts {
            means[0] += f64::from(r.score);
            means[1] += f64::from(r.divergence);
            means[2] += (r.ids.len() - r.prompt) as f64;
            means[3] += 1.0;
        }
        models.actor.world().all_reduce(&mut means, ReduceOp::Sum)?;
        progress.step(
            "ppo",
            iteration + 1,
            &[
                ("objective/scores", means[0] / means[3]),
                ("objective/kl", means[1] / means[3]),
                ("completions/mean_length", means[2] / means[3]),
                ("loss/policy_avg", policy / updates),
                ("loss/value_avg", value / updates),
                ("policy/clipfrac_avg", clipped / updates),
                ("policy/approxkl_avg", moved),
            ],
        );
    }
    Ok(())
}

fn roll_out(
    models: &Models<'_>,
    prompts: &[Vec<i32>],
    end_of_turn: i32,
    seed: u64,
    config: &PpoConfig,
) -> Result<Vec<Rollout>> {
    let sampling = Sampling {
        temperature: 1.0,
        max_new_tokens: config.max_new_tokens,
        stop: vec![end_of_turn],
        seed,
        ..Sampling::default()
    };
    let answers = generate(&models.actor.model, prompts, &sampling, |_, _| {})?;
    let whole: Vec<Vec<i32>> =
        prompts.iter().zip(&answers).map(|(p, a)| [&p[..], &a.ids].concat()).collect();
    let rows: Vec<&[i32]> = whole.iter().map(|r| &r[..]).collect();
    let policy = no_grad(|| token_losses(&models.actor.model, &rows))?.to_vec()?;
    let reference = no_grad(|| token_losses(models.reference, &rows))?.to_vec()?;
    let (values, seq) = no_grad(|| token_scores(&models.critic.model, &rows))?;
    let (values, scores) = (values.to_vec()?, (models.judge)(&rows)?);
    let stride = seq - 1;
    let answered = whole.iter().zip(prompts).zip(answers.iter().zip(&scores)).enumerate();
    Ok(answered
        .map(|(i, ((ids, prompt), (answer, score)))| {
            // Token t is predicted at t - 1: its log-probability and the value before it.
            let span = prompt.len() - 1..ids.len() - 1;
            let at = |x: &[f32], stride: usize| x[i * stride..][span.clone()].to_vec();
            let logprobs: Vec<f32> = at(&policy, stride).iter().map(|l| -l).collect();
            let before: Vec<f32> = at(&reference, stride).iter().map(|l| -l).collect();
            let values = at(&values, seq);
            let penalty = if answer.stopped { 0.0 } else { config.missing_eos_penalty };
            let rewards = penalised_rewards(&logprobs, &before, score - penalty, config.kl_coef);
            let (advantages, returns) = gae(&rewards, &values, config.gamma, config.lambda);
            let divergence = logprobs.iter().zip(&before).map(|(p, r)| k1(*p, *r)).sum();
            Rollout {
                ids: ids.clone(),
                prompt: prompt.len(),
                score: *score,
                logprobs,
                values,
                advantages,
                returns,
                divergence,
            }
        })
        .collect())
}

/// `-log p` of every next token, `[rows, seq - 1]`; 0 beyond a row's end.
fn token_losses(model: &CausalLm, rows: &[&[i32]]) -> colossal_models::Result<Tensor> {
    let inputs: Vec<&[i32]> = rows.iter().map(|r| &r[..r.len() - 1]).collect();
    let (ids, seq, lengths) = pad(&inputs);
    let mut targets = vec![IGNORE; ids.len()];
    for (i, row) in rows.iter().enumerate() {
        targets[i * seq..i * seq + row.len() - 1].copy_from_slice(&row[1..]);
    }
    let tokens = Tokens::padded(model.scope(), &ids, seq, lengths)?;
    model.losses(tokens, &targets)
}

struct Update {
    policy: f64,
    value: f64,
    clipped: f64,
    divergence: f64,
}

fn update(
    models: &mut Models<'_>,
    batch: &[&Rollout],
    demonstrations: &[Talk],
    (iteration, number): (u64, u64),
    config: &PpoConfig,
) -> Result<Update> {
    let rows: Vec<&[i32]> = batch.iter().map(|r| &r.ids[..]).collect();
    let seq = rows.iter().map(|r| r.len()).max().unwrap_or(1);
    let mut count = [batch.iter().map(|r| r.logprobs.len()).sum::<usize>() as f64];
    models.actor.world().all_reduce(&mut count, ReduceOp::Sum)?;
    // Ranks with the same part of the batch count the same tokens.
    let count = count[0] / models.actor.plan.copies() as f64;
    let scale = (1.0 / count.max(1.0)) as f32;
    let (part, parts) = models.actor.data_part();
    let flat = |of: &dyn Fn(&Rollout) -> &[f32]| -> Vec<f32> {
        batch.iter().flat_map(|r| of(r).iter().copied()).collect()
    };
    let (old, advantages) = (flat(&|r| &r.logprobs), flat(&|r| &r.advantages));
    let (old_values, returns) = (flat(&|r| &r.values), flat(&|r| &r.returns));
    // Where each of these tokens lies in `[rows, stride]`.
    let places = |stride: usize| -> Vec<usize> {
        let of = |(i, r): (usize, &&Rollout)| {
            (r.prompt - 1..r.ids.len() - 1).map(move |t| i * stride + t).collect::<Vec<_>>()
        };
        batch.iter().enumerate().flat_map(of).collect()
    };
    let spread = |gradient: &[f32], places: &[usize], len: usize, sign: f32| -> Vec<f32> {
        let mut out = vec![0.0; len];
        places.iter().zip(gradient).for_each(|(p, g)| out[*p] = sign * g);
        out
    };
    let mut watched = [0.0f64; 2];
    let tokens = count as usize;
    let policy = models.actor.train(tokens, seq, |model, _| {
        let losses = token_losses(model, &rows)?;
        let places = places(seq - 1);
        let values = losses.to_vec()?;
        let now: Vec<f32> = places.iter().map(|p| -values[*p]).collect();
        let loss = policy_loss(&now, &old, &advantages, config.clip, scale);
        watched = [loss.clipped as f64, f64::from(loss.divergence)];
        let gradient = spread(&loss.gradient, &places, values.len(), -1.0);
        let weight = 1.0 - config.ptx_coef;
        let rl = Tensor::external(loss.value, &[(&losses, gradient)])?.scale(weight)?;
        if config.ptx_coef == 0.0 || demonstrations.is_empty() {
            return Ok(rl);
        }
        let size = batch.len();
        let order = Sequences::new(demonstrations.len(), iteration ^ 0x9e37);
        let picked = order.take(number * (size * parts) as u64, size * parts);
        let demo = together(demonstrations, &picked)
            .map_err(|e| colossal_models::Error::Other(e.to_string()))?;
        let share = config.ptx_coef / demo.learnt().max(1) as f32;
        let own = demo.part(part, parts)?;
        rl.add(&lm_loss(model, &own, None, share)?)
    })?;
    let value = models.critic.train(tokens, seq, |model, _| {
        let (scores, seq) = token_scores(model, &rows)?;
        let places = places(seq);
        let values = scores.to_vec()?;
        let now: Vec<f32> = places.iter().map(|p| values[*p]).collect();
        let loss = value_loss(&now, &old_values, &returns, config.value_clip, scale);
        let gradient = spread(&loss.gradient, &places, values.len(), 1.0);
        Tensor::external(loss.value, &[(&scores, gradient)])
    })?;
    models.actor.world().all_reduce(&mut watched, ReduceOp::Sum)?;
    let copies = models.actor.plan.copies() as f64;
    Ok(Update {
        policy: f64::from(policy.loss),
        value: f64::from(value.loss),
        clipped: watched[0] / count / copies,
        divergence: watched[1] / count / copies,
    })
}
