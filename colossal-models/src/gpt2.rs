//! GPT-2 and GPT-3 (Radford et al., 2019; Brown et al., 2020).
//!
//! What is peculiar about it:
//! - learned positions, LayerNorm before each sub-layer, biases everywhere
//! - GELU by its tanh approximation, the head tied to the embedding
//! - residual projections start with deviation 0.02 / sqrt(2 · layers)
//! - published files fuse q, k, v and store matrices as `[in, out]`: see `hf`

use std::sync::Arc;

use colossal_tensor::nn::{Embedding, LayerNorm, Linear};
use colossal_tensor::placement::Dim::{Embed, Heads, Mlp, Other, Vocab};
use colossal_tensor::{Flow, Init, Layer, Model, Params, Region, Result, Tensor};

use crate::decoder::{Head, HeadLayer, Tokens};

/// The fields of `config.json` that matter, under their published names.
#[derive(Debug, Clone, PartialEq)]
pub struct Gpt2Config {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// The longest sequence.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Blocks.
    pub n_layer: usize,
    /// Heads.
    pub n_head: usize,
    /// Width of the feed-forward layer.
    pub n_inner: usize,
    /// Epsilon of the norms.
    pub layer_norm_epsilon: f32,
    /// Dropout of residual branches and embeddings while training.
    pub resid_pdrop: f32,
    /// What the last layer computes.
    pub head: Head,
}

impl Gpt2Config {
    /// A model of this size with customary proportions and no dropout.
    pub fn sized(vocab_size: usize, width: usize, layers: usize, heads: usize) -> Gpt2Config {
        Gpt2Config {
            vocab_size,
            n_positions: 1024,
            n_embd: width,
            n_layer: layers,
            n_head: heads,
            n_inner: 4 * width,
            layer_norm_epsilon: 1e-5,
            resid_pdrop: 0.0,
            head: Head::Lm,
        }
    }
}

/// GPT-2 as a list of layers: the embeddings, the blocks, the head.
#[derive(Debug)]
pub struct Gpt2;

impl Model for Gpt2 {
    type Config = Gpt2Config;
    type Input = Tokens;

    fn depth(c: &Gpt2Config) -> usize {
        c.n_layer + 2
    }

    fn layer(p: &Params, c: &Gpt2Config, i: usize) -> Result<Arc<dyn Layer<Tokens>>> {
        let t = p.at("transformer");
        match i {
            0 => Ok(Arc::new(Entry {
                wte: Embedding::new(&t.at("wte"), Vocab(c.vocab_size), Embed(c.n_embd))?,
                wpe: Embedding::new(&t.at("wpe"), Other(c.n_positions), Embed(c.n_embd))?,
                dropout: c.resid_pdrop,
            })),
            i if i == c.n_layer + 1 => Ok(Arc::new(Final::new(p, c)?)),
            i => Ok(Arc::new(Block::new(&t.at("h").at(i - 1), c, i - 1)?)),
        }
    }
}

#[derive(Debug)]
struct Entry {
    wte: Embedding,
    wpe: Embedding,
    dropout: f32,
}

impl Layer<Tokens> for Entry {
    fn forward(&self, tokens: &Tokens, _: &Flow) -> Result<Flow> {
        let words = self.wte.forward(&tokens.ids)?.redistribute(Region::Residual)?;
        let places = self.wpe.forward(&tokens.positions)?.redistribute(Region::Residual)?;
        drop_out(tokens, (&words + &places)?, self.dropout, 0).map(Flow::from)
    }
}

/// Pre-norm block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Debug)]
struct Block {
    index: usize,
    ln_1: LayerNorm,
    wq: Linear,
    wk: Linear,
    wv: Linear,
    wo: Linear,
    ln_2: LayerNorm,
    fc: Linear,
    proj: Linear,
    head_dim: usize,
    dropout: f32,
}

impl Block {
    fn new(p: &Params, c: &Gpt2Config, index: usize) -> Result<Block> {
        let (embed, mlp) = (Embed(c.n_embd), Mlp(c.n_inner));
        let heads = Heads(c.n_head, c.n_embd / c.n_head);
        let (attn, ffn) = (p.at("attn"), p.at("mlp"));
        let residual = Init::Normal(0.02 / (2.0 * c.n_layer as f32).sqrt());
        Ok(Block {
            index,
            ln_1: LayerNorm::new(&p.at("ln_1"), embed, c.layer_norm_epsilon)?,
            wq: Linear::new(&attn.at("q"), embed, heads, true)?,
            wk: Linear::new(&attn.at("k"), embed, heads, true)?,
            wv: Linear::new(&attn.at("v"), embed, heads, true)?,
            wo: Linear::with_init(&attn.at("c_proj"), heads, embed, true, residual)?,
            ln_2: LayerNorm::new(&p.at("ln_2"), embed, c.layer_norm_epsilon)?,
            fc: Linear::new(&ffn.at("c_fc"), embed, mlp, true)?,
            proj: Linear::with_init(&ffn.at("c_proj"), mlp, embed, true, residual)?,
            head_dim: c.n_embd / c.n_head,
            dropout: c.resid_pdrop,
        })
    }
}

impl Layer<Tokens> for Block {
    fn forward(&self, tokens: &Tokens, flow: &Flow) -> Result<Flow> {
        let x = flow.one()?;
        let h = self.ln_1.forward(x)?.redistribute(Region::TensorParallel)?;
        let q = self.wq.forward(&h)?.split_heads(self.head_dim)?;
        let k = self.wk.forward(&h)?.split_heads(self.head_dim)?;
        let v = self.wv.forward(&h)?.split_heads(self.head_dim)?;
        let h = tokens.attend(self.index, &q, &k, &v)?.merge_heads()?;
        let x = self.residual(tokens, x, &self.wo, &h, 2 * self.index + 1)?;

        let h = self.ln_2.forward(&x)?.redistribute(Region::TensorParallel)?;
        let h = self.fc.forward(&h)?.gelu_tanh()?;
        Ok(self.residual(tokens, &x, &self.proj, &h, 2 * self.index + 2)?.into())
    }
}

impl Block {
    /// `x + layer(h)`, or what dropout leaves of it.
    fn residual(
        &self,
        tokens: &Tokens,
        x: &Tensor,
        layer: &Linear,
        h: &Tensor,
        place: usize,
    ) -> Result<Tensor> {
        if tokens.training.is_none() || self.dropout == 0.0 {
            return layer.forward_onto(h, x);
        }
        x + &drop_out(tokens, layer.forward_to(h, Region::Residual)?, self.dropout, place)?
    }
}

#[derive(Debug)]
struct Final {
    norm: LayerNorm,
    head: HeadLayer,
}

impl Final {
    fn new(p: &Params, c: &Gpt2Config) -> Result<Final> {
        let (t, embed) = (p.at("transformer"), Embed(c.n_embd));
        Ok(Final {
            norm: LayerNorm::new(&t.at("ln_f"), embed, c.layer_norm_epsilon)?,
            head: match c.head {
                Head::Lm => HeadLayer::Lm(Linear::tied(p.get("transformer.wte.weight")?)),
                Head::Score => {
                    HeadLayer::Score(Linear::new(&p.at("score"), embed, Other(1), false)?)
                }
            },
        })
    }
}

impl Layer<Tokens> for Final {
    fn forward(&self, tokens: &Tokens, flow: &Flow) -> Result<Flow> {
        Ok(self.head.forward(tokens, &self.norm.forward(flow.one()?)?)?.into())
    }
}

fn drop_out(tokens: &Tokens, x: Tensor, p: f32, place: usize) -> Result<Tensor> {
    match &tokens.training {
        Some(t) if p > 0.0 => x.dropout(p, t.dropout.child(place as u64), t.first_row),
        _ => Ok(x),
    }
}
