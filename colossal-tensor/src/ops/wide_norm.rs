//! Norms over a width that is cut along mesh axes: calls `comm`.
//!
//! Each token's sums over the width are summed along the axes: for RMSNorm one number forward and
//! one backward, for LayerNorm two and two.

use colossal_comm::ReduceOp;
use colossal_kernels::Float;

use super::produce_on_host;
use crate::autograd::{Weight, pretended, record};
use crate::dtype::float;
use crate::error::{Result, comm};
use crate::placement::{Layout, Placement};
use crate::tensor::{Scope, Tensor};

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
    let (values, w) = (x.to_vec()?, weight.to_vec()?);
    let rows = values.len() / local.max(1);
    let mut mean = vec![0.0; rows];
    if centred {
        mean = values.chunks(local).map(|row| row.iter().sum::<f32>() / width).collect();
        sum(&scope, axes, &mut mean)?;
    }
    let squares = values.chunks(local).zip(&mean);
    let mut rstd: Vec<f32> = squares
        .map(|(row, mean)| row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width)
        .collect();
    sum(&scope, axes, &mut rstd)?;
    rstd.iter_mut().for_each(|x| *x = 1.0 / (*x + eps).sqrt());
    let b = bias.map_or_else(|| Ok(vec![0.0; local]), Tensor::to_vec)?;
    let y = produce_on_host(&scope, x.shape(), dtype, layout, |y| {
        float!("norm", dtype, T => {
            for (r, y) in y.as_mut_slice::<T>().chunks_mut(local).enumerate() {
                let row = &values[r * local..(r + 1) * local];
                for (c, y) in y.iter_mut().enumerate() {
                    *y = <T as Float>::from_f32((row[c] - mean[r]) * rstd[r] * w[c] + b[c]);
                }
            }
            Ok(())
        })
    })?;
    drop(values);
    let axes = axes.to_vec();
    let (x_saved, w_saved) = (x.detach(), weight.detach());
    let likes: Vec<Weight> = std::iter::once(weight).chain(bias).map(Weight::like).collect();
    let inputs: Vec<&Tensor> = [x, weight].into_iter().chain(bias).collect();
    Ok(record("norm", y, &inputs, move |dy, back| {
        let (x, w, dy_values) = (x_saved.to_vec()?, w_saved.to_vec()?, dy.to_vec()?);
        let (mut dw, mut db) = (vec![0.0; local], vec![0.0; local]);
        // Per token: the sums of dy w and of dy w x̂, which the gradient takes off again.
        let mut sums = vec![0.0; 2 * rows];
        for r in 0..rows {
            for c in 0..local {
                let (dy, at) = (dy_values[r * local + c], r * local + c);
                let normed = (x[at] - mean[r]) * rstd[r];
                dw[c] += dy * normed;
                db[c] += dy;
                sums[r] += dy * w[c] / width;
                sums[rows + r] += dy * w[c] * normed / width;
            }
        }
        if centred {
            sum(&scope, &axes, &mut sums)?;
        } else {
            sums[..rows].fill(0.0);
            sum(&scope, &axes, &mut sums[rows..])?;
        }
        let dx = produce_on_host(&scope, x_saved.shape(), dtype, dy.layout(), |dx| {
            float!("norm", dtype, T => {
                for (at, dx) in dx.as_mut_slice::<T>().iter_mut().enumerate() {
                    let (r, c) = (at / local, at % local);
                    let normed = (x[at] - mean[r]) * rstd[r];
                    let inner = dy_values[at] * w[c] - sums[r] - normed * sums[rows + r];
                    *dx = <T as Float>::from_f32(rstd[r] * inner);
                }
                Ok(())
            })
        })?;
        for (i, (like, grad)) in likes.iter().zip([dw, db]).enumerate() {
            back.weight_on_host(i + 1, like, move |acc| {
                colossal_kernels::add_assign(&grad, acc);
                Ok(())
            })?;
        }
        back.give(0, dx)
    }))
}

fn sum(scope: &Scope, axes: &[usize], values: &mut [f32]) -> Result<()> {
    for axis in axes {
        let group = scope.mesh().group(&scope.axis(*axis).0).map_err(comm)?;
        group.all_reduce(values, ReduceOp::Sum).map_err(comm)?;
    }
    Ok(())
}
