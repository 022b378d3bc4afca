//! Training steps of one model under several plans, in turns: medians, and ratios to one rank.
//!
//! `cargo run --release -p colossal-models --example plan_bench -- [llama|moe] [rounds] [words]`.
//! One rank has two compute threads; plans of two ranks give each rank one. With words, only plans
//! whose name has them. `plan_bench serve llama "tp 2"` answers each line with that plan's speed,
//! for `cargo xtask bench plans`.
#![forbid(unsafe_code)]

use std::error::Error;

use colossal_comm::on_ranks;
use colossal_kernels::{Threads, threads};
use colossal_models::DecoderConfig;
use colossal_models::llama::LlamaConfig;
use colossal_models::mixtral::MixtralConfig;
use colossal_models::train::{AdamW, Batch, LrSchedule, Plan, SequenceMode, TensorMode, Trainer};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["serve", model, plan] => serve(model, plan),
        ["serve", ..] => Err("serve takes a model and the name of a plan".into()),
        _ => {
            let rounds: usize = words.get(1).map_or(Ok(5), |n| n.parse())?;
            compare(words.first().unwrap_or(&"llama"), rounds, words.get(2).unwrap_or(&""))
        }
    }
}

/// A model and the plans it is trained under; the first is one rank.
fn case(model: &str) -> (DecoderConfig, Vec<(&'static str, Plan)>) {
    let base = LlamaConfig {
        num_key_value_heads: 4,
        intermediate_size: 1376,
        max_position_embeddings: 256,
        ..LlamaConfig::sized(8192, 512, 8, 8)
    };
    let one = Plan::default();
    let mut plans = vec![("one rank, two threads", one.clone())];
    if model == "moe" {
        let base = LlamaConfig { intermediate_size: 688, num_hidden_layers: 4, ..base };
        plans.push(("ep 2", Plan { ep: 2, ..one }));
        return (DecoderConfig::Mixtral(MixtralConfig::sized(base, 8)), plans);
    }
    let tp = Plan { tp: 2, ..one.clone() };
    let mode = |sequence_parallel| Plan { sequence_parallel, ..tp.clone() };
    let context = |sequence_parallel| Plan { sequence_parallel, sp: 2, ..one.clone() };
    plans.extend([
        ("dp 2", Plan { dp: 2, ..one.clone() }),
        ("tp 2", tp.clone()),
        ("tp 2, split_gather", mode(SequenceMode::SplitGather)),
        ("tp 2, ring", mode(SequenceMode::Ring)),
        ("sp 2, all_to_all", context(SequenceMode::AllToAll)),
        ("sp 2, ring_attn", context(SequenceMode::RingAttn)),
        ("tp 4, 2d", Plan { tp: 4, tensor: TensorMode::TwoD, ..one.clone() }),
    ]);
    (DecoderConfig::Llama(base), plans)
}

/// Tokens per second: the median of three steps of 4 x 256 tokens, after one that warms up.
fn speed(config: &DecoderConfig, plan: &Plan) -> Result<f64> {
    let stream = colossal_tensor::random::Stream::new(0, 0);
    let ids: Vec<i32> = (0..4 * 257).map(|i| (stream.bits(i) % 8192) as i32).collect();
    let batch = Batch::windows(&ids.chunks(257).collect::<Vec<_>>())?;
    let rule = AdamW { lr: LrSchedule::constant(3e-4), weight_decay: 0.01, ..AdamW::default() };
    let speeds = on_ranks(plan.ranks(), |world| -> Result<f64, colossal_models::Error> {
        threads::set(Threads::new(if plan.ranks() == 1 { 2 } else { 1 }));
        let mut trainer = Trainer::new(&world, plan, config, rule, 0)?;
        trainer.step(&batch)?;
        let mut steps = vec![];
        for _ in 0..3 {
            steps.push(trainer.step(&batch)?.tokens_per_second);
        }
        Ok(median(steps))
    });
    Ok(speeds.into_iter().collect::<Result<Vec<_>, _>>()?[0])
}

fn serve(model: &str, name: &str) -> Result<()> {
    let (config, plans) = case(model);
    let plan = plans.iter().find(|(n, _)| *n == name).ok_or("no plan of that name")?;
    println!("{{\"name\": \"colossal, {name}\"}}");
    for line in std::io::stdin().lines() {
        line?;
        println!("{{\"speed\": {}}}", speed(&config, &plan.1)?);
    }
    Ok(())
}

fn compare(model: &str, rounds: usize, words: &str) -> Result<()> {
    let (config, mut plans) = case(model);
    let mut first = true;
    plans.retain(|(name, _)| std::mem::take(&mut first) || name.contains(words));
    let mut speeds = vec![vec![]; plans.len()];
    for round in 0..rounds {
        for ((name, plan), speeds) in plans.iter().zip(&mut speeds) {
            let speed = speed(&config, plan)?;
            eprintln!("round {round}  {name:24}{speed:8.0} tokens/s");
            speeds.push(speed);
        }
    }
    // A ratio a round: what else the machine does changes slowly.
    for ((name, _), of) in plans.iter().zip(&speeds) {
        let ratio = of.iter().zip(&speeds[0]).map(|(a, b)| a / b).collect();
        println!("{name:24}{:8.0} tokens/s  {:.2}", median(of.clone()), median(ratio));
    }
    Ok(())
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}
