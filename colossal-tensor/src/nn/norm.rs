//! Norms over the last dim.

use std::sync::Arc;

use crate::error::Result;
use crate::params::{Init, Param, Params};
use crate::placement::Dim;
use crate::tensor::Tensor;

/// `x / sqrt(mean(x²) + eps) * weight`.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Arc<Param>,
    eps: f32,
}

impl RmsNorm {
    /// A weight of ones.
    pub fn new(p: &Params, width: Dim, eps: f32) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: p.tensor("weight", &[width], Init::Constant(1.0))?, eps })
    }

    /// `[.., width]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.rms_norm(&self.weight.tensor(), self.eps)
    }
}

/// `(x - mean) / sqrt(var + eps) * weight + bias`.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Arc<Param>,
    bias: Arc<Param>,
    eps: f32,
}

impl LayerNorm {
    /// A weight of ones and a bias of zeros.
    pub fn new(p: &Params, width: Dim, eps: f32) -> Result<LayerNorm> {
        Ok(LayerNorm {
            weight: p.tensor("weight", &[width], Init::Constant(1.0))?,
            bias: p.tensor("bias", &[width], Init::Constant(0.0))?,
            eps,
        })
    }

    /// `[.., width]` to the same shape.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.layer_norm(&self.weight.tensor(), &self.bias.tensor(), self.eps)
    }
}
