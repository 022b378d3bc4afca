//! Memory of training steps.

use colossal_comm::on_ranks;
use colossal_models::DecoderConfig;
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Batch, Plan, Trainer};
use colossal_tensor::storage::memory_stats_of;

/// After warm-up the allocator serves every tensor from what earlier steps gave back.
#[test]
fn a_later_step_takes_nothing_from_the_system() {
    let models = [
        DecoderConfig::Llama(LlamaConfig::sized(64, 32, 2, 4)),
        DecoderConfig::Gpt2(Gpt2Config::sized(64, 32, 2, 4)),
    ];
    let plans = [
        Plan::default(),
        Plan { recompute: true, microbatches: 2, ..Plan::default() },
        Plan { dp: 2, zero: 2, ..Plan::default() },
        Plan { tp: 2, ..Plan::default() },
    ];
    let tokens: Vec<i32> = (0..4 * 17).map(|i| i * 7 % 64).collect();
    let windows: Vec<&[i32]> = tokens.chunks(17).collect();
    let batch = Batch::windows(&windows).unwrap();
    for config in &models {
        for plan in &plans {
            let asked = on_ranks(plan.ranks(), |world| {
                let mut trainer = Trainer::new(&world, plan, config, AdamW::default(), 0).unwrap();
                (0..6)
                    .map(|_| {
                        trainer.step(&batch).unwrap();
                        memory_stats_of(trainer.model.scope().device()).system_allocations
                    })
                    .collect::<Vec<_>>()
            });
            for steps in asked {
                assert_eq!(steps[5], steps[2], "{plan:?}: {steps:?}");
            }
        }
    }
}
