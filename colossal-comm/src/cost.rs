//! The alpha-beta model: what a collective costs before it is called.

/// Seconds of a collective: a latency, and a time per byte of the buffer (Hockney 1994).
///
/// `cargo xtask bench comm` fits one for each verb and number of ranks on your machine.
///
/// ```
/// use colossal_comm::Cost;
/// let measured = [(1024, 1.5e-6), (1 << 20, 105.8e-6), (16 << 20, 1.679e-3)];
/// let cost = Cost::fit(&measured).unwrap();
/// assert!((cost.alpha - 1.4e-6).abs() < 0.2e-6);
/// assert!((cost.seconds(4 << 20) - 420e-6).abs() < 10e-6);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Seconds of a call without bytes.
    pub alpha: f64,
    /// Seconds per byte.
    pub beta: f64,
}

impl Cost {
    /// The model with the least squares of relative errors, from (bytes, seconds); none unless
    /// two sizes differ and all times are positive.
    pub fn fit(measured: &[(usize, f64)]) -> Option<Cost> {
        let first = measured.first()?.0;
        if measured.iter().all(|(n, _)| *n == first) || measured.iter().any(|(_, t)| *t <= 0.0) {
            return None;
        }
        // Minimises the sum of ((alpha + beta n) / t - 1)^2.
        let (mut one, mut bytes, mut square, mut a, mut b) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (n, t) in measured {
            let (n, w) = (*n as f64, 1.0 / (t * t));
            one += w;
            bytes += w * n;
            square += w * n * n;
            a += w * t;
            b += w * n * t;
        }
        let det = one * square - bytes * bytes;
        let alpha = ((a * square - b * bytes) / det).max(0.0);
        Some(Cost { alpha, beta: ((b - alpha * bytes) / square).max(0.0) })
    }

    /// What a call with this many bytes takes.
    pub fn seconds(&self, bytes: usize) -> f64 {
        self.alpha + self.beta * bytes as f64
    }
}
