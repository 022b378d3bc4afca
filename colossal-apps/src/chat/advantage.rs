//! Generalised advantage estimation (Schulman et al., 2015).
//!
//! `A[t] = delta[t] + gamma * lambda * A[t+1]`, with `delta[t] = r[t] + gamma * V[t+1] - V[t]` and
//! `V = 0` after the end. Returns are `A + V`; they are formed before advantages are whitened.

/// Advantages and returns of one completion.
///
/// ```
/// use colossal_apps::chat::advantage::gae;
/// let (a, r) = gae(&[0.0, 0.0, 1.0], &[0.5, 0.5, 0.5], 1.0, 1.0);
/// assert_eq!((a, r), (vec![0.5; 3], vec![1.0; 3])); // lambda 1: return minus value
/// ```
pub fn gae(rewards: &[f32], values: &[f32], gamma: f32, lambda: f32) -> (Vec<f32>, Vec<f32>) {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_value, mut next) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        next = delta + gamma * lambda * next;
        advantages[t] = next;
        next_value = values[t];
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

/// Sums a set of numbers needs to be whitened: `[count, sum, sum of squares]`. Ranks add theirs.
pub fn moments<'a>(values: impl Iterator<Item = &'a f32>) -> [f64; 3] {
    values.fold([0.0; 3], |[n, s, q], x| {
        let x = f64::from(*x);
        [n + 1.0, s + x, q + x * x]
    })
}

/// `(x - mean) / sqrt(var + 1e-8)` under the moments of the whole batch.
pub fn whiten(values: &mut [f32], [count, sum, squares]: [f64; 3]) {
    if count < 1.0 {
        return;
    }
    let mean = sum / count;
    let scale = 1.0 / ((squares / count - mean * mean).max(0.0) + 1e-8).sqrt();
    for x in values {
        *x = ((f64::from(*x) - mean) * scale) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_by_hand() {
        // gamma 0.9, lambda 0.5: delta = [0.9*2 - 1, 1 - 2] = [0.8, -1]; A = [0.8 - 0.45, -1].
        let (a, r) = gae(&[0.0, 1.0], &[1.0, 2.0], 0.9, 0.5);
        assert!((a[0] - 0.35).abs() < 1e-6 && a[1] == -1.0);
        assert!((r[0] - 1.35).abs() < 1e-6 && r[1] == 1.0);
    }

    #[test]
    fn with_gamma_and_lambda_one_it_is_the_return_minus_the_value() {
        let rewards = [0.3, -0.2, 0.0, 1.0];
        let values = [0.1, 0.9, -0.4, 0.2];
        let (a, _) = gae(&rewards, &values, 1.0, 1.0);
        for t in 0..4 {
            let to_go: f32 = rewards[t..].iter().sum();
            assert!((a[t] - (to_go - values[t])).abs() < 1e-6);
        }
        assert_eq!(gae(&[], &[], 1.0, 0.95), (vec![], vec![]));
    }

    #[test]
    fn whitened_values_have_mean_zero_and_variance_one_over_all_ranks() {
        let (mut a, mut b) = (vec![1.0, 2.0, 3.0], vec![10.0]);
        let all = moments(a.iter().chain(&b));
        whiten(&mut a, all);
        whiten(&mut b, all);
        let [n, s, q] = moments(a.iter().chain(&b));
        assert!(s.abs() < 1e-5 && (q / n - 1.0).abs() < 1e-5);
        let mut same = vec![5.0; 3];
        whiten(&mut same, moments([5.0f32; 3].iter()));
        assert_eq!(same, [0.0; 3]);
    }
}
