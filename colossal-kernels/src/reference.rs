//! The plain form of every kernel: what the fast ones are tested against.
//!
//! Scalar loops in f64 over the definitions, for reading as much as for running.

use crate::attention::AttentionShape;

/// `c[m, n] = a[m, k] b[k, n]`, dense row-major.
pub fn gemm(m: usize, n: usize, k: usize, a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for l in 0..k {
            for j in 0..n {
                c[i * n + j] += a[i * k + l] * b[l * n + j];
            }
        }
    }
    c
}

/// Attention by the whole matrix of probabilities; a query that sees nothing gets zeros.
pub fn attention(s: &AttentionShape<'_>, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
    let d = s.head_dim;
    let mut out = vec![0.0; q.len()];
    for b in 0..s.batch {
        for h in 0..s.heads {
            let kv_head = h / (s.heads / s.kv_heads);
            for i in 0..s.q_real(b) {
                let q_at = ((b * s.q_len + i) * s.heads + h) * d;
                let kv_at = |j: usize| b * s.kv_stride() + (j * s.kv_heads + kv_head) * d;
                let scores: Vec<(usize, f64)> = s
                    .visible(b, i)
                    .map(|j| {
                        let dot: f64 = (0..d).map(|c| q[q_at + c] * k[kv_at(j) + c]).sum();
                        let bias = s.bias.map_or(0.0, |bias| {
                            let at =
                                b * bias.batch_stride + h * bias.head_stride + i * s.kv_len + j;
                            f64::from(bias.data[at])
                        });
                        (j, dot * f64::from(s.scale) + bias)
                    })
                    .collect();
                let max = scores.iter().map(|(_, x)| *x).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|(_, x)| (x - max).exp()).sum();
                for (j, x) in &scores {
                    let p = (x - max).exp() / sum;
                    (0..d).for_each(|c| out[q_at + c] += p * v[kv_at(*j) + c]);
                }
            }
        }
    }
    out
}

/// RMS norm of rows.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let dim = weight.len();
    let row = |x: &[f64]| {
        let rstd = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + eps).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * rstd * w).collect::<Vec<_>>()
    };
    x.chunks(dim).flat_map(row).collect()
}

/// Layer norm of rows.
pub fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
    let dim = weight.len();
    let row = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / dim as f64;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
        let rstd = 1.0 / (var + eps).sqrt();
        let y = x.iter().zip(weight).zip(bias).map(|((x, w), b)| (x - mean) * rstd * w + b);
        y.collect::<Vec<_>>()
    };
    x.chunks(dim).flat_map(row).collect()
}

/// Softmax of rows.
pub fn softmax(x: &[f64], dim: usize) -> Vec<f64> {
    let row = |x: &[f64]| {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
        x.iter().map(|x| (x - max).exp() / sum).collect::<Vec<_>>()
    };
    x.chunks(dim).flat_map(row).collect()
}

/// Cross-entropy of each row.
pub fn cross_entropy(logits: &[f64], targets: &[i32], vocab: usize, ignore: i32) -> Vec<f64> {
    let rows = logits.chunks(vocab).zip(targets);
    rows.map(|(row, t)| if *t == ignore { 0.0 } else { -softmax(row, vocab)[*t as usize].ln() })
        .collect()
}

/// Half-split rotary embedding of `[tokens, heads, head_dim]`.
pub fn rope(
    x: &[f64],
    positions: &[i32],
    cos: &[f64],
    sin: &[f64],
    heads: usize,
    d: usize,
) -> Vec<f64> {
    let half = d / 2;
    let mut y = vec![0.0; x.len()];
    for (t, p) in positions.iter().enumerate() {
        for h in 0..heads {
            for i in 0..half {
                let at = (t * heads + h) * d + i;
                let (c, s) = (cos[*p as usize * half + i], sin[*p as usize * half + i]);
                y[at] = x[at] * c - x[at + half] * s;
                y[at + half] = x[at + half] * c + x[at] * s;
            }
        }
    }
    y
}

/// One AdamW step: new parameter and moments of one element.
pub fn adamw(rule: &crate::AdamW, t: u32, p: f64, g: f64, m: f64, v: f64) -> [f64; 3] {
    let (b1, b2) = (f64::from(rule.beta1), f64::from(rule.beta2));
    let m = b1 * m + (1.0 - b1) * g;
    let v = b2 * v + (1.0 - b2) * g * g;
    let (mh, vh) = (m / (1.0 - b1.powi(t as i32)), v / (1.0 - b2.powi(t as i32)));
    let lr = f64::from(rule.lr);
    let p = p - lr * f64::from(rule.weight_decay) * p - lr * mh / (vh.sqrt() + f64::from(rule.eps));
    [p, m, v]
}

/// The error function by its power series: exact to 1e-12 for `|x| < 3`.
pub fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// `x * sigmoid(x)`.
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// GELU by the error function.
pub fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// GELU by tanh.
pub fn gelu_tanh(x: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// One [`Lion`](crate::Lion) step of one parameter: the parameter and its momentum.
pub fn lion(o: &crate::Lion, p: f64, g: f64, m: f64) -> [f64; 2] {
    let (lr, b1, b2) = (f64::from(o.lr), f64::from(o.beta1), f64::from(o.beta2));
    let c = b1 * m + (1.0 - b1) * g;
    let sign = if c == 0.0 { 0.0 } else { c.signum() };
    [p - lr * (sign + f64::from(o.weight_decay) * p), b2 * m + (1.0 - b2) * g]
}

/// One [`Lamb`](crate::Lamb) step of a tensor, each element `[p, m, v]`.
pub fn lamb(o: &crate::Lamb, t: u32, x: &mut [[f64; 3]], g: &[f64]) {
    let (b1, b2, t) = (f64::from(o.beta1), f64::from(o.beta2), t as i32);
    let direction = |[p, m, v]: [f64; 3]| {
        let (m, v) = (m / (1.0 - b1.powi(t)), v / (1.0 - b2.powi(t)));
        m / (v.sqrt() + f64::from(o.eps)) + f64::from(o.weight_decay) * p
    };
    for (x, g) in x.iter_mut().zip(g) {
        *x = [x[0], b1 * x[1] + (1.0 - b1) * g, b2 * x[2] + (1.0 - b2) * g * g];
    }
    let norm = |f: &dyn Fn([f64; 3]) -> f64| x.iter().map(|x| f(*x).powi(2)).sum::<f64>().sqrt();
    let ratio = norm(&|x| x[0]) / norm(&direction);
    x.iter_mut().for_each(|x| x[0] -= f64::from(o.lr) * ratio * direction(*x));
}

/// One [`Lars`](crate::Lars) step of a tensor, each element `[p, m]`.
pub fn lars(o: &crate::Lars, x: &mut [[f64; 2]], g: &[f64]) {
    let decay = f64::from(o.weight_decay);
    let size = x.iter().map(|x| x[0] * x[0]).sum::<f64>().sqrt();
    let step = g.iter().map(|g| g * g).sum::<f64>().sqrt();
    let ratio = f64::from(o.trust) * size / (step + decay * size + f64::from(o.eps));
    for (x, g) in x.iter_mut().zip(g) {
        x[1] = f64::from(o.momentum) * x[1] + ratio * (g + decay * x[0]);
        x[0] -= f64::from(o.lr) * x[1];
    }
}
