//! The kernel for AVX2 and FMA: six rows of sixteen sums.
//!
//! Beside another hyper-thread a core starts three instructions a cycle, of which two multiply: so nothing
//! else runs but two loads of `b` and a broadcast a row. Twelve sums leave four registers, and the compiler
//! would spill some of them to load early; hence the assembly, a step of depth of which is
//! `c[i] += a[i] * b`.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{Ahead, Out, Run, Strides};

pub(super) static F32_6X16: [Run; 6] =
    [tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>];

/// The sums of a row.
type Row = [__m256; 2];

/// # Safety
/// AVX2 and FMA; `a` has `R` rows of `steps` steps at these strides, one of which is 1, `b` is a panel of
/// `steps` steps of sixteen, `out` leads to `R` rows of sixteen f32.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const R: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    [row, step, _]: Strides,
    out: Out,
    next: Ahead,
) {
    let strides = [row, step];
    for i in 0..R {
        let c = out.at.wrapping_add(i * out.stride);
        _mm_prefetch::<_MM_HINT_ET0>(c.cast());
        _mm_prefetch::<_MM_HINT_ET0>(c.wrapping_add(15).cast());
    }
    let mut acc = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: by contract.
    unsafe {
        match (acc.first_chunk_mut::<6>(), strides) {
            (Some(acc), [1, 6]) => six::<PANEL>(acc, steps, a, strides, b, next),
            (Some(acc), [1, _]) => six::<STEPS>(acc, steps, a, strides, b, next),
            (Some(acc), _) => six::<ROWS>(acc, steps, a, strides, b, next),
            (None, _) => fewer(&mut acc, steps, a, strides, b),
        }
    }
    for (i, [mut c0, mut c1]) in acc.into_iter().enumerate() {
        // SAFETY: by contract.
        unsafe {
            if !out.plus.is_null() {
                let plus = out.plus.add(i * out.plus_stride);
                c0 = _mm256_add_ps(c0, _mm256_loadu_ps(plus));
                c1 = _mm256_add_ps(c1, _mm256_loadu_ps(plus.add(8)));
            }
            let c = out.at.add(i * out.stride);
            _mm256_storeu_ps(c, c0);
            _mm256_storeu_ps(c.add(8), c1);
        }
    }
}

/// Where six rows of `a` lie: in a packed panel …
const PANEL: u8 = 0;
/// … with the rows of a step side by side, steps at any distance …
const STEPS: u8 = 1;
/// … or with the steps of a row side by side, rows at any distance.
const ROWS: u8 = 2;

/// Steps of depth in assembly, on sums in the registers 0 to 11. The panel of `b` begins at `{b}`; for each step
/// its number in the panel and, in brackets, how far behind one of two places in `a` its six rows are: `{a}`
/// for the first three, `{m}` for the others.
macro_rules! steps {
    ($acc:ident, $a:expr, $m:expr, $b:expr, [$($name:ident = $value:expr),*],
     $($k:literal [$($x0:literal)*] [$($x1:literal)*] [$($x2:literal)*] [$($x3:literal)*] [$($x4:literal)*] [$($x5:literal)*])*) => {
        let [r0, r1, r2, r3, r4, r5] = $acc;
        asm!(
            $(concat!("vmovups ymm12, [{b} + 64 * ", $k, "]"),
            concat!("vmovups ymm13, [{b} + 64 * ", $k, " + 32]"),
            concat!("vbroadcastss ymm14, dword ptr [{a}", $($x0,)* "]"),
            concat!("vbroadcastss ymm15, dword ptr [{a}", $($x1,)* "]"),
            "vfmadd231ps ymm0, ymm14, ymm12",
            "vfmadd231ps ymm1, ymm14, ymm13",
            concat!("vbroadcastss ymm14, dword ptr [{a}", $($x2,)* "]"),
            "vfmadd231ps ymm2, ymm15, ymm12",
            "vfmadd231ps ymm3, ymm15, ymm13",
            concat!("vbroadcastss ymm15, dword ptr [{m}", $($x3,)* "]"),
            "vfmadd231ps ymm4, ymm14, ymm12",
            "vfmadd231ps ymm5, ymm14, ymm13",
            concat!("vbroadcastss ymm14, dword ptr [{m}", $($x4,)* "]"),
            "vfmadd231ps ymm6, ymm15, ymm12",
            "vfmadd231ps ymm7, ymm15, ymm13",
            concat!("vbroadcastss ymm15, dword ptr [{m}", $($x5,)* "]"),
            "vfmadd231ps ymm8, ymm14, ymm12",
            "vfmadd231ps ymm9, ymm14, ymm13",
            "vfmadd231ps ymm10, ymm15, ymm12",
            "vfmadd231ps ymm11, ymm15, ymm13",)*
            a = in(reg) $a, m = in(reg) $m, b = in(reg) $b, $($name = in(reg) $value,)*
            inout("ymm0") r0[0], inout("ymm1") r0[1], inout("ymm2") r1[0], inout("ymm3") r1[1],
            inout("ymm4") r2[0], inout("ymm5") r2[1], inout("ymm6") r3[0], inout("ymm7") r3[1],
            inout("ymm8") r4[0], inout("ymm9") r4[1], inout("ymm10") r5[0], inout("ymm11") r5[1],
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(pure, readonly, nostack, preserves_flags)
        )
    };
}

/// Six rows.
///
/// # Safety
/// As of [`tile`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn six<const KIND: u8>(
    acc: &mut [Row; 6],
    steps: usize,
    mut a: *const f32,
    [row, step]: [usize; 2],
    mut b: *const f32,
    next: Ahead,
) {
    let scattered = next.is_scattered();
    for group in 0..steps / 4 {
        if scattered {
            let line = group % 4 * 4 * next.near + group / 4 * next.far;
            for k in 0..4 {
                let at = next.at.wrapping_add(line + k * next.near);
                _mm_prefetch::<_MM_HINT_T1>(at.cast());
            }
        }
        // SAFETY: by contract; four steps are in bounds.
        unsafe {
            match KIND {
                PANEL => {
                    steps!(acc, a, a, b, [],
                        0 [] ["+4"] ["+8"] ["+12"] ["+16"] ["+20"]
                        1 ["+24"] ["+28"] ["+32"] ["+36"] ["+40"] ["+44"]
                        2 ["+48"] ["+52"] ["+56"] ["+60"] ["+64"] ["+68"]
                        3 ["+72"] ["+76"] ["+80"] ["+84"] ["+88"] ["+92"]);
                }
                STEPS => {
                    steps!(acc, a, a, b, [s = 4 * step, t = 12 * step],
                        0 [] ["+4"] ["+8"] ["+12"] ["+16"] ["+20"]
                        1 ["+{s}"] ["+{s}+4"] ["+{s}+8"] ["+{s}+12"] ["+{s}+16"] ["+{s}+20"]
                        2 ["+2*{s}"] ["+2*{s}+4"] ["+2*{s}+8"] ["+2*{s}+12"] ["+2*{s}+16"] ["+2*{s}+20"]
                        3 ["+{t}"] ["+{t}+4"] ["+{t}+8"] ["+{t}+12"] ["+{t}+16"] ["+{t}+20"]);
                }
                _ => {
                    steps!(acc, a, a.wrapping_add(3 * row), b, [r = 4 * row],
                        0 [] ["+{r}"] ["+2*{r}"] [] ["+{r}"] ["+2*{r}"]
                        1 ["+4"] ["+{r}+4"] ["+2*{r}+4"] ["+4"] ["+{r}+4"] ["+2*{r}+4"]
                        2 ["+8"] ["+{r}+8"] ["+2*{r}+8"] ["+8"] ["+{r}+8"] ["+2*{r}+8"]
                        3 ["+12"] ["+{r}+12"] ["+2*{r}+12"] ["+12"] ["+{r}+12"] ["+2*{r}+12"]);
                }
            }
        }
        (a, b) = (a.wrapping_add(4 * step), b.wrapping_add(64));
    }
    for _ in 0..steps % 4 {
        // SAFETY: by contract.
        unsafe {
            steps!(acc, a, a.wrapping_add(3 * row), b, [r = 4 * row],
                0 [] ["+{r}"] ["+2*{r}"] [] ["+{r}"] ["+2*{r}"]);
        }
        (a, b) = (a.wrapping_add(step), b.wrapping_add(16));
    }
}

/// Rows at an edge.
///
/// # Safety
/// As of [`tile`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn fewer<const R: usize>(
    acc: &mut [Row; R],
    steps: usize,
    a: *const f32,
    [row, step]: [usize; 2],
    b: *const f32,
) {
    for k in 0..steps {
        // SAFETY: by contract.
        unsafe {
            let (b0, b1) = (_mm256_loadu_ps(b.add(16 * k)), _mm256_loadu_ps(b.add(16 * k + 8)));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*a.add(i * row + k * step));
                acc[0] = _mm256_fmadd_ps(x, b0, acc[0]);
                acc[1] = _mm256_fmadd_ps(x, b1, acc[1]);
            }
        }
    }
}
