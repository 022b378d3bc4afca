//! Training steps of one model under several plans, in turns: medians, and ratios to one rank.
//!
//! `cargo run --release -p colossal-models --example plan_bench -- [llama|moe] [rounds] [words]`. One
//! rank has two compute threads; plans of two ranks give each rank one. With words, only plans whose
//! name has them. Peers: `xtask/peers/{tensor_parallel,moe}_torch.py`.
#![forbid(unsafe_code)]

use std::error::Error;

use colossal_comm::on_ranks;
use colossal_kernels::{Threads, threads};
use colossal_models::DecoderConfig;
use colossal_models::llama::LlamaConfig;
use colossal_models::mixtral::MixtralConfig;
use colossal_models::train::{AdamW, Batch, LrSchedule, Plan, SequenceMode, TensorMode, Trainer};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rounds: usize = args.get(1).map_or(Ok(5), |n| n.parse())?;
    let base = LlamaConfig {
        num_key_value_heads: 4,
        intermediate_size: 1376,
        max_position_embeddings: 256,
        ..LlamaConfig::sized(8192, 512, 8, 8)
    };
    let one = Plan::default();
    let (config, mut plans) = match args.first().map(String::as_str) {
        Some("moe") => {
            let base = LlamaConfig { intermediate_size: 688, num_hidden_layers: 4, ..base };
            let config = DecoderConfig::Mixtral(MixtralConfig::sized(base, 8));
            (config, vec![("ep 2", Plan { ep: 2, ..one.clone() })])
        }
        _ => {
            let tp = Plan { tp: 2, ..one.clone() };
            let mode = |sequence_parallel| Plan { sequence_parallel, ..tp.clone() };
            let context = |sequence_parallel| Plan { sequence_parallel, sp: 2, ..one.clone() };
            let plans = vec![
                ("dp 2", Plan { dp: 2, ..one.clone() }),
                ("tp 2", tp.clone()),
                ("tp 2, split_gather", mode(SequenceMode::SplitGather)),
                ("tp 2, ring", mode(SequenceMode::Ring)),
                ("sp 2, all_to_all", context(SequenceMode::AllToAll)),
                ("sp 2, ring_attn", context(SequenceMode::RingAttn)),
                ("tp 4, 2d", Plan { tp: 4, tensor: TensorMode::TwoD, ..one.clone() }),
            ];
            (DecoderConfig::Llama(base), plans)
        }
    };
    let words = args.get(2).map_or("", |w| w);
    plans.retain(|(name, _)| name.contains(words));
    let stream = colossal_tensor::random::Stream::new(0, 0);
    let ids: Vec<i32> = (0..4 * 257).map(|i| (stream.bits(i) % 8192) as i32).collect();
    let batch = Batch::windows(&ids.chunks(257).collect::<Vec<_>>())?;
    let rule = AdamW { lr: LrSchedule::constant(3e-4), weight_decay: 0.01, ..AdamW::default() };
    let mut names = vec!["one rank, two threads"];
    let mut speeds = vec![vec![]; plans.len() + 1];
    names.extend(plans.iter().map(|(name, _)| *name));
    for round in 0..rounds {
        for (i, name) in names.iter().enumerate() {
            let plan = if i == 0 { &one } else { &plans[i - 1].1 };
            let n = if i == 0 { 2 } else { 1 };
            let speed = on_ranks(plan.ranks(), |world| -> Result<f64, colossal_models::Error> {
                threads::set(Threads::new(n));
                let mut trainer = Trainer::new(&world, plan, &config, rule, 0)?;
                trainer.step(&batch)?;
                let mut steps =
                    [trainer.step(&batch)?, trainer.step(&batch)?, trainer.step(&batch)?];
                steps.sort_by(|a, b| a.tokens_per_second.total_cmp(&b.tokens_per_second));
                Ok(steps[1].tokens_per_second)
            });
            let speed = speed.into_iter().collect::<Result<Vec<_>, _>>()?[0];
            eprintln!("round {round}  {name:24}{speed:8.0} tokens/s");
            speeds[i].push(speed);
        }
    }
    let median = |mut of: Vec<f64>| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    // A ratio a round: what else the machine does changes slowly.
    for (name, of) in names.iter().zip(&speeds) {
        let ratio = of.iter().zip(&speeds[0]).map(|(a, b)| a / b).collect();
        println!("{name:24}{:8.0} tokens/s  {:.2}", median(of.clone()), median(ratio));
    }
    Ok(())
}
