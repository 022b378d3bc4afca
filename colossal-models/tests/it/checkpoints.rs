//! Resume is bitwise; a folder round-trips; damage is refused and loses nothing.

use std::path::Path;

use colossal_comm::on_ranks;
use colossal_models::llama::LlamaConfig;
use colossal_models::mixtral::MixtralConfig;
use colossal_models::train::{
    AdamW, Batch, Plan, Precision, Trainer, load_checkpoint, save_checkpoint,
};
use colossal_models::{DecoderConfig, Dtype, Group, Scope, hf};

use crate::goldens::folder;

fn config() -> DecoderConfig {
    DecoderConfig::Llama(LlamaConfig::sized(33, 32, 2, 4))
}

fn batch(step: usize) -> Batch {
    let rows: Vec<Vec<i32>> =
        (0..4).map(|r| (0..9).map(|t| ((r * 5 + t * (step + 2)) % 32) as i32).collect()).collect();
    Batch::windows(&rows.iter().map(|r| &r[..]).collect::<Vec<_>>()).unwrap()
}

#[test]
fn a_resumed_run_is_bitwise_the_uninterrupted_one() {
    for precision in [Precision::F32, Precision::Bf16] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint-3");
        let plan = Plan { dp: 2, zero: 2, precision, ..Plan::default() };
        let new =
            |world: &Group| Trainer::new(world, &plan, &config(), AdamW::default(), 1).unwrap();
        let straight = on_ranks(2, |world| {
            let mut t = new(&world);
            (0..6).map(|s| t.step(&batch(s)).unwrap().loss.to_bits()).collect::<Vec<_>>()
        });
        on_ranks(2, |world| {
            let mut t = new(&world);
            for step in 0..3 {
                t.step(&batch(step)).unwrap();
            }
            save_checkpoint(&t, &path).unwrap();
        });
        let resumed = on_ranks(2, |world| {
            let mut t = new(&world);
            load_checkpoint(&mut t, &path).unwrap();
            assert_eq!(t.steps(), 3);
            (3..6).map(|s| t.step(&batch(s)).unwrap().loss.to_bits()).collect::<Vec<_>>()
        });
        assert_eq!(resumed[0], straight[0][3..], "{precision:?}");
        assert_eq!(resumed[1], straight[1][3..], "{precision:?}");
    }
}

/// Written under one plan, read under another, written again: the same bytes.
#[test]
fn a_checkpoint_of_any_plan_loads_under_any_other_bitwise() {
    use colossal_models::train::{SequenceMode, TensorMode};
    let base = Plan::default();
    let plans = [
        base.clone(),
        Plan { dp: 2, zero: 2, bucket_mib: 1, ..base.clone() },
        Plan { dp: 2, tp: 2, zero: 1, ..base.clone() },
        Plan { tp: 4, sequence_parallel: SequenceMode::SplitGather, ..base.clone() },
        Plan { tensor: TensorMode::TwoD, tp: 4, ..base.clone() },
        Plan { tensor: TensorMode::TwoAndAHalfD, tp: 8, depth: 2, ..base.clone() },
        Plan { tensor: TensorMode::ThreeD, tp: 8, ..base.clone() },
        Plan { sequence_parallel: SequenceMode::RingAttn, sp: 2, dp: 2, zero: 2, ..base.clone() },
        Plan { dp: 2, ep: 2, zero: 1, ..base },
    ];
    let DecoderConfig::Llama(llama) = config() else { unreachable!("config() is one") };
    // The bias of its routers is held in f32 whatever the precision.
    let mixtral = DecoderConfig::Mixtral(MixtralConfig {
        router_bias_update_rate: 0.001,
        ..MixtralConfig::sized(llama, 4)
    });
    for precision in [Precision::F32, Precision::Bf16] {
        for (i, plan) in plans.iter().enumerate() {
            let config = if plan.ep > 1 { &mixtral } else { &config() };
            let next = if plan.ep > 1 { &plans[1] } else { &plans[(i + 1) % (plans.len() - 1)] };
            let plan = Plan { precision, ..plan.clone() };
            let next = Plan { precision, ..next.clone() };
            let dir = tempfile::tempdir().unwrap();
            let (first, second) = (dir.path().join("first"), dir.path().join("second"));
            let new = |world: &Group, plan: &Plan| {
                Trainer::new(world, plan, config, AdamW::default(), 1).unwrap()
            };
            let losses = on_ranks(plan.ranks(), |world| {
                let mut t = new(&world, &plan);
                for step in 0..2 {
                    t.step(&batch(step)).unwrap();
                }
                save_checkpoint(&t, &first).unwrap();
                t.step(&batch(2)).unwrap().loss
            });
            let again = on_ranks(next.ranks(), |world| {
                let mut t = new(&world, &next);
                load_checkpoint(&mut t, &first).unwrap();
                save_checkpoint(&t, &second).unwrap();
                t.step(&batch(2)).unwrap().loss
            });
            for file in ["model.safetensors", "optimizer.safetensors"] {
                let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
                assert!(read(&first) == read(&second), "{plan:?} to {next:?}: {file}");
            }
            let tolerance = if precision == Precision::F32 { 1e-5 } else { 1e-2 };
            let off = (losses[0] - again[0]).abs();
            assert!(off <= tolerance * losses[0], "{plan:?} to {next:?}: {off}");
        }
    }
}

#[test]
fn published_folders_round_trip_whole_and_in_shards() {
    for name in ["llama", "llama3", "gpt2", "mixtral"] {
        // Each over the other form with other values: what was there must not be read.
        let dir = tempfile::tempdir().unwrap();
        for (scale, shard) in [(1.0, 1 << 30), (2.0, 9000), (3.0, 1 << 30)] {
            let model = hf::load(&folder(name), &Scope::solo(), Dtype::F32, None).unwrap();
            for p in model.params.all() {
                let values: Vec<f32> = p.to_vec().unwrap().iter().map(|x| x * scale).collect();
                p.set(&values).unwrap();
            }
            hf::save(&model, dir.path(), shard).unwrap();
            assert_eq!(dir.path().join("model.safetensors").exists(), shard > 9000);
            let again = hf::load(dir.path(), &Scope::solo(), Dtype::F32, None).unwrap();
            assert_eq!(again.config, model.config, "{name}");
            for (a, b) in model.params.all().iter().zip(again.params.all()) {
                assert_eq!(a.to_vec().unwrap(), b.to_vec().unwrap(), "{name} {}", a.name());
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn damaged_folders_are_refused_with_the_file_and_the_key() {
    let refuse = |change: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        copy(&folder("llama"), dir.path());
        change(dir.path());
        hf::load(dir.path(), &Scope::solo(), Dtype::F32, None).unwrap_err().to_string()
    };
    let edit = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let path = dir.join("config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from), "{from}");
            std::fs::write(path, text.replace(from, to)).unwrap();
        }
    };
    let truncated = refuse(&|dir| {
        let path = dir.join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    });
    assert!(truncated.contains("model.safetensors") && truncated.contains("whole"), "{truncated}");
    let missing = refuse(&edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"));
    assert!(missing.contains("model.layers.2.") && missing.contains("missing"), "{missing}");
    let shape = refuse(&edit("\"intermediate_size\": 50", "\"intermediate_size\": 52"));
    assert!(shape.contains("[50, 36]") && shape.contains("[52, 36]"), "{shape}");
    let extra = refuse(&edit("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"));
    assert!(extra.contains("model.layers.1.") && extra.contains("no use"), "{extra}");
    let family = refuse(&edit("\"model_type\": \"llama\"", "\"model_type\": \"lama\""));
    assert!(family.contains("lama") && family.contains("knows llama"), "{family}");
    let key = refuse(&edit("\"vocab_size\"", "\"vocabulary\""));
    assert!(key.contains("config.json") && key.contains("vocab_size"), "{key}");
}

#[test]
fn a_failed_save_leaves_the_older_checkpoint_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let mut t =
        Trainer::new(&Group::solo(), &Plan::default(), &config(), AdamW::default(), 1).unwrap();
    save_checkpoint(&t, &path).unwrap();
    let before = std::fs::read(path.join("model.safetensors")).unwrap();
    t.step(&batch(0)).unwrap();
    // The draft's name is taken by a file: the folder cannot be written.
    std::fs::write(dir.path().join(".checkpoint.partial"), b"in the way").unwrap();
    assert!(save_checkpoint(&t, &path).is_err());
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), before);
}

#[test]
fn a_loss_that_is_not_finite_leaves_the_parameters_alone() {
    let mut t =
        Trainer::new(&Group::solo(), &Plan::default(), &config(), AdamW::default(), 1).unwrap();
    let before: Vec<_> = t.model.params.all().iter().map(|p| p.to_vec().unwrap()).collect();
    let error = t
        .train(1, 1, |model, _| {
            let tokens = colossal_models::Tokens::new(model.scope(), &[1, 2], 2)?;
            model.forward(tokens)?.sum()?.scale(f32::NAN)
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains("not finite") && error.contains("learning rate"), "{error}");
    let after: Vec<_> = t.model.params.all().iter().map(|p| p.to_vec().unwrap()).collect();
    assert_eq!(before, after);
    assert!(t.step(&batch(0)).unwrap().loss.is_finite());
}
