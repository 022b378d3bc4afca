//! `y = x wᵀ + b`.

use std::sync::Arc;

use crate::error::Result;
use crate::params::{Init, Param, Params};
use crate::placement::{Dim, Placement, Region};
use crate::tensor::Tensor;

/// A linear layer whose parallelism follows from the names of its two dims: column-parallel when
/// the plan shards its output, row-parallel when it shards its input.
///
/// ```
/// use colossal_tensor::{Dtype, Params, Scope, Tensor, nn::Linear, placement::Dim};
/// let p = Params::new(&Scope::solo(), 0, Dtype::F32);
/// let layer = Linear::new(&p.at("up"), Dim::Embed(4), Dim::Mlp(8), true)?;
/// let y = layer.forward(&Tensor::of(&[0.5f32; 12], &[3, 4])?)?;
/// assert_eq!(y.shape(), [3, 8]);
/// # Ok::<(), colossal_tensor::Error>(())
/// ```
#[derive(Debug)]
pub struct Linear {
    weight: Arc<Param>,
    bias: Option<Arc<Param>>,
}

impl Linear {
    /// `weight [output, input]` drawn with deviation 0.02, and a zero `bias [output]` if wanted.
    pub fn new(p: &Params, input: Dim, output: Dim, bias: bool) -> Result<Linear> {
        Linear::with_init(p, input, output, bias, Init::Normal(0.02))
    }

    /// As [`Linear::new`], with another start for the weight.
    pub fn with_init(
        p: &Params,
        input: Dim,
        output: Dim,
        bias: bool,
        init: Init,
    ) -> Result<Linear> {
        let weight = p.tensor("weight", &[output, input], init)?;
        weight.used_as_factor(true);
        let bias = bias.then(|| p.tensor("bias", &[output], Init::Constant(0.0))).transpose()?;
        Ok(Linear { weight, bias })
    }

    /// A layer over a weight that exists already: a tied head.
    pub fn tied(weight: Arc<Param>) -> Linear {
        weight.used_as_factor(false);
        Linear { weight, bias: None }
    }

    /// `x [.., input]` to `[.., output]`. Where the plan has filled up a vocabulary, logits of
    /// padding are the lowest number.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|b| b.tensor());
        let y = x.linear(&self.weight.tensor(), bias.as_ref())?;
        match self.weight.dims()[0] {
            Dim::Vocab(entries) => y.mask_padding(entries),
            _ => Ok(y),
        }
    }

    /// `residual + forward(x)`, in the residual region.
    pub fn forward_onto(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|b| b.tensor());
        match x.linear_onto(&self.weight.tensor(), bias.as_ref(), residual)? {
            Some(y) => Ok(y),
            None => residual + &self.forward_to(x, Region::Residual)?,
        }
    }

    /// As [`Linear::forward`] with the result taken to `region`. When the input dim is sharded
    /// the product is a pending sum: the bias is added once, after the sum.
    pub fn forward_to(&self, x: &Tensor, region: Region) -> Result<Tensor> {
        let layout = self.weight.layout();
        if !self.weight.scope().wide_axes().any(|axis| layout[axis] == Placement::Shard(1)) {
            return self.forward(x)?.redistribute(region);
        }
        let y = x.linear(&self.weight.tensor(), None)?.redistribute(region)?;
        match &self.bias {
            Some(bias) => y.add_bias(&bias.tensor()),
            None => Ok(y),
        }
    }
}
