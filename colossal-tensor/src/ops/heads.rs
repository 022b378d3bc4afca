//! Key/value heads chosen or repeated to fit the query heads that a rank holds.

use super::produce;
use crate::autograd::record;
use crate::dtype::float;
use crate::error::Result;
use crate::kernels;
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
        let rows = full[0] * full[1];
        let (block, whole, part) = ([rows, 1, inside.len()], [row, 0], [inside.len(), 0]);
        let y = produce(self.scope(), &shape, self.dtype(), layout, |y| {
            float!("take_heads", self.dtype(), T => {
                let x = self.lend::<T>()?;
                // Without rows there is no first one to begin in.
                let x = x.view::<T>().range(inside.start.min(self.len())..self.len());
                kernels::copy_block(x, whole, block, y.view_mut::<T>(), part)
            })
        })?;
        let back_layout = self.layout().dual();
        Ok(record("take_heads", y, &[self], move |dy, back| {
            let dx = produce(dy.scope(), &full, dy.dtype(), back_layout, |dx| {
                float!("take_heads", dy.dtype(), T => {
                    dx.view_mut::<T>().zero()?;
                    let dy = dy.lend::<T>()?;
                    let all = rows * row;
                    let dx = dx.view_mut::<T>().range(inside.start.min(all)..all);
                    kernels::copy_block(dy.view::<T>(), part, block, dx, whole)
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
        let heads = full[0] * full[1] * full[2];
        let y = produce(self.scope(), &shape, self.dtype(), self.layout(), |y| {
            float!("repeat_heads", self.dtype(), T => {
                let (x, block) = (self.lend::<T>()?, [heads, times, dim]);
                let y = y.view_mut::<T>();
                kernels::copy_block(x.view::<T>(), [dim, 0], block, y, [times * dim, dim])
            })
        })?;
        Ok(record("repeat_heads", y, &[self], move |dy, back| {
            let dx = produce(dy.scope(), &full, dy.dtype(), dy.layout(), |dx| {
                float!("repeat_heads", dy.dtype(), T => {
                    let dy = dy.lend::<T>()?;
                    kernels::sum_groups(dy.view::<T>(), times, dim, dx.view_mut::<T>())
                })
            })?;
            back.give(0, dx)
        }))
    }
}
