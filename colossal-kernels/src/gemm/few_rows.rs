//! Few rows times a transposed matrix, in registers: f32 or bf16, which AVX-512 multiplies by `vdpbf16ps` and
//! AVX2 as f32.
//!
//! Weights come from memory while those before them are multiplied: in the order of addresses, which
//! memory is fastest in, a group of columns is asked into the second-level cache while the group before
//! it is multiplied. Of what is asked into the first level the processor drops a part when too much is on
//! its way there, be it from the second level: so `a` is cut along the depth into parts that stay in the
//! first level while a group passes by, and only the next columns are asked for from there. Of up to
//! 16 rows two tiles meet the same columns in turn, which the second finds in the first level.
//! One row or two are no more than reading, nor are three or four whose `a` leaves room in the first
//! level: under AVX-512 they take columns whole, in the order of addresses.

mod avx2;

use super::{Mat, Sink, with_workspace};
use crate::float::Float;
use crate::isa::{Isa, isa};
use crate::threads::{count, parallel_each};

/// Rows of a tile at most …
const ROWS: usize = 8;
/// … and with AVX2, which has half of the registers.
const ROWS_AVX2: usize = 4;
/// Vectors of `a` of three or four rows beside which the first-level cache has room for columns as they come.
const STREAM: usize = 256;
/// Columns of a tile at most.
const WIDTH: usize = 6;
/// Bytes of columns that threads take at a time, about.
const PIECE: usize = 512 << 10;
/// Columns of a group at most.
const GROUP: usize = 48;
/// Bytes of a group's columns, about: it and the next share the second-level cache with `a`.
const PASSING: usize = 192 << 10;
/// Bytes of a column from which on AVX2 takes several columns for one row or two: the processor foresees
/// where a long one goes on.
const SHORT: usize = 2048;
/// Vectors of `a` that stay in the first-level cache.
const PART: usize = 384;
/// Floats of a vector; a step of depth is one vector of each operand.
const LANES: usize = 16;

/// Has this machine the instructions for `T`, and may they be used?
pub(super) fn fits<T: Float>() -> bool {
    match T::NAME {
        "f32" => isa() >= Isa::Avx2,
        "bf16" => matches!(isa(), Isa::Avx2 | Isa::Avx512Bf16),
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
    let apart = (b.col_stride * size_of::<T>()).max(1);
    let plan = Plan::new(m, steps, apart);
    let each = plan.each;
    with_workspace(m * steps * LANES, |packed| {
        for (t, packed) in packed.chunks_mut(each * steps * LANES).enumerate() {
            let rows = packed.len() / (steps * LANES);
            match size_of::<T>() * lanes::<T>() == size_of::<[f32; LANES]>() {
                true => pack(&a, t * each, rows, bytemuck::cast_slice_mut::<_, T>(packed), |x| x),
                false => pack(&a, t * each, rows, packed, T::to_f32),
            }
        }
        let packed = &*packed;
        // Small enough that threads finish together, large enough to be worth handing out.
        let (even, worth) = (n.div_ceil(4 * count()), 65536 / (m * k));
        let piece = (PIECE / apart).min(even).max(worth).next_multiple_of(plan.group.min(12));
        parallel_each(n.div_ceil(piece), |i| {
            let columns = i * piece..((i + 1) * piece).min(n);
            with_workspace(m * GROUP, |sums| {
                for first in columns.clone().step_by(plan.group) {
                    let count = plan.group.min(columns.end - first);
                    Group { b: &b, first, count }.product(packed, &plan, sums);
                    sink.store_tile([0, first], [m, count], sums, GROUP);
                }
            });
        });
    });
}

/// How a product is cut.
struct Plan {
    /// Rows.
    m: usize,
    /// Rows of a tile, but for the last one.
    each: usize,
    /// Tiles.
    tiles: usize,
    /// Tiles whose parts of `a` are in the first-level cache together.
    near: usize,
    /// Steps of depth of a part.
    part: usize,
    /// Columns of a tile.
    width: usize,
    /// Columns that pass by a part, and whose results are stored together.
    group: usize,
    /// Columns are taken whole, in the order of addresses: there is little to do beside reading.
    whole: bool,
}

impl Plan {
    /// Of `m` rows, so many steps deep; columns of `b` lie `apart` bytes from each other.
    fn new(m: usize, steps: usize, apart: usize) -> Plan {
        let avx2 = isa() == Isa::Avx2;
        let tiles = m.div_ceil(if avx2 { ROWS_AVX2 } else { ROWS });
        let each = m.div_ceil(tiles);
        // More rows wait for multiplications, and longer parts are fewer.
        let near = if m <= 16 { tiles.min(2) } else { 1 };
        // Rows of one tile wait for memory, which gives columns fastest one after the other.
        let (part, width) = match m {
            3.. if avx2 => (PART / (near * each), 3),
            1 | 2 if apart >= SHORT => (PART / m, 6),
            1..5 => (PART / 2 / m, 1),
            5..=ROWS => (PART * 3 / 4 / m, 1),
            _ => (PART / (near * each), 3),
        };
        // Parts of about the same size.
        let part = steps.div_ceil(steps.div_ceil(part));
        let group = (PASSING / apart).clamp(width, GROUP) / width * width;
        let whole = !avx2 && (m <= 2 || m <= 4 && m * steps <= STREAM);
        Plan { m, each, tiles, near, part, width, group, whole }
    }
}

/// Elements of a step: a line of them, but for AVX2 as many as are a line of f32.
fn lanes<T>() -> usize {
    if isa() == Isa::Avx2 { LANES } else { 64 / size_of::<T>() }
}

/// Interleaves `rows` rows of `a` from `first` on: a vector of each, step after step.
fn pack<T: Float, P: Float>(
    a: &Mat<'_, T>,
    first: usize,
    rows: usize,
    out: &mut [P],
    to: impl Fn(T) -> P,
) {
    let lanes = lanes::<T>();
    for r in 0..rows {
        let row = &a.data[(first + r) * a.row_stride..][..a.cols];
        for (x, out) in row.chunks(lanes).zip(out.chunks_exact_mut(rows * lanes)) {
            let out = &mut out[r * lanes..(r + 1) * lanes];
            out.iter_mut().zip(x).for_each(|(out, x)| *out = to(*x));
            out[x.len()..].fill(P::zeroed());
        }
    }
}

/// What a tile asks for while it is multiplied: addresses of any kind.
#[derive(Clone, Copy)]
struct Ahead {
    /// The same part of the next columns, into the first level.
    near: [*const i8; WIDTH],
    /// A part of the next group, into the second level.
    far: *const i8,
    /// Bytes of it a step.
    stride: usize,
}

/// Neighbouring columns of `b` that all rows meet before the next ones.
struct Group<'a, T> {
    b: &'a Mat<'a, T>,
    first: usize,
    count: usize,
}

impl<T: Float> Group<'_, T> {
    /// Products with `packed` into `sums`, whose rows are [`GROUP`] long: for so many rows as stay in the
    /// first level, a part of the depth after the other, in which a few columns meet all tiles before the next
    /// ones do.
    fn product(&self, packed: &[f32], plan: &Plan, sums: &mut [f32]) {
        if plan.whole {
            return self.stream(packed, plan.m, sums);
        }
        let Plan { m, each, tiles, near, width, part, group, .. } = *plan;
        let steps = self.b.rows.div_ceil(lanes::<T>());
        let apart = self.b.col_stride * size_of::<T>();
        // All tiles together ask for as much as they multiply.
        let step = lanes::<T>() * size_of::<T>();
        let (mut far, stride) = (self.line(group, 0), (width * step).div_ceil(tiles));
        for first in (0..tiles).step_by(near) {
            for at in (0..steps).step_by(part) {
                let len = part.min(steps - at);
                for j in (0..self.count).step_by(width) {
                    let columns = j..(j + width).min(self.count);
                    let next = match j + width {
                        // Tiles that come one by one wait for multiplications more than for the second level.
                        _ if near == 1 && tiles > 1 => self.line(j, at),
                        next if next < self.count => self.line(next, at),
                        _ if at + len < steps => self.line(0, at + len),
                        next => self.line(next, 0),
                    };
                    let next = std::array::from_fn(|s| next.wrapping_add(s * apart));
                    for t in first..(first + near).min(tiles) {
                        let rows = each.min(m - t * each);
                        let start = (t * each * steps + at * rows) * LANES;
                        self.dots(
                            &packed[start..start + len * rows * LANES],
                            rows,
                            at..at + len,
                            columns.clone(),
                            width,
                            Ahead { near: next, far, stride },
                            &mut sums[t * each * GROUP + j..],
                        );
                        far = far.wrapping_add(len * stride);
                    }
                }
            }
        }
    }

    /// The same of at most four rows, by whole columns.
    fn stream(&self, packed: &[f32], rows: usize, sums: &mut [f32]) {
        let Group { b, first, count } = *self;
        assert!(packed.len() >= rows * b.rows.div_ceil(lanes::<T>()) * LANES);
        assert!(sums.len() >= (rows - 1) * GROUP + count);
        assert!(count > 0 && (first + count - 1) * b.col_stride + b.rows <= b.data.len());
        let (a, from) = (packed.as_ptr(), b.data[first * b.col_stride..].as_ptr());
        let out = (sums.as_mut_ptr(), count);
        macro_rules! call {
            ($kernel:ident: $($m:literal $chains:literal),*) => {
                match rows {
                    // SAFETY: `fits` was asked; rows, columns and sums are in bounds by the assertions.
                    $($m => unsafe {
                        x86::$kernel::<$m, $chains>(a.cast(), from.cast(), b.col_stride, b.rows, out)
                    },)*
                    _ => unreachable!("no kernel of {rows} rows"),
                }
            };
        }
        match size_of::<T>() {
            4 => call!(stream_f32: 1 4, 2 2, 3 2, 4 2),
            _ => call!(stream_bf16: 1 4, 2 2, 3 2, 4 2),
        }
    }

    /// Where step `at` of a column lies; of any number, to be asked for only.
    fn line(&self, column: usize, at: usize) -> *const i8 {
        let start = self.b.data.as_ptr().cast::<i8>();
        let at = (self.first + column) * self.b.col_stride + at * lanes::<T>();
        start.wrapping_add(at * size_of::<T>())
    }

    /// One tile: the packed `rows`, these steps, with these columns of the group.
    fn dots(
        &self,
        packed: &[f32],
        rows: usize,
        steps: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        width: usize,
        ahead: Ahead,
        sums: &mut [f32],
    ) {
        let Group { b, first, .. } = *self;
        let (from, count) = (steps.start * lanes::<T>(), columns.len());
        let len = (b.rows - from).min(steps.len() * lanes::<T>());
        assert!(packed.len() == rows * steps.len() * LANES);
        assert!(count > 0 && count <= width && sums.len() >= (rows - 1) * GROUP + count);
        assert!((first + columns.end - 1) * b.col_stride + from + len <= b.data.len());
        // Beyond the end a column is read twice and stored once.
        let column = |j: usize| (first + columns.start + j.min(count - 1)) * b.col_stride + from;
        let columns: [*const T; WIDTH] = std::array::from_fn(|j| b.data[column(j)..].as_ptr());
        let a = packed.as_ptr();
        let out = (sums.as_mut_ptr(), count, from > 0);
        macro_rules! call {
            ($kernel:ident: $($m:literal $s:literal),*) => {
                match (rows, width) {
                    // SAFETY: `fits` was asked; packed holds `rows` rows of these steps,
                    // columns lead to `len` elements each, sums have room for the tile.
                    $(($m, $s) => unsafe {
                        let columns = columns.map(<*const T>::cast);
                        x86::$kernel::<$m, $s>(a.cast(), columns, len, ahead, out)
                    },)*
                    _ => unreachable!("no kernel of {rows} rows"),
                }
            };
        }
        match size_of::<T>() {
            _ if isa() == Isa::Avx2 => {
                let at = |j: usize| columns[j];
                macro_rules! tile {
                    ($($m:literal $s:literal),*) => {
                        match (rows, width) {
                            // SAFETY: as of `call`.
                            $(($m, $s) => unsafe {
                                avx2::tile::<T, $m, $s>(a, std::array::from_fn(at), len, ahead, out)
                            },)*
                            _ => unreachable!("no kernel of {rows} rows"),
                        }
                    };
                }
                tile!(1 1, 1 3, 1 6, 2 1, 2 3, 2 6, 3 3, 4 3)
            }
            4 => {
                call!(f32: 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 3 3, 4 3, 5 3, 6 3, 7 3, 8 3)
            }
            _ => {
                call!(bf16: 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 3 3, 4 3, 5 3, 6 3, 7 3, 8 3)
            }
        }
    }
}

mod x86 {
    use std::arch::x86_64::*;

    use super::{Ahead, GROUP, WIDTH};

    /// Bytes between what is streamed and what is asked for.
    const SOON: usize = 4096;

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
                        sums.iter_mut()
                            .zip(acc)
                            .for_each(|(sum, x)| *sum = _mm512_add_ps(*sum, *x));
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

            /// `M` packed rows times `S` columns.
            ///
            /// # Safety
            /// The instructions; `a` holds `M` rows in whole steps, every column `k` elements;
            /// `out` has `M` rows of `count <= S`, `GROUP` apart.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<const M: usize, const S: usize>(
                a: *const $element,
                b: [*const $element; WIDTH],
                k: usize,
                ahead: Ahead,
                (out, count, add): (*mut f32, usize, bool),
            ) {
                let mut acc = [[_mm512_setzero_ps(); S]; M];
                let step = |i: usize, mask: $mask, acc: &mut [[__m512; S]; M]| {
                    // SAFETY: masked to the column's end; a prefetch may point anywhere.
                    let y: [_; S] = std::array::from_fn(|s| unsafe {
                        _mm_prefetch::<_MM_HINT_T1>(
                            ahead.far.wrapping_add(ahead.stride * i + s * 64),
                        );
                        _mm_prefetch::<_MM_HINT_T0>(ahead.near[s].wrapping_add(64 * i));
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
                for m in 0..M {
                    for first in (0..S.div_ceil(4)).map(|i| 4 * i) {
                        let sum = |s: usize| match first + s < S {
                            true => acc[m][first + s],
                            false => _mm512_setzero_ps(),
                        };
                        let stored = ((1 << count.saturating_sub(first).min(4)) - 1) as __mmask8;
                        let four = four_sums([sum(0), sum(1), sum(2), sum(3)]);
                        // SAFETY: masked to `count`.
                        unsafe {
                            let out = out.add(m * GROUP + first);
                            let before = _mm_maskz_loadu_ps(if add { stored } else { 0 }, out);
                            _mm_mask_storeu_ps(out, stored, _mm_add_ps(before, four));
                        }
                    }
                }
            }
        };
    }

    kernel! {
        f32, stream_f32, f32, "avx512f,avx512vl", 16, u16, |mask, p| _mm512_maskz_loadu_ps(mask, p),
        |acc, x, y| _mm512_fmadd_ps(x, y, acc)
    }
    kernel! {
        bf16, stream_bf16, i16, "avx512f,avx512vl,avx512bw,avx512bf16", 32, u32,
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
