//! Few rows times a matrix, which nothing is packed of: every weight is read once for all rows. This is what
//! decoding does, and what LoRA, the routers of experts and heads of one output do in training: a product of few
//! columns is the transpose of one of few rows.

use super::{Epilogue, Mat, Sink, with_workspace};
#[cfg(target_arch = "x86_64")]
use super::{few_rows, outer};
use crate::float::Float;
use crate::isa::simd;
use crate::threads::parallel_for;

/// Rows up to which reading the weights again costs less than packing them.
const ROWS: usize = 48;
/// Columns up to which plain code takes them for rows.
const DOTS: usize = 16;
/// Columns so many that they fill panels are as well packed.
const PANEL: usize = 32;
/// Depth from which on it is worth it.
const DEPTH: usize = 16;

/// Few rows `a [m, k]` and a matrix `b [k, n]`, of which one step of depth or one column is contiguous.
pub(super) struct Skinny<'a, T> {
    a: Mat<'a, T>,
    b: Mat<'a, T>,
    /// It is the transpose of the product that was asked for.
    flipped: bool,
}

impl<'a, T: Float> Skinny<'a, T> {
    /// The product of `a` and `b`, if it is for this path.
    pub(super) fn of(a: &Mat<'a, T>, b: &Mat<'a, T>) -> Option<Skinny<'a, T>> {
        if a.cols < DEPTH {
            return None;
        }
        #[cfg(target_arch = "x86_64")]
        let fits = few_rows::fits::<T>();
        #[cfg(not(target_arch = "x86_64"))]
        let fits = false;
        // Plain code takes dot products of what is contiguous.
        let dots = a.col_stride == 1 && b.row_stride == 1;
        let plain = Skinny { a: *a, b: *b, flipped: false };
        if a.rows <= ROWS && b.row_stride == 1 && (fits || dots) {
            return Some(plain);
        }
        #[cfg(target_arch = "x86_64")]
        if fits && a.rows <= outer::rows::<T>() && a.rows < b.cols && b.col_stride == 1 {
            return Some(plain);
        }
        let most = if fits { ROWS } else { DOTS };
        let few = b.cols <= most && !b.cols.is_multiple_of(PANEL) && b.cols < a.rows;
        let along = a.col_stride == 1 || a.row_stride == 1;
        (few && (fits && along || dots)).then(|| Skinny { a: b.t(), b: a.t(), flipped: true })
    }

    /// The product, to where `sink` says.
    pub(super) fn product<O: Float, E: Float>(self, sink: &Sink<'_, O, E>) {
        let Skinny { a, b, flipped } = self;
        let Epilogue { bias, gate, residual, .. } = &sink.epilogue;
        if flipped && a.rows == 1 && bias.is_none() && gate.is_none() && residual.is_none() {
            // One column is as well one row.
            let (row_stride, col_stride) = (sink.col_stride, sink.row_stride);
            let data = sink.data.part(0..sink.data.len());
            let sink = Sink { data, row_stride, col_stride, epilogue: sink.epilogue };
            return run(a, b, &Results { sink: &sink, rows: 1, flipped: false });
        }
        run(a, b, &Results { sink, rows: a.rows, flipped });
    }
}

fn run<T: Float, O: Float, E: Float>(a: Mat<'_, T>, b: Mat<'_, T>, results: &Results<'_, O, E>) {
    #[cfg(target_arch = "x86_64")]
    if few_rows::fits::<T>() {
        return match b.row_stride {
            1 => few_rows::gemm(a, b, results),
            _ => outer::gemm(a, b, results),
        };
    }
    dots_of_four(a, b, results);
}

/// Where results of few rows go.
pub(super) struct Results<'a, O, E> {
    sink: &'a Sink<'a, O, E>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "plain code stores parts"))]
    rows: usize,
    flipped: bool,
}

impl<O: Float, E: Float> Results<'_, O, E> {
    /// Stores `count` columns from `first` on of all rows, which lie `stride` apart.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn rows(&self, first: usize, count: usize, sums: &[f32], stride: usize) {
        self.part([0, first], [self.rows, count], sums, stride);
    }

    /// The same of columns that lie `stride` apart.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn columns(&self, first: usize, count: usize, sums: &[f32], stride: usize) {
        match self.flipped {
            true => self.sink.store_tile([first, 0], [count, self.rows], sums, stride),
            false => transposed([count, self.rows], sums, stride, |sums| {
                self.sink.store_tile([0, first], [self.rows, count], sums, count);
            }),
        }
    }

    /// Stores what begins at a row and column.
    fn part(&self, at: [usize; 2], size: [usize; 2], sums: &[f32], stride: usize) {
        match self.flipped {
            false => self.sink.store_tile(at, size, sums, stride),
            true => transposed(size, sums, stride, |sums| {
                self.sink.store_tile([at[1], at[0]], [size[1], size[0]], sums, size[0]);
            }),
        }
    }
}

/// Lends the transpose of `x [rows, columns]`, whose rows lie `stride` apart.
fn transposed(size: [usize; 2], x: &[f32], stride: usize, then: impl FnOnce(&[f32])) {
    with_workspace(size[0] * size[1], |room| {
        transpose(size, x, stride, room);
        then(room);
    });
}

simd! {
    /// `out [columns, rows]` of `x [rows, columns]`, whose rows lie `stride` apart.
    fn transpose(size: [usize; 2], x: &[f32], stride: usize, out: &mut [f32]) {
        let [rows, columns] = size;
        for (i, row) in x.chunks(stride).enumerate().take(rows) {
            for (out, x) in out.chunks_exact_mut(rows).zip(&row[..columns]) {
                out[i] = *x;
            }
        }
    }
}

/// `a [m, k]` times the transpose of rows `[n, k]`: four rows and four columns at a time.
fn dots_of_four<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    results: &Results<'_, O, E>,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let grain = (65536 / (m * k).max(1)).max(4).next_multiple_of(4);
    parallel_for(n.div_ceil(4), grain.div_ceil(4), |quads| {
        for quad in quads {
            let first = 4 * quad;
            let columns = 4.min(n - first);
            // Beyond the end a column is read twice and stored once.
            let column = |j: usize| {
                let at = (first + j.min(columns - 1)) * b.col_stride;
                &b.data[at..at + k]
            };
            let b4 = [column(0), column(1), column(2), column(3)];
            for i in (0..m).step_by(4) {
                let rows = 4.min(m - i);
                let row = |r: usize| {
                    let at = (i + r.min(rows - 1)) * a.row_stride;
                    &a.data[at..at + k]
                };
                let mut sums = [[0.0; 4]; 4];
                if rows == 1 {
                    dots::<T>(row(0), b4, &mut sums[0]);
                } else {
                    dots4::<T>(std::array::from_fn(row), b4, &mut sums);
                }
                results.part([i, first], [rows, columns], sums.as_flattened(), 4);
            }
        }
    });
}

simd! {
    fn dots<T: Float>(a: &[T], b: [&[T]; 4], out: &mut [f32; 4]) {
        let (a16, a_rest) = a.as_chunks::<16>();
        for (out, b) in out.iter_mut().zip(b) {
            let (b16, b_rest) = b.as_chunks::<16>();
            // Two sums in turn hide the latency of the additions.
            let mut acc = [[0.0f32; 16]; 2];
            for (k, (x, y)) in a16.iter().zip(b16).enumerate() {
                let acc = &mut acc[k % 2];
                for l in 0..16 {
                    acc[l] += x[l].to_f32() * y[l].to_f32();
                }
            }
            let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x.to_f32() * y.to_f32()).sum();
            *out = acc[0].iter().zip(&acc[1]).map(|(a, b)| a + b).sum::<f32>() + rest;
        }
    }
}

simd! {
    fn dots4<T: Float>(a: [&[T]; 4], b: [&[T]; 4], out: &mut [[f32; 4]; 4]) {
        let a16 = a.map(|x| x.as_chunks::<16>().0);
        let steps = a16[0].len().min(a16[1].len()).min(a16[2].len()).min(a16[3].len());
        for (j, b) in b.into_iter().enumerate() {
            let b16 = b.as_chunks::<16>().0;
            let (mut s0, mut s1, mut s2, mut s3) = ([0.0f32; 16], [0.0f32; 16], [0.0f32; 16], [0.0f32; 16]);
            for (k, y) in b16.iter().enumerate().take(steps) {
                let (x0, x1, x2, x3) = (&a16[0][k], &a16[1][k], &a16[2][k], &a16[3][k]);
                for l in 0..16 {
                    let y = y[l].to_f32();
                    s0[l] += x0[l].to_f32() * y;
                    s1[l] += x1[l].to_f32() * y;
                    s2[l] += x2[l].to_f32() * y;
                    s3[l] += x3[l].to_f32() * y;
                }
            }
            for (i, acc) in [s0, s1, s2, s3].iter().enumerate() {
                let rest: f32 = a[i][16 * steps..]
                    .iter()
                    .zip(&b[16 * steps..])
                    .map(|(x, y)| x.to_f32() * y.to_f32())
                    .sum();
                out[i][j] = acc.iter().sum::<f32>() + rest;
            }
        }
    }
}
