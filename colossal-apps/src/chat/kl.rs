//! Estimates of the divergence of the policy from the reference (Schulman, 2020), per token.
//!
//! With `d = log pi - log pi_ref` of the drawn token: `k1 = d` is unbiased, `k3 = e^-d - 1 + d` is
//! as well and never negative.

/// `d`.
pub fn k1(logprob: f32, reference: f32) -> f32 {
    logprob - reference
}

/// `e^-d - 1 + d`.
pub fn k3(logprob: f32, reference: f32) -> f32 {
    let d = logprob - reference;
    (-d).exp_m1() + d
}

/// The reward of every token of a completion: `-beta * k1`, and the score on the last one.
pub fn penalised_rewards(logprobs: &[f32], reference: &[f32], score: f32, beta: f32) -> Vec<f32> {
    let mut rewards: Vec<f32> =
        logprobs.iter().zip(reference).map(|(p, r)| -beta * k1(*p, *r)).collect();
    if let Some(last) = rewards.last_mut() {
        *last += score;
    }
    rewards
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn k3_is_never_negative_and_both_vanish_on_equal_policies() {
        for i in -50..50 {
            let d = i as f32 / 10.0;
            assert!(k3(d, 0.0) >= 0.0);
            assert!((k3(d, 0.0) - ((-d).exp() - 1.0 + d)).abs() < 1e-3 * (-d).exp().max(1.0));
        }
        assert_eq!((k1(-2.0, -2.0), k3(-2.0, -2.0)), (0.0, 0.0));
    }

    #[test]
    fn the_score_lies_on_the_last_token() {
        let r = penalised_rewards(&[-1.0, -2.0], &[-1.5, -1.0], 3.0, 0.1);
        assert!((r[0] + 0.05).abs() < 1e-6 && (r[1] - 3.1).abs() < 1e-6);
        assert!(penalised_rewards(&[], &[], 1.0, 0.1).is_empty());
    }
}
