//! Products on a q×q grid, SUMMA (van de Geijn & Watts, 1997; Optimus, Xu et al., 2021): calls
//! `comm`.
//!
//! Rank (r, c) holds block (r, c) of everything: of activations rows r (batch) and columns c
//! (width). Nothing is gathered whole: in step l one block of each operand is broadcast, along the
//! rows or the columns of the grid, while the blocks of step l - 1 are multiplied. Two forms:
//!
//! | weight block of rank (r, c) | forward | used by |
//! | --- | --- | --- |
//! | input r, output c | `Y(r, c) = Σ X(r, l) W(l, c)` | linear layers |
//! | output r, input c | `Y(r, l) = Σ X(r, c) W(l, c)ᵀ`, summed at l | heads, tied to an embedding |
//!
//! Per product and rank, with x, w, y the elements of a block (`1/q²` of the whole): a block is
//! broadcast once from its place (x or w elements) and sums leave for q - 1 places.
//! First form: forward x + w; backward w + (q - 1) x for the input, x + (q - 1) w for the weight.
//! Second form: forward w + (q - 1) y; backward y + w for the input, y + (q - 1) w for the weight.

use colossal_comm::{Group, ReduceOp};

use crate::autograd::{Like, pretended, record};
use crate::collectives::{self, InFlight, broadcast_start};
use crate::device::Device;
use crate::dtype::{Element, float};
use crate::error::{Error, Result, comm};
use crate::kernels::{self, Mat};
use crate::ops::produce;
use crate::placement::Cut;
use crate::placement::Placement::Shard;
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// The axes of a grid on which `w` lies in blocks: rows and columns.
pub(crate) fn grid(w: &Tensor) -> Option<[usize; 2]> {
    let axis = |cut: Cut| {
        let scope = w.scope();
        scope.wide_axes().find(|a| scope.role(*a).is_some_and(|role| role.cut == cut))
    };
    let (row, col) = (axis(Cut::GridRow)?, axis(Cut::GridCol)?);
    let blocked = |a: usize| matches!(w.layout()[a], Shard(_));
    (blocked(row) && blocked(col)).then_some([row, col])
}

/// `x wᵀ` with both in blocks.
pub(crate) fn linear(x: &Tensor, w: &Tensor, [row, col]: [usize; 2]) -> Result<Tensor> {
    let last = x.shape().len() - 1;
    let second = w.layout()[row] == Shard(0);
    let rule = propagate::linear(last);
    let layout = propagate("linear", &[x, w], |p| match (second, p) {
        (false, [Shard(0), Shard(1)]) | (true, [Shard(0), Shard(0)]) => Some(Shard(0)),
        (false, [Shard(d), Shard(0)]) | (true, [Shard(d), Shard(1)]) if *d == last => {
            Some(Shard(last))
        }
        (_, p) => rule(p),
    })?;
    let (m, k, n) = (x.rows(), x.last_dim(), w.shape()[0]);
    let mut shape = x.shape().to_vec();
    shape[last] = n;
    if x.scope().is_fake() {
        let scope = x.scope();
        let y = Tensor::pretend(scope, &shape, x.dtype(), layout);
        let (size, others) = (x.dtype().bytes(), scope.axis(row).1 - 1);
        let (xb, wb, yb) = (m * k * size, n * k * size, m * n * size);
        let sums = others * n * k * size_of::<f32>();
        let input = usize::from(x.requires_grad());
        match second {
            false => {
                scope.sends("linear", row, wb, input * wb + sums);
                scope.sends("linear", col, xb, input * others * xb + xb);
            }
            true => {
                scope.sends("linear", row, wb, input * wb + sums);
                scope.sends("linear", col, others * yb, input * yb + yb);
            }
        }
        return Ok(pretended("linear", y, &[x, w], &[x]));
    }
    let grid = Grid::new(x, row, col)?;
    let y = produce(x.scope(), &shape, x.dtype(), layout, |y| {
        float!("linear", x.dtype(), T => {
            let (x, w) = (x.lend::<T>()?, w.lend::<T>()?);
            let (x, w) = (x.view::<T>(), w.view::<T>());
            if second {
                return grid.sum_along_rows(w, y.view_mut(), |w, part| {
                    kernels::gemm(Mat::new(x, m, k), Mat::new(w, n, k).t(), part, None, false)
                });
            }
            grid.outer(x, w, |l, x, w| {
                let y = y.view_mut::<T>();
                kernels::gemm(Mat::new(x, m, k), Mat::new(w, n, k).t(), y, None, l > 0)
            })
        })
    })?;
    let (x_saved, w_saved, like) = (x.detach(), w.detach(), Like::of(w));
    Ok(record("linear", y, &[x, w], move |dy, back| {
        let x = x_saved;
        if back.wants(0) {
            let layout = x.layout().dual();
            let dx = produce(x.scope(), x.shape(), x.dtype(), layout, |dx| {
                float!("linear", dy.dtype(), T => {
                    let (dy, w) = (dy.lend::<T>()?, w_saved.lend::<T>()?);
                    let (dy, w) = (dy.view::<T>(), w.view::<T>());
                    if second {
                        return grid.outer(dy, w, |l, dy, w| {
                            let dx = dx.view_mut::<T>();
                            kernels::gemm(Mat::new(dy, m, n), Mat::new(w, n, k), dx, None, l > 0)
                        });
                    }
                    grid.sum_along_rows(w, dx.view_mut(), |w, part| {
                        kernels::gemm(Mat::new(dy, m, n), Mat::new(w, n, k), part, None, false)
                    })
                })
            })?;
            back.give(0, dx)?;
        }
        if !back.wants(1) {
            return Ok(());
        }
        back.weight(1, &like, move |dw| {
            float!("linear", dy.dtype(), T => {
                let (dy, x) = (dy.lend::<T>()?, x.lend::<T>()?);
                let (dy, x) = (dy.view::<T>(), x.view::<T>());
                let product = |dy: View<'_, T>, x: View<'_, T>, part: ViewMut<'_, f32>| {
                    kernels::gemm(Mat::new(dy, m, n).t(), Mat::new(x, m, k), part, None, false)
                };
                // The operand that belongs to step l comes along the row; the sum goes up the
                // column, to the rank that holds the weight's block.
                if second {
                    grid.sum_along_columns(dy, dw, |dy, part| product(dy, x, part))
                } else {
                    grid.sum_along_columns(x, dw, |x, part| product(dy, x, part))
                }
            })
        })
    }))
}

/// The two groups of a rank of the grid.
struct Grid {
    /// Ranks of the same column: they differ in their row.
    column: Group,
    /// Ranks of the same row.
    row: Group,
    device: Device,
}

impl Grid {
    fn new(x: &Tensor, row: usize, col: usize) -> Result<Grid> {
        let scope = x.scope();
        let group = |axis: usize| -> Result<Group> {
            Ok(scope.mesh().group(&scope.axis(axis).0).map_err(comm)?.clone())
        };
        let device = scope.device().clone();
        let grid = Grid { column: group(row)?, row: group(col)?, device };
        if grid.column.world_size() != grid.row.world_size() {
            let text = "summa: the grid must be square; give its two axes one size";
            return Err(Error::Other(text.into()));
        }
        Ok(grid)
    }

    fn side(&self) -> usize {
        self.row.world_size()
    }

    /// In step l: block l of `a` along this row and block l of `b` along this column, the next
    /// ones on their way meanwhile.
    fn outer<T: Element>(
        &self,
        a: View<'_, T>,
        b: View<'_, T>,
        mut visit: impl FnMut(usize, View<'_, T>, View<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let start = |l: usize| -> Result<(InFlight<T>, InFlight<T>)> {
            Ok((self.start(&self.row, a, l)?, self.start(&self.column, b, l)?))
        };
        let mut coming = Some(start(0)?);
        for l in 0..self.side() {
            let Some((a, b)) = coming.take() else { break };
            let (a, b) = (a.wait()?, b.wait()?);
            if l + 1 < self.side() {
                coming = Some(start(l + 1)?);
            }
            visit(l, a.view(), b.view())?;
        }
        Ok(())
    }

    /// In step l: block l of `b` along this column, a product of it, summed along the row at l.
    fn sum_along_rows<T: Element>(
        &self,
        b: View<'_, T>,
        out: ViewMut<'_, T>,
        term: impl FnMut(View<'_, T>, ViewMut<'_, T>) -> Result<()>,
    ) -> Result<()> {
        self.sums((&self.column, b), &self.row, out, term, |sum, out| out.copy(sum))
    }

    /// In step l: block l of `a` along this row, a product of it, summed along the column at l
    /// and added to `out`.
    fn sum_along_columns<T: Element>(
        &self,
        a: View<'_, T>,
        out: ViewMut<'_, f32>,
        term: impl FnMut(View<'_, T>, ViewMut<'_, f32>) -> Result<()>,
    ) -> Result<()> {
        self.sums((&self.row, a), &self.column, out, term, kernels::add_assign)
    }

    fn sums<T: Element, U: Element>(
        &self,
        (from, own): (&Group, View<'_, T>),
        to: &Group,
        mut out: ViewMut<'_, U>,
        mut term: impl FnMut(View<'_, T>, ViewMut<'_, U>) -> Result<()>,
        keep: impl Fn(View<'_, U>, ViewMut<'_, U>) -> Result<()>,
    ) -> Result<()> {
        let mut part = Buffer::on(&self.device, out.len() * size_of::<U>())?;
        let mut coming = Some(self.start(from, own, 0)?);
        for l in 0..self.side() {
            let Some(block) = coming.take() else { break };
            let block = block.wait()?;
            if l + 1 < self.side() {
                coming = Some(self.start(from, own, l + 1)?);
            }
            term(block.view(), part.view_mut())?;
            collectives::reduce(to, part.view_mut::<U>(), ReduceOp::Sum, l)?;
            if to.rank() == l {
                keep(part.view(), out.reborrow())?;
            }
        }
        Ok(())
    }

    /// Sends block `root` to a group, of which `own` is this rank's.
    fn start<T: Element>(
        &self,
        group: &Group,
        own: View<'_, T>,
        root: usize,
    ) -> Result<InFlight<T>> {
        let block = match group.rank() == root {
            true => Buffer::copy_of(&self.device, own)?,
            false => Buffer::on(&self.device, own.len() * size_of::<T>())?,
        };
        broadcast_start(group, block, root)
    }
}

#[cfg(test)]
mod tests {
    use colossal_comm::{Mesh, Verb, on_ranks};

    use super::*;
    use crate::storage::{memory_stats, reset_peak};

    /// While a step multiplies, the next blocks are on their way, and no more than those.
    #[test]
    fn the_next_blocks_are_posted_before_a_step_multiplies() {
        let (q, len) = (3, 4096);
        on_ranks(q * q, |world| {
            let mesh = Mesh::new(&world, &[("row", q), ("col", q)]).unwrap();
            let group = |axis| mesh.group(axis).unwrap().clone();
            let device = Device::Cpu;
            let grid = Grid { column: group("row"), row: group("col"), device };
            let own = vec![world.rank() as f32; len];
            let sent = |group: &Group, verb| group.counters().calls_of(verb);
            let base = memory_stats().in_use;
            reset_peak();
            grid.outer(View::Cpu(&own[..]), View::Cpu(&own[..]), |l, _, _| {
                let posted = (l + 2).min(q) as u64;
                assert_eq!(sent(&grid.row, Verb::Broadcast), posted);
                assert_eq!(sent(&grid.column, Verb::Broadcast), posted);
                Ok(())
            })
            .unwrap();
            let block = len * size_of::<f32>();
            // Two blocks of each operand: this step's and the next one's.
            assert_eq!(memory_stats().peak - base, 2 * 2 * block);
            let before = sent(&grid.column, Verb::Broadcast);
            let (mut l, mut out) = (0, own.clone());
            reset_peak();
            let out = ViewMut::Cpu(&mut out[..]);
            grid.sum_along_rows(View::Cpu(&own[..]), out, |_, _| {
                assert_eq!(sent(&grid.column, Verb::Broadcast) - before, (l + 2).min(q) as u64);
                assert_eq!(sent(&grid.row, Verb::Reduce), l as u64);
                l += 1;
                Ok(())
            })
            .unwrap();
            // Two blocks and the sum of a step.
            assert_eq!(memory_stats().peak - base, 3 * block);
        });
    }
}
