//! A training step of burn at a prompt: the LLaMA-like or GPT-like model of `train_torch.py` in f32,
//! with burn's own AdamW, on Flex, its CPU backend. Each line is answered with the tokens per second
//! of a step.
//!
//! Where burn has two forms of a thing, the faster one: GELU by erf (its tanh form has no backward
//! of its own), queries that share a key head as rows of one product, halves of a head turned by
//! cosines and sines.
//!
//! `train-burn gpt|llama`, with the number of threads in `RAYON_NUM_THREADS`.

#![forbid(unsafe_code)]

use std::error::Error;
use std::time::Instant;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig};
use burn::nn::{Linear, LinearConfig, RmsNorm, RmsNormConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};

const VOCAB: usize = 8192;
const EMBED: usize = 512;
const LAYERS: usize = 8;
const HEADS: usize = 8;
const KV_HEADS: usize = 4;
const HEAD: usize = EMBED / HEADS;
const MLP: usize = 1376;
const SEQ: usize = 256;
const BATCH: usize = 4;
const INIT: Initializer = Initializer::Normal { mean: 0.0, std: 0.02 };

#[derive(Module, Debug)]
enum Norm {
    Rms(RmsNorm),
    Layer(LayerNorm),
}

impl Norm {
    fn new(llama: bool, device: &Device) -> Norm {
        match llama {
            true => Norm::Rms(RmsNormConfig::new(EMBED).init(device)),
            false => Norm::Layer(LayerNormConfig::new(EMBED).init(device)),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Norm::Rms(norm) => norm.forward(x),
            Norm::Layer(norm) => norm.forward(x),
        }
    }
}

/// What every block reads: cosines and sines `[1, 1, seq, head / 2]`, and the causal mask to add to
/// scores `[1, 1, rows, seq]`, its rows repeated for the query heads of a key head.
struct Tables {
    cos: Tensor<4>,
    sin: Tensor<4>,
    mask: Tensor<4>,
}

impl Tables {
    fn new(llama: bool, device: &Device) -> Tables {
        let angle = |i: usize| {
            let (position, pair) = (i / (HEAD / 2), i % (HEAD / 2));
            position as f32 / 10_000f32.powf(2.0 * pair as f32 / HEAD as f32)
        };
        let angles: Vec<f32> = (0..SEQ * HEAD / 2).map(angle).collect();
        let angles = TensorData::new(angles, [1, 1, SEQ, HEAD / 2]);
        let angles = Tensor::from_data(angles, device);
        let rows = if llama { HEADS / KV_HEADS * SEQ } else { SEQ };
        let hidden = |i: usize| if i % SEQ > i / SEQ % SEQ { f32::NEG_INFINITY } else { 0.0 };
        let hidden: Vec<f32> = (0..rows * SEQ).map(hidden).collect();
        let mask = Tensor::from_data(TensorData::new(hidden, [1, 1, rows, SEQ]), device);
        Tables { cos: angles.clone().cos(), sin: angles.sin(), mask }
    }

    fn rope(&self, x: Tensor<4>) -> Tensor<4> {
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let (a, b) = (x.clone().narrow(3, 0, HEAD / 2), x.narrow(3, HEAD / 2, HEAD / 2));
        let turned = a.clone() * cos.clone() - b.clone() * sin.clone();
        Tensor::cat(vec![turned, b * cos + a * sin], 3)
    }
}

#[derive(Module, Debug)]
struct Block {
    norms: Vec<Norm>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(llama: bool, device: &Device) -> Block {
        let linear = |i, o| linear(i, o, !llama, device);
        let (kv, mlp) = if llama { (KV_HEADS * HEAD, MLP) } else { (EMBED, 4 * EMBED) };
        Block {
            norms: vec![Norm::new(llama, device), Norm::new(llama, device)],
            q: linear(EMBED, EMBED),
            k: linear(EMBED, kv),
            v: linear(EMBED, kv),
            o: linear(EMBED, EMBED),
            gate: llama.then(|| linear(EMBED, mlp)),
            up: linear(EMBED, mlp),
            down: linear(mlp, EMBED),
        }
    }

    fn forward(&self, x: Tensor<3>, tables: &Tables) -> Tensor<3> {
        let h = self.norms[0].forward(x.clone());
        let heads = |y: Tensor<3>| {
            let n = y.dims()[2] / HEAD;
            y.reshape([BATCH, SEQ, n, HEAD]).swap_dims(1, 2)
        };
        let (mut q, mut k) = (heads(self.q.forward(h.clone())), heads(self.k.forward(h.clone())));
        let v = heads(self.v.forward(h));
        if self.gate.is_some() {
            (q, k) = (tables.rope(q), tables.rope(k));
        }
        let groups = k.dims()[1];
        let q = q.reshape([BATCH, groups, HEADS / groups * SEQ, HEAD]);
        let scores = (q * (1.0 / (HEAD as f64).sqrt())).matmul(k.transpose());
        let h = activation::softmax(scores + tables.mask.clone(), 3).matmul(v);
        let h = h.reshape([BATCH, HEADS, SEQ, HEAD]).swap_dims(1, 2);
        let x = x + self.o.forward(h.reshape([BATCH, SEQ, EMBED]));
        let h = self.norms[1].forward(x.clone());
        let h = match &self.gate {
            Some(gate) => activation::silu(gate.forward(h.clone())) * self.up.forward(h),
            None => activation::gelu(self.up.forward(h)),
        };
        x + self.down.forward(h)
    }
}

fn linear(inputs: usize, outputs: usize, bias: bool, device: &Device) -> Linear {
    LinearConfig::new(inputs, outputs).with_bias(bias).with_initializer(INIT).init(device)
}

#[derive(Module, Debug)]
struct Decoder {
    table: Embedding,
    positions: Option<Embedding>,
    blocks: Vec<Block>,
    norm: Norm,
    /// None is tied to the embedding.
    head: Option<Linear>,
}

impl Decoder {
    fn new(llama: bool, device: &Device) -> Decoder {
        let embedding = |n| EmbeddingConfig::new(n, EMBED).with_initializer(INIT).init(device);
        Decoder {
            table: embedding(VOCAB),
            positions: (!llama).then(|| embedding(SEQ)),
            blocks: (0..LAYERS).map(|_| Block::new(llama, device)).collect(),
            norm: Norm::new(llama, device),
            head: llama.then(|| linear(EMBED, VOCAB, false, device)),
        }
    }

    /// Logits `[batch * seq, vocabulary]`.
    fn forward(&self, ids: Tensor<2, Int>, tables: &Tables) -> Tensor<2> {
        let mut x = self.table.forward(ids);
        if let Some(positions) = &self.positions {
            x = x + positions.weight.val().unsqueeze();
        }
        for block in &self.blocks {
            x = block.forward(x, tables);
        }
        let x = self.norm.forward(x).reshape([BATCH * SEQ, EMBED]);
        match &self.head {
            Some(head) => head.forward(x),
            None => x.matmul(self.table.weight.val().transpose()),
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let llama = std::env::args().nth(1).as_deref() == Some("llama");
    let device = Device::flex().autodiff();
    device.seed(0);
    let mut model = Decoder::new(llama, &device);
    let tables = Tables::new(llama, &device);
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut optimizer = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.01).init();

    let ids: Vec<i32> = (0..BATCH * SEQ + 1).map(|i| (i * 7919 % VOCAB) as i32).collect();
    let next = TensorData::new(ids[1..].to_vec(), [BATCH * SEQ]);
    let ids = TensorData::new(ids[..BATCH * SEQ].to_vec(), [BATCH, SEQ]);
    let (ids, next) = (Tensor::from_data(ids, &device), Tensor::from_data(next, &device));

    let mut step = |model: Decoder| -> Result<(Decoder, f64), Box<dyn Error>> {
        let start = Instant::now();
        let loss = cross_entropy.forward(model.forward(ids.clone(), &tables), next.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        let model = optimizer.step(3e-4, model, gradients);
        device.sync()?;
        Ok((model, (BATCH * SEQ) as f64 / start.elapsed().as_secs_f64()))
    };
    (model, _) = step(model)?;
    println!("{{\"name\": \"burn 0.22.1, Flex with x86-v4\"}}");
    for line in std::io::stdin().lines() {
        line?;
        let speed;
        (model, speed) = step(model)?;
        println!("{{\"speed\": {speed}}}");
    }
    Ok(())
}
