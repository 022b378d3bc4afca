//! Tokens on their way to the ranks that have their experts, and back: calls `comm`.

use std::sync::Arc;

use colossal_comm::Group;
use colossal_kernels::Float;

use super::Routing;
use crate::autograd::{pretended, record};
use crate::collectives;
use crate::device::Device;
use crate::dtype::{Dtype, Element, float};
use crate::error::{Error, Result, comm};
use crate::kernels;
use crate::ops::produce;
use crate::placement::Placement::{self, Invariant, Partial, Replicate, Shard};
use crate::propagate::propagate;
use crate::storage::Buffer;
use crate::tensor::{Scope, Tensor};
use crate::view::{View, ViewMut};

impl Tensor {
    /// Rows `[rows, h]` of the tokens `[.., h]`, sorted by expert, at the ranks of `journey`.
    pub fn dispatch(&self, journey: &Arc<Journey>) -> Result<Tensor> {
        let last = self.shape().len() - 1;
        let layout = propagate("dispatch", &[self], |p| match p[0] {
            Shard(d) if d < last => Some(Shard(0)),
            Shard(_) => Some(Shard(1)),
            Replicate | Invariant => Some(p[0]),
            _ => None,
        })?;
        let width = self.last_dim();
        let shape = [journey.rows, width];
        if self.rows() * journey.k != journey.choices {
            let right = [journey.choices / journey.k.max(1), width];
            return Err(Error::shape("dispatch", self.shape(), &right, "tokens that were routed"));
        }
        journey.pretend_to_send("dispatch", self.scope(), width * self.dtype().bytes());
        let y = produce(self.scope(), &shape, self.dtype(), layout, |y| {
            float!("dispatch", self.dtype(), T => {
                let x = self.lend::<T>()?;
                journey.there(self.scope().device(), width, y.view_mut::<T>(), |rows| {
                    kernels::embedding(View::Cpu(&journey.tokens[..]), x.view::<T>(), width, rows)
                })
            })
        })?;
        let (shape, layout, journey) =
            (self.shape().to_vec(), self.layout().dual(), journey.clone());
        Ok(record("dispatch", y, &[self], move |dy, back| {
            let ones = vec![1.0; journey.choices];
            let rows = journey.back(&dy)?;
            drop(dy);
            let dx = produce(rows.scope(), &shape, rows.dtype(), layout, |dx| {
                float!("dispatch", rows.dtype(), T => {
                    let (at, ones) = (View::Cpu(&journey.places[..]), View::Cpu(&ones[..]));
                    let rows = rows.lend::<T>()?;
                    let (rows, dx) = (rows.view::<T>(), dx.view_mut::<T>());
                    kernels::combine_rows(at, ones, journey.k, rows, width, dx)
                })
            })?;
            back.give(0, dx)
        }))
    }

    /// Rows `[rows, h]` back at their tokens: `sum over k of weight * row`. `weights [.., k]`.
    pub fn combine_rows(&self, weights: &Tensor, journey: &Arc<Journey>) -> Result<Tensor> {
        let (width, last) = (self.last_dim(), weights.shape().len() - 1);
        let layout = propagate("combine", &[self, weights], |p| match (p[0], p[1]) {
            (Shard(0), Shard(d)) if d < last => Some(Shard(d)),
            (Shard(1), Replicate) => Some(Shard(last)),
            (Partial, Replicate) => Some(Partial),
            (Replicate, Replicate) => Some(Replicate),
            (Invariant, Invariant) => Some(Invariant),
            _ => None,
        })?;
        let mut shape = weights.shape().to_vec();
        shape[last] = width;
        let k = journey.k;
        let (scope, dtype) = (self.scope().clone(), self.dtype());
        if scope.is_fake() {
            journey.pretend_to_send("combine", &scope, width * dtype.bytes());
            let y = Tensor::pretend(&scope, &shape, dtype, layout);
            // The rows that came back are kept, as many as there are here.
            let rows = Tensor::pretend(&scope, self.shape(), dtype, self.layout());
            return Ok(pretended("combine", y, &[self, weights], &[&rows, weights]));
        }
        let w = weights.to_vec()?;
        let rows = journey.back(self)?;
        let y = produce(&scope, &shape, dtype, layout, |y| {
            float!("combine", dtype, T => {
                let (rows, y) = (rows.lend::<T>()?, y.view_mut::<T>());
                let (at, w) = (View::Cpu(&journey.places[..]), View::Cpu(&w[..]));
                kernels::combine_rows(at, w, k, rows.view::<T>(), width, y)
            })
        })?;
        let (row_layout, row_shape) = (self.layout().dual(), self.shape().to_vec());
        let (weight_layout, weight_shape) = (weights.layout().dual(), weights.shape().to_vec());
        let journey = journey.clone();
        Ok(record("combine", y, &[self, weights], move |dy, back| {
            let mut dw = scope.room::<f32>(w.len())?;
            let dx = produce(&scope, &row_shape, dtype, row_layout, |dx| {
                float!("combine", dtype, T => {
                    let (rows, dy) = (rows.lend::<T>()?, dy.lend::<T>()?);
                    let (rows, dy, dw) = (rows.view::<T>(), dy.view::<T>(), dw.view_mut());
                    let (at, w) = (View::Cpu(&journey.places[..]), View::Cpu(&w[..]));
                    journey.there(scope.device(), width, dx.view_mut::<T>(), |leaving| {
                        kernels::combine_rows_backward(at, w, k, rows, width, dy, leaving, dw)
                    })
                })
            })?;
            back.give(1, Tensor::wrap(&scope, dw, &weight_shape, Dtype::F32, weight_layout))?;
            back.give(0, dx)
        }))
    }
}

/// Where the rows of a batch of tokens go, and how they come back.
#[derive(Debug)]
pub struct Journey {
    k: usize,
    choices: usize,
    /// The token of each row that leaves; rows are sorted by expert.
    tokens: Vec<i32>,
    /// For each choice its place among the rows that leave, or -1: no expert had room.
    places: Vec<i32>,
    /// Rows to each rank, and from each.
    sent: Vec<usize>,
    got: Vec<usize>,
    /// For each row here, sorted by expert: its place among the rows as they arrived.
    arrived: Vec<i32>,
    /// First row of each expert of this rank, and the end.
    pub(super) starts: Vec<usize>,
    pub(super) rows: usize,
    /// The ranks among which the experts are cut, and their axis.
    group: Option<Group>,
    axis: Option<usize>,
    /// Choices of each expert (all of them), before capacity, of this rank's tokens.
    load: Vec<usize>,
}

impl Journey {
    /// The journey of tokens with this choice `[.., k]` to experts whose weights are laid out as
    /// `weight [experts, ..]` is. Ranks that share experts tell each other how many rows come.
    pub fn new(choice: &Tensor, routing: &Routing, weight: &Tensor) -> Result<Arc<Journey>> {
        let (experts, k) = (routing.experts, routing.top_k);
        let scope = choice.scope();
        let axis = Journey::axis(scope, choice, weight)?;
        let own = weight.shape()[0];
        if scope.is_fake() {
            let rows = choice.len();
            let starts = (0..=own).map(|e| rows * e / own.max(1)).collect();
            return Ok(Arc::new(Journey {
                k,
                choices: choice.len(),
                tokens: vec![],
                places: vec![],
                sent: vec![],
                got: vec![],
                arrived: vec![],
                starts,
                rows,
                group: None,
                axis,
                load: vec![],
            }));
        }
        let group = axis
            .map(|axis| scope.mesh().group(&scope.axis(axis).0).cloned())
            .transpose()
            .map_err(comm)?;
        let choice = choice.to_vec_of::<i32>()?;
        let mut by_expert: Vec<Vec<u32>> = vec![vec![]; experts];
        for (i, e) in choice.iter().enumerate() {
            by_expert[*e as usize].push(i as u32);
        }
        let load = by_expert.iter().map(Vec::len).collect();
        if let Some(factor) = routing.capacity {
            let room = (factor * choice.len() as f32 / experts as f32).ceil() as usize;
            by_expert.iter_mut().for_each(|rows| rows.truncate(room));
        }
        let counts: Vec<u64> = by_expert.iter().map(|rows| rows.len() as u64).collect();
        let ranks = group.as_ref().map_or(1, Group::world_size);
        let mut coming = vec![0u64; counts.len()];
        match &group {
            Some(group) => group.all_to_all(&counts, &mut coming).map_err(comm)?,
            None => coming.copy_from_slice(&counts),
        }
        // Rows arrive by rank and, within, by expert; they are wanted by expert.
        let at = |rank: usize, e: usize| coming[..rank * own + e].iter().sum::<u64>() as i32;
        let (mut arrived, mut starts) = (vec![], vec![0]);
        for e in 0..own {
            for rank in 0..ranks {
                let first = at(rank, e);
                arrived.extend(first..first + coming[rank * own + e] as i32);
            }
            starts.push(arrived.len());
        }
        let by_rank = |counts: &[u64]| -> Vec<usize> {
            counts.chunks(own).map(|c| c.iter().sum::<u64>() as usize).collect()
        };
        let order = by_expert.concat();
        let mut places = vec![-1; choice.len()];
        for (place, i) in order.iter().enumerate() {
            places[*i as usize] = place as i32;
        }
        Ok(Arc::new(Journey {
            k,
            choices: choice.len(),
            tokens: order.iter().map(|i| (i / k as u32) as i32).collect(),
            places,
            sent: by_rank(&counts),
            got: by_rank(&coming),
            rows: arrived.len(),
            arrived,
            starts,
            group,
            axis,
            load,
        }))
    }

    /// The axis that cuts the experts; tokens must be cut along it too.
    fn axis(scope: &Scope, choice: &Tensor, weight: &Tensor) -> Result<Option<usize>> {
        let cut: Vec<usize> =
            scope.wide_axes().filter(|a| weight.layout()[*a] == Shard(0)).collect();
        match cut[..] {
            [] => Ok(None),
            [axis] if matches!(choice.layout()[axis], Placement::Shard(_)) => Ok(Some(axis)),
            [axis] => Err(Error::Layout {
                op: "dispatch",
                axis: scope.axis(axis).0,
                operands: vec![choice.layout()[axis], Shard(0)],
            }),
            _ => {
                let axes: Vec<String> = cut.iter().map(|a| scope.axis(*a).0).collect();
                Err(Error::Other(format!(
                    "dispatch: experts are cut along axes {}, and may be along one only; the rows of \
                     a grid or cube cut them already, without ep",
                    axes.join(" and ")
                )))
            }
        }
    }

    /// Enters a way there and the gradient's way back in the account of a pretended mesh, with
    /// experts evenly used: rows of so many bytes.
    fn pretend_to_send(&self, op: &'static str, scope: &Scope, row: usize) {
        if let Some(axis) = self.axis {
            let ranks = scope.axis(axis).1;
            let sent = self.rows * row * (ranks - 1) / ranks;
            scope.sends(op, axis, sent, sent);
        }
    }

    /// Choices of each expert by this rank's tokens, dropped ones included.
    pub fn load(&self) -> &[usize] {
        &self.load
    }

    /// Rows that no expert had room for.
    pub fn dropped(&self) -> usize {
        self.choices - self.tokens.len()
    }

    /// `f(expert, first row, rows)` of each expert of this rank that has rows.
    pub(super) fn products<R>(&self, f: impl Fn(usize, usize, usize) -> R) -> Vec<R> {
        let ends = self.starts.windows(2).enumerate().filter(|(_, ends)| ends[1] > ends[0]);
        ends.map(|(e, ends)| f(e, ends[0], ends[1] - ends[0])).collect()
    }

    /// Rows that `fill` writes, sorted by expert, go to rows sorted by expert at the experts.
    fn there<T: Element + Float>(
        &self,
        device: &Device,
        width: usize,
        to: ViewMut<'_, T>,
        fill: impl FnOnce(ViewMut<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let Some(group) = &self.group else { return fill(to) };
        let mut leaving = Buffer::on(device, self.tokens.len() * width * size_of::<T>())?;
        fill(leaving.view_mut())?;
        let mut came = Buffer::on(device, self.rows * width * size_of::<T>())?;
        let [sent, got] = [&self.sent, &self.got].map(|rows| elements(rows, width));
        collectives::all_to_all_v(group, leaving.view::<T>(), &sent, came.view_mut(), &got)?;
        kernels::embedding(View::Cpu(&self.arrived[..]), came.view::<T>(), width, to)
    }

    /// Rows at the experts go back to where their tokens are, in the order in which they left.
    fn back(&self, rows: &Tensor) -> Result<Tensor> {
        let Some(group) = &self.group else { return Ok(rows.detach()) };
        let (scope, width) = (rows.scope(), rows.last_dim());
        let shape = [self.tokens.len(), width];
        produce(scope, &shape, rows.dtype(), rows.layout(), |came| {
            float!("combine", rows.dtype(), T => {
                let own = rows.lend::<T>()?;
                let mut leaving = scope.room::<T>(rows.len())?;
                let order = View::Cpu(&self.arrived[..]);
                kernels::scatter_rows(own.view::<T>(), order, width, leaving.view_mut())?;
                let [sent, got] = [&self.sent, &self.got].map(|rows| elements(rows, width));
                collectives::all_to_all_v(group, leaving.view::<T>(), &got, came.view_mut(), &sent)
            })
        })
    }
}

fn elements(rows: &[usize], width: usize) -> Vec<usize> {
    rows.iter().map(|n| n * width).collect()
}
