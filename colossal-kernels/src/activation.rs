//! Activations and their gradients.

use std::marker::PhantomData;

use crate::cast::{changed, rounded};
use crate::elementwise::check;
use crate::float::Float;
use crate::isa::simd;
use crate::math::{erf, exp, sigmoid};
use crate::profile;
use crate::threads::{Parts, parallel_for, rows};

/// `2 u = x (TWICE_U1 + TWICE_U3 x²)` where `u = sqrt(2 / pi) (x + 0.044715 x³)`.
const TWICE_U1: f32 = 1.595_769_2;
const TWICE_U3: f32 = 0.071_354_82;
const FRAC_1_SQRT_2PI: f32 = 0.398_942_3;

macro_rules! activation {
    ($(#[$doc:meta])* $name:ident, $backward:ident, |$x:ident| $f:expr, $slope:expr) => {
        $(#[$doc])*
        pub fn $name<T: Float>(x: &[T], y: &mut [T]) {
            let _span = profile::moves::<T>(stringify!($name), x.len(), 2);
            check(stringify!($name), x.len(), y.len());
            simd! { fn piece<T: Float>(x: &[T], y: &mut [f32]) {
                for (y, x) in y.iter_mut().zip(x) {
                    let $x = x.to_f32();
                    *y = $f;
                }
            } }
            rows(x, 1, y, 1, |_, x, y| rounded([y], |r, [y]| piece(&x[r], y)));
        }

        #[doc = concat!(
            "Backward of [`", stringify!($name), "`], in place: `x` becomes its gradient `dy * f'(x)`, and \
             `dy` becomes `f(x)` once more."
        )]
        ///
        /// The product that took `f(x)` needs it again for the gradient of its weight.
        pub fn $backward<T: Float>(dy: &mut [T], x: &mut [T]) {
            let _span = profile::moves::<T>(stringify!($backward), x.len(), 4);
            check(stringify!($backward), dy.len(), x.len());
            simd! { fn piece<T: Float>(dy: &mut [f32], x: &mut [f32], _of: PhantomData<T>) {
                for (x, dy) in x.iter_mut().zip(dy) {
                    let $x = *x;
                    (*x, *dy) = (*dy * $slope, $f);
                }
            } }
            in_place([dy, x], |[dy, x]| piece::<T>(dy, x, PhantomData));
        }
    };
}

activation! {
    /// `x * sigmoid(x)`.
    silu, silu_backward, |x| x * sigmoid::<T>(x), {
        let s = sigmoid::<T>(x);
        s * (1.0 + x * (1.0 - s))
    }
}
activation! {
    /// `max(x, 0)`.
    relu, relu_backward, |x| if x > 0.0 { x } else { 0.0 }, if x > 0.0 { 1.0 } else { 0.0 }
}
activation! {
    /// `x * Phi(x)` by the error function.
    gelu, gelu_backward, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)), {
        let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        cdf + x * FRAC_1_SQRT_2PI * exp(-0.5 * x * x)
    }
}
activation! {
    /// GELU by tanh: `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))`.
    gelu_tanh, gelu_tanh_backward, |x| gelu_by_tanh::<T>(x), {
        let square = x * x;
        let s = sigmoid::<T>(x * square.mul_add(TWICE_U3, TWICE_U1));
        let slope = square.mul_add(3.0 * TWICE_U3, TWICE_U1);
        (x * slope).mul_add(s.mul_add(-s, s), s)
    }
}

/// `0.5 x (1 + tanh u)` is `x sigmoid(2 u)`.
#[inline(always)]
pub(crate) fn gelu_by_tanh<T: Float>(x: f32) -> f32 {
    x * sigmoid::<T>(x * (x * x).mul_add(TWICE_U3, TWICE_U1))
}

/// `y = silu(gate) * up`.
pub fn swiglu<T: Float>(gate: &[T], up: &[T], y: &mut [T]) {
    let _span = profile::moves::<T>("swiglu", gate.len(), 3);
    check("swiglu", gate.len(), up.len());
    check("swiglu", gate.len(), y.len());
    simd! { fn piece<T: Float>(gate: &[T], up: &[T], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            let g = g.to_f32();
            *y = g * sigmoid::<T>(g) * u.to_f32();
        }
    } }
    rows(gate, 1, y, 1, |at, gate, y| {
        let up = &up[at..at + gate.len()];
        rounded([y], |r, [y]| piece(&gate[r.clone()], &up[r], y));
    });
}

/// Backward of [`swiglu`], in place: `gate` and `up` become their gradients, and `dy` becomes
/// `silu(gate) * up` once more.
///
/// The product that took the result needs it again for the gradient of its weight.
pub fn swiglu_backward<T: Float>(dy: &mut [T], gate: &mut [T], up: &mut [T]) {
    let _span = profile::moves::<T>("swiglu_backward", dy.len(), 6);
    check("swiglu_backward", dy.len(), gate.len());
    check("swiglu_backward", dy.len(), up.len());
    simd! { fn piece<T: Float>(dy: &mut [f32], gate: &mut [f32], up: &mut [f32], _of: PhantomData<T>) {
        for ((dy, gate), up) in dy.iter_mut().zip(gate).zip(up) {
            let (d, g, u) = (*dy, *gate, *up);
            let s = sigmoid::<T>(g);
            *gate = d * u * s * (1.0 + g * (1.0 - s));
            *up = d * g * s;
            *dy = g * s * u;
        }
    } }
    in_place([dy, gate, up], |[dy, gate, up]| piece::<T>(dy, gate, up, PhantomData));
}

/// Has `f` change pieces of all `x`, which are equally long, in f32, over the rank's threads.
fn in_place<const N: usize, T: Float>(x: [&mut [T]; N], f: impl Fn([&mut [f32]; N]) + Sync) {
    let parts = x.map(Parts::new);
    parallel_for(parts[0].len(), 8192, |range| {
        // SAFETY: ranges of different pieces are disjoint.
        changed(parts.each_ref().map(|part| unsafe { part.range(range.clone()) }), &f);
    });
}
