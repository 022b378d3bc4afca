//! Sums and products, element by element.

use super::launch::vectors;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::float::Float;

pub(super) static ELEMENTWISE: Source = source!("elementwise");

macro_rules! binary {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub fn $name<T: Float>(
            stream: &Stream,
            a: Slice<'_, T>,
            b: Slice<'_, T>,
            y: SliceMut<'_, T>,
        ) -> Result<()> {
            check(stringify!($name), a.len(), b.len());
            check(stringify!($name), a.len(), y.len());
            let f = stream.function(&ELEMENTWISE, &[("TYPE", T::CUDA)], stringify!($name))?;
            f.launch(vectors::<T>(a.len()), args![a, b, y, a.len() as u64])
        }
    };
}

binary! {
    /// `y = a + b`.
    add
}
binary! {
    /// `y = a - b`.
    sub
}
binary! {
    /// `y = a * b`.
    mul
}

/// `y = s x`.
pub fn scale<T: Float>(stream: &Stream, x: Slice<'_, T>, s: f32, y: SliceMut<'_, T>) -> Result<()> {
    check("scale", x.len(), y.len());
    let f = stream.function(&ELEMENTWISE, &[("TYPE", T::CUDA)], "scale")?;
    f.launch(vectors::<T>(x.len()), args![x, s, y, x.len() as u64])
}

/// `y = value` everywhere.
pub fn fill<T: Float>(stream: &Stream, y: SliceMut<'_, T>, value: T) -> Result<()> {
    let f = stream.function(&ELEMENTWISE, &[("TYPE", T::CUDA)], "fill")?;
    f.launch(vectors::<T>(y.len()), args![y, value.to_f32(), y.len() as u64])
}

/// `y += x`.
pub fn add_assign<T: Float>(stream: &Stream, x: Slice<'_, T>, y: SliceMut<'_, T>) -> Result<()> {
    axpy(stream, 1.0, x, y)
}

/// `y += a x`.
pub fn axpy<T: Float>(stream: &Stream, a: f32, x: Slice<'_, T>, y: SliceMut<'_, T>) -> Result<()> {
    check("axpy", x.len(), y.len());
    let f = stream.function(&ELEMENTWISE, &[("TYPE", T::CUDA)], "axpy")?;
    f.launch(vectors::<T>(x.len()), args![a, x, y, x.len() as u64])
}

/// `y += x` into an f32 accumulator.
pub fn add_into<T: Float>(stream: &Stream, x: Slice<'_, T>, y: SliceMut<'_, f32>) -> Result<()> {
    check("add_into", x.len(), y.len());
    let f = stream.function(&ELEMENTWISE, &[("TYPE", T::CUDA)], "add_into")?;
    f.launch(vectors::<T>(x.len()), args![x, y, x.len() as u64])
}

/// `y[i] = x[i] + bias` for rows `x [rows, bias.len()]`.
pub fn add_bias<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    bias: Slice<'_, T>,
    y: SliceMut<'_, T>,
) -> Result<()> {
    check("add_bias", x.len(), y.len());
    let n = bias.len();
    if n == 0 {
        return Ok(());
    }
    assert_eq!(x.len() % n, 0, "add_bias: {} elements are no rows of {n}", x.len());
    let f = stream.function(&ELEMENTWISE, &[("TYPE", T::CUDA)], "add_bias")?;
    f.launch(vectors::<T>(x.len()), args![x, bias, y, n as u32, x.len() as u64])
}
