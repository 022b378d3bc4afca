//! Between float types.

use crate::elementwise::check;
use crate::float::Float;
use crate::isa::simd;
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
