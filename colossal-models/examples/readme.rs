//! The program of the README: a byte-level LLaMA on four ranks.
#![forbid(unsafe_code)]

use colossal_comm::on_ranks;
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Batch, Plan, SequenceMode, Trainer, save_checkpoint};
use colossal_models::{DecoderConfig, Result};

fn main() -> Result<()> {
    let config = DecoderConfig::Llama(LlamaConfig::sized(256, 128, 4, 4));
    let plan = Plan {
        dp: 2,
        tp: 2,
        sequence_parallel: SequenceMode::SplitGather,
        zero: 2,
        ..Plan::default()
    };
    let ranks = on_ranks(plan.ranks(), |world| {
        let mut trainer = Trainer::new(&world, &plan, &config, AdamW::default(), 0)?;
        let text: Vec<i32> =
            include_bytes!("../../README.md").iter().map(|b| i32::from(*b)).collect();
        for step in 0..100 {
            let windows: Vec<&[i32]> = text.chunks_exact(129).skip(step % 4).take(8).collect();
            let report = trainer.step(&Batch::windows(&windows)?)?;
            if world.rank() == 0 {
                println!(
                    "step {step:3}  loss {:.4}  {:.0} tokens/s",
                    report.loss, report.tokens_per_second
                );
            }
        }
        save_checkpoint(&trainer, "runs/readme".as_ref())
    });
    ranks.into_iter().collect()
}
