//! What this machine can do at most: the floor that kernels are measured against.

use std::time::Instant;

use crate::isa::{Isa, isa};
use crate::threads::{Parts, count, parallel_for};

/// The peaks of the calling thread's compute threads together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Floor {
    /// Fused multiply-adds of f32 in registers, in flops per second.
    pub f32_flops: f64,
    /// The same of products of bf16; that of f32 where the machine has no such instruction.
    pub bf16_flops: f64,
    /// The same of products of int8 by `vpdpbusd`; that of f32 where the machine has no such instruction.
    pub int8_flops: f64,
    /// Bytes per second that a triad `a = b + s c` over memory reads and writes.
    pub bytes: f64,
    /// Bytes per second at which memory is only read: what decoding does with weights.
    pub read: f64,
}

impl Floor {
    /// Measures all five: about 130 ms.
    pub fn measure() -> Floor {
        let f32_flops = best(|| products("f32"));
        let bf16_flops = match isa() {
            Isa::Avx512Bf16 => best(|| products("bf16")),
            _ => f32_flops,
        };
        let int8_flops = if has_vnni() { best(|| products("int8")) } else { f32_flops };
        Floor { f32_flops, bf16_flops, int8_flops, bytes: triad(), read: read() }
    }

    /// Seconds in which the threads together read `x` once: the floor of what reads just that.
    pub fn read_once(x: &[f32]) -> f64 {
        crate::isa::simd! { fn piece(x: &[f32]) -> f32 {
            // One sum of 64 lanes: what the compiler keeps in registers under any instructions.
            let mut lanes = [0.0f32; 64];
            for x in x.as_chunks::<64>().0 {
                for l in 0..64 {
                    lanes[l] += x[l];
                }
            }
            lanes.iter().sum()
        } }
        let start = Instant::now();
        parallel_for(x.len(), 1 << 18, |range| {
            std::hint::black_box(piece(&x[range]));
        });
        start.elapsed().as_secs_f64()
    }
}

fn has_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    return matches!(isa(), Isa::Avx512 | Isa::Avx512Bf16)
        && is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The best of what fits in 20 ms: helpers may have to wake up first.
fn best(f: impl Fn() -> f64) -> f64 {
    let start = Instant::now();
    let runs = std::iter::repeat_with(f).take_while(|_| start.elapsed().as_millis() < 20);
    runs.fold(0.0, f64::max)
}

const STEPS: usize = 12_000;
/// Sums side by side, as in the kernel of products. Of 16 or 24, `vdpbf16ps` of Zen 4 reaches 89 % of its rate.
#[cfg(target_arch = "x86_64")]
const SUMS: usize = 28;

/// Flops per second of all threads, each multiplying in registers.
fn products(of: &str) -> f64 {
    let threads = count();
    let start = Instant::now();
    let mut sums = vec![0.0f32; threads];
    let parts = Parts::new(&mut sums);
    let flops = std::sync::atomic::AtomicU64::new(0);
    parallel_for(threads, 1, |range| {
        for i in range {
            let (sum, done) = multiply(of);
            // SAFETY: each piece has its own element.
            let own = unsafe { parts.range(i..i + 1) };
            own[0] = sum;
            flops.fetch_add(done, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    std::hint::black_box(&sums);
    flops.into_inner() as f64 / seconds
}

/// A sum that depends on all products, and their number of flops.
fn multiply(of: &str) -> (f32, u64) {
    #[cfg(target_arch = "x86_64")]
    match isa() {
        _ if of == "int8" && has_vnni() => {
            // SAFETY: the machine has these instructions.
            return (unsafe { x86::int8() }, (STEPS * SUMS * 128) as u64);
        }
        Isa::Avx512Bf16 if of == "bf16" => {
            // SAFETY: isa() has found these instructions on this machine.
            return (unsafe { x86::bf16() }, (STEPS * SUMS * 64) as u64);
        }
        Isa::Avx512 | Isa::Avx512Bf16 => {
            // SAFETY: as above.
            return (unsafe { x86::f32() }, (STEPS * SUMS * 32) as u64);
        }
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { (x86::avx2(), (STEPS * 12 * 16) as u64) },
        Isa::Portable => {}
    }
    let _ = of;
    let mut acc = [0.0f32; 64];
    let x = std::hint::black_box([0.5f32; 64]);
    for _ in 0..STEPS {
        acc.iter_mut().zip(&x).for_each(|(a, x)| *a = *a * 0.5 + x);
    }
    (acc.iter().sum(), (STEPS * 128) as u64)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{STEPS, SUMS};

    /// # Safety
    /// AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn f32() -> f32 {
        let (x, y) = std::hint::black_box((_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
        let mut acc = [_mm512_setzero_ps(); SUMS];
        for _ in 0..STEPS {
            acc.iter_mut().for_each(|a| *a = _mm512_fmadd_ps(x, *a, y));
        }
        acc.iter().map(|a| _mm512_reduce_add_ps(*a)).sum()
    }

    /// # Safety
    /// AVX-512 F and BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn bf16() -> f32 {
        let one = std::hint::black_box(_mm512_set1_epi32(0x3f80_3f80));
        // SAFETY: 512 bits without invalid values.
        let one: __m512bh = unsafe { std::mem::transmute(one) };
        let mut acc = [_mm512_setzero_ps(); SUMS];
        for _ in 0..STEPS {
            acc.iter_mut().for_each(|a| *a = _mm512_dpbf16_ps(*a, one, one));
        }
        acc.iter().map(|a| _mm512_reduce_add_ps(*a)).sum()
    }

    /// # Safety
    /// AVX-512 F and VNNI.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn int8() -> f32 {
        let one = std::hint::black_box(_mm512_set1_epi8(1));
        let mut acc = [_mm512_setzero_si512(); SUMS];
        for _ in 0..STEPS {
            acc.iter_mut().for_each(|a| *a = _mm512_dpbusd_epi32(*a, one, one));
        }
        acc.iter().map(|a| _mm512_reduce_add_epi32(*a) as f32).sum()
    }

    /// # Safety
    /// AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2() -> f32 {
        let (x, y) = std::hint::black_box((_mm256_set1_ps(0.5), _mm256_set1_ps(0.25)));
        let mut acc = std::hint::black_box([_mm256_setzero_ps(); 12]);
        for _ in 0..STEPS {
            acc.iter_mut().for_each(|a| *a = _mm256_fmadd_ps(x, *a, y));
        }
        // Every sum is used: the compiler would leave out what is not.
        let sum = acc.iter().fold(_mm256_setzero_ps(), |sum, a| _mm256_add_ps(sum, *a));
        let mut out = [0.0f32; 8];
        // SAFETY: room for eight floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        out.iter().sum()
    }
}

/// Bytes per second of a sum over 64 MiB.
fn read() -> f64 {
    let x = vec![1.0f32; 16 << 20];
    (0..4).map(|_| size_of_val(&x[..]) as f64 / Floor::read_once(&x)).fold(0.0, f64::max)
}

/// Bytes per second of `a = b + s c` over 3 x 32 MiB.
fn triad() -> f64 {
    const N: usize = 8 << 20;
    let (b, c, mut a) = (vec![1.0f32; N], vec![2.0f32; N], vec![0.0f32; N]);
    let mut top = 0.0f64;
    for _ in 0..4 {
        let start = Instant::now();
        crate::elementwise::add(&b, &c, &mut a);
        top = top.max(12.0 * N as f64 / start.elapsed().as_secs_f64());
    }
    std::hint::black_box(&a);
    top
}
