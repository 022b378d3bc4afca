//! Dropout whose mask is a function of the seed and the position in the whole tensor.
//!
//! Nothing is saved: backward draws the same mask again. Every plan drops the same elements: an
//! element of a sequence is known by its row, its token and its place in the token's width, so
//! neither padding behind a sequence nor the order in which zigzag holds tokens changes its fate.

use super::produce;
use crate::autograd::record;
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::placement::{Layout, Placement};
use crate::random::Stream;
use crate::tensor::Tensor;
use crate::view::View;

impl Tensor {
    /// Zeroes each element with probability `p` and scales the others by `1 / (1 - p)`.
    ///
    /// `first_row` is where this tensor's first row (of its outermost dim, over all ranks) lies in
    /// a larger one that is computed in parts: a microbatch's place in its batch, 0 for a whole.
    ///
    /// # Errors
    /// Unless `0 <= p < 1`; [`Error::Layout`] for a pending sum.
    pub fn dropout(&self, p: f32, stream: Stream, first_row: usize) -> Result<Tensor> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::Other(format!("dropout: p must be in [0, 1), not {p}")));
        }
        if p == 0.0 {
            return Ok(self.clone());
        }
        let op = "dropout";
        let layout = crate::propagate::propagate(op, &[self], crate::propagate::elementwise)?;
        // Positions follow the forward layout: in backward a Replicate has become a Partial.
        let placed = self.layout();
        let y = mask(self, p, (stream, first_row), placed, layout)?;
        Ok(record(op, y, &[self], move |dy, back| {
            back.give(0, mask(&dy, p, (stream, first_row), placed, dy.layout())?)
        }))
    }
}

fn mask(
    x: &Tensor,
    p: f32,
    (stream, first_row): (Stream, usize),
    placed: Layout,
    layout: Layout,
) -> Result<Tensor> {
    let scope = x.scope();
    // Global size and this rank's first index, per dim.
    let mut global = x.shape().to_vec();
    let first = x.origin_under(placed);
    let mut order = None;
    for axis in scope.wide_axes() {
        let Placement::Shard(dim) = placed[axis] else { continue };
        global[dim] *= scope.axis(axis).1;
        if dim == 1 && scope.role(axis).is_some_and(|role| role.context.is_some()) {
            order = Some(axis);
        }
    }
    let order = order.map(|_| scope.token_order(global[1])).transpose()?;
    let width = x.last_dim();
    let rows = if scope.is_fake() { 0 } else { x.len().checked_div(width).unwrap_or(0) };
    let (keys, firsts): (Vec<u64>, Vec<u64>) = (0..rows)
        .map(|row| {
            let (outer, base) = place(row, x.shape(), &global, &first, order.as_deref());
            (stream.child((first_row + outer) as u64).key(), base as u64)
        })
        .unzip();
    produce(scope, x.shape(), x.dtype(), layout, |y| {
        float!("dropout", x.dtype(), T => {
            let (x, keys, firsts) = (x.lend::<T>()?, View::Cpu(&keys[..]), View::Cpu(&firsts[..]));
            kernels::dropout(x.view::<T>(), keys, firsts, width, p, y.view_mut::<T>())
        })
    })
}

/// Where local row `row` begins in the whole tensor: its outermost index, and its place among the
/// elements of that index. `order` says which token each place of a sequence holds.
fn place(
    mut row: usize,
    shape: &[usize],
    global: &[usize],
    first: &[usize],
    order: Option<&[usize]>,
) -> (usize, usize) {
    let Some(last) = shape.len().checked_sub(1) else { return (0, 0) };
    if last == 0 {
        return (0, first[0]);
    }
    let (mut index, mut stride) = (first[last], global[last]);
    for dim in (1..last).rev() {
        let mut at = first[dim] + row % shape[dim];
        if let (1, Some(order)) = (dim, order) {
            at = order[at];
        }
        index += at * stride;
        row /= shape[dim];
        stride *= global[dim];
    }
    (first[0] + row, index)
}
