//! The kernel for AVX2 and FMA: two vectors of columns at a time, multiplied as f32.

use std::arch::x86_64::*;

use super::{APART, Tile};
use crate::float::Float;

/// Columns at a time.
const AT_ONCE: usize = 16;

/// `M` rows.
///
/// # Safety
/// AVX2 and FMA; what [`Tile`] promises.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn tile<T: Float, const M: usize>(tile: &Tile<T>) {
    let Tile { a, b, stride, k, columns, ahead, sums, width, .. } = *tile;
    for first in (0..columns).step_by(AT_ONCE) {
        let left = (columns - first).min(AT_ONCE);
        let mut acc = [[_mm256_setzero_ps(); 2]; M];
        for i in 0..k {
            let row = b.wrapping_add(i * stride + first);
            _mm_prefetch::<_MM_HINT_T1>(row.wrapping_add(ahead).cast());
            // SAFETY: the columns of row `i`; step `i` of all rows of `a`.
            unsafe {
                let y = match left {
                    AT_ONCE => [wide(row), wide(row.add(8))],
                    _ => {
                        let mut room = [T::zeroed(); AT_ONCE];
                        std::ptr::copy_nonoverlapping(row, room.as_mut_ptr(), left);
                        [wide(room.as_ptr()), wide(room.as_ptr().add(8))]
                    }
                };
                for (m, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(i * APART + m));
                    acc[0] = _mm256_fmadd_ps(x, y[0], acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, y[1], acc[1]);
                }
            }
        }
        for (m, acc) in acc.into_iter().enumerate() {
            for (v, acc) in acc.into_iter().enumerate() {
                // SAFETY: row `m` of the tile, which has room for all columns.
                unsafe {
                    let at = sums.add(m * width + first + v * 8);
                    _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), acc));
                }
            }
        }
    }
}

/// Eight elements as f32.
///
/// # Safety
/// AVX2; so many elements.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn wide<T>(at: *const T) -> __m256 {
    // SAFETY: by contract.
    unsafe {
        match size_of::<T>() {
            4 => _mm256_loadu_ps(at.cast()),
            _ => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }
}
