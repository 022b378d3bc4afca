//! A parallel run equals the serial one: loss, every gradient, and the weights after five steps.

use std::collections::BTreeMap;

use colossal_comm::on_ranks;
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, Batch, LrSchedule, Plan, Precision, Trainer, lm_loss};
use colossal_models::{DecoderConfig, Group, hf};
use colossal_tensor::safetensors::Owned;
use colossal_tensor::{Dtype, Tensor, fake};

fn llama() -> DecoderConfig {
    DecoderConfig::Llama(LlamaConfig {
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        ..LlamaConfig::sized(32, 32, 2, 4)
    })
}

fn gpt2() -> DecoderConfig {
    DecoderConfig::Gpt2(Gpt2Config {
        n_positions: 32,
        resid_pdrop: 0.1,
        ..Gpt2Config::sized(32, 32, 2, 4)
    })
}

fn batch(step: i32) -> Batch {
    let row =
        |r: i32| -> Vec<i32> { (0..9).map(|t| (r * 7 + t * (3 + step) + t * t) % 32).collect() };
    let rows: Vec<Vec<i32>> = (0..8).map(row).collect();
    // Unequal lengths and masks: the global token count is not a multiple of anything.
    let mask: Vec<Vec<bool>> = (0..8).map(|r| (0..9).map(|t| (t + r) % 4 != 0).collect()).collect();
    let sequences: Vec<(&[i32], &[bool])> = rows
        .iter()
        .zip(&mask)
        .enumerate()
        .map(|(i, (r, m))| (&r[..9 - i % 3 * 2 % 4], &m[..9 - i % 3 * 2 % 4]))
        .collect();
    Batch::new(&sequences, 0).unwrap()
}

#[derive(Debug)]
struct Outcome {
    losses: Vec<f32>,
    norms: Vec<f32>,
    weights: BTreeMap<String, Vec<f32>>,
}

fn optimizer() -> AdamW {
    AdamW { lr: LrSchedule::constant(1e-2), weight_decay: 0.1, clip: 0.5, ..AdamW::default() }
}

fn floats(map: BTreeMap<String, Owned>) -> BTreeMap<String, Vec<f32>> {
    let read =
        |t: Owned| t.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    map.into_iter().map(|(k, t)| (k, read(t))).collect()
}

fn train(world: &Group, plan: &Plan, config: &DecoderConfig) -> Outcome {
    let mut trainer = Trainer::new(world, plan, config, optimizer(), 3).unwrap();
    let (mut losses, mut norms) = (vec![], vec![]);
    for step in 0..5 {
        let report = trainer.step(&batch(step)).unwrap();
        losses.push(report.loss);
        norms.push(report.grad_norm);
    }
    let weights = hf::gather(&trainer.model, |p| Ok(p.tensor().detach()), Dtype::F32).unwrap();
    Outcome { losses, norms, weights: floats(weights) }
}

fn close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(1e-6);
    let off = a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    assert!(a.len() == b.len() && off <= tolerance, "{what}: {off} > {tolerance}");
}

fn table() -> Vec<Plan> {
    let base = Plan { bucket_mib: 1, ..Plan::default() };
    let p = |dp, tp, sequence_parallel, zero, recompute, microbatches| Plan {
        dp,
        tp,
        sequence_parallel,
        zero,
        recompute,
        microbatches,
        ..base.clone()
    };
    vec![
        p(1, 1, false, 0, true, 1),
        p(1, 1, false, 0, false, 4),
        p(2, 1, false, 0, false, 1),
        p(2, 1, false, 1, false, 2),
        p(2, 1, false, 2, false, 2),
        p(4, 1, false, 2, true, 1),
        p(1, 2, false, 0, false, 1),
        p(1, 2, true, 0, false, 1),
        p(1, 2, true, 1, true, 2),
        p(2, 2, false, 1, false, 1),
        p(2, 2, true, 2, true, 2),
        p(2, 2, true, 0, false, 1),
    ]
}

#[test]
fn every_plan_equals_one_device() {
    for (name, config) in [("llama", llama()), ("gpt2", gpt2())] {
        // Dropout masks follow the microbatch: compare with the same number of them.
        let mut serial = BTreeMap::new();
        for plan in table() {
            let one = serial.entry(plan.microbatches).or_insert_with(|| {
                let alone = Plan { microbatches: plan.microbatches, ..Plan::default() };
                train(&Group::solo(), &alone, &config)
            });
            // Dropout of a data-parallel part is drawn for the part: only LLaMA has none.
            if name == "gpt2" && (plan.dp > 1) {
                continue;
            }
            for outcome in on_ranks(plan.ranks(), |world| train(&world, &plan, &config)) {
                let what = |k: &str| format!("{name} {plan:?} {k}");
                close(&what("losses"), &outcome.losses, &one.losses, 2e-5);
                close(&what("norms"), &outcome.norms, &one.norms, 1e-4);
                for (key, values) in &outcome.weights {
                    close(&what(key), values, &one.weights[key], 1e-3);
                }
            }
        }
    }
}

/// Gradients of one loss, whole, under HF names.
fn gradients(
    world: &Group,
    plan: &Plan,
    config: &DecoderConfig,
) -> (f32, BTreeMap<String, Vec<f32>>) {
    let scope = plan.scope(world).unwrap();
    let mut model = colossal_models::CausalLm::new(&scope, config, 3, Dtype::F32).unwrap();
    model.stack = model.stack.recompute(plan.recompute);
    let mesh = scope.mesh();
    let part = batch(0).part(mesh.coord("dp").unwrap(), plan.dp).unwrap();
    let loss = lm_loss(&model, &part, None).unwrap().scale(0.01).unwrap();
    let mut sum = loss.clone();
    for axis in ["dp", "tp"] {
        if sum.layout()[usize::from(axis == "tp")] == colossal_tensor::Placement::Partial {
            sum = sum.detach().distribute(axis, colossal_tensor::Placement::Invariant).unwrap();
        }
    }
    let grads = loss.backward().unwrap();
    let whole = hf::gather(
        &model,
        |p| {
            let grad = grads.get(p).expect("every parameter has a gradient");
            Tensor::from_slice(p.scope(), grad, p.shape(), p.layout().dual())
        },
        Dtype::F32,
    );
    (sum.item().unwrap(), floats(whole.unwrap()))
}

#[test]
fn every_gradient_of_every_plan_equals_one_device() {
    for (name, config) in [("llama", llama()), ("gpt2", gpt2())] {
        let (loss, one) = gradients(&Group::solo(), &Plan::default(), &config);
        for plan in table() {
            for (parallel_loss, grads) in on_ranks(plan.ranks(), |w| gradients(&w, &plan, &config))
            {
                assert!((parallel_loss - loss).abs() < 1e-5 * loss, "{name} {plan:?}");
                for (key, values) in &grads {
                    close(&format!("{name} {plan:?} {key}"), values, &one[key], 2e-5);
                }
            }
        }
    }
}

#[test]
fn bf16_follows_f32_and_learns() {
    let plan = Plan { precision: Precision::Bf16, dp: 2, zero: 1, ..Plan::default() };
    let one = train(&Group::solo(), &Plan::default(), &llama());
    for outcome in on_ranks(2, |world| train(&world, &plan, &llama())) {
        close("bf16 losses", &outcome.losses, &one.losses, 2e-2);
    }
    let learnt = on_ranks(2, |world| {
        let mut trainer = Trainer::new(&world, &plan, &llama(), optimizer(), 3).unwrap();
        (0..40).map(|_| trainer.step(&batch(0)).unwrap().loss).collect::<Vec<_>>()
    });
    assert!(learnt[0][39] < 0.5 * learnt[0][0], "{:?}", learnt[0]);
}

#[test]
fn plans_that_do_not_fit_say_what_would() {
    let refuse = |plan: Plan, ranks: usize| {
        on_ranks(ranks, |w| {
            Trainer::new(&w, &plan, &llama(), optimizer(), 0).unwrap_err().to_string()
        })
        .remove(0)
    };
    let text = refuse(Plan { dp: 3, ..Plan::default() }, 2);
    assert!(text.contains("dp 3") && text.contains("2 run"), "{text}");
    let text = refuse(Plan { tp: 3, ..Plan::default() }, 3);
    assert!(text.contains("does not divide by the 3 ranks of axis tp"), "{text}");
    let text = refuse(Plan { sequence_parallel: true, ..Plan::default() }, 1);
    assert!(text.contains("sequence_parallel"), "{text}");
    let unknown = toml::from_str::<Plan>("dpp = 2").unwrap_err().to_string();
    assert!(unknown.contains("dpp") && unknown.contains("dp"), "{unknown}");
}

#[test]
fn layouts_of_published_sizes_hold_on_a_thousand_pretended_ranks() {
    let config = DecoderConfig::Llama(LlamaConfig {
        intermediate_size: 28672,
        num_key_value_heads: 8,
        ..LlamaConfig::sized(128_256, 8192, 80, 64)
    });
    let plan = Plan { dp: 128, tp: 8, sequence_parallel: true, ..Plan::default() };
    let report = fake::check(&plan.axes(), plan.sharding(), Dtype::Bf16, |params| {
        let stack = colossal_tensor::Stack::build::<colossal_models::Decoder>(params, &config)?;
        let tokens = colossal_models::Tokens::new(params.scope(), &[0; 16], 16)?;
        let targets = tokens.ids.clone();
        stack.forward(&std::sync::Arc::new(tokens))?.cross_entropy(&targets)?.sum()
    })
    .unwrap();
    assert_eq!(report.global_elements, 70_553_706_496);
    // All matrices are cut in eight; the norms (161 x 8192) are whole.
    assert_eq!(report.local_elements, (70_553_706_496 - 161 * 8192) / 8 + 161 * 8192);
}
