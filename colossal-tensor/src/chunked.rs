//! A loss that is a sum over rows, some rows at a time: what lies between them and their terms never
//! exists whole.
//!
//! A head makes thousands of logits of a row. So gradients are computed with the loss, while the logits
//! of a few rows are there (as Liger's fused cross-entropy does; Hsu et al., 2024), and are what is kept
//! for backward: those of the rows, and the parameters' in f32.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::autograd::{
    Accumulator, Edge, GradSink, is_grad_enabled, no_grad, pretended, record_edges,
};
use crate::error::Result;
use crate::params::Param;
use crate::storage::Buffer;
use crate::tensor::Tensor;

/// `loss(x, targets)`, a scalar in f32 that is a sum over rows, of at most `most` rows at a time:
/// `x [.., width]` and `targets [..]`. Where `loss` communicates, all ranks have as many rows.
pub(crate) fn chunked(
    x: &Tensor,
    targets: &Tensor,
    most: usize,
    loss: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (rows, width, dtype) = (x.rows(), x.last_dim(), x.dtype());
    if rows <= most || targets.len() != rows {
        return loss(x, targets);
    }
    let (scope, fake) = (x.scope().clone(), x.scope().is_fake());
    let each = rows.div_ceil(rows.div_ceil(most.max(1)));
    let mut sum: Option<Tensor> = None;
    let mut grads = Kept::default();
    // The gradient of x, and its layout.
    let mut dx: Option<(Buffer, _)> = None;
    for at in (0..rows).step_by(each) {
        let count = each.min(rows - at);
        let mut shape = vec![1; targets.shape().len() - 1];
        shape.push(count);
        let targets = targets.rewrap(&shape, targets.layout(), at, Edge::None);
        shape.push(width);
        let part = x.rewrap(&shape, x.layout(), at * width, Edge::None);
        let gradient = Arc::new(Mutex::new(None));
        let term = {
            let slot = gradient.clone();
            let part = match x.requires_grad() && is_grad_enabled() {
                true => record_edges("rows", part, vec![Edge::None], move |grad, _| {
                    *slot.lock() = Some(grad);
                    Ok(())
                }),
                false => part,
            };
            loss(&part, &targets)?
        };
        if term.requires_grad() && !fake {
            term.backward_into(&mut grads, None)?;
        }
        if let Some(grad) = gradient.lock().take() {
            let grad: Tensor = grad;
            let layout = grad.layout();
            let bytes = width * dtype.bytes();
            let whole = match dx.take() {
                Some((whole, _)) => whole,
                None => Buffer::on(scope.place_of(dtype), rows * bytes)?,
            };
            let (whole, _) = dx.insert((whole, layout));
            let to = whole.view_mut::<u8>().range(at * bytes..(at + count) * bytes);
            to.copy(grad.into_buffer()?.view())?;
        }
        let term = term.detach();
        sum = Some(match sum {
            Some(sum) => no_grad(|| sum.add(&term))?,
            None => term,
        });
    }
    let Some(sum) = sum else { return loss(x, targets) };
    if fake {
        let dx = Tensor::pretend(&scope, x.shape(), dtype, x.layout().dual());
        return Ok(pretended("chunked", sum, &[x], &[&dx]));
    }
    if dx.is_none() && grads.0.is_empty() {
        return Ok(sum);
    }
    let mut edges = vec![x.edge().clone()];
    edges.extend(grads.0.iter().map(|(param, _)| Edge::Leaf(param.clone())));
    let shape = x.shape().to_vec();
    Ok(record_edges("chunked", sum, edges, move |dloss, back| {
        let factor = dloss.item()?;
        for (i, (_, grad)) in grads.0.into_iter().enumerate() {
            back.add_weight(i + 1, grad, factor)?;
        }
        let Some((dx, layout)) = dx else { return Ok(()) };
        let dx = Tensor::wrap(&scope, dx, &shape, dtype, layout);
        back.give(0, if factor == 1.0 { dx } else { dx.scale(factor)? })
    }))
}

/// Gradients of parameters, kept for backward.
#[derive(Default)]
struct Kept(Vec<(Arc<Param>, Buffer)>);

impl GradSink for Kept {
    fn accumulate(
        &mut self,
        param: &Arc<Param>,
        add: &mut dyn FnMut(Accumulator<'_>),
    ) -> Result<()> {
        let known = self.0.iter().position(|(p, _)| p.id() == param.id());
        let at = known.unwrap_or(self.0.len());
        if known.is_none() {
            let room = Buffer::on(param.scope().device(), param.len() * size_of::<f32>())?;
            self.0.push((param.clone(), room));
        }
        add(Accumulator { sum: self.0[at].1.view_mut(), fresh: known.is_none() });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::nn::Linear;
    use crate::params::Param;
    use crate::placement::Dim;
    use crate::storage::{memory_stats, reset_peak};
    use crate::{Dtype, IGNORE, Init, Params, Result, Scope, Tensor};

    /// Loss, gradients of x and of the weight, and the most bytes at once, of so many rows at a time.
    fn run(dtype: Dtype, rows: usize, factor: f32) -> Result<(f32, Vec<f32>, Vec<f32>, usize)> {
        let (batch, seq, width, vocab) = (2, 31, 8, 300);
        let p = Params::new(&Scope::solo(), 3, dtype);
        let shape = [Dim::Other(batch * seq), Dim::Other(width)];
        let x = p.at("x").tensor("weight", &shape, Init::Normal(1.0))?;
        let head = Linear::new(&p.at("head"), Dim::Embed(width), Dim::Vocab(vocab), false)?;
        let target = |i| if i % 5 == 3 { IGNORE } else { (i * 37) as i32 % vocab as i32 };
        let targets: Vec<i32> = (0..batch * seq).map(target).collect();
        let targets = Tensor::of(&targets, &[batch, seq])?;
        let before = memory_stats().in_use;
        reset_peak();
        let rows_of = x.tensor().reshape(&[batch, seq, width])?;
        let loss = head.cross_entropy(&rows_of, &targets, 0.25, Some(rows))?;
        // What follows multiplies the gradient too.
        let loss = if factor == 1.0 { loss } else { loss.scale(factor)? };
        let grads = loss.backward()?;
        let peak = memory_stats().peak - before;
        let weight = p.get("head.weight")?;
        let of = |p: &Param| grads.get(p).map(<[f32]>::to_vec).unwrap_or_default();
        Ok((loss.item()?, of(&x), of(&weight), peak))
    }

    #[test]
    fn rows_at_a_time_give_the_loss_and_gradients_of_all_in_less_memory() -> Result<()> {
        for (dtype, tolerance) in [(Dtype::F32, 1e-6), (Dtype::Bf16, 1e-2)] {
            for factor in [1.0, 3.0] {
                let (loss, dx, dw, most) = run(dtype, usize::MAX, factor)?;
                for rows in [1, 4, 5, 61] {
                    let (part, dx_part, dw_part, less) = run(dtype, rows, factor)?;
                    assert!((part - loss).abs() <= tolerance * loss.abs(), "{part} {loss}");
                    for (whole, part) in [(&dx, &dx_part), (&dw, &dw_part)] {
                        let top = whole.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * top;
                        assert!(top > 0.0 && whole.len() == part.len());
                        assert!(whole.iter().zip(part).all(near), "{rows} rows of {dtype:?}");
                    }
                    assert!(rows > 5 || less < most, "{less} of {most}");
                }
            }
        }
        Ok(())
    }
}
