//! `y = x wᵀ + b`.

use std::sync::Arc;

use crate::chunked::chunked;
use crate::device::Device;
use crate::error::Result;
use crate::params::{Init, Param, Params};
use crate::placement::{Dim, Placement, Region};
use crate::tensor::Tensor;

/// Bytes of logits that exist at once.
const LOGITS: usize = 16 << 20;
/// But so many rows, that the product is as fast as of all.
const ROWS: usize = 256;

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

    /// The summed cross-entropy of `forward(x)`, logits over a vocabulary, times `factor`: a scalar in
    /// f32. `targets [..]` are as [`Tensor::cross_entropy`] takes them. At most `rows` of the logits exist
    /// at once where no product or loss of them needs all of its rows; `None` chooses.
    ///
    /// # Errors
    /// As [`Tensor::cross_entropy`].
    pub fn cross_entropy(
        &self,
        x: &Tensor,
        targets: &Tensor,
        factor: f32,
        rows: Option<usize>,
    ) -> Result<Tensor> {
        let weight = self.weight.tensor();
        let rows = match x.scope().device() {
            _ if x.goes_elsewhere(&weight) => usize::MAX,
            Device::Cuda(_) => rows.unwrap_or(usize::MAX),
            Device::Cpu => {
                rows.unwrap_or((LOGITS / (weight.shape()[0] * x.dtype().bytes()).max(1)).max(ROWS))
            }
        };
        chunked(x, targets, rows, |x, targets| {
            self.forward(x)?.cross_entropy(targets)?.sum()?.scale(factor)
        })
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
