//! Normalisation and softmax over the last dim.

use super::wide_norm::width_axes;
use super::{produce, same_dtype};
use crate::autograd::{Like, record};
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
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
        let mut rstd = self.scope().room::<f32>(self.rows())?;
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("rms_norm", self.dtype(), T => {
                let (x, w) = (self.lend::<T>()?, weight.lend::<T>()?);
                let (x, w) = (x.view::<T>(), w.view::<T>());
                kernels::rms_norm(x, w, eps, y.view_mut::<T>(), rstd.view_mut())
            })
        })?;
        let (x, w, like, layout) = (self.detach(), weight.detach(), Like::of(weight), y.layout());
        let again = (x.clone(), w.clone());
        Ok(record("rms_norm", y, &[self, weight], move |dy, back| {
            let mut dw = Buffer::zeros_on::<f32>(w.scope().device(), w.len())?;
            let mut dy = dy.into_buffer()?;
            let like_x = Like::of(&x);
            let (mut dx, accumulate) = back.room(0, &like_x)?;
            float!("rms_norm", x.dtype(), T => {
                kernels::rms_norm_backward(
                    dy.view_mut::<T>(),
                    x.lend::<T>()?.view::<T>(),
                    w.lend::<T>()?.view::<T>(),
                    rstd.view(),
                    accumulate,
                    dx.view_mut::<T>(),
                    dw.view_mut(),
                )
            })?;
            back.remake(|| like_x.value(dy, layout));
            back.weight(1, &like, move |acc| kernels::add_assign(dw.view::<f32>(), acc))?;
            back.give(0, like_x.gradient(dx))
        })
        .remade_by(move || again.0.rms_norm(&again.1, eps)))
    }

    /// Layer norm (Ba et al., 2016): `(x - mean) / sqrt(var + eps) * weight + bias`.
    pub fn layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
        let layout = self.check_norm("layer_norm", weight)?;
        self.check_norm("layer_norm", bias)?;
        if let axes @ [_, ..] = &width_axes(self)[..] {
            return super::wide_norm::norm(self, weight, Some(bias), eps, layout, axes);
        }
        let rows = self.rows();
        let mut mean = self.scope().room::<f32>(rows)?;
        let mut rstd = self.scope().room::<f32>(rows)?;
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("layer_norm", self.dtype(), T => {
                let (x, w, b) = (self.lend::<T>()?, weight.lend::<T>()?, bias.lend::<T>()?);
                kernels::layer_norm(
                    x.view::<T>(),
                    w.view::<T>(),
                    b.view::<T>(),
                    eps,
                    y.view_mut::<T>(),
                    mean.view_mut(),
                    rstd.view_mut(),
                )
            })
        })?;
        let (x, w, b, layout) = (self.detach(), weight.detach(), bias.detach(), y.layout());
        let again = (x.clone(), w.clone(), b.clone());
        let (like_w, like_b) = (Like::of(weight), Like::of(bias));
        Ok(record("layer_norm", y, &[self, weight, bias], move |dy, back| {
            let mut dw = Buffer::zeros_on::<f32>(w.scope().device(), w.len())?;
            let mut db = Buffer::zeros_on::<f32>(w.scope().device(), w.len())?;
            let mut dy = dy.into_buffer()?;
            let like_x = Like::of(&x);
            let (mut dx, accumulate) = back.room(0, &like_x)?;
            float!("layer_norm", x.dtype(), T => {
                kernels::layer_norm_backward(
                    dy.view_mut::<T>(),
                    x.lend::<T>()?.view::<T>(),
                    w.lend::<T>()?.view::<T>(),
                    b.lend::<T>()?.view::<T>(),
                    mean.view(),
                    rstd.view(),
                    accumulate,
                    dx.view_mut::<T>(),
                    dw.view_mut(),
                    db.view_mut(),
                )
            })?;
            back.remake(|| like_x.value(dy, layout));
            back.weight(1, &like_w, move |acc| kernels::add_assign(dw.view::<f32>(), acc))?;
            back.weight(2, &like_b, move |acc| kernels::add_assign(db.view::<f32>(), acc))?;
            back.give(0, like_x.gradient(dx))
        })
        .remade_by(move || again.0.layer_norm(&again.1, &again.2, eps)))
    }

    /// Softmax over the last dim.
    pub fn softmax(&self) -> Result<Tensor> {
        let last = self.shape().len().saturating_sub(1);
        let layout = propagate("softmax", &[self], propagate::rowwise(last))?;
        let dim = self.last_dim();
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("softmax", self.dtype(), T => {
                kernels::softmax(self.lend::<T>()?.view::<T>(), dim, y.view_mut::<T>())
            })
        })?;
        let saved = y.clone();
        Ok(record("softmax", y, &[self], move |dy, back| {
            let dx = produce(dy.scope(), dy.shape(), dy.dtype(), dy.layout(), |dx| {
                float!("softmax", dy.dtype(), T => {
                    let (dy, y) = (dy.lend::<T>()?, saved.lend::<T>()?);
                    let (dy, y) = (dy.view::<T>(), y.view::<T>());
                    kernels::softmax_backward(dy, y, dim, dx.view_mut::<T>())
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
