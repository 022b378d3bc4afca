//! Sums and products, element by element.

use crate::float::Float;
use crate::isa::simd;
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for, rows};

/// Operands of an element-wise kernel are equally long.
pub(crate) fn check(kernel: &str, a: usize, b: usize) {
    assert_eq!(a, b, "{kernel}: operands have {a} and {b} elements");
}

macro_rules! binary {
    ($(#[$doc:meta])* $name:ident, |$a:ident, $b:ident| $f:expr) => {
        $(#[$doc])*
        pub fn $name<T: Float>(a: &[T], b: &[T], y: &mut [T]) {
            let _span = profile::moves::<T>(stringify!($name), a.len(), 3);
            check(stringify!($name), a.len(), b.len());
            check(stringify!($name), a.len(), y.len());
            simd! { fn piece<T: Float>(a: &[T], b: &[T], y: &mut [T]) {
                for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                    let ($a, $b) = (a.to_f32(), b.to_f32());
                    *y = T::from_f32($f);
                }
            } }
            rows(a, 1, y, 1, |at, a, y| piece(a, &b[at..at + a.len()], y));
        }
    };
}

binary! {
    /// `y = a + b`.
    add, |a, b| a + b
}
binary! {
    /// `y = a - b`.
    sub, |a, b| a - b
}
binary! {
    /// `y = a * b`.
    mul, |a, b| a * b
}

/// `y = s x`.
pub fn scale<T: Float>(x: &[T], s: f32, y: &mut [T]) {
    let _span = profile::moves::<T>("scale", x.len(), 2);
    check("scale", x.len(), y.len());
    simd! { fn piece<T: Float>(x: &[T], s: f32, y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(s * x.to_f32());
        }
    } }
    rows(x, 1, y, 1, |_, x, y| piece(x, s, y));
}

/// `y = value` everywhere.
pub fn fill<T: Float>(y: &mut [T], value: T) {
    let _span = profile::moves::<T>("fill", y.len(), 1);
    let parts = Parts::new(y);
    parallel_for(parts.len(), 1 << 16, |r| {
        // SAFETY: ranges of different pieces are disjoint.
        unsafe { parts.range(r) }.fill(value);
    });
}

/// `y += x`.
pub fn add_assign<T: Float>(x: &[T], y: &mut [T]) {
    let _span = profile::moves::<T>("add_assign", x.len(), 3);
    check("add_assign", x.len(), y.len());
    simd! { fn piece<T: Float>(x: &[T], y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(y.to_f32() + x.to_f32());
        }
    } }
    rows(x, 1, y, 1, |_, x, y| piece(x, y));
}

/// `y += a x`.
pub fn axpy<T: Float>(a: f32, x: &[T], y: &mut [T]) {
    let _span = profile::moves::<T>("axpy", x.len(), 3);
    check("axpy", x.len(), y.len());
    simd! { fn piece<T: Float>(a: f32, x: &[T], y: &mut [T]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(y.to_f32() + a * x.to_f32());
        }
    } }
    rows(x, 1, y, 1, |_, x, y| piece(a, x, y));
}

/// `y += x` into an f32 accumulator.
pub fn add_into<T: Float>(x: &[T], y: &mut [f32]) {
    let _span = profile::span::<T>("add_into", [x.len(), 0, 0], || Work {
        flops: 0,
        bytes: (x.len() * (size_of::<T>() + 8)) as u64,
    });
    check("add_into", x.len(), y.len());
    simd! { fn piece<T: Float>(x: &[T], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x.to_f32();
        }
    } }
    rows(x, 1, y, 1, |_, x, y| piece(x, y));
}

/// `y[i] = x[i] + bias` for rows `x [rows, bias.len()]`.
pub fn add_bias<T: Float>(x: &[T], bias: &[T], y: &mut [T]) {
    let _span = profile::moves::<T>("add_bias", x.len(), 2);
    check("add_bias", x.len(), y.len());
    let n = bias.len();
    if n == 0 {
        return;
    }
    assert_eq!(x.len() % n, 0, "add_bias: {} elements are no rows of {n}", x.len());
    simd! { fn piece<T: Float>(x: &[T], bias: &[T], y: &mut [T]) {
        for (y, x) in y.chunks_exact_mut(bias.len()).zip(x.chunks_exact(bias.len())) {
            for ((y, x), b) in y.iter_mut().zip(x).zip(bias) {
                *y = T::from_f32(x.to_f32() + b.to_f32());
            }
        }
    } }
    rows(x, n, y, n, |_, x, y| piece(x, bias, y));
}
