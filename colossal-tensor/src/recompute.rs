//! Activation checkpointing (Chen et al., 2016): save a layer's input, run it again in backward.

use std::sync::Arc;

use crate::autograd::{Edge, is_grad_enabled, record_edges, record_used, with_grad};
use crate::error::Result;
use crate::tensor::Tensor;

/// Runs `f` on `x` without saving what is inside; backward runs it again.
///
/// `f` must be a pure function of its argument and of parameters: dropout inside must take its
/// mask from a counter-based stream, as [`Tensor::dropout`] does.
pub fn recompute(
    x: &Tensor,
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !is_grad_enabled() {
        return f(x);
    }
    if let Some(account) = x.scope().account() {
        // What backward will send; what it will save is dropped with the result.
        account.again(true);
        let again = f(&crate::autograd::pretended("recompute", x.detach(), &[x], &[]));
        account.again(false);
        drop(again?);
    }
    let (y, used) = record_used(|| f(&x.detach()));
    let y = y?;
    if !x.requires_grad() && used.is_empty() {
        return Ok(y);
    }
    let mut edges = vec![x.edge().clone()];
    edges.extend(used.into_iter().map(Edge::Leaf));
    let input = x.detach();
    Ok(record_edges("recompute", y, edges, move |dy, back| {
        // The input becomes a root of its own graph, whose gradient is carried out of it.
        let carried = Arc::new(parking_lot::Mutex::new(None));
        let slot = carried.clone();
        let root = input.detach();
        let gate = record_edges("recompute input", root, vec![Edge::None], move |grad, _| {
            *slot.lock() = Some(grad);
            Ok(())
        });
        let y = with_grad(true, || f(&gate))?;
        drop(gate);
        back.nested(&y, dy)?;
        let grad = carried.lock().take();
        match grad {
            Some(grad) => back.give(0, grad),
            None => Ok(()),
        }
    }))
}
