//! Adafactor and CAME. The sums of rows and columns come to the host, where statistics live and other
//! ranks' are added; nothing as large as the parameter does.

use super::launch::Plain;
use super::layerwise::totals;
use super::{Arg, Function, Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::factored::{Factors, Piece, Sum};
use crate::float::Float;
use crate::{Adafactor, Came};

pub(super) static FACTORED: Source = source!("factored");

/// Runs of a group, at most.
const GROUP: usize = 16;
/// Columns of a warp, and warps of a block.
const WIDE: usize = 128;
const WARPS: usize = 8;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct OnDevice {
    runs: u64,
    groups: u64,
    count: u32,
    cols: u32,
}

/// A piece whose runs are on the device.
struct Held<'a> {
    stream: &'a Stream,
    piece: &'a Piece,
    there: OnDevice,
    /// Of each matrix its first group, and the end.
    first: Slice<'a, u32>,
    groups: usize,
}

impl Held<'_> {
    fn with<R>(
        stream: &Stream,
        piece: &Piece,
        f: impl FnOnce(&Held<'_>) -> Result<R>,
    ) -> Result<R> {
        assert!(piece.len() <= u32::MAX as usize, "a piece of {} elements", piece.len());
        let [batch, _, cols] = piece.shape;
        // Runs in order of matrices; groups of up to GROUP of one matrix.
        let mut runs: Vec<[u32; 4]> =
            piece.runs.iter().map(|r| [r.at, r.len, r.row, r.col].map(|x| x as u32)).collect();
        let matrix = |run: &[u32; 4]| run[3] / cols.max(1) as u32;
        runs.sort_by_key(matrix);
        let (mut groups, mut first) = (Vec::<[u32; 3]>::new(), vec![0u32; batch + 1]);
        for (i, run) in runs.iter().enumerate() {
            let (i, matrix) = (i as u32, matrix(run));
            match groups.last_mut() {
                Some([from, to, of]) if *of == matrix && *to - *from < GROUP as u32 => *to += 1,
                _ => groups.push([i, i + 1, matrix]),
            }
            first[matrix as usize + 1] = groups.len() as u32;
        }
        // A matrix of which nothing is held has no groups.
        for i in 0..batch {
            first[i + 1] = first[i + 1].max(first[i]);
        }
        let all: Vec<u32> = [runs.as_flattened(), groups.as_flattened(), &first].concat();
        stream.with_scratch(all.len(), |mut scratch: SliceMut<'_, u32>| {
            stream.upload(&all, scratch.reborrow())?;
            let start = scratch.address();
            let there = OnDevice {
                runs: start,
                groups: start + 16 * runs.len() as u64,
                count: groups.len() as u32,
                cols: cols as u32,
            };
            let first = scratch.as_slice().range(all.len() - first.len()..all.len());
            f(&Held { stream, piece, there, first, groups: groups.len() })
        })
    }

    fn function(&self, name: &'static str) -> Result<Function> {
        self.stream.function(&FACTORED, &[("TYPE", f32::CUDA)], name)
    }

    fn grid(&self) -> Grid {
        let blocks = [self.groups.div_ceil(WARPS) as u32, self.parts() as u32, 1];
        Grid { blocks, threads: [32, WARPS as u32, 1], shared: 0 }
    }

    /// Parts of the longest row.
    fn parts(&self) -> usize {
        self.piece.shape[2].div_ceil(WIDE)
    }

    /// `kernel` on the piece, with `args` behind it.
    fn launch(&self, kernel: &'static str, args: &[&dyn Arg]) -> Result<()> {
        let piece = Plain(self.there);
        let all: Vec<&dyn Arg> =
            [&piece as &dyn Arg].into_iter().chain(args.iter().copied()).collect();
        self.function(kernel)?.launch(self.grid(), &all)
    }

    /// Sums by row, then by column, over all ranks: `kernel(piece, args.., by run, by column)`.
    fn sums(&self, kernel: &'static str, args: &[&dyn Arg], sum: Sum<'_>) -> Result<Vec<f64>> {
        let [batch, rows, cols] = self.piece.shape;
        let (rows, cols, runs) = (batch * rows, batch * cols, self.piece.runs.len());
        let mut of_runs = vec![0.0f64; runs + cols];
        let (by_run, by_column) = (runs * self.parts(), self.groups * self.piece.shape[2]);
        self.stream.with_scratch(of_runs.len(), |mut out: SliceMut<'_, f64>| {
            self.stream.with_scratch(by_run + by_column, |mut partials: SliceMut<'_, f32>| {
                let run_sums = partials.reborrow().range(0..by_run).address();
                let column_sums = partials.reborrow().range(by_run..by_run + by_column).address();
                let behind = [&run_sums as &dyn Arg, &column_sums];
                self.launch(kernel, &[args, &behind].concat())?;
                self.function("factored_runs")?.launch(
                    Grid::line(runs.div_ceil(256), 256),
                    args![
                        run_sums,
                        runs as u32,
                        self.parts() as u32,
                        out.reborrow().range(0..runs)
                    ],
                )?;
                self.function("factored_columns")?.launch(
                    Grid::line(cols.div_ceil(256), 256),
                    args![
                        column_sums,
                        self.first,
                        self.there.cols,
                        cols as u64,
                        out.reborrow().range(runs..runs + cols)
                    ],
                )
            })?;
            self.stream.download(out.as_slice(), &mut of_runs)
        })?;
        let mut sums = vec![0.0f64; rows + cols];
        sums[rows..].copy_from_slice(&of_runs[runs..]);
        // In the order in which the device has them: that of matrices.
        let mut order: Vec<_> = self.piece.runs.iter().collect();
        order.sort_by_key(|r| r.col / self.piece.shape[2].max(1));
        for (run, x) in order.into_iter().zip(&of_runs) {
            sums[run.row] += x;
        }
        sum(&mut sums);
        Ok(sums)
    }

    /// Sums of squares of directions and of parameters, over all ranks.
    fn norms(
        &self,
        grads: Slice<'_, f32>,
        params: Slice<'_, f32>,
        [rows, cols]: [Slice<'_, f32>; 2],
        scale: f32,
        sum: Sum<'_>,
    ) -> Result<[f64; 2]> {
        let warps = self.groups.div_ceil(WARPS) * WARPS * self.parts();
        totals(self.stream, warps, sum, |partials| {
            self.launch("factored_norms", args![grads, params, rows, cols, scale, partials])
        })
    }

    /// Lends factors on the device.
    fn with_factors<R>(
        &self,
        factors: &Factors,
        f: impl FnOnce([Slice<'_, f32>; 2]) -> Result<R>,
    ) -> Result<R> {
        let (rows, cols) = (factors.rows.len(), factors.cols.len());
        self.stream.with_scratch(rows + cols, |mut there: SliceMut<'_, f32>| {
            self.stream.upload(&factors.rows, there.reborrow().range(0..rows))?;
            self.stream.upload(&factors.cols, there.reborrow().range(rows..rows + cols))?;
            let there = there.as_slice();
            f([there.range(0..rows), there.range(rows..rows + cols)])
        })
    }
}

/// Step `t` (from 1) of [`Adafactor`]: the twin of [`Adafactor::step`].
pub fn adafactor(
    stream: &Stream,
    rule: &Adafactor,
    t: u32,
    piece: &Piece,
    params: SliceMut<'_, f32>,
    grads: Slice<'_, f32>,
    state: &mut Factors,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    check("adafactor", piece.len(), params.len());
    check("adafactor", piece.len(), grads.len());
    state.check("adafactor", piece);
    Held::with(stream, piece, |held| {
        let sums = held.sums("factored_squares", args![grads, grad_scale, rule.eps.0], sum)?;
        state.fold(piece, rule.beta(t), &sums);
        held.with_factors(&state.inverse_roots(piece), |[rows, cols]| {
            let norms = held.norms(grads, params.as_slice(), [rows, cols], grad_scale, sum)?;
            let [rate, decay] = rule.rates(piece, norms, grad_scale);
            held.launch("factored_descend", args![params, grads, rows, cols, rate, decay])
        })
    })
}

/// One step of [`Came`]: the twin of [`Came::step`].
pub fn came(
    stream: &Stream,
    rule: &Came,
    piece: &Piece,
    params: SliceMut<'_, f32>,
    grads: Slice<'_, f32>,
    mut m: SliceMut<'_, f32>,
    [second, disagreement]: [&mut Factors; 2],
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    for len in [params.len(), grads.len(), m.len()] {
        check("came", piece.len(), len);
    }
    second.check("came", piece);
    disagreement.check("came", piece);
    Held::with(stream, piece, |held| {
        let sums = held.sums("factored_squares", args![grads, grad_scale, rule.eps.0], sum)?;
        second.fold(piece, rule.betas.1, &sums);
        let sums = held.with_factors(&second.inverse_roots(piece), |[rows, cols]| {
            let norms = held.norms(grads, params.as_slice(), [rows, cols], grad_scale, sum)?;
            let (rate, beta) = (rule.rate(piece, norms, grad_scale), rule.betas.0 as f32);
            let args = args![grads, rows, cols, rate, beta, rule.eps.1, m.reborrow()];
            held.sums("factored_momentum", args, sum)
        })?;
        disagreement.fold(piece, rule.betas.2, &sums);
        let factors = match piece.is_vector() {
            true => piece.ones(),
            false => disagreement.inverse_roots(piece),
        };
        let decay = 1.0 - rule.lr * rule.weight_decay;
        held.with_factors(&factors, |[rows, cols]| {
            let m = m.as_slice();
            held.launch("factored_descend", args![params, m, rows, cols, rule.lr, decay])
        })
    })
}
