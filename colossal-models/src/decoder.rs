//! What all decoder-only language models share: their input, their heads, their configuration.

use std::sync::{Arc, Mutex};

use colossal_tensor::moe::Balance;
use colossal_tensor::random::Stream;
use colossal_tensor::{
    Added, AttentionMask, Dtype, Error, IGNORE, KvCache, Layer, Model, Params, Region, Result,
    Scope, Stack, Tensor,
};
use serde::{Deserialize, Serialize};

use crate::gpt2::{self, Gpt2Config};
use crate::llama::{self, LlamaConfig};
use crate::mixtral::{Mixtral, MixtralConfig};

/// What every layer of a decoder is given: this rank's part of a batch of token sequences.
#[derive(Debug)]
pub struct Tokens {
    /// Token ids, `[batch, seq]` of `i32`.
    pub ids: Tensor,
    /// The position of every token, laid out as `ids`.
    pub positions: Tensor,
    /// Which keys a query sees.
    pub mask: AttentionMask,
    /// Generation: keys and values of earlier tokens, and which of the new ones are real.
    pub cache: Option<(Arc<Mutex<KvCache>>, Added)>,
    /// The head reads only this position of each sequence.
    pub head_at: Option<Vec<usize>>,
    /// The head computes their loss instead of logits.
    pub goal: Option<Goal>,
    /// 1 for real tokens and 0 for padding, laid out as `ids`; all are real if `None`.
    pub real: Option<Tensor>,
    /// What is different while training; `None` turns dropout and auxiliary losses off.
    pub training: Option<Training>,
}

/// What a layer must know of the training step it is part of.
#[derive(Debug, Clone)]
pub struct Training {
    /// Dropout masks of this step.
    pub dropout: Stream,
    /// Where the first sequence (of all ranks) lies in the step's batch.
    pub first_row: usize,
    /// What the routers of a mixture of experts see in this microbatch, and their losses.
    pub balance: Arc<Balance>,
}

/// What a model is to say.
#[derive(Debug, Clone)]
pub struct Goal {
    /// The next token of each, laid out as [`Tokens::ids`]; -100 where there is no loss.
    pub targets: Tensor,
    /// Factor of the summed loss.
    pub factor: f32,
    /// So many rows of logits at most exist at once; `None` chooses.
    pub rows: Option<usize>,
}

impl Tokens {
    /// Sequences of equal length `seq`, row after row, all real, positions from 0. They are given
    /// whole: context parallelism takes its part of their tokens here.
    pub fn new(scope: &Scope, ids: &[i32], seq: usize) -> Result<Tokens> {
        let batch = ids.len().checked_div(seq).unwrap_or(0);
        let own: Vec<i32> = scope.tokens(seq)?.into_iter().map(|t| t as i32).collect();
        let ids = scope.sequences(ids, batch, seq)?;
        Ok(Tokens {
            positions: ids.same_place(&own.repeat(batch))?,
            ids,
            mask: AttentionMask::causal(),
            cache: None,
            head_at: None,
            goal: None,
            real: None,
            training: None,
        })
    }

    /// Sequences padded on the right to `seq`, of which the first `lengths[b]` tokens are real.
    pub fn padded(scope: &Scope, ids: &[i32], seq: usize, lengths: Vec<i32>) -> Result<Tokens> {
        let mut tokens = Tokens::new(scope, ids, seq)?;
        if lengths.iter().any(|l| *l as usize != seq) {
            let real = lengths.iter().flat_map(|n| (0..seq as i32).map(move |t| i32::from(t < *n)));
            tokens.real = Some(tokens.ids.same_place(&real.collect::<Vec<_>>())?);
            tokens.mask.lengths = Some(Arc::new(lengths));
        }
        Ok(tokens)
    }

    /// Attention of a layer: over the cache in generation, within the sequence otherwise.
    pub(crate) fn attend(
        &self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        match &self.cache {
            None => q.attention(k, v, &self.mask),
            Some((cache, added)) => cache
                .lock()
                .map_err(|_| {
                    Error::Other("an earlier layer panicked while it held the cache".into())
                })?
                .attend(layer, q, k, v, added, self.mask.window),
        }
    }
}

/// What the last layer computes from the final norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Head {
    /// Logits over the vocabulary.
    #[default]
    Lm,
    /// One number per token: a reward or a value (`score.weight`).
    Score,
}

/// A decoder of any family we know, as its `config.json` says.
#[derive(Debug, Clone, PartialEq)]
pub enum DecoderConfig {
    /// `model_type: llama`.
    Llama(LlamaConfig),
    /// `model_type: gpt2`.
    Gpt2(Gpt2Config),
    /// `model_type: mixtral`.
    Mixtral(MixtralConfig),
}

impl DecoderConfig {
    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        match self {
            DecoderConfig::Llama(c) => c.vocab_size,
            DecoderConfig::Mixtral(c) => c.base.vocab_size,
            DecoderConfig::Gpt2(c) => c.vocab_size,
        }
    }

    /// The longest sequence.
    pub fn max_positions(&self) -> usize {
        match self {
            DecoderConfig::Llama(c) => c.max_position_embeddings,
            DecoderConfig::Mixtral(c) => c.base.max_position_embeddings,
            DecoderConfig::Gpt2(c) => c.n_positions,
        }
    }

    /// Transformer blocks.
    pub fn blocks(&self) -> usize {
        match self {
            DecoderConfig::Llama(c) => c.num_hidden_layers,
            DecoderConfig::Mixtral(c) => c.base.num_hidden_layers,
            DecoderConfig::Gpt2(c) => c.n_layer,
        }
    }

    /// Width of the residual stream.
    pub fn width(&self) -> usize {
        match self {
            DecoderConfig::Llama(c) => c.hidden_size,
            DecoderConfig::Mixtral(c) => c.base.hidden_size,
            DecoderConfig::Gpt2(c) => c.n_embd,
        }
    }

    /// What the last layer computes.
    pub fn head(&self) -> Head {
        match self {
            DecoderConfig::Llama(c) => c.head,
            DecoderConfig::Mixtral(c) => c.base.head,
            DecoderConfig::Gpt2(c) => c.head,
        }
    }

    /// The same model with another head.
    pub fn with_head(mut self, head: Head) -> DecoderConfig {
        match &mut self {
            DecoderConfig::Llama(c) => c.head = head,
            DecoderConfig::Mixtral(c) => c.base.head = head,
            DecoderConfig::Gpt2(c) => c.head = head,
        }
        self
    }

    /// Floating-point operations of a forward and backward pass per token at this length:
    /// 6 per matrix parameter, plus 12 · blocks · width · seq / 2 for causal attention.
    pub fn flops_per_token(&self, matrix_parameters: usize, seq: usize) -> f64 {
        6.0 * matrix_parameters as f64 + 6.0 * (self.blocks() * self.width() * seq) as f64
    }
}

/// Any decoder-only model, chosen by its configuration.
#[derive(Debug)]
pub struct Decoder;

impl Model for Decoder {
    type Config = DecoderConfig;
    type Input = Tokens;

    fn depth(config: &DecoderConfig) -> usize {
        config.blocks() + 2
    }

    fn layer(p: &Params, config: &DecoderConfig, i: usize) -> Result<Arc<dyn Layer<Tokens>>> {
        match config {
            DecoderConfig::Llama(c) => llama::Llama::layer(p, c, i),
            DecoderConfig::Mixtral(c) => Mixtral::layer(p, c, i),
            DecoderConfig::Gpt2(c) => gpt2::Gpt2::layer(p, c, i),
        }
    }
}

/// A decoder ready to run: its configuration, its layers, its parameters.
#[derive(Debug)]
pub struct CausalLm {
    /// What `config.json` says.
    pub config: DecoderConfig,
    /// The layers.
    pub stack: Stack<Tokens>,
    /// All parameters, under Hugging Face names where the family's file has the same tensor.
    pub params: Params,
}

impl CausalLm {
    /// A model with fresh weights.
    pub fn new(scope: &Scope, config: &DecoderConfig, seed: u64, dtype: Dtype) -> Result<CausalLm> {
        CausalLm::of(Params::new(scope, seed, dtype), config)
    }

    /// A model of these parameters.
    pub(crate) fn of(params: Params, config: &DecoderConfig) -> Result<CausalLm> {
        let stack = Stack::build::<Decoder>(&params, config)?;
        Ok(CausalLm { config: config.clone(), stack, params })
    }

    /// The scope the model lives on.
    pub fn scope(&self) -> &Scope {
        self.params.scope()
    }

    /// Logits `[batch, seq, vocab]` (or scores `[batch, seq]`) of this rank's part of a batch.
    pub fn forward(&self, tokens: Tokens) -> Result<Tensor> {
        self.stack.forward(&Arc::new(tokens))
    }

    /// The loss of each token, in f32, laid out as the tokens are: `-log p` of its target. Targets are
    /// as [`colossal_tensor::Tensor::same_place`] takes them, -100 where there is no loss.
    ///
    /// # Errors
    /// For a target that is no entry of the vocabulary.
    pub fn losses(&self, tokens: Tokens, targets: &[i32]) -> Result<Tensor> {
        let targets = self.targets(&tokens, targets)?;
        self.forward(tokens)?.cross_entropy(&targets)
    }

    /// The sum of [`CausalLm::losses`] times `factor`; at most `rows` of the logits exist at once, or as
    /// many as are fast.
    ///
    /// # Errors
    /// For a target that is no entry of the vocabulary, and a model whose head has none.
    pub fn loss(
        &self,
        mut tokens: Tokens,
        targets: &[i32],
        factor: f32,
        rows: Option<usize>,
    ) -> Result<Tensor> {
        let targets = self.targets(&tokens, targets)?;
        tokens.goal = Some(Goal { targets, factor, rows });
        self.forward(tokens)
    }

    fn targets(&self, tokens: &Tokens, targets: &[i32]) -> Result<Tensor> {
        let entries = self.config.vocab_size();
        let outside = |t: &&i32| **t != IGNORE && (**t < 0 || **t as usize >= entries);
        if let Some(bad) = targets.iter().find(outside) {
            return Err(Error::Other(format!(
                "losses: target {bad} is outside the vocabulary, 0..{entries}; mark tokens without \
                 loss with {IGNORE}"
            )));
        }
        tokens.ids.same_place(targets)
    }

    /// Elements of all parameters, whole.
    pub fn elements(&self) -> usize {
        self.params.all().iter().map(|p| p.global_shape().iter().product::<usize>()).sum()
    }

    /// Rounds the matrices of all linear layers to int8, for inference: a quarter of f32's memory,
    /// and as much less to read for each token. Embeddings, norms, routers and stacked experts
    /// stay. Rows of activations are rounded as they come; logits are off by one to two hundredths
    /// of their spread.
    ///
    /// # Errors
    /// When a parameter cannot be read.
    pub fn quantize_int8(self) -> Result<CausalLm> {
        self.params.all().iter().try_for_each(|p| p.quantize_int8())?;
        Ok(self.freeze())
    }

    /// Freezes every parameter: no gradients.
    pub fn freeze(self) -> CausalLm {
        self.params.all().iter().for_each(|p| p.set_trainable(false));
        self
    }
}

/// The last layer of a decoder, after its final norm.
#[derive(Debug)]
pub(crate) enum HeadLayer {
    Lm(colossal_tensor::nn::Linear),
    Score(colossal_tensor::nn::Linear),
}

impl HeadLayer {
    pub(crate) fn forward(&self, tokens: &Tokens, x: &Tensor) -> Result<Tensor> {
        match self {
            HeadLayer::Lm(head) => {
                let x = x.redistribute(Region::TensorParallel)?;
                let x = match &tokens.head_at {
                    None => x,
                    Some(at) => {
                        let rows = x.take_rows(at)?;
                        let (batch, width) = (rows.shape()[0], rows.shape()[1]);
                        rows.reshape(&[batch, 1, width])?
                    }
                };
                match &tokens.goal {
                    None => head.forward(&x),
                    Some(goal) => head.cross_entropy(&x, &goal.targets, goal.factor, goal.rows),
                }
            }
            HeadLayer::Score(_) if tokens.goal.is_some() => {
                Err(Error::Other("loss: the head of this model has no vocabulary".into()))
            }
            HeadLayer::Score(head) => {
                let y = head.forward(x)?.redistribute(Region::Whole)?.to_dtype(Dtype::F32)?;
                let shape = y.shape()[..2].to_vec();
                y.reshape(&shape)
            }
        }
    }
}
