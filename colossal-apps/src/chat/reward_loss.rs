//! The pairwise loss of reward models (Bradley & Terry, 1952; Ouyang et al., 2022).
//!
//! `softplus(-(r_chosen - r_rejected - margin)) + centring * (r_chosen + r_rejected)²`, averaged.

/// The loss of pairs, its gradients, and how often the chosen answer won.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PairLoss {
    /// The scaled sum.
    pub value: f32,
    /// With respect to each chosen reward.
    pub chosen: Vec<f32>,
    /// With respect to each rejected reward.
    pub rejected: Vec<f32>,
    /// Pairs whose chosen reward is the larger.
    pub correct: usize,
}

/// The loss of pairs of rewards; `scale` is one over the pairs of the global batch.
///
/// ```
/// use colossal_apps::chat::reward_loss::reward_loss;
/// let loss = reward_loss(&[0.0], &[0.0], 0.0, 0.0, 1.0);
/// assert!((loss.value - 2f32.ln()).abs() < 1e-6);
/// assert_eq!((loss.chosen[0], loss.rejected[0]), (-0.5, 0.5));
/// ```
pub fn reward_loss(
    chosen: &[f32],
    rejected: &[f32],
    margin: f32,
    centring: f32,
    scale: f32,
) -> PairLoss {
    let mut loss = PairLoss::default();
    for (c, r) in chosen.iter().zip(rejected) {
        let z = c - r - margin;
        // softplus(-z) without overflow.
        let softplus = (-z).max(0.0) + (-z.abs()).exp().ln_1p();
        let slope = -1.0 / (1.0 + z.exp());
        let centre = 2.0 * centring * (c + r);
        loss.value += scale * (softplus + centring * (c + r).powi(2));
        loss.chosen.push(scale * (slope + centre));
        loss.rejected.push(scale * (-slope + centre));
        loss.correct += usize::from(c > r);
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_by_finite_differences_and_no_overflow() {
        let (c, r) = ([0.3, -1.0, 2.0], [0.1, 0.5, -2.0]);
        let f = |c: &[f32], r: &[f32]| reward_loss(c, r, 0.2, 0.05, 0.5);
        let loss = f(&c, &r);
        assert_eq!(loss.correct, 2);
        for i in 0..3 {
            let at = |h: f32, which: bool| {
                let (mut c, mut r) = (c, r);
                if which {
                    c[i] += h
                } else {
                    r[i] += h
                }
                f(&c, &r).value
            };
            let slope = |which| (at(1e-3, which) - at(-1e-3, which)) / 2e-3;
            assert!((slope(true) - loss.chosen[i]).abs() < 1e-3);
            assert!((slope(false) - loss.rejected[i]).abs() < 1e-3);
        }
        let far = reward_loss(&[-500.0], &[500.0], 0.0, 0.0, 1.0);
        assert_eq!((far.value, far.chosen[0]), (1000.0, -1.0));
    }
}
