//! Few rows times a transposed matrix, in AVX-512 registers: f32, or bf16 through `vdpbf16ps`.
//!
//! A core gets the whole bandwidth of memory for one stream of addresses, and half of it where it reads
//! four rows of weights side by side. So weights are asked for in the order of addresses, well ahead,
//! into the second-level cache, and from there four rows at a time meet the rows of `a`.

use super::skinny::ROWS as MOST;
use super::{Mat, Sink, with_workspace};
use crate::float::Float;
use crate::isa::{Isa, isa};
use crate::threads::parallel_for;

/// Rows of a tile at most.
const ROWS: usize = 8;
/// Columns whose results are stored together.
const COLUMNS: usize = 48;
/// Columns that all rows meet before the next ones: whole blocks of three and of four.
const GROUP: usize = 12;
/// Vectors of `a` that stay in the first-level cache while a group passes by.
const PART: usize = 384;
/// Bytes that weights are asked for before up to four rows read them.
const AHEAD: usize = 32 << 10;
/// Bytes of a page, at whose end the processor ceases to read ahead by itself.
const PAGE: usize = 4096;
/// Floats of a vector; a step of depth is one vector of each operand.
const LANES: usize = 16;

/// Has this machine the instructions for `T`, and may they be used?
pub(super) fn fits<T: Float>() -> bool {
    match T::NAME {
        "f32" => isa() >= Isa::Avx512,
        "bf16" => isa() == Isa::Avx512Bf16,
        _ => false,
    }
}

/// `a [m, k]` times the transpose of rows `[n, k]`, where [`fits`] says so.
pub(super) fn gemm<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    sink: &Sink<'_, O, E>,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    let steps = k.div_ceil(lanes::<T>());
    let tiles = m.div_ceil(ROWS);
    let each = m.div_ceil(tiles);
    // A tile's part of `a` stays in the first-level cache while a group of columns passes by.
    let part = steps.div_ceil(steps.div_ceil((PART / each).max(1)));
    with_workspace(m * steps * LANES, |packed| {
        for (t, packed) in packed.chunks_mut(each * steps * LANES).enumerate() {
            pack(&a, t * each, packed.len() / (steps * LANES), bytemuck::cast_slice_mut(packed));
        }
        let packed = &*packed;
        let grain = (65536 / (m * k)).div_ceil(GROUP).max(1);
        parallel_for(n.div_ceil(GROUP), grain, |groups| {
            let columns = groups.start * GROUP..(groups.end * GROUP).min(n);
            let mut sums = Sums([0.0; MOST * COLUMNS]);
            for first in columns.clone().step_by(COLUMNS) {
                let count = COLUMNS.min(columns.end - first);
                for j in (0..count).step_by(GROUP) {
                    let group = Group { b: &b, first: first + j, count: GROUP.min(count - j) };
                    group.product(packed, each, part, &mut sums.0[j..]);
                }
                sink.store_tile([0, first], [m, count], &sums.0, COLUMNS);
            }
        });
    });
}

fn lanes<T>() -> usize {
    64 / size_of::<T>()
}

#[repr(align(64))]
struct Sums([f32; MOST * COLUMNS]);

/// Interleaves `rows` rows of `a` from `first` on: a vector of each, step after step.
fn pack<T: Float>(a: &Mat<'_, T>, first: usize, rows: usize, out: &mut [T]) {
    let lanes = lanes::<T>();
    for r in 0..rows {
        let row = &a.data[(first + r) * a.row_stride..][..a.cols];
        for (x, out) in row.chunks(lanes).zip(out.chunks_exact_mut(rows * lanes)) {
            let out = &mut out[r * lanes..(r + 1) * lanes];
            out[..x.len()].copy_from_slice(x);
            out[x.len()..].fill(T::zeroed());
        }
    }
}

/// Neighbouring columns of `b` that all rows meet before the next ones.
struct Group<'a, T> {
    b: &'a Mat<'a, T>,
    first: usize,
    count: usize,
}

impl<T: Float> Group<'_, T> {
    /// Products with `packed`, tiles of `each` rows, into `sums`, whose rows are [`COLUMNS`] long:
    /// so many steps of depth (`part`) after the other.
    fn product(&self, packed: &[f32], each: usize, part: usize, sums: &mut [f32]) {
        let Group { b, first, count } = *self;
        let steps = b.rows.div_ceil(lanes::<T>());
        let width = self.width(packed.len() / (steps * LANES));
        // While a group is multiplied the next one is asked for, in the order of addresses; or what
        // follows soon, where columns are read whole.
        let column = |j: usize| b.data.as_ptr().wrapping_add((first + j) * b.col_stride);
        let mut next = match each {
            1..5 if part >= steps => column(0).cast::<i8>().wrapping_add(AHEAD),
            _ => column(GROUP).cast(),
        };
        for at in (0..steps).step_by(part) {
            let len = part.min(steps - at);
            for (t, packed) in packed.chunks(each * steps * LANES).enumerate() {
                let rows = packed.len() / (steps * LANES);
                let packed = &packed[at * rows * LANES..(at + len) * rows * LANES];
                for j in (0..count).step_by(width) {
                    let columns = width.min(count - j);
                    let sums = &mut sums[t * each * COLUMNS + j..];
                    let stride = if t == 0 { 64 } else { 0 };
                    self.dots(packed, rows, at, j..j + columns, width, (next, stride), sums);
                    next = next.wrapping_add(stride * width * len);
                }
            }
        }
    }

    /// Columns that a kernel takes at once: one, read in the order of addresses; three where products
    /// take their time too; four for one row where each fills a page, so that several are read ahead.
    fn width(&self, rows: usize) -> usize {
        match rows {
            0 | 1 if self.b.rows * size_of::<T>() >= PAGE => 4,
            0..5 => 1,
            _ => 3,
        }
    }

    /// One tile: the packed `rows`, steps from `at` on, with these columns of the group.
    fn dots(
        &self,
        packed: &[f32],
        rows: usize,
        at: usize,
        columns: std::ops::Range<usize>,
        width: usize,
        next: (*const i8, usize),
        sums: &mut [f32],
    ) {
        let Group { b, first, .. } = *self;
        let (from, count) = (at * lanes::<T>(), columns.len());
        let len = (b.rows - from).min(packed.len() / (rows * LANES) * lanes::<T>());
        assert!(count > 0 && count <= width && sums.len() >= (rows - 1) * COLUMNS + count);
        assert!((first + columns.end - 1) * b.col_stride + from + len <= b.data.len());
        #[cfg(target_arch = "x86_64")]
        {
            // Beyond the end a column is read twice and stored once.
            let column =
                |j: usize| (first + columns.start + j.min(count - 1)) * b.col_stride + from;
            let columns: [*const T; 4] = std::array::from_fn(|j| b.data[column(j)..].as_ptr());
            let a = packed.as_ptr();
            let out = (sums.as_mut_ptr(), count, at > 0);
            macro_rules! call {
                ($kernel:ident: $($m:literal $s:literal),*) => {
                    match (rows, width) {
                        // SAFETY: `fits` was asked; packed holds `rows` rows of these steps,
                        // columns lead to `len` elements each, sums have room for the tile.
                        $(($m, $s) => unsafe {
                            let columns = columns.map(<*const T>::cast);
                            x86::$kernel::<$m, $s>(a.cast(), columns, len, next, out)
                        },)*
                        _ => unreachable!("no kernel of {rows} rows and {width} columns"),
                    }
                };
            }
            match size_of::<T>() {
                4 => call!(f32: 1 1, 1 4, 2 1, 3 1, 4 1, 3 3, 4 3, 5 3, 6 3, 7 3, 8 3),
                _ => call!(bf16: 1 1, 1 4, 2 1, 3 1, 4 1, 3 3, 4 3, 5 3, 6 3, 7 3, 8 3),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = next;
            unreachable!("`fits` says no on this architecture");
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::COLUMNS;

    macro_rules! kernel {
        ($name:ident, $element:ty, $features:literal, $lanes:literal, $mask:ty, $load:expr, $product:expr) => {
            /// `M` packed rows times `S` columns.
            ///
            /// # Safety
            /// The instructions; `a` holds `M` rows in whole steps, every column `k` elements;
            /// `out` has `M` rows of `count <= S`, `COLUMNS` apart.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<const M: usize, const S: usize>(
                a: *const $element,
                b: [*const $element; 4],
                k: usize,
                (next, stride): (*const i8, usize),
                (out, count, add): (*mut f32, usize, bool),
            ) {
                let mut acc = [[_mm512_setzero_ps(); S]; M];
                let step = |i: usize, mask: $mask, acc: &mut [[__m512; S]; M]| {
                    // SAFETY: masked to the column's end; a prefetch may point anywhere.
                    let y: [_; S] = std::array::from_fn(|s| unsafe {
                        let ahead = next.wrapping_add(stride * (i * S + s));
                        _mm_prefetch::<_MM_HINT_T1>(ahead);
                        $load(mask, b[s].add(i * $lanes))
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
                let whole = k / $lanes;
                (0..whole).for_each(|i| step(i, <$mask>::MAX, &mut acc));
                if k % $lanes > 0 {
                    step(whole, <$mask>::MAX >> ($lanes - k % $lanes), &mut acc);
                }
                let stored = (u8::MAX >> (8 - count)) as __mmask8;
                for m in 0..M {
                    let sum = |s: usize| if s < S { acc[m][s] } else { _mm512_setzero_ps() };
                    let four = four_sums([sum(0), sum(1), sum(2), sum(3)]);
                    // SAFETY: masked to `count`.
                    unsafe {
                        let out = out.add(m * COLUMNS);
                        let before = _mm_maskz_loadu_ps(if add { stored } else { 0 }, out);
                        _mm_mask_storeu_ps(out, stored, _mm_add_ps(before, four));
                    }
                }
            }
        };
    }

    kernel! {
        f32, f32, "avx512f,avx512vl", 16, u16, |mask, p| _mm512_maskz_loadu_ps(mask, p),
        |acc, x, y| _mm512_fmadd_ps(x, y, acc)
    }
    kernel! {
        bf16, i16, "avx512f,avx512vl,avx512bw,avx512bf16", 32, u32,
        |mask, p| _mm512_maskz_loadu_epi16(mask, p),
        |acc, x, y| _mm512_dpbf16_ps(acc, pair(x), pair(y))
    }

    /// The sums of the lanes of four vectors.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vl")]
    fn four_sums([a, b, c, d]: [__m512; 4]) -> __m128 {
        let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        let x = _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        let half = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), half);
        _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pair(x: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits without invalid values.
        unsafe { std::mem::transmute(x) }
    }
}
