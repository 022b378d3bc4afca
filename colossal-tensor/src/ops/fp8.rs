//! The products of a linear layer on numbers of 8 bits, summed in f32.
//!
//! Operands are rounded as they come, each scale from the largest magnitude under it (current scaling);
//! nothing else of a layer changes: what is kept for backward, the bias and the gradient of the weight are
//! in their own types, and masters are f32.

use colossal_kernels::{Float, Fp8, Fp8Scaling, fp8_pitch};

use crate::autograd::Accumulator;
use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::kernels::{self, Fp8Mat};
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::{View, ViewMut};

/// How the matrices of linear layers are rounded to 8 bits.
///
/// Scales are of what a rank holds. Where a plan cuts a matrix, each part has its own scales: results are
/// those of one rank but for the rounding, and with blocks the same where cuts fall between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8Recipe {
    /// A scale for each matrix; values in e4m3, gradients in e5m2 (Micikevicius et al., 2022).
    Tensor,
    /// e4m3 throughout; a scale for 128 elements of activations and gradients along the depth of the
    /// product, and for 128 x 128 of weights (DeepSeek-V3, 2024).
    Block,
}

type Rounding = (Fp8, Fp8Scaling);

impl Fp8Recipe {
    fn activations(self) -> Rounding {
        match self {
            Fp8Recipe::Tensor => (Fp8::E4m3, Fp8Scaling::Tensor),
            Fp8Recipe::Block => (Fp8::E4m3, Fp8Scaling::Rows),
        }
    }

    fn weights(self) -> Rounding {
        match self {
            Fp8Recipe::Tensor => (Fp8::E4m3, Fp8Scaling::Tensor),
            Fp8Recipe::Block => (Fp8::E4m3, Fp8Scaling::Blocks),
        }
    }

    fn gradients(self) -> Rounding {
        match self {
            Fp8Recipe::Tensor => (Fp8::E5m2, Fp8Scaling::Tensor),
            Fp8Recipe::Block => (Fp8::E4m3, Fp8Scaling::Rows),
        }
    }

    /// `y [m, n] = x [m, k] wᵀ + bias`.
    pub(crate) fn output<T: Float + Element>(
        self,
        [m, n, k]: [usize; 3],
        x: View<'_, T>,
        w: View<'_, T>,
        bias: Option<View<'_, T>>,
        y: ViewMut<'_, T>,
    ) -> Result<()> {
        let x = Rounded::new(x, [m, k], false, self.activations())?;
        let w = Rounded::new(w, [n, k], false, self.weights())?;
        kernels::gemm_fp8(x.mat(), w.mat(), bias, false, y)
    }

    /// `dx [m, k] = dy [m, n] w`, or `+=`.
    pub(crate) fn input_gradient<T: Float + Element>(
        self,
        [m, n, k]: [usize; 3],
        dy: View<'_, T>,
        w: View<'_, T>,
        accumulate: bool,
        dx: ViewMut<'_, T>,
    ) -> Result<()> {
        let dy = Rounded::new(dy, [m, n], false, self.gradients())?;
        let w = Rounded::new(w, [n, k], true, self.weights())?;
        kernels::gemm_fp8(dy.mat(), w.mat(), None, accumulate, dx)
    }

    /// `dw [n, k] += dyᵀ x`.
    pub(crate) fn weight_gradient<T: Float + Element>(
        self,
        [m, n, k]: [usize; 3],
        dy: View<'_, T>,
        x: View<'_, T>,
        dw: Accumulator<'_>,
    ) -> Result<()> {
        let dy = Rounded::new(dy, [m, n], true, self.gradients())?;
        let x = Rounded::new(x, [m, k], true, self.activations())?;
        kernels::gemm_fp8(dy.mat(), x.mat(), None, !dw.fresh, dw.sum)
    }
}

/// A matrix in 8 bits, with its scales.
struct Rounded {
    data: Buffer,
    scales: Buffer,
    rows: usize,
    cols: usize,
    rounding: Rounding,
}

impl Rounded {
    /// Of `x [rows, cols]`, or of its transpose.
    fn new<T: Float + Element>(
        x: View<'_, T>,
        [rows, cols]: [usize; 2],
        transposed: bool,
        rounding @ (format, scaling): Rounding,
    ) -> Result<Rounded> {
        let device = match x {
            View::Cpu(_) => Device::Cpu,
            View::Cuda(stream, _) => Device::Cuda(stream.clone()),
        };
        let [r, c] = if transposed { [cols, rows] } else { [rows, cols] };
        let mut data = Buffer::on(&device, r * fp8_pitch(c))?;
        let mut scales = Buffer::on(&device, scaling.count(r, c) * size_of::<f32>())?;
        let (to, scales_to) = (data.view_mut(), scales.view_mut());
        kernels::quantize_fp8(x, rows, cols, transposed, format, scaling, to, scales_to)?;
        Ok(Rounded { data, scales, rows: r, cols: c, rounding })
    }

    fn mat(&self) -> Fp8Mat<'_> {
        let (format, scaling) = self.rounding;
        let (data, scales) = (self.data.view(), self.scales.view());
        Fp8Mat { data, scales, rows: self.rows, cols: self.cols, format, scaling }
    }
}

/// Products that communicate have no form in 8 bits.
pub(super) fn refuse_elsewhere(weight: &Tensor) -> Result<()> {
    match weight.param().filter(|p| p.fp8().is_some()) {
        Some(param) => Err(Error::Param {
            name: param.name().into(),
            reason:
                "is multiplied in fp8, which products on a grid, a cube or a ring are not; use \
                     tensor parallelism on a line without overlap, or leave out fp8"
                    .into(),
        }),
        None => Ok(()),
    }
}
