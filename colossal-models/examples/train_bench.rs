//! Whole training steps of the reference models: prints the median tokens per second.
//!
//! `cargo run --release -p colossal-models --example train_bench -- llama 2 [f32|bf16|fp8|fp8_block]
//! [steps] [trace.json]`, on a GPU if there is one: `gpt2-124m` and `llama-1b` are for GPUs; fp8 is bf16 with
//! linear layers in 8 bits; with a path the last step is profiled: a table here, a Chrome trace there.
#![forbid(unsafe_code)]

use std::error::Error;

use colossal_kernels::{Floor, Threads, profile, threads};
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Batch, Fp8, LrSchedule, Plan, Precision, Trainer};
use colossal_models::{DecoderConfig, Device, Group};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default.to_string(), Clone::clone);
    let (mut seq, mut sequences) = (256, 4);
    let config = match arg(0, "llama").as_str() {
        "gpt2-124m" => {
            (seq, sequences) = (1024, 16);
            DecoderConfig::Gpt2(Gpt2Config {
                n_positions: seq,
                ..Gpt2Config::sized(50304, 768, 12, 12)
            })
        }
        "llama-1b" => {
            (seq, sequences) = (4096, 2);
            DecoderConfig::Llama(LlamaConfig {
                num_key_value_heads: 8,
                intermediate_size: 8192,
                max_position_embeddings: seq,
                ..LlamaConfig::sized(32000, 2048, 16, 32)
            })
        }
        "gpt" => DecoderConfig::Gpt2(Gpt2Config {
            n_positions: 256,
            ..Gpt2Config::sized(8192, 512, 8, 8)
        }),
        _ => DecoderConfig::Llama(LlamaConfig {
            num_key_value_heads: 4,
            intermediate_size: 1376,
            max_position_embeddings: 256,
            ..LlamaConfig::sized(8192, 512, 8, 8)
        }),
    };
    threads::set(Threads::new(arg(1, "2").parse()?));
    let (precision, fp8) = match arg(2, "f32").as_str() {
        "bf16" => (Precision::Bf16, Fp8::Off),
        "fp8" => (Precision::Bf16, Fp8::Tensor),
        "fp8_block" => (Precision::Bf16, Fp8::Block),
        _ => (Precision::F32, Fp8::Off),
    };
    let steps: usize = arg(3, "6").parse().unwrap_or(6);
    let plan = Plan { precision, fp8, ..Plan::default() };
    let rule = AdamW { lr: LrSchedule::constant(3e-4), weight_decay: 0.01, ..AdamW::default() };
    let mut trainer = Trainer::new(&Group::solo(), &plan, &config, rule, 0)?;
    let stream = colossal_tensor::random::Stream::new(0, 0);
    let vocabulary = config.vocab_size() as u64;
    let count = (sequences * (seq + 1)) as u64;
    let ids: Vec<i32> = (0..count).map(|i| (stream.bits(i) % vocabulary) as i32).collect();
    let batch = Batch::windows(&ids.chunks(seq + 1).collect::<Vec<_>>())?;
    for _ in 0..2 {
        trainer.step(&batch)?;
    }
    if arg(3, "") == "serve" {
        return serve(&mut trainer, &batch);
    }
    let mut speeds = Vec::new();
    let mut last = None;
    for step in 0..steps {
        if step + 1 == steps && args.len() > 4 {
            profile::start();
        }
        let report = trainer.step(&batch)?;
        speeds.push(report.tokens_per_second);
        last = Some(report);
    }
    if let Some(path) = args.get(4) {
        print!("{}", profile::stop().report(path.as_ref())?);
    }
    speeds.sort_by(f64::total_cmp);
    if let Some(r) = last {
        println!("loss {:.4}, mfu {:.2}, peak {} MiB", r.loss, r.mfu, r.peak_bytes >> 20);
    }
    println!("{:.1} tokens/s", speeds[speeds.len() / 2]);
    Ok(())
}

/// For `cargo xtask bench train`: each line asks for the median speed of three steps, beside the
/// speed at which the step's products would run at the peak of the multiply-adds.
fn serve(trainer: &mut Trainer, batch: &Batch) -> Result<(), Box<dyn Error>> {
    if trainer.model.scope().device() != &Device::Cpu {
        return serve_device(trainer, batch);
    }
    profile::start();
    let tokens = trainer.step(batch)?.tokens as f64;
    let mut products = profile::stop().events;
    products.retain(|e| e.work.flops > 0);
    println!("{{\"name\": \"colossal\"}}");
    for line in std::io::stdin().lines() {
        line?;
        let floor = Floor::measure();
        let mut speeds = Vec::new();
        for _ in 0..3 {
            speeds.push(trainer.step(batch)?.tokens_per_second);
        }
        speeds.sort_by(f64::total_cmp);
        let least: f64 = products.iter().map(|e| e.floor(&floor)).sum::<f64>() / 1e9;
        println!("{{\"speed\": {}, \"floor\": {}}}", speeds[1], tokens / least);
    }
    Ok(())
}

/// The same on a GPU, beside the speed at which the model's flops would run at its peak.
fn serve_device(trainer: &mut Trainer, batch: &Batch) -> Result<(), Box<dyn Error>> {
    println!("{{\"name\": \"colossal\"}}");
    for line in std::io::stdin().lines() {
        line?;
        let mut reports = Vec::new();
        for _ in 0..3 {
            reports.push(trainer.step(batch)?);
        }
        reports.sort_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second));
        let (speed, mfu) = (reports[1].tokens_per_second, reports[1].mfu);
        println!("{{\"speed\": {speed}, \"floor\": {}}}", speed / mfu);
    }
    Ok(())
}
