//! Memory of training steps.

use colossal_comm::on_ranks;
use colossal_models::DecoderConfig;
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Batch, Plan, SequenceMode, Trainer};
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
    let batch = batch(4, 17);
    for config in &models {
        for plan in &plans {
            takes_nothing(plan, config, &batch);
        }
    }
}

/// The same where tensors are large enough to be cut from the arena.
#[test]
fn large_tensors_take_nothing_from_the_system_either() {
    let config = DecoderConfig::Llama(LlamaConfig::sized(64, 128, 2, 4));
    for plan in [Plan::default(), Plan { dp: 2, zero: 2, ..Plan::default() }] {
        takes_nothing(&plan, &config, &batch(4, 65));
    }
}

fn batch(sequences: usize, length: usize) -> Batch {
    let tokens: Vec<i32> = (0..sequences * length).map(|i| (i * 7 % 64) as i32).collect();
    Batch::windows(&tokens.chunks(length).collect::<Vec<_>>()).unwrap()
}

fn takes_nothing(plan: &Plan, config: &DecoderConfig, batch: &Batch) {
    let asked = on_ranks(plan.ranks(), |world| {
        let mut trainer = Trainer::new(&world, plan, config, AdamW::default(), 0).unwrap();
        (0..6)
            .map(|_| {
                trainer.step(batch).unwrap();
                memory_stats_of(trainer.model.scope().device()).system_allocations
            })
            .collect::<Vec<_>>()
    });
    for steps in asked {
        assert_eq!(steps[5], steps[2], "{plan:?}: {steps:?}");
    }
}

/// `COLOSSAL_LEAK_STEPS` asks for more of them, in a run of this test alone: then all that the
/// process holds of the device is compared too.
#[test]
fn many_steps_hold_as_much_as_few() {
    let asked = std::env::var("COLOSSAL_LEAK_STEPS").ok().and_then(|n| n.parse().ok());
    let steps: usize = asked.unwrap_or(40);
    let config = DecoderConfig::Llama(LlamaConfig::sized(32, 16, 1, 2));
    let tokens: Vec<i32> = (0..2 * 9).map(|i| i * 7 % 32).collect();
    let windows: Vec<&[i32]> = tokens.chunks(9).collect();
    let batch = Batch::windows(&windows).unwrap();
    // Device buffers on their way beside the computation, and those of plain steps.
    for plan in [
        Plan::default(),
        Plan { sp: 2, sequence_parallel: SequenceMode::RingAttn, ..Plan::default() },
    ] {
        let held = on_ranks(plan.ranks(), |world| {
            let mut trainer = Trainer::new(&world, &plan, &config, AdamW::default(), 0).unwrap();
            let held = |trainer: &Trainer| {
                let device = trainer.model.scope().device();
                let stats = memory_stats_of(device);
                let reserved = device.stream().filter(|_| asked.is_some());
                let reserved = reserved.map_or(0, |stream| stream.device().reserved());
                (stats.in_use, stats.in_use + stats.cached, reserved)
            };
            let mut seen = vec![];
            for step in 0..steps {
                trainer.step(&batch).unwrap();
                world.barrier().unwrap();
                if step == 9 || step + 1 == steps {
                    seen.push(held(&trainer));
                }
            }
            seen
        });
        for seen in held {
            assert_eq!(seen.first(), seen.last(), "{plan:?}");
        }
    }
}
