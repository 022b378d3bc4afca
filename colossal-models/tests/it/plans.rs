//! A parallel run equals the serial one: loss, every gradient, and the weights after five steps.

use std::collections::BTreeMap;

use colossal_comm::on_ranks;
use colossal_models::generate::{Sampling, generate};
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::mixtral::MixtralConfig;
use colossal_models::train::{
    AdamW, Batch, Fp8, LrSchedule, Optimizer, Plan, Precision, SequenceMode, TensorMode, Trainer,
    lm_loss,
};
use colossal_models::{CausalLm, Decoder, DecoderConfig, Group, Scope, Tokens, Training, hf};
use colossal_tensor::moe::Balance;
use colossal_tensor::random::Stream;
use colossal_tensor::safetensors::Owned;
use colossal_tensor::storage::{memory_stats_of, reset_peak};
use colossal_tensor::{Dim, Dtype, Stack, Tensor, fake};

pub(crate) fn llama() -> DecoderConfig {
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

pub(crate) fn batch(step: i32) -> Batch {
    batch_of(8, step)
}

fn batch_of(rows: i32, step: i32) -> Batch {
    let row =
        |r: i32| -> Vec<i32> { (0..9).map(|t| (r * 7 + t * (3 + step) + t * t) % 32).collect() };
    let rows: Vec<Vec<i32>> = (0..rows).map(row).collect();
    // Unequal lengths and masks: the global token count is not a multiple of anything.
    let mask: Vec<Vec<bool>> =
        (0..rows.len()).map(|r| (0..9).map(|t| (t + r) % 4 != 0).collect()).collect();
    let sequences: Vec<(&[i32], &[bool])> = rows
        .iter()
        .zip(&mask)
        .enumerate()
        .map(|(i, (r, m))| (&r[..9 - i % 3 * 2 % 4], &m[..9 - i % 3 * 2 % 4]))
        .collect();
    Batch::new(&sequences, 0).unwrap()
}

#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) losses: Vec<f32>,
    auxiliary: Vec<f32>,
    norms: Vec<f32>,
    pub(crate) weights: BTreeMap<String, Vec<f32>>,
}

pub(crate) fn optimizer() -> AdamW {
    AdamW { lr: LrSchedule::constant(1e-2), weight_decay: 0.1, clip: 0.5, ..AdamW::default() }
}

fn floats(map: BTreeMap<String, Owned>) -> BTreeMap<String, Vec<f32>> {
    let read =
        |t: Owned| t.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    map.into_iter().map(|(k, t)| (k, read(t))).collect()
}

fn train(world: &Group, plan: &Plan, config: &DecoderConfig, rows: i32) -> Outcome {
    train_with(world, plan, config, rows, optimizer())
}

pub(crate) fn train_with(
    world: &Group,
    plan: &Plan,
    config: &DecoderConfig,
    rows: i32,
    optimizer: impl Into<Optimizer>,
) -> Outcome {
    let mut trainer = Trainer::new(world, plan, config, optimizer, 3).unwrap();
    let (mut losses, mut auxiliary, mut norms) = (vec![], vec![], vec![]);
    for step in 0..5 {
        let report = trainer.step(&batch_of(rows, step)).unwrap();
        losses.push(report.loss);
        auxiliary.push(report.auxiliary_loss);
        norms.push(report.grad_norm);
    }
    let weights = hf::gather(&trainer.model, |p| Ok(p.tensor().detach()), Dtype::F32).unwrap();
    // What fills up a vocabulary has learnt nothing.
    for p in trainer.model.params.all().iter().filter(|p| matches!(p.dims()[0], Dim::Vocab(_))) {
        assert!(p.to_vec().unwrap()[p.real_len()..].iter().all(|x| *x == 0.0), "{}", p.name());
    }
    Outcome { losses, auxiliary, norms, weights: floats(weights) }
}

pub(crate) fn close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    let largest = b.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(1e-6);
    let off = a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    assert!(a.len() == b.len() && off <= tolerance, "{what}: {off} > {tolerance}");
}

fn table() -> Vec<Plan> {
    use SequenceMode::{AllToAll, Ring, RingAttn, SplitGather, Usp};
    use TensorMode::{ThreeD, TwoAndAHalfD, TwoD};
    let base = Plan { bucket_mib: 1, ..Plan::default() };
    let p = |dp, tp, sequence_parallel, zero, recompute, microbatches| Plan {
        dp,
        tp,
        sequence_parallel: if sequence_parallel { SplitGather } else { SequenceMode::None },
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
        // More ranks than LLaMA has key heads.
        p(1, 4, false, 0, false, 1),
        p(1, 4, true, 1, false, 2),
        context(Ring, 1, p(1, 2, false, 0, false, 1)),
        context(Ring, 1, p(2, 2, false, 2, true, 2)),
        context(AllToAll, 2, base.clone()),
        context(AllToAll, 4, base.clone()),
        context(AllToAll, 2, p(1, 2, false, 0, true, 1)),
        context(RingAttn, 2, base.clone()),
        context(RingAttn, 3, base.clone()),
        context(RingAttn, 4, p(1, 1, false, 0, true, 2)),
        context(RingAttn, 2, p(2, 2, false, 1, false, 1)),
        context(Usp, 4, Plan { ulysses: 2, ..base.clone() }),
        context(RingAttn, 4, Plan { inner_ring: 2, ..base.clone() }),
        context(Usp, 8, Plan { ulysses: 2, inner_ring: 2, ..base.clone() }),
        grid(TwoD, 4, 1, base.clone()),
        grid(TwoD, 4, 1, p(2, 1, false, 1, true, 2)),
        grid(TwoAndAHalfD, 8, 2, base.clone()),
        grid(ThreeD, 8, 1, base.clone()),
        grid(ThreeD, 8, 1, p(1, 1, false, 0, true, 2)),
    ]
}

fn context(mode: SequenceMode, sp: usize, plan: Plan) -> Plan {
    Plan { sequence_parallel: mode, sp, ..plan }
}

fn grid(tensor: TensorMode, tp: usize, depth: usize, plan: Plan) -> Plan {
    Plan { tensor, tp, depth, ..plan }
}

/// Gradients of one loss, whole, under HF names.
fn gradients(
    world: &Group,
    plan: &Plan,
    config: &DecoderConfig,
    rows: i32,
) -> (f32, BTreeMap<String, Vec<f32>>) {
    let scope = plan.scope(world).unwrap();
    let mut model = colossal_models::CausalLm::new(&scope, config, 3, Dtype::F32).unwrap();
    model.stack = model.stack.recompute(plan.recompute);
    let mesh = scope.mesh();
    let (part, parts) = scope.batch_part();
    let part = batch_of(rows, 0).part(part, parts).unwrap();
    let training =
        Training { dropout: Stream::new(5, 0), first_row: 0, balance: Balance::new(1.0) };
    let part = part.padded_to(part.seq.next_multiple_of(scope.sequence_multiple()));
    let lengths = part.lengths.clone();
    let mut tokens = Tokens::padded(&scope, &part.ids, part.seq, lengths).unwrap();
    tokens.training = Some(training);
    // Ranks take three rows of logits at a time, one device all.
    let rows = (plan.ranks() > 1).then_some(3);
    let loss = model.loss(tokens, &part.targets, 0.1, rows).unwrap().scale(0.1).unwrap();
    let mut sum = loss.clone();
    for (i, (axis, _)) in mesh.axes().iter().enumerate() {
        if sum.layout()[i] == colossal_tensor::Placement::Partial {
            sum = sum.detach().distribute(axis, colossal_tensor::Placement::Invariant).unwrap();
        }
    }
    let grads = loss.backward().unwrap();
    let whole = hf::gather(
        &model,
        |p| {
            if !p.is_trainable() {
                return Ok(p.tensor().detach());
            }
            let grad = grads.get(p).expect("every parameter has a gradient");
            Tensor::from_slice(p.scope(), grad, p.shape(), p.layout().dual())
        },
        Dtype::F32,
    );
    (sum.item().unwrap(), floats(whole.unwrap()))
}

/// Five steps and one gradient under a plan, against those of one device.
fn equal(
    name: &str,
    plan: &Plan,
    config: &DecoderConfig,
    rows: i32,
    whole: &Outcome,
    (loss, one): &(f32, BTreeMap<String, Vec<f32>>),
) {
    let what = |key: &str| format!("{name} {plan:?} {key}");
    for outcome in on_ranks(plan.ranks(), |world| train(&world, plan, config, rows)) {
        close(&what("losses"), &outcome.losses, &whole.losses, 2e-5);
        close(&what("auxiliary"), &outcome.auxiliary, &whole.auxiliary, 2e-5);
        close(&what("norms"), &outcome.norms, &whole.norms, 1e-4);
        assert_eq!(outcome.weights.len(), whole.weights.len());
        // A key bias has no true gradient: AdamW makes steps of its rounding noise, as of small gradients'.
        for (key, values) in &outcome.weights {
            close(&what(key), values, &whole.weights[key], 4e-3);
        }
    }
    for (parallel_loss, grads) in on_ranks(plan.ranks(), |w| gradients(&w, plan, config, rows)) {
        assert!((parallel_loss - loss).abs() < 1e-5 * loss, "{}", what("loss"));
        assert_eq!(grads.len(), one.len());
        for (key, values) in &grads {
            close(&what(key), values, &one[key], 2e-5);
        }
    }
}

#[test]
fn every_plan_equals_one_device() {
    for (name, config) in [("llama", llama()), ("gpt2", gpt2())] {
        // GPT-2 trains with dropout: its masks depend on sequence, token and width only.
        let whole = train(&Group::solo(), &Plan::default(), &config, 8);
        let one = gradients(&Group::solo(), &Plan::default(), &config, 8);
        for plan in table() {
            equal(name, &plan, &config, 8, &whole, &one);
        }
    }
}

/// A model whose dims divide by three as well.
fn thirds(name: &str) -> DecoderConfig {
    let base = LlamaConfig {
        num_key_value_heads: 6,
        max_position_embeddings: 32,
        intermediate_size: 48,
        ..LlamaConfig::sized(36, 24, 2, 6)
    };
    match name {
        "gpt2" => DecoderConfig::Gpt2(Gpt2Config {
            n_positions: 32,
            resid_pdrop: 0.1,
            ..Gpt2Config::sized(36, 24, 2, 6)
        }),
        "mixtral" => DecoderConfig::Mixtral(MixtralConfig {
            router_aux_loss_coef: 0.05,
            ..MixtralConfig::sized(LlamaConfig { intermediate_size: 24, ..base }, 6)
        }),
        _ => DecoderConfig::Llama(base),
    }
}

#[test]
fn grids_of_nine_and_twelve_ranks_equal_one_device() {
    for name in ["llama", "gpt2", "mixtral"] {
        let config = thirds(name);
        let whole = train(&Group::solo(), &Plan::default(), &config, 6);
        let one = gradients(&Group::solo(), &Plan::default(), &config, 6);
        for (tensor, tp, depth) in [(TensorMode::TwoD, 9, 1), (TensorMode::TwoAndAHalfD, 12, 3)] {
            let plan = grid(tensor, tp, depth, Plan::default());
            equal(&format!("{name} {tensor:?} on {tp}"), &plan, &config, 6, &whole, &one);
        }
    }
}

pub(crate) fn mixtral() -> DecoderConfig {
    let DecoderConfig::Llama(base) = llama() else { unreachable!("llama() is one") };
    DecoderConfig::Mixtral(MixtralConfig {
        router_aux_loss_coef: 0.05,
        router_z_loss_coef: 0.02,
        router_bias_update_rate: 0.01,
        ..MixtralConfig::sized(LlamaConfig { intermediate_size: 24, ..base }, 4)
    })
}

#[test]
fn every_plan_of_a_mixture_of_experts_equals_one_device() {
    use SequenceMode::{AllToAll, Ring, RingAttn, SplitGather, Usp};
    let p = |dp, ep, tp, zero| Plan { dp, ep, tp, zero, bucket_mib: 1, ..Plan::default() };
    let plans = [
        p(1, 2, 1, 0),
        p(1, 4, 1, 0),
        p(2, 1, 1, 1),
        p(2, 2, 1, 2),
        p(1, 1, 2, 0),
        p(1, 2, 2, 0),
        Plan { recompute: true, ..p(1, 2, 1, 0) },
        context(SplitGather, 1, p(1, 2, 2, 0)),
        context(AllToAll, 2, p(1, 2, 1, 0)),
        context(RingAttn, 2, p(1, 2, 2, 0)),
        // Padded to twelve tokens: padding has no part in the balance.
        context(RingAttn, 3, p(1, 1, 1, 0)),
        context(Usp, 4, Plan { ulysses: 2, ..p(2, 1, 1, 1) }),
        context(Ring, 1, p(1, 1, 2, 0)),
        context(Ring, 1, p(2, 2, 2, 2)),
        context(Ring, 1, Plan { recompute: true, ..p(1, 2, 2, 0) }),
        // tp x sp x dp x ep
        context(AllToAll, 2, p(2, 2, 2, 1)),
        context(RingAttn, 2, p(2, 2, 2, 2)),
        grid(TensorMode::TwoD, 4, 1, p(1, 1, 1, 0)),
        grid(TensorMode::TwoD, 4, 1, Plan { recompute: true, ..p(2, 1, 1, 1) }),
        grid(TensorMode::TwoAndAHalfD, 8, 2, p(1, 1, 1, 0)),
        grid(TensorMode::ThreeD, 8, 1, p(1, 1, 1, 0)),
    ];
    let config = mixtral();
    let whole = train(&Group::solo(), &Plan::default(), &config, 8);
    let one = gradients(&Group::solo(), &Plan::default(), &config, 8);
    for plan in plans {
        equal("mixtral", &plan, &config, 8, &whole, &one);
    }
}

/// ColossalAI's experts force ZeRO-1 (W17): here stage 2, and a rank whose experts get no token.
#[test]
fn w17_experts_train_under_zero_2_when_a_rank_gets_no_token() {
    let config = mixtral();
    let run = |world: &Group, plan: &Plan| {
        let mut trainer = Trainer::new(world, plan, &config, optimizer(), 3).unwrap();
        for param in trainer.model.params.all() {
            if param.name().ends_with("block_sparse_moe.gate.weight") {
                // Equal logits: everybody chooses experts 0 and 1, which the first rank has.
                param.set(&vec![0.0; param.len()]).unwrap();
            }
        }
        (0..2).map(|step| trainer.step(&batch(step)).unwrap().loss).collect::<Vec<_>>()
    };
    let one = run(&Group::solo(), &Plan::default());
    let plan = Plan { dp: 2, ep: 2, zero: 2, bucket_mib: 1, ..Plan::default() };
    for losses in on_ranks(4, |world| run(&world, &plan)) {
        close("losses", &losses, &one, 1e-5);
    }
}

/// ColossalAI's `ring` mode has the right loss and wrong weight gradients at every size (W01).
#[test]
fn w01_every_sequence_mode_has_the_gradients_of_one_device_at_two_to_eight_ranks() {
    use SequenceMode::{AllToAll, Ring, RingAttn, SplitGather};
    for ranks in 2..=8 {
        let config = DecoderConfig::Llama(LlamaConfig {
            intermediate_size: 3 * ranks,
            max_position_embeddings: 64,
            ..LlamaConfig::sized(32usize.next_multiple_of(ranks), 4 * ranks, 1, ranks)
        });
        let (loss, one) = gradients(&Group::solo(), &Plan::default(), &config, 8);
        for mode in [SplitGather, Ring, AllToAll, RingAttn] {
            let plan = match mode {
                SplitGather | Ring => context(mode, 1, Plan { tp: ranks, ..Plan::default() }),
                _ => context(mode, ranks, Plan::default()),
            };
            for (parallel_loss, grads) in on_ranks(ranks, |w| gradients(&w, &plan, &config, 8)) {
                assert!((parallel_loss - loss).abs() < 1e-5 * loss, "{mode:?} on {ranks}");
                for (key, values) in &grads {
                    close(&format!("{mode:?} on {ranks} {key}"), values, &one[key], 2e-5);
                }
            }
        }
    }
}

#[test]
fn bf16_follows_f32_and_learns() {
    let plan = Plan { precision: Precision::Bf16, dp: 2, zero: 1, ..Plan::default() };
    let one = train(&Group::solo(), &Plan::default(), &llama(), 8);
    for outcome in on_ranks(2, |world| train(&world, &plan, &llama(), 8)) {
        close("bf16 losses", &outcome.losses, &one.losses, 2e-2);
    }
    let learnt = on_ranks(2, |world| {
        let mut trainer = Trainer::new(&world, &plan, &llama(), optimizer(), 3).unwrap();
        (0..40).map(|_| trainer.step(&batch(0)).unwrap().loss).collect::<Vec<_>>()
    });
    assert!(learnt[0][39] < 0.5 * learnt[0][0], "{:?}", learnt[0]);
}

/// Losses in fp8 are within 1 % of those in bf16, under tensor parallelism (whose scales are of the parts)
/// as on one rank.
fn follows_in_fp8(config: &DecoderConfig, plans: &[Plan]) {
    let bf16 = Plan { precision: Precision::Bf16, ..Plan::default() };
    let one = train(&Group::solo(), &bf16, config, 8);
    for plan in plans {
        let plan = Plan { precision: Precision::Bf16, ..plan.clone() };
        for outcome in on_ranks(plan.ranks(), |w| train(&w, &plan, config, 8)) {
            assert_ne!(outcome.losses, one.losses);
            close(&format!("losses in fp8 = {:?}", plan.fp8), &outcome.losses, &one.losses, 1e-2);
        }
    }
}

#[test]
fn fp8_follows_bf16() {
    let sequence_parallel = SequenceMode::SplitGather;
    let plan = Plan { fp8: Fp8::Tensor, tp: 2, sequence_parallel, ..Plan::default() };
    follows_in_fp8(&llama(), &[plan, Plan { fp8: Fp8::Block, ..Plan::default() }]);
}

#[test]
fn every_model_follows_bf16_in_fp8_and_learns() {
    for fp8 in [Fp8::Tensor, Fp8::Block] {
        let plan = Plan { fp8, ..Plan::default() };
        let plans = [
            plan.clone(),
            Plan { tp: 2, ..plan.clone() },
            Plan { dp: 2, zero: 2, recompute: true, ..plan.clone() },
        ];
        [llama(), gpt2(), mixtral()].iter().for_each(|config| follows_in_fp8(config, &plans));
        let plan = Plan { precision: Precision::Bf16, ..plan };
        let group = Group::solo();
        let mut trainer = Trainer::new(&group, &plan, &llama(), optimizer(), 3).unwrap();
        let losses: Vec<f32> = (0..40).map(|_| trainer.step(&batch(0)).unwrap().loss).collect();
        assert!(losses[39] < 0.1 * losses[0], "{fp8:?}: {losses:?}");
    }
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
    let text = refuse(context(SequenceMode::SplitGather, 1, Plan::default()), 1);
    assert!(text.contains("sequence_parallel"), "{text}");
    let text = refuse(grid(TensorMode::TwoD, 4, 1, Plan { fp8: Fp8::Block, ..Plan::default() }), 4);
    assert!(text.contains("fp8") && text.contains("1d"), "{text}");
    let ring = Plan { fp8: Fp8::Tensor, tp: 2, ..Plan::default() };
    let text = refuse(Plan { sequence_parallel: SequenceMode::Ring, ..ring }, 2);
    assert!(text.contains("fp8") && text.contains("split_gather"), "{text}");
    let unknown = toml::from_str::<Plan>("dpp = 2").unwrap_err().to_string();
    assert!(unknown.contains("dpp") && unknown.contains("dp"), "{unknown}");
}

/// ColossalAI changes a mode that a model lacks for another one, with a warning (W03).
#[test]
fn w03_a_sequence_mode_is_never_changed_for_another() {
    let refuse = |text: &str, words: &[&str]| {
        let error = toml::from_str::<Plan>(text).unwrap().validate().unwrap_err().to_string();
        assert!(words.iter().all(|w| error.contains(w)), "{text}: {error}");
    };
    refuse("sequence_parallel = 'ring_attn'", &["ring_attn", "raise sp"]);
    refuse("sequence_parallel = 'all_to_all'\nsp = 2\ntp = 4\ntensor = '2d'", &["1d"]);
    refuse("sequence_parallel = 'split_gather'\nsp = 2\ntp = 2", &["sp = 2", "all_to_all"]);
    refuse("sequence_parallel = 'usp'\nsp = 4\nulysses = 3", &["ulysses = 3", "divide"]);
    refuse("sequence_parallel = 'ring_attn'\nsp = 4\ninner_ring = 3", &["inner_ring = 3"]);
    refuse("tp = 6\ntensor = '2d'", &["a square"]);
    refuse("tp = 4\ntensor = '3d'", &["a cube"]);
    let unknown = toml::from_str::<Plan>("sequence_parallel = 'rings'").unwrap_err().to_string();
    for mode in ["split_gather", "ring", "all_to_all", "ring_attn", "usp"] {
        assert!(unknown.contains(mode), "{unknown}");
    }
}

/// What a pretended mesh says is sent and held, against counters and allocator of the real run.
#[test]
fn pretended_bytes_of_every_plan_equal_the_counters() {
    let mut cases = vec![];
    for plan in table() {
        cases.push(("llama", llama(), plan.clone()));
        cases.push(("gpt2", gpt2(), plan));
    }
    cases.push(("mixtral", mixtral(), Plan { dp: 2, tp: 2, ..Plan::default() }));
    for plan in
        table().into_iter().filter(|p| p.tensor == TensorMode::OneD && p.sp == 1 || p.dp > 1)
    {
        // Vocabularies that the ranks do not divide.
        cases.push(("llama of 33", odd_llama(), plan));
    }
    for (name, config, plan) in cases {
        let loss = |model: CausalLm, scope: &Scope| {
            let (part, parts) = scope.batch_part();
            let model = CausalLm { stack: model.stack.recompute(plan.recompute), ..model };
            lm_loss(&model, &batch(0).part(part, parts)?, None, 1.0)
        };
        let report = fake::check(&plan.axes(), plan.sharding(), Dtype::F32, |params| {
            let stack = Stack::build::<Decoder>(params, &config)?;
            let model = CausalLm { config: config.clone(), stack, params: params.clone() };
            loss(model, params.scope())
        })
        .unwrap();
        let measured = on_ranks(plan.ranks(), |world| {
            let scope = plan.scope(&world).unwrap();
            let sent = || -> Vec<usize> {
                let axes = scope.mesh().axes().iter();
                let groups = axes.map(|(axis, _)| scope.mesh().group(axis).unwrap());
                groups.map(|g| g.counters().bytes() as usize).collect()
            };
            let model = CausalLm::new(&scope, &config, 3, Dtype::F32).unwrap();
            // Rotary tables come to a GPU with the first pass.
            let again = CausalLm::new(&scope, &config, 3, Dtype::F32).unwrap();
            drop(loss(again, &scope).unwrap());
            let (start, base) = (sent(), memory_stats_of(scope.device()).in_use);
            let loss = loss(model, &scope).unwrap();
            let (middle, held) = (sent(), memory_stats_of(scope.device()).in_use - base);
            loss.backward().unwrap();
            let end = sent();
            let both = start.iter().zip(&middle).zip(&end);
            (both.map(|((a, b), c)| (b - a, c - b)).collect::<Vec<_>>(), held)
        });
        for (sent, held) in measured {
            for ((axis, _), sent) in plan.axes().iter().zip(sent) {
                assert_eq!(report.sent(axis), sent, "{name} {plan:?} along {axis}");
            }
            // Small tensors are rounded up, and sums of rows are not in the account.
            let off = held as f64 / report.activation_bytes as f64;
            assert!((0.9..1.4).contains(&off), "{name} {plan:?} holds {off} of what is planned");
        }
    }
}

#[test]
fn ring_attention_holds_a_quarter_of_the_activations_of_32k_tokens_on_four_ranks() {
    let config = DecoderConfig::Llama(LlamaConfig {
        max_position_embeddings: 32_768,
        ..LlamaConfig::sized(64, 64, 2, 4)
    });
    let held = |plan: Plan| {
        let report = fake::check(&plan.axes(), plan.sharding(), Dtype::F32, |params| {
            let stack = Stack::build::<Decoder>(params, &config)?;
            let model = CausalLm { config: config.clone(), stack, params: params.clone() };
            let window = vec![0; 32_769];
            lm_loss(&model, &Batch::windows(&[&window])?, None, 1.0)
        });
        report.unwrap().activation_bytes as f64
    };
    let serial = held(Plan::default());
    for plan in [
        context(SequenceMode::RingAttn, 4, Plan::default()),
        context(SequenceMode::AllToAll, 4, Plan::default()),
        context(SequenceMode::Usp, 4, Plan { ulysses: 2, ..Plan::default() }),
    ] {
        let ratio = held(plan.clone()) / (serial / 4.0);
        assert!((0.9..1.1).contains(&ratio), "{plan:?} holds {ratio} of a quarter");
    }
    let text = Plan { sp: 2, sequence_parallel: SequenceMode::RingAttn, ..Plan::default() }
        .whole_sequences("ppo")
        .unwrap_err()
        .to_string();
    assert!(text.contains("ppo") && text.contains("split_gather"), "{text}");
}

/// As above, run: what allocators count after the forward pass, and at most in a whole step.
#[test]
fn ring_attention_runs_32k_tokens_on_four_ranks_in_a_quarter_of_the_memory() {
    let tokens = 32_768;
    let config = DecoderConfig::Llama(LlamaConfig {
        num_key_value_heads: 1,
        max_position_embeddings: tokens,
        ..LlamaConfig::sized(32, 16, 1, 1)
    });
    let window: Vec<i32> = (0..=tokens as i32).map(|t| t * t % 31).collect();
    let batch = Batch::windows(&[&window]).unwrap();
    let measure = |world: &Group, plan: &Plan| {
        let scope = plan.scope(world).unwrap();
        let model = CausalLm::new(&scope, &config, 3, Dtype::F32).unwrap();
        reset_peak();
        let base = memory_stats_of(scope.device()).in_use;
        let loss = lm_loss(&model, &batch, None, 1.0).unwrap();
        let held = memory_stats_of(scope.device()).in_use - base;
        let value = loss.to_vec().unwrap()[0];
        drop(loss.backward().unwrap());
        (held as f64, (memory_stats_of(scope.device()).peak - base) as f64, value)
    };
    // On a GPU the rotary tables would count too, which are as long as the sequence.
    let host = Plan { device: "cpu".into(), ..Plan::default() };
    let (held, peak, loss) = measure(&Group::solo(), &host);
    let plan = context(SequenceMode::RingAttn, 4, host);
    let ranks = on_ranks(4, |world| measure(&world, &plan));
    for (part, most, _) in &ranks {
        let ratios = (4.0 * part / held, 4.0 * most / peak);
        let near = |ratio: f64, more: f64| (0.9..more).contains(&ratio);
        // At most there also are the keys, values and their gradients that go around the ring.
        let fits = near(ratios.0, 1.1) && near(ratios.1, 1.3);
        assert!(fits, "held, at most: {ratios:?} of a quarter");
    }
    let sum: f32 = ranks.iter().map(|(.., term)| term).sum();
    assert!((sum - loss).abs() < 1e-4 * loss, "{sum} {loss}");
}

#[test]
fn layouts_of_published_sizes_hold_on_a_thousand_pretended_ranks() {
    let config = DecoderConfig::Llama(LlamaConfig {
        intermediate_size: 28672,
        num_key_value_heads: 8,
        ..LlamaConfig::sized(128_256, 8192, 80, 64)
    });
    let plan =
        Plan { dp: 128, tp: 8, sequence_parallel: SequenceMode::SplitGather, ..Plan::default() };
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

pub(crate) fn odd_llama() -> DecoderConfig {
    let DecoderConfig::Llama(c) = llama() else { unreachable!("llama() is one") };
    DecoderConfig::Llama(LlamaConfig { vocab_size: 33, ..c })
}

fn odd_gpt2() -> DecoderConfig {
    let DecoderConfig::Gpt2(c) = gpt2() else { unreachable!("gpt2() is one") };
    DecoderConfig::Gpt2(Gpt2Config { vocab_size: 33, ..c })
}

/// GPT-2's 50257 divides by nothing: the plan fills the vocabulary up, and nobody sees it.
#[test]
fn a_vocabulary_that_does_not_divide_is_filled_up() {
    let p = |dp, tp, sequence_parallel, zero| Plan {
        dp,
        tp,
        sequence_parallel,
        zero,
        bucket_mib: 1,
        ..Plan::default()
    };
    let eight = DecoderConfig::Llama(LlamaConfig {
        intermediate_size: 32,
        max_position_embeddings: 32,
        ..LlamaConfig::sized(33, 32, 1, 8)
    });
    use SequenceMode::{None, Ring, SplitGather};
    let plans = |config: &DecoderConfig| match config {
        // The last rank has padding only.
        c if *c == eight => vec![p(1, 8, None, 0)],
        _ => vec![
            p(2, 2, None, 2),
            p(1, 4, SplitGather, 0),
            p(1, 2, Ring, 0),
            grid(TensorMode::TwoD, 4, 1, p(2, 1, None, 1)),
            grid(TensorMode::TwoAndAHalfD, 8, 2, p(1, 1, None, 0)),
            grid(TensorMode::ThreeD, 8, 1, p(1, 1, None, 0)),
        ],
    };
    for (name, config) in [("llama", odd_llama()), ("gpt2", odd_gpt2()), ("eight", eight.clone())] {
        let whole = train(&Group::solo(), &Plan::default(), &config, 8);
        let one = gradients(&Group::solo(), &Plan::default(), &config, 8);
        for plan in plans(&config) {
            equal(name, &plan, &config, 8, &whole, &one);
        }
    }
    // Generation, and tokens that do not exist.
    let talk = |world: &Group, plan: &Plan| {
        let scope = plan.scope(world).unwrap();
        let model = CausalLm::new(&scope, &odd_gpt2(), 3, Dtype::F32).unwrap();
        let hot = Sampling { temperature: 5.0, max_new_tokens: 20, ..Sampling::default() };
        let said = generate(&model, &[vec![1, 2]], &hot, |_, _| {}).unwrap().remove(0).ids;
        let wrong = |ids: &[i32], targets: &[i32]| {
            let batch =
                Batch { ids: ids.into(), targets: targets.into(), lengths: vec![2], seq: 2 };
            lm_loss(&model, &batch, Option::None, 1.0).unwrap_err().to_string()
        };
        assert!(wrong(&[1, 33], &[1, 1]).contains("id 33 is outside 0..33"));
        let target = wrong(&[1, 1], &[1, 33]);
        assert!(target.contains("target 33 is outside the vocabulary"), "{target}");
        said
    };
    let one = talk(&Group::solo(), &Plan::default());
    for said in on_ranks(2, |world| talk(&world, &p(1, 2, None, 0))) {
        assert_eq!(said, one);
    }
}

/// Balancing by a bias, step after step, with no auxiliary loss.
#[test]
fn a_bias_that_the_trainer_moves_evens_out_the_load_of_experts() {
    let DecoderConfig::Llama(base) = llama() else { unreachable!("llama() is one") };
    let config = |rate: f32| {
        DecoderConfig::Mixtral(MixtralConfig {
            router_aux_loss_coef: 0.0,
            router_bias_update_rate: rate,
            ..MixtralConfig::sized(LlamaConfig { intermediate_size: 16, ..base.clone() }, 8)
        })
    };
    // The largest load of an expert over its even share, in the last of some steps.
    let imbalance = |world: &Group, plan: &Plan, rate: f32| {
        let slow = AdamW { lr: LrSchedule::constant(1e-5), ..optimizer() };
        let mut trainer = Trainer::new(world, plan, &config(rate), slow, 3).unwrap();
        for gate in trainer.model.params.all().iter().filter(|p| p.name().ends_with("gate.weight"))
        {
            // Routers with favourites.
            let values: Vec<f32> = gate.to_vec().unwrap().iter().map(|x| 10.0 * x).collect();
            gate.set(&values).unwrap();
        }
        for _ in 0..150 {
            trainer.step(&batch(0)).unwrap();
        }
        let scope = trainer.model.scope().clone();
        let (part, parts) = scope.batch_part();
        let balance = Balance::new(1.0);
        let dropout = Stream::new(0, 0);
        let training = Training { dropout, first_row: 0, balance: balance.clone() };
        lm_loss(&trainer.model, &batch(0).part(part, parts).unwrap(), Some(training), 1.0).unwrap();
        let layers = (0..2).map(|i| format!("model.layers.{i}.block_sparse_moe.experts.w1"));
        layers
            .map(|layer| {
                let counts = balance.counts(&layer);
                8.0 * counts.iter().fold(0.0f32, |m, c| m.max(*c)) / counts.iter().sum::<f32>()
            })
            .fold(0.0, f32::max)
    };
    let without = imbalance(&Group::solo(), &Plan::default(), 0.0);
    let plan = Plan { dp: 2, zero: 1, ..Plan::default() };
    for with in on_ranks(2, |world| imbalance(&world, &plan, 0.002)) {
        assert!(without > 1.6 && with < 1.3, "{with} with a bias, {without} without");
    }
    // In bf16 too it moves by the same small steps, which bf16 would round away.
    let plan = Plan { precision: Precision::Bf16, ..plan };
    on_ranks(2, |world| {
        let mut trainer = Trainer::new(&world, &plan, &config(1e-5), optimizer(), 3).unwrap();
        for step in 0..3 {
            trainer.step(&batch(step)).unwrap();
        }
        let all = trainer.model.params.all();
        for bias in all.iter().filter(|p| p.name().ends_with("correction_bias")) {
            let steps: Vec<f32> = bias.to_vec().unwrap().iter().map(|b| b * 1e5).collect();
            let whole = |s: &f32| (s - s.round()).abs() < 1e-2 && s.round() as i32 % 2 != 0;
            assert!(steps.iter().all(whole), "{steps:?}");
        }
    });
}

#[test]
fn what_the_layers_of_a_mixture_do_not_allow_names_the_axes_and_the_way_out() {
    let refuse = |plan: Plan, config: &DecoderConfig| {
        on_ranks(plan.ranks(), |world| {
            let built = Trainer::new(&world, &plan, config, optimizer(), 0);
            built.and_then(|mut t| t.step(&batch(0))).unwrap_err().to_string()
        })
        .remove(0)
    };
    let text = refuse(grid(TensorMode::TwoD, 4, 1, Plan { ep: 2, ..Plan::default() }), &mixtral());
    assert!(text.contains("axes ep and row") && text.contains("without ep"), "{text}");
    let text = refuse(Plan { ep: 3, ..Plan::default() }, &mixtral());
    assert!(text.contains("experts.w1") && text.contains("3 ranks of axis ep"), "{text}");
    let text = refuse(Plan { tp: 8, ..Plan::default() }, &llama());
    assert!(text.contains("counted in heads: dim 0 of size 4"), "{text}");
}
