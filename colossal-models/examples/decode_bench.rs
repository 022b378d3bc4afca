//! Decoding at a prompt, for `cargo xtask bench decode`: a LLaMA-like model of 109.5 M parameters
//! with random weights. Each line asks for the tokens per second of 128 new tokens after a prompt
//! of 64, in every row of the batch, beside what the weights and the cache would allow at the
//! bandwidth of memory.
//!
//! `cargo run --release -p colossal-models --example decode_bench -- 2 f32|bf16|int8 BATCH
//! [trace.json]`; `save FOLDER` writes the model for a peer to read.
#![forbid(unsafe_code)]

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use colossal_kernels::{Floor, Threads, profile, threads};
use colossal_models::generate::{Sampling, generate};
use colossal_models::llama::LlamaConfig;
use colossal_models::{CausalLm, DecoderConfig, Dtype, Scope, hf};

const PROMPT: usize = 64;
const NEW: usize = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default.to_string(), Clone::clone);
    let config = LlamaConfig {
        intermediate_size: 2048,
        tie_word_embeddings: true,
        ..LlamaConfig::sized(32_000, 768, 12, 12)
    };
    let (blocks, row) = (config.num_hidden_layers, config.num_key_value_heads * config.head_dim);
    let config = DecoderConfig::Llama(config);
    let new = |dtype| CausalLm::new(&Scope::solo(), &config, 0, dtype);
    if arg(0, "2") == "save" {
        let model = new(Dtype::F32)?;
        hf::save(&model, Path::new(&arg(1, "target/bench/decode")), usize::MAX)?;
        return Ok(());
    }
    threads::set(Threads::new(arg(0, "2").parse()?));
    let (dtype, width) = match arg(1, "f32").as_str() {
        "f32" => (Dtype::F32, 4),
        "bf16" => (Dtype::Bf16, 2),
        _ => (Dtype::Bf16, 1),
    };
    let mut model = new(dtype)?;
    let elements = model.elements();
    if width == 1 {
        model = model.quantize_int8()?;
    }
    let batch: usize = arg(2, "1").parse()?;
    let prompts: Vec<Vec<i32>> = (0..batch)
        .map(|b| (0..PROMPT).map(|i| ((b * 7919 + i * 104_729) % 32_000) as i32).collect())
        .collect();
    // Of each step: all weights, and half of the longest cache on average.
    let cache = 2 * blocks * batch * (PROMPT + NEW / 2) * row * dtype.bytes();
    let bytes = (elements * width + cache) as f64;
    let sampling = Sampling { max_new_tokens: NEW, ..Sampling::default() };
    let run = || -> Result<f64, Box<dyn Error>> {
        // The first token ends the prompt's pass; decoding is the rest.
        let mut first = None;
        generate(&model, &prompts, &sampling, |_, _| {
            first.get_or_insert_with(Instant::now);
        })?;
        let seconds = first.ok_or("no token came")?.elapsed().as_secs_f64();
        Ok((batch * (NEW - 1)) as f64 / seconds)
    };
    run()?;
    if let Some(path) = args.get(3) {
        profile::start();
        println!("{:.1} tokens/s", run()?);
        print!("{}", profile::stop().report(path.as_ref())?);
        return Ok(());
    }
    println!("{{\"name\": \"colossal\"}}");
    for line in std::io::stdin().lines() {
        line?;
        let floor = Floor::measure().read / bytes * batch as f64;
        println!("{{\"speed\": {}, \"floor\": {floor}}}", run()?);
    }
    Ok(())
}
