//! A feed-forward layer of many experts, of which each token uses a few.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::autograd::is_grad_enabled;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::moe::{Balance, Journey, Routing, Watch};
use crate::nn::Linear;
use crate::params::{Init, Param, Params};
use crate::placement::Placement::{Partial, Replicate, Shard};
use crate::placement::{Dim, Region};
use crate::tensor::Tensor;

/// SwiGLU experts behind a router, with shared ones beside them if wanted.
///
/// Experts lie along `ep`, their width along `tp`, as the plan says; on a grid or cube its rows
/// share the experts out and its columns cut their inputs. The router is whole. The parameters are `gate.weight [experts, embed]`, `experts.{w1, w2, w3} [experts, out, in]` and
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
    /// Choices of each expert in training since the last [`Moe::balance`], by all ranks' tokens.
    load: Mutex<Vec<f32>>,
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
                // Its steps are smaller than what bf16 tells apart.
                let p = p.at("gate").held_in(Dtype::F32);
                p.tensor("e_score_correction_bias", &dims, Init::Constant(0.0))
            })
            .transpose()?;
        bias.iter().for_each(|b| b.set_trainable(false));
        let factor = |name, output, input| -> Result<Arc<Param>> {
            let w = e.tensor(name, &[experts, output, input], init)?;
            w.used_as_factor(true);
            Ok(w)
        };
        Ok(Moe {
            gate,
            bias,
            w1: factor("w1", mlp, embed)?,
            w2: factor("w2", embed, mlp)?,
            w3: factor("w3", mlp, embed)?,
            shared,
            load: Mutex::new(vec![0.0; routing.experts]),
            routing,
        })
    }

    /// `x [batch, seq, embed]`, in the residual stream before and after.
    ///
    /// In training `balance` is the step's, and `real` (`[batch, seq]` of `i32`, laid out as a
    /// batch) is 0 for tokens that are padding.
    pub fn forward(
        &self,
        x: &Tensor,
        balance: Option<&Arc<Balance>>,
        real: Option<&Tensor>,
    ) -> Result<Tensor> {
        let layer = self.w1.name();
        let watch = balance.map(|balance| Watch { balance, layer, real });
        let fake = x.scope().is_fake();
        let bias = self.bias.as_ref().filter(|_| !fake).map(|b| b.to_vec()).transpose()?;
        let logits = self.gate.forward(x)?.redistribute(Region::Router)?;
        let (weights, choice) = logits.route(&self.routing, bias.as_deref(), watch)?;
        // A layer that is run again in backward was run without a graph before.
        if let Some(balance) = balance.filter(|_| is_grad_enabled()) {
            let counts = balance.counts(layer);
            self.load.lock().iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        }
        let h = x.redistribute(Region::Experts)?;
        // Where the width is cut, every rank combines its part of it.
        let mut layout = h.layout();
        let cut: Vec<usize> = h.scope().wide_axes().filter(|a| layout[*a] == Shard(2)).collect();
        cut.iter().for_each(|axis| layout[*axis] = Replicate);
        let (weights, choice) = (weights.to_layout(layout)?, choice.to_layout(layout)?);
        let parts = |rows: Tensor| -> Result<Tensor> {
            let mut layout = rows.layout();
            cut.iter()
                .filter(|a| rows.layout()[**a] == Partial)
                .for_each(|a| layout[*a] = Shard(1));
            rows.to_layout(layout)
        };
        let w1 = self.w1.tensor();
        let journey = Journey::new(&choice, &self.routing, &w1)?;
        let rows = h.dispatch(&journey)?;
        let gate = parts(rows.grouped_linear(&w1, &journey)?)?;
        let up = parts(rows.grouped_linear(&self.w3.tensor(), &journey)?)?;
        drop(rows);
        let rows = parts(gate.swiglu(&up)?.grouped_linear(&self.w2.tensor(), &journey)?)?;
        let mut y = rows.combine_rows(&weights, &journey)?;
        if let Some([gate, up, down]) = &self.shared {
            let h = x.redistribute(Region::TensorParallel)?;
            let h = gate.forward(&h)?.swiglu(&up.forward(&h)?)?;
            let shared = down.forward(&h)?;
            y = y.to_layout(shared.layout())?.add(&shared)?;
        }
        y.redistribute(Region::Residual)
    }

    /// Balancing without a loss (DeepSeek-V3): the bias of experts that got more than their share
    /// of training tokens since the last call falls by `rate`, that of the others rises.
    ///
    /// # Errors
    /// [`Error::Other`] for a layer without a correction bias.
    pub fn balance(&self, rate: f32) -> Result<()> {
        let Some(bias) = &self.bias else {
            return Err(Error::Other(
                "balance: the layer was made without a correction bias".into(),
            ));
        };
        let load = std::mem::replace(&mut *self.load.lock(), vec![0.0; self.routing.experts]);
        let mean = load.iter().sum::<f32>() / load.len() as f32;
        let mut values = bias.to_vec()?;
        values.iter_mut().zip(&load).for_each(|(b, n)| *b += rate * sign(mean - n));
        bias.set(&values)
    }
}

fn sign(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { x.signum() }
}
