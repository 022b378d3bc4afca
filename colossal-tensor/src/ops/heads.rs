//! Key/value heads chosen or repeated to fit the query heads that a rank holds.

use super::produce_on_host;
use crate::autograd::record;
use crate::dtype::{any, float};
use crate::error::Result;
use crate::placement::Layout;
use crate::tensor::Tensor;

impl Tensor {
    /// Heads `range` of `[batch, seq, heads, head_dim]`, under `layout`; the gradient of the
    /// others is zero.
    pub(crate) fn take_heads(
        &self,
        range: std::ops::Range<usize>,
        layout: Layout,
    ) -> Result<Tensor> {
        let full = self.shape().to_vec();
        let (row, dim) = (full[2] * full[3], full[3]);
        let shape = [full[0], full[1], range.len(), dim];
        let inside = range.start * dim..range.end * dim;
        let y = produce_on_host(self.scope(), &shape, self.dtype(), layout, |y| {
            any!(self.dtype(), T => {
                let x = self.read::<T>()?;
                let rows = x.as_slice::<T>().chunks(row);
                for (y, x) in y.as_mut_slice::<T>().chunks_mut(inside.len()).zip(rows) {
                    y.copy_from_slice(&x[inside.clone()]);
                }
                Ok(())
            })
        })?;
        let back_layout = self.layout().dual();
        Ok(record("take_heads", y, &[self], move |dy, back| {
            let dx = produce_on_host(dy.scope(), &full, dy.dtype(), back_layout, |dx| {
                any!(dy.dtype(), T => {
                    let dx = dx.as_mut_slice::<T>();
                    dx.fill(bytemuck::Zeroable::zeroed());
                    let dy = dy.read::<T>()?;
                    let rows = dy.as_slice::<T>().chunks(inside.len());
                    for (dx, dy) in dx.chunks_mut(row).zip(rows) {
                        dx[inside.clone()].copy_from_slice(dy);
                    }
                    Ok(())
                })
            })?;
            back.give(0, dx)
        }))
    }

    /// Every head of `[batch, seq, heads, head_dim]` so many times, side by side.
    pub(crate) fn repeat_heads(&self, times: usize) -> Result<Tensor> {
        if times == 1 {
            return Ok(self.clone());
        }
        let full = self.shape().to_vec();
        let dim = full[3];
        let shape = [full[0], full[1], full[2] * times, dim];
        let y = produce_on_host(self.scope(), &shape, self.dtype(), self.layout(), |y| {
            any!(self.dtype(), T => {
                let x = self.read::<T>()?;
                let copies = y.as_mut_slice::<T>().chunks_mut(times * dim);
                for (y, x) in copies.zip(x.as_slice::<T>().chunks(dim)) {
                    y.chunks_mut(dim).for_each(|y| y.copy_from_slice(x));
                }
                Ok(())
            })
        })?;
        Ok(record("repeat_heads", y, &[self], move |dy, back| {
            let dx = produce_on_host(dy.scope(), &full, dy.dtype(), dy.layout(), |dx| {
                float!("repeat_heads", dy.dtype(), T => {
                    use colossal_kernels::Float;
                    let dy = dy.read::<T>()?;
                    let copies = dy.as_slice::<T>().chunks(times * dim);
                    for (dx, dy) in dx.as_mut_slice::<T>().chunks_mut(dim).zip(copies) {
                        for (c, dx) in dx.iter_mut().enumerate() {
                            let sum = (0..times).map(|t| <T as Float>::to_f32(dy[t * dim + c]));
                            *dx = <T as Float>::from_f32(sum.sum());
                        }
                    }
                    Ok(())
                })
            })?;
            back.give(0, dx)
        }))
    }
}
