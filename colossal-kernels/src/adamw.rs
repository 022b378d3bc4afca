//! AdamW (Loshchilov & Hutter, 2019), one pass over memory.

use crate::elementwise::check;
use crate::float::Float;
use crate::isa::simd;
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for};

/// The hyper-parameters of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Decay rate of the first moment.
    pub beta1: f32,
    /// Decay rate of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// `[decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), beta1, beta2, eps, grad scale]`
type Factors = [f32; 7];

#[inline(always)]
fn update(p: f32, g: f32, m: &mut f32, v: &mut f32, f: &Factors) -> f32 {
    let [decay, rate, root, beta1, beta2, eps, scale] = *f;
    let g = g * scale;
    *m = beta1 * *m + (1.0 - beta1) * g;
    *v = beta2 * *v + (1.0 - beta2) * g * g;
    p * decay - rate * *m / (v.sqrt() * root + eps)
}

impl AdamW {
    pub(crate) fn factors(&self, t: u32, grad_scale: f32) -> Factors {
        let t = t.max(1) as i32;
        let bias1 = 1.0 - f64::from(self.beta1).powi(t);
        let bias2 = 1.0 - f64::from(self.beta2).powi(t);
        [
            1.0 - self.lr * self.weight_decay,
            (f64::from(self.lr) / bias1) as f32,
            (1.0 / bias2.sqrt()) as f32,
            self.beta1,
            self.beta2,
            self.eps,
            grad_scale,
        ]
    }

    /// Step `t` (from 1) of parameters and moments in f32.
    pub fn step(&self, t: u32, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
        self.step_grad_scale(t, params, grads, m, v, 1.0);
    }

    /// As [`AdamW::step`] with every gradient multiplied by `grad_scale`: clipping for free.
    pub fn step_grad_scale(
        &self,
        t: u32,
        params: &mut [f32],
        grads: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        grad_scale: f32,
    ) {
        let _span = profile::moves::<f32>("adamw", params.len(), 7);
        for len in [grads.len(), m.len(), v.len()] {
            check("adamw", params.len(), len);
        }
        simd! { fn piece(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: &Factors) {
            for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                *p = update(*p, *g, m, v, f);
            }
        } }
        let f = self.factors(t, grad_scale);
        let len = params.len();
        let (p, m, v) = (Parts::new(params), Parts::new(m), Parts::new(v));
        parallel_for(len, 16384, |r| {
            // SAFETY: ranges of different pieces are disjoint.
            let (p, m, v) = unsafe { (p.range(r.clone()), m.range(r.clone()), v.range(r.clone())) };
            piece(p, &grads[r], m, v, &f);
        });
    }

    /// As [`AdamW::step_grad_scale`] on f32 masters, writing the bf16 or f16 parameters in the
    /// same pass: the CPU Adam of offloaded optimizers.
    pub fn step_masters<T: Float>(
        &self,
        t: u32,
        grad_scale: f32,
        master: &mut [f32],
        params: &mut [T],
        grads: &[f32],
        m: &mut [f32],
        v: &mut [f32],
    ) {
        let _span = profile::span::<f32>("adamw_masters", [master.len(), 0, 0], || Work {
            flops: 0,
            bytes: 30 * master.len() as u64,
        });
        for len in [params.len(), grads.len(), m.len(), v.len()] {
            check("adamw", master.len(), len);
        }
        simd! { fn piece<T: Float>(w: &mut [f32], p: &mut [T], g: &[f32], m: &mut [f32], v: &mut [f32], f: &Factors) {
            for ((((w, p), g), m), v) in w.iter_mut().zip(p).zip(g).zip(m).zip(v) {
                *w = update(*w, *g, m, v, f);
                *p = T::from_f32(*w);
            }
        } }
        let f = self.factors(t, grad_scale);
        let len = master.len();
        let (w, p) = (Parts::new(master), Parts::new(params));
        let (m, v) = (Parts::new(m), Parts::new(v));
        parallel_for(len, 16384, |r| {
            // SAFETY: ranges of different pieces are disjoint.
            let (w, p) = unsafe { (w.range(r.clone()), p.range(r.clone())) };
            // SAFETY: as above.
            let (m, v) = unsafe { (m.range(r.clone()), v.range(r.clone())) };
            piece(w, p, &grads[r], m, v, &f);
        });
    }
}
