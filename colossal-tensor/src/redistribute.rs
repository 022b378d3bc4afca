//! Moving a tensor between placements: the only op of this crate that always communicates.
//!
//! | from, to | forward | backward | known as |
//! | --- | --- | --- | --- |
//! | Invariant, Replicate | nothing | all-reduce | Megatron's *f* |
//! | Partial, Invariant | all-reduce | nothing | Megatron's *g* |
//! | Shard(d), Replicate | all-gather | reduce-scatter | gather from sequence-parallel region |
//! | Partial, Shard(d) | reduce-scatter | all-gather | reduce-scatter to it |
//! | Shard(a), Shard(b) | all-to-all | all-to-all | Ulysses; FastFold's row/column switch |
//! | Shard(d), Invariant | all-gather | slice | |
//! | Replicate, Shard(d) | slice | pad with zeros | |
//! | Invariant, Shard(d) | slice | all-gather | |
//! | Partial, Replicate | all-reduce | all-reduce | |
//! | Replicate, Invariant | nothing | divide | |
//!
//! There is no table of backwards in the code: the gradient of a move from `a` to `b` is the same
//! function applied from `b.dual()` to `a.dual()`.

use colossal_comm::{Group, ReduceOp};

use crate::autograd::record;
use crate::collectives;
use crate::dtype::{Element, any};
use crate::error::{Error, Result, comm};
use crate::kernels;
use crate::placement::Placement::{self, Invariant, Partial, Replicate, Shard};
use crate::placement::{Layout, Region};
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

impl Tensor {
    /// This tensor as the plan wants it in `region`. On one device it is the tensor itself.
    pub fn redistribute(&self, region: Region) -> Result<Tensor> {
        self.to_layout(self.scope().sharding().region(region))
    }

    /// This tensor with another placement along one named axis.
    pub fn distribute(&self, axis: &str, to: Placement) -> Result<Tensor> {
        let index = self.scope().mesh().axes().iter().position(|(name, _)| *name == axis);
        let index = index.ok_or_else(|| {
            let axes = self.scope().mesh().axes();
            let names: Vec<_> = axes.iter().map(|(n, _)| n.to_string()).collect();
            Error::Other(format!("distribute: no axis {axis}; the mesh has [{}]", names.join(", ")))
        })?;
        self.to_layout(self.layout().with(index, to))
    }

    /// This tensor under another layout, moved axis by axis. What several axes cut is put
    /// together from the innermost axis outwards, and cut from the outermost inwards.
    pub fn to_layout(&self, to: Layout) -> Result<Tensor> {
        let from = self.layout();
        let mut moves: Vec<usize> =
            self.scope().wide_axes().filter(|a| from[*a] != to[*a]).collect();
        if moves.is_empty() {
            return Ok(self.clone());
        }
        moves.sort_by_key(|axis| match from[*axis] {
            Shard(_) => (0, self.scope().axes() - axis),
            _ => (1, *axis),
        });
        let mut out = self.detach();
        for axis in &moves {
            nested(&out, *axis, to[*axis])?;
            out = self.pretend_to_send(shift(&out, *axis, to[*axis])?, &out, *axis);
        }
        Ok(record("redistribute", out, &[self], move |grad, back| {
            let mut grad = grad;
            for axis in moves.iter().rev() {
                grad = shift(&grad, *axis, from[*axis].dual())?;
            }
            back.give(0, grad)
        }))
    }

    /// One move along one axis, whatever other axes cut: an op that puts the pieces back where
    /// they came from may take them out of order meanwhile.
    pub(crate) fn exchange(&self, axis: usize, to: Placement) -> Result<Tensor> {
        let from = self.layout()[axis];
        let out = self.pretend_to_send(shift(&self.detach(), axis, to)?, self, axis);
        Ok(record("exchange", out, &[self], move |grad, back| {
            back.give(0, shift(&grad, axis, from.dual())?)
        }))
    }
}

impl Tensor {
    /// Enters the move from `old` to `new` in the account of a pretended mesh.
    fn pretend_to_send(&self, new: Tensor, old: &Tensor, axis: usize) -> Tensor {
        let (from, to) = (old.layout()[axis], new.layout()[axis]);
        let bytes = |t: &Tensor| t.len() * t.dtype().bytes();
        let ranks = self.scope().axis(axis).1;
        let there = cost(from, to, bytes(old), ranks);
        let back = match self.requires_grad() {
            true => cost(to.dual(), from.dual(), bytes(&new), ranks),
            false => 0,
        };
        if there + back > 0 {
            self.scope().sends("redistribute", axis, there, back);
        }
        new
    }
}

/// Bytes that one rank sends to move `bytes` of its part of a tensor.
fn cost(from: Placement, to: Placement, bytes: usize, ranks: usize) -> usize {
    match (from, to) {
        (a, b) if a == b => 0,
        (Partial, Invariant | Replicate) => 2 * (bytes * (ranks - 1) / ranks),
        (Shard(_), Replicate | Invariant) => bytes * (ranks - 1),
        (Partial, Shard(_)) | (Shard(_), Shard(_)) => bytes * (ranks - 1) / ranks,
        _ => 0,
    }
}

/// Do the rows of `like` lie along other axes than those of a batch laid out as `from`? On a cube
/// the axes of rows and of width have traded places after a product.
pub(crate) fn rows_moved(from: Layout, like: &Tensor) -> bool {
    moved_rows(from, like).is_some()
}

/// The axis along which rows lay, and that along which they lie.
fn moved_rows(from: Layout, like: &Tensor) -> Option<(usize, usize)> {
    let find = |a: Layout, b: Layout| {
        like.scope().wide_axes().find(|axis| a[*axis] == Shard(0) && b[*axis] != Shard(0))
    };
    find(from, like.layout()).zip(find(like.layout(), from))
}

/// Entries of a batch as `like` holds them, given as the batch's layout holds them: gathered
/// along one axis and cut on the other.
pub(crate) fn follow_rows(entries: &[i32], from: Layout, like: &Tensor) -> Result<Vec<i32>> {
    let Some((gather, cut)) = moved_rows(from, like) else {
        return Ok(entries.to_vec());
    };
    let scope = like.scope();
    let group = scope.mesh().group(&scope.axis(gather).0).map_err(comm)?;
    let mut all = vec![0; entries.len() * group.world_size()];
    group.all_gather(entries, &mut all).map_err(comm)?;
    let part = all.len() / scope.axis(cut).1;
    Ok(all[scope.coord(cut) * part..][..part].to_vec())
}

/// Refuses to move a cut that another axis has cut once more.
fn nested(x: &Tensor, axis: usize, to: Placement) -> Result<()> {
    let from = x.layout()[axis];
    let inner = |place| {
        matches!(place, Shard(_))
            && x.scope().wide_axes().any(|a| a > axis && x.layout()[a] == place)
    };
    if inner(from) || inner(to) {
        return Err(Error::Redistribute {
            axis: x.scope().axis(axis).0,
            from,
            to,
            reason: "an axis further inside cuts the same dim; move that one too",
        });
    }
    Ok(())
}

/// One move along one axis, without recording it.
pub(crate) fn shift(x: &Tensor, axis: usize, to: Placement) -> Result<Tensor> {
    let scope = x.scope().clone();
    let (name, ranks) = scope.axis(axis);
    let from = x.layout()[axis];
    let layout = x.layout().with(axis, to);
    let refuse = |reason| Error::Redistribute { axis: name.clone(), from, to, reason };
    let split = |dim: usize| -> Result<Vec<usize>> {
        let mut shape = x.shape().to_vec();
        match shape.get_mut(dim) {
            None => return Err(refuse("the tensor has no such dim")),
            Some(size) if *size % ranks != 0 => {
                return Err(Error::Divide {
                    what: "redistribute".into(),
                    dim,
                    size: *size,
                    axis: name.clone(),
                    ranks,
                });
            }
            Some(size) => *size /= ranks,
        }
        Ok(shape)
    };
    let merge = |shape: &[usize], dim: usize| -> Result<Vec<usize>> {
        let mut shape = shape.to_vec();
        *shape.get_mut(dim).ok_or_else(|| refuse("the tensor has no such dim"))? *= ranks;
        Ok(shape)
    };
    let shape = match (from, to) {
        (a, b) if a == b => return Ok(x.clone()),
        (Invariant, Replicate) | (Replicate, Invariant) => {
            // Gradients keep duality: a Replicate that becomes Invariant is divided in backward.
            return Ok(x.rewrap(x.shape(), layout, 0, crate::autograd::Edge::None));
        }
        (Partial, Invariant | Replicate) | (Invariant | Replicate, Partial) => x.shape().to_vec(),
        (Shard(d), Replicate | Invariant) | (Shard(d), Partial) => merge(x.shape(), d)?,
        (Partial | Replicate | Invariant, Shard(d)) => split(d)?,
        (Shard(a), Shard(b)) => merge(&split(b)?, a)?,
        // Equal placements are covered above; the compiler cannot know.
        (Partial, Partial) | (Replicate, Replicate) | (Invariant, Invariant) => unreachable!(),
    };
    if scope.is_fake() {
        return Ok(Tensor::pretend(&scope, &shape, x.dtype(), layout));
    }
    let group = scope.mesh().group(&name).map_err(comm)?;
    let dtype = x.dtype();
    let buffer = any!(dtype, T => moved::<T>(x.clone(), from, to, &shape, group))?;
    Ok(Tensor::wrap(&scope, buffer, &shape, dtype, layout))
}

fn moved<T: Element>(
    x: Tensor,
    from: Placement,
    to: Placement,
    shape: &[usize],
    group: &Group,
) -> Result<Buffer> {
    let n = group.world_size();
    let len: usize = shape.iter().product();
    let old = x.shape().to_vec();
    let device = x.scope().place_of(T::DTYPE).clone();
    let room = || Buffer::on(&device, len * size_of::<T>());
    match (from, to) {
        (Partial, Invariant | Replicate) => {
            let mut buffer = x.into_buffer()?;
            collectives::all_reduce(group, buffer.view_mut::<T>(), ReduceOp::Sum)?;
            Ok(buffer)
        }
        // One term each of a sum whose value is the tensor.
        (Invariant | Replicate, Partial) => {
            let scaled = x.detach().scale(1.0 / n as f32)?;
            scaled.into_buffer()
        }
        (Shard(d), Replicate | Invariant) => {
            let values = x.lend::<T>()?;
            let mut gathered = room()?;
            collectives::all_gather(group, values.view::<T>(), gathered.view_mut())?;
            if outer(&old, d) == 1 {
                return Ok(gathered);
            }
            // [rank, outer, inner] to [outer, rank, inner]
            let mut out = room()?;
            let (rows, inner) = (outer(&old, d), old[d..].iter().product());
            swap(gathered.view::<T>(), out.view_mut(), n, rows, inner)?;
            Ok(out)
        }
        (Shard(d), Partial) => {
            let values = x.lend::<T>()?;
            let mut out = Buffer::zeros_on::<T>(&device, len)?;
            let inner: usize = old[d..].iter().product();
            let own = out.view_mut().range(group.rank() * inner..len);
            let sizes = [outer(&old, d), 1, inner];
            kernels::copy_block(values.view::<T>(), [inner, 0], sizes, own, [n * inner, 0])?;
            Ok(out)
        }
        (Replicate | Invariant, Shard(d)) => {
            let values = x.lend::<T>()?;
            let mut out = room()?;
            let inner: usize = shape[d..].iter().product();
            let own = values.view::<T>();
            let own = own.range(group.rank() * inner..own.len());
            let sizes = [outer(shape, d), 1, inner];
            kernels::copy_block(own, [n * inner, 0], sizes, out.view_mut(), [inner, 0])?;
            Ok(out)
        }
        (Partial, Shard(d)) => {
            let values = x.lend::<T>()?;
            let mut out = room()?;
            let (rows, inner) = (outer(shape, d), shape[d..].iter().product());
            let sum = ReduceOp::Sum;
            if rows == 1 {
                collectives::reduce_scatter(group, values.view::<T>(), out.view_mut(), sum)?;
                return Ok(out);
            }
            let mut by_rank = Buffer::on(&device, len * n * size_of::<T>())?;
            swap(values.view::<T>(), by_rank.view_mut(), rows, n, inner)?;
            collectives::reduce_scatter(group, by_rank.view::<T>(), out.view_mut(), sum)?;
            Ok(out)
        }
        (Shard(a), Shard(b)) => {
            // Cut dim b into one piece per rank, exchange, then lay the pieces along dim a.
            let values = x.lend::<T>()?;
            let mut send = room()?;
            let (rows, inner) = (outer(&old, b), old[b..].iter().product::<usize>() / n);
            swap(values.view::<T>(), send.view_mut(), rows, n, inner)?;
            let mut got = room()?;
            collectives::all_to_all(group, send.view::<T>(), got.view_mut())?;
            let mut piece = old.clone();
            piece[b] /= n;
            let (rows, inner) = (outer(&piece, a), piece[a..].iter().product());
            swap(got.view::<T>(), send.view_mut(), n, rows, inner)?;
            Ok(send)
        }
        _ => unreachable!("moves without data are handled before"),
    }
}

/// `[a, b, inner]` to `[b, a, inner]`, wherever they are.
fn swap<T: Element>(
    src: View<'_, T>,
    dst: ViewMut<'_, T>,
    a: usize,
    b: usize,
    inner: usize,
) -> Result<()> {
    kernels::copy_block(src, [b * inner, inner], [a, b, inner], dst, [inner, a * inner])
}

/// The number of rows before dim `d`.
fn outer(shape: &[usize], d: usize) -> usize {
    shape[..d].iter().product()
}
