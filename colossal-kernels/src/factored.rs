//! Optimizers whose second moment is factored into its rows and columns: Adafactor and CAME.
//!
//! A matrix of `rows x cols` squared gradients is kept as its row means and its column means, and
//! read back as their outer product over the mean of all: two vectors instead of a matrix. More
//! dims are a stack of matrices; a vector is kept whole.
//!
//! A rank may hold any runs of a parameter ([`Piece`]); statistics are whole on every rank. They
//! are summed by the caller's `sum` over the ranks that hold the rest: nothing else is exchanged.

use crate::elementwise::check;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::profile;
use crate::threads::{Parts, parallel_each};

/// Adafactor (Shazeer & Stern, 2018) without a first moment, as in transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adafactor {
    /// Learning rate.
    pub lr: f32,
    /// The second moment decays at step `t` by `1 - t^-decay_rate`; 0.8 in the paper.
    pub decay_rate: f32,
    /// Added to squared gradients; the least norm that `scale_parameter` sees.
    pub eps: (f32, f32),
    /// Updates are scaled down to this root mean square.
    pub clip: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Multiplies the learning rate by the root mean square of the parameter.
    pub scale_parameter: bool,
}

/// CAME (Luo et al., 2023): Adafactor's direction, its momentum divided by how far the two
/// disagree, also factored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Came {
    /// Learning rate.
    pub lr: f32,
    /// Decay rates of the momentum, of the second moment, and of the disagreement; in f64, for the
    /// last is so close to one that rounding it would show.
    pub betas: (f64, f64, f64),
    /// Added to squared gradients, and to squared disagreements.
    pub eps: (f32, f32),
    /// Directions are scaled down to this root mean square.
    pub clip: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// The row means and column means of a stack of matrices, whole: `batch x rows` and
/// `batch x cols` of them. Zero at first.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Factors {
    /// Means along the last dim.
    pub rows: Vec<f32>,
    /// Means along the last dim but one.
    pub cols: Vec<f32>,
}

/// Consecutive elements of one row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    /// Where they lie in the slice.
    pub(crate) at: usize,
    pub(crate) len: usize,
    /// Their row in [`Factors::rows`].
    pub(crate) row: usize,
    /// The first one's column in [`Factors::cols`].
    pub(crate) col: usize,
}

/// Which elements of a parameter a slice holds.
#[derive(Debug, Clone)]
pub struct Piece {
    /// `[batch, rows, cols]`; a vector is `[n, 1, 1]`.
    pub(crate) shape: [usize; 3],
    pub(crate) runs: Vec<Run>,
    len: usize,
}

/// Sums over the ranks that hold the rest of the parameter.
pub type Sum<'a> = &'a mut dyn FnMut(&mut [f64]);

impl Piece {
    /// A slice that holds all of a parameter of this shape, row-major.
    pub fn whole(shape: &[usize]) -> Piece {
        Piece::new(shape, [(0, shape.iter().product())])
    }

    /// A slice that holds these runs `(start, len)` of the whole parameter, one after another.
    pub fn new(shape: &[usize], held: impl IntoIterator<Item = (usize, usize)>) -> Piece {
        let [batch, rows, cols] = match shape {
            [] => [1, 1, 1],
            [n] => [*n, 1, 1],
            [batch @ .., rows, cols] => [batch.iter().product(), *rows, *cols],
        };
        let (mut runs, mut at) = (vec![], 0);
        for (mut start, len) in held {
            let end = start + len;
            assert!(end <= batch * rows * cols, "piece: a run ends beyond the parameter");
            while start < end {
                let (row, col) = (start / cols, start % cols);
                let len = (cols - col).min(end - start);
                runs.push(Run { at, len, row, col: row / rows * cols + col });
                (start, at) = (start + len, at + len);
            }
        }
        Piece { shape: [batch, rows, cols], runs, len: at }
    }

    /// How many elements the slice holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Does it hold nothing?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Statistics of the whole parameter before the first step.
    pub fn factors(&self) -> Factors {
        let [batch, rows, cols] = self.shape;
        Factors { rows: vec![0.0; batch * rows], cols: vec![0.0; batch * cols] }
    }

    pub(crate) fn ones(&self) -> Factors {
        let mut ones = self.factors();
        ones.rows.fill(1.0);
        ones.cols.fill(1.0);
        ones
    }

    /// Is the parameter a vector, whose statistics are exact?
    pub(crate) fn is_vector(&self) -> bool {
        self.shape[1..] == [1, 1]
    }

    fn elements(&self) -> f64 {
        self.shape.iter().product::<usize>() as f64
    }

    /// Runs `f` on blocks of runs, over the threads: the results in order. Blocks are the same on
    /// any number of threads; so are the bits.
    fn blocks<R: Copy + Default + Send>(&self, f: impl Fn(usize, &[Run]) -> R + Sync) -> Vec<R> {
        let blocks = self.block_count();
        let mut results = vec![R::default(); blocks];
        let parts = Parts::new(&mut results);
        parallel_each(blocks, |block| {
            let at = |block: usize| self.runs.len() * block / blocks;
            let result = f(block, &self.runs[at(block)..at(block + 1)]);
            // SAFETY: each block has its own result.
            let own = unsafe { parts.range(block..block + 1) };
            own[0] = result;
        });
        results
    }

    fn block_count(&self) -> usize {
        if self.len < 1 << 15 { 1 } else { 8.min(self.runs.len()) }
    }

    /// Two sums over all elements, `f` giving those of a run.
    fn totals(&self, f: impl Fn(&Run) -> [f32; 2] + Sync) -> [f64; 2] {
        let add = |t: [f64; 2], x: [f64; 2]| [t[0] + x[0], t[1] + x[1]];
        let of = |runs: &[Run]| runs.iter().map(|r| f(r).map(f64::from)).fold([0.0; 2], add);
        self.blocks(|_, runs| of(runs)).into_iter().fold([0.0; 2], add)
    }

    /// Sums of rows, then of columns: `f` gives a run's sum and adds its elements to its columns.
    fn sums(&self, f: impl Fn(&Run, &mut [f32]) -> f32 + Sync) -> Vec<f64> {
        let [batch, rows, cols] = self.shape;
        let (rows, cols) = (batch * rows, batch * cols);
        let mut sums = vec![0.0f64; rows + cols];
        let mut of_runs = vec![0.0f32; self.runs.len()];
        let run_parts = Parts::new(&mut of_runs);
        let blocks = self.block_count();
        with_workspace(blocks * cols, |space| {
            space.fill(0.0);
            let parts = Parts::new(&mut *space);
            self.blocks(|block, runs| {
                // SAFETY: each block has its own columns.
                let columns = unsafe { parts.range(block * cols..(block + 1) * cols) };
                let first = self.runs.len() * block / blocks;
                for (i, run) in runs.iter().enumerate() {
                    let sum = f(run, &mut columns[run.col..run.col + run.len]);
                    // SAFETY: each run belongs to one block.
                    let own = unsafe { run_parts.range(first + i..first + i + 1) };
                    own[0] = sum;
                }
            });
            for block in space.chunks(cols) {
                sums[rows..].iter_mut().zip(block).for_each(|(s, x)| *s += f64::from(*x));
            }
        });
        for (run, sum) in self.runs.iter().zip(of_runs) {
            sums[run.row] += f64::from(sum);
        }
        sums
    }
}

impl Run {
    fn range(&self) -> std::ops::Range<usize> {
        self.at..self.at + self.len
    }
}

impl Factors {
    /// `state = beta state + (1 - beta) mean`.
    pub(crate) fn fold(&mut self, piece: &Piece, beta: f64, sums: &[f64]) {
        let [_, rows, cols] = piece.shape;
        let (row_sums, col_sums) = sums.split_at(self.rows.len());
        let fold = |state: &mut [f32], sums: &[f64], count: usize| {
            for (state, sum) in state.iter_mut().zip(sums) {
                *state = (beta * f64::from(*state) + (1.0 - beta) * sum / count as f64) as f32;
            }
        };
        fold(&mut self.rows, row_sums, cols);
        fold(&mut self.cols, col_sums, rows);
    }

    /// The factors of `1 / sqrt(row col / mean)`, by row and by column.
    pub(crate) fn inverse_roots(&self, piece: &Piece) -> Factors {
        let mut rows = Vec::with_capacity(self.rows.len());
        for matrix in self.rows.chunks(piece.shape[1].max(1)) {
            let mean = matrix.iter().map(|x| f64::from(*x)).sum::<f64>() / matrix.len() as f64;
            rows.extend(matrix.iter().map(|x| (mean / f64::from(*x)).sqrt() as f32));
        }
        let cols = self.cols.iter().map(|x| (1.0 / f64::from(*x)).sqrt() as f32).collect();
        Factors { rows, cols }
    }

    pub(crate) fn check(&self, what: &str, piece: &Piece) {
        let [batch, rows, cols] = piece.shape;
        assert!(
            self.rows.len() == batch * rows && self.cols.len() == batch * cols,
            "{what}: {} row and {} column means do not belong to {:?}",
            self.rows.len(),
            self.cols.len(),
            piece.shape
        );
    }
}

simd! {
    /// The sum of `(scale g)^2 + eps`, also by column.
    fn squares(g: &[f32], scale: f32, eps: f32, cols: &mut [f32]) -> f32 {
        let mut lanes = [0.0f32; 16];
        let (g16, g_rest) = g.as_chunks::<16>();
        let (c16, c_rest) = cols.as_chunks_mut::<16>();
        for (g, c) in g16.iter().zip(c16) {
            for l in 0..16 {
                let x = (scale * g[l]) * (scale * g[l]) + eps;
                c[l] += x;
                lanes[l] += x;
            }
        }
        let mut rest = 0.0;
        for (g, c) in g_rest.iter().zip(c_rest) {
            let x = (scale * g) * (scale * g) + eps;
            *c += x;
            rest += x;
        }
        lanes.iter().sum::<f32>() + rest
    }
}

simd! {
    /// The sums of `(row g col)^2` and of `p^2`.
    fn norms(g: &[f32], p: &[f32], row: f32, cols: &[f32]) -> [f32; 2] {
        let mut lanes = [[0.0f32; 16]; 2];
        let mut add = |l: usize, g: f32, p: f32, c: f32| {
            let u = row * g * c;
            lanes[0][l] += u * u;
            lanes[1][l] += p * p;
        };
        let (g16, g_rest) = g.as_chunks::<16>();
        let (p16, p_rest) = p.as_chunks::<16>();
        let (c16, c_rest) = cols.as_chunks::<16>();
        for ((g, p), c) in g16.iter().zip(p16).zip(c16) {
            for l in 0..16 {
                add(l, g[l], p[l], c[l]);
            }
        }
        for ((g, p), c) in g_rest.iter().zip(p_rest).zip(c_rest) {
            add(0, *g, *p, *c);
        }
        lanes.map(|l| l.iter().sum())
    }
}

simd! {
    /// `p = decay p - row g col`.
    fn descend(p: &mut [f32], g: &[f32], row: f32, cols: &[f32], decay: f32) {
        for ((p, g), c) in p.iter_mut().zip(g).zip(cols) {
            *p = *p * decay - row * g * c;
        }
    }
}

simd! {
    /// `m = beta m + (1 - beta) u` of `u = row g col`; the sum of `(u - m)^2 + eps`, also by column.
    fn momentum(g: &[f32], row: f32, cols: &[f32], m: &mut [f32], f: [f32; 2], sums: &mut [f32]) -> f32 {
        let [beta, eps] = f;
        let mut total = 0.0;
        for (((g, c), m), s) in g.iter().zip(cols).zip(m).zip(sums) {
            let u = row * g * c;
            *m = beta * *m + (1.0 - beta) * u;
            let x = (u - *m) * (u - *m) + eps;
            *s += x;
            total += x;
        }
        total
    }
}

impl Adafactor {
    /// How the second moment decays at step `t`.
    pub(crate) fn beta(&self, t: u32) -> f64 {
        1.0 - f64::from(t.max(1)).powf(-f64::from(self.decay_rate))
    }

    /// The rate of the direction and the decay of the parameter, by the sums of their squares.
    pub(crate) fn rates(&self, piece: &Piece, totals: [f64; 2], grad_scale: f32) -> [f32; 2] {
        let [step, size] = totals.map(|t| (t / piece.elements()).sqrt());
        let scale = if self.scale_parameter { size.max(f64::from(self.eps.1)) } else { 1.0 };
        let lr = f64::from(self.lr) * scale;
        let decay = (1.0 - lr * f64::from(self.weight_decay)) as f32;
        [(lr / (step / f64::from(self.clip)).max(1.0)) as f32 * grad_scale, decay]
    }

    /// Step `t` (from 1) of the parts of a parameter that `piece` says, its gradient multiplied by
    /// `grad_scale`.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn step(
        &self,
        t: u32,
        piece: &Piece,
        params: &mut [f32],
        grads: &[f32],
        state: &mut Factors,
        grad_scale: f32,
        sum: Sum<'_>,
    ) {
        let _span = profile::moves::<f32>("adafactor", params.len(), 5);
        check("adafactor", piece.len(), params.len());
        check("adafactor", piece.len(), grads.len());
        state.check("adafactor", piece);
        let mut sums =
            piece.sums(|run, cols| squares(&grads[run.range()], grad_scale, self.eps.0, cols));
        sum(&mut sums);
        state.fold(piece, self.beta(t), &sums);
        let factors = state.inverse_roots(piece);
        let (rows, cols) = (&factors.rows, &factors.cols);
        let values = &*params;
        let mut totals = piece.totals(|run| {
            let (row, cols) = (grad_scale * rows[run.row], &cols[run.col..run.col + run.len]);
            norms(&grads[run.range()], &values[run.range()], row, cols)
        });
        sum(&mut totals);
        let [rate, decay] = self.rates(piece, totals, grad_scale);
        let p = Parts::new(params);
        piece.blocks(|_, runs| {
            for run in runs {
                let (row, cols) = (rate * rows[run.row], &cols[run.col..run.col + run.len]);
                // SAFETY: runs are disjoint.
                descend(unsafe { p.range(run.range()) }, &grads[run.range()], row, cols, decay);
            }
        });
    }
}

impl Came {
    /// What scales the direction down to [`Came::clip`], by the sum of its squares.
    pub(crate) fn rate(&self, piece: &Piece, totals: [f64; 2], grad_scale: f32) -> f32 {
        let step = (totals[0] / piece.elements()).sqrt();
        (1.0 / (step / f64::from(self.clip)).max(1.0)) as f32 * grad_scale
    }

    /// One step of the parts of a parameter that `piece` says, its gradient multiplied by
    /// `grad_scale`; `second` and `disagreement` are the two factored statistics.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn step(
        &self,
        piece: &Piece,
        params: &mut [f32],
        grads: &[f32],
        m: &mut [f32],
        [second, disagreement]: [&mut Factors; 2],
        grad_scale: f32,
        sum: Sum<'_>,
    ) {
        let _span = profile::moves::<f32>("came", params.len(), 9);
        for len in [params.len(), grads.len(), m.len()] {
            check("came", piece.len(), len);
        }
        second.check("came", piece);
        disagreement.check("came", piece);
        let mut sums =
            piece.sums(|run, cols| squares(&grads[run.range()], grad_scale, self.eps.0, cols));
        sum(&mut sums);
        second.fold(piece, self.betas.1, &sums);
        let factors = second.inverse_roots(piece);
        let (rows, cols) = (&factors.rows, &factors.cols);
        let values = &*params;
        let mut totals = piece.totals(|run| {
            let (row, cols) = (grad_scale * rows[run.row], &cols[run.col..run.col + run.len]);
            norms(&grads[run.range()], &values[run.range()], row, cols)
        });
        sum(&mut totals);
        let rate = self.rate(piece, totals, grad_scale);
        let moments = Parts::new(&mut *m);
        let f = [self.betas.0 as f32, self.eps.1];
        let mut sums = piece.sums(|run, sums| {
            let (row, cols) = (rate * rows[run.row], &cols[run.col..run.col + run.len]);
            // SAFETY: runs are disjoint.
            momentum(&grads[run.range()], row, cols, unsafe { moments.range(run.range()) }, f, sums)
        });
        sum(&mut sums);
        disagreement.fold(piece, self.betas.2, &sums);
        // A vector's momentum is taken as it is.
        let factors = match piece.is_vector() {
            true => piece.ones(),
            false => disagreement.inverse_roots(piece),
        };
        let (rows, cols) = (&factors.rows, &factors.cols);
        let decay = 1.0 - self.lr * self.weight_decay;
        let (p, m) = (Parts::new(params), &*m);
        piece.blocks(|_, runs| {
            for run in runs {
                let (row, cols) = (self.lr * rows[run.row], &cols[run.col..run.col + run.len]);
                // SAFETY: runs are disjoint.
                descend(unsafe { p.range(run.range()) }, &m[run.range()], row, cols, decay);
            }
        });
    }
}
