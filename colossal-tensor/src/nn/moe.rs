//! A feed-forward layer of many experts, of which each token uses a few.

use std::sync::{Arc, Mutex};

use colossal_comm::ReduceOp;

use crate::error::{Error, Result, comm};
use crate::moe::{Journey, Routing};
use crate::nn::Linear;
use crate::params::{Init, Param, Params};
use crate::placement::{Dim, Placement, Region};
use crate::tensor::Tensor;

/// SwiGLU experts behind a router, with shared ones beside them if wanted.
///
/// Experts lie along `ep`, their width along `tp`, as the plan says; the router is whole. The
/// parameters are `gate.weight [experts, embed]`, `experts.{w1, w2, w3} [experts, out, in]` and
/// `shared_experts.{gate_proj, up_proj, down_proj}.weight`.
#[derive(Debug)]
pub struct Moe {
    routing: Routing,
    gate: Linear,
    /// Added to scores in the choice; moved by [`Moe::balance`].
    bias: Option<Arc<Param>>,
    w1: Arc<Param>,
    w2: Arc<Param>,
    w3: Arc<Param>,
    shared: Option<[Linear; 3]>,
    /// Choices of each expert since the last [`Moe::balance`], of this rank's tokens.
    load: Mutex<Vec<usize>>,
}

impl Moe {
    /// Experts of this width; `shared` is the width of the shared experts together. With `bias`
    /// the choice has a correction bias.
    pub fn new(
        p: &Params,
        embed: Dim,
        width: usize,
        routing: Routing,
        shared: Option<usize>,
        bias: bool,
    ) -> Result<Moe> {
        routing.validate()?;
        let (experts, mlp) = (Dim::Experts(routing.experts), Dim::Mlp(width));
        let e = p.at("experts");
        let init = Init::Normal(0.02);
        let shared = shared
            .map(|width| -> Result<[Linear; 3]> {
                let (p, mlp) = (p.at("shared_experts"), Dim::Mlp(width));
                Ok([
                    Linear::new(&p.at("gate_proj"), embed, mlp, false)?,
                    Linear::new(&p.at("up_proj"), embed, mlp, false)?,
                    Linear::new(&p.at("down_proj"), mlp, embed, false)?,
                ])
            })
            .transpose()?;
        let gate = Linear::new(&p.at("gate"), embed, Dim::Other(routing.experts), false)?;
        let bias = bias
            .then(|| {
                let dims = [Dim::Other(routing.experts)];
                p.at("gate").tensor("e_score_correction_bias", &dims, Init::Constant(0.0))
            })
            .transpose()?;
        bias.iter().for_each(|b| b.set_trainable(false));
        Ok(Moe {
            gate,
            bias,
            w1: e.tensor("w1", &[experts, mlp, embed], init)?,
            w2: e.tensor("w2", &[experts, embed, mlp], init)?,
            w3: e.tensor("w3", &[experts, mlp, embed], init)?,
            shared,
            load: Mutex::new(vec![0; routing.experts]),
            routing,
        })
    }

    /// `x [batch, seq, embed]`, in the residual stream before and after.
    ///
    /// `share` weighs the auxiliary losses: 1 over the microbatches of a training step, 0 when
    /// nothing is learnt.
    pub fn forward(&self, x: &Tensor, share: f32) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|b| b.to_vec()).transpose()?;
        let logits = self.gate.forward(x)?;
        let (weights, choice) = logits.route(&self.routing, bias.as_deref(), share)?;
        let [h, weights, choice] =
            [x, &weights, &choice].map(|t| t.redistribute(Region::TensorParallel));
        let (h, weights, w1) = (h?, weights?, self.w1.tensor());
        let journey = Journey::new(&choice?, &self.routing, &w1)?;
        if let Ok(mut load) = self.load.lock() {
            load.iter_mut().zip(journey.load()).for_each(|(sum, n)| *sum += n);
        }
        let rows = h.dispatch(&journey)?;
        let gate = rows.grouped_linear(&w1, &journey)?;
        let up = rows.grouped_linear(&self.w3.tensor(), &journey)?;
        drop(rows);
        let rows = gate.swiglu(&up)?.grouped_linear(&self.w2.tensor(), &journey)?;
        let mut y = rows.combine_rows(&weights, &journey)?;
        if let Some([gate, up, down]) = &self.shared {
            let h = gate.forward(&h)?.swiglu(&up.forward(&h)?)?;
            y = y.add(&down.forward(&h)?)?;
        }
        y.redistribute(Region::Residual)
    }

    /// Balancing without a loss (DeepSeek-V3): the bias of experts that got more than their share
    /// of tokens since the last call falls by `rate`, that of the others rises. Every rank calls it.
    ///
    /// # Errors
    /// [`Error::Other`] for a layer without a correction bias.
    pub fn balance(&self, rate: f32) -> Result<()> {
        let Some(bias) = &self.bias else {
            return Err(Error::Other(
                "balance: the layer was made without a correction bias".into(),
            ));
        };
        let mut load: Vec<f32> = match self.load.lock() {
            Ok(mut load) => load.iter_mut().map(|n| std::mem::take(n) as f32).collect(),
            Err(_) => return Err(Error::Other("balance: an earlier forward pass panicked".into())),
        };
        let scope = bias.scope();
        let tokens = scope.sharding().region(Region::TensorParallel);
        for axis in scope.wide_axes() {
            if matches!(tokens[axis], Placement::Shard(_)) {
                let group = scope.mesh().group(&scope.axis(axis).0).map_err(comm)?;
                group.all_reduce(&mut load, ReduceOp::Sum).map_err(comm)?;
            }
        }
        let mean = load.iter().sum::<f32>() / load.len() as f32;
        let mut values = bias.to_vec()?;
        values.iter_mut().zip(&load).for_each(|(b, n)| *b += rate * sign(mean - n));
        bias.set(&values)
    }
}

fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}
