//! Mixture of experts: tokens go to the experts their router chose, and come back: calls `comm`.
//!
//! ```text
//! route      logits [.., E]            -> weights [.., k], choice [.., k]
//! dispatch   x [.., h]                 -> rows sorted by expert, at the rank that has the expert
//! grouped    rows x W[expert]ᵀ         -> rows            (one product an expert, ragged groups)
//! combine    rows, weights             -> sum over k of weight * row, where the token came from
//! ```
//!
//! Dropless (MegaBlocks; Gale et al., 2022) unless a capacity says otherwise. Along the axis that
//! cuts the experts, dispatch and combine are all-to-alls of rows; each sends, in each direction
//! and pass, the rows whose expert is elsewhere: `tokens * k * h * (p - 1) / p` when balanced.

use std::sync::Arc;

use colossal_comm::{Group, ReduceOp};
use colossal_kernels::{self as kernels, Epilogue, Float, Mat, MatMut};

use crate::autograd::{Weight, pretended, record};
use crate::dtype::{Dtype, Element, float};
use crate::error::{Error, Result, comm};
use crate::ops::{produce, same_dtype};
use crate::placement::Placement::{self, Invariant, Partial, Replicate, Shard};
use crate::propagate::propagate;
use crate::storage::Buffer;
use crate::tensor::{Scope, Tensor};

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
    /// Weight of the load-balancing loss `E Σ f_e P_e`: the share of tokens that chose an expert
    /// times its mean probability (Switch; Fedus et al., 2021).
    pub auxiliary: f32,
    /// Weight of the router z-loss, the mean of `logsumexp²` (ST-MoE; Zoph et al., 2022).
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
    /// without a loss). The gradients of the auxiliary losses are added to that of the logits,
    /// multiplied by `share`; their values are over the tokens of all ranks.
    pub fn route(
        &self,
        routing: &Routing,
        bias: Option<&[f32]>,
        share: f32,
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
            for axis in scope.wide_axes().filter(|a| share != 0.0 && matches!(layout[*a], Shard(_)))
            {
                let n = scope.axis(axis).1;
                scope.sends("route", axis, 2 * (4 * (experts + 1) * (n - 1) / n), 0);
            }
            let weights = Tensor::pretend(scope, &shape, Dtype::F32, layout);
            let choice = Tensor::pretend(scope, &shape, Dtype::I32, layout);
            return Ok((pretended("route", weights, &[self], &[self, &choice]), choice));
        }
        let mut scores = self.to_vec()?;
        let logits = (routing.z > 0.0).then(|| scores.clone());
        let tokens = scores.len() / experts;
        for row in scores.chunks_mut(experts) {
            match routing.score {
                Score::Softmax => {
                    softmax(row);
                }
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
        let choice = Tensor::from_slice(self.scope(), &choice, &shape, layout)?;
        let weights = Tensor::from_slice(self.scope(), &weights, &shape, layout)?;
        // The tokens of all ranks, and how many of them chose each expert.
        let losses = share != 0.0 && (routing.auxiliary != 0.0 || routing.z != 0.0);
        let mut counts = vec![0.0f32; experts + 1];
        if losses {
            counts[experts] = tokens as f32;
            for e in choice.read::<i32>()?.as_slice::<i32>() {
                counts[*e as usize] += 1.0;
            }
            for axis in self.scope().wide_axes() {
                if matches!(layout[axis], Shard(_)) {
                    let group = self.scope().mesh().group(&self.scope().axis(axis).0);
                    group.and_then(|g| g.all_reduce(&mut counts, ReduceOp::Sum)).map_err(comm)?;
                }
            }
        }
        let (scope, shape, dtype) = (self.scope().clone(), self.shape().to_vec(), self.dtype());
        let (routing, saved) = (routing.clone(), choice.clone());
        let weights = record("route", weights, &[self], move |dw, back| {
            let dw = dw.to_vec()?;
            let choice = saved.read::<i32>()?;
            let mut grad = vec![0.0; scores.len()];
            let total = counts[experts];
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
                if losses && routing.auxiliary != 0.0 {
                    // Probabilities are the scores over their sum, which is 1 for a softmax.
                    let all: f32 = row.iter().sum();
                    let factor = share * routing.auxiliary * experts as f32 / (total * total);
                    let mean: f32 = row.iter().zip(&counts).map(|(s, c)| s * c).sum::<f32>() / all;
                    for (g, c) in grad.iter_mut().zip(&counts) {
                        *g += factor * (c - mean) / all;
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
                if let Some(logits) = logits.as_ref().filter(|_| losses) {
                    let mut p = logits[t * experts..(t + 1) * experts].to_vec();
                    let factor = 2.0 * share * routing.z * softmax(&mut p) / total;
                    grad.iter_mut().zip(&p).for_each(|(g, p)| *g += factor * p);
                }
            }
            let layout = layout.dual();
            back.give(
                0,
                produce(&scope, &shape, dtype, layout, |dx| {
                    float!("route", dtype, T => {
                        kernels::cast(&grad, dx.as_mut_slice::<T>());
                        Ok(())
                    })
                })?,
            )
        });
        Ok((weights, choice))
    }

    /// Rows `[rows, h]` of the tokens `[.., h]`, sorted by expert, at the ranks of `journey`.
    pub fn dispatch(&self, journey: &Arc<Journey>) -> Result<Tensor> {
        let last = self.shape().len() - 1;
        let layout = propagate("dispatch", &[self], |p| match p[0] {
            Shard(d) if d < last => Some(Shard(0)),
            Replicate | Invariant => Some(p[0]),
            _ => None,
        })?;
        let width = self.last_dim();
        let shape = [journey.rows, width];
        if self.rows() * journey.k != journey.choices {
            let right = [journey.choices / journey.k.max(1), width];
            return Err(Error::shape("dispatch", self.shape(), &right, "tokens that were routed"));
        }
        journey.pretend_to_send("dispatch", self.scope(), width * self.dtype().bytes());
        let y = produce(self.scope(), &shape, self.dtype(), layout, |y| {
            float!("dispatch", self.dtype(), T => {
                let x = self.read::<T>()?;
                let x = x.as_slice::<T>();
                let leaving: Vec<T> = journey
                    .order
                    .iter()
                    .flat_map(|i| &x[*i as usize / journey.k * width..][..width])
                    .copied()
                    .collect();
                journey.there(&leaving, width, y.as_mut_slice())
            })
        })?;
        let (shape, layout, journey) =
            (self.shape().to_vec(), self.layout().dual(), journey.clone());
        Ok(record("dispatch", y, &[self], move |dy, back| {
            let dx = produce(dy.scope(), &shape, dy.dtype(), layout, |dx| {
                float!("dispatch", dy.dtype(), T => {
                    let rows = journey.back(dy.read::<T>()?.as_slice::<T>(), width)?;
                    let mut sum = vec![0.0f32; dx.bytes() / size_of::<T>()];
                    for (i, row) in journey.order.iter().zip(rows.chunks(width)) {
                        let to = &mut sum[*i as usize / journey.k * width..][..width];
                        kernels::add_into(row, to);
                    }
                    kernels::cast(&sum, dx.as_mut_slice::<T>());
                    Ok(())
                })
            })?;
            back.give(0, dx)
        }))
    }

    /// `rows W[expert]ᵀ`: rows `[rows, in]` sorted by expert, `weight [experts, out, in]`.
    pub fn grouped_linear(&self, weight: &Tensor, journey: &Arc<Journey>) -> Result<Tensor> {
        let op = "grouped_linear";
        let (&[rows, k], &[experts, n, wk]) = (self.shape(), weight.shape()) else {
            let reason = "rows are [rows, in], weights [experts, out, in]";
            return Err(Error::shape(op, self.shape(), weight.shape(), reason));
        };
        if k != wk || experts + 1 != journey.starts.len() || rows != journey.rows {
            let reason = "one weight an expert of this rank, of the rows' width";
            return Err(Error::shape(op, self.shape(), weight.shape(), reason));
        }
        same_dtype(op, self, weight)?;
        let layout = propagate(op, &[self, weight], |p| match (p[0], p[1]) {
            (Shard(0), Shard(0) | Replicate) => Some(Shard(0)),
            (Replicate, Shard(1)) => Some(Shard(1)),
            (Shard(1), Shard(2)) => Some(Partial),
            (Replicate, Replicate) => Some(Replicate),
            (Invariant, Invariant) => Some(Invariant),
            _ => None,
        })?;
        let y = produce(self.scope(), &[rows, n], self.dtype(), layout, |y| {
            float!(op, self.dtype(), T => {
                let (x, w) = (self.read::<T>()?, weight.read::<T>()?);
                let (x, w, y) = (x.as_slice::<T>(), w.as_slice::<T>(), y.as_mut_slice::<T>());
                journey.each(|e, at, m| {
                    let w = Mat::new(&w[e * n * k..][..n * k], n, k).t();
                    let y = MatMut::new(&mut y[at * n..][..m * n], m, n);
                    kernels::gemm(Mat::new(&x[at * k..][..m * k], m, k), w, y, &Epilogue::default());
                });
                Ok(())
            })
        })?;
        let (x, w, like, journey) =
            (self.detach(), weight.detach(), Weight::like(weight), journey.clone());
        Ok(record(op, y, &[self, weight], move |dy, back| {
            if back.wants(0) {
                let dx = produce(x.scope(), x.shape(), x.dtype(), x.layout().dual(), |dx| {
                    float!(op, dy.dtype(), T => {
                        let (dy, w) = (dy.read::<T>()?, w.read::<T>()?);
                        let (dy, w) = (dy.as_slice::<T>(), w.as_slice::<T>());
                        let dx = dx.as_mut_slice::<T>();
                        journey.each(|e, at, m| {
                            let dy = Mat::new(&dy[at * n..][..m * n], m, n);
                            let w = Mat::new(&w[e * n * k..][..n * k], n, k);
                            let dx = MatMut::new(&mut dx[at * k..][..m * k], m, k);
                            kernels::gemm(dy, w, dx, &Epilogue::default());
                        });
                        Ok(())
                    })
                })?;
                back.give(0, dx)?;
            }
            back.weight(1, &like, move |dw| {
                float!(op, dy.dtype(), T => {
                    let (dy, x) = (dy.read::<T>()?, x.read::<T>()?);
                    let (dy, x) = (dy.as_slice::<T>(), x.as_slice::<T>());
                    journey.each(|e, at, m| {
                        let dy = Mat::new(&dy[at * n..][..m * n], m, n).t();
                        let x = Mat::new(&x[at * k..][..m * k], m, k);
                        let dw = MatMut::new(&mut dw[e * n * k..][..n * k], n, k);
                        kernels::gemm(dy, x, dw, &Epilogue { accumulate: true, ..Epilogue::default() });
                    });
                    Ok(())
                })
            })
        }))
    }

    /// Rows `[rows, h]` back at their tokens: `sum over k of weight * row`. `weights [.., k]`.
    pub fn combine_rows(&self, weights: &Tensor, journey: &Arc<Journey>) -> Result<Tensor> {
        let (width, last) = (self.last_dim(), weights.shape().len() - 1);
        let layout = propagate("combine", &[self, weights], |p| match (p[0], p[1]) {
            (Shard(0), Shard(d)) if d < last => Some(Shard(d)),
            (Partial, Replicate) => Some(Partial),
            (Replicate, Replicate) => Some(Replicate),
            (Invariant, Invariant) => Some(Invariant),
            _ => None,
        })?;
        let mut shape = weights.shape().to_vec();
        shape[last] = width;
        let tokens = weights.rows();
        let k = journey.k;
        let (scope, dtype) = (self.scope().clone(), self.dtype());
        if scope.is_fake() {
            journey.pretend_to_send("combine", &scope, width * dtype.bytes());
            let y = Tensor::pretend(&scope, &shape, dtype, layout);
            // The rows that came back are kept, as many as there are here.
            let rows = Tensor::pretend(&scope, self.shape(), dtype, self.layout());
            return Ok(pretended("combine", y, &[self, weights], &[&rows, weights]));
        }
        let w = weights.to_vec()?;
        let (y, rows) = float!("combine", dtype, T => {
            let rows = journey.back(self.read::<T>()?.as_slice::<T>(), width)?;
            let mut sum = vec![0.0f32; tokens * width];
            for (i, row) in journey.order.iter().zip(rows.chunks(width)) {
                let (i, to) = (*i as usize, *i as usize / k * width);
                for (s, x) in sum[to..to + width].iter_mut().zip(row) {
                    *s += w[i] * <T as Float>::to_f32(*x);
                }
            }
            let y = produce(&scope, &shape, dtype, layout, |y| {
                kernels::cast(&sum, y.as_mut_slice::<T>());
                Ok(())
            })?;
            Ok((y, Buffer::from_slice(&rows)))
        })?;
        let (row_layout, row_shape) = (self.layout().dual(), self.shape().to_vec());
        let (weight_layout, weight_shape) = (weights.layout().dual(), weights.shape().to_vec());
        let journey = journey.clone();
        Ok(record("combine", y, &[self, weights], move |dy, back| {
            let mut dw = vec![0.0f32; w.len()];
            let dx = produce(&scope, &row_shape, dtype, row_layout, |dx| {
                float!("combine", dtype, T => {
                    let dy = dy.read::<T>()?;
                    let dy = dy.as_slice::<T>();
                    let mut leaving = Vec::with_capacity(journey.order.len() * width);
                    let came = rows.as_slice::<T>().chunks(width);
                    for (i, row) in journey.order.iter().zip(came) {
                        let (i, at) = (*i as usize, *i as usize / k * width);
                        let dy = dy[at..at + width].iter().map(|x| <T as Float>::to_f32(*x));
                        let products = dy.clone().zip(row).map(|(d, x)| d * <T as Float>::to_f32(*x));
                        dw[i] = products.sum();
                        leaving.extend(dy.map(|d| <T as Float>::from_f32(d * w[i])));
                    }
                    journey.there(&leaving, width, dx.as_mut_slice())
                })
            })?;
            back.give(1, Tensor::from_slice(&scope, &dw, &weight_shape, weight_layout)?)?;
            back.give(0, dx)
        }))
    }
}

/// In place; returns the log-sum-exp.
fn softmax(row: &mut [f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let sum: f32 = row.iter().map(|x| (x - max).exp()).sum();
    let lse = max + sum.ln();
    row.iter_mut().for_each(|x| *x = (*x - lse).exp());
    lse
}

/// Where the rows of a batch of tokens go, and how they come back.
#[derive(Debug)]
pub struct Journey {
    k: usize,
    choices: usize,
    /// Places in the choice that leave, sorted by expert: token `i / k`.
    order: Vec<u32>,
    /// Rows to each rank, and from each.
    sent: Vec<usize>,
    got: Vec<usize>,
    /// For each row here, sorted by expert: its place among the rows as they arrived.
    arrived: Vec<u32>,
    /// First row of each expert of this rank, and the end.
    starts: Vec<usize>,
    rows: usize,
    /// The ranks among which the experts are cut, and their axis.
    group: Option<Group>,
    axis: Option<usize>,
    /// Choices of each expert (all of them), before capacity, of this rank's tokens.
    load: Vec<usize>,
}

impl Journey {
    /// The journey of tokens with this choice `[.., k]` to experts whose weights are laid out as
    /// `weight [experts, ..]` is. Ranks that share experts tell each other how many rows come.
    pub fn new(choice: &Tensor, routing: &Routing, weight: &Tensor) -> Result<Arc<Journey>> {
        let (experts, k) = (routing.experts, routing.top_k);
        let scope = choice.scope();
        let axis = Journey::axis(scope, choice, weight)?;
        let own = weight.shape()[0];
        if scope.is_fake() {
            let rows = choice.len();
            let starts = (0..=own).map(|e| rows * e / own.max(1)).collect();
            return Ok(Arc::new(Journey {
                k,
                choices: choice.len(),
                order: vec![],
                sent: vec![],
                got: vec![],
                arrived: vec![],
                starts,
                rows,
                group: None,
                axis,
                load: vec![],
            }));
        }
        let group = axis
            .map(|axis| scope.mesh().group(&scope.axis(axis).0).cloned())
            .transpose()
            .map_err(comm)?;
        let choice = choice.to_vec_of::<i32>()?;
        let mut by_expert: Vec<Vec<u32>> = vec![vec![]; experts];
        for (i, e) in choice.iter().enumerate() {
            by_expert[*e as usize].push(i as u32);
        }
        let load = by_expert.iter().map(Vec::len).collect();
        if let Some(factor) = routing.capacity {
            let room = (factor * choice.len() as f32 / experts as f32).ceil() as usize;
            by_expert.iter_mut().for_each(|rows| rows.truncate(room));
        }
        let counts: Vec<u64> = by_expert.iter().map(|rows| rows.len() as u64).collect();
        let ranks = group.as_ref().map_or(1, Group::world_size);
        let mut coming = vec![0u64; counts.len()];
        match &group {
            Some(group) => group.all_to_all(&counts, &mut coming).map_err(comm)?,
            None => coming.copy_from_slice(&counts),
        }
        // Rows arrive by rank and, within, by expert; they are wanted by expert.
        let at = |rank: usize, e: usize| coming[..rank * own + e].iter().sum::<u64>() as u32;
        let (mut arrived, mut starts) = (vec![], vec![0]);
        for e in 0..own {
            for rank in 0..ranks {
                let first = at(rank, e);
                arrived.extend(first..first + coming[rank * own + e] as u32);
            }
            starts.push(arrived.len());
        }
        let by_rank = |counts: &[u64]| -> Vec<usize> {
            counts.chunks(own).map(|c| c.iter().sum::<u64>() as usize).collect()
        };
        Ok(Arc::new(Journey {
            k,
            choices: choice.len(),
            order: by_expert.concat(),
            sent: by_rank(&counts),
            got: by_rank(&coming),
            rows: arrived.len(),
            arrived,
            starts,
            group,
            axis,
            load,
        }))
    }

    /// The axis that cuts the experts; tokens must be cut along it too.
    fn axis(scope: &Scope, choice: &Tensor, weight: &Tensor) -> Result<Option<usize>> {
        let cut: Vec<usize> =
            scope.wide_axes().filter(|a| weight.layout()[*a] == Shard(0)).collect();
        match cut[..] {
            [] => Ok(None),
            [axis] if matches!(choice.layout()[axis], Placement::Shard(_)) => Ok(Some(axis)),
            [axis] => Err(Error::Layout {
                op: "dispatch",
                axis: scope.axis(axis).0,
                operands: vec![choice.layout()[axis], Shard(0)],
            }),
            _ => Err(Error::Other("dispatch: experts may be cut along one axis only".into())),
        }
    }

    /// Enters a way there and the gradient's way back in the account of a pretended mesh, with
    /// experts evenly used: rows of so many bytes.
    fn pretend_to_send(&self, op: &'static str, scope: &Scope, row: usize) {
        if let Some(axis) = self.axis {
            let ranks = scope.axis(axis).1;
            let sent = self.rows * row * (ranks - 1) / ranks;
            scope.sends(op, axis, sent, sent);
        }
    }

    /// Choices of each expert by this rank's tokens, dropped ones included.
    pub fn load(&self) -> &[usize] {
        &self.load
    }

    /// Rows that no expert had room for.
    pub fn dropped(&self) -> usize {
        self.choices - self.order.len()
    }

    /// Calls `f(expert, first row, rows)` for each expert of this rank that has rows.
    fn each(&self, mut f: impl FnMut(usize, usize, usize)) {
        for (e, ends) in self.starts.windows(2).enumerate() {
            if ends[1] > ends[0] {
                f(e, ends[0], ends[1] - ends[0]);
            }
        }
    }

    /// Rows in `order` to rows sorted by expert, at the experts.
    fn there<T: Element>(&self, leaving: &[T], width: usize, to: &mut [T]) -> Result<()> {
        let arrived;
        let rows = match &self.group {
            None => leaving,
            Some(group) => {
                let counts: Vec<usize> = self.sent.iter().map(|n| n * width).collect();
                arrived = group.all_to_all_v(leaving, &counts).map_err(comm)?.0;
                &arrived
            }
        };
        for (to, from) in to.chunks_mut(width).zip(&self.arrived) {
            to.copy_from_slice(&rows[*from as usize * width..][..width]);
        }
        Ok(())
    }

    /// Rows sorted by expert to rows in `order`, at the tokens.
    fn back<T: Element>(&self, rows: &[T], width: usize) -> Result<Vec<T>> {
        let mut leaving = vec![T::zeroed(); rows.len()];
        for (from, to) in rows.chunks(width).zip(&self.arrived) {
            leaving[*to as usize * width..][..width].copy_from_slice(from);
        }
        match &self.group {
            None => Ok(leaving),
            Some(group) => {
                let counts: Vec<usize> = self.got.iter().map(|n| n * width).collect();
                Ok(group.all_to_all_v(&leaving, &counts).map_err(comm)?.0)
            }
        }
    }
}
