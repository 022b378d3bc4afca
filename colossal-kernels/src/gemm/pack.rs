//! Panels: `width` rows of a matrix, interleaved so that one step of depth is contiguous.

use half::bf16;

use super::Mat;
use super::micro::Kernel;
use crate::float::Float;
use crate::isa::simd;

/// Packs rows `first .. first + width` of `a` (zeros beyond its end) in the kernel's format.
pub(super) fn panel<T: Float>(kernel: &Kernel, a: Mat<'_, T>, first: usize, width: usize, out: &mut [f32]) {
    let rows = width.min(a.rows - first);
    let data = &a.data[(first * a.row_stride).min(a.data.len())..];
    if kernel.pairs {
        pairs(data, [rows, a.cols, a.row_stride, a.col_stride], width, out);
    } else if a.row_stride == 1 {
        across(data, [rows, a.cols, a.col_stride], width, out);
    } else if a.col_stride == 1 {
        along(data, [rows, a.cols, a.row_stride], width, out);
    } else {
        for (k, step) in out.chunks_exact_mut(width).enumerate().take(a.cols) {
            for (i, o) in step.iter_mut().enumerate() {
                *o = if i < rows { data[i * a.row_stride + k * a.col_stride].to_f32() } else { 0.0 };
            }
        }
    }
}

simd! {
    /// Rows are neighbours: each step is a copy.
    fn across<T: Float>(data: &[T], shape: [usize; 3], width: usize, out: &mut [f32]) {
        let [rows, depth, stride] = shape;
        for (k, step) in out.chunks_exact_mut(width).enumerate().take(depth) {
            let from = &data[k * stride..k * stride + rows];
            for (o, x) in step.iter_mut().zip(from) {
                *o = x.to_f32();
            }
            step[rows..].fill(0.0);
        }
    }
}

simd! {
    /// Rows are contiguous: a transposition, eight steps at a time so that reads use whole lines.
    fn along<T: Float>(data: &[T], shape: [usize; 3], width: usize, out: &mut [f32]) {
        let [rows, depth, stride] = shape;
        let whole = depth / 16 * 16;
        for i in 0..width {
            if i >= rows {
                (0..depth).for_each(|k| out[k * width + i] = 0.0);
                continue;
            }
            let row = &data[i * stride..i * stride + depth];
            for k in whole..depth {
                out[k * width + i] = row[k].to_f32();
            }
        }
        for k in (0..whole).step_by(16) {
            let block = &mut out[k * width..(k + 16) * width];
            for i in 0..rows {
                let row = &data[i * stride + k..i * stride + k + 16];
                for l in 0..16 {
                    block[l * width + i] = row[l].to_f32();
                }
            }
        }
    }
}

/// bf16 for `vdpbf16ps`: two steps of depth side by side in 32 bits.
fn pairs<T: Float>(data: &[T], shape: [usize; 4], width: usize, out: &mut [f32]) {
    let [rows, depth, row_stride, col_stride] = shape;
    let data: &[bf16] = bytemuck::cast_slice(data);
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    for (pair, step) in out.chunks_exact_mut(width).enumerate().take(depth.div_ceil(2)) {
        let k = 2 * pair;
        let at = |i: usize, k: usize| -> u32 {
            if k < depth { u32::from(data[i * row_stride + k * col_stride].to_bits()) } else { 0 }
        };
        for (i, o) in step[..rows].iter_mut().enumerate() {
            *o = at(i, k) | at(i, k + 1) << 16;
        }
        step[rows..].fill(0);
    }
}
