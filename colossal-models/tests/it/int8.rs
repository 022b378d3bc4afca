//! Linear layers in int8: close to the float model, refused where only floats can serve.

use colossal_models::generate::{Sampling, generate};
use colossal_models::train::{AdamW, Plan, Trainer};
use colossal_models::{CausalLm, Dtype, Group, Scope, Tokens, hf};

use crate::goldens::folder;

fn open(name: &str, dtype: Dtype) -> CausalLm {
    hf::load(&folder(name), &Scope::solo(), dtype, None).unwrap()
}

fn logits(model: &CausalLm) -> Vec<f32> {
    let ids: Vec<i32> = (0..2 * 9).map(|i| (i * 5 + i * i) % 30).collect();
    let tokens = Tokens::new(model.scope(), &ids, 9).unwrap();
    colossal_tensor::no_grad(|| model.forward(tokens)).unwrap().to_vec().unwrap()
}

/// The stated error: root mean square over root mean square. Weights of these goldens are random.
#[test]
fn logits_in_int8_are_within_two_hundredths() {
    // A mixture may send a token to another expert.
    for (name, most) in [("llama", 0.02), ("llama3", 0.02), ("gpt2", 0.02), ("mixtral", 0.06)] {
        for (dtype, most) in [(Dtype::F32, most), (Dtype::Bf16, most + 0.01)] {
            let exact = logits(&open(name, Dtype::F32));
            let rounded = logits(&open(name, dtype).quantize_int8().unwrap());
            let square = |x: f32| f64::from(x) * f64::from(x);
            let off: f64 = exact.iter().zip(&rounded).map(|(e, r)| square(e - r)).sum();
            let off = (off / exact.iter().map(|e| square(*e)).sum::<f64>()).sqrt();
            assert!(off > 0.0 && off < most, "{name} {dtype}: {off}");
        }
    }
}

#[test]
fn generation_in_int8_frees_the_float_weights() {
    let model = open("llama", Dtype::F32).quantize_int8().unwrap();
    let new = Sampling { max_new_tokens: 5, ..Sampling::default() };
    let said = generate(&model, &[vec![3, 5, 7], vec![2]], &new, |_, _| ()).unwrap();
    // A row's numbers do not depend on the rows beside it.
    let alone = generate(&model, &[vec![2]], &new, |_, _| ()).unwrap();
    assert_eq!(said[1].ids, alone[0].ids);
    let q = model.params.get("model.layers.0.self_attn.q_proj.weight").unwrap();
    let error = q.to_vec().unwrap_err().to_string();
    assert!(error.contains("q_proj") && error.contains("int8"), "{error}");
    let error = hf::save(&model, &std::env::temp_dir().join("never"), 1 << 30).unwrap_err();
    assert!(error.to_string().contains("int8"), "{error}");
    assert!(model.params.get("model.embed_tokens.weight").unwrap().to_vec().is_ok());
    // Rounded twice is rounded once.
    assert_eq!(logits(&model.quantize_int8().unwrap()).len(), 18 * vocab());
}

fn vocab() -> usize {
    open("llama", Dtype::F32).config.vocab_size()
}

#[test]
fn a_model_in_int8_is_not_trained() {
    let model = open("llama", Dtype::F32).quantize_int8().unwrap();
    let error =
        Trainer::of(&Group::solo(), &Plan::default(), model, AdamW::default(), 0).unwrap_err();
    assert!(error.to_string().contains("int8"), "{error}");
}
