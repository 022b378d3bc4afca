//! Optimizers that scale a parameter's update to the parameter: LAMB and LARS, for large batches.
//!
//! The ratio of a parameter's norm to its update's norm multiplies the learning rate. Two passes
//! over memory, one for the norms and one for the update. Norms are those of the whole parameter:
//! a rank that holds a part of it sums their squares over the others by `sum`.

use crate::elementwise::check;
use crate::factored::Sum;
use crate::isa::simd;
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// LAMB (You et al., 2020): Adam's direction, scaled layer by layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lamb {
    /// Learning rate.
    pub lr: f32,
    /// Decay rate of the first moment.
    pub beta1: f32,
    /// Decay rate of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Weight decay, inside of the direction.
    pub weight_decay: f32,
}

/// LARS (You et al., 2017): momentum of gradients, scaled layer by layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lars {
    /// Learning rate.
    pub lr: f32,
    /// Decay rate of the momentum.
    pub momentum: f32,
    /// Factor of the ratio of norms, around 0.001.
    pub trust: f32,
    /// Added to the norm of the update.
    pub eps: f32,
    /// Weight decay, added to the gradient.
    pub weight_decay: f32,
}

/// Runs `f(range)`, which returns two sums of squares, over fixed runs; their totals, in order.
fn norms(
    len: usize,
    sum: Sum<'_>,
    f: impl Fn(std::ops::Range<usize>) -> [f64; 2] + Sync,
) -> [f64; 2] {
    const RUN: usize = 4096;
    let mut sums = vec![[0.0f64; 2]; len.div_ceil(RUN)];
    let parts = Parts::new(&mut sums);
    parallel_for(parts.len(), 4, |runs| {
        for i in runs {
            let sums = f(i * RUN..((i + 1) * RUN).min(len));
            // SAFETY: each run has its own sums.
            unsafe { parts.range(i..i + 1) }.fill(sums);
        }
    });
    let mut total = sums.iter().fold([0.0; 2], |t, s| [t[0] + s[0], t[1] + s[1]]);
    sum(&mut total);
    total
}

impl Lamb {
    /// What both passes need.
    pub(crate) fn factors(&self, t: u32, grad_scale: f32) -> [f32; 7] {
        let t = t.max(1) as i32;
        let bias1 = 1.0 - f64::from(self.beta1).powi(t);
        let bias2 = 1.0 - f64::from(self.beta2).powi(t);
        let (rate, root) = ((1.0 / bias1) as f32, (1.0 / bias2.sqrt()) as f32);
        [self.beta1, self.beta2, grad_scale, rate, root, self.eps, self.weight_decay]
    }

    /// The learning rate of a parameter, by the sums of squares of it and of its direction.
    pub(crate) fn rate(&self, squares: [f64; 2]) -> f32 {
        let [size, step] = squares.map(f64::sqrt);
        let ratio = if size > 0.0 && step > 0.0 { size / step } else { 1.0 };
        self.lr * ratio as f32
    }

    /// Step `t` (from 1) of one parameter, its gradient multiplied by `grad_scale`. A caller that
    /// holds it whole gives `&mut |_| {}` as `sum`.
    pub fn step(
        &self,
        t: u32,
        params: &mut [f32],
        grads: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        grad_scale: f32,
        sum: Sum<'_>,
    ) {
        let _span = profile::moves::<f32>("lamb", params.len(), 10);
        for len in [grads.len(), m.len(), v.len()] {
            check("lamb", params.len(), len);
        }
        let f = self.factors(t, grad_scale);
        simd! { fn moments(p: &[f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: &[f32; 7]) -> [f64; 2] {
            let [beta1, beta2, scale, rate, root, eps, decay] = *f;
            let mut sums = [0.0f32; 2];
            for (((p, g), m), v) in p.iter().zip(g).zip(m).zip(v) {
                let g = g * scale;
                *m = beta1 * *m + (1.0 - beta1) * g;
                *v = beta2 * *v + (1.0 - beta2) * g * g;
                let r = rate * *m / (v.sqrt() * root + eps) + decay * p;
                sums[0] += p * p;
                sums[1] += r * r;
            }
            sums.map(f64::from)
        } }
        simd! { fn update(p: &mut [f32], m: &[f32], v: &[f32], f: &[f32; 7], lr: f32) {
            let [_, _, _, rate, root, eps, decay] = *f;
            for ((p, m), v) in p.iter_mut().zip(m).zip(v) {
                *p -= lr * (rate * m / (v.sqrt() * root + eps) + decay * *p);
            }
        } }
        let (mp, vp) = (Parts::new(m), Parts::new(v));
        let values = &*params;
        let norms = norms(values.len(), sum, |r| {
            // SAFETY: runs are disjoint.
            let (m, v) = unsafe { (mp.range(r.clone()), vp.range(r.clone())) };
            moments(&values[r.clone()], &grads[r], m, v, &f)
        });
        let lr = self.rate(norms);
        let p = Parts::new(params);
        parallel_for(grads.len(), 16384, |r| {
            // SAFETY: ranges of different pieces are disjoint.
            update(unsafe { p.range(r.clone()) }, &m[r.clone()], &v[r], &f, lr);
        });
    }
}

impl Lars {
    /// What the update needs, by the sums of squares of the parameter and of its gradient.
    pub(crate) fn factors(&self, squares: [f64; 2], grad_scale: f32) -> [f32; 5] {
        let [size, step] = squares.map(f64::sqrt);
        let below = step + f64::from(self.weight_decay) * size + f64::from(self.eps);
        let ratio =
            if size > 0.0 && step > 0.0 { f64::from(self.trust) * size / below } else { 1.0 };
        [self.lr, self.momentum, ratio as f32, self.weight_decay, grad_scale]
    }

    /// One step of one parameter, its gradient multiplied by `grad_scale`:
    /// `m = momentum m + ratio (g + weight_decay p)`, `p -= lr m`; `sum` as in [`Lamb::step`].
    pub fn step(
        &self,
        params: &mut [f32],
        grads: &[f32],
        m: &mut [f32],
        grad_scale: f32,
        sum: Sum<'_>,
    ) {
        let _span = profile::moves::<f32>("lars", params.len(), 7);
        check("lars", params.len(), grads.len());
        check("lars", params.len(), m.len());
        simd! { fn squares(p: &[f32], g: &[f32], scale: f32) -> [f64; 2] {
            let mut sums = [0.0f32; 2];
            for (p, g) in p.iter().zip(g) {
                let g = g * scale;
                sums[0] += p * p;
                sums[1] += g * g;
            }
            sums.map(f64::from)
        } }
        simd! { fn update(p: &mut [f32], g: &[f32], m: &mut [f32], f: &[f32; 5]) {
            let [lr, momentum, ratio, decay, scale] = *f;
            for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                *m = momentum * *m + ratio * (g * scale + decay * *p);
                *p -= lr * *m;
            }
        } }
        let values = &*params;
        let norms =
            norms(values.len(), sum, |r| squares(&values[r.clone()], &grads[r], grad_scale));
        let f = self.factors(norms, grad_scale);
        let (p, m) = (Parts::new(params), Parts::new(m));
        parallel_for(grads.len(), 16384, |r| {
            // SAFETY: ranges of different pieces are disjoint.
            let (p, m) = unsafe { (p.range(r.clone()), m.range(r.clone())) };
            update(p, &grads[r], m, &f);
        });
    }
}
