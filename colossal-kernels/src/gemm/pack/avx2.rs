//! Panels under AVX2, eight floats at a time: transposed where rows are contiguous, copied where they are
//! neighbours. Panels hold f32 whatever the operand's type, for there is no product of pairs.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Mat;
use crate::float::Float;
use crate::isa::{Isa, isa};

/// Is there code for panels so wide of such rows?
pub(super) fn fits<T: Float>(a: &Mat<'_, T>, width: usize) -> bool {
    isa() == Isa::Avx2
        && matches!(width, 6 | 16)
        && (a.row_stride == 1 || a.col_stride == 1)
        && matches!(T::NAME, "f32" | "bf16" | "f16")
        && is_x86_feature_detected!("f16c")
}

/// Packs these rows as panels that start `apart` floats from each other: step `k` of row `i` of panel `p` at
/// `out[p * apart + k * width + i]`, zeros for rows beyond the last.
pub(super) fn panels<T: Float>(
    a: Mat<'_, T>,
    rows: Range<usize>,
    width: usize,
    apart: usize,
    out: &mut [f32],
) {
    if rows.is_empty() || a.cols == 0 {
        return out.fill(0.0);
    }
    let (panels, size) = (rows.len().div_ceil(width), width * a.cols);
    assert!(fits(&a, width) && rows.end <= a.rows);
    assert!((a.rows - 1) * a.row_stride + (a.cols - 1) * a.col_stride < a.data.len());
    assert!(out.len() >= (panels - 1) * apart + size && (panels == 1 || apart >= size));
    let pack = match (width, a.col_stride) {
        (6, 1) => along::<T, 6>,
        (6, _) => across::<T, 6>,
        (_, 1) => along::<T, 16>,
        _ => across::<T, 16>,
    };
    // SAFETY: `fits` found the instructions; all in bounds by the assertions.
    unsafe {
        let from = a.data.as_ptr().add(rows.start * a.row_stride);
        let stride = if a.col_stride == 1 { a.row_stride } else { a.col_stride };
        pack(from, [rows.len(), a.cols, stride], apart, out.as_mut_ptr());
    }
}

/// Steps between what is copied and what is asked for: rows lie too far apart for the machine to foresee.
const SOON: usize = 16;

/// Of rows that are neighbours: one step of all panels is a run of memory, read once.
///
/// # Safety
/// AVX2 and F16C; rows of `depth` elements, steps `stride` apart, and room for their panels.
#[target_feature(enable = "avx2,f16c")]
unsafe fn across<T: Float, const W: usize>(
    data: *const T,
    [rows, depth, stride]: [usize; 3],
    apart: usize,
    out: *mut f32,
) {
    for k in 0..depth {
        for p in 0..rows.div_ceil(W) {
            for first in (0..W).step_by(8) {
                let at = data.wrapping_add(k * stride + p * W + first);
                _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(SOON * stride).cast());
                let lanes = (W - first).min(8);
                let there = rows.saturating_sub(p * W + first);
                // SAFETY: in bounds: what is not there is not read, and lanes beyond a panel's are not written in
                // the last step.
                unsafe {
                    let x = if there >= 8 { widen(at) } else { part(at, there) };
                    store(
                        out.add(p * apart + k * W + first),
                        x,
                        lanes,
                        lanes == 8 || k + 1 < depth,
                    );
                }
            }
        }
    }
}

/// Of contiguous rows: eight by eight are transposed.
///
/// # Safety
/// AVX2 and F16C; rows of `depth` elements `stride` apart, and room for their panels.
#[target_feature(enable = "avx2,f16c")]
unsafe fn along<T: Float, const W: usize>(
    data: *const T,
    [rows, depth, stride]: [usize; 3],
    apart: usize,
    out: *mut f32,
) {
    for p in 0..rows.div_ceil(W) {
        for k in (0..depth).step_by(8) {
            for first in (0..W).step_by(8) {
                let steps = (depth - k).min(8);
                let lanes = (W - first).min(8);
                let row = p * W + first;
                let mut r = [_mm256_setzero_ps(); 8];
                for (i, r) in r.iter_mut().enumerate().take(lanes) {
                    if row + i < rows {
                        let at = data.wrapping_add((row + i) * stride + k);
                        // SAFETY: eight elements of the row, or as many as are left.
                        *r = unsafe { if steps == 8 { widen(at) } else { part(at, steps) } };
                    }
                }
                for (l, x) in transpose(r).into_iter().enumerate().take(steps) {
                    let beyond = lanes == 8 || k + l + 1 < depth;
                    // SAFETY: lanes beyond a panel's are not written in the last step.
                    unsafe { store(out.add(p * apart + (k + l) * W + first), x, lanes, beyond) };
                }
            }
        }
    }
}

/// `count` elements as f32, less than eight, then zeros.
///
/// # Safety
/// AVX2 and F16C; as many elements.
#[cold]
#[target_feature(enable = "avx2,f16c")]
unsafe fn part<T: Float>(at: *const T, count: usize) -> __m256 {
    let mut part = [T::zeroed(); 8];
    // SAFETY: by contract.
    unsafe {
        std::ptr::copy_nonoverlapping(at, part.as_mut_ptr(), count);
        widen(part.as_ptr())
    }
}

/// # Safety
/// AVX2 and F16C; eight elements.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn widen<T: Float>(at: *const T) -> __m256 {
    // SAFETY: by contract.
    unsafe {
        match T::NAME {
            "f32" => _mm256_loadu_ps(at.cast()),
            "bf16" => {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
            _ => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
        }
    }
}

/// Stores the first `lanes`; those beyond may be lost if there is room `beyond`, where the next step writes
/// over them.
///
/// # Safety
/// AVX2; room for as many, or for eight.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(out: *mut f32, x: __m256, lanes: usize, beyond: bool) {
    // SAFETY: by contract.
    unsafe {
        match beyond {
            true => _mm256_storeu_ps(out, x),
            false => {
                let first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), first);
                _mm256_maskstore_ps(out, mask, x);
            }
        }
    }
}

/// Row `i` of what comes out holds lane `i` of what goes in.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
    let mut t = r;
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut q = t;
    for i in 0..2 {
        let t = &t[4 * i..];
        q[4 * i] = _mm256_shuffle_ps::<0x44>(t[0], t[2]);
        q[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[0], t[2]);
        q[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[1], t[3]);
        q[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[1], t[3]);
    }
    // q[c] holds lanes c and 4 + c of rows 0 .. 4, q[4 + c] those of rows 4 .. 8.
    for c in 0..4 {
        t[c] = _mm256_permute2f128_ps::<0x20>(q[c], q[4 + c]);
        t[4 + c] = _mm256_permute2f128_ps::<0x31>(q[c], q[4 + c]);
    }
    t
}
