//! The kernels for AVX-512: a step is a vector of each row and column.

use std::arch::x86_64::*;

use half::bf16;

use super::{GROUP, Pass};

/// Bytes between what is streamed and what is asked for.
const SOON: usize = 8192;
/// Bytes after which what is asked for into the second level is asked for again: of much that is on its way the
/// processor drops a part.
const AGAIN: usize = 32 << 10;

macro_rules! kernel {
    ($name:ident, $stream:ident, $element:ty, $features:literal, $lanes:literal, $mask:ty, $load:expr, $product:expr) => {
        /// `M` packed rows times `count` columns, `apart` elements from each other, one after the other; in
        /// `CHAINS` sums each.
        ///
        /// # Safety
        /// The instructions; `a` holds `M` rows in whole steps, every column `k` elements; `out` has `M` rows of
        /// `count`, `GROUP` apart.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $stream<const M: usize, const CHAINS: usize>(
            a: *const $element,
            b: *const $element,
            apart: usize,
            k: usize,
            (out, count): (*mut f32, usize),
        ) {
            let step = |b: *const $element, i: usize, mask: $mask, acc: &mut [__m512; M]| {
                let at = b.wrapping_add(i * $lanes);
                // SAFETY: masked to the column's end; a prefetch may point anywhere.
                let y = unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(SOON));
                    $load(mask, at)
                };
                for (m, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: step `i` of row `m`.
                    let x = unsafe { $load(<$mask>::MAX, a.add((i * M + m) * $lanes)) };
                    *acc = $product(*acc, x, y);
                }
            };
            let column = |b: *const $element| {
                let mut acc = [[_mm512_setzero_ps(); M]; CHAINS];
                let whole = k / $lanes;
                for i in 0..whole / CHAINS {
                    for (j, acc) in acc.iter_mut().enumerate() {
                        step(b, CHAINS * i + j, <$mask>::MAX, acc);
                    }
                }
                for i in whole / CHAINS * CHAINS..whole {
                    step(b, i, <$mask>::MAX, &mut acc[0]);
                }
                if k % $lanes > 0 {
                    step(b, whole, <$mask>::MAX >> ($lanes - k % $lanes), &mut acc[CHAINS - 1]);
                }
                let mut sums = acc[0];
                for acc in &acc[1..] {
                    sums.iter_mut().zip(acc).for_each(|(sum, x)| *sum = _mm512_add_ps(*sum, *x));
                }
                sums
            };
            for first in (0..count).step_by(4) {
                let left = (count - first).min(4);
                let mut sums = [[_mm512_setzero_ps(); M]; 4];
                for (j, sums) in sums.iter_mut().enumerate().take(left) {
                    *sums = column(b.wrapping_add((first + j) * apart));
                }
                for m in 0..M {
                    let four = four_sums([sums[0][m], sums[1][m], sums[2][m], sums[3][m]]);
                    // SAFETY: masked to what is left of `count`.
                    unsafe {
                        let out = out.add(m * GROUP + first);
                        _mm_mask_storeu_ps(out, (1 << left) - 1, four);
                    }
                }
            }
        }

        /// All columns of a pass, a multiple of `S` of them, times its tiles of `M` rows.
        ///
        /// # Safety
        /// The instructions; what a [`Pass`] of such tiles promises.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name<T, const M: usize, const S: usize>(pass: &Pass<T>) {
            let (apart, after) = (pass.apart, pass.after.cast::<$element>());
            let (mut b, mut far, mut sums) = (pass.b.cast::<$element>(), pass.far, pass.sums);
            for left in (1..=pass.count / S).rev() {
                let next = if left > 1 { b.wrapping_add(S * apart) } else { after };
                let mut a = pass.a.cast::<$element>();
                for t in 0..pass.tiles {
                    let mut acc = [[_mm512_setzero_ps(); S]; M];
                    let step = |i: usize, mask: $mask, acc: &mut [[__m512; S]; M]| {
                        // SAFETY: masked to the column's end; a prefetch may point anywhere.
                        let y: [_; S] = std::array::from_fn(|s| unsafe {
                            let at = i * $lanes + s * apart;
                            // Several tiles ask for two lines a step at most, which leaves the third to ask again.
                            let line = far.wrapping_add(pass.stride * i + s * 64);
                            let again = far.wrapping_add(pass.stride * i).wrapping_sub(AGAIN);
                            _mm_prefetch::<_MM_HINT_T1>(if s == 2 { again } else { line });
                            if S == 1 {
                                _mm_prefetch::<_MM_HINT_T1>(again);
                            }
                            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(at).cast());
                            $load(mask, b.add(at))
                        });
                        for (m, acc) in acc.iter_mut().enumerate() {
                            // SAFETY: step `i` of row `m`.
                            let x = unsafe { $load(<$mask>::MAX, a.add((i * M + m) * $lanes)) };
                            for (acc, y) in acc.iter_mut().zip(y) {
                                *acc = $product(*acc, x, y);
                            }
                        }
                    };
                    // With a mask that is known to be full, loads are plain ones.
                    let whole = pass.k / $lanes;
                    (0..whole).for_each(|i| step(i, <$mask>::MAX, &mut acc));
                    if pass.k % $lanes > 0 {
                        step(whole, <$mask>::MAX >> ($lanes - pass.k % $lanes), &mut acc);
                    }
                    for s in 0..S {
                        let column: [__m512; M] = std::array::from_fn(|m| acc[m][s]);
                        let rows = ((1u16 << M) - 1) as __mmask8;
                        // SAFETY: masked to the `M` rows of this tile.
                        unsafe {
                            let out = sums.add(s * pass.rows + t * M);
                            let before =
                                _mm256_maskz_loadu_ps(if pass.add { rows } else { 0 }, out);
                            let sums = _mm256_add_ps(before, row_sums(&column));
                            _mm256_mask_storeu_ps(out, rows, sums);
                        }
                    }
                    a = a.wrapping_byte_add(pass.tile);
                    far = far.wrapping_add(pass.stride * pass.k.div_ceil($lanes));
                }
                b = b.wrapping_add(S * apart);
                sums = sums.wrapping_add(S * pass.rows);
            }
        }
    };
}

kernel! {
    tiles_f32, stream_f32, f32, "avx512f,avx512vl", 16, u16, |mask, p| _mm512_maskz_loadu_ps(mask, p),
    |acc, x, y| _mm512_fmadd_ps(x, y, acc)
}
kernel! {
    tiles_bf16, stream_bf16, bf16, "avx512f,avx512vl,avx512bw,avx512bf16", 32, u32,
    |mask, p: *const bf16| _mm512_maskz_loadu_epi16(mask, p.cast()),
    |acc, x, y| _mm512_dpbf16_ps(acc, pair(x), pair(y))
}

/// The sums of the lanes of each of up to eight vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn row_sums(x: &[__m512]) -> __m256 {
    let of = |i: usize| x.get(i).copied().unwrap_or_else(|| _mm512_setzero_ps());
    let low = [of(0), of(1), of(2), of(3)];
    if x.len() <= 4 {
        return _mm256_castps128_ps256(four_sums(low));
    }
    // Lanes of 128 bits: what one half holds of both, then the other.
    let halves = |x, y| {
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(x, y);
        _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(x, y))
    };
    let x = halves(four_lanes(low), four_lanes([of(4), of(5), of(6), of(7)]));
    _mm512_castps512_ps256(halves(x, x))
}

/// The sums of the lanes of four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn four_sums(x: [__m512; 4]) -> __m128 {
    let x = four_lanes(x);
    let half = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
    let x = _mm256_add_ps(_mm512_castps512_ps256(x), half);
    _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
}

/// The sums of four vectors' lanes at the same place of 128 bits: of all four in each 128 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn four_lanes([a, b, c, d]: [__m512; 4]) -> __m512 {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pair(x: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(x) }
}
