//! A scalar that somebody else computed, together with its gradients.
//!
//! Losses of reinforcement learning are short arithmetic over a few numbers per token. They are
//! written as plain functions on slices, tested alone, and enter the graph here.

use super::produce;
use crate::autograd::record;
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::propagate::{self, propagate};
use crate::tensor::Tensor;
use crate::view::View;

impl Tensor {
    /// A scalar of this value whose gradient with respect to each input is given (local part,
    /// one number per element). Sharded inputs make it a `Partial`: a term of a sum over ranks.
    ///
    /// # Errors
    /// [`Error::Shape`] when a gradient has another length than its input.
    pub fn external(value: f32, inputs: &[(&Tensor, Vec<f32>)]) -> Result<Tensor> {
        let Some((first, _)) = inputs.first() else {
            return Err(Error::Other("external: needs at least one input".into()));
        };
        for (x, grad) in inputs {
            if grad.len() != x.len() && !x.scope().is_fake() {
                let reason = "one number per element of the input";
                return Err(Error::shape("external", x.shape(), &[grad.len()], reason));
            }
        }
        let operands: Vec<&Tensor> = inputs.iter().map(|(x, _)| *x).collect();
        let layout = propagate("external", &operands, |p| {
            propagate::elementwise(p).and_then(|q| propagate::sum(&[q]))
        })?;
        let y = produce(first.scope(), &[], Dtype::F32, layout, |y| {
            y.view_mut::<f32>().write(&[value])
        })?;
        let saved: Vec<_> = inputs.iter().map(|(x, g)| (x.detach(), g.clone())).collect();
        Ok(record("external", y, &operands, move |dy, back| {
            let dy = dy.item()?;
            for (i, (x, mut grad)) in saved.into_iter().enumerate() {
                grad.iter_mut().for_each(|g| *g *= dy);
                let layout = x.layout().dual();
                let dx = produce(x.scope(), x.shape(), x.dtype(), layout, |dx| {
                    float!("external", x.dtype(), T => {
                        kernels::cast(View::Cpu(&grad[..]), dx.view_mut::<T>())
                    })
                })?;
                back.give(i, dx)?;
            }
            Ok(())
        }))
    }
}
