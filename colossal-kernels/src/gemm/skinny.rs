//! Few rows times a transposed matrix: both operands run along the depth, so nothing is packed
//! and every weight is read once per four rows. This is what decoding does.

#[cfg(target_arch = "x86_64")]
use super::few_rows;
use super::{Mat, Sink};
use crate::float::Float;
use crate::isa::simd;
use crate::threads::parallel_for;

/// Rows up to which reading the weights again costs less than packing them.
pub(super) const ROWS: usize = 48;

/// Is this a product for this path?
pub(super) fn fits<T: Float>(a: &Mat<'_, T>, b: &Mat<'_, T>) -> bool {
    a.rows <= ROWS && a.col_stride == 1 && b.row_stride == 1 && a.cols >= 16
}

/// `a [m, k]` times the transpose of rows `[n, k]`.
pub(super) fn gemm<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    sink: &Sink<'_, O, E>,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    #[cfg(target_arch = "x86_64")]
    if few_rows::fits::<T>() {
        return few_rows::gemm(a, b, sink);
    }
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
                for (r, sums) in sums.iter().enumerate().take(rows) {
                    sink.store_row(i + r, first, &sums[..columns]);
                }
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
