//! Lion (Chen et al., 2023): the sign of an interpolated momentum; one state instead of two.

use crate::elementwise::check;
use crate::isa::simd;
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// The hyper-parameters of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// Learning rate; the paper takes a tenth to a third of Adam's.
    pub lr: f32,
    /// Weight of the momentum in the direction.
    pub beta1: f32,
    /// Decay rate of the momentum.
    pub beta2: f32,
    /// Decoupled weight decay; the paper takes three to ten times Adam's.
    pub weight_decay: f32,
}

impl Lion {
    /// One step: `p -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay p)`, then
    /// `m = beta2 m + (1 - beta2) g`, with `g` the gradient times `grad_scale`.
    pub fn step(&self, params: &mut [f32], grads: &[f32], m: &mut [f32], grad_scale: f32) {
        let _span = profile::moves::<f32>("lion", params.len(), 5);
        check("lion", params.len(), grads.len());
        check("lion", params.len(), m.len());
        simd! { fn piece(p: &mut [f32], g: &[f32], m: &mut [f32], f: &[f32; 5]) {
            let [decay, lr, beta1, beta2, scale] = *f;
            for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                let g = g * scale;
                let c = beta1 * *m + (1.0 - beta1) * g;
                let step = if c > 0.0 { lr } else if c < 0.0 { -lr } else { 0.0 };
                *p = *p * decay - step;
                *m = beta2 * *m + (1.0 - beta2) * g;
            }
        } }
        let f = [1.0 - self.lr * self.weight_decay, self.lr, self.beta1, self.beta2, grad_scale];
        let (p, m) = (Parts::new(params), Parts::new(m));
        parallel_for(grads.len(), 16384, |r| {
            // SAFETY: ranges of different pieces are disjoint.
            let (p, m) = unsafe { (p.range(r.clone()), m.range(r.clone())) };
            piece(p, &grads[r], m, &f);
        });
    }
}
