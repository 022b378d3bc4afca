//! A training step of candle at a prompt: the LLaMA-like or GPT-like model of `train_torch.py` in f32,
//! with candle's own AdamW. Each line is answered with the tokens per second of a step.
//!
//! Operations that candle differentiates: its fused norms, rotary embedding and softmax have no
//! backward, so their differentiable forms of `candle-nn` are used.
//!
//! `train-candle gpt|llama`, with the number of threads in `RAYON_NUM_THREADS`.

#![forbid(unsafe_code)]

use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{AdamW, Embedding, LayerNorm, Linear, Module, Optimizer, ParamsAdamW, RmsNorm};
use candle_nn::{VarBuilder, VarMap, loss, ops, rotary_emb};

const VOCAB: usize = 8192;
const EMBED: usize = 512;
const LAYERS: usize = 8;
const HEADS: usize = 8;
const KV_HEADS: usize = 4;
const HEAD: usize = EMBED / HEADS;
const MLP: usize = 1376;
const SEQ: usize = 256;
const BATCH: usize = 4;

enum Norm {
    Rms(RmsNorm),
    Layer(LayerNorm),
}

impl Norm {
    fn new(llama: bool, vb: VarBuilder<'_>) -> Result<Norm> {
        Ok(match llama {
            true => Norm::Rms(candle_nn::rms_norm(EMBED, 1e-5, vb)?),
            false => Norm::Layer(candle_nn::layer_norm(EMBED, 1e-5, vb)?),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Rms(norm) => norm.forward_diff(x),
            Norm::Layer(norm) => norm.forward(x),
        }
    }
}

struct Block {
    norms: [Norm; 2],
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(llama: bool, vb: VarBuilder<'_>) -> Result<Block> {
        let linear = |i, o, name: &str| match llama {
            true => candle_nn::linear_no_bias(i, o, vb.pp(name)),
            false => candle_nn::linear(i, o, vb.pp(name)),
        };
        let (kv, mlp) = if llama { (KV_HEADS * HEAD, MLP) } else { (EMBED, 4 * EMBED) };
        Ok(Block {
            norms: [Norm::new(llama, vb.pp("n1"))?, Norm::new(llama, vb.pp("n2"))?],
            q: linear(EMBED, EMBED, "q")?,
            k: linear(EMBED, kv, "k")?,
            v: linear(EMBED, kv, "v")?,
            o: linear(EMBED, EMBED, "o")?,
            gate: llama.then(|| linear(EMBED, mlp, "gate")).transpose()?,
            up: linear(EMBED, mlp, "up")?,
            down: linear(mlp, EMBED, "down")?,
        })
    }

    fn forward(&self, x: &Tensor, cos: &Tensor, sin: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let h = self.norms[0].forward(x)?;
        let heads = |y: Tensor| {
            let n = y.dim(D::Minus1)? / HEAD;
            y.reshape((BATCH, SEQ, n, HEAD))?.transpose(1, 2)?.contiguous()
        };
        let (mut q, mut k) = (heads(self.q.forward(&h)?)?, heads(self.k.forward(&h)?)?);
        let mut v = heads(self.v.forward(&h)?)?;
        if self.gate.is_some() {
            (q, k) = (rotary_emb::rope_slow(&q, cos, sin)?, rotary_emb::rope_slow(&k, cos, sin)?);
        }
        if k.dim(1)? < HEADS {
            let repeat = |x: Tensor| {
                let shape = (BATCH, KV_HEADS, HEADS / KV_HEADS, SEQ, HEAD);
                x.unsqueeze(2)?.broadcast_as(shape)?.reshape((BATCH, HEADS, SEQ, HEAD))
            };
            (k, v) = (repeat(k)?, repeat(v)?);
        }
        let scores = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (HEAD as f64).sqrt()))?;
        let p = ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
        let h = p.matmul(&v)?.transpose(1, 2)?.reshape((BATCH, SEQ, EMBED))?;
        let x = (x + self.o.forward(&h)?)?;
        let h = self.norms[1].forward(&x)?;
        let h = match &self.gate {
            Some(gate) => (gate.forward(&h)?.silu()? * self.up.forward(&h)?)?,
            None => self.up.forward(&h)?.gelu()?,
        };
        x + self.down.forward(&h)?
    }
}

struct Decoder {
    table: Embedding,
    positions: Option<Embedding>,
    blocks: Vec<Block>,
    norm: Norm,
    /// None is tied to the embedding.
    head: Option<Linear>,
}

fn main() -> Result<()> {
    let llama = std::env::args().nth(1).as_deref() == Some("llama");
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let embedding = |n, name| candle_nn::embedding(n, EMBED, vb.pp(name));
    let head = || candle_nn::linear_no_bias(EMBED, VOCAB, vb.pp("head"));
    let model = Decoder {
        table: embedding(VOCAB, "table")?,
        positions: (!llama).then(|| embedding(SEQ, "positions")).transpose()?,
        blocks: (0..LAYERS).map(|i| Block::new(llama, vb.pp(i))).collect::<Result<_>>()?,
        norm: Norm::new(llama, vb.pp("norm"))?,
        head: llama.then(head).transpose()?,
    };
    let params = ParamsAdamW { lr: 3e-4, weight_decay: 0.01, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(vars.all_vars(), params)?;

    let angle = |i: usize| {
        let (position, pair) = (i / (HEAD / 2), i % (HEAD / 2));
        position as f32 / 10_000f32.powf(2.0 * pair as f32 / HEAD as f32)
    };
    let angles: Vec<f32> = (0..SEQ * HEAD / 2).map(angle).collect();
    let angles = Tensor::from_vec(angles, (SEQ, HEAD / 2), &device)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let hidden = |i: usize| if i % SEQ > i / SEQ { f32::NEG_INFINITY } else { 0.0 };
    let mask = Tensor::from_vec((0..SEQ * SEQ).map(hidden).collect(), (SEQ, SEQ), &device)?;
    let id = |i: usize| (i * 7919 % VOCAB) as u32;
    let ids = Tensor::from_vec((0..BATCH * SEQ).map(id).collect(), (BATCH, SEQ), &device)?;
    let next = (1..BATCH * SEQ + 1).map(id).collect();
    let targets = Tensor::from_vec(next, BATCH * SEQ, &device)?;

    let mut step = || -> Result<f64> {
        let start = Instant::now();
        let mut x = model.table.forward(&ids)?;
        if let Some(positions) = &model.positions {
            x = x.broadcast_add(positions.embeddings())?;
        }
        for block in &model.blocks {
            x = block.forward(&x, &cos, &sin, &mask)?;
        }
        let x = model.norm.forward(&x)?.reshape((BATCH * SEQ, EMBED))?;
        let logits = match &model.head {
            Some(head) => head.forward(&x)?,
            None => x.matmul(&model.table.embeddings().t()?)?,
        };
        optimizer.backward_step(&loss::cross_entropy(&logits, &targets)?)?;
        Ok((BATCH * SEQ) as f64 / start.elapsed().as_secs_f64())
    };
    step()?;
    println!("{{\"name\": \"candle 0.9.2\"}}");
    for line in std::io::stdin().lines() {
        line?;
        println!("{{\"speed\": {}}}", step()?);
    }
    Ok(())
}
