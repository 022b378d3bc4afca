//! Clipped losses of proximal policy optimisation (Schulman et al., 2017), with their gradients.
//!
//! Policy: `max(-rho A, -clip(rho, 1 - eps, 1 + eps) A)` with `rho = exp(l - l_old)`; value:
//! `max((V - R)², (clip(V, V_old ± eps_v) - R)²) / 2`. Sums over tokens, times `scale` (one over
//! the tokens of the global minibatch).

/// A loss, its gradient with respect to each input, and what people watch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Loss {
    /// The scaled sum.
    pub value: f32,
    /// One number per token.
    pub gradient: Vec<f32>,
    /// Tokens on which the clipped branch is the larger.
    pub clipped: usize,
    /// Sum of `(rho - 1) - ln rho` (policy only): an estimate of the divergence of this update.
    pub divergence: f32,
}

/// The policy's loss.
///
/// ```
/// use colossal_apps::chat::policy_loss::policy_loss;
/// // At rho = 1 the gradient is REINFORCE's.
/// let loss = policy_loss(&[-1.0], &[-1.0], &[2.0], 0.2, 1.0);
/// assert_eq!((loss.value, loss.gradient[0], loss.clipped), (-2.0, -2.0, 0));
/// ```
pub fn policy_loss(
    logprobs: &[f32],
    old: &[f32],
    advantages: &[f32],
    epsilon: f32,
    scale: f32,
) -> Loss {
    let mut loss = Loss::default();
    for ((l, old), a) in logprobs.iter().zip(old).zip(advantages) {
        let d = (l - old).clamp(-20.0, 20.0);
        let rho = d.exp();
        let plain = -rho * a;
        let clipped = -rho.clamp(1.0 - epsilon, 1.0 + epsilon) * a;
        loss.divergence += rho - 1.0 - d;
        if clipped > plain {
            loss.value += clipped * scale;
            loss.clipped += 1;
            loss.gradient.push(0.0);
        } else {
            loss.value += plain * scale;
            loss.gradient.push(plain * scale);
        }
    }
    loss
}

/// The critic's loss.
pub fn value_loss(values: &[f32], old: &[f32], returns: &[f32], epsilon: f32, scale: f32) -> Loss {
    let mut loss = Loss::default();
    for ((v, old), r) in values.iter().zip(old).zip(returns) {
        let near = v.clamp(old - epsilon, old + epsilon);
        let (plain, clipped) = ((v - r).powi(2), (near - r).powi(2));
        if clipped > plain {
            loss.value += 0.5 * clipped * scale;
            loss.clipped += 1;
            // Within the clip `near` is `v`, and the two are equal: here it is constant.
            loss.gradient.push(0.0);
        } else {
            loss.value += 0.5 * plain * scale;
            loss.gradient.push((v - r) * scale);
        }
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_by_hand() {
        // rho = 1.5, A = 1: clipped at 1.2. rho = 0.5, A = 1: not clipped. rho = 0.5, A = -1: clipped.
        let l = [1.5f32.ln(), 0.5f32.ln(), 0.5f32.ln()];
        let loss = policy_loss(&l, &[0.0; 3], &[1.0, 1.0, -1.0], 0.2, 1.0);
        assert!((loss.value - (-1.2 - 0.5 + 0.8)).abs() < 1e-6, "{loss:?}");
        assert_eq!(loss.clipped, 2);
        assert!(loss.gradient[0] == 0.0 && (loss.gradient[1] + 0.5).abs() < 1e-6);
        // V = 2 moved 1 from 1 towards R = 3: clipped to 1.2, error 1.8² / 2.
        let loss = value_loss(&[2.0, 1.1], &[1.0, 1.0], &[3.0, 0.0], 0.2, 1.0);
        assert!((loss.value - (1.62 + 0.605)).abs() < 1e-5);
        assert_eq!((loss.clipped, loss.gradient[0]), (1, 0.0));
        assert!((loss.gradient[1] - 1.1).abs() < 1e-6);
    }

    type Shape = fn(&[f32]) -> Loss;

    #[test]
    fn gradients_by_finite_differences() {
        let policy: Shape = |l| policy_loss(l, &[0.0; 5], &[1.0, -2.0, 0.5, -0.1, 3.0], 0.2, 0.3);
        let value: Shape = |v| value_loss(v, &[0.0; 5], &[0.4, -1.0, 0.1, 2.0, -0.3], 0.2, 0.3);
        for f in [policy, value] {
            let x = [0.1, -0.5, 0.05, 0.3, -0.12];
            let loss = f(&x);
            for i in 0..5 {
                let at = |h: f32| {
                    let mut x = x;
                    x[i] += h;
                    f(&x).value
                };
                let numeric = (at(1e-3) - at(-1e-3)) / 2e-3;
                assert!((numeric - loss.gradient[i]).abs() < 2e-3, "{i}: {numeric} {loss:?}");
            }
        }
    }

    #[test]
    fn the_order_of_tokens_does_not_matter_and_none_is_no_loss() {
        let a = policy_loss(&[0.1, 0.2], &[0.0, 0.1], &[1.0, -1.0], 0.2, 0.5);
        let b = policy_loss(&[0.2, 0.1], &[0.1, 0.0], &[-1.0, 1.0], 0.2, 0.5);
        assert_eq!((a.value, a.gradient[0]), (b.value, b.gradient[1]));
        assert_eq!(policy_loss(&[], &[], &[], 0.2, 1.0), Loss::default());
    }
}
