//! The float types that kernels are generic over. All compute in f32.

use half::{bf16, f16};

/// A float that is stored; arithmetic happens in f32.
pub trait Float: bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// Its name.
    const NAME: &'static str;
    /// Its name in CUDA kernels.
    const CUDA: &'static str;
    /// To f32, exactly.
    fn to_f32(self) -> f32;
    /// From f32, rounded to nearest even.
    fn from_f32(x: f32) -> Self;
}

impl Float for f32 {
    const NAME: &'static str = "f32";
    const CUDA: &'static str = "float";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Float for bf16 {
    const NAME: &'static str = "bf16";
    const CUDA: &'static str = "bf16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        // Branch-free for the vectoriser; a NaN keeps its sign and stays a NaN.
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        bf16::from_bits(if x.is_nan() { nan } else { rounded } as u16)
    }
}

impl Float for f16 {
    const NAME: &'static str = "f16";
    const CUDA: &'static str = "f16";
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f16 {
        f16::from_f32(x)
    }
}
