//! Sums on their way into bf16, by the instruction that rounds sixteen of them.

use std::ops::Range;

use crate::float::Float;
use crate::isa::simd;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};

/// `y = scale x`, as long as `y` is.
pub(super) fn store<T: Float>(x: &[f32], scale: f32, y: &mut [T]) {
    let x = &x[..y.len()];
    #[cfg(target_arch = "x86_64")]
    if T::NAME == "bf16" && isa() == Isa::Avx512Bf16 {
        // SAFETY: isa() has found these instructions; both are equally long.
        return unsafe { x86::scaled(x, scale, bytemuck::cast_slice_mut(y)) };
    }
    simd! { fn plain<T: Float>(x: &[f32], scale: f32, y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(scale * x);
        }
    } }
    plain(x, scale, y);
}

/// Columns `seen`, by vectors of 16, of `rows` rows that lie `row` floats apart: `p` and `ds` become rows of
/// bf16 half as far apart, and `ds` pairs of neighbouring rows side by side as well, an odd last one beside
/// zeros.
pub(super) fn pair_up(
    [p, ds]: [&[f32]; 2],
    row: usize,
    rows: usize,
    seen: Range<usize>,
    [p16, ds16, pairs]: [&mut [f32]; 3],
) {
    let (all, whole) = (rows * row, rows.div_ceil(2) * row);
    assert!(seen.start.is_multiple_of(16) && seen.end.is_multiple_of(16) && seen.end <= row);
    assert!(row.is_multiple_of(2) && p.len() >= all && ds.len() >= all && pairs.len() >= whole);
    assert!(p16.len() >= all / 2 && ds16.len() >= all / 2);
    #[cfg(target_arch = "x86_64")]
    {
        assert_eq!(isa(), Isa::Avx512Bf16, "attention: pairs are for machines that multiply bf16");
        let [p16, ds16] = [p16, ds16].map(bytemuck::cast_slice_mut);
        // SAFETY: the instructions and all bounds by the assertions.
        unsafe { x86::pair_up([p, ds], row, rows, seen, [p16, ds16], pairs) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use half::bf16;

    /// # Safety
    /// AVX-512 BF16; both are equally long.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn scaled(x: &[f32], scale: f32, y: &mut [bf16]) {
        let scale = _mm512_set1_ps(scale);
        for at in (0..x.len()).step_by(16) {
            let lanes = (u32::MAX >> (32 - (x.len() - at).min(16))) as u16;
            // SAFETY: masked to the slices.
            unsafe {
                let x = _mm512_maskz_loadu_ps(lanes, x.as_ptr().add(at));
                let x = round(_mm512_mul_ps(x, scale));
                _mm256_mask_storeu_epi16(y.as_mut_ptr().add(at).cast(), lanes, x);
            }
        }
    }

    /// # Safety
    /// AVX-512 BF16; what [`pair_up`](super::pair_up) asserts.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn pair_up(
        from: [&[f32]; 2],
        row: usize,
        rows: usize,
        seen: Range<usize>,
        mut to: [&mut [bf16]; 2],
        pairs: &mut [f32],
    ) {
        for r in (0..rows).step_by(2) {
            for c in seen.clone().step_by(16) {
                let at = r * row + c;
                let mut two = [_mm256_setzero_si256(); 2];
                for (from, to) in from.iter().zip(&mut to) {
                    for (i, x) in two.iter_mut().enumerate().take(rows - r) {
                        // SAFETY: sixteen columns of row `r + i`, which exists.
                        unsafe {
                            *x = round(_mm512_loadu_ps(from.as_ptr().add(at + i * row)));
                            _mm256_storeu_si256(to.as_mut_ptr().add(at + i * row).cast(), *x);
                        }
                    }
                }
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(two[1]));
                let both = _mm512_or_si512(_mm512_cvtepu16_epi32(two[0]), high);
                // SAFETY: sixteen columns of the pair's row.
                unsafe {
                    _mm512_storeu_si512(pairs.as_mut_ptr().add(r / 2 * row + c).cast(), both)
                };
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn round(x: __m512) -> __m256i {
        // SAFETY: both are 256 bits without invalid values.
        unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) }
    }
}
