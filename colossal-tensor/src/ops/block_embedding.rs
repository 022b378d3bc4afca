//! Rows of a table by id where the same axes cut the table's rows and the batch: calls `comm`.
//!
//! Nobody holds all rows, nobody looks up all ids at once. In step l every rank looks up the ids
//! of block l of the batch among the rows it holds, and the sums meet at rank l. Sent per rank, with y
//! elements of the output on one rank: forward `(q - 1) y`, backward y; on a cube's second axis
//! the same factor more, by reduce-scatter and all-gather. Ids are gathered once.

use colossal_comm::{Group, ReduceOp};

use super::index::token_ids;
use super::produce;
use crate::autograd::{Like, pretended, record};
use crate::collectives;
use crate::dtype::float;
use crate::error::{Result, comm};
use crate::kernels;
use crate::placement::Layout;
use crate::tensor::Tensor;
use crate::view::View;

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
    let y = produce(&scope, shape, dtype, layout, |y| {
        float!("embedding", dtype, T => {
            let table = table.lend::<T>()?;
            let mut part = scope.room::<T>(step * dim)?;
            let mut sum = scope.room::<T>(y.bytes() / size_of::<T>())?;
            for (l, ids) in all.chunks(step).enumerate() {
                kernels::embedding(View::Cpu(ids), table.view(), dim, part.view_mut::<T>())?;
                let mut sum = match &inner {
                    Some(inner) => {
                        let (part, op) = (part.view::<T>(), ReduceOp::Sum);
                        collectives::reduce_scatter(inner, part, sum.view_mut(), op)?;
                        sum.view_mut::<T>()
                    }
                    None => part.view_mut(),
                };
                collectives::reduce(&outer, sum.reborrow(), ReduceOp::Sum, l)?;
                if outer.rank() == l {
                    y.view_mut().copy(sum.as_view())?;
                }
            }
            Ok(())
        })
    })?;
    let like = Like::of(table);
    Ok(record("embedding", y, &[table], move |dy, back| {
        back.weight(0, &like, move |mut acc| {
            float!("embedding", dy.dtype(), T => {
                let own = dy.lend::<T>()?;
                let own = own.view::<T>();
                let mut block = scope.room::<T>(own.len())?;
                let mut wide = scope.room::<T>(step * dim)?;
                for (l, ids) in all.chunks(step).enumerate() {
                    let ids = View::Cpu(ids);
                    if outer.rank() == l {
                        block.view_mut().copy(own)?;
                    }
                    collectives::broadcast(&outer, block.view_mut::<T>(), l)?;
                    let rows = match &inner {
                        Some(inner) => {
                            collectives::all_gather(inner, block.view::<T>(), wide.view_mut())?;
                            &wide
                        }
                        None => &block,
                    };
                    kernels::embedding_backward(ids, rows.view::<T>(), dim, acc.reborrow())?;
                }
                Ok(())
            })
        })
    }))
}
