//! The binary on a GPU, or on the stand-in driver (`cargo xtask stand-in`): the same run as on the
//! CPU, and a device that is lost or too small. Without a driver nothing is run, unless
//! `COLOSSAL_CUDA=required` makes that a failure.

use std::path::Path;
use std::process::{Command, Output};

use colossal_apps::tokenizer::ChatTokenizer;
use colossal_kernels::cuda::{Device, devices};
use colossal_tensor::safetensors::Archive;

fn devices_here() -> Vec<Device> {
    let found = devices();
    let required = std::env::var("COLOSSAL_CUDA").is_ok_and(|v| v == "required");
    assert!(!required || found.is_ok(), "COLOSSAL_CUDA=required, but {found:?}");
    found.unwrap_or_default()
}

/// Faults can be ordered from the stand-in only.
fn stand_in() -> bool {
    devices_here().first().is_some_and(|d| d.name().starts_with("stand-in"))
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let texts: Vec<String> =
        (0..60).map(|i| format!("Dear Anna, the walk is on day {}. Bye.", i % 7)).collect();
    std::fs::write(dir.path().join("text.txt"), texts.join("\n")).unwrap();
    let tokenizer = ChatTokenizer::train(&texts, 300).unwrap();
    tokenizer.save(dir.path()).unwrap();
    let vocab = tokenizer.vocab_size();
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {vocab}, "hidden_size": 32,
           "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
           "max_position_embeddings": 128}}"#
    );
    let experts = config.replace("llama", "mixtral").replacen(
        '{',
        r#"{"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "#,
        1,
    );
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    std::fs::write(dir.path().join("experts.json"), experts).unwrap();
    dir
}

fn pretrain(dir: &Path, out: &str, device: &str, more: &[&str], env: &[(&str, &str)]) -> Output {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_string();
    let model = if out.starts_with("experts") { "experts.json" } else { "config.json" };
    // Packed for another machine, the program lies elsewhere.
    let program = std::env::var("COLOSSAL_PROGRAM");
    Command::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_colossal")))
        .args(["train", "pretrain", "--device", device])
        .args(["--model", &at(model), "--data", &at("text.txt")])
        .args(["--output-dir", &at(out), "--steps", "6", "--batch", "4", "--max-length", "24"])
        .args(["--lr", "1e-2", "--save-every", "2"])
        .args(more)
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn good(output: &Output) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}

fn weights(dir: &Path, out: &str) -> Vec<f32> {
    let archive = Archive::open(&[dir.join(out).join("model.safetensors")]).unwrap();
    let mut names: Vec<String> = archive.names().map(String::from).collect();
    names.sort();
    names.iter().flat_map(|name| archive.get(name).unwrap().to_vec().unwrap()).collect()
}

#[test]
fn training_on_a_gpu_equals_training_on_the_cpu() {
    if devices_here().is_empty() {
        return println!("no CUDA: nothing was run");
    }
    let dir = folder();
    for (name, plan) in [
        ("one", &[][..]),
        ("two", &["--plan.dp", "2", "--plan.zero", "1", "--plan.microbatches", "2"]),
        ("bf16", &["--plan.precision", "bf16"]),
        ("fp8", &["--plan.fp8", "block"]),
        ("experts", &[]),
    ] {
        let on = |device: &str| {
            let out = format!("{name}-{device}");
            good(&pretrain(dir.path(), &out, device, plan, &[]));
            weights(dir.path(), &out)
        };
        let (cpu, gpu) = (on("cpu"), on("cuda"));
        let off = cpu.iter().zip(&gpu).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        // AdamW moves a weight without a gradient by its rounding noise, up to a whole step.
        let limit = if name == "bf16" { 6e-2 } else { 5e-3 };
        assert!(off < limit, "{name}: weights differ by {off}");
        assert!(gpu.iter().all(|x| x.is_finite()));
    }
}

/// Processes as torchrun starts them, each with a GPU of its own, over NCCL.
#[test]
fn processes_over_nccl_equal_threads() {
    if devices_here().len() < 2 {
        return println!("fewer than two GPUs: nothing was run");
    }
    let dir = folder();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let store = format!("127.0.0.1:{port}");
    for (name, plan) in [
        ("zero", &["--plan.dp", "2", "--plan.zero", "2", "--plan.microbatches", "2"][..]),
        ("experts", &["--plan.ep", "2"]),
        ("ring", &["--plan.sp", "2", "--plan.sequence_parallel", "ring_attn"]),
    ] {
        good(&pretrain(dir.path(), &format!("{name}-threads"), "cuda", plan, &[]));
        std::thread::scope(|scope| {
            for rank in ["0", "1"] {
                let (dir, store) = (dir.path(), store.as_str());
                scope.spawn(move || {
                    let env = [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")];
                    let env = [&env[..], &[("COLOSSAL_STORE", store)]].concat();
                    good(&pretrain(dir, &format!("{name}-processes"), "cuda", plan, &env));
                });
            }
        });
        let [a, b] =
            ["threads", "processes"].map(|how| weights(dir.path(), &format!("{name}-{how}")));
        let off = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        assert!(a.len() == b.len() && off < 1e-6, "{name}: weights differ by {off}");
    }
}

#[test]
fn a_lost_device_ends_the_run_which_goes_on_from_its_checkpoint() {
    if !stand_in() {
        return println!("no stand-in driver: nothing was run");
    }
    let dir = folder();
    good(&pretrain(dir.path(), "whole", "cuda", &[], &[]));
    // Some launches before its end.
    let lose = [("STAND_IN_LOSE_AFTER", "450")];
    let lost = pretrain(dir.path(), "cut", "cuda", &[], &lose);
    let text = String::from_utf8_lossy(&lost.stderr);
    assert!(!lost.status.success(), "{text}");
    assert!(text.contains("on device 0") && text.contains("goes on from"), "{text}");
    good(&pretrain(dir.path(), "cut", "cuda", &[], &[]));
    assert_eq!(weights(dir.path(), "whole"), weights(dir.path(), "cut"));
}

#[test]
fn a_device_that_is_too_small_says_how_much_was_asked() {
    if !stand_in() {
        return println!("no stand-in driver: nothing was run");
    }
    let dir = folder();
    let small = [("STAND_IN_MEMORY", "3000000")];
    let output = pretrain(dir.path(), "small", "cuda", &[], &small);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("has no room for"), "{text}");
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let dir = folder();
    let output = pretrain(dir.path(), "none", "cuda:99", &[], &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("CUDA"), "{text}");
    let output = pretrain(dir.path(), "none", "tpu", &[], &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("choose auto, cpu, cuda"), "{text}");
}

/// The whole pipeline, two ranks, on as little as shows a wrong number.
#[test]
fn rlhf_on_a_gpu_says_what_it_says_on_the_cpu() {
    if devices_here().is_empty() {
        return println!("no CUDA: nothing was run");
    }
    let dir = tempfile::tempdir().unwrap();
    let metrics = |device: &str| -> Vec<serde_json::Value> {
        let out = dir.path().join(device);
        let program = std::env::var("COLOSSAL_PROGRAM");
        let output = Command::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_colossal")))
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap())
            .args(["rlhf", "--device", device, "--output-dir", out.to_str().unwrap()])
            .args(["--hidden_size", "32", "--layers", "1", "--heads", "2", "--batch", "2"])
            .args(["--sft_steps", "2", "--reward_steps", "2", "--max_length", "64"])
            .args(["--ppo.iterations", "1", "--ppo.rollouts", "4", "--ppo.max_new_tokens", "4"])
            .output()
            .unwrap();
        // So few steps align nothing: its exit code says so, and the report is there.
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(out.join("report.html").exists(), "{text}");
        let lines = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let (cpu, gpu) = (metrics("cpu"), metrics("cuda"));
    assert_eq!(cpu.len(), gpu.len());
    for (a, b) in cpu.iter().zip(&gpu) {
        for (name, a) in a.as_object().unwrap().iter().filter(|(n, _)| *n != "tokens_per_second") {
            let (Some(a), Some(b)) = (a.as_f64(), b[name].as_f64()) else { continue };
            assert!((a - b).abs() < 1e-3 * (1.0 + a.abs()), "{name}: {a} on the CPU, {b}");
        }
    }
}
