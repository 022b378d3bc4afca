//! Sums.

use super::produce;
use crate::autograd::record;
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::propagate::{self, propagate};
use crate::tensor::Tensor;

impl Tensor {
    /// The sum of all elements, in f32.
    pub fn sum(&self) -> Result<Tensor> {
        let layout = propagate("sum", &[self], propagate::sum)?;
        let y = produce(self.scope(), &[], Dtype::F32, layout, |y| {
            float!("sum", self.dtype(), T => {
                kernels::sum(self.lend::<T>()?.view::<T>(), y.view_mut())
            })
        })?;
        let (scope, shape) = (self.scope().clone(), self.shape().to_vec());
        let (dtype, layout) = (self.dtype(), self.layout().dual());
        Ok(record("sum", y, &[self], move |dy, back| {
            let dy = dy.item()?;
            let dx = produce(&scope, &shape, dtype, layout, |dx| {
                float!("sum", dtype, T => {
                    use colossal_kernels::Float;
                    kernels::fill(dx.view_mut(), <T as Float>::from_f32(dy))
                })
            })?;
            back.give(0, dx)
        }))
    }

    /// `sum(self * weights)` in f32, with constant weights: a masked or averaged loss.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is one weight per local element.
    pub fn weighted_sum(&self, weights: &[f32]) -> Result<Tensor> {
        if weights.len() != self.len() && !self.scope().is_fake() {
            let reason = "one weight per local element";
            return Err(Error::shape("weighted_sum", self.shape(), &[weights.len()], reason));
        }
        let values = if self.scope().is_fake() { vec![] } else { self.to_vec()? };
        let total = values.iter().zip(weights).map(|(x, w)| f64::from(x * w)).sum::<f64>();
        Tensor::external(total as f32, &[(self, weights.to_vec())])
    }
}
