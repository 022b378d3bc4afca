//! Tensor-parallel products that gather or scatter tokens while they compute: calls `comm`.
//!
//! Megatron's sequence parallelism gathers the tokens before a column-parallel product and
//! scatters the sums after a row-parallel one. Here the tokens of one rank at a time travel round
//! the ring while those that have come are multiplied (Wang et al., 2023). A column-parallel
//! product keeps its own tokens only and lets them travel again for the weight's gradient.
//!
//! Sent per rank, with n bytes of all tokens: forward `n (p - 1) / p`; backward twice that for a
//! column-parallel product, once for a row-parallel one.

use std::ops::Range;
use std::sync::Arc;

use colossal_comm::Group;
use colossal_kernels::Float;

use crate::autograd::{Like, pretended, record};
use crate::collectives::{InFlight, shift_start};
use crate::device::Device;
use crate::dtype::{Element, float};
use crate::error::{Error, Result, comm};
use crate::kernels::{self, Mat};
use crate::ops::produce;
use crate::placement::Placement::Shard;
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// Which side of the sub-layer a product is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Tokens are gathered, the output dim is cut.
    Column,
    /// The input dim is cut, sums are scattered over tokens.
    Row,
}

impl Kind {
    /// Does `x wᵀ` overlap along this axis?
    pub(crate) fn of(x: &Tensor, w: &Tensor, axis: usize) -> Option<Kind> {
        let last = x.shape().len() - 1;
        if last != 2 || !x.scope().role(axis).is_some_and(|role| role.overlaps()) {
            return None;
        }
        match (x.layout()[axis], w.layout()[axis]) {
            (Shard(1), Shard(0)) => Some(Kind::Column),
            (Shard(d), Shard(1)) if d == last => Some(Kind::Row),
            _ => None,
        }
    }
}

/// `x wᵀ` for `x [batch, tokens, in]`.
pub(crate) fn linear(x: &Tensor, w: &Tensor, axis: usize, kind: Kind) -> Result<Tensor> {
    let rule = propagate::linear(2);
    let op = "linear";
    let layout = propagate(op, &[x, w], |p| match (kind, p) {
        (Kind::Column, [Shard(1), Shard(0)]) => Some(Shard(2)),
        (Kind::Row, [Shard(2), Shard(1)]) => Some(Shard(1)),
        (_, p) => rule(p),
    })?;
    let (name, ranks) = x.scope().axis(axis);
    let [batch, tokens, k] = [0, 1, 2].map(|d| x.shape()[d]);
    let n = w.shape()[0];
    let (part, whole) = match kind {
        Kind::Column => (tokens, tokens * ranks),
        Kind::Row => (tokens / ranks, tokens),
    };
    if kind == Kind::Row && !tokens.is_multiple_of(ranks) {
        let what = "tokens of a sequence".into();
        return Err(Error::Divide { what, dim: 1, size: tokens, axis: name, ranks });
    }
    let shape = [batch, if kind == Kind::Column { whole } else { part }, n];
    if x.scope().is_fake() {
        let y = Tensor::pretend(x.scope(), &shape, x.dtype(), layout);
        let step = batch * part * x.dtype().bytes() * (ranks - 1);
        match kind {
            Kind::Column => x.scope().sends(op, axis, step * k, 2 * step * k),
            Kind::Row => x.scope().sends(op, axis, step * n, step * n),
        }
        return Ok(pretended(op, y, &[x, w], &[x]));
    }
    let walk = Walk {
        group: x.scope().mesh().group(&name).map_err(comm)?.clone(),
        batch,
        part,
        device: x.scope().device().clone(),
    };
    let y = produce(x.scope(), &shape, x.dtype(), layout, |y| {
        float!(op, x.dtype(), T => {
            let (x, w) = (x.lend::<T>()?, w.lend::<T>()?);
            let (x, w) = (x.view::<T>(), Mat::new(w.view::<T>(), n, k).t());
            match kind {
                Kind::Column => walk.gather(x, k, |b, own, x| {
                    let y = y.view_mut::<T>().range(walk.rows(b, own, n));
                    kernels::gemm(Mat::new(x, part, k), w, y, None, false)
                }),
                Kind::Row => walk.scatter(n, y, |b, own, y: ViewMut<'_, T>| {
                    let x = Mat::new(x.range(walk.rows(b, own, k)), part, k);
                    kernels::gemm(x, w, y, None, false)
                }),
            }
        })
    })?;
    let (x_saved, w_saved, like) = (x.detach(), w.detach(), Like::of(w));
    Ok(record(op, y, &[x, w], move |dy, back| {
        let (x, dtype) = (x_saved, dy.dtype());
        let layout = x.layout().dual();
        // What the weight's gradient needs of dy: all tokens.
        let all = match kind {
            Kind::Column => 0,
            Kind::Row => batch * whole * n * dtype.bytes(),
        };
        let mut gathered = Buffer::on(x.scope().device(), all)?;
        let dx = produce(x.scope(), x.shape(), dtype, layout, |dx| {
            float!(op, dtype, T => {
                let (dy, w) = (dy.lend::<T>()?, w_saved.lend::<T>()?);
                let (dy, w) = (dy.view::<T>(), Mat::new(w.view::<T>(), n, k));
                match kind {
                    Kind::Column => walk.scatter(k, dx, |b, own, dx: ViewMut<'_, T>| {
                        let dy = Mat::new(dy.range(walk.rows(b, own, n)), part, n);
                        kernels::gemm(dy, w, dx, None, false)
                    }),
                    Kind::Row => walk.gather(dy, n, |b, own, dy| {
                        gathered.view_mut::<T>().range(walk.rows(b, own, n)).copy(dy)?;
                        let dx = dx.view_mut::<T>().range(walk.rows(b, own, k));
                        kernels::gemm(Mat::new(dy, part, n), w, dx, None, false)
                    }),
                }
            })
        })?;
        back.give(0, dx)?;
        if !back.wants(1) {
            return Ok(());
        }
        back.weight(1, &like, move |mut dw| {
            float!(op, dtype, T => {
                let x = x.lend::<T>()?;
                let x = x.view::<T>();
                match kind {
                    Kind::Column => {
                        let dy = dy.lend::<T>()?;
                        let dy = dy.view::<T>();
                        walk.gather(x, k, |b, own, x| {
                            let dy = Mat::new(dy.range(walk.rows(b, own, n)), part, n).t();
                            kernels::gemm(dy, Mat::new(x, part, k), dw.reborrow(), None, true)
                        })
                    }
                    Kind::Row => {
                        let dy = Mat::new(gathered.view::<T>(), batch * whole, n).t();
                        kernels::gemm(dy, Mat::new(x, batch * whole, k), dw, None, true)
                    }
                }
            })
        })
    }))
}

/// Tokens of one rank at a time, round the ring.
struct Walk {
    group: Group,
    batch: usize,
    /// Tokens of a sequence on one rank.
    part: usize,
    device: Device,
}

impl Walk {
    /// Where the tokens of rank `own` lie in sequence `b` of a whole `[batch, tokens, width]`.
    fn rows(&self, b: usize, own: usize, width: usize) -> Range<usize> {
        let start = (b * self.group.world_size() + own) * self.part * width;
        start..start + self.part * width
    }

    /// Visits the tokens `[part, width]` of each sequence and rank, one's own first, while the
    /// next ones are on their way.
    fn gather<T: Element>(
        &self,
        own: View<'_, T>,
        width: usize,
        mut visit: impl FnMut(usize, usize, View<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let (n, me, run) = (self.group.world_size(), self.group.rank(), self.part * width);
        let mut here = Arc::new(Buffer::copy_of(&self.device, own)?);
        for step in 0..n {
            let next =
                (step + 1 < n).then(|| shift_start::<T>(&self.group, &here, 1)).transpose()?;
            let owner = (me + n - step) % n;
            for b in 0..self.batch {
                visit(b, owner, here.view().range(b * run..(b + 1) * run))?;
            }
            if let Some(next) = next {
                here = Arc::new(next.wait()?);
            }
        }
        Ok(())
    }

    /// Sums over ranks, of which each keeps its own tokens: `term` writes this rank's term for the
    /// tokens of one rank, while the sum so far is on its way.
    fn scatter<T: Element + Float>(
        &self,
        width: usize,
        own: &mut Buffer,
        mut write: impl FnMut(usize, usize, ViewMut<'_, T>) -> Result<()>,
    ) -> Result<()> {
        let (n, me, run) = (self.group.world_size(), self.group.rank(), self.part * width);
        let mut coming: Option<InFlight<T>> = None;
        for step in 0..n {
            // The sum for rank r starts at r + 1 and ends at r.
            let owner = (me + n - 1 - step) % n;
            let mut term = Buffer::on(&self.device, self.batch * run * size_of::<T>())?;
            for b in 0..self.batch {
                write(b, owner, term.view_mut().range(b * run..(b + 1) * run))?;
            }
            if let Some(coming) = coming.take() {
                kernels::add_assign(coming.wait()?.view::<T>(), term.view_mut())?;
            }
            if step + 1 < n {
                coming = Some(shift_start(&self.group, &Arc::new(term), 1)?);
            } else {
                *own = term;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use colossal_comm::{Mesh, on_ranks};

    use super::*;
    use crate::storage::{memory_stats, reset_peak};

    /// Nobody waits for a chunk before what is here has been multiplied.
    #[test]
    fn own_tokens_are_multiplied_before_those_of_others_have_come() {
        let multiplied = AtomicBool::new(false);
        on_ranks(2, |world| {
            let mesh = Mesh::new(&world, &[("tp", 2)]).unwrap();
            let walk = Walk {
                group: mesh.group("tp").unwrap().clone(),
                batch: 1,
                part: 4,
                device: Device::Cpu,
            };
            let start = Instant::now();
            while world.rank() == 1 && !multiplied.load(Ordering::SeqCst) {
                assert!(start.elapsed() < Duration::from_secs(5), "rank 0 waits for this one");
                std::thread::sleep(Duration::from_millis(1));
            }
            let mut owners = vec![];
            walk.gather(View::Cpu(&[world.rank() as f32; 4]), 1, |_, owner, rows| {
                multiplied.store(true, Ordering::SeqCst);
                let View::Cpu(rows) = rows else { unreachable!("on the host") };
                owners.push((owner, rows[0] as usize));
                Ok(())
            })
            .unwrap();
            let me = world.rank();
            assert_eq!(owners, [(me, me), (1 - me, 1 - me)]);
        });
    }

    /// While the tokens of one rank are multiplied, those of the next, or the sum so far, travel.
    #[test]
    fn the_next_chunk_is_posted_before_a_chunk_is_multiplied() {
        let (n, part, width) = (4, 256, 8);
        on_ranks(n, |world| {
            let mesh = Mesh::new(&world, &[("tp", n)]).unwrap();
            let group = mesh.group("tp").unwrap().clone();
            let walk = Walk { group: group.clone(), batch: 1, part, device: Device::Cpu };
            let own = vec![1.0f32; part * width];
            let chunk = own.len() * size_of::<f32>();
            let posted = || group.counters().calls() as usize;
            let (mut step, base) = (0, memory_stats().in_use);
            reset_peak();
            walk.gather(View::Cpu(&own[..]), width, |_, _, _| {
                assert_eq!(posted(), (step + 1).min(n - 1));
                step += 1;
                Ok(())
            })
            .unwrap();
            // What is here and what is coming.
            assert_eq!((step, memory_stats().peak - base), (n, 2 * chunk));
            let before = posted();
            let mut sum = Buffer::new::<f32>(own.len());
            let base = memory_stats().in_use;
            (step, _) = (0, reset_peak());
            walk.scatter(width, &mut sum, |_, _, term: ViewMut<'_, f32>| {
                assert_eq!(posted() - before, step);
                step += 1;
                kernels::fill(term, 1.0)
            })
            .unwrap();
            assert!(sum.as_slice::<f32>().iter().all(|x| *x == n as f32));
            // This chunk's term, and the sum that leaves beside the one that comes.
            assert_eq!((step, memory_stats().peak - base), (n, 3 * chunk));
        });
    }
}
