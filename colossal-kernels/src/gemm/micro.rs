//! The micro-kernels: a tile of `MR x NR` sums held in registers.

use crate::float::Float;
use crate::isa::Isa;

/// The largest tile of any kernel.
pub(super) const TILE: usize = 14 * 32;

/// A micro-kernel and the panel format it reads.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) mr: usize,
    pub(super) nr: usize,
    /// Panels hold pairs of bf16.
    pub(super) pairs: bool,
    /// `(depth in steps, panel of a, panel of b, tile)`
    run: unsafe fn(usize, *const f32, *const f32, *mut f32),
}

impl Kernel {
    /// The best kernel for `T` under `isa`.
    pub(super) fn choose<T: Float>(isa: Isa) -> Kernel {
        #[cfg(target_arch = "x86_64")]
        match isa {
            Isa::Avx512Bf16 if T::NAME == "bf16" => {
                return Kernel { mr: 14, nr: 32, pairs: true, run: x86::bf16_14x32 };
            }
            Isa::Avx512 | Isa::Avx512Bf16 => {
                return Kernel { mr: 14, nr: 32, pairs: false, run: x86::f32_14x32 };
            }
            Isa::Avx2 => return Kernel { mr: 6, nr: 16, pairs: false, run: x86::f32_6x16 },
            Isa::Portable => {}
        }
        let _ = isa;
        Kernel { mr: 4, nr: 16, pairs: false, run: portable_4x16 }
    }

    /// Floats of a panel of `width` rows and depth `k`.
    pub(super) fn panel(&self, width: usize, k: usize) -> usize {
        width * self.steps(k)
    }

    fn steps(&self, k: usize) -> usize {
        if self.pairs { k.div_ceil(2) } else { k }
    }

    /// `tile = a b` over depth `k`.
    #[inline(always)]
    pub(super) fn run(&self, k: usize, a: &[f32], b: &[f32], tile: &mut [f32; TILE]) {
        let steps = self.steps(k);
        debug_assert!(a.len() >= steps * self.mr && b.len() >= steps * self.nr);
        // SAFETY: `choose` picked a kernel of this machine's instructions; panels hold `steps`
        // steps, and the tile is as large as that of any kernel.
        unsafe { (self.run)(steps, a.as_ptr(), b.as_ptr(), tile.as_mut_ptr()) }
    }
}

/// Plain code: four rows of sixteen.
///
/// # Safety
/// `a` holds `4 k` and `b` `16 k` floats, `tile` 64.
unsafe fn portable_4x16(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
    // SAFETY: by contract.
    let (a, b) =
        unsafe { (std::slice::from_raw_parts(a, 4 * k), std::slice::from_raw_parts(b, 16 * k)) };
    let mut acc = [[0.0f32; 16]; 4];
    for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(16)) {
        for (acc, a) in acc.iter_mut().zip(a) {
            for (acc, b) in acc.iter_mut().zip(b) {
                *acc += a * b;
            }
        }
    }
    for (i, row) in acc.iter().enumerate() {
        // SAFETY: by contract the tile has 4 rows of 16.
        unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), tile.add(16 * i), 16) };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// # Safety
    /// AVX-512F; `a` holds `14 k` and `b` `32 k` floats, `tile` 448.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn f32_14x32(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
        let mut acc = [[_mm512_setzero_ps(); 2]; 14];
        for step in 0..k {
            // SAFETY: by contract the panels hold `k` steps.
            unsafe {
                let b = b.add(32 * step);
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                let a = a.add(14 * step);
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(i));
                    acc[0] = _mm512_fmadd_ps(x, b0, acc[0]);
                    acc[1] = _mm512_fmadd_ps(x, b1, acc[1]);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            // SAFETY: by contract the tile has 14 rows of 32.
            unsafe {
                _mm512_storeu_ps(tile.add(32 * i), acc[0]);
                _mm512_storeu_ps(tile.add(32 * i + 16), acc[1]);
            }
        }
    }

    /// # Safety
    /// AVX-512 BF16; panels of pairs: `a` holds `14 k` and `b` `32 k` of them, `tile` 448 floats.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn bf16_14x32(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
        let mut acc = [[_mm512_setzero_ps(); 2]; 14];
        let pair = |x: __m512i| -> __m512bh {
            // SAFETY: both are 512 bits without invalid values.
            unsafe { std::mem::transmute(x) }
        };
        for step in 0..k {
            // SAFETY: by contract the panels hold `k` steps.
            unsafe {
                let b = b.add(32 * step).cast::<i32>();
                let b0 = pair(_mm512_loadu_epi32(b));
                let b1 = pair(_mm512_loadu_epi32(b.add(16)));
                let a = a.add(14 * step).cast::<i32>();
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = pair(_mm512_set1_epi32(*a.add(i)));
                    acc[0] = _mm512_dpbf16_ps(acc[0], x, b0);
                    acc[1] = _mm512_dpbf16_ps(acc[1], x, b1);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            // SAFETY: by contract the tile has 14 rows of 32.
            unsafe {
                _mm512_storeu_ps(tile.add(32 * i), acc[0]);
                _mm512_storeu_ps(tile.add(32 * i + 16), acc[1]);
            }
        }
    }

    /// # Safety
    /// AVX2 and FMA; `a` holds `6 k` and `b` `16 k` floats, `tile` 96.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f32_6x16(k: usize, a: *const f32, b: *const f32, tile: *mut f32) {
        let mut acc = [[_mm256_setzero_ps(); 2]; 6];
        for step in 0..k {
            // SAFETY: by contract the panels hold `k` steps.
            unsafe {
                let b = b.add(16 * step);
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                let a = a.add(6 * step);
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = _mm256_set1_ps(*a.add(i));
                    acc[0] = _mm256_fmadd_ps(x, b0, acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, b1, acc[1]);
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            // SAFETY: by contract the tile has 6 rows of 16.
            unsafe {
                _mm256_storeu_ps(tile.add(16 * i), acc[0]);
                _mm256_storeu_ps(tile.add(16 * i + 8), acc[1]);
            }
        }
    }
}
