//! Which vector instructions this process uses: found once at run time.
//!
//! `COLOSSAL_ISA` forces a path the machine has: `avx512bf16`, `avx512`, `avx2`, `portable`.

use std::sync::atomic::{AtomicU8, Ordering};

/// A level of vector instructions, in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler makes of plain code.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with `vdpbf16ps`.
    Avx512Bf16,
}

static CHOSEN: AtomicU8 = AtomicU8::new(u8::MAX);

/// The level in use.
#[inline]
pub fn isa() -> Isa {
    match CHOSEN.load(Ordering::Relaxed) {
        0 => Isa::Portable,
        1 => Isa::Avx2,
        2 => Isa::Avx512,
        3 => Isa::Avx512Bf16,
        _ => choose(),
    }
}

/// Uses this level from now on, or the highest that the machine has below it.
pub fn force_isa(wanted: Isa) -> Isa {
    let chosen = wanted.min(detect());
    CHOSEN.store(chosen as u8, Ordering::Relaxed);
    chosen
}

#[cold]
fn choose() -> Isa {
    let wanted = match std::env::var("COLOSSAL_ISA").as_deref() {
        Ok("portable") => Isa::Portable,
        Ok("avx2") => Isa::Avx2,
        Ok("avx512") => Isa::Avx512,
        _ => Isa::Avx512Bf16,
    };
    force_isa(wanted)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if avx512 && is_x86_feature_detected!("avx512bf16") {
        Isa::Avx512Bf16
    } else if avx512 {
        Isa::Avx512
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        Isa::Avx2
    } else {
        Isa::Portable
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// Compiles a function once per level and calls the one in use: the body is plain code that the
/// compiler vectorises under each set of instructions.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($g:ident: $b:path),*>)? ($($arg:ident: $t:ty),* $(,)?) $(-> $r:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($g: $b),*>)? ($($arg: $t),*) $(-> $r)? {
            #[inline(always)]
            fn body $(<$($g: $b),*>)? ($($arg: $t),*) $(-> $r)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512 $(<$($g: $b),*>)? ($($arg: $t),*) $(-> $r)? { body $(::<$($g),*>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$($g: $b),*>)? ($($arg: $t),*) $(-> $r)? { body $(::<$($g),*>)? ($($arg),*) }
                match $crate::isa::isa() {
                    // SAFETY: isa() has found these instructions on this machine.
                    $crate::isa::Isa::Avx512 | $crate::isa::Isa::Avx512Bf16 => return unsafe { avx512 $(::<$($g),*>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::isa::Isa::Avx2 => return unsafe { avx2 $(::<$($g),*>)? ($($arg),*) },
                    $crate::isa::Isa::Portable => {}
                }
            }
            body $(::<$($g),*>)? ($($arg),*)
        }
    };
}
pub(crate) use simd;
