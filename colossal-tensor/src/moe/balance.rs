//! How evenly the tokens of a training step use the experts, and the losses that keep it so: calls
//! `comm`.
//!
//! Over the tokens of all layers and ranks together, padding left out, as transformers'
//! `load_balancing_loss_func` and `router_z_loss_func` count: `E Σ_e f_e P_e` with f the choices of
//! an expert and P its mean probability (Switch; Fedus et al., 2021), and the mean of
//! `logsumexp²` (ST-MoE; Zoph et al., 2022). With one layer it is the loss of that paper.

use std::collections::BTreeMap;
use std::sync::Arc;

use colossal_comm::ReduceOp;
use parking_lot::Mutex;

use super::Routing;
use crate::error::{Result, comm};
use crate::placement::{Layout, Placement};
use crate::tensor::{Scope, Tensor};

/// What the routers of one forward pass have seen.
#[derive(Debug)]
pub struct Balance {
    share: f32,
    layers: Mutex<BTreeMap<String, Seen>>,
    /// Weights of the losses, and experts.
    routing: Mutex<(f32, f32, usize)>,
}

/// Sums over the tokens of one layer, of all ranks.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// Choices of each expert.
    counts: Vec<f32>,
    /// Probabilities of each expert.
    probabilities: Vec<f32>,
    /// `logsumexp²`.
    z: f32,
    tokens: f32,
}

/// A layer's router, its name, and which tokens are real (`[batch, seq]` of `i32`, 1 or 0).
#[derive(Debug, Clone, Copy)]
pub struct Watch<'a> {
    /// Where it is written down.
    pub balance: &'a Arc<Balance>,
    /// The layer, by a name of its own.
    pub layer: &'a str,
    /// Real tokens; all are if `None`.
    pub real: Option<&'a Tensor>,
}

impl Balance {
    /// Nothing seen yet. `share` weighs the losses: 1 over the microbatches of a training step.
    pub fn new(share: f32) -> Arc<Balance> {
        Arc::new(Balance { share, layers: Mutex::default(), routing: Mutex::default() })
    }

    /// The weighted losses of the layers seen so far: the same on every rank.
    pub fn loss(&self) -> f32 {
        let (auxiliary, z, experts) = *self.routing.lock();
        let all = self.total();
        if all.tokens == 0.0 {
            return 0.0;
        }
        let even = all.counts.iter().zip(&all.probabilities).map(|(f, p)| f * p).sum::<f32>();
        let even = experts as f32 * even / (all.tokens * all.tokens);
        self.share * (auxiliary * even + z * all.z / all.tokens)
    }

    /// Choices of each expert in one layer, by the tokens of all ranks.
    pub fn counts(&self, layer: &str) -> Vec<f32> {
        self.layers.lock().get(layer).map_or_else(Vec::new, |seen| seen.counts.clone())
    }

    /// What a token's router gradient needs: the factor of `counts` in that of its probabilities,
    /// the counts, and the factor of `logsumexp` times probability.
    pub(super) fn gradient(&self) -> (f32, Vec<f32>, f32) {
        let (auxiliary, z, experts) = *self.routing.lock();
        let all = self.total();
        let even = self.share * auxiliary * experts as f32 / (all.tokens * all.tokens);
        (even, all.counts, 2.0 * self.share * z / all.tokens)
    }

    fn total(&self) -> Seen {
        let mut all = Seen::default();
        for seen in self.layers.lock().values() {
            all.counts.resize(seen.counts.len(), 0.0);
            all.probabilities.resize(seen.counts.len(), 0.0);
            all.counts.iter_mut().zip(&seen.counts).for_each(|(a, b)| *a += b);
            all.probabilities.iter_mut().zip(&seen.probabilities).for_each(|(a, b)| *a += b);
            all.z += seen.z;
            all.tokens += seen.tokens;
        }
        all
    }
}

impl Watch<'_> {
    /// Bytes that a rank sends along an axis of so many.
    pub(super) fn bytes(experts: usize, ranks: usize) -> usize {
        2 * (4 * (2 * experts + 2) * (ranks - 1) / ranks)
    }

    /// Which of the tokens under this layout are real.
    pub(super) fn real(&self, layout: Layout, tokens: usize) -> Result<Vec<bool>> {
        match self.real {
            None => Ok(vec![true; tokens]),
            Some(real) => {
                let real = crate::no_grad(|| real.to_layout(layout))?;
                Ok(real.to_vec_of::<i32>()?.iter().map(|r| *r != 0).collect())
            }
        }
    }

    /// Writes down the tokens of this rank and of those that have others. A layer that is run
    /// again in backward writes the same again.
    pub(super) fn see(
        &self,
        scope: &Scope,
        layout: Layout,
        routing: &Routing,
        tokens: impl Iterator<Item = (usize, bool)>,
        (scores, choice, logsumexp): (&[f32], &[i32], &[f32]),
    ) -> Result<()> {
        let (n, k) = (routing.experts, routing.top_k);
        let mut sums = vec![0.0f32; 2 * n + 2];
        for (t, _) in tokens.filter(|(_, real)| *real) {
            choice[t * k..(t + 1) * k].iter().for_each(|e| sums[*e as usize] += 1.0);
            let row = &scores[t * n..(t + 1) * n];
            let all: f32 = row.iter().sum();
            sums[n..2 * n].iter_mut().zip(row).for_each(|(sum, s)| *sum += s / all);
            sums[2 * n] += logsumexp.get(t).map_or(0.0, |l| l * l);
            sums[2 * n + 1] += 1.0;
        }
        for axis in scope.wide_axes() {
            if matches!(layout[axis], Placement::Shard(_)) {
                let group = scope.mesh().group(&scope.axis(axis).0);
                group.and_then(|g| g.all_reduce(&mut sums, ReduceOp::Sum)).map_err(comm)?;
            }
        }
        let seen = Seen {
            counts: sums[..n].to_vec(),
            probabilities: sums[n..2 * n].to_vec(),
            z: sums[2 * n],
            tokens: sums[2 * n + 1],
        };
        *self.balance.routing.lock() = (routing.auxiliary, routing.z, n);
        self.balance.layers.lock().insert(self.layer.to_string(), seen);
        Ok(())
    }
}
