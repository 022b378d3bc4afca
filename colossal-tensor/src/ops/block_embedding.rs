//! Rows of a table by id where the same axes cut the table's rows and the batch: calls `comm`.
//!
//! Nobody holds all rows, nobody looks up all ids at once. In step l every rank looks up the ids
//! of block l of the batch among the rows it holds, and the sums meet at rank l. Sent per rank, with y
//! elements of the output on one rank: forward `(q - 1) y`, backward y; on a cube's second axis
//! the same factor more, by reduce-scatter and all-gather. Ids are gathered once.

use colossal_comm::{Group, ReduceOp};
use colossal_kernels as kernels;

use super::index::token_ids;
use super::produce_on_host;
use crate::autograd::{Weight, pretended, record};
use crate::dtype::float;
use crate::error::{Result, comm};
use crate::placement::Layout;
use crate::storage::Buffer;
use crate::tensor::Tensor;

/// The rows; `axes` cut the batch, the first is the outermost.
pub(crate) fn embedding(
    table: &Tensor,
    ids: &Tensor,
    shape: &[usize],
    layout: Layout,
    axes: &[usize],
) -> Result<Tensor> {
    let (scope, dtype, dim) = (table.scope().clone(), table.dtype(), table.shape()[1]);
    if scope.is_fake() {
        let y = Tensor::pretend(&scope, shape, dtype, layout);
        let (own, mut ids) = (y.len() * dtype.bytes(), size_of::<i32>() * ids.len());
        let outer = scope.axis(axes[0]).1;
        if let Some(inner) = axes.get(1) {
            let others = scope.axis(*inner).1 - 1;
            let wide = outer * others * own;
            scope.sends("embedding", *inner, others * ids + wide, wide);
            ids *= others + 1;
        }
        scope.sends("embedding", axes[0], (outer - 1) * (ids + own), own);
        return Ok(pretended("embedding", y, &[table], &[]));
    }
    let group = |axis: &usize| -> Result<Group> {
        Ok(scope.mesh().group(&scope.axis(*axis).0).map_err(comm)?.clone())
    };
    let (outer, inner) = (group(&axes[0])?, axes.get(1).map(group).transpose()?);
    // [outer, inner, local ids], relative to the rows that are here.
    let mut all = token_ids(ids, table.real_rows())?;
    for group in inner.iter().chain([&outer]) {
        let own = std::mem::take(&mut all);
        all = vec![0; own.len() * group.world_size()];
        group.all_gather(&own, &mut all).map_err(comm)?;
    }
    let first = table.origin()[0] as i32;
    all.iter_mut().for_each(|id| *id -= first);
    let step = all.len() / outer.world_size();
    let y = produce_on_host(&scope, shape, dtype, layout, |y| {
        float!("embedding", dtype, T => {
            let table = table.read::<T>()?;
            let mut part = Buffer::new::<T>(step * dim);
            let mut sum = Buffer::new::<T>(y.bytes() / size_of::<T>());
            for (l, ids) in all.chunks(step).enumerate() {
                kernels::embedding(ids, table.as_slice::<T>(), dim, part.as_mut_slice::<T>());
                let sum = match &inner {
                    Some(inner) => {
                        let (part, sum) = (part.as_slice::<T>(), sum.as_mut_slice::<T>());
                        inner.reduce_scatter(part, sum, ReduceOp::Sum).map_err(comm)?;
                        sum
                    }
                    None => part.as_mut_slice::<T>(),
                };
                outer.reduce(sum, ReduceOp::Sum, l).map_err(comm)?;
                if outer.rank() == l {
                    y.as_mut_slice::<T>().copy_from_slice(sum);
                }
            }
            Ok(())
        })
    })?;
    let like = Weight::like(table);
    Ok(record("embedding", y, &[table], move |dy, back| {
        back.weight_on_host(0, &like, move |acc| {
            float!("embedding", dy.dtype(), T => {
                let own = dy.read::<T>()?;
                let own = own.as_slice::<T>();
                let mut block = Buffer::new::<T>(own.len());
                let mut wide = Buffer::new::<T>(step * dim);
                for (l, ids) in all.chunks(step).enumerate() {
                    let block = block.as_mut_slice::<T>();
                    if outer.rank() == l {
                        block.copy_from_slice(own);
                    }
                    outer.broadcast(block, l).map_err(comm)?;
                    match &inner {
                        Some(inner) => {
                            let wide = wide.as_mut_slice::<T>();
                            inner.all_gather(block, wide).map_err(comm)?;
                            kernels::embedding_backward(ids, wide, dim, acc);
                        }
                        None => kernels::embedding_backward(ids, block, dim, acc),
                    }
                }
                Ok(())
            })
        })
    }))
}
