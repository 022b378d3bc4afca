//! Grouped products: one an expert, over ragged groups of rows.

use std::sync::Arc;

use super::Journey;
use crate::autograd::{Accumulator, Like, record};
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels::{self, Part};
use crate::ops::{produce, same_dtype};
use crate::placement::Placement::{Invariant, Partial, Replicate, Shard};
use crate::propagate::propagate;
use crate::tensor::Tensor;

impl Tensor {
    /// `rows W[expert]ᵀ`: rows `[rows, in]` sorted by expert, `weight [experts, out, in]`. In fp8, if the
    /// weight is to be, each expert by itself.
    pub fn grouped_linear(&self, weight: &Tensor, journey: &Arc<Journey>) -> Result<Tensor> {
        let op = "grouped_linear";
        let (&[rows, k], &[experts, n, wk]) = (self.shape(), weight.shape()) else {
            let reason = "rows are [rows, in], weights [experts, out, in]";
            return Err(Error::shape(op, self.shape(), weight.shape(), reason));
        };
        if k != wk || experts + 1 != journey.starts.len() || rows != journey.rows {
            let reason = "one weight an expert of this rank, of the rows' width";
            return Err(Error::shape(op, self.shape(), weight.shape(), reason));
        }
        same_dtype(op, self, weight)?;
        let layout = propagate(op, &[self, weight], |p| match (p[0], p[1]) {
            (Shard(0), Shard(0) | Replicate) => Some(Shard(0)),
            (Replicate, Shard(1)) => Some(Shard(1)),
            (Shard(1), Shard(2)) => Some(Partial),
            (Replicate, Replicate) => Some(Replicate),
            (Invariant, Invariant) => Some(Invariant),
            _ => None,
        })?;
        let fp8 = weight.param().and_then(|p| p.fp8()).filter(|_| n * k > 0);
        let y = produce(self.scope(), &[rows, n], self.dtype(), layout, |y| {
            float!(op, self.dtype(), T => {
                let (x, w) = (self.lend::<T>()?, weight.lend::<T>()?);
                if let Some(fp8) = fp8 {
                    let (x, w, mut y) = (x.view::<T>(), w.view::<T>(), y.view_mut::<T>());
                    for (e, at, m) in journey.products(|e, at, m| (e, at, m)) {
                        let w = w.range(e * n * k..(e + 1) * n * k);
                        let y = y.reborrow().range(at * n..(at + m) * n);
                        fp8.output([m, n, k], x.range(at * k..(at + m) * k), w, None, y)?;
                    }
                    return Ok(());
                }
                let products = journey.products(|e, at, m| {
                    (Part::new(at * k, m, k), Part::new(e * n * k, n, k).t(), at * n)
                });
                let y = y.view_mut::<T>();
                kernels::gemm_grouped(x.view::<T>(), w.view::<T>(), &products, y, false)
            })
        })?;
        let (x, w, like, journey) =
            (self.detach(), weight.detach(), Like::of(weight), journey.clone());
        Ok(record(op, y, &[self, weight], move |dy, back| {
            if back.wants(0) {
                let layout = x.layout().dual();
                let dx = produce(x.scope(), x.shape(), x.dtype(), layout, |dx| {
                    float!(op, dy.dtype(), T => {
                        let (dy, w) = (dy.lend::<T>()?, w.lend::<T>()?);
                        if let Some(fp8) = fp8 {
                            let (dy, w) = (dy.view::<T>(), w.view::<T>());
                            let mut dx = dx.view_mut::<T>();
                            for (e, at, m) in journey.products(|e, at, m| (e, at, m)) {
                                let w = w.range(e * n * k..(e + 1) * n * k);
                                let dx = dx.reborrow().range(at * k..(at + m) * k);
                                let dy = dy.range(at * n..(at + m) * n);
                                fp8.input_gradient([m, n, k], dy, w, false, dx)?;
                            }
                            return Ok(());
                        }
                        let products = journey.products(|e, at, m| {
                            (Part::new(at * n, m, n), Part::new(e * n * k, n, k), at * k)
                        });
                        let dx = dx.view_mut::<T>();
                        kernels::gemm_grouped(dy.view::<T>(), w.view::<T>(), &products, dx, false)
                    })
                })?;
                back.give(0, dx)?;
            }
            back.weight_fresh(1, &like, move |dw| {
                let Accumulator { mut sum, fresh } = dw;
                float!(op, dy.dtype(), T => {
                    let (dy, x) = (dy.lend::<T>()?, x.lend::<T>()?);
                    // No product writes the gradient of an expert without rows.
                    let idle = journey.starts.windows(2).enumerate();
                    for (e, _) in idle.filter(|(_, ends)| fresh && ends[0] == ends[1]) {
                        sum.reborrow().range(e * n * k..(e + 1) * n * k).zero()?;
                    }
                    if let Some(fp8) = fp8 {
                        let (dy, x) = (dy.view::<T>(), x.view::<T>());
                        for (e, at, m) in journey.products(|e, at, m| (e, at, m)) {
                            let sum = sum.reborrow().range(e * n * k..(e + 1) * n * k);
                            let (dy, x) = (dy.range(at * n..(at + m) * n), x.range(at * k..(at + m) * k));
                            fp8.weight_gradient([m, n, k], dy, x, Accumulator { sum, fresh })?;
                        }
                        return Ok(());
                    }
                    let products = journey.products(|e, at, m| {
                        (Part::new(at * n, m, n).t(), Part::new(at * k, m, k), e * n * k)
                    });
                    kernels::gemm_grouped(dy.view::<T>(), x.view::<T>(), &products, sum, !fresh)
                })
            })
        }))
    }
}
