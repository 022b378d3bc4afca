//! Norms over a width that is cut along mesh axes: calls `comm`.
//!
//! Each token's sums over the width are summed along the axes: for RMSNorm one number forward and
//! one backward, for LayerNorm two and two.

use colossal_comm::ReduceOp;

use super::produce;
use crate::autograd::{Like, pretended, record};
use crate::collectives;
use crate::dtype::float;
use crate::error::{Result, comm};
use crate::kernels;
use crate::placement::{Layout, Placement};
use crate::storage::Buffer;
use crate::tensor::{Scope, Tensor};
use crate::view::ViewMut;

/// The axes that cut the last dim of `x`.
pub(crate) fn width_axes(x: &Tensor) -> Vec<usize> {
    let last = Placement::Shard(x.shape().len().saturating_sub(1));
    x.scope().wide_axes().filter(|a| x.layout()[*a] == last).collect()
}

/// `x / sqrt(mean(x²) + eps) * weight`; with a bias the mean is taken off first (LayerNorm).
pub(crate) fn norm(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
    layout: Layout,
    axes: &[usize],
) -> Result<Tensor> {
    let (scope, dtype, local) = (x.scope().clone(), x.dtype(), x.last_dim());
    if scope.is_fake() {
        let y = Tensor::pretend(&scope, x.shape(), dtype, layout);
        let numbers = if bias.is_some() { 2 } else { 1 };
        for axis in axes {
            let n = scope.axis(*axis).1;
            let sent = 2 * (size_of::<f32>() * x.rows() * (n - 1) / n) * numbers;
            scope.sends("norm", *axis, sent, sent);
        }
        let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
        return Ok(pretended("norm", y, &inputs, &[x]));
    }
    let width = (local * axes.iter().map(|a| scope.axis(*a).1).product::<usize>()) as f32;
    let centred = bias.is_some();
    let rows = x.rows();
    let mut mean = Buffer::zeros_on::<f32>(scope.device(), rows)?;
    let mut variance = scope.room::<f32>(rows)?;
    let y = produce(&scope, x.shape(), dtype, layout, |y| {
        float!("norm", dtype, T => {
            let x = x.lend::<T>()?;
            let x = x.view::<T>();
            if centred {
                kernels::row_moment(x, None, 1.0 / width, mean.view_mut())?;
                sum(&scope, axes, mean.view_mut())?;
            }
            kernels::row_moment(x, Some(mean.view()), 1.0 / width, variance.view_mut())?;
            sum(&scope, axes, variance.view_mut())?;
            let (w, b) = (weight.lend::<T>()?, bias.map(|b| b.lend::<T>()).transpose()?);
            let (w, b) = (w.view(), b.as_ref().map(|b| b.view()));
            kernels::wide_norm(x, mean.view(), variance.view(), eps, w, b, y.view_mut::<T>())
        })
    })?;
    let axes = axes.to_vec();
    let (x_saved, w_saved) = (x.detach(), weight.detach());
    let likes: Vec<Like> = std::iter::once(weight).chain(bias).map(Like::of).collect();
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    Ok(record("norm", y, &inputs, move |dy, back| {
        let (mean, variance) = (mean.view(), variance.view());
        // The weight's gradient before it is summed over rows.
        let mut by_row = scope.room::<f32>(x_saved.len())?;
        let dx = produce(&scope, x_saved.shape(), dtype, dy.layout(), |dx| {
            float!("norm", dtype, T => {
                let (x, w, dy) = (x_saved.lend::<T>()?, w_saved.lend::<T>()?, dy.lend::<T>()?);
                let (x, w, dy) = (x.view::<T>(), w.view(), dy.view());
                // Per token: the sums of dy w and of dy w x̂, which the gradient takes off again.
                let mut sums = scope.room::<f32>(2 * rows)?;
                let to = sums.view_mut();
                kernels::wide_norm_sums(dy, x, mean, variance, eps, w, 1.0 / width, to)?;
                if centred {
                    sum(&scope, &axes, sums.view_mut())?;
                } else {
                    sums.view_mut::<f32>().range(0..rows).zero()?;
                    sum(&scope, &axes, sums.view_mut().range(rows..2 * rows))?;
                }
                let (sums, dx, dw) = (sums.view(), dx.view_mut::<T>(), by_row.view_mut());
                kernels::wide_norm_backward(dy, x, mean, variance, eps, w, sums, dx, dw)
            })
        })?;
        let mut dw = Buffer::zeros_on::<f32>(scope.device(), local)?;
        kernels::sum_rows(by_row.view::<f32>(), local, dw.view_mut())?;
        back.weight(1, &likes[0], move |acc| kernels::add_assign(dw.view::<f32>(), acc))?;
        if let Some(like) = likes.get(1) {
            back.weight(2, like, move |acc| {
                float!("norm", dtype, T => {
                    kernels::sum_rows(dy.lend::<T>()?.view::<T>(), local, acc)
                })
            })?;
        }
        back.give(0, dx)
    }))
}

fn sum(scope: &Scope, axes: &[usize], mut values: ViewMut<'_, f32>) -> Result<()> {
    for axis in axes {
        let group = scope.mesh().group(&scope.axis(*axis).0).map_err(comm)?;
        collectives::all_reduce(group, values.reborrow(), ReduceOp::Sum)?;
    }
    Ok(())
}
