//! Routers: which experts a token goes to, with which weights, and what keeps them evenly used.
//!
//! The choice is made on the host, where the counts of the exchange are needed: of each token its
//! logits go there, a number an expert; its row stays where it is.

use super::Watch;
use crate::autograd::{pretended, record};
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::produce;
use crate::placement::Placement::Shard;
use crate::propagate::propagate;
use crate::tensor::Tensor;
use crate::view::View;

/// How a router turns logits into scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Score {
    /// Softmax over all experts (Switch, Mixtral).
    #[default]
    Softmax,
    /// A sigmoid for each expert (DeepSeek-V3).
    Sigmoid,
}

/// How tokens choose experts, and what keeps the choice balanced.
#[derive(Debug, Clone, PartialEq)]
pub struct Routing {
    /// Experts.
    pub experts: usize,
    /// Experts of each token.
    pub top_k: usize,
    /// How logits become scores.
    pub score: Score,
    /// The weights of a token's experts sum to one (before `scale`).
    pub normalize: bool,
    /// Factor of the weights.
    pub scale: f32,
    /// Experts lie in so many equal groups, of which a token chooses the `top_groups` whose two
    /// best experts score highest, and then among their experts only (DeepSeek-V3).
    pub groups: usize,
    /// Groups that a token may use.
    pub top_groups: usize,
    /// Room of each expert, as a multiple of its even share of a rank's tokens; what is over is
    /// dropped, later tokens first. `None` drops nothing.
    pub capacity: Option<f32>,
    /// Weight of the load-balancing loss, see [`Balance`](super::Balance).
    pub auxiliary: f32,
    /// Weight of the router z-loss, see [`Balance`](super::Balance).
    pub z: f32,
}

impl Routing {
    /// Top-k of a softmax, weights normalised, dropless, no auxiliary losses: Mixtral's.
    pub fn top_k(experts: usize, top_k: usize) -> Routing {
        Routing {
            experts,
            top_k,
            score: Score::Softmax,
            normalize: true,
            scale: 1.0,
            groups: 1,
            top_groups: 1,
            capacity: None,
            auxiliary: 0.0,
            z: 0.0,
        }
    }

    /// Does it hold together?
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Other(format!("routing: {text}")));
        let Routing { experts, top_k, groups, top_groups, .. } = *self;
        if groups == 0 || !experts.is_multiple_of(groups) || !(1..=groups).contains(&top_groups) {
            return refuse(format!(
                "{experts} experts do not lie in {groups} groups of which {top_groups} are chosen"
            ));
        }
        let available = experts / groups * top_groups;
        if !(1..=available).contains(&top_k) {
            return refuse(format!(
                "top_k {top_k} must be 1 to {available}, the experts to choose from"
            ));
        }
        Ok(())
    }

    /// The experts of a token, best first.
    fn choose(&self, scores: &[f32], bias: Option<&[f32]>, chosen: &mut Vec<usize>) {
        let at = |e: usize| scores[e] + bias.map_or(0.0, |b| b[e]);
        let best = |a: &usize, b: &usize| at(*b).total_cmp(&at(*a)).then(a.cmp(b));
        chosen.clear();
        let size = self.experts / self.groups;
        if self.top_groups < self.groups {
            let value = |g: usize| {
                let mut own: Vec<f32> = (g * size..(g + 1) * size).map(at).collect();
                own.sort_by(|a, b| b.total_cmp(a));
                own.iter().take(2).sum::<f32>()
            };
            let mut order: Vec<(f32, usize)> = (0..self.groups).map(|g| (value(g), g)).collect();
            order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for (_, g) in &order[..self.top_groups] {
                chosen.extend(g * size..(g + 1) * size);
            }
        } else {
            chosen.extend(0..self.experts);
        }
        chosen.sort_by(best);
        chosen.truncate(self.top_k);
    }
}

impl Tensor {
    /// Weights `[.., k]` in f32 and experts `[.., k]` of each token, from logits `[.., experts]`.
    ///
    /// `bias` is added to scores in the choice only, not in the weights (DeepSeek-V3's balancing
    /// without a loss). Watched, the balance is written down, and the gradients of its losses are
    /// added to that of the logits.
    pub fn route(
        &self,
        routing: &Routing,
        bias: Option<&[f32]>,
        watch: Option<Watch<'_>>,
    ) -> Result<(Tensor, Tensor)> {
        routing.validate()?;
        let (experts, k) = (routing.experts, routing.top_k);
        let fits = self.last_dim() == experts && bias.is_none_or(|b| b.len() == experts);
        if !fits {
            let right = [experts, bias.map_or(experts, <[f32]>::len)];
            let reason = "logits are [.., experts], and there is one bias for each";
            return Err(Error::shape("route", self.shape(), &right, reason));
        }
        let last = self.shape().len() - 1;
        let layout = propagate("route", &[self], crate::propagate::rowwise(last))?;
        let mut shape = self.shape().to_vec();
        shape[last] = k;
        if self.scope().is_fake() {
            let scope = self.scope();
            let cut = |a: &usize| watch.is_some() && matches!(layout[*a], Shard(_));
            for axis in scope.wide_axes().filter(cut) {
                scope.sends("route", axis, Watch::bytes(experts, scope.axis(axis).1), 0);
            }
            let weights = Tensor::pretend(scope, &shape, Dtype::F32, layout);
            let choice = Tensor::pretend(scope, &shape, Dtype::I32, layout);
            return Ok((pretended("route", weights, &[self], &[self, &choice]), choice));
        }
        let mut scores = self.to_vec()?;
        let logits = (watch.is_some() && routing.z > 0.0).then(|| scores.clone());
        let tokens = scores.len() / experts;
        for row in scores.chunks_mut(experts) {
            match routing.score {
                Score::Softmax => softmax(row),
                Score::Sigmoid => row.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            }
        }
        let mut choice = Vec::with_capacity(tokens * k);
        let mut weights = Vec::with_capacity(tokens * k);
        let mut chosen = Vec::with_capacity(experts);
        for row in scores.chunks(experts) {
            routing.choose(row, bias, &mut chosen);
            let sum: f32 = chosen.iter().map(|e| row[*e]).sum();
            let factor = if routing.normalize { routing.scale / sum } else { routing.scale };
            weights.extend(chosen.iter().map(|e| row[*e] * factor));
            choice.extend(chosen.iter().map(|e| *e as i32));
        }
        let mut watched = None;
        if let Some(watch) = watch {
            let real = watch.real(layout, tokens)?;
            let each = real.iter().copied().enumerate();
            let lse: Vec<f32> =
                logits.iter().flat_map(|l| l.chunks(experts)).map(logsumexp).collect();
            watch.see(self.scope(), layout, routing, each, (&scores, &choice, &lse))?;
            watched = Some((watch.balance.clone(), real, lse));
        }
        let choice = Tensor::from_slice(self.scope(), &choice, &shape, layout)?;
        let weights = Tensor::from_slice(self.scope(), &weights, &shape, layout)?;
        let (scope, shape, dtype) = (self.scope().clone(), self.shape().to_vec(), self.dtype());
        let (routing, saved) = (routing.clone(), choice.clone());
        let weights = record("route", weights, &[self], move |dw, back| {
            let dw = dw.to_vec()?;
            let choice = saved.read::<i32>()?;
            let mut grad = vec![0.0; scores.len()];
            let watched = watched.map(|(balance, real, lse)| (balance.gradient(), real, lse));
            for t in 0..tokens {
                let row = &scores[t * experts..(t + 1) * experts];
                let grad = &mut grad[t * experts..(t + 1) * experts];
                let chosen = &choice.as_slice::<i32>()[t * k..(t + 1) * k];
                let dw = &dw[t * k..(t + 1) * k];
                // With respect to the scores.
                let sum: f32 = chosen.iter().map(|e| row[*e as usize]).sum();
                let mean: f32 = chosen.iter().zip(dw).map(|(e, d)| row[*e as usize] * d).sum();
                for (e, d) in chosen.iter().zip(dw) {
                    grad[*e as usize] += match routing.normalize {
                        true => routing.scale / sum * (d - mean / sum),
                        false => routing.scale * d,
                    };
                }
                let watched = watched.as_ref().filter(|(_, real, _)| real[t]);
                if let Some(((even, counts, _), ..)) = watched.filter(|(g, ..)| g.0 != 0.0) {
                    // Probabilities are the scores over their sum, which is 1 for a softmax.
                    let all: f32 = row.iter().sum();
                    let mean: f32 = row.iter().zip(counts).map(|(s, c)| s * c).sum::<f32>() / all;
                    for (g, c) in grad.iter_mut().zip(counts) {
                        *g += even * (c - mean) / all;
                    }
                }
                // Through the scores.
                match routing.score {
                    Score::Softmax => {
                        let mean: f32 = row.iter().zip(&*grad).map(|(p, g)| p * g).sum();
                        grad.iter_mut().zip(row).for_each(|(g, p)| *g = p * (*g - mean));
                    }
                    Score::Sigmoid => {
                        grad.iter_mut().zip(row).for_each(|(g, s)| *g *= s * (1.0 - s));
                    }
                }
                if let (Some(((.., z), _, lse)), Some(logits)) = (watched, &logits) {
                    for (g, x) in grad.iter_mut().zip(&logits[t * experts..]) {
                        *g += z * lse[t] * (x - lse[t]).exp();
                    }
                }
            }
            let layout = layout.dual();
            back.give(
                0,
                produce(&scope, &shape, dtype, layout, |dx| {
                    float!("route", dtype, T => {
                        kernels::cast(View::Cpu(&grad[..]), dx.view_mut::<T>())
                    })
                })?,
            )
        });
        Ok((weights, choice))
    }
}

/// In place.
fn softmax(row: &mut [f32]) {
    let lse = logsumexp(row);
    row.iter_mut().for_each(|x| *x = (*x - lse).exp());
}

fn logsumexp(row: &[f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    max + row.iter().map(|x| (x - max).exp()).sum::<f32>().ln()
}
