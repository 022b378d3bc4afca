//! What happens to a product on its way out, and where it goes.

use super::Mat;
use super::micro::{Out, TILE};
use crate::activation::gelu_by_tanh;
use crate::float::Float;
use crate::isa::simd;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};
use crate::math::{erf, sigmoid};
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

/// What happens to a product on its way out: `c = silu(gate) * act(alpha * product + bias) + residual`
/// of what there is of it, or `c += …` with `accumulate`.
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// Factor of the product.
    pub alpha: f32,
    /// Add to what is there.
    pub accumulate: bool,
    /// Added to every row; one per column.
    pub bias: Option<&'a [T]>,
    /// Applied to the sum.
    pub activation: Activation,
    /// SwiGLU's other half, as large as c: the result is multiplied by `gate * sigmoid(gate)`.
    pub gate: Option<Mat<'a, T>>,
    /// Added last, as large as c.
    pub residual: Option<Mat<'a, T>>,
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        let (bias, gate, residual) = (None, None, None);
        let activation = Activation::None;
        Epilogue { alpha: 1.0, accumulate: false, bias, activation, gate, residual }
    }
}

impl<T> Epilogue<'_, T> {
    pub(super) fn is_plain(&self) -> bool {
        self.is_sum() && self.bias.is_none() && self.residual.is_none()
    }

    /// Nothing but sums: a product may be added to what the bias, the residual or c was before.
    pub(super) fn is_sum(&self) -> bool {
        self.alpha == 1.0 && self.activation == Activation::None && self.gate.is_none()
    }

    /// Do all operands fit a result of this size?
    pub(super) fn check(&self, rows: usize, cols: usize) {
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), cols, "gemm: bias has one element per column");
        }
        for (name, x) in [("gate", &self.gate), ("residual", &self.residual)] {
            let Some(x) = x else { continue };
            assert!(
                x.rows == rows && x.cols == cols && (x.col_stride == 1 || cols <= 1),
                "gemm: {name} [{}, {}] is not [{rows}, {cols}] with contiguous rows",
                x.rows,
                x.cols
            );
            x.check(name);
        }
    }
}

/// Asks for a line, which may be anywhere.
#[inline(always)]
fn fetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch may point anywhere.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Part of a row of an operand of the epilogue.
#[inline(always)]
fn part<'a, T>(x: &Option<Mat<'a, T>>, row: usize, col: usize, len: usize) -> Option<&'a [T]> {
    let x = x.as_ref()?;
    let at = row * x.row_stride + col;
    Some(&x.data[at..at + len])
}

/// Where results go, and what happens to them on the way.
pub(super) struct Sink<'a, O, E> {
    pub(super) data: Parts<O>,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
    pub(super) epilogue: Epilogue<'a, E>,
}

impl<'a, O: Float, E: Float> Sink<'a, O, E> {
    /// The part of c that starts at row and column.
    pub(super) fn from(&self, row: usize, col: usize) -> Sink<'a, O, E> {
        let at = row * self.row_stride + col * self.col_stride;
        let bias = self.epilogue.bias.map(|bias| &bias[col..]);
        let from = |x: Mat<'a, E>| Mat {
            data: &x.data[row * x.row_stride + col..],
            rows: x.rows - row,
            cols: x.cols - col,
            ..x
        };
        let [gate, residual] = [self.epilogue.gate, self.epilogue.residual].map(|x| x.map(from));
        Sink {
            data: self.data.part(at..self.data.len()),
            epilogue: Epilogue { bias, gate, residual, ..self.epilogue },
            ..*self
        }
    }

    /// Asks for what the epilogue reads for a tile, before it does: gate and residual lie in memory.
    #[inline(always)]
    pub(super) fn ask(&self, [row, col]: [usize; 2], [rows, cols]: [usize; 2]) {
        for x in [&self.epilogue.gate, &self.epilogue.residual].into_iter().flatten() {
            for i in row..(row + rows).min(x.rows) {
                let at = x.data.as_ptr().wrapping_add(i * x.row_stride + col);
                fetch(at);
                fetch(at.wrapping_add(cols - 1));
            }
        }
    }

    /// Where a tile of c starts and what is added to it, if the kernel may write it by itself; with
    /// `narrow`, as bf16 too. `room` is for what is added, unless that lies somewhere as f32.
    #[inline(always)]
    pub(super) fn direct(
        &self,
        [row, col]: [usize; 2],
        [rows, cols]: [usize; 2],
        narrow: bool,
        room: &mut [f32; TILE],
    ) -> Option<Out> {
        let (e, stride) = (&self.epilogue, self.row_stride);
        let narrow = narrow && O::NAME == "bf16";
        let adds = e.accumulate && !e.is_plain();
        if !(narrow || O::NAME == "f32") || self.col_stride != 1 || !e.is_sum() || adds {
            return None;
        }
        let at = row * stride + col;
        let end = at + (rows - 1) * stride + cols;
        let first = self.data.at(at..end).cast();
        let out = Out { narrow, ..Out::new(first, stride, e.accumulate) };
        let (plus, plus_stride) = match (&e.bias, &e.residual) {
            (None, None) if narrow && e.accumulate => {
                before(&self.data.part(at..end), stride, [rows, cols], room);
                (room.as_ptr(), cols)
            }
            (None, None) => return Some(out),
            (Some(bias), None) if E::NAME == "f32" => (bias[col..col + cols].as_ptr().cast(), 0),
            (None, Some(x)) if E::NAME == "f32" => {
                let at = row * x.row_stride + col;
                let tile = &x.data[at..at + (rows - 1) * x.row_stride + cols];
                (tile.as_ptr().cast(), x.row_stride)
            }
            (_, None) => {
                added(e, [row, col], [1, cols], room);
                (room.as_ptr(), 0)
            }
            (_, Some(_)) => {
                added(e, [row, col], [rows, cols], room);
                (room.as_ptr(), cols)
            }
        };
        Some(Out { plus, plus_stride, ..out })
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
        unsafe {
            let size = [rows, cols];
            store_rows(&self.epilogue, [row, col], size, tile, stride, out, self.row_stride);
        }
    }

    /// Writes part of a row, starting at column `col`.
    #[inline(always)]
    pub(super) fn store_row(&self, row: usize, col: usize, values: &[f32]) {
        let e = &self.epilogue;
        let at = row * self.row_stride + col * self.col_stride;
        if self.col_stride == 1 {
            // SAFETY: every element of c is stored by exactly one piece.
            let out = unsafe { self.data.range(at..at + values.len()) };
            return store(e, row, col, values, out);
        }
        for (j, v) in values.iter().enumerate() {
            let at = at + j * self.col_stride;
            // SAFETY: every element of c is stored by exactly one piece.
            let out = unsafe { self.data.range(at..at + 1) };
            store_body(e, row, col + j, std::slice::from_ref(v), out);
        }
    }
}

simd! {
    /// Bias, residual, or their sum, of a tile at row and column, dense.
    fn added<E: Float>(e: &Epilogue<'_, E>, at: [usize; 2], size: [usize; 2], out: &mut [f32]) {
        let ([row, col], [rows, cols]) = (at, size);
        let bias = e.bias.map(|bias| &bias[col..col + cols]);
        for (i, out) in out.chunks_exact_mut(cols).enumerate().take(rows) {
            match (bias, part(&e.residual, row + i, col, cols)) {
                (None, None) => out.fill(0.0),
                (Some(x), None) | (None, Some(x)) => {
                    out.iter_mut().zip(x).for_each(|(o, x)| *o = x.to_f32());
                }
                (Some(x), Some(y)) => {
                    let both = x.iter().zip(y);
                    out.iter_mut().zip(both).for_each(|(o, (x, y))| *o = x.to_f32() + y.to_f32());
                }
            }
        }
    }
}

simd! {
    /// What was in the rows of a tile, which belongs to this piece alone, dense.
    fn before<O: Float>(c: &Parts<O>, stride: usize, size: [usize; 2], out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(size[1]).enumerate().take(size[0]) {
            // SAFETY: nobody else reads or writes this part of the row.
            let row = unsafe { c.shared(i * stride..i * stride + size[1]) };
            out.iter_mut().zip(row).for_each(|(o, x)| *o = x.to_f32());
        }
    }
}

simd! {
    /// A contiguous part of a row, from column `col`.
    fn store<O: Float, E: Float>(e: &Epilogue<'_, E>, row: usize, col: usize, values: &[f32], out: &mut [O]) {
        store_body(e, row, col, values, out);
    }
}

#[inline(always)]
fn store_body<O: Float, E: Float>(
    e: &Epilogue<'_, E>,
    row: usize,
    col: usize,
    values: &[f32],
    out: &mut [O],
) {
    if e.is_plain() {
        return write(e.accumulate, values, out);
    }
    const ROOM: usize = 64;
    let mut room = [0.0f32; ROOM];
    for (i, (values, out)) in values.chunks(ROOM).zip(out.chunks_mut(ROOM)).enumerate() {
        let y = &mut room[..values.len()];
        finish(e, row, col + i * ROOM, values, y);
        write(e.accumulate, y, out);
    }
}

#[inline(always)]
fn write<O: Float>(accumulate: bool, values: &[f32], out: &mut [O]) {
    if accumulate {
        out.iter_mut().zip(values).for_each(|(o, v)| *o = O::from_f32(o.to_f32() + v));
    } else {
        out.iter_mut().zip(values).for_each(|(o, v)| *o = O::from_f32(*v));
    }
}

/// As [`store`] for every row of a tile, in one call.
///
/// # Safety
/// `out` leads to `rows` rows of `cols` elements, `row_stride` apart, that are the caller's alone.
#[inline(always)]
unsafe fn store_rows<O: Float, E: Float>(
    e: &Epilogue<'_, E>,
    [row, col]: [usize; 2],
    size: [usize; 2],
    tile: &[f32],
    stride: usize,
    out: *mut O,
    row_stride: usize,
) {
    #[cfg(target_arch = "x86_64")]
    if O::NAME == "bf16"
        && isa() == Isa::Avx512Bf16
        && e.is_sum()
        && !e.accumulate
        && E::NAME == "bf16"
    {
        assert!(tile.len() >= (size[0] - 1) * stride + size[1]);
        let bias = e.bias.map(|b| bytemuck::cast_slice(&b[col..col + size[1]]));
        for (i, tile) in tile.chunks(stride).enumerate().take(size[0]) {
            let residual = part(&e.residual, row + i, col, size[1]).map(bytemuck::cast_slice);
            // SAFETY: isa() has found these instructions; the row by contract and the assertion.
            unsafe { store_bf16(&tile[..size[1]], bias, residual, out.add(i * row_stride).cast()) };
        }
        return;
    }
    struct Rows<O>(*mut O);
    simd! { fn all<O: Float, E: Float>(e: &Epilogue<'_, E>, at: [usize; 2], size: [usize; 2], tile: &[f32], stride: usize, out: Rows<O>, row_stride: usize) {
        for i in 0..size[0] {
            // SAFETY: by the contract of the function around.
            let out = unsafe { std::slice::from_raw_parts_mut(out.0.add(i * row_stride), size[1]) };
            store_body(e, at[0] + i, at[1], &tile[i * stride..i * stride + size[1]], out);
        }
    } }
    all(e, [row, col], size, tile, stride, Rows(out), row_stride);
}

/// Rounds a row of a tile, plus bias and residual, to bf16.
///
/// # Safety
/// AVX-512 BF16; `out` leads to as many elements; bias and residual have as many.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn store_bf16(row: &[f32], bias: Option<&[u16]>, residual: Option<&[u16]>, out: *mut i16) {
    use std::arch::x86_64::*;
    for j in (0..row.len()).step_by(16) {
        let mask = (u32::MAX >> (32 - (row.len() - j).min(16))) as u16;
        // SAFETY: masked to the row, as which the others are as long by contract.
        unsafe {
            let mut x = _mm512_maskz_loadu_ps(mask, row.as_ptr().add(j));
            for more in [bias, residual].into_iter().flatten() {
                let bits = _mm256_maskz_loadu_epi16(mask, more.as_ptr().add(j).cast());
                let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits));
                x = _mm512_add_ps(x, _mm512_castsi512_ps(wide));
            }
            let y: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(x));
            _mm256_mask_storeu_epi16(out.add(j), mask, y);
        }
    }
}

#[inline(always)]
fn each(y: &mut [f32], f: impl Fn(f32) -> f32) {
    y.iter_mut().for_each(|y| *y = f(*y));
}

/// `y` is what becomes of part of a row of the product; one pass for each thing that there is.
#[inline(always)]
fn finish<E: Float>(e: &Epilogue<'_, E>, row: usize, col: usize, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = e.alpha * x;
    }
    if let Some(bias) = e.bias {
        y.iter_mut().zip(&bias[col..]).for_each(|(y, b)| *y += b.to_f32());
    }
    match e.activation {
        Activation::None => {}
        Activation::Relu => each(y, |x| x.max(0.0)),
        Activation::Silu => each(y, |x| x * sigmoid::<f32>(x)),
        Activation::Gelu => each(y, |x| 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2))),
        Activation::GeluTanh => each(y, gelu_by_tanh::<f32>),
    }
    if let Some(gate) = part(&e.gate, row, col, x.len()) {
        y.iter_mut().zip(gate).for_each(|(y, g)| *y *= g.to_f32() * sigmoid::<f32>(g.to_f32()));
    }
    if let Some(residual) = part(&e.residual, row, col, x.len()) {
        y.iter_mut().zip(residual).for_each(|(y, r)| *y += r.to_f32());
    }
}
