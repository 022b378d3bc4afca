//! Mixtral (Jiang et al., 2024): LLaMA with a mixture of experts for its feed-forward layer.
//!
//! What is peculiar about it:
//! - attention, norms, positions, head: LLaMA's
//! - each token goes to the two experts (of eight) with the largest logits; their weights are a
//!   softmax over those; nothing is dropped
//! - an auxiliary loss keeps the experts evenly used (`router_aux_loss_coef`)
//!
//! Published files hold a tensor per expert; here the experts of a layer are one parameter, so
//! that a plan can cut it along `ep`. `hf` knows the way between the two.

use std::sync::Arc;

use colossal_tensor::moe::Routing;
use colossal_tensor::nn::{Moe, RmsNorm};
use colossal_tensor::placement::Dim::Embed;
use colossal_tensor::{Flow, Layer, Model, Params, Result};

use crate::decoder::Tokens;
use crate::llama::{Attention, LlamaConfig, end};

/// The fields of `config.json` that matter, under their published names.
#[derive(Debug, Clone, PartialEq)]
pub struct MixtralConfig {
    /// Everything but the experts; `intermediate_size` is the width of one of them.
    pub base: LlamaConfig,
    /// Experts of a layer.
    pub num_local_experts: usize,
    /// Experts of a token.
    pub num_experts_per_tok: usize,
    /// Weight of the load-balancing loss in training, over all layers together as transformers
    /// has it.
    pub router_aux_loss_coef: f32,
    /// Weight of the router z-loss in training; 0 in published files.
    pub router_z_loss_coef: f32,
    /// Balancing without a loss (DeepSeek-V3): how far the bias of an expert's score moves after
    /// each step. 0, as in published files: there is no bias.
    pub router_bias_update_rate: f32,
}

impl MixtralConfig {
    /// A LLaMA of this size whose feed-forward layers are so many experts, two a token.
    pub fn sized(base: LlamaConfig, experts: usize) -> MixtralConfig {
        MixtralConfig {
            base,
            num_local_experts: experts,
            num_experts_per_tok: 2,
            router_aux_loss_coef: 0.001,
            router_z_loss_coef: 0.0,
            router_bias_update_rate: 0.0,
        }
    }
}

/// Mixtral as a list of layers: the embedding, the blocks, the head.
#[derive(Debug)]
pub struct Mixtral;

impl Model for Mixtral {
    type Config = MixtralConfig;
    type Input = Tokens;

    fn depth(c: &MixtralConfig) -> usize {
        c.base.num_hidden_layers + 2
    }

    fn layer(p: &Params, c: &MixtralConfig, i: usize) -> Result<Arc<dyn Layer<Tokens>>> {
        match i {
            i if i == 0 || i == c.base.num_hidden_layers + 1 => end(p, &c.base, i),
            i => Ok(Arc::new(Block::new(&p.at("model").at("layers").at(i - 1), c, i - 1)?)),
        }
    }
}

/// Pre-norm block: `x + attention(norm(x))`, then `x + experts(norm(x))`.
#[derive(Debug)]
struct Block {
    attn_norm: RmsNorm,
    attn: Attention,
    moe_norm: RmsNorm,
    moe: Moe,
    bias_rate: f32,
}

impl Block {
    fn new(p: &Params, c: &MixtralConfig, index: usize) -> Result<Block> {
        let (embed, eps) = (Embed(c.base.hidden_size), c.base.rms_norm_eps);
        let routing = Routing {
            auxiliary: c.router_aux_loss_coef,
            z: c.router_z_loss_coef,
            ..Routing::top_k(c.num_local_experts, c.num_experts_per_tok)
        };
        let (width, bias_rate) = (c.base.intermediate_size, c.router_bias_update_rate);
        let p_moe = p.at("block_sparse_moe");
        Ok(Block {
            attn_norm: RmsNorm::new(&p.at("input_layernorm"), embed, eps)?,
            attn: Attention::new(&p.at("self_attn"), &c.base, index)?,
            moe_norm: RmsNorm::new(&p.at("post_attention_layernorm"), embed, eps)?,
            moe: Moe::new(&p_moe, embed, width, routing, None, bias_rate > 0.0)?,
            bias_rate,
        })
    }
}

impl Layer<Tokens> for Block {
    fn forward(&self, tokens: &Tokens, flow: &Flow) -> Result<Flow> {
        let x = flow.one()?;
        let x = self.attn.forward(tokens, &self.attn_norm.forward(x)?, x)?;
        let h = self.moe_norm.forward(&x)?;
        let balance = tokens.training.as_ref().map(|t| &t.balance);
        let real = tokens.real.as_ref();
        Ok((&x + &self.moe.forward(&h, balance, real)?)?.into())
    }

    fn after_step(&self) -> Result<()> {
        match self.bias_rate {
            0.0 => Ok(()),
            rate => self.moe.balance(rate),
        }
    }
}
