//! The kernel for AVX2 and FMA: a step is sixteen elements of each row and column, multiplied as f32.

use std::arch::x86_64::*;

use super::{LANES, Pass};
use crate::float::Float;

/// All columns of a pass, a multiple of `S` of them, times its tiles of `M` rows.
///
/// # Safety
/// AVX2 and FMA; what a [`Pass`] of such tiles promises.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tiles<T: Float, const M: usize, const S: usize>(pass: &Pass<T>) {
    let Pass { apart, k, after, stride, .. } = *pass;
    let (mut b, mut far, mut sums) = (pass.b, pass.far, pass.sums);
    let whole = k / LANES;
    for left in (1..=pass.count / S).rev() {
        let next = if left > 1 { b.wrapping_add(S * apart) } else { after };
        let mut a = pass.a;
        for t in 0..pass.tiles {
            let mut acc = [[_mm256_setzero_ps(); S]; M];
            for i in 0..whole {
                for s in 0..S {
                    let line = LANES * size_of::<T>();
                    _mm_prefetch::<_MM_HINT_T1>(far.wrapping_add(stride * i + s * line));
                    // One row or two with long columns are multiplied faster than it is worth asking twice.
                    if M > 2 || S == 1 {
                        let near = next.wrapping_add(s * apart + i * LANES);
                        _mm_prefetch::<_MM_HINT_T0>(near.cast());
                    }
                }
                // SAFETY: a whole step of each.
                unsafe {
                    let columns = std::array::from_fn(|s| b.add(s * apart + i * LANES));
                    step(&mut acc, a.add(i * M * LANES), columns);
                }
            }
            if !k.is_multiple_of(LANES) {
                let mut last = [[T::zeroed(); LANES]; S];
                for (s, last) in last.iter_mut().enumerate() {
                    let from = whole * LANES;
                    // SAFETY: what is left of the column, less than a step.
                    unsafe {
                        let b = b.add(s * apart + from);
                        std::ptr::copy_nonoverlapping(b, last.as_mut_ptr(), k - from);
                    }
                }
                let columns = last.each_ref().map(|x| x.as_ptr());
                // SAFETY: a step of `a`, and one of each column that ends in zeros.
                unsafe { step(&mut acc, a.add(whole * M * LANES), columns) };
            }
            for (m, acc) in acc.iter().enumerate() {
                for (s, acc) in acc.iter().enumerate() {
                    // SAFETY: row `m` of this tile.
                    unsafe {
                        let out = sums.add(s * pass.rows + t * M + m);
                        *out = sum(*acc) + if pass.add { *out } else { 0.0 };
                    }
                }
            }
            a = a.wrapping_byte_add(pass.tile);
            far = far.wrapping_add(stride * k.div_ceil(LANES));
        }
        b = b.wrapping_add(S * apart);
        sums = sums.wrapping_add(S * pass.rows);
    }
}

/// # Safety
/// As of [`tiles`]; a step of all rows and columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step<T: Float, const M: usize, const S: usize>(
    acc: &mut [[__m256; S]; M],
    a: *const f32,
    b: [*const T; S],
) {
    for half in [0, 8] {
        // SAFETY: by contract.
        unsafe {
            let mut y = [_mm256_setzero_ps(); S];
            for (y, b) in y.iter_mut().zip(b) {
                let at = b.add(half);
                *y = match size_of::<T>() {
                    4 => _mm256_loadu_ps(at.cast()),
                    _ => {
                        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
                    }
                };
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_loadu_ps(a.add(m * LANES + half));
                for (acc, y) in acc.iter_mut().zip(y) {
                    *acc = _mm256_fmadd_ps(x, y, *acc);
                }
            }
        }
    }
}

/// The sum of all lanes.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn sum(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}
