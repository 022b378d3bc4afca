//! Between float types.

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
    simd! { fn piece<A: Float, B: Float>(x: &[A], y: &mut [B]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = B::from_f32(x.to_f32());
        }
    } }
    rows(x, 1, y, 1, |_, x, y| piece(x, y));
}

/// `y = x` rounded to bf16, on this thread: between the products of a kernel.
pub(crate) fn round(x: &[f32], y: &mut [bf16]) {
    assert_eq!(x.len(), y.len());
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512Bf16 {
        // SAFETY: isa() has found these instructions; both are equally long.
        return unsafe { x86(x, y) };
    }
    for (y, x) in y.iter_mut().zip(x) {
        *y = <bf16 as Float>::from_f32(*x);
    }
}

/// # Safety
/// AVX-512 BF16; both are equally long.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn x86(x: &[f32], y: &mut [bf16]) {
    use std::arch::x86_64::*;
    for at in (0..x.len()).step_by(16) {
        let mask = (u32::MAX >> (32 - (x.len() - at).min(16))) as u16;
        // SAFETY: masked to the slices.
        unsafe {
            let v = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at));
            let v: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
            _mm256_mask_storeu_epi16(y.as_mut_ptr().add(at).cast(), mask, v);
        }
    }
}
