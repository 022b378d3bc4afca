//! What happens to a product on its way out, and where it goes.

use crate::float::Float;
use crate::isa::simd;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};
use crate::math::{erf, sigmoid, tanh};
use crate::threads::Parts;

/// Applied to a value on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// GELU by the error function.
    Gelu,
    /// GELU by tanh.
    GeluTanh,
    /// `x * sigmoid(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

/// What happens to a product on its way out: `c = act(alpha * product + bias)`, or
/// `c += act(…)` with `accumulate`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// Factor of the product.
    pub alpha: f32,
    /// Add to what is there.
    pub accumulate: bool,
    /// Added to every row; one per column.
    pub bias: Option<&'a [T]>,
    /// Applied last.
    pub activation: Activation,
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Epilogue { alpha: 1.0, accumulate: false, bias: None, activation: Activation::None }
    }
}

impl<T> Epilogue<'_, T> {
    pub(super) fn is_plain(&self) -> bool {
        self.is_sum() && self.bias.is_none()
    }

    /// Nothing but sums: a product may be added to what the bias, or c, was before.
    pub(super) fn is_sum(&self) -> bool {
        self.alpha == 1.0 && self.activation == Activation::None
    }
}

/// Where results go, and what happens to them on the way.
pub(super) struct Sink<'a, O, E> {
    pub(super) data: Parts<O>,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    pub(super) epilogue: Epilogue<'a, E>,
}

impl<O: Float, E: Float> Sink<'_, O, E> {
    /// The part of c that starts at row and column.
    pub(super) fn from(&self, row: usize, col: usize) -> Sink<'_, O, E> {
        let at = row * self.row_stride + col * self.col_stride;
        let bias = self.epilogue.bias.map(|bias| &bias[col..]);
        Sink {
            data: self.data.part(at..self.data.len()),
            epilogue: Epilogue { bias, ..self.epilogue },
            ..*self
        }
    }

    /// Where a tile of c starts, if the kernel may write it by itself, and whether it adds to what
    /// is there: the bias, by then, if there is one.
    #[inline(always)]
    pub(super) fn direct(
        &self,
        row: usize,
        col: usize,
        [rows, cols]: [usize; 2],
    ) -> Option<(*mut f32, bool)> {
        let e = &self.epilogue;
        if O::NAME != "f32" || self.col_stride != 1 || !e.is_sum() {
            return None;
        }
        let at = row * self.row_stride + col;
        let c: *mut f32 = self.data.at(at..at + (rows - 1) * self.row_stride + cols).cast();
        let Some(bias) = e.bias else { return Some((c, e.accumulate)) };
        if e.accumulate || E::NAME != "f32" {
            return None;
        }
        let bias: &[f32] = bytemuck::cast_slice(&bias[col..col + cols]);
        for i in 0..rows {
            // SAFETY: rows of the tile are in bounds and belong to this piece alone.
            unsafe { c.add(i * self.row_stride).copy_from_nonoverlapping(bias.as_ptr(), cols) };
        }
        Some((c, true))
    }

    /// Writes a tile, whose rows lie `stride` apart, at `(row, col)` of c.
    #[inline(always)]
    pub(super) fn store_tile(
        &self,
        [row, col]: [usize; 2],
        [rows, cols]: [usize; 2],
        tile: &[f32],
        stride: usize,
    ) {
        if self.col_stride != 1 {
            for i in 0..rows {
                self.store_row(row + i, col, &tile[i * stride..i * stride + cols]);
            }
            return;
        }
        let at = row * self.row_stride + col;
        let out = self.data.at(at..at + (rows - 1) * self.row_stride + cols);
        // SAFETY: rows of the tile are in bounds and belong to this piece alone.
        unsafe { store_rows(&self.epilogue, col, [rows, cols], tile, stride, out, self.row_stride) }
    }

    /// Writes part of a row, starting at column `col`.
    #[inline(always)]
    pub(super) fn store_row(&self, row: usize, col: usize, values: &[f32]) {
        let e = &self.epilogue;
        let at = row * self.row_stride + col * self.col_stride;
        if self.col_stride == 1 {
            // SAFETY: every element of c is stored by exactly one piece.
            let out = unsafe { self.data.range(at..at + values.len()) };
            return store(e, col, values, out);
        }
        for (j, v) in values.iter().enumerate() {
            let at = at + j * self.col_stride;
            // SAFETY: every element of c is stored by exactly one piece.
            let out = unsafe { self.data.range(at..at + 1) };
            let y = finish(e, *v, col + j);
            out[0] = O::from_f32(if e.accumulate { out[0].to_f32() + y } else { y });
        }
    }
}

simd! {
    /// A contiguous part of a row, from column `col`.
    fn store<O: Float, E: Float>(e: &Epilogue<'_, E>, col: usize, values: &[f32], out: &mut [O]) {
        store_body(e, col, values, out);
    }
}

#[inline(always)]
fn store_body<O: Float, E: Float>(e: &Epilogue<'_, E>, col: usize, values: &[f32], out: &mut [O]) {
    if e.is_plain() {
        if e.accumulate {
            out.iter_mut().zip(values).for_each(|(o, v)| *o = O::from_f32(o.to_f32() + v));
        } else {
            out.iter_mut().zip(values).for_each(|(o, v)| *o = O::from_f32(*v));
        }
        return;
    }
    for (j, (o, v)) in out.iter_mut().zip(values).enumerate() {
        let y = finish(e, *v, col + j);
        *o = O::from_f32(if e.accumulate { o.to_f32() + y } else { y });
    }
}

/// As [`store`] for every row of a tile, in one call.
///
/// # Safety
/// `out` leads to `rows` rows of `cols` elements, `row_stride` apart, that are the caller's alone.
#[inline(always)]
unsafe fn store_rows<O: Float, E: Float>(
    e: &Epilogue<'_, E>,
    col: usize,
    size: [usize; 2],
    tile: &[f32],
    stride: usize,
    out: *mut O,
    row_stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if O::NAME == "bf16"
        && isa() == Isa::Avx512Bf16
        && (Epilogue { bias: None, ..*e }).is_plain()
        && !e.accumulate
        && (e.bias.is_none() || E::NAME == "bf16")
    {
        assert!(tile.len() >= (size[0] - 1) * stride + size[1]);
        let bias = e.bias.map(|b| bytemuck::cast_slice(&b[col..col + size[1]]));
        // SAFETY: isa() has found these instructions; the rest by contract and the assertion.
        return unsafe { store_bf16(size, tile.as_ptr(), stride, bias, out.cast(), row_stride) };
    }
    struct Rows<O>(*mut O);
    simd! { fn all<O: Float, E: Float>(e: &Epilogue<'_, E>, col: usize, size: [usize; 2], tile: &[f32], stride: usize, out: Rows<O>, row_stride: usize) {
        for i in 0..size[0] {
            // SAFETY: by the contract of the function around.
            let row = unsafe { std::slice::from_raw_parts_mut(out.0.add(i * row_stride), size[1]) };
            store_body(e, col, &tile[i * stride..i * stride + size[1]], row);
        }
    } }
    all(e, col, size, tile, stride, Rows(out), row_stride);
}

/// Rounds rows of a tile, plus a bias, to bf16.
///
/// # Safety
/// AVX-512 BF16; `tile` has `rows` rows of `cols` floats, `stride` apart, `out` as many elements;
/// `bias` has `cols`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn store_bf16(
    [rows, cols]: [usize; 2],
    tile: *const f32,
    stride: usize,
    bias: Option<&[u16]>,
    out: *mut i16,
    row_stride: usize,
) {
    use std::arch::x86_64::*;
    for j in (0..cols).step_by(16) {
        let mask = (u32::MAX >> (32 - (cols - j).min(16))) as u16;
        let bias = bias.map_or(_mm512_setzero_ps(), |bias| {
            // SAFETY: masked to the row, which is in bounds by contract.
            let bits = unsafe { _mm256_maskz_loadu_epi16(mask, bias.as_ptr().add(j).cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        });
        for i in 0..rows {
            // SAFETY: as above.
            unsafe {
                let x = _mm512_maskz_loadu_ps(mask, tile.add(i * stride + j));
                let x = _mm512_add_ps(x, bias);
                let y: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(x));
                _mm256_mask_storeu_epi16(out.add(i * row_stride + j), mask, y);
            }
        }
    }
}

#[inline(always)]
fn finish<E: Float>(e: &Epilogue<'_, E>, v: f32, col: usize) -> f32 {
    let x = e.alpha * v + e.bias.map_or(0.0, |b| b[col].to_f32());
    match e.activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + tanh(0.797_884_6 * (x + 0.044_715 * x * x * x))),
    }
}
