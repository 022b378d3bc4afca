//! Files of other people never make us panic or take memory that is not there.

use std::path::{Path, PathBuf};

use colossal_models::{Dtype, Scope, hf};
use proptest::prelude::*;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// Overwrites some bytes, and cuts the end off.
fn damage(bytes: &mut Vec<u8>, changes: &[(usize, u8)], cut: usize) {
    let len = bytes.len();
    for (at, value) in changes {
        bytes[at % len] = *value;
    }
    bytes.truncate(len - cut % len);
}

fn changes(within: usize) -> impl Strategy<Value = Vec<(usize, u8)>> {
    prop::collection::vec((0..within, any::<u8>()), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The header is the first kilobyte and a half: names, types, shapes, offsets.
    #[test]
    fn a_damaged_gguf_is_an_error_or_a_model(changes in changes(1500), cut in 0usize..3) {
        let mut bytes = std::fs::read(goldens().join("gguf/tiny.gguf")).unwrap();
        damage(&mut bytes, &changes, cut);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        std::fs::write(&path, bytes).unwrap();
        if let Err(e) = hf::load(&path, &Scope::solo(), Dtype::F32, None) {
            prop_assert!(e.to_string().contains("x.gguf"), "{e}");
        }
    }

    #[test]
    fn a_damaged_config_is_an_error_or_a_model(
        changes in changes(900),
        name in prop::sample::select(vec!["llama", "gpt2"]),
    ) {
        let folder = goldens().join(name);
        let mut text = std::fs::read(folder.join("config.json")).unwrap();
        // Digits turn into other digits: sizes grow, shrink and stop dividing.
        let digits: Vec<(usize, u8)> = changes.iter().map(|(at, b)| (*at, b'0' + b % 10)).collect();
        let places: Vec<usize> = (0..text.len()).filter(|i| text[*i].is_ascii_digit()).collect();
        for (at, digit) in digits {
            text[places[at % places.len()]] = digit;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let weights = "model.safetensors";
        std::fs::copy(folder.join(weights), dir.path().join(weights)).unwrap();
        let _ = hf::load(dir.path(), &Scope::solo(), Dtype::F32, None);
    }
}

#[test]
fn a_configuration_beyond_all_memory_is_an_error_not_an_attempt() {
    let folder = goldens().join("llama");
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let weights = "model.safetensors";
    std::fs::copy(folder.join(weights), dir.path().join(weights)).unwrap();
    for (key, value) in [
        ("hidden_size", 1u64 << 27),
        ("num_hidden_layers", 1 << 27),
        ("vocab_size", 1 << 60),
        ("intermediate_size", u64::MAX),
    ] {
        let kept = config[key].clone();
        config[key] = value.into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let e = hf::load(dir.path(), &Scope::solo(), Dtype::F32, None).unwrap_err().to_string();
        assert!(e.contains("tensor") || e.contains(key), "{key}: {e}");
        config[key] = kept;
    }
}
