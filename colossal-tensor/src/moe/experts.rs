//! Grouped products: one an expert, over ragged groups of rows.

use std::sync::Arc;

use colossal_kernels::{self as kernels, Epilogue, Mat, Product};

use super::Journey;
use crate::autograd::{Weight, record};
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::ops::{produce_on_host, same_dtype};
use crate::placement::Placement::{Invariant, Partial, Replicate, Shard};
use crate::propagate::propagate;
use crate::tensor::Tensor;

impl Tensor {
    /// `rows W[expert]ᵀ`: rows `[rows, in]` sorted by expert, `weight [experts, out, in]`.
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
        let y = produce_on_host(self.scope(), &[rows, n], self.dtype(), layout, |y| {
            float!(op, self.dtype(), T => {
                let (x, w) = (self.read::<T>()?, weight.read::<T>()?);
                let (x, w, y) = (x.as_slice::<T>(), w.as_slice::<T>(), y.as_mut_slice::<T>());
                let products = journey.products(|e, at, m| Product {
                    a: Mat::new(&x[at * k..][..m * k], m, k),
                    b: Mat::new(&w[e * n * k..][..n * k], n, k).t(),
                    at: at * n,
                });
                kernels::gemm_grouped(&products, y, &Epilogue::default());
                Ok(())
            })
        })?;
        let (x, w, like, journey) =
            (self.detach(), weight.detach(), Weight::like(weight), journey.clone());
        Ok(record(op, y, &[self, weight], move |dy, back| {
            if back.wants(0) {
                let dx =
                    produce_on_host(x.scope(), x.shape(), x.dtype(), x.layout().dual(), |dx| {
                        float!(op, dy.dtype(), T => {
                            let (dy, w) = (dy.read::<T>()?, w.read::<T>()?);
                            let (dy, w) = (dy.as_slice::<T>(), w.as_slice::<T>());
                            let dx = dx.as_mut_slice::<T>();
                            let products = journey.products(|e, at, m| Product {
                                a: Mat::new(&dy[at * n..][..m * n], m, n),
                                b: Mat::new(&w[e * n * k..][..n * k], n, k),
                                at: at * k,
                            });
                            kernels::gemm_grouped(&products, dx, &Epilogue::default());
                            Ok(())
                        })
                    })?;
                back.give(0, dx)?;
            }
            back.weight_fresh(1, &like, move |dw| {
                dw.on_host(|dw, fresh| float!(op, dy.dtype(), T => {
                    let (dy, x) = (dy.read::<T>()?, x.read::<T>()?);
                    let (dy, x) = (dy.as_slice::<T>(), x.as_slice::<T>());
                    let accumulate = !fresh;
                    if !accumulate {
                        let idle = journey.starts.windows(2).zip(dw.chunks_mut(n * k));
                        idle.filter(|(ends, _)| ends[0] == ends[1]).for_each(|(_, dw)| dw.fill(0.0));
                    }
                    let products = journey.products(|e, at, m| Product {
                        a: Mat::new(&dy[at * n..][..m * n], m, n).t(),
                        b: Mat::new(&x[at * k..][..m * k], m, k),
                        at: e * n * k,
                    });
                    kernels::gemm_grouped(&products, dw, &Epilogue { accumulate, ..Epilogue::default() });
                    Ok(())
                }))
            })
        }))
    }
}
