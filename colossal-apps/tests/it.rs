//! The arithmetic of the applications against reference libraries.

use std::path::Path;

use colossal_apps::chat::advantage::{gae, moments, whiten};
use colossal_apps::chat::kl::penalised_rewards;
use colossal_apps::chat::policy_loss::{policy_loss, value_loss};
use colossal_apps::chat::reward_loss::reward_loss;
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

/// TRL's `compute_rewards`, `compute_advantages` and `loss` (xtask/goldens/ppo.py).
#[test]
fn ppo_and_the_reward_model_compute_what_trl_computes() {
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
