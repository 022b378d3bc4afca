//! Rotary position embedding with the scalings of published checkpoints.

use crate::error::Result;
use crate::ops::RopeTable;
use crate::tensor::Tensor;

/// How frequencies are stretched to a longer context.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RopeScaling {
    /// As trained.
    #[default]
    None,
    /// All positions divided by a factor (`linear`).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Long wavelengths divided, short ones kept, a ramp between (`llama3`, LLaMA 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
        /// Context the model was first trained with.
        original: f64,
    },
}

/// Rotates queries and keys by their positions.
#[derive(Debug, Clone)]
pub struct Rope {
    table: RopeTable,
}

impl Rope {
    /// A table for heads of this size: frequency `i` is `base^(-2i / head_dim)`.
    pub fn new(head_dim: usize, base: f64, positions: usize, scaling: RopeScaling) -> Rope {
        let inverse: Vec<f64> = (0..head_dim / 2)
            .map(|i| scaling.apply(base.powf(-2.0 * i as f64 / head_dim as f64)))
            .collect();
        Rope { table: RopeTable::new(&inverse, positions) }
    }

    /// `x [batch, seq, heads, head_dim]`, one position (of `i32`) per token.
    pub fn forward(&self, x: &Tensor, positions: &Tensor) -> Result<Tensor> {
        x.rope(positions, &self.table)
    }
}

impl RopeScaling {
    /// The frequency (radians per position) that takes the place of this one.
    pub fn apply(self, frequency: f64) -> f64 {
        match self {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low, high, original } => {
                let wavelength = std::f64::consts::TAU / frequency;
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}
