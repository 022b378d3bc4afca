//! Matrix products.

use crate::kernels::Mat;

use super::fp8::refuse_elsewhere;
use super::{produce, same_dtype};
use crate::autograd::{Like, record};
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::propagate::{self, propagate};
use crate::tensor::Tensor;

impl Tensor {
    /// `x wᵀ + bias`, with `x [.., in]`, `weight [out, in]`, `bias [out]`. A weight that was
    /// rounded ([`Param::quantize_int8`](crate::Param::quantize_int8)) is multiplied in int8; one that
    /// is to be ([`Param::set_fp8`](crate::Param::set_fp8)) in fp8, forward and backward.
    ///
    /// The gradient of the weight is a product of its own that can be deferred.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        self.linear_with(weight, bias, None)
    }

    /// `residual + x wᵀ + bias`: the sum is taken on the way out of the product, if its layout is that
    /// of the residual and no other kind of product is asked for. Otherwise none.
    pub fn linear_onto(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        residual: &Tensor,
    ) -> Result<Option<Tensor>> {
        let last = self.shape().len().saturating_sub(1);
        let plain = weight.param().is_none_or(|p| p.int8().is_none() && p.fp8().is_none())
            && !self.goes_elsewhere(weight)
            && self.dtype() == residual.dtype()
            && self.shape().split_last().map(|s| s.1) == residual.shape().split_last().map(|s| s.1)
            && residual.shape().last() == weight.shape().first();
        if !plain || self.scope().is_fake() {
            return Ok(None);
        }
        let layout = propagate("linear", &[self, weight], propagate::linear(last));
        match layout {
            Ok(layout) if layout == residual.layout() => {
                self.linear_with(weight, bias, Some(residual)).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn linear_with(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (k, &[n, wk]) = (self.last_dim(), weight.shape()) else {
            return Err(Error::shape(
                "linear",
                self.shape(),
                weight.shape(),
                "weight is [out, in]",
            ));
        };
        if k != wk || self.shape().is_empty() {
            let reason = "the last dim of x must equal the last dim of the weight";
            return Err(Error::shape("linear", self.shape(), weight.shape(), reason));
        }
        same_dtype("linear", self, weight)?;
        let last = self.shape().len() - 1;
        if let Some(y) = self.linear_elsewhere(weight)? {
            return match bias {
                Some(bias) => y.add_bias(bias),
                None => Ok(y),
            };
        }
        let mut layout = propagate("linear", &[self, weight], propagate::linear(last))?;
        if let Some(bias) = bias {
            same_dtype("linear bias", weight, bias)?;
            if bias.shape() != [n] {
                return Err(Error::shape("linear bias", bias.shape(), &[n], "bias is [out]"));
            }
            let y = self.rewrap(self.shape(), layout, 0, crate::autograd::Edge::None);
            layout = propagate("linear bias", &[&y, bias], propagate::bias(last))?;
        }
        let m = self.rows();
        let fp8 = weight.param().and_then(|p| p.fp8()).filter(|_| m * n * k > 0);
        let mut shape = self.shape().to_vec();
        shape[last] = n;
        let y = produce(self.scope(), &shape, self.dtype(), layout, |y| {
            float!("linear", self.dtype(), T => {
                if let Some((param, w)) = weight.param().and_then(|p| Some((p, p.int8()?))) {
                    if let Some(stream) = self.scope().device().stream() {
                        crate::storage::seen(stream, param);
                    }
                    let b = bias.map(|b| b.lend::<T>()).transpose()?;
                    let b = b.as_ref().map(|b| b.view());
                    let x = self.lend::<T>()?;
                    return kernels::gemm_int8(x.view::<T>(), m, w, b, y.view_mut::<T>());
                }
                let x = self.lend::<T>()?;
                let w = weight.lend::<T>()?;
                let b = bias.map(|b| b.lend::<T>()).transpose()?;
                if let Some(fp8) = fp8 {
                    let (x, w, b) = (x.view::<T>(), w.view::<T>(), b.as_ref().map(|b| b.view()));
                    return fp8.output([m, n, k], x, w, b, y.view_mut::<T>());
                }
                let b = b.as_ref().map(|b| b.view());
                let (x, w) = (Mat::new(x.view::<T>(), m, k), Mat::new(w.view::<T>(), n, k).t());
                match residual {
                    Some(residual) => {
                        let residual = residual.lend::<T>()?;
                        kernels::gemm_onto(x, w, y.view_mut(), b, residual.view())
                    }
                    None => kernels::gemm(x, w, y.view_mut::<T>(), b, false),
                }
            })
        })?;
        let (x, w) = (self.save(), weight.detach());
        let like_x = Like::of(self);
        let (like_w, like_b) = (Like::of(weight), bias.map(Like::of));
        let mut inputs = vec![self, weight];
        inputs.extend(bias);
        let onto = residual.map(|_| inputs.len());
        inputs.extend(residual);
        Ok(record("linear", y, &inputs, move |dy, back| {
            if let Some(onto) = onto {
                back.give(onto, dy.clone())?;
            }
            if let Some(like) = &like_b
                && back.wants(2)
            {
                let dy = dy.clone();
                back.weight(2, like, move |db| {
                    float!("linear", dy.dtype(), T => {
                        kernels::sum_rows(dy.lend::<T>()?.view::<T>(), n, db)
                    })
                })?;
            }
            if back.wants(1) {
                let dy = dy.clone();
                back.weight_of(1, &like_w, x, move |x, dw| {
                    float!("linear", dy.dtype(), T => {
                        let (dy, x) = (dy.lend::<T>()?, x.lend::<T>()?);
                        if let Some(fp8) = fp8 {
                            let (dy, x) = (dy.view::<T>(), x.view::<T>());
                            return fp8.weight_gradient([m, n, k], dy, x, dw);
                        }
                        kernels::gemm(
                            Mat::new(dy.view::<T>(), m, n).t(),
                            Mat::new(x.view::<T>(), m, k),
                            dw.sum,
                            None,
                            !dw.fresh,
                        )
                    })
                })?;
            }
            if back.wants(0) {
                // Of several products of x each adds to what those before have left.
                let (mut dx, accumulate) = back.room(0, &like_x)?;
                float!("linear", dy.dtype(), T => {
                                    let (dy, w) = (dy.lend::<T>()?, w.lend::<T>()?);
                                    let (dy, w) = (dy.view::<T>(), w.view::<T>());
                                    match fp8 {
                                        Some(fp8) => {
                 let dx = dx.view_mut::<T>();
                 fp8.input_gradient([m, n, k], dy, w, accumulate, dx)
                }
                                        None => {
                                            let (dy, w) = (Mat::new(dy, m, n), Mat::new(w, n, k));
                                            kernels::gemm(dy, w, dx.view_mut::<T>(), None, accumulate)
                                        }
                                    }
                                })?;
                back.give(0, like_x.gradient(dx))?;
            }
            Ok(())
        }))
    }

    /// Do ranks multiply this by the weight together, or with parts that others hold?
    pub(crate) fn goes_elsewhere(&self, weight: &Tensor) -> bool {
        let overlaps = |axis| crate::overlap::Kind::of(self, weight, axis).is_some();
        crate::summa::grid(weight).is_some()
            || crate::cube::cube(weight).is_some()
            || self.scope().wide_axes().any(overlaps)
    }

    /// The products that communicate: those whose layouts no rank can multiply alone.
    fn linear_elsewhere(&self, weight: &Tensor) -> Result<Option<Tensor>> {
        if let Some(axes) = crate::summa::grid(weight) {
            refuse_elsewhere(weight)?;
            return crate::summa::linear(self, weight, axes).map(Some);
        }
        if let Some(axes) = crate::cube::cube(weight) {
            refuse_elsewhere(weight)?;
            return crate::cube::linear(self, weight, axes).map(Some);
        }
        for axis in self.scope().wide_axes() {
            if let Some(kind) = crate::overlap::Kind::of(self, weight, axis) {
                refuse_elsewhere(weight)?;
                return crate::overlap::linear(self, weight, axis, kind).map(Some);
            }
        }
        Ok(None)
    }

    /// `x + bias` with `bias [n]` along the last dim.
    pub fn add_bias(&self, bias: &Tensor) -> Result<Tensor> {
        let n = self.last_dim();
        if bias.shape() != [n] || self.shape().is_empty() {
            return Err(Error::shape("add_bias", self.shape(), bias.shape(), "bias is [last dim]"));
        }
        same_dtype("add_bias", self, bias)?;
        let last = self.shape().len() - 1;
        let layout = propagate("add_bias", &[self, bias], propagate::bias(last))?;
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("add_bias", self.dtype(), T => {
                let (x, b) = (self.lend::<T>()?, bias.lend::<T>()?);
                kernels::add_bias(x.view::<T>(), b.view::<T>(), y.view_mut::<T>())
            })
        })?;
        let like = Like::of(bias);
        Ok(record("add_bias", y, &[self, bias], move |dy, back| {
            let rows = dy.clone();
            back.weight(1, &like, move |db| {
                float!("add_bias", rows.dtype(), T => {
                    kernels::sum_rows(rows.lend::<T>()?.view::<T>(), n, db)
                })
            })?;
            back.give(0, dy)
        }))
    }
}
