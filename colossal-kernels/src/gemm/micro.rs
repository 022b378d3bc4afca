//! The micro-kernels: a tile of `MR x NR` sums held in registers.

#[cfg(target_arch = "x86_64")]
mod avx2;

use super::Mat;
use crate::float::Float;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};

/// The largest tile of any kernel.
pub(super) const TILE: usize = 14 * 32;

/// A micro-kernel. It reads a run of `b` for each step of depth, from a panel or, if it can, where the matrix
/// has them, and up to `MR` rows of `a` at any stride: a panel, a row-major or a column-major matrix.
///
/// A step of depth is one f32, or a pair of bf16 in the room of one.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    /// Rows of a tile.
    pub(crate) mr: usize,
    /// Columns of a tile.
    pub(crate) nr: usize,
    /// Steps are pairs of bf16.
    pub(crate) pairs: bool,
    /// Rows of `a` are read as fast where they lie as from a panel.
    pub(crate) in_place: bool,
    /// Steps of `b` may lie apart; they are asked for some steps ahead.
    pub(super) columns_in_place: bool,
    /// Steps of depth of one pass; longer products are added up in f32.
    pub(super) depth: usize,
    /// Floats of rows that should stay in the second-level cache.
    pub(super) room: usize,
    /// Floats of packed columns that should stay in the last-level cache while rows pass by.
    pub(super) columns: usize,
    /// Of one row, of two, … of `mr`.
    run: &'static [Run],
    /// The same that round to bf16, if there are any.
    narrow: &'static [Run],
}

/// `(steps, a, b, strides, where to, what to fetch meanwhile)`
type Run = unsafe fn(usize, *const f32, *const f32, Strides, Out, Ahead);

/// Floats from row to row of `a`, from step to step of `a`, and from step to step of `b`.
pub(super) type Strides = [usize; 3];

/// Where a tile goes, and what is added to it on the way.
#[derive(Clone, Copy)]
pub(super) struct Out {
    /// Its first element: an f32, or a bf16 if `narrow`.
    pub(super) at: *mut f32,
    /// Elements from row to row.
    pub(super) stride: usize,
    /// Round to bf16: where the kernel [can](Kernel::narrows).
    pub(super) narrow: bool,
    /// Rows that are added, of f32; none if null. They may be those of the tile itself, or one for all.
    pub(super) plus: *const f32,
    /// Floats from one of them to the next.
    pub(super) plus_stride: usize,
}

impl Out {
    /// Rows of f32, `stride` apart; with `add`, a sum with what is there.
    pub(super) fn new(at: *mut f32, stride: usize, add: bool) -> Out {
        let plus = if add { at.cast_const() } else { std::ptr::null() };
        Out { at, stride, narrow: false, plus, plus_stride: stride }
    }
}

/// What is fetched into the second-level cache while a tile is computed, a line each step: sixteen lines
/// `near` bytes apart, then sixteen more, `far` bytes behind the first.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "plain code asks for nothing"))]
pub(crate) struct Ahead {
    at: *const u8,
    near: usize,
    far: usize,
}

impl Ahead {
    /// Lines side by side: a packed panel.
    pub(crate) fn lines(at: *const f32) -> Ahead {
        Ahead { at: at.cast(), near: 64, far: 16 * 64 }
    }

    /// Do lines lie so far from each other that the hardware would not fetch them unasked?
    #[cfg(target_arch = "x86_64")]
    fn is_scattered(&self) -> bool {
        self.near > 64
    }

    /// Rows `stride` bytes apart, line by line of sixteen at a time.
    pub(crate) fn strided(at: *const u8, stride: usize) -> Ahead {
        Ahead { at, near: stride, far: 64 }
    }

    /// Part 0 or 1 of rows of `x` from `first` on, as many as make a panel, before they are packed or
    /// read where they lie: what `steps` steps of a kernel have the time to fetch.
    pub(super) fn rows<T>(x: &Mat<'_, T>, first: usize, steps: usize, part: usize) -> Ahead {
        let lanes = 64 / size_of::<T>();
        // Neighbours come in lines of each step of depth, others in lines along the depth.
        let (from, near, far) = match (x.row_stride, size_of::<T>()) {
            (1, 4) => (part * lanes, x.col_stride, 16 * x.col_stride),
            (1, _) => (part * steps * x.col_stride, x.col_stride, 16 * x.col_stride),
            (row, _) => (part * 16 * row, row, lanes * x.col_stride),
        };
        let at = x.data.as_ptr().wrapping_add(first * x.row_stride + from);
        let bytes = size_of::<T>();
        Ahead { at: at.cast(), near: near * bytes, far: far * bytes }
    }
}

impl Kernel {
    /// The best kernel for `T` on this machine.
    pub(crate) fn of<T: Float>() -> Kernel {
        let plain = Kernel {
            mr: 4,
            nr: 16,
            pairs: false,
            in_place: true,
            columns_in_place: false,
            depth: 2048,
            room: 112 << 10,
            columns: 2 << 20,
            run: &PORTABLE_4X16,
            narrow: &[],
        };
        #[cfg(target_arch = "x86_64")]
        match isa() {
            Isa::Avx512Bf16 if T::NAME == "bf16" => {
                let (run, narrow) = (&x86::BF16_14X32, &x86::BF16_14X32_NARROW);
                return Kernel { mr: 14, nr: 32, pairs: true, run, narrow, ..plain };
            }
            Isa::Avx512 | Isa::Avx512Bf16 => {
                let run = &x86::F32_14X32;
                let columns_in_place = true;
                return Kernel { mr: 14, nr: 32, columns_in_place, depth: 1024, run, ..plain };
            }
            Isa::Avx2 => {
                // Second-level caches of 512 KiB or less, and last-level ones of a few MiB.
                let (depth, room, columns) = (512, 32 << 10, 512 << 10);
                let run = &avx2::F32_6X16;
                return Kernel {
                    mr: 6,
                    nr: 16,
                    in_place: false,
                    depth,
                    room,
                    columns,
                    run,
                    ..plain
                };
            }
            Isa::Portable => {}
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = T::NAME;
        plain
    }

    /// Floats of a panel of `width` rows and depth `k`.
    pub(crate) fn panel(&self, width: usize, k: usize) -> usize {
        width * self.steps(k)
    }

    /// Steps of depth `k`.
    pub(crate) fn steps(&self, k: usize) -> usize {
        if self.pairs { k.div_ceil(2) } else { k }
    }

    /// Can it round its results to bf16?
    pub(super) fn narrows(&self) -> bool {
        !self.narrow.is_empty()
    }

    /// `c = a b`, or `c += a b` with `add`: `rows` rows of a tile, over `steps` of depth.
    #[inline(always)]
    pub(crate) fn tile(
        &self,
        rows: usize,
        steps: usize,
        a: &[f32],
        strides: [usize; 2],
        b: &[f32],
        c: &mut [f32],
        stride: usize,
        add: bool,
        next: Ahead,
    ) {
        assert!(c.len() >= (rows - 1) * stride + self.nr);
        // SAFETY: the tile is in bounds by the assertion.
        unsafe {
            let out = Out::new(c.as_mut_ptr(), stride, add);
            self.tile_at(rows, steps, a, b, [strides[0], strides[1], self.nr], out, next);
        }
    }

    /// As [`Kernel::tile`] where the tile interleaves with what other threads write.
    ///
    /// # Safety
    /// `out` leads to these rows of a tile, which are this thread's alone, and to as many that are
    /// added, if any.
    #[inline(always)]
    pub(super) unsafe fn tile_at(
        &self,
        rows: usize,
        steps: usize,
        a: &[f32],
        b: &[f32],
        strides: Strides,
        out: Out,
        next: Ahead,
    ) {
        let run = if out.narrow { self.narrow } else { self.run };
        let [row, step, run_b] = strides;
        assert!(row == 1 || step == 1, "gemm: rows of a tile or its steps are neighbours");
        assert!(run_b == self.nr || self.columns_in_place, "gemm: this kernel reads panels of b");
        assert!(
            steps == 0
                || (a.len() > (rows - 1) * row + (steps - 1) * step
                    && b.len() >= (steps - 1) * run_b + self.nr)
        );
        // SAFETY: `of` picked a kernel of this machine's instructions; a and b are in bounds by
        // the assertion, the rest by contract.
        unsafe { (run[rows - 1])(steps, a.as_ptr(), b.as_ptr(), strides, out, next) }
    }
}

static PORTABLE_4X16: [Run; 4] = [portable::<1>, portable::<2>, portable::<3>, portable::<4>];

/// Plain code: rows of sixteen.
///
/// # Safety
/// `a` has `R` rows of `steps` steps at these strides, `b` runs of 16 floats, `out` `R` rows of 16 f32.
unsafe fn portable<const R: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    [row, step, run]: Strides,
    out: Out,
    _next: Ahead,
) {
    let mut acc = [[0.0f32; 16]; R];
    for k in 0..steps {
        // SAFETY: by contract.
        let b = unsafe { std::slice::from_raw_parts(b.add(run * k), 16) };
        for (i, acc) in acc.iter_mut().enumerate() {
            // SAFETY: by contract.
            let a = unsafe { *a.add(i * row + k * step) };
            for (acc, b) in acc.iter_mut().zip(b) {
                *acc += a * b;
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        for (j, acc) in acc.iter().enumerate() {
            // SAFETY: by contract.
            unsafe {
                let plus = out.plus.wrapping_add(i * out.plus_stride + j);
                let sum = if out.plus.is_null() { *acc } else { acc + *plus };
                out.at.add(i * out.stride + j).write(sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Ahead, Out, Run, Strides};
    use std::arch::x86_64::*;

    /// Steps from which on a tile asks for the lines that it writes: before it has made its sums they are there.
    const LONG: usize = 384;

    /// A kernel of two vectors a row. `$product(acc, a, b)` adds a product to a sum; `$store(c, x, y)`
    /// writes a row of `$item`.
    macro_rules! kernel {
        ($(#[$doc:meta])* $all:ident [$($rows:literal)*], $name:ident, $features:literal, $lanes:literal,
         $zero:ident, $load:ident, $add:ident, $broadcast:ident, $product:expr, $item:ty, $store:expr) => {
            pub(super) static $all: [Run; [$($rows),*].len()] = [$($name::<$rows>),*];

            $(#[$doc])*
            ///
            /// # Safety
            /// The instructions; `a` has `R` rows of `steps` steps at these strides, `b` as many runs of two
            /// vectors, `out` leads to `R` rows of these items.
            #[target_feature(enable = $features)]
            unsafe fn $name<const R: usize>(
                steps: usize,
                a: *const f32,
                b: *const f32,
                [row, step, run]: Strides,
                out: Out,
                next: Ahead,
            ) {
                const AHEAD: usize = 16;
                let c = out.at.cast::<$item>();
                if steps >= LONG {
                    for i in 0..R {
                        let row = c.wrapping_add(i * out.stride);
                        _mm_prefetch::<_MM_HINT_ET0>(row.cast());
                        _mm_prefetch::<_MM_HINT_ET0>(row.wrapping_add(2 * $lanes - 1).cast());
                    }
                }
                let mut acc = [[$zero(); 2]; R];
                for k in 0..steps {
                    // SAFETY: by contract; a prefetch may point anywhere.
                    unsafe {
                        let b = b.add(run * k);
                        let soon = b.wrapping_add(run * AHEAD);
                        _mm_prefetch::<_MM_HINT_T0>(soon.cast());
                        _mm_prefetch::<_MM_HINT_T0>(soon.wrapping_add($lanes).cast());
                        let (b0, b1) = ($load(b), $load(b.add($lanes)));
                        let line = (k % 16) * next.near + (k / 16) * next.far;
                        _mm_prefetch::<_MM_HINT_T1>(next.at.wrapping_add(line).cast());
                        let a = a.add(k * step);
                        for (i, acc) in acc.iter_mut().enumerate() {
                            let x = $broadcast(*a.add(i * row));
                            acc[0] = $product(acc[0], x, b0);
                            acc[1] = $product(acc[1], x, b1);
                        }
                    }
                }
                for (i, acc) in acc.iter().enumerate() {
                    // SAFETY: by contract.
                    unsafe {
                        let (mut c0, mut c1) = (acc[0], acc[1]);
                        if !out.plus.is_null() {
                            let plus = out.plus.add(i * out.plus_stride);
                            c0 = $add(c0, $load(plus));
                            c1 = $add(c1, $load(plus.add($lanes)));
                        }
                        $store(c.add(i * out.stride), c0, c1);
                    }
                }
            }
        };
    }

    kernel! {
        /// AVX-512F.
        F32_14X32 [1 2 3 4 5 6 7 8 9 10 11 12 13 14], f32x32, "avx512f", 16, _mm512_setzero_ps, _mm512_loadu_ps,
        _mm512_add_ps, _mm512_set1_ps, |acc, a, b| _mm512_fmadd_ps(a, b, acc), f32, |c: *mut f32, x, y| {
            _mm512_storeu_ps(c, x);
            _mm512_storeu_ps(c.add(16), y);
        }
    }
    kernel! {
        /// AVX-512 BF16.
        BF16_14X32 [1 2 3 4 5 6 7 8 9 10 11 12 13 14], bf16x32, "avx512f,avx512bf16", 16, _mm512_setzero_ps, _mm512_loadu_ps,
        _mm512_add_ps, _mm512_set1_ps, |acc, a, b| _mm512_dpbf16_ps(acc, pair(a), pair(b)), f32, |c: *mut f32, x, y| {
            _mm512_storeu_ps(c, x);
            _mm512_storeu_ps(c.add(16), y);
        }
    }
    kernel! {
        /// AVX-512 BF16, to bf16.
        BF16_14X32_NARROW [1 2 3 4 5 6 7 8 9 10 11 12 13 14], bf16x32_narrow, "avx512f,avx512bf16", 16, _mm512_setzero_ps, _mm512_loadu_ps,
        _mm512_add_ps, _mm512_set1_ps, |acc, a, b| _mm512_dpbf16_ps(acc, pair(a), pair(b)), u16, |c: *mut u16, x, y| {
            _mm512_storeu_si512(c.cast(), words(_mm512_cvtne2ps_pbh(y, x)));
        }
    }
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pair(x: __m512) -> __m512bh {
        // SAFETY: both are 512 bits without invalid values.
        unsafe { std::mem::transmute(x) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn words(x: __m512bh) -> __m512i {
        // SAFETY: both are 512 bits without invalid values.
        unsafe { std::mem::transmute(x) }
    }
}
