//! LLaMA 1, 2, 3 (Touvron et al., 2023; Meta, 2024) and checkpoints of the same architecture.
//!
//! What is peculiar about it:
//! - RMSNorm before each sub-layer, no biases (unless `attention_bias` / `mlp_bias`)
//! - rotary embedding in the half-split layout of Hugging Face files, `llama3` scaling in 3.1
//! - fewer key/value heads than query heads from LLaMA 2 70B on
//! - SwiGLU; the head may be tied to the embedding
//!
//! Parameter names are those of the published files.

use std::sync::Arc;

use colossal_tensor::nn::{Embedding, Linear, RmsNorm, Rope, RopeScaling};
use colossal_tensor::placement::Dim::{Embed, Heads, KvHeads, Mlp, Other, Vocab};
use colossal_tensor::{Flow, Layer, Model, Params, Region, Result, Tensor};

use crate::decoder::{Head, HeadLayer, Tokens};

/// The fields of `config.json` that matter, under their published names.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Is the head the embedding?
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v, o.
    pub attention_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// What the last layer computes.
    pub head: Head,
}

impl LlamaConfig {
    /// A model of about `hidden_size² · 12 · layers` parameters with customary proportions.
    pub fn sized(
        vocab_size: usize,
        hidden_size: usize,
        layers: usize,
        heads: usize,
    ) -> LlamaConfig {
        LlamaConfig {
            vocab_size,
            hidden_size,
            intermediate_size: (hidden_size * 8 / 3).next_multiple_of(32),
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: hidden_size / heads,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
            head: Head::Lm,
        }
    }
}

/// LLaMA as a list of layers: the embedding, the blocks, the head.
#[derive(Debug)]
pub struct Llama;

impl Model for Llama {
    type Config = LlamaConfig;
    type Input = Tokens;

    fn depth(c: &LlamaConfig) -> usize {
        c.num_hidden_layers + 2
    }

    fn layer(p: &Params, c: &LlamaConfig, i: usize) -> Result<Arc<dyn Layer<Tokens>>> {
        let model = p.at("model");
        match i {
            i if i == 0 || i == c.num_hidden_layers + 1 => end(p, c, i),
            i => Ok(Arc::new(Block::new(&model.at("layers").at(i - 1), c, i - 1)?)),
        }
    }
}

/// The first or the last layer.
pub(crate) fn end(p: &Params, c: &LlamaConfig, i: usize) -> Result<Arc<dyn Layer<Tokens>>> {
    match i {
        0 => Ok(Arc::new(Entry { table: embed_tokens(&p.at("model"), c)? })),
        _ => Ok(Arc::new(Final::new(p, c)?)),
    }
}

fn embed_tokens(model: &Params, c: &LlamaConfig) -> Result<Embedding> {
    Embedding::new(&model.at("embed_tokens"), Vocab(c.vocab_size), Embed(c.hidden_size))
}

#[derive(Debug)]
struct Entry {
    table: Embedding,
}

impl Layer<Tokens> for Entry {
    fn forward(&self, tokens: &Tokens, _: &Flow) -> Result<Flow> {
        Ok(self.table.forward(&tokens.ids)?.redistribute(Region::Residual)?.into())
    }
}

/// Causal attention with rotary positions and grouped key/value heads.
#[derive(Debug)]
pub(crate) struct Attention {
    index: usize,
    wq: Linear,
    wk: Linear,
    wv: Linear,
    wo: Linear,
    rope: Rope,
    head_dim: usize,
}

impl Attention {
    pub(crate) fn new(p: &Params, c: &LlamaConfig, index: usize) -> Result<Attention> {
        let embed = Embed(c.hidden_size);
        let q = Heads(c.num_attention_heads, c.head_dim);
        let kv = KvHeads(c.num_key_value_heads, c.head_dim);
        let bias = c.attention_bias;
        Ok(Attention {
            index,
            wq: Linear::new(&p.at("q_proj"), embed, q, bias)?,
            wk: Linear::new(&p.at("k_proj"), embed, kv, bias)?,
            wv: Linear::new(&p.at("v_proj"), embed, kv, bias)?,
            wo: Linear::new(&p.at("o_proj"), q, embed, bias)?,
            rope: Rope::new(c.head_dim, c.rope_theta, c.max_position_embeddings, c.rope_scaling),
            head_dim: c.head_dim,
        })
    }

    /// `residual + attention(h)`.
    pub(crate) fn forward(&self, tokens: &Tokens, h: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let h = h.redistribute(Region::TensorParallel)?;
        let heads = |y: Tensor| y.split_heads(self.head_dim);
        let q = self.rope.forward(&heads(self.wq.forward(&h)?)?, &tokens.positions)?;
        let k = self.rope.forward(&heads(self.wk.forward(&h)?)?, &tokens.positions)?;
        let v = heads(self.wv.forward(&h)?)?;
        let h = tokens.attend(self.index, &q, &k, &v)?.merge_heads()?;
        self.wo.forward_onto(&h, residual)
    }
}

/// Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
struct Block {
    attn_norm: RmsNorm,
    attn: Attention,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(p: &Params, c: &LlamaConfig, index: usize) -> Result<Block> {
        let (embed, mlp) = (Embed(c.hidden_size), Mlp(c.intermediate_size));
        let (ffn, bias) = (p.at("mlp"), c.mlp_bias);
        Ok(Block {
            attn_norm: RmsNorm::new(&p.at("input_layernorm"), embed, c.rms_norm_eps)?,
            attn: Attention::new(&p.at("self_attn"), c, index)?,
            mlp_norm: RmsNorm::new(&p.at("post_attention_layernorm"), embed, c.rms_norm_eps)?,
            gate: Linear::new(&ffn.at("gate_proj"), embed, mlp, bias)?,
            up: Linear::new(&ffn.at("up_proj"), embed, mlp, bias)?,
            down: Linear::new(&ffn.at("down_proj"), mlp, embed, bias)?,
        })
    }
}

impl Layer<Tokens> for Block {
    fn forward(&self, tokens: &Tokens, flow: &Flow) -> Result<Flow> {
        let x = flow.one()?;
        let x = self.attn.forward(tokens, &self.attn_norm.forward(x)?, x)?;

        let h = self.mlp_norm.forward(&x)?.redistribute(Region::TensorParallel)?;
        let h = self.gate.forward(&h)?.swiglu(&self.up.forward(&h)?)?;
        Ok(self.down.forward_onto(&h, &x)?.into())
    }
}

#[derive(Debug)]
struct Final {
    norm: RmsNorm,
    head: HeadLayer,
}

impl Final {
    fn new(p: &Params, c: &LlamaConfig) -> Result<Final> {
        let embed = Embed(c.hidden_size);
        let norm = RmsNorm::new(&p.at("model").at("norm"), embed, c.rms_norm_eps)?;
        let head = match c.head {
            Head::Score => HeadLayer::Score(Linear::new(&p.at("score"), embed, Other(1), false)?),
            Head::Lm if c.tie_word_embeddings => {
                HeadLayer::Lm(Linear::tied(p.get("model.embed_tokens.weight")?))
            }
            Head::Lm => {
                HeadLayer::Lm(Linear::new(&p.at("lm_head"), embed, Vocab(c.vocab_size), false)?)
            }
        };
        Ok(Final { norm, head })
    }
}

impl Layer<Tokens> for Final {
    fn forward(&self, tokens: &Tokens, flow: &Flow) -> Result<Flow> {
        Ok(self.head.forward(tokens, &self.norm.forward(flow.one()?)?)?.into())
    }
}
