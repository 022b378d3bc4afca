//! Between float types.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use half::bf16;

use crate::elementwise::check;
use crate::float::Float;
use crate::isa::simd;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};
use crate::profile::{self, Work};
use crate::threads::rows;

/// `y = x` in another type, rounded to nearest even.
pub fn cast<A: Float, B: Float>(x: &[A], y: &mut [B]) {
    let _span = profile::span::<A>("cast", [x.len(), 0, 0], || Work {
        flops: 0,
        bytes: (x.len() * (size_of::<A>() + size_of::<B>())) as u64,
    });
    check("cast", x.len(), y.len());
    // What lies below the smallest normal number stays, which the instruction of `round` would make zero.
    simd! { fn piece<A: Float, B: Float>(x: &[A], y: &mut [B]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = B::from_f32(x.to_f32());
        }
    } }
    rows(x, 1, y, 1, |_, x, y| piece(x, y));
}

/// Has `f` write ranges of all `y` in f32, and rounds them, on this thread: in pieces that stay in the
/// first-level cache.
#[inline(always)]
pub(crate) fn rounded<const N: usize, T: Float>(
    mut y: [&mut [T]; N],
    f: impl Fn(Range<usize>, [&mut [f32]; N]),
) {
    let len = y.iter().map(|y| y.len()).min().unwrap_or(0);
    if T::NAME == "f32" {
        return f(0..len, y.map(|y| bytemuck::cast_slice_mut(&mut y[..len])));
    }
    let mut pieces = [[0.0; PIECE]; N];
    for at in (0..len).step_by(PIECE) {
        let n = PIECE.min(len - at);
        y.iter().for_each(|y| soon(y, at + n..at + 2 * n));
        f(at..at + n, pieces.each_mut().map(|piece| &mut piece[..n]));
        for (piece, y) in pieces.iter().zip(&mut y) {
            round(&piece[..n], &mut y[at..at + n]);
        }
    }
}

/// Has `f` change all `x`, equally long, as f32, and rounds what it left there, on this thread: in pieces that
/// stay in the first-level cache.
#[inline(always)]
pub(crate) fn changed<const N: usize, T: Float>(mut x: [&mut [T]; N], f: impl Fn([&mut [f32]; N])) {
    if T::NAME == "f32" {
        return f(x.map(bytemuck::cast_slice_mut));
    }
    simd! { fn widen<T: Float>(x: &[T], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = x.to_f32();
        }
    } }
    let len = x.iter().map(|x| x.len()).min().unwrap_or(0);
    let mut pieces = [[0.0; PIECE]; N];
    for at in (0..len).step_by(PIECE) {
        let n = PIECE.min(len - at);
        for (piece, x) in pieces.iter_mut().zip(&x) {
            widen(&x[at..at + n], &mut piece[..n]);
        }
        f(pieces.each_mut().map(|piece| &mut piece[..n]));
        for (piece, x) in pieces.iter().zip(&mut x) {
            round(&piece[..n], &mut x[at..at + n]);
        }
    }
}

/// These elements, or what lies there beyond the end, are written soon.
#[inline(always)]
fn soon<T>(y: &[T], range: Range<usize>) {
    for at in range.step_by(64 / size_of::<T>()) {
        let line = y.as_ptr().wrapping_add(at).cast::<i8>();
        // SAFETY: a prefetch may point anywhere.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_ET0>(line);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}

/// Elements of a piece.
const PIECE: usize = 256;

/// `y = x` rounded, on this thread: between the products of a kernel, or its result. AVX-512 BF16 makes zero of
/// what is smaller than any normal number, 1.2e-38.
pub(crate) fn round<T: Float>(x: &[f32], y: &mut [T]) {
    assert_eq!(x.len(), y.len());
    #[cfg(target_arch = "x86_64")]
    if T::NAME == "bf16" && isa() == Isa::Avx512Bf16 {
        // SAFETY: isa() has found these instructions; both are equally long.
        return unsafe { x86(x, bytemuck::cast_slice_mut(y)) };
    }
    simd! { fn plain<T: Float>(x: &[f32], y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(*x);
        }
    } }
    plain(x, y);
}

/// # Safety
/// AVX-512 BF16; both are equally long.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn x86(x: &[f32], y: &mut [bf16]) {
    use std::arch::x86_64::*;
    let whole = x.len() / 32 * 32;
    for at in (0..whole).step_by(32) {
        // SAFETY: 32 elements of both from `at` on.
        unsafe {
            let from = x.as_ptr().add(at);
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)));
            let v: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(y.as_mut_ptr().add(at).cast(), v);
        }
    }
    for at in (whole..x.len()).step_by(16) {
        let mask = (u32::MAX >> (32 - (x.len() - at).min(16))) as u16;
        // SAFETY: masked to the slices.
        unsafe {
            let v = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at));
            let v: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
            _mm256_mask_storeu_epi16(y.as_mut_ptr().add(at).cast(), mask, v);
        }
    }
}
