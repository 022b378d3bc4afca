//! Rows by index: embeddings, and the last token of each sequence.

use std::sync::Arc;

use super::produce;
use crate::autograd::{Like, record};
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::placement::Layout;
use crate::placement::Placement::{self, Shard};
use crate::propagate::{self, propagate};
use crate::tensor::Tensor;
use crate::view::View;

/// The ids of an `i32` tensor, checked to lie in `0..limit`.
pub(crate) fn token_ids(ids: &Tensor, limit: usize) -> Result<Vec<i32>> {
    let ids = ids.to_vec_of::<i32>()?;
    match ids.iter().find(|id| **id < 0 || **id as usize >= limit) {
        None => Ok(ids),
        Some(bad) => Err(Error::Other(format!(
            "embedding: id {bad} is outside 0..{limit}; is this the model's tokenizer?"
        ))),
    }
}

/// Rows by ids on the GPU ([`crate::Numbers`], of one rank). No gradient: they may have changed by then.
fn embedding_there(
    table: &Tensor,
    ids: &Tensor,
    below: usize,
    shape: &[usize],
    layout: Layout,
) -> Result<Tensor> {
    if below > table.real_rows() {
        return Err(Error::Other(format!(
            "embedding: ids below {below} are not all inside 0..{}",
            table.real_rows()
        )));
    }
    produce(table.scope(), shape, table.dtype(), layout, |y| {
        float!("embedding", table.dtype(), T => {
            let (ids, table) = (ids.lend::<i32>()?, table.lend::<T>()?);
            let dim = shape.last().copied().unwrap_or(1);
            kernels::embedding(ids.view(), table.view::<T>(), dim, y.view_mut::<T>())
        })
    })
}

impl Tensor {
    /// Rows of `table [vocab, embed]` by ids `[..]`: `[.., embed]`. With the table's rows sharded
    /// the result is a pending sum, of which each rank contributes the rows it holds.
    pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        let &[rows, dim] = table.shape() else {
            let reason = "the table is [vocab, embed]";
            return Err(Error::shape("embedding", table.shape(), ids.shape(), reason));
        };
        if ids.dtype() != Dtype::I32 {
            return Err(Error::Dtype { op: "embedding", left: ids.dtype(), right: Dtype::I32 });
        }
        let layout =
            propagate("embedding", &[ids, table], propagate::embedding(ids.shape().len()))?;
        let shape = [ids.shape(), &[dim]].concat();
        let blocks: Vec<usize> = table
            .scope()
            .wide_axes()
            .filter(|a| (ids.layout()[*a], table.layout()[*a]) == (Shard(0), Shard(0)))
            .collect();
        if !blocks.is_empty() {
            return super::block_embedding::embedding(table, ids, &shape, layout, &blocks);
        }
        if let Some(below) = ids.below() {
            return embedding_there(table, ids, below, &shape, layout);
        }
        // Ids relative to this rank's rows; the kernel skips those outside.
        let local = if table.scope().is_fake() {
            Arc::new(vec![])
        } else {
            let mut local = token_ids(ids, table.real_rows())?;
            let first = table.origin()[0] as i32;
            local.iter_mut().for_each(|id| *id -= first);
            Arc::new(local)
        };
        let y = produce(table.scope(), &shape, table.dtype(), layout, |y| {
            float!("embedding", table.dtype(), T => {
                let table = table.lend::<T>()?;
                kernels::embedding(View::Cpu(&local), table.view::<T>(), dim, y.view_mut::<T>())
            })
        })?;
        let like = Like::of(table);
        debug_assert!(rows > 0 || table.is_empty());
        Ok(record("embedding", y, &[table], move |dy, back| {
            back.weight(0, &like, move |acc| {
                float!("embedding", dy.dtype(), T => {
                    kernels::embedding_backward(View::Cpu(&local), dy.lend::<T>()?.view::<T>(), dim, acc)
                })
            })
        }))
    }

    /// One row per sequence: `x [batch, seq, dim]` at `index[b]` gives `[batch, dim]`.
    pub fn take_rows(&self, index: &[usize]) -> Result<Tensor> {
        let &[batch, seq, dim] = self.shape() else {
            return Err(Error::shape(
                "take_rows",
                self.shape(),
                &[index.len()],
                "x is [batch, seq, dim]",
            ));
        };
        if index.len() != batch || index.iter().any(|i| *i >= seq) {
            let reason = "one index within seq per sequence";
            return Err(Error::shape("take_rows", self.shape(), &[index.len()], reason));
        }
        let layout = propagate("take_rows", &[self], |p| match p[0] {
            Placement::Shard(1) => None,
            Placement::Shard(2) => Some(Placement::Shard(1)),
            other => Some(other),
        })?;
        let places: Arc<Vec<i32>> =
            Arc::new(index.iter().enumerate().map(|(b, i)| (b * seq + i) as i32).collect());
        let y = produce(self.scope(), &[batch, dim], self.dtype(), layout, |y| {
            float!("take_rows", self.dtype(), T => {
                let x = self.lend::<T>()?;
                kernels::embedding(View::Cpu(&places), x.view::<T>(), dim, y.view_mut::<T>())
            })
        })?;
        let (scope, shape) = (self.scope().clone(), self.shape().to_vec());
        let (dtype, layout) = (self.dtype(), self.layout().dual());
        Ok(record("take_rows", y, &[self], move |dy, back| {
            let dx = produce(&scope, &shape, dtype, layout, |dx| {
                float!("take_rows", dtype, T => {
                    dx.view_mut::<T>().zero()?;
                    let (dy, at) = (dy.lend::<T>()?, View::Cpu(&places[..]));
                    kernels::scatter_rows(dy.view::<T>(), at, dim, dx.view_mut::<T>())
                })
            })?;
            back.give(0, dx)
        }))
    }
}
