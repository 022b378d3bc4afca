//! The kernels for AVX-512: `V` vectors of columns, of which a step takes one row each, or two of bf16.

use std::arch::x86_64::*;

use super::{APART, Columns, Tile};

/// Lanes of a vector of sums.
const LANES: usize = 16;

/// Adds sums of `M` rows to those that are there.
///
/// # Safety
/// AVX-512F; what [`Tile`] promises.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn finish<T, const M: usize, const V: usize>(tile: &Tile<T>, acc: &[[__m512; V]; M]) {
    // Sums of all columns have room, whether there are so many or not.
    for (m, acc) in acc.iter().enumerate() {
        for (v, acc) in acc.iter().enumerate() {
            // SAFETY: row `m` of the tile.
            unsafe {
                let at = tile.sums.add(m * tile.width + v * LANES);
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), *acc));
            }
        }
    }
}

/// `M` rows of f32.
///
/// # Safety
/// AVX-512F; what [`Tile`] promises, of f32.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile_f32<T, const M: usize, const V: usize, const C: u8>(tile: &Tile<T>) {
    let Tile { a, stride, k, columns, ahead, kept, .. } = *tile;
    let b = tile.b.cast::<f32>();
    let mut acc = [[_mm512_setzero_ps(); V]; M];
    let step = |i: usize, masks: [__mmask16; V], acc: &mut [[__m512; V]; M]| {
        let mut y = [_mm512_setzero_ps(); V];
        for (v, y) in y.iter_mut().enumerate() {
            let kept = kept.wrapping_add((i * V + v) * LANES);
            if C == Columns::KEPT {
                // SAFETY: step `i` of what an earlier tile has kept.
                *y = unsafe { _mm512_load_ps(kept) };
                continue;
            }
            let at = b.wrapping_add(i * stride + v * LANES);
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(ahead).cast());
            // SAFETY: masked to the columns of row `i`; room for step `i`.
            unsafe {
                *y = _mm512_maskz_loadu_ps(masks[v], at);
                if C == Columns::KEEP {
                    _mm512_store_ps(kept, *y);
                }
            }
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: step `i` of all rows of `a`.
            let x = unsafe { _mm512_set1_ps(*a.add(i * APART + m)) };
            for (acc, y) in acc.iter_mut().zip(y) {
                *acc = _mm512_fmadd_ps(x, y, *acc);
            }
        }
    };
    // With masks that are known to be full, loads are plain ones.
    match columns == V * LANES || C == Columns::KEPT {
        true => (0..k).for_each(|i| step(i, [u16::MAX; V], &mut acc)),
        false => {
            let lanes = |v: usize| columns.saturating_sub(v * LANES).min(LANES);
            let masks = std::array::from_fn(|v| ((1u32 << lanes(v)) - 1) as u16);
            (0..k).for_each(|i| step(i, masks, &mut acc));
        }
    }
    // SAFETY: by contract.
    unsafe { finish(tile, &acc) };
}

/// `M` rows of bf16, whose neighbours along the depth lie side by side.
///
/// # Safety
/// AVX-512 F, BW and BF16; what [`Tile`] promises, of bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn tile_bf16<T, const M: usize, const V: usize, const C: u8>(tile: &Tile<T>) {
    let Tile { a, stride, k, columns, ahead, kept, .. } = *tile;
    let b = tile.b.cast::<i16>();
    let mut acc = [[_mm512_setzero_ps(); V]; M];
    let step = |i: usize, masks: [__mmask32; V], odd: bool, acc: &mut [[__m512; V]; M]| {
        let mut y = [_mm512_setzero_si512(); V];
        for (v, y) in y.chunks_exact_mut(2).enumerate() {
            let kept = kept.wrapping_add((i / 2 * V + 2 * v) * LANES);
            if C == Columns::KEPT {
                // SAFETY: a step of what an earlier tile has kept.
                unsafe {
                    y[0] = _mm512_load_si512(kept.cast());
                    y[1] = _mm512_load_si512(kept.add(LANES).cast());
                }
                continue;
            }
            let at = b.wrapping_add(i * stride + v * 2 * LANES);
            let below = at.wrapping_add(stride);
            _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(ahead).cast());
            _mm_prefetch::<_MM_HINT_T1>(below.wrapping_add(ahead).cast());
            // SAFETY: masked to the columns of what rows there are; room for a step.
            unsafe {
                let low = _mm512_maskz_loadu_epi16(masks[v], at);
                let high = _mm512_maskz_loadu_epi16(if odd { 0 } else { masks[v] }, below);
                // Of each eight columns the first four, and the others.
                y[0] = _mm512_unpacklo_epi16(low, high);
                y[1] = _mm512_unpackhi_epi16(low, high);
                if C == Columns::KEEP {
                    _mm512_store_si512(kept.cast(), y[0]);
                    _mm512_store_si512(kept.add(LANES).cast(), y[1]);
                }
            }
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: a step of all rows of `a`.
            let x = unsafe { _mm512_set1_ps(*a.add(i / 2 * APART + m)) };
            for (acc, y) in acc.iter_mut().zip(y) {
                *acc = _mm512_dpbf16_ps(*acc, pair(_mm512_castps_si512(x)), pair(y));
            }
        }
    };
    let lanes = |v: usize| columns.saturating_sub(v * 2 * LANES).min(2 * LANES);
    let masks = std::array::from_fn(|v| ((1u64 << lanes(v)) - 1) as u32);
    match columns == V * LANES {
        true => (0..k / 2).for_each(|i| step(2 * i, [u32::MAX; V], false, &mut acc)),
        false => (0..k / 2).for_each(|i| step(2 * i, masks, false, &mut acc)),
    }
    if k % 2 > 0 {
        // Behind an odd last row there are zeros.
        step(k - 1, masks, true, &mut acc);
    }
    // Four columns of each in turn: the first half of them, and the second.
    let order = [0, 8].map(|x| {
        let (y, z) = (16 + x, 20 + x);
        let (low, high) = ([x, x + 1, x + 2, x + 3], [x + 4, x + 5, x + 6, x + 7]);
        _mm512_setr_epi32(
            low[0],
            low[1],
            low[2],
            low[3],
            y,
            y + 1,
            y + 2,
            y + 3,
            high[0],
            high[1],
            high[2],
            high[3],
            z,
            z + 1,
            z + 2,
            z + 3,
        )
    });
    for acc in &mut acc {
        for both in acc.chunks_exact_mut(2) {
            let [x, y] = [both[0], both[1]];
            both[0] = _mm512_permutex2var_ps(x, order[0], y);
            both[1] = _mm512_permutex2var_ps(x, order[1], y);
        }
    }
    // SAFETY: by contract.
    unsafe { finish(tile, &acc) };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(x) }
}
