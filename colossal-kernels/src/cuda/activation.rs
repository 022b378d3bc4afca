//! Activations and their gradients.

use super::launch::vectors;
use super::{Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::float::Float;

pub(super) static ACTIVATION: Source = source!("activation");

macro_rules! activation {
    ($(#[$doc:meta])* $name:ident, $backward:ident) => {
        $(#[$doc])*
        pub fn $name<T: Float>(stream: &Stream, x: Slice<'_, T>, y: SliceMut<'_, T>) -> Result<()> {
            check(stringify!($name), x.len(), y.len());
            let f = stream.function(&ACTIVATION, &[("TYPE", T::CUDA)], stringify!($name))?;
            f.launch(vectors::<T>(x.len()), args![x, y, x.len() as u64])
        }

        #[doc = concat!(
            "Backward of [`", stringify!($name), "`], in place: `x` becomes its gradient `dy * f'(x)`, and \
             `dy` becomes `f(x)` once more."
        )]
        pub fn $backward<T: Float>(
            stream: &Stream,
            dy: SliceMut<'_, T>,
            x: SliceMut<'_, T>,
        ) -> Result<()> {
            check(stringify!($backward), dy.len(), x.len());
            let n = x.len();
            let f = stream.function(&ACTIVATION, &[("TYPE", T::CUDA)], stringify!($backward))?;
            f.launch(vectors::<T>(n), args![dy, x, n as u64])
        }
    };
}

activation! {
    /// `x * sigmoid(x)`.
    silu, silu_backward
}
activation! {
    /// `max(x, 0)`.
    relu, relu_backward
}
activation! {
    /// `x * Phi(x)` by the error function.
    gelu, gelu_backward
}
activation! {
    /// GELU by tanh.
    gelu_tanh, gelu_tanh_backward
}

/// `y = silu(gate) * up`.
pub fn swiglu<T: Float>(
    stream: &Stream,
    gate: Slice<'_, T>,
    up: Slice<'_, T>,
    y: SliceMut<'_, T>,
) -> Result<()> {
    check("swiglu", gate.len(), up.len());
    check("swiglu", gate.len(), y.len());
    let f = stream.function(&ACTIVATION, &[("TYPE", T::CUDA)], "swiglu")?;
    f.launch(vectors::<T>(y.len()), args![gate, up, y, y.len() as u64])
}

/// Backward of [`swiglu`], in place: `gate` and `up` become their gradients, and `dy` becomes
/// `silu(gate) * up` once more.
pub fn swiglu_backward<T: Float>(
    stream: &Stream,
    dy: SliceMut<'_, T>,
    gate: SliceMut<'_, T>,
    up: SliceMut<'_, T>,
) -> Result<()> {
    check("swiglu_backward", dy.len(), gate.len());
    check("swiglu_backward", dy.len(), up.len());
    let n = dy.len();
    let f = stream.function(&ACTIVATION, &[("TYPE", T::CUDA)], "swiglu_backward")?;
    f.launch(vectors::<T>(n), args![dy, gate, up, n as u64])
}
