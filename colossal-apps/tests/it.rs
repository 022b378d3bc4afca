//! The arithmetic of the applications against reference libraries.

use std::path::Path;

use colossal_apps::chat::Progress;
use colossal_apps::chat::advantage::{gae, moments, whiten};
use colossal_apps::chat::kl::penalised_rewards;
use colossal_apps::chat::policy_loss::{policy_loss, value_loss};
use colossal_apps::chat::ppo::{Models, PpoConfig, Run, ppo};
use colossal_apps::chat::reward_loss::reward_loss;
use colossal_comm::on_ranks;
use colossal_models::llama::LlamaConfig;
use colossal_models::train::{AdamW, LrSchedule, Plan, Trainer};
use colossal_models::{CausalLm, DecoderConfig, Dtype, Head};
use colossal_tensor::random::Stream;
use colossal_tensor::safetensors::Archive;

fn golden(name: &str) -> Archive {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
    Archive::open(&[path]).unwrap()
}

fn close(what: &str, ours: &[f32], theirs: &[f32]) {
    let largest = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let off = ours.iter().zip(theirs).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(ours.len() == theirs.len() && off <= 1e-5 * largest, "{what}: {off} of {largest}");
}

/// A small policy must learn to repeat the first word of its prompt: the reward is the share of its
/// eight words that do, 0.06 by chance. The same loop in PyTorch reached 0.84 to 0.98 in 100 iterations
/// of 128 answers, over three seeds.
#[test]
fn ppo_learns_what_is_rewarded() {
    let shape = LlamaConfig { intermediate_size: 128, ..LlamaConfig::sized(16, 64, 2, 4) };
    let lm = DecoderConfig::Llama(shape);
    let critic = lm.clone().with_head(Head::Score);
    let stream = Stream::named(1, "prompts");
    let prompts: Vec<Vec<i32>> =
        (0..4096).map(|i| (0..4).map(|t| (stream.bits(4 * i + t) % 16) as i32).collect()).collect();
    let config = PpoConfig {
        iterations: 100,
        rollouts: 128,
        epochs: 4,
        minibatches: 1,
        kl_coef: 0.01,
        missing_eos_penalty: 0.0,
        target_kl: 10.0,
        max_new_tokens: 8,
        ..PpoConfig::default()
    };
    let judge = |rows: &[&[i32]]| -> anyhow::Result<Vec<f32>> {
        let share = |r: &&[i32]| r[4..].iter().filter(|t| **t == r[0]).count() as f32 / 8.0;
        Ok(rows.iter().map(share).collect())
    };
    let rewards = on_ranks(2, |world| {
        let dir = tempfile::tempdir().unwrap();
        let plan = Plan { dp: 2, ..Plan::default() };
        let rule = |lr| AdamW { lr: LrSchedule::constant(lr), ..AdamW::default() };
        let mut actor = Trainer::new(&world, &plan, &lm, rule(1e-3), 3).unwrap();
        let mut critic = Trainer::new(&world, &plan, &critic, rule(2e-3), 4).unwrap();
        let reference = CausalLm::new(actor.model.scope(), &lm, 3, Dtype::F32).unwrap().freeze();
        let mut progress = Progress::open(dir.path(), world.rank() == 0, false).unwrap();
        let mut models =
            Models { actor: &mut actor, critic: &mut critic, reference: &reference, judge: &judge };
        let run = Run { prompts: &prompts, demonstrations: &[], end_of_turn: -1, config: &config };
        ppo(&mut models, &run, 0..config.iterations, &mut progress).unwrap();
        let scores = progress.points.iter().filter(|p| p.name == "objective/scores");
        scores.map(|p| p.value).collect::<Vec<_>>()
    });
    let (first, best) = (rewards[0][0], rewards[0].iter().copied().fold(0.0, f64::max));
    let end = rewards[0][90..].iter().sum::<f64>() / 10.0;
    assert!(first < 0.15 && best >= 0.85 && end > 0.75, "from {first} to {end}, at best {best}");
}

/// TRL's `compute_rewards`, `compute_advantages` and `loss`; for the reward model, its formula under
/// torch's autograd (xtask/goldens/ppo.py).
#[test]
fn ppo_computes_what_trl_computes_and_the_reward_model_what_torch_does() {
    let golden = golden("ppo.safetensors");
    let all = |name: &str| golden.get(name).unwrap().to_vec().unwrap();
    let lengths = golden.get("lengths").unwrap().to_ints().unwrap();
    let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
    let stride = golden.get("old").unwrap().shape[1];
    // The real tokens of each answer.
    let rows = |name: &str| -> Vec<Vec<f32>> {
        all(name).chunks(stride).zip(&lengths).map(|(row, n)| row[..*n].to_vec()).collect()
    };
    let flat = |name: &str| rows(name).concat();

    let (old, reference, values) = (rows("old"), rows("ref"), rows("values"));
    let (mut rewards, mut advantages, mut returns) = (vec![], vec![], vec![]);
    for (i, score) in all("scores").iter().enumerate() {
        let r = penalised_rewards(&old[i], &reference[i], *score, 0.05);
        let (a, ret) = gae(&r, &values[i], 0.97, 0.9);
        rewards.extend(r);
        advantages.extend(a);
        returns.extend(ret);
    }
    close("rewards", &rewards, &flat("rewards"));
    close("returns", &returns, &flat("returns"));
    let sums = moments(advantages.iter());
    whiten(&mut advantages, sums);
    // We divide the variance by n, TRL by n - 1.
    let n = advantages.len() as f32;
    let unbiased: Vec<f32> = advantages.iter().map(|a| a * ((n - 1.0) / n).sqrt()).collect();
    close("advantages", &unbiased, &flat("advantages"));

    let loss = policy_loss(&flat("now"), &flat("old"), &flat("advantages"), 0.2, 1.0 / n);
    close("policy loss", &[loss.value], &all("policy_loss"));
    close("its gradient", &loss.gradient, &flat("dnow"));
    close("its clips", &[loss.clipped as f32 / n], &all("clipfrac"));
    assert!(loss.clipped > 0, "some ratios are beyond the clip");
    let (new, old) = (flat("new_values"), flat("values"));
    let loss = value_loss(&new, &old, &flat("returns"), 0.3, 1.0 / n);
    close("value loss", &[loss.value], &all("value_loss"));
    close("its gradient", &loss.gradient, &flat("dvalues"));

    let (chosen, rejected) = (all("chosen"), all("rejected"));
    let loss = reward_loss(&chosen, &rejected, 0.2, 0.01, 1.0 / chosen.len() as f32);
    close("pair loss", &[loss.value], &all("pair_loss"));
    close("its gradients", &loss.chosen, &all("dchosen"));
    close("its gradients", &loss.rejected, &all("drejected"));
}
