//! Logits, loss, gradients and greedy tokens equal transformers' on the same weights.

use std::path::PathBuf;

use colossal_models::generate::{Sampling, generate};
use colossal_models::train::{Batch, lm_loss};
use colossal_models::{CausalLm, DecoderConfig, Dtype, Scope, Tokens, Training, hf};
use colossal_tensor::IGNORE;
use colossal_tensor::moe::Balance;
use colossal_tensor::safetensors::{Archive, Owned};

const FAMILIES: [&str; 4] = ["llama", "llama3", "gpt2", "mixtral"];

pub(crate) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn golden(name: &str) -> Archive {
    Archive::open(&[folder(name).join("golden.safetensors")]).unwrap()
}

fn open(name: &str, dtype: Dtype) -> CausalLm {
    hf::load(&folder(name), &Scope::solo(), dtype, None).unwrap()
}

/// Worst difference, relative to the largest value.
fn worst(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let largest = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(1e-12);
    ours.iter().zip(theirs).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

fn ids(golden: &Archive) -> Vec<i32> {
    golden.get("ids").unwrap().to_ints().unwrap().into_iter().map(|i| i as i32).collect()
}

#[test]
fn logits_equal_transformers() {
    for name in FAMILIES {
        let golden = golden(name);
        let theirs = golden.get("logits").unwrap().to_vec().unwrap();
        for (dtype, tolerance) in [(Dtype::F32, 2e-5), (Dtype::Bf16, 6e-2)] {
            let model = open(name, dtype);
            let tokens = Tokens::new(model.scope(), &ids(&golden), 7).unwrap();
            let ours = model.forward(tokens).unwrap().to_vec().unwrap();
            let off = worst(&ours, &theirs);
            assert!(off < tolerance, "{name} {dtype}: {off}");
        }
    }
}

/// The losses of a padded batch of a mixture of experts, and what they teach its routers.
#[test]
fn auxiliary_loss_and_router_gradients_equal_transformers() {
    let golden = Archive::open(&[folder("mixtral").join("auxiliary.safetensors")]).unwrap();
    let mut model = open("mixtral", Dtype::F32);
    let DecoderConfig::Mixtral(config) = &mut model.config else { panic!("is a Mixtral") };
    config.router_aux_loss_coef = 0.5;
    let fresh = CausalLm::new(&Scope::solo(), &model.config, 0, Dtype::F32).unwrap();
    for (to, from) in fresh.params.all().iter().zip(model.params.all()) {
        to.set(&from.to_vec().unwrap()).unwrap();
    }
    let ints = |name: &str| golden.get(name).unwrap().to_ints().unwrap();
    let (ids, lengths) = (ints("ids"), ints("lengths"));
    // Every token goes through the routers, the last of a sequence too, which has no target.
    let mut targets = vec![IGNORE; 14];
    for (row, n) in lengths.iter().enumerate() {
        for t in row * 7 + 1..row * 7 + *n as usize {
            targets[t - 1] = ids[t] as i32;
        }
    }
    let ids = ids.iter().map(|id| *id as i32).collect();
    let lengths = lengths.iter().map(|n| *n as i32).collect();
    let batch = Batch { ids, targets, lengths, seq: 7 };
    let balance = Balance::new(1.0);
    let dropout = colossal_tensor::random::Stream::new(0, 0);
    let training = Training { dropout, first_row: 0, balance: balance.clone() };
    let sum = lm_loss(&fresh, &batch, Some(training), 1.0).unwrap();
    let loss = sum.scale(1.0 / batch.learnt() as f32).unwrap();
    let read = |name: &str| golden.get(name).unwrap().to_vec().unwrap();
    assert!(worst(&[balance.loss()], &read("auxiliary")) < 1e-5);
    assert!(worst(&[loss.item().unwrap() + balance.loss()], &read("loss")) < 1e-5);
    let grads = loss.backward().unwrap();
    let gates = golden.names().filter_map(|n| n.strip_prefix("grad."));
    for (i, gate) in gates.enumerate() {
        let ours = grads.get(&fresh.params.get(gate).unwrap()).unwrap();
        let off = worst(ours, &read(&format!("grad.{gate}")));
        assert!(off < 1e-4 && i < 2, "{gate}: {off}");
    }
}

#[test]
fn loss_and_every_gradient_equal_transformers() {
    for name in FAMILIES {
        let golden = golden(name);
        let model = open(name, Dtype::F32);
        let ids = ids(&golden);
        let all = [true; 7];
        let batch = Batch::new(&[(&ids[..7], &all), (&ids[7..], &all)], 0).unwrap();
        let sum = lm_loss(&model, &batch, None, 1.0).unwrap();
        let loss = sum.scale(1.0 / batch.learnt() as f32).unwrap();
        let theirs = golden.get("loss").unwrap().to_vec().unwrap()[0];
        assert!((loss.item().unwrap() - theirs).abs() < 1e-5 * theirs, "{name}");
        let grads = loss.backward().unwrap();
        let gathered = hf::gather(
            &model,
            |p| {
                let grad = grads.get(p).expect("every parameter has a gradient");
                colossal_models::Tensor::from_slice(p.scope(), grad, p.shape(), p.layout())
            },
            Dtype::F32,
        )
        .unwrap();
        let mut compared = 0;
        for (key, Owned { bytes, .. }) in &gathered {
            let theirs =
                golden.get(&format!("grad.{key}")).unwrap_or_else(|| panic!("{name}: {key}"));
            let ours: Vec<f32> =
                bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let off = worst(&ours, &theirs.to_vec().unwrap());
            assert!(off < 1e-4, "{name} {key}: {off}");
            compared += 1;
        }
        assert_eq!(compared, golden.names().filter(|n| n.starts_with("grad.")).count(), "{name}");
    }
}

#[test]
fn greedy_tokens_equal_transformers_for_prompts_of_unequal_length() {
    for name in FAMILIES {
        let golden = golden(name);
        let model = open(name, Dtype::F32);
        let ids = ids(&golden);
        let prompts = [ids[..5].to_vec(), ids[7..10].to_vec()];
        let sampling = Sampling { max_new_tokens: 12, ..Sampling::default() };
        let ours = generate(&model, &prompts, &sampling, |_, _| {}).unwrap();
        for (i, ours) in ours.iter().enumerate() {
            let theirs = golden.get(&format!("greedy.{i}")).unwrap().to_ints().unwrap();
            let ours: Vec<i64> = ours.ids.iter().map(|t| i64::from(*t)).collect();
            assert_eq!(ours, theirs, "{name}, prompt {i}");
        }
    }
}

#[test]
fn neighbours_in_the_batch_do_not_change_what_is_drawn() {
    let model = open("llama", Dtype::F32);
    let prompts = [vec![3, 4, 5], vec![6], vec![7, 8]];
    let sampling = Sampling {
        temperature: 0.8,
        max_new_tokens: 10,
        stop: vec![11],
        seed: 5,
        ..Sampling::default()
    };
    let together = generate(&model, &prompts, &sampling, |_, _| {}).unwrap();
    let alone = generate(&model, &prompts[..1], &sampling, |_, _| {}).unwrap();
    assert_eq!(together[0].ids, alone[0].ids);
    for (a, b) in together[0].logprobs.iter().zip(&alone[0].logprobs) {
        assert!((a - b).abs() < 1e-5);
    }
}

#[test]
fn bad_prompts_get_an_error_that_names_the_limit() {
    let model = open("llama", Dtype::F32);
    let long = generate(&model, &[vec![1; 64]], &Sampling::default(), |_, _| {}).unwrap_err();
    assert!(long.to_string().contains("64 positions"), "{long}");
    let empty = generate(&model, &[vec![]], &Sampling::default(), |_, _| {}).unwrap_err();
    assert!(empty.to_string().contains("prompt 0 is empty"), "{empty}");
    let strange = generate(&model, &[vec![66]], &Sampling::default(), |_, _| {}).unwrap_err();
    assert!(strange.to_string().contains("tokenizer"), "{strange}");
}
