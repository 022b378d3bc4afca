//! Few rows times a transposed matrix: both operands run along the depth, so nothing is packed
//! and every weight is read once per four rows. This is what decoding does.

use super::{Mat, Sink};
use crate::float::Float;
use crate::isa::{Isa, isa, simd};
use crate::threads::parallel_for;

/// Rows up to which reading the weights again costs less than packing them.
const ROWS: usize = 48;

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
    let grain = (65536 / (m * k).max(1)).max(4).next_multiple_of(4);
    let vectors = match T::NAME {
        "f32" => isa() >= Isa::Avx512,
        "bf16" => isa() == Isa::Avx512Bf16,
        _ => false,
    };
    let step = if vectors { vectors::ROWS } else { 4 };
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
            for i in (0..m).step_by(step) {
                let rows = step.min(m - i);
                let row = |r: usize| {
                    let at = (i + r.min(rows - 1)) * a.row_stride;
                    &a.data[at..at + k]
                };
                let mut sums = [[0.0; 4]; vectors::ROWS];
                if vectors {
                    vectors::dots(rows, std::array::from_fn(row), b4, &mut sums);
                } else if rows == 1 {
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
    fn dots4<T: Float>(a: [&[T]; 4], b: [&[T]; 4], out: &mut [[f32; 4]; vectors::ROWS]) {
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

/// A tile of dot products in AVX-512 registers: f32, or bf16 through `vdpbf16ps`.
mod vectors {
    use crate::float::Float;

    /// Rows of a tile; its columns are four.
    pub(super) const ROWS: usize = 6;

    /// `out[r][j] = a[r] . b[j]` for the first `rows` rows. Only where the machine has AVX-512,
    /// for bf16 AVX-512 BF16, and `T` is one of these two.
    pub(super) fn dots<T: Float>(
        rows: usize,
        a: [&[T]; ROWS],
        b: [&[T]; 4],
        out: &mut [[f32; 4]; ROWS],
    ) {
        let k = a[0].len();
        assert!(a.iter().chain(&b).all(|x| x.len() == k));
        #[cfg(target_arch = "x86_64")]
        {
            let (a, b) = (a.map(<[T]>::as_ptr), b.map(<[T]>::as_ptr));
            macro_rules! call {
                ($kernel:ident) => {{
                    let (a, b) = (a.map(<*const T>::cast), b.map(<*const T>::cast));
                    // SAFETY: the caller has found the instructions; all rows hold `k` elements.
                    unsafe {
                        match rows {
                            1 => x86::$kernel::<1>(a, b, k, out),
                            2 => x86::$kernel::<2>(a, b, k, out),
                            3 | 4 => x86::$kernel::<4>(a, b, k, out),
                            _ => x86::$kernel::<6>(a, b, k, out),
                        }
                    }
                }};
            }
            match size_of::<T>() {
                4 => call!(f32),
                2 => call!(bf16),
                _ => unreachable!("elements of two or four bytes"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (rows, b, out);
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use std::arch::x86_64::*;

        use super::ROWS;

        macro_rules! kernel {
            ($name:ident, $element:ty, $features:literal, $lanes:literal, $mask:ty, $load:expr, $product:expr) => {
                /// # Safety
                /// The instructions; every pointer leads to `k` elements.
                #[target_feature(enable = $features)]
                pub(super) unsafe fn $name<const R: usize>(
                    a: [*const $element; ROWS],
                    b: [*const $element; 4],
                    k: usize,
                    out: &mut [[f32; 4]; ROWS],
                ) {
                    // Weights come from memory: they are asked for ahead, in a long row further
                    // on, in short ones at the same place of the next four.
                    let row = k * size_of::<$element>();
                    let ahead = if row < 4096 { 4 * row } else { 1024 };
                    let mut acc = [[_mm512_setzero_ps(); 4]; R];
                    let mut step = |at: usize, mask: $mask| {
                        // SAFETY: masked to the row's end; a prefetch may point anywhere.
                        let load = |p: *const $element| unsafe { $load(mask, p.add(at)) };
                        let y = b.map(|p| {
                            let next = p.wrapping_add(at).cast::<i8>().wrapping_add(ahead);
                            _mm_prefetch::<_MM_HINT_T0>(next);
                            load(p)
                        });
                        for (acc, a) in acc.iter_mut().zip(a) {
                            let x = load(a);
                            for (acc, y) in acc.iter_mut().zip(y) {
                                *acc = $product(*acc, x, y);
                            }
                        }
                    };
                    // With a mask that is known to be full, loads are plain ones.
                    (0..k / $lanes).for_each(|i| step(i * $lanes, <$mask>::MAX));
                    if k % $lanes > 0 {
                        step(k / $lanes * $lanes, <$mask>::MAX >> ($lanes - k % $lanes));
                    }
                    for (out, acc) in out.iter_mut().zip(acc) {
                        *out = acc.map(|x| _mm512_reduce_add_ps(x));
                    }
                }
            };
        }

        kernel! {
            f32, f32, "avx512f", 16, u16, |mask, p| _mm512_maskz_loadu_ps(mask, p),
            |acc, x, y| _mm512_fmadd_ps(x, y, acc)
        }
        kernel! {
            bf16, i16, "avx512f,avx512bw,avx512bf16", 32, u32,
            |mask, p| _mm512_maskz_loadu_epi16(mask, p),
            |acc, x, y| _mm512_dpbf16_ps(acc, pair(x), pair(y))
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn pair(x: __m512i) -> __m512bh {
            // SAFETY: both are 512 bits without invalid values.
            unsafe { std::mem::transmute(x) }
        }
    }
}
