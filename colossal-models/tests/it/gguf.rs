//! GGUF files against the gguf package and transformers (xtask/goldens/gguf_file.py).

use std::path::{Path, PathBuf};

use colossal_models::generate::{Sampling, generate};
use colossal_models::gguf::Gguf;
use colossal_models::{DecoderConfig, Dtype, Scope, Tokens, hf, no_grad};
use colossal_tensor::nn::RopeScaling;
use colossal_tensor::safetensors::Archive;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).into()
}

/// The logits of a GGUF file against transformers'.
fn compare(file: &Path, golden: &Path) {
    let golden = Archive::open(&[golden.into()]).unwrap();
    let ids = golden.get("ids").unwrap().to_ints().unwrap();
    let ids: Vec<i32> = ids.into_iter().map(|i| i as i32).collect();
    let model = hf::load(file, &Scope::solo(), Dtype::F32, None).unwrap();
    let tokens = Tokens::new(model.scope(), &ids, 9).unwrap();
    let ours = no_grad(|| model.forward(tokens)).unwrap().to_vec().unwrap();
    let theirs = golden.get("logits").unwrap().to_vec().unwrap();
    let largest = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let file = file.display();
    assert!(largest > 0.5 && off <= 2e-5 * largest, "{file}: {off} of {largest}");
}

#[test]
fn gpt2_and_the_stretched_frequencies_of_llama_3_1_are_read() {
    let folder = root().join("tests/goldens/gguf");
    for name in ["gpt2", "llama3"] {
        compare(&folder.join(format!("{name}.gguf")), &folder.join(format!("{name}.safetensors")));
    }
    // Nine positions hardly turn by the stretched frequencies: the scaling itself must be right.
    let DecoderConfig::Llama(config) =
        Gguf::open(&folder.join("llama3.gguf")).unwrap().config().clone()
    else {
        panic!("a llama")
    };
    let wanted = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
    assert_eq!(config.rope_scaling, wanted);
}

#[test]
fn every_type_is_dequantised_and_heads_are_put_in_order() {
    let folder = root().join("tests/goldens/gguf");
    compare(&folder.join("tiny.gguf"), &folder.join("golden.safetensors"));
    // A file that was not fetched whole says so.
    let whole = std::fs::read(folder.join("tiny.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    for part in [9, 100, 2000, whole.len() - 1] {
        std::fs::write(&path, &whole[..part]).unwrap();
        let e = hf::load(&path, &Scope::solo(), Dtype::F32, None).unwrap_err().to_string();
        assert!(e.contains("cut short") || e.contains("damaged"), "{part}: {e}");
    }
}

/// SmolLM2-135M-Instruct: greedy words equal transformers' over 24 prompts.
#[test]
fn a_real_model_says_what_it_says_elsewhere() {
    let path = root().join("../assets/smollm2/model.gguf");
    if !path.is_file() {
        eprintln!("skipped: {} is not there; `cargo xtask assets` fetches it", path.display());
        return;
    }
    let text = std::fs::read_to_string(root().join("tests/goldens/smollm2.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = |v: &serde_json::Value| -> Vec<i32> {
        v.as_array().unwrap().iter().map(|i| i.as_i64().unwrap() as i32).collect()
    };
    let rows = golden["rows"].as_array().unwrap();
    assert!(rows.len() >= 20);
    let model = hf::load(&path, &Scope::solo(), Dtype::F32, None).unwrap();
    assert_eq!(model.elements(), 134_515_008);
    let prompts: Vec<Vec<i32>> = rows.iter().map(|r| list(&r["ids"])).collect();
    let sampling = Sampling {
        max_new_tokens: golden["max_new_tokens"].as_u64().unwrap() as usize,
        stop: vec![2],
        ..Sampling::default()
    };
    let ours = generate(&model, &prompts, &sampling, |_, _| {}).unwrap();
    for (row, ours) in rows.iter().zip(&ours) {
        assert_eq!(ours.ids, list(&row["greedy"]), "{}", row["prompt"]);
    }
}
