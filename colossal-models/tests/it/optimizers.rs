//! Every optimizer under every kind of cut equals one device, and resumes bitwise.

use colossal_comm::on_ranks;
use colossal_models::Group;
use colossal_models::train::{
    LrSchedule, Optimizer, Plan, Precision, Rule, SequenceMode, TensorMode, Trainer,
    load_checkpoint, save_checkpoint,
};

use crate::plans::{batch, close, mixtral, odd_llama, optimizer, train_with};

fn with(rule: Rule) -> Optimizer {
    let lr = match rule {
        Rule::Lars { .. } => 1.0,
        Rule::Lion { .. } => 1e-3,
        _ => 1e-2,
    };
    Optimizer { rule, lr: LrSchedule::constant(lr), ..optimizer().into() }
}

/// The published rules, and Adafactor's learning rate relative to the parameter.
fn rules() -> Vec<Rule> {
    let scaled = Rule::Adafactor { decay_rate: 0.8, scale_parameter: true };
    Rule::ALL.into_iter().chain([scaled]).collect()
}

#[test]
fn every_optimizer_under_every_cut_equals_one_device() {
    let base = Plan { bucket_mib: 1, ..Plan::default() };
    let split = SequenceMode::SplitGather;
    let plans = [
        Plan { dp: 2, ..base.clone() },
        Plan { dp: 2, zero: 1, microbatches: 2, ..base.clone() },
        // Pieces begin and end inside of rows.
        Plan { dp: 4, zero: 2, ..base.clone() },
        Plan { tp: 2, ..base.clone() },
        Plan { dp: 2, tp: 2, zero: 2, sequence_parallel: split, ..base.clone() },
        // More ranks than key heads.
        Plan { tp: 4, dp: 2, zero: 1, ..base.clone() },
        Plan { sequence_parallel: SequenceMode::RingAttn, sp: 2, dp: 2, zero: 1, ..base.clone() },
        Plan { tensor: TensorMode::TwoD, tp: 4, dp: 2, zero: 1, ..base.clone() },
        Plan { tensor: TensorMode::ThreeD, tp: 8, ..base.clone() },
    ];
    let experts =
        [Plan { dp: 2, ep: 2, zero: 1, ..base.clone() }, Plan { ep: 2, tp: 2, ..base.clone() }];
    for (config, plans) in [(odd_llama(), &plans[..]), (mixtral(), &experts[..])] {
        for rule in rules() {
            let one = train_with(&Group::solo(), &Plan::default(), &config, 8, with(rule));
            let first = one.losses[0];
            // CAME divides by how little its steps differ, so it shows rounding enlarged.
            let tolerance = if matches!(rule, Rule::Came { .. }) { 4e-3 } else { 2e-3 };
            assert!(one.losses.iter().any(|l| (l - first).abs() > 1e-3 * first), "{rule:?}");
            for plan in plans {
                let run = |world| train_with(&world, plan, &config, 8, with(rule));
                for outcome in on_ranks(plan.ranks(), run) {
                    let what = |k: &str| format!("{rule:?} {plan:?} {k}");
                    close(&what("losses"), &outcome.losses, &one.losses, 5e-5);
                    for (key, values) in &outcome.weights {
                        close(&what(key), values, &one.weights[key], tolerance);
                    }
                }
            }
        }
    }
}

#[test]
fn every_optimizer_resumes_bitwise_and_under_another_plan() {
    for rule in rules() {
        for precision in [Precision::F32, Precision::Bf16] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("checkpoint-2");
            let plan = Plan { dp: 2, zero: 2, precision, ..Plan::default() };
            let new = |world: &Group, plan: &Plan| {
                Trainer::new(world, plan, &odd_llama(), with(rule), 1).unwrap()
            };
            let loss = |t: &mut Trainer, s| t.step(&batch(s)).unwrap().loss;
            let straight = on_ranks(2, |world| {
                let mut t = new(&world, &plan);
                for step in 0..2 {
                    loss(&mut t, step);
                }
                save_checkpoint(&t, &path).unwrap();
                [2, 3].map(|step| loss(&mut t, step).to_bits())
            });
            let resumed = on_ranks(2, |world| {
                let mut t = new(&world, &plan);
                load_checkpoint(&mut t, &path).unwrap();
                [2, 3].map(|step| loss(&mut t, step).to_bits())
            });
            assert_eq!(resumed, straight, "{rule:?} {precision:?}");
            let other = Plan { tp: 2, precision, ..Plan::default() };
            let other = on_ranks(2, |world| {
                let mut t = new(&world, &other);
                load_checkpoint(&mut t, &path).unwrap();
                loss(&mut t, 2)
            });
            let (got, want) = (other[0], f32::from_bits(straight[0][0]));
            let tolerance = if precision == Precision::F32 { 1e-5 } else { 1e-2 };
            assert!((got - want).abs() <= tolerance * want, "{rule:?} {precision:?}: {got} {want}");
        }
    }
}

#[test]
fn state_of_another_optimizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let new =
        |rule| Trainer::new(&Group::solo(), &Plan::default(), &odd_llama(), with(rule), 1).unwrap();
    let mut lion = new(Rule::LION);
    save_checkpoint(&lion, &path).unwrap();
    let error = load_checkpoint(&mut new(Rule::CAME), &path).unwrap_err().to_string();
    assert!(error.contains("with lion, not came"), "{error}");
    lion.optimizer.rule = Rule::ADAMW;
    let error = lion.step(&batch(0)).unwrap_err().to_string();
    assert!(error.contains("became adamw") && error.contains("state of lion"), "{error}");
    lion.optimizer.rule = Rule::Lion { betas: (0.8, 0.9) };
    assert_eq!(lion.step(&batch(0)).unwrap().step, 1);
}
