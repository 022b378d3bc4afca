//! Normalisation and softmax over the last dim.

use colossal_kernels as kernels;

use super::wide_norm::width_axes;
use super::{produce, same_dtype};
use crate::autograd::{Weight, record};
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;

impl Tensor {
    /// Root-mean-square norm (Zhang & Sennrich, 2019): `x / sqrt(mean(x²) + eps) * weight`.
    pub fn rms_norm(&self, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let layout = self.check_norm("rms_norm", weight)?;
        if let axes @ [_, ..] = &width_axes(self)[..] {
            return super::wide_norm::norm(self, weight, None, eps, layout, axes);
        }
        let mut rstd = Buffer::new::<f32>(if self.scope().is_fake() { 0 } else { self.rows() });
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("rms_norm", self.dtype(), T => {
                let (x, w) = (self.read::<T>()?, weight.read::<T>()?);
                let (x, w) = (x.as_slice::<T>(), w.as_slice::<T>());
                kernels::rms_norm(x, w, eps, y.as_mut_slice::<T>(), rstd.as_mut_slice());
                Ok(())
            })
        })?;
        let (x, w, like) = (self.detach(), weight.detach(), Weight::like(weight));
        Ok(record("rms_norm", y, &[self, weight], move |dy, back| {
            let mut dw = Buffer::zeros::<f32>(w.len());
            let dx = produce(x.scope(), x.shape(), x.dtype(), dy.layout(), |dx| {
                float!("rms_norm", x.dtype(), T => {
                    kernels::rms_norm_backward(
                        dy.read::<T>()?.as_slice::<T>(),
                        x.read::<T>()?.as_slice::<T>(),
                        w.read::<T>()?.as_slice::<T>(),
                        rstd.as_slice(),
                        dx.as_mut_slice::<T>(),
                        dw.as_mut_slice(),
                    );
                    Ok(())
                })
            })?;
            back.weight(1, &like, move |acc| {
                kernels::add_assign(dw.as_slice::<f32>(), acc);
                Ok(())
            })?;
            back.give(0, dx)
        }))
    }

    /// Layer norm (Ba et al., 2016): `(x - mean) / sqrt(var + eps) * weight + bias`.
    pub fn layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
        let layout = self.check_norm("layer_norm", weight)?;
        self.check_norm("layer_norm", bias)?;
        if let axes @ [_, ..] = &width_axes(self)[..] {
            return super::wide_norm::norm(self, weight, Some(bias), eps, layout, axes);
        }
        let rows = if self.scope().is_fake() { 0 } else { self.rows() };
        let (mut mean, mut rstd) = (Buffer::new::<f32>(rows), Buffer::new::<f32>(rows));
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("layer_norm", self.dtype(), T => {
                let (x, w, b) = (self.read::<T>()?, weight.read::<T>()?, bias.read::<T>()?);
                kernels::layer_norm(
                    x.as_slice::<T>(),
                    w.as_slice::<T>(),
                    b.as_slice::<T>(),
                    eps,
                    y.as_mut_slice::<T>(),
                    mean.as_mut_slice(),
                    rstd.as_mut_slice(),
                );
                Ok(())
            })
        })?;
        let (x, w) = (self.detach(), weight.detach());
        let (like_w, like_b) = (Weight::like(weight), Weight::like(bias));
        Ok(record("layer_norm", y, &[self, weight, bias], move |dy, back| {
            let mut dw = Buffer::zeros::<f32>(w.len());
            let mut db = Buffer::zeros::<f32>(w.len());
            let dx = produce(x.scope(), x.shape(), x.dtype(), dy.layout(), |dx| {
                float!("layer_norm", x.dtype(), T => {
                    kernels::layer_norm_backward(
                        dy.read::<T>()?.as_slice::<T>(),
                        x.read::<T>()?.as_slice::<T>(),
                        w.read::<T>()?.as_slice::<T>(),
                        mean.as_slice(),
                        rstd.as_slice(),
                        dx.as_mut_slice::<T>(),
                        dw.as_mut_slice(),
                        db.as_mut_slice(),
                    );
                    Ok(())
                })
            })?;
            back.weight(1, &like_w, move |acc| {
                kernels::add_assign(dw.as_slice::<f32>(), acc);
                Ok(())
            })?;
            back.weight(2, &like_b, move |acc| {
                kernels::add_assign(db.as_slice::<f32>(), acc);
                Ok(())
            })?;
            back.give(0, dx)
        }))
    }

    /// Softmax over the last dim.
    pub fn softmax(&self) -> Result<Tensor> {
        let last = self.shape().len().saturating_sub(1);
        let layout = propagate("softmax", &[self], propagate::rowwise(last))?;
        let dim = self.last_dim();
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("softmax", self.dtype(), T => {
                kernels::softmax(self.read::<T>()?.as_slice::<T>(), dim, y.as_mut_slice::<T>());
                Ok(())
            })
        })?;
        let saved = y.clone();
        Ok(record("softmax", y, &[self], move |dy, back| {
            let dx = produce(dy.scope(), dy.shape(), dy.dtype(), dy.layout(), |dx| {
                float!("softmax", dy.dtype(), T => {
                    let (dy, y) = (dy.read::<T>()?, saved.read::<T>()?);
                    let (dy, y) = (dy.as_slice::<T>(), y.as_slice::<T>());
                    kernels::softmax_backward(dy, y, dim, dx.as_mut_slice::<T>());
                    Ok(())
                })
            })?;
            back.give(0, dx)
        }))
    }

    fn check_norm(&self, op: &'static str, weight: &Tensor) -> Result<crate::placement::Layout> {
        if self.shape().is_empty() || weight.shape() != [self.last_dim()] {
            return Err(Error::shape(op, self.shape(), weight.shape(), "weight is [last dim]"));
        }
        same_dtype(op, self, weight)?;
        propagate(op, &[self, weight], propagate::norm(self.shape().len() - 1))
    }
}
