//! A rule an op: which placements it accepts along one axis, and what comes out.
//!
//! A rule never communicates and never guesses. What it does not list is an
//! [`Error::Layout`](crate::Error::Layout) that names the op and every operand, so a forgotten
//! `redistribute` is an error instead of a slightly wrong loss curve. Along an axis of one rank
//! all placements are the same.

use crate::error::{Error, Result};
use crate::placement::Layout;
use crate::placement::Placement::{self, Invariant, Partial, Replicate, Shard};
use crate::tensor::{Scope, Tensor};

/// Applies `rule` along every axis that has more than one rank.
pub(crate) fn propagate(
    op: &'static str,
    operands: &[&Tensor],
    rule: impl Fn(&[Placement]) -> Option<Placement>,
) -> Result<Layout> {
    let scope = operands[0].scope();
    let mut layout = operands[0].layout();
    for axis in scope.wide_axes() {
        let along: Vec<Placement> = operands.iter().map(|t| t.layout()[axis]).collect();
        layout[axis] = rule(&along).ok_or_else(|| refuse(op, scope, operands, axis))?;
    }
    Ok(layout)
}

#[cold]
fn refuse(op: &'static str, scope: &Scope, operands: &[&Tensor], axis: usize) -> Error {
    let layouts: Vec<Layout> = operands.iter().map(|t| t.layout()).collect();
    Error::layout(op, &scope.axis(axis).0, &layouts.iter().collect::<Vec<_>>(), axis)
}

/// `y = x wᵀ` with `x [.., in]` and `w [out, in]`; `last` is the last dim of `x`.
pub(crate) fn linear(last: usize) -> impl Fn(&[Placement]) -> Option<Placement> {
    move |p| match (p[0], p[1]) {
        (Replicate, Shard(0)) => Some(Shard(last)),
        (Shard(d), Shard(1)) if d == last => Some(Partial),
        (Shard(d), Replicate) if d < last => Some(Shard(d)),
        (Replicate, Replicate) => Some(Replicate),
        (Invariant, Invariant) => Some(Invariant),
        _ => None,
    }
}

/// A bias `[out]` added to `y [.., out]`.
pub(crate) fn bias(last: usize) -> impl Fn(&[Placement]) -> Option<Placement> {
    move |p| match (p[0], p[1]) {
        (Shard(d), Shard(0)) if d == last => Some(Shard(d)),
        (Shard(d), Replicate) if d < last => Some(Shard(d)),
        (Replicate, Replicate) => Some(Replicate),
        (Invariant, Invariant) => Some(Invariant),
        _ => None,
    }
}

/// Rows of a table `[vocab, embed]` by ids of `last` dims. Ids have no gradient, so `Invariant`
/// and `Replicate` ids are the same to it. Where both are cut it sums block by block.
pub(crate) fn embedding(last: usize) -> impl Fn(&[Placement]) -> Option<Placement> {
    move |p| match (p[0], p[1]) {
        (Invariant | Replicate, Shard(1)) => Some(Shard(last)),
        (Shard(0), Shard(0)) => Some(Shard(0)),
        (Invariant | Replicate, Shard(0)) => Some(Partial),
        (Shard(d), Replicate) => Some(Shard(d)),
        (Invariant | Replicate, Replicate) => Some(Replicate),
        (Invariant | Replicate, Invariant) => Some(Invariant),
        _ => None,
    }
}

/// A norm over the last dim with weights of that dim; where that is cut, sums are exchanged.
pub(crate) fn norm(last: usize) -> impl Fn(&[Placement]) -> Option<Placement> {
    move |p| match (p[0], p[1]) {
        (Shard(d), Shard(0)) if d == last => Some(Shard(d)),
        (Shard(d), Replicate) if d < last => Some(Shard(d)),
        (Replicate, Replicate) => Some(Replicate),
        (Invariant, Invariant) => Some(Invariant),
        _ => None,
    }
}

/// Linear in every operand: equal placements, pending sums included.
pub(crate) fn linear_elementwise(p: &[Placement]) -> Option<Placement> {
    p.iter().all(|q| *q == p[0]).then_some(p[0])
}

/// Not linear: equal placements, and no pending sum.
pub(crate) fn elementwise(p: &[Placement]) -> Option<Placement> {
    linear_elementwise(p).filter(|q| *q != Partial)
}

/// Queries, keys and values `[batch, seq, heads, head_dim]`: whole sequences.
pub(crate) fn attention(p: &[Placement]) -> Option<Placement> {
    elementwise(p).filter(|q| matches!(q, Shard(0) | Shard(2) | Replicate | Invariant))
}

/// Heads turned each by the position of its token.
pub(crate) fn rope(p: &[Placement]) -> Option<Placement> {
    elementwise(p).filter(|q| *q != Shard(3))
}

/// A sum over everything: slices become terms.
pub(crate) fn sum(p: &[Placement]) -> Option<Placement> {
    match p[0] {
        Shard(_) => Some(Partial),
        same => Some(same),
    }
}

/// A per-row op over the last dim of its operand (softmax, a row's loss), which must be whole.
pub(crate) fn rowwise(last: usize) -> impl Fn(&[Placement]) -> Option<Placement> {
    move |p| elementwise(p).filter(|q| *q != Shard(last))
}
