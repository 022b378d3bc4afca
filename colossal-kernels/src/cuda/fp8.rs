//! Numbers of 8 bits: rounding, and products, by cuBLASLt where it knows them.

use super::blas::{self, Side};
use super::int8::Sides;
use super::launch::{Plain, resident};
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::float::Float;
use crate::fp8::{check_gemm, check_quantize};
use crate::{Fp8, Fp8Scaling, fp8_pitch};

pub(super) static FP8: Source = source!("fp8", "bytes");

/// A matrix in 8 bits: the twin of [`Fp8Mat`](crate::Fp8Mat).
#[derive(Debug, Clone, Copy)]
pub struct Fp8Mat<'a> {
    /// The numbers, rows of [`fp8_pitch`] bytes.
    pub data: Slice<'a, u8>,
    /// As many as [`Fp8Scaling::count`], row by row.
    pub scales: Slice<'a, f32>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The format.
    pub format: Fp8,
    /// What shares a scale.
    pub scaling: Fp8Scaling,
}

/// `Scales` of the kernels.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Scales {
    at: u64,
    shift: u32,
    row_stride: u32,
    step: u32,
    padding: u32,
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Operands {
    sides: Sides,
    scales: [Scales; 2],
    bias: u64,
    y: u64,
    e5m2: [u32; 2],
    accumulate: u64,
}

impl Fp8Mat<'_> {
    fn check(&self, what: &str) {
        let (bytes, scales) =
            (self.rows * fp8_pitch(self.cols), self.scaling.count(self.rows, self.cols));
        assert!(
            self.data.len() == bytes && self.scales.len() == scales,
            "{what}: [{}, {}] in fp8 takes {bytes} bytes and {scales} scales, not {} and {}",
            self.rows,
            self.cols,
            self.data.len(),
            self.scales.len()
        );
    }

    fn scales(&self) -> Scales {
        let [shift, row_step, step] = self.scaling.steps();
        Scales {
            at: self.scales.address(),
            shift: shift as u32,
            row_stride: (row_step * self.cols.div_ceil(128)) as u32,
            step: step as u32,
            padding: 0,
        }
    }

    fn name(&self) -> &'static str {
        match self.format {
            Fp8::E4m3 => "e4m3",
            Fp8::E5m2 => "e5m2",
        }
    }
}

/// Rounds `x [rows, cols]`, or its transpose: the twin of [`quantize_fp8`](crate::quantize_fp8).
///
/// # Panics
/// When lengths do not fit.
pub fn quantize_fp8<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    rows: usize,
    cols: usize,
    transposed: bool,
    format: Fp8,
    scaling: Fp8Scaling,
    q: SliceMut<'_, u8>,
    mut scales: SliceMut<'_, f32>,
) -> Result<()> {
    let sizes = [q.len(), scales.len()];
    let [r, c] = check_quantize(x.len(), [rows, cols], transposed, scaling, sizes);
    let types = [("TYPE", T::CUDA)];
    let kind = match scaling {
        Fp8Scaling::Tensor => 0u32,
        Fp8Scaling::Rows => 1,
        Fp8Scaling::Blocks => 2,
    };
    if kind == 0 {
        let n = x.len();
        let span = n.div_ceil(resident(stream)).next_multiple_of(1024).max(1024);
        let blocks = n.div_ceil(span);
        stream.with_scratch(blocks, |mut partials: SliceMut<'_, u32>| {
            let all = partials.reborrow();
            stream
                .function(&FP8, &types, "fp8_largest")?
                .launch(Grid::line(blocks, 256), args![x, n as u64, span as u64, all])?;
            stream.function(&FP8, &types, "fp8_scale")?.launch(
                Grid::line(1, 32),
                args![partials, blocks as u32, format.max(), scales.reborrow()],
            )
        })?;
    }
    let grid = Grid {
        blocks: [c.div_ceil(128) as u32, r.div_ceil(128) as u32, 1],
        threads: [256, 1, 1],
        shared: (128 * 129 * size_of::<T>()) as u32,
    };
    let sizes = [rows as u32, cols as u32, u32::from(transposed), u32::from(format == Fp8::E5m2)];
    let pitch = fp8_pitch(c) as u32;
    stream
        .function(&FP8, &types, "fp8_quantize")?
        .launch(grid, args![x, sizes[0], sizes[1], sizes[2], sizes[3], kind, q, pitch, scales])
}

/// The values of `a`, to a dense `[rows, cols]`.
///
/// # Panics
/// When lengths do not fit.
pub fn dequantize_fp8<T: Float>(stream: &Stream, a: Fp8Mat<'_>, y: SliceMut<'_, T>) -> Result<()> {
    a.check("dequantize_fp8");
    assert_eq!(y.len(), a.rows * a.cols, "dequantize_fp8: [{}, {}]", a.rows, a.cols);
    let f = stream.function(&FP8, &[("TYPE", T::CUDA)], "fp8_dequantize")?;
    let sizes = [a.rows, a.cols, fp8_pitch(a.cols)].map(|s| s as u32);
    let e5m2 = u32::from(a.format == Fp8::E5m2);
    f.launch(
        Grid::line(y.len().div_ceil(256), 256),
        args![a.data, sizes[0], sizes[1], sizes[2], e5m2, Plain(a.scales()), y],
    )
}

/// `y [m, n] = a bᵀ + bias`, or `y += …`: the twin of [`gemm_fp8`](crate::gemm_fp8). On the tensor cores' fp8 by cuBLASLt from
/// sm_89 on, if each operand has one scale; else by our own kernel, in f16.
///
/// # Panics
/// When sizes do not fit.
pub fn gemm_fp8<T: Float>(
    stream: &Stream,
    a: Fp8Mat<'_>,
    b: Fp8Mat<'_>,
    bias: Option<Slice<'_, T>>,
    accumulate: bool,
    y: SliceMut<'_, T>,
) -> Result<()> {
    a.check("gemm_fp8");
    b.check("gemm_fp8");
    check_gemm([a.rows, a.cols], [b.rows, b.cols], bias.map(|b| b.len()), y.len());
    let (sizes, pitch) = ([a.rows, b.rows, a.cols], fp8_pitch(a.cols));
    if y.is_empty() {
        return Ok(());
    }
    if a.scaling == Fp8Scaling::Tensor
        && b.scaling == Fp8Scaling::Tensor
        && stream.device().capability() >= (8, 9)
        && sizes.iter().all(|s| s % 16 == 0 && *s > 0)
        // It takes a bias of 16 bits only.
        && (bias.is_none() || T::NAME != "f32")
    {
        let side = |m: &Fp8Mat<'_>, transposed| Side {
            address: m.data.address(),
            stride: pitch,
            transposed,
        };
        let product = blas::Product {
            sizes,
            a: side(&a, false),
            b: side(&b, true),
            c: y.address(),
            c_stride: b.rows,
            alpha: 1.0,
            accumulate,
            bias: bias.map(|b| b.address()),
            scales: Some([a.scales.address(), b.scales.address()]),
            inputs: [a.name(), b.name()],
            output: T::NAME,
            batch: 1,
            strides: [0; 3],
        };
        if stream.product(&product)? {
            return Ok(());
        }
    }
    let operands = Operands {
        sides: Sides::new([a.data.address(), b.data.address()], [a.rows, b.rows, pitch]),
        scales: [a.scales(), b.scales()],
        bias: bias.map_or(0, |b| b.address()),
        y: y.address(),
        e5m2: [a.format, b.format].map(|f| u32::from(f == Fp8::E5m2)),
        accumulate: u64::from(accumulate),
    };
    let f = stream.function(&FP8, &[("TYPE", T::CUDA)], "fp8_product")?;
    f.launch(operands.sides.grid(), args![Plain(operands)])
}
