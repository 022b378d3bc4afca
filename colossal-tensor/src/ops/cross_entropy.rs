//! Softmax cross-entropy over the vocabulary; calls `comm` when the vocabulary is sharded.
//!
//! Per token `loss = logsumexp(logits) - logits[target]`. Over a sharded vocabulary three numbers
//! a token are reduced: the maximum, the sum of exponentials, the target's logit. The backward
//! pass turns the logits into their gradient in place.

use colossal_comm::ReduceOp;
use colossal_kernels::ELSEWHERE;

use super::produce;
use crate::autograd::{Edge, is_grad_enabled, pretended, record_edges};
use crate::collectives;
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result, comm};
use crate::kernels;
use crate::placement::Placement;
use crate::propagate::propagate;
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::View;

/// Targets with this value have no loss (PyTorch's convention).
pub const IGNORE: i32 = -100;

impl Tensor {
    /// The loss of each token, in f32: `logits [.., vocab]`, `targets [..]` of `i32`.
    /// A target of -100 is ignored: its loss is 0. That of an entry that only fills up a vocabulary is
    /// beyond all measure: whoever knows the entries that exist checks targets.
    ///
    /// # Errors
    /// [`Error::Shape`] when shapes do not fit, [`Error::Other`] for a target outside the vocabulary.
    pub fn cross_entropy(self, targets: &Tensor) -> Result<Tensor> {
        let Some((&vocab, outer)) = self.shape().split_last() else {
            let reason = "logits are [.., vocab]";
            return Err(Error::shape("cross_entropy", self.shape(), targets.shape(), reason));
        };
        if outer != targets.shape() {
            let reason = "one target per row of logits";
            return Err(Error::shape("cross_entropy", self.shape(), targets.shape(), reason));
        }
        if targets.dtype() != Dtype::I32 {
            return Err(Error::Dtype {
                op: "cross_entropy",
                left: targets.dtype(),
                right: Dtype::I32,
            });
        }
        let last = outer.len();
        let targets = &on_same_rows(&self, targets, last)?;
        let layout = propagate("cross_entropy", &[&self, targets], |p| match (p[0], p[1]) {
            // Targets have no gradient: Invariant and Replicate targets are the same.
            (Placement::Shard(d), Placement::Invariant | Placement::Replicate) if d == last => {
                Some(Placement::Invariant)
            }
            (Placement::Shard(d), Placement::Shard(e)) if d == e && d < last => {
                Some(Placement::Shard(d))
            }
            (Placement::Invariant, Placement::Invariant | Placement::Replicate) => {
                Some(Placement::Invariant)
            }
            _ => None,
        })?;
        let scope = self.scope().clone();
        let (outer, rows) = (outer.to_vec(), self.rows());
        if scope.is_fake() {
            for axis in scope.wide_axes().filter(|a| self.layout()[*a] == Placement::Shard(last)) {
                let n = scope.axis(axis).1;
                let numbers = |count: usize| 2 * (4 * count * rows * (n - 1) / n);
                scope.sends("cross_entropy", axis, numbers(1) + numbers(2), 0);
            }
            let y = Tensor::pretend(&scope, &outer, Dtype::F32, layout);
            return Ok(pretended("cross_entropy", y, &[&self], &[&self]));
        }
        let sharded: Vec<usize> = scope
            .wide_axes()
            .filter(|axis| self.layout()[*axis] == Placement::Shard(last))
            .collect();
        let global = self.global_shape()[last];
        let first = self.origin()[last] as i32;
        let mut targets = targets.to_vec_of::<i32>()?;
        let outside = |t: &&i32| **t != IGNORE && (**t < 0 || **t as usize >= global);
        if let Some(bad) = targets.iter().find(outside) {
            return Err(Error::Other(format!(
                "cross_entropy: target {bad} is outside the vocabulary, 0..{global}; mark tokens \
                 without loss with {IGNORE}"
            )));
        }
        let group = match sharded[..] {
            [] => None,
            [axis] => Some(scope.mesh().group(&scope.axis(axis).0).map_err(comm)?),
            _ => {
                return Err(Error::Other(
                    "cross_entropy: the vocabulary may be sharded along one axis only".into(),
                ));
            }
        };
        // Relative to this rank's part of the vocabulary. A target on another rank: softmax only,
        // no one-hot term here.
        for t in targets.iter_mut().filter(|t| **t != IGNORE && group.is_some()) {
            let local = *t - first;
            *t = if (0..vocab as i32).contains(&local) { local } else { ELSEWHERE };
        }
        let own = Buffer::copy_of(scope.device(), View::Cpu(targets.as_slice()))?;
        let [mut loss, mut lse] = [scope.room::<f32>(rows)?, scope.room::<f32>(rows)?];
        float!("cross_entropy", self.dtype(), T => {
            let logits = self.lend::<T>()?;
            let (logits, targets) = (logits.view::<T>(), own.view());
            let (loss, lse) = (loss.view_mut(), lse.view_mut());
            match group {
                None => kernels::cross_entropy(logits, targets, vocab, IGNORE, loss, lse),
                Some(group) => {
                    let mut local_max = scope.room::<f32>(rows)?;
                    // Sums of exponentials, then targets' logits, in one message.
                    let mut terms = scope.room::<f32>(2 * rows)?;
                    let sums = terms.view_mut().range(0..rows);
                    kernels::logits_stats(logits, vocab, local_max.view_mut(), sums)?;
                    let mut max = Buffer::copy_of(scope.device(), local_max.view::<f32>())?;
                    collectives::all_reduce(group, max.view_mut::<f32>(), ReduceOp::Max)?;
                    let (own, max) = (local_max.view(), max.view());
                    kernels::vocabulary_terms(logits, targets, vocab, own, max, terms.view_mut())?;
                    collectives::all_reduce(group, terms.view_mut::<f32>(), ReduceOp::Sum)?;
                    kernels::vocabulary_loss(max, terms.view(), targets, IGNORE, loss, lse)
                }
            }
        })?;
        let y = produce(&scope, &outer, Dtype::F32, layout, |y| {
            std::mem::swap(y, &mut loss);
            Ok(())
        })?;
        if !self.requires_grad() {
            return Ok(y);
        }
        let (shape, dtype, grad_layout) =
            (self.shape().to_vec(), self.dtype(), self.layout().dual());
        // The logits are consumed: when the caller kept no other handle, backward overwrites them.
        let edges = vec![self.edge().clone()];
        let saved = self.with_edge(Edge::None);
        if !is_grad_enabled() {
            return Ok(y);
        }
        Ok(record_edges("cross_entropy", y, edges, move |dloss, back| {
            let mut grad = saved.into_buffer()?;
            float!("cross_entropy", dtype, T => {
                kernels::cross_entropy_backward(
                    dloss.lend::<f32>()?.view::<f32>(),
                    own.view(),
                    vocab,
                    IGNORE,
                    lse.view(),
                    grad.view_mut::<T>(),
                )
            })?;
            back.give(0, Tensor::wrap(&scope, grad, &shape, dtype, grad_layout))
        }))
    }
}

/// Targets on the rows of the logits: after a product on a cube those have traded axes.
fn on_same_rows(logits: &Tensor, targets: &Tensor, last: usize) -> Result<Tensor> {
    let at = |rule: &dyn Fn(Placement, Placement) -> bool| {
        let (ours, theirs) = (logits.layout(), targets.layout());
        logits.scope().wide_axes().find(|axis| rule(ours[*axis], theirs[*axis]))
    };
    let (rows, vocab) = (Placement::Shard(0), Placement::Shard(last));
    let gathered = at(&|ours, theirs| ours == vocab && theirs == rows);
    let cut = at(&|ours, theirs| ours == rows && theirs == Placement::Invariant);
    let (Some(gathered), Some(cut)) = (gathered, cut) else {
        return Ok(targets.clone());
    };
    let layout = targets.layout().with(gathered, Placement::Invariant).with(cut, rows);
    if logits.scope().is_fake() {
        let others = logits.scope().axis(gathered).1 - 1;
        logits.scope().sends("cross_entropy", gathered, others * 4 * targets.len(), 0);
        return Ok(targets.rewrap(targets.shape(), layout, 0, Edge::None));
    }
    let entries = targets.to_vec_of::<i32>()?;
    let entries = crate::redistribute::follow_rows(&entries, targets.layout(), logits)?;
    Tensor::from_slice(logits.scope(), &entries, targets.shape(), layout)
}
