//! Few rows times a transposed matrix: both operands run along the depth, so nothing is packed
//! and every weight is read once per four rows. This is what decoding does.

use super::{Mat, Sink};
use crate::float::Float;
use crate::isa::simd;
use crate::threads::parallel_for;

/// Rows up to which reading the weights again costs less than packing them.
const ROWS: usize = 48;

/// Is this a product for this path?
pub(super) fn fits<T: Float>(a: &Mat<'_, T>, b: &Mat<'_, T>) -> bool {
    a.rows <= ROWS && a.col_stride == 1 && b.row_stride == 1 && a.cols >= 16
}

/// `a [m, k]` times the transpose of rows `[n, k]`.
pub(super) fn gemm<T: Float, O: Float, E: Float>(a: Mat<'_, T>, b: Mat<'_, T>, sink: &Sink<'_, O, E>) {
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
                    dots4::<T>([row(0), row(1), row(2), row(3)], b4, &mut sums);
                }
                for (r, sums) in sums.iter().enumerate().take(rows) {
                    sink.store_row(i + r, first, &sums[..columns]);
                }
            }
        }
    });
}

simd! {
    fn dots<T: Float>(a: &[T], b: [&[T]; 4], out: &mut [f32; 4]) {
        let n = a.len().min(b[0].len()).min(b[1].len()).min(b[2].len()).min(b[3].len());
        let whole = n / 16 * 16;
        let mut acc = [[0.0f32; 16]; 4];
        for k in (0..whole).step_by(16) {
            for (acc, b) in acc.iter_mut().zip(&b) {
                for l in 0..16 {
                    acc[l] = a[k + l].to_f32() * b[k + l].to_f32() + acc[l];
                }
            }
        }
        for (j, (acc, b)) in acc.iter().zip(&b).enumerate() {
            let rest: f32 = (whole..n).map(|k| a[k].to_f32() * b[k].to_f32()).sum();
            out[j] = acc.iter().sum::<f32>() + rest;
        }
    }
}

simd! {
    fn dots4<T: Float>(a: [&[T]; 4], b: [&[T]; 4], out: &mut [[f32; 4]; 4]) {
        let n = a.iter().chain(&b).map(|x| x.len()).min().unwrap_or(0);
        let whole = n / 16 * 16;
        let mut acc = [[[0.0f32; 16]; 4]; 4];
        for k in (0..whole).step_by(16) {
            for i in 0..4 {
                let x = &a[i][k..k + 16];
                for j in 0..4 {
                    let y = &b[j][k..k + 16];
                    for l in 0..16 {
                        acc[i][j][l] = x[l].to_f32() * y[l].to_f32() + acc[i][j][l];
                    }
                }
            }
        }
        for i in 0..4 {
            for j in 0..4 {
                let rest: f32 = (whole..n).map(|k| a[i][k].to_f32() * b[j][k].to_f32()).sum();
                out[i][j] = acc[i][j].iter().sum::<f32>() + rest;
            }
        }
    }
}
