//! The kernel for AVX2 and FMA: a step is sixteen elements of each row and column, multiplied as f32.

use std::arch::x86_64::*;

use super::{Ahead, GROUP, LANES};
use crate::float::Float;

/// `M` packed rows times `S` columns of f32 or bf16.
///
/// # Safety
/// AVX2 and FMA; `a` holds `M` rows of f32 in whole steps, every column `k` elements; `out` has `M` rows of
/// `count <= S`, `GROUP` apart.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile<T: Float, const M: usize, const S: usize>(
    a: *const f32,
    b: [*const T; S],
    k: usize,
    ahead: Ahead,
    (out, count, add): (*mut f32, usize, bool),
) {
    let mut acc = [[_mm256_setzero_ps(); S]; M];
    let whole = k / LANES;
    for i in 0..whole {
        for (s, near) in ahead.near.iter().enumerate().take(S) {
            let step = LANES * size_of::<T>();
            _mm_prefetch::<_MM_HINT_T1>(ahead.far.wrapping_add(ahead.stride * i + s * step));
            // One row or two with long columns are multiplied faster than it is worth asking twice.
            if M > 2 || S == 1 {
                _mm_prefetch::<_MM_HINT_T0>(near.wrapping_add(step * i));
            }
        }
        // SAFETY: a whole step of each.
        unsafe { step(&mut acc, a.add(i * M * LANES), b.map(|b| b.add(i * LANES))) };
    }
    if !k.is_multiple_of(LANES) {
        let mut last = [[T::zeroed(); LANES]; S];
        for (last, b) in last.iter_mut().zip(b) {
            let from = whole * LANES;
            // SAFETY: what is left of the column, less than a step.
            unsafe { std::ptr::copy_nonoverlapping(b.add(from), last.as_mut_ptr(), k - from) };
        }
        // SAFETY: a step of `a`, and one of each column that ends in zeros.
        unsafe { step(&mut acc, a.add(whole * M * LANES), last.each_ref().map(|x| x.as_ptr())) };
    }
    for (m, acc) in acc.iter().enumerate() {
        for (s, acc) in acc.iter().enumerate().take(count) {
            // SAFETY: `count` places of row `m`.
            unsafe {
                let out = out.add(m * GROUP + s);
                *out = sum(*acc) + if add { *out } else { 0.0 };
            }
        }
    }
}

/// # Safety
/// As of [`tile`]; a step of all rows and columns.
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
