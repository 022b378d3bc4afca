//! Views: the same elements under another shape.

use super::produce;
use crate::autograd::{Edge, record};
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::placement::Placement;
use crate::propagate::propagate;
use crate::tensor::Tensor;

impl Tensor {
    /// The same elements in another (local) shape, without a copy.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs, [`Error::Layout`] if a sharded dim
    /// does not survive as the start of a dim.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if shape.iter().product::<usize>() != self.len() {
            let reason = "the number of elements must stay the same";
            return Err(Error::shape("reshape", self.shape(), shape, reason));
        }
        let old = self.shape().to_vec();
        let layout = propagate("reshape", &[self], |p| match p[0] {
            // The dims before it stay: so does its number.
            Placement::Shard(dim) if dim < shape.len() && shape[..dim] == old[..dim] => {
                Some(Placement::Shard(dim))
            }
            Placement::Shard(dim) => {
                let before: usize = old[..dim].iter().product();
                let mut prefix = 1;
                for (new_dim, size) in shape.iter().enumerate() {
                    if prefix == before && *size != 1 {
                        return Some(Placement::Shard(new_dim));
                    }
                    prefix *= size;
                }
                shape.iter().position(|s| *s == 1 && old[dim] == 1).map(Placement::Shard)
            }
            same => Some(same),
        })?;
        let y = self.rewrap(shape, layout, 0, Edge::None);
        let back_layout = self.layout().dual();
        Ok(record("reshape", y, &[self], move |dy, back| {
            back.give(0, dy.rewrap(&old, back_layout, 0, Edge::None))
        }))
    }

    /// `[.., heads * head_dim]` as `[.., heads, head_dim]`.
    pub fn split_heads(&self, head_dim: usize) -> Result<Tensor> {
        let Some((width, outer)) = self.shape().split_last() else {
            return Err(Error::shape("split_heads", self.shape(), &[head_dim], "needs a dim"));
        };
        if width % head_dim != 0 {
            let reason = "whole heads must fit the last dim; choose a tp that divides their number";
            return Err(Error::shape("split_heads", self.shape(), &[head_dim], reason));
        }
        self.reshape(&[outer, &[width / head_dim, head_dim]].concat())
    }

    /// `[.., heads, head_dim]` as `[.., heads * head_dim]`.
    pub fn merge_heads(&self) -> Result<Tensor> {
        let [outer @ .., heads, head_dim] = self.shape() else {
            return Err(Error::shape("merge_heads", self.shape(), &[], "needs two dims"));
        };
        self.reshape(&[outer, &[heads * head_dim]].concat())
    }

    /// Entries `range` of the outermost dim, without a copy.
    pub fn narrow(&self, range: std::ops::Range<usize>) -> Result<Tensor> {
        let Some((rows, inner)) = self.shape().split_first() else {
            return Err(Error::shape("narrow", self.shape(), &[range.start], "needs a dim"));
        };
        if range.end > *rows || range.start > range.end {
            let ends = [range.start, range.end];
            return Err(Error::shape("narrow", self.shape(), &ends, "the range must lie within"));
        }
        let layout = propagate("narrow", &[self], |p| match p[0] {
            Placement::Shard(0) => None,
            other => Some(other),
        })?;
        let row: usize = inner.iter().product();
        let shape = [&[range.len()], inner].concat();
        let y = self.rewrap(&shape, layout, range.start * row, Edge::None);
        let (scope, full, dtype) = (self.scope().clone(), self.shape().to_vec(), self.dtype());
        Ok(record("narrow", y, &[self], move |dy, back| {
            let dx = produce(&scope, &full, dtype, dy.layout(), |dx| {
                float!("narrow", dtype, T => {
                    dx.view_mut::<T>().zero()?;
                    let inside = dx.view_mut::<T>().range(range.start * row..range.end * row);
                    let dy = dy.lend::<T>()?;
                    kernels::copy_block(dy.view::<T>(), [0; 2], [1, 1, inside.len()], inside, [0; 2])
                })
            })?;
            back.give(0, dx)
        }))
    }
}
