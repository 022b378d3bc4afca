//! Products on a q×q×q cube (Agarwal et al., 1995; Bian et al., 2021): calls `comm`.
//!
//! Activations are cut on all three axes: width on one, batch on the two others. A product gathers
//! `x` along one axis and the weight along another, and scatters its sums along the third:
//!
//! ```text
//! x  [M/q² rows, K/q]   gathered along `rows`    to [M/q, K/q]
//! w  [N/q² rows, K/q]   gathered along `depth`   to [N/q, K/q]
//! y = x wᵀ              scattered along `width`  to [M/q² rows, N/q]
//! ```
//!
//! The axes of rows and of width trade places in each product, so that two products (up and down)
//! bring them back. Nothing gathered is kept for backward: it holds `1/q³` of everything and
//! gathers again. Sent per rank: forward `(q - 1)/q³ (MK + NK + MN)`; backward
//! `(q - 1)/q³ (MN + NK + MK)` for the input and `(q - 1)/q³ (MK + NK)` more for the weight.

use colossal_comm::{Group, ReduceOp};

use crate::autograd::{Like, pretended, record};
use crate::collectives;
use crate::device::Device;
use crate::dtype::{Element, float};
use crate::error::{Result, comm};
use crate::kernels::{self, Mat};
use crate::ops::produce;
use crate::placement::Cut;
use crate::placement::Placement::Shard;
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// The axes of one product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Axes {
    /// Cuts rows of `x` and the output dim of `w`: `x` is gathered along it.
    rows: usize,
    /// Cuts the input dim of both: the product is scattered along it.
    width: usize,
    /// Cuts rows of `x`, and the output dim of `w` once more: `w` is gathered along it.
    depth: usize,
}

/// The axes of a cube, if `w` lies on one.
pub(crate) fn cube(w: &Tensor) -> Option<Axes> {
    let scope = w.scope();
    let axis =
        |cut: Cut| scope.wide_axes().find(|a| scope.role(*a).is_some_and(|role| role.cut == cut));
    let (row, col) = (axis(Cut::CubeRow)?, axis(Cut::CubeCol)?);
    let depth = axis(Cut::CubeDepth)?;
    match (w.layout()[row], w.layout()[col], w.layout()[depth]) {
        (Shard(0), Shard(1), Shard(0)) => Some(Axes { rows: row, width: col, depth }),
        (Shard(1), Shard(0), Shard(0)) => Some(Axes { rows: col, width: row, depth }),
        _ => None,
    }
}

/// `x wᵀ` on the cube.
pub(crate) fn linear(x: &Tensor, w: &Tensor, axes: Axes) -> Result<Tensor> {
    let last = x.shape().len() - 1;
    let rule = propagate::linear(last);
    let mut layout = propagate("linear", &[x, w], |p| match *p {
        [Shard(0), Shard(0)] => Some(Shard(0)),
        [Shard(d), Shard(1)] if d == last => Some(Shard(0)),
        _ => rule(p),
    })?;
    layout[axes.rows] = Shard(last);
    let scope = x.scope().clone();
    let q = scope.axis(axes.rows).1;
    // Of the gathered operands.
    let (m, k, n) = (x.rows() * q, x.last_dim(), w.shape()[0] * scope.axis(axes.depth).1);
    let mut shape = x.shape().to_vec();
    shape[last] = n;
    if scope.is_fake() {
        let y = Tensor::pretend(&scope, &shape, x.dtype(), layout);
        let others = q - 1;
        let bytes = |t: &Tensor| others * t.len() * t.dtype().bytes();
        let input = usize::from(x.requires_grad());
        scope.sends("linear", axes.rows, bytes(x), (input + 1) * bytes(x));
        scope.sends("linear", axes.width, bytes(&y), bytes(&y));
        let sums = others * w.len() * size_of::<f32>();
        scope.sends("linear", axes.depth, bytes(w), input * bytes(w) + sums);
        return Ok(pretended("linear", y, &[x, w], &[x]));
    }
    let group = |axis: usize| -> Result<Group> {
        Ok(scope.mesh().group(&scope.axis(axis).0).map_err(comm)?.clone())
    };
    let (rows, width, depth) = (group(axes.rows)?, group(axes.width)?, group(axes.depth)?);
    let y = produce(&scope, &shape, x.dtype(), layout, |y| {
        float!("linear", x.dtype(), T => {
            let (x, w) = (x.lend::<T>()?, w.lend::<T>()?);
            let x = gathered(&rows, scope.device(), x.view::<T>())?;
            let w = gathered(&depth, scope.device(), w.view::<T>())?;
            let mut sums = scope.room::<T>(m * n)?;
            let (x, w) = (Mat::new(x.view::<T>(), m, k), Mat::new(w.view::<T>(), n, k));
            kernels::gemm(x, w.t(), sums.view_mut::<T>(), None, false)?;
            scattered(&width, sums.view::<T>(), y.view_mut())
        })
    })?;
    let (x_saved, w_saved, like) = (x.detach(), w.detach(), Like::of(w));
    Ok(record("linear", y, &[x, w], move |dy, back| {
        let (x, dtype) = (x_saved, dy.dtype());
        let device = scope.device().clone();
        float!("linear", dtype, T => {
            let dy = dy.lend::<T>()?;
            let dy = gathered(&width, &device, dy.view::<T>())?;
            if back.wants(0) {
                let layout = x.layout().dual();
                let dx = produce(&scope, x.shape(), dtype, layout, |dx| {
                    let w = w_saved.lend::<T>()?;
                    let w = gathered(&depth, &device, w.view::<T>())?;
                    let mut sums = scope.room::<T>(m * k)?;
                    let (dy, w) = (Mat::new(dy.view::<T>(), m, n), Mat::new(w.view::<T>(), n, k));
                    kernels::gemm(dy, w, sums.view_mut::<T>(), None, false)?;
                    scattered(&rows, sums.view::<T>(), dx.view_mut())
                })?;
                back.give(0, dx)?;
            }
            if !back.wants(1) {
                return Ok(());
            }
            back.weight(1, &like, move |dw| {
                let x = x.lend::<T>()?;
                let x = gathered(&rows, &device, x.view::<T>())?;
                let mut sums = scope.room::<f32>(n * k)?;
                let (dy, x) = (Mat::new(dy.view::<T>(), m, n), Mat::new(x.view::<T>(), m, k));
                kernels::gemm(dy.t(), x, sums.view_mut::<f32>(), None, false)?;
                let mut own = scope.room::<f32>(dw.len())?;
                scattered(&depth, sums.view::<f32>(), own.view_mut())?;
                kernels::add_assign(own.view::<f32>(), dw)
            })
        })
    }))
}

fn gathered<T: Element>(group: &Group, device: &Device, own: View<'_, T>) -> Result<Buffer> {
    let mut all = Buffer::on(device, own.len() * group.world_size() * size_of::<T>())?;
    collectives::all_gather(group, own, all.view_mut())?;
    Ok(all)
}

fn scattered<T: Element>(group: &Group, sums: View<'_, T>, own: ViewMut<'_, T>) -> Result<()> {
    collectives::reduce_scatter(group, sums, own, ReduceOp::Sum)
}
