//! Elementwise arithmetic and activations. Shapes are equal; there is no broadcasting.

use super::{produce, same_dtype, same_shape};
use crate::autograd::{Like, record};
use crate::dtype::{Dtype, float};
use crate::error::Result;
use crate::kernels;
use crate::propagate::{self, propagate};
use crate::tensor::Tensor;

/// `y = f(x)` and `dx = f'(x) dy`, by kernels of that name.
macro_rules! activation {
    ($(#[$doc:meta])* $name:ident, $backward:ident) => {
        $(#[$doc])*
        pub fn $name(&self) -> Result<Tensor> {
            let op = stringify!($name);
            let layout = propagate(op, &[self], propagate::elementwise)?;
            let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
                float!(op, self.dtype(), T => {
                    kernels::$name(self.lend::<T>()?.view::<T>(), y.view_mut::<T>())
                })
            })?;
            let (x, again, layout) = (self.detach(), self.detach(), y.layout());
            Ok(record(op, y, &[self], move |dy, back| {
                let (like, dtype) = (Like::of(&x), x.dtype());
                let (mut dy, mut x) = (dy.into_buffer()?, x.into_buffer()?);
                float!(op, dtype, T => {
                    kernels::$backward::<T>(dy.view_mut(), x.view_mut())
                })?;
                back.remake(|| like.value(dy, layout));
                back.give(0, like.gradient(x))
            })
            .remade_by(move || again.$name()))
        }
    };
}

impl Tensor {
    /// `self + other`.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        let y = self.combine("add", other, true)?;
        Ok(record("add", y, &[self, other], |dy, back| {
            back.give(1, dy.clone())?;
            back.give(0, dy)
        }))
    }

    /// `self - other`.
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        self.add(&other.scale(-1.0)?)
    }

    /// `self * other`, element by element.
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        let y = self.combine("mul", other, false)?;
        let (a, b) = (self.detach(), other.detach());
        Ok(record("mul", y, &[self, other], move |dy, back| {
            // The gradient has the dual layout, under which the product rule needs no check.
            let times = |other: &Tensor| {
                let like = other.rewrap(other.shape(), dy.layout(), 0, crate::autograd::Edge::None);
                dy.binary(&like, false, dy.layout())
            };
            if back.wants(0) {
                back.give(0, times(&b)?)?;
            }
            if back.wants(1) {
                back.give(1, times(&a)?)?;
            }
            Ok(())
        }))
    }

    /// `self * factor`.
    pub fn scale(&self, factor: f32) -> Result<Tensor> {
        let y = produce(self.scope(), self.shape(), self.dtype(), self.layout(), |y| {
            float!("scale", self.dtype(), T => {
                kernels::scale(self.lend::<T>()?.view::<T>(), factor, y.view_mut::<T>())
            })
        })?;
        Ok(record("scale", y, &[self], move |dy, back| back.give(0, dy.scale(factor)?)))
    }

    activation! {
        /// `x * sigmoid(x)`.
        silu, silu_backward
    }
    activation! {
        /// GELU by the error function (BERT, ViT).
        gelu, gelu_backward
    }
    activation! {
        /// GELU by the tanh approximation (GPT-2's `gelu_new`).
        gelu_tanh, gelu_tanh_backward
    }
    activation! {
        /// `max(x, 0)`.
        relu, relu_backward
    }

    /// SwiGLU's gate: `silu(self) * up`.
    pub fn swiglu(&self, up: &Tensor) -> Result<Tensor> {
        same_shape("swiglu", self, up)?;
        same_dtype("swiglu", self, up)?;
        let layout = propagate("swiglu", &[self, up], propagate::elementwise)?;
        let y = produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("swiglu", self.dtype(), T => {
                let (gate, up) = (self.lend::<T>()?, up.lend::<T>()?);
                kernels::swiglu(gate.view::<T>(), up.view::<T>(), y.view_mut::<T>())
            })
        })?;
        let (gate, kept_up, layout) = (self.detach(), up.detach(), y.layout());
        let again = (gate.clone(), kept_up.clone());
        Ok(record("swiglu", y, &[self, up], move |dy, back| {
            let (like, dtype, dual) = (Like::of(&gate), gate.dtype(), dy.layout());
            let (mut dy, mut gate, mut up) =
                (dy.into_buffer()?, gate.into_buffer()?, kept_up.into_buffer()?);
            float!("swiglu", dtype, T => {
                kernels::swiglu_backward::<T>(dy.view_mut(), gate.view_mut(), up.view_mut())
            })?;
            back.remake(|| like.value(dy, layout));
            back.give(1, like.value(up, dual))?;
            back.give(0, like.value(gate, dual))
        })
        .remade_by(move || again.0.swiglu(&again.1)))
    }

    /// The same values in another float type; the gradient is cast back.
    pub fn to_dtype(&self, dtype: Dtype) -> Result<Tensor> {
        let from = self.dtype();
        if dtype == from {
            return Ok(self.clone());
        }
        let y = produce(self.scope(), self.shape(), dtype, self.layout(), |y| {
            float!("to_dtype", from, A => {
                let x = self.lend::<A>()?;
                float!("to_dtype", dtype, B => {
                    kernels::cast(x.view::<A>(), y.view_mut::<B>())
                })
            })
        })?;
        Ok(record("to_dtype", y, &[self], move |dy, back| back.give(0, dy.to_dtype(from)?)))
    }

    fn combine(&self, op: &'static str, other: &Tensor, sum: bool) -> Result<Tensor> {
        same_shape(op, self, other)?;
        same_dtype(op, self, other)?;
        let layout = match sum {
            true => propagate(op, &[self, other], propagate::linear_elementwise)?,
            false => propagate(op, &[self, other], propagate::elementwise)?,
        };
        self.binary(other, sum, layout)
    }

    fn binary(
        &self,
        other: &Tensor,
        sum: bool,
        layout: crate::placement::Layout,
    ) -> Result<Tensor> {
        produce(self.scope(), self.shape(), self.dtype(), layout, |y| {
            float!("add", self.dtype(), T => {
                let (a, b) = (self.lend::<T>()?, other.lend::<T>()?);
                let (a, b, y) = (a.view::<T>(), b.view::<T>(), y.view_mut::<T>());
                if sum { kernels::add(a, b, y) } else { kernels::mul(a, b, y) }
            })
        })
    }

    /// `self + other` for gradients that meet: in place where one of them is seen by nobody else.
    pub(crate) fn add_consuming(self, other: Tensor) -> Result<Tensor> {
        let (scope, shape) = (self.scope().clone(), self.shape().to_vec());
        let (dtype, layout) = (self.dtype(), self.layout());
        let (mut buffer, other) = match (self.into_unique(), other) {
            (Ok(buffer), other) => (buffer, other),
            (Err(shared), other) => match other.into_unique() {
                Ok(buffer) => (buffer, shared),
                Err(other) => return shared.add(&other),
            },
        };
        float!("add", dtype, T => {
            kernels::add_assign(other.lend::<T>()?.view::<T>(), buffer.view_mut::<T>())
        })?;
        Ok(Tensor::wrap(&scope, buffer, &shape, dtype, layout))
    }
}

impl std::ops::Add for &Tensor {
    type Output = Result<Tensor>;
    fn add(self, other: &Tensor) -> Result<Tensor> {
        Tensor::add(self, other)
    }
}

impl std::ops::Mul for &Tensor {
    type Output = Result<Tensor>;
    fn mul(self, other: &Tensor) -> Result<Tensor> {
        Tensor::mul(self, other)
    }
}
