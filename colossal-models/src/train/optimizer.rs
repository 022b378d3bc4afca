//! The optimizer's hyper-parameters.

use serde::{Deserialize, Serialize};

use super::LrSchedule;

/// AdamW (Loshchilov & Hutter, 2019): decay is decoupled from the gradient, and applies to
/// matrices only; biases and norm weights are not decayed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// The learning rate by step.
    pub lr: LrSchedule,
    /// Decay rates of the two moments.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub clip: f32,
}

impl Default for AdamW {
    fn default() -> AdamW {
        AdamW {
            lr: LrSchedule::constant(3e-4),
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
        }
    }
}
