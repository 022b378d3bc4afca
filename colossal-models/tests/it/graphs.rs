//! Generation on a GPU, where a step of decoding is recorded and launched as one, against the CPU. On
//! the stand-in driver (`cargo xtask stand-in`) where there is no GPU.

use colossal_kernels::cuda::{Stream, devices};
use colossal_models::generate::{Completion, Sampling, generate};
use colossal_models::gpt2::Gpt2Config;
use colossal_models::llama::LlamaConfig;
use colossal_models::mixtral::MixtralConfig;
use colossal_models::{CausalLm, DecoderConfig, Device, Dtype, Scope};
use colossal_tensor::storage::memory_stats_of;

/// A stream of a device that no other test here uses, if there is a driver.
fn stream(number: usize) -> Option<Stream> {
    let found = devices().map_or(0, |d| d.len());
    let required = std::env::var("COLOSSAL_CUDA").is_ok_and(|v| v == "required");
    assert!(!required || found > 0, "COLOSSAL_CUDA=required, but there is no device");
    match found {
        0 => {
            println!("no CUDA: nothing was run");
            None
        }
        n => Some(Stream::new(number % n).unwrap()),
    }
}

fn llama() -> LlamaConfig {
    let base = LlamaConfig::sized(64, 32, 2, 4);
    LlamaConfig { num_key_value_heads: 2, max_position_embeddings: 300, ..base }
}

fn model(config: &DecoderConfig, device: &Device) -> CausalLm {
    CausalLm::new(&Scope::solo().on(device), config, 5, Dtype::F32).unwrap()
}

fn prompt(len: usize, seed: usize) -> Vec<i32> {
    (0..len).map(|i| ((i * i + 7 * i + 13 * seed) % 61) as i32).collect()
}

fn complete(model: &CausalLm, prompts: &[Vec<i32>], sampling: &Sampling) -> Vec<Completion> {
    generate(model, prompts, sampling, |_, _| {}).unwrap()
}

/// Of what the GPU gave with its graphs: the same tokens as on the CPU, and as many launches.
fn compare(config: &DecoderConfig, stream: &Stream, prompts: &[Vec<i32>], s: &Sampling) -> u64 {
    let want = complete(&model(config, &Device::Cpu), prompts, s);
    let there = model(config, &Device::Cuda(stream.clone()));
    let before = stream.graph_launches();
    let got = complete(&there, prompts, s);
    for (got, want) in got.iter().zip(&want) {
        assert_eq!((&got.ids, got.stopped), (&want.ids, want.stopped), "{config:?}");
        for (g, w) in got.logprobs.iter().zip(&want.logprobs) {
            assert!((g - w).abs() < 1e-4, "{g}, not {w}; {config:?}");
        }
    }
    stream.graph_launches() - before
}

/// Alone, and beside prompts of other lengths that end before it; over the end of a bucket of 128
/// tokens, where a graph is recorded anew.
#[test]
fn graphs_of_decoding_give_the_tokens_of_the_cpu() {
    let Some(stream) = stream(1) else { return };
    let recorded = std::env::var_os("COLOSSAL_NO_GRAPHS").is_none();
    let gpt2 = Gpt2Config { n_positions: 300, ..Gpt2Config::sized(64, 32, 2, 4) };
    for config in [DecoderConfig::Llama(llama()), DecoderConfig::Gpt2(gpt2)] {
        let greedy = Sampling { max_new_tokens: 14, ..Sampling::default() };
        // 13 steps: of 121 to 128 tokens, and of 129 to 133; the first of each is not a graph's.
        let launches = compare(&config, &stream, &[prompt(120, 0)], &greedy);
        assert_eq!(launches, if recorded { 11 } else { 0 });
        let prompts = [prompt(120, 0), prompt(3, 1), prompt(50, 2), prompt(121, 3)];
        // Drawn, so that they do not all repeat themselves; a token that not all of them come to.
        let mut drawn = Sampling { temperature: 1.0, seed: 4, ..greedy };
        let free = complete(&model(&config, &Device::Cpu), &prompts, &drawn);
        drawn.stop = vec![free[1].ids[2], free[2].ids[5]];
        let ended: Vec<usize> = free
            .iter()
            .map(|c| c.ids.iter().position(|t| drawn.stop.contains(t)).map_or(14, |at| at + 1))
            .collect();
        assert!(ended.iter().any(|n| *n != ended[0]), "{ended:?}: they all end together");
        let launches = compare(&config, &stream, &prompts, &drawn);
        assert_eq!(launches > 0, recorded, "{ended:?}: {launches} launches");
    }
    if recorded {
        // The same without graphs.
        let test = "graphs::graphs_of_decoding_give_the_tokens_of_the_cpu";
        let plain = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .env("COLOSSAL_NO_GRAPHS", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&plain.stdout);
        assert!(plain.status.success() && text.contains("1 passed"), "{plain:?}");
    }
}

/// Routers choose on the host: such a step is launched kernel by kernel. int8 is not in the way.
#[test]
fn graphs_are_not_for_steps_that_need_the_host() {
    let Some(stream) = stream(2) else { return };
    let sampling = Sampling { max_new_tokens: 6, ..Sampling::default() };
    let prompts = [prompt(9, 1), prompt(4, 2)];
    let moe = DecoderConfig::Mixtral(MixtralConfig::sized(llama(), 4));
    assert_eq!(compare(&moe, &stream, &prompts, &sampling), 0);

    let config = DecoderConfig::Llama(LlamaConfig::sized(64, 128, 1, 4));
    let int8 = |device: &Device| model(&config, device).quantize_int8().unwrap();
    let there = int8(&Device::Cuda(stream.clone()));
    let before = stream.graph_launches();
    let (got, want) =
        (complete(&there, &prompts, &sampling), complete(&int8(&Device::Cpu), &prompts, &sampling));
    assert!(got.iter().zip(&want).all(|(g, w)| g.ids == w.ids), "{got:?}, not {want:?}");
    assert_eq!(stream.graph_launches() - before, 4);
}

#[test]
fn graphs_give_their_memory_back() {
    let Some(stream) = stream(3) else { return };
    let device = Device::Cuda(stream.clone());
    let there = model(&DecoderConfig::Llama(llama()), &device);
    let sampling = Sampling { max_new_tokens: 12, ..Sampling::default() };
    let held: Vec<_> = (0..4)
        .map(|_| {
            complete(&there, &[prompt(120, 1), prompt(30, 2)], &sampling);
            (memory_stats_of(&device).in_use, stream.device().reserved())
        })
        .collect();
    assert!(stream.graph_launches() >= 4 * 8, "{}", stream.graph_launches());
    assert!(held[1..].iter().all(|h| *h == held[1]) && held[0].0 == held[1].0, "{held:?}");
}
