//! Panels: `width` rows of a matrix, interleaved so that one step of depth is contiguous.

#[cfg(target_arch = "x86_64")]
mod avx2;

use half::bf16;

use super::Mat;
use super::micro::Kernel;
use crate::float::Float;
use crate::isa::simd;

/// `a` in words of a step each, if the kernel can read it where it lies: contiguous rows of which a
/// tile does not crowd into few sets of the first-level cache.
pub(super) fn in_place<'a, T: Float>(kernel: &Kernel, a: &Mat<'a, T>) -> Option<Mat<'a, f32>> {
    let each = if kernel.pairs { 2 } else { 1 };
    if !kernel.in_place || size_of::<T>() * each != size_of::<f32>() || a.col_stride != 1 {
        return None;
    }
    let whole = a.cols.is_multiple_of(each) && a.row_stride.is_multiple_of(each);
    let stride = a.row_stride / each;
    // 64 sets of 64 bytes, in which a panel of b needs a place too.
    let mut lines = [0u8; 64];
    for row in 0..kernel.mr {
        lines[row * stride * size_of::<f32>() / 64 % 64] += 1;
    }
    if !whole || lines.iter().any(|n| *n > 7) {
        return None;
    }
    let data = bytemuck::try_cast_slice(&a.data[..a.data.len() / each * each]).ok()?;
    Some(Mat { data, rows: a.rows, cols: a.cols / each, row_stride: stride, col_stride: 1 })
}

/// The columns of `b`, which are the rows of `x`, if the kernel can read them where they lie: whole panels of whole
/// lines, of which the second-level cache keeps one while it is read.
pub(super) fn columns_in_place<'a, T: Float>(kernel: &Kernel, x: &Mat<'a, T>) -> Option<&'a [f32]> {
    let stride = x.col_stride;
    if !kernel.columns_in_place || T::NAME != "f32" || x.row_stride != 1 {
        return None;
    }
    let whole = x.rows.is_multiple_of(kernel.nr) && stride.is_multiple_of(LINE);
    if !whole || x.cols == 0 || !x.data.as_ptr().addr().is_multiple_of(size_of::<[f32; LINE]>()) {
        return None;
    }
    // Steps so far apart as a power of two crowd into few sets: they may take half of the lines of each.
    let sets = SETS >> (stride / LINE).trailing_zeros().min(SETS.ilog2());
    (x.cols <= WAYS / 2 * sets).then(|| bytemuck::cast_slice(x.data))
}

/// Sets of a second-level cache of 1 MiB …
const SETS: usize = 1024;
/// … and the lines of each.
const WAYS: usize = 16;

/// Packs rows of `a` from `first` on as panels of `width` rows that start `apart` floats from each
/// other, as many as `out` holds, in the kernel's format; zeros beyond the last row.
pub(super) fn panels<T: Float>(
    kernel: &Kernel,
    a: Mat<'_, T>,
    first: usize,
    width: usize,
    apart: usize,
    out: &mut [f32],
) {
    if neighbours::fit(kernel, &a, width) {
        let rows = (a.rows - first).min(out.len() / apart * width);
        return neighbours::panels(kernel, a, first..first + rows, width, apart, out);
    }
    #[cfg(target_arch = "x86_64")]
    if avx2::fits(&a, width) {
        let rows = (a.rows - first).min(out.len() / apart * width);
        return avx2::panels(a, first..first + rows, width, apart, out);
    }
    let size = kernel.panel(width, a.cols);
    for (p, out) in out.chunks_exact_mut(apart).enumerate() {
        panel(kernel, a, first + p * width, width, &mut out[..size]);
    }
}

/// How far apart panels of `size` floats start: some lines more than they take, for many panels of whole pages would
/// crowd into few sets of the caches.
pub(super) fn apart(size: usize) -> usize {
    size.next_multiple_of(LINE) + 5 * LINE
}

/// Floats of a line.
const LINE: usize = 16;

/// One panel.
pub(crate) fn panel<T: Float>(
    kernel: &Kernel,
    a: Mat<'_, T>,
    first: usize,
    width: usize,
    out: &mut [f32],
) {
    let rows = width.min(a.rows - first);
    if neighbours::fit(kernel, &a, width) {
        return neighbours::panels(kernel, a, first..first + rows, width, 0, out);
    }
    #[cfg(target_arch = "x86_64")]
    if avx2::fits(&a, width) {
        return avx2::panels(a, first..first + rows, width, 0, out);
    }
    let data = &a.data[(first * a.row_stride).min(a.data.len())..];
    if kernel.pairs {
        pairs(data, [rows, a.cols, a.row_stride, a.col_stride], width, out);
    } else if a.row_stride == 1 {
        across(data, [rows, a.cols, a.col_stride], width, out);
    } else if a.col_stride == 1 && T::NAME == "f32" && transpose::fits() {
        transpose::rows(data, [rows, a.cols, a.row_stride], width, out);
    } else if a.col_stride == 1 {
        along(data, [rows, a.cols, a.row_stride], width, out);
    } else {
        for (k, step) in out.chunks_exact_mut(width).enumerate().take(a.cols) {
            for (i, o) in step.iter_mut().enumerate() {
                *o =
                    if i < rows { data[i * a.row_stride + k * a.col_stride].to_f32() } else { 0.0 };
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
    if row_stride == 1 {
        let bits: &[u16] = bytemuck::cast_slice(data);
        return pairs_across(bits, [rows, depth, col_stride], width, bytemuck::cast_slice_mut(out));
    }
    // Contiguous rows: whole pairs are 32-bit words to transpose; an odd last step is left.
    let done = match col_stride {
        1 if transpose::fits() => {
            transpose::rows(data, [rows, depth / 2, row_stride], width, out);
            depth / 2
        }
        _ => 0,
    };
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    for (pair, step) in out.chunks_exact_mut(width).enumerate().take(depth.div_ceil(2)).skip(done) {
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

simd! {
    /// Rows are neighbours: two steps are interleaved.
    fn pairs_across(data: &[u16], shape: [usize; 3], width: usize, out: &mut [u32]) {
        let [rows, depth, stride] = shape;
        for (pair, step) in out.chunks_exact_mut(width).enumerate().take(depth.div_ceil(2)) {
            let at = 2 * pair * stride;
            let low = &data[at..at + rows];
            if 2 * pair + 1 < depth {
                let high = &data[at + stride..at + stride + rows];
                for ((o, l), h) in step.iter_mut().zip(low).zip(high) {
                    *o = u32::from(*l) | u32::from(*h) << 16;
                }
            } else {
                for (o, l) in step.iter_mut().zip(low) {
                    *o = u32::from(*l);
                }
            }
            step[rows..].fill(0);
        }
    }
}

/// Transposition of 32-bit words in registers, sixteen by sixteen.
mod transpose {
    use crate::isa::{Isa, isa};

    /// Has this machine the registers, and may they be used?
    pub(super) fn fits() -> bool {
        isa() >= Isa::Avx512
    }

    /// `out[k * width + i] = word k of row i` for `k < depth`, zeros for rows beyond the last.
    /// Rows of 32-bit words lie `stride` elements of `T` apart.
    pub(super) fn rows<T: bytemuck::Pod>(
        data: &[T],
        [rows, depth, stride]: [usize; 3],
        width: usize,
        out: &mut [f32],
    ) {
        assert!(out.len() >= width * depth && rows <= width && super::stores(width));
        if rows == 0 || depth == 0 {
            return out[..width * depth].fill(0.0);
        }
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let stride = stride * size_of::<T>();
        assert!((rows - 1) * stride + 4 * depth <= bytes.len());
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `fits` was asked before; rows and panel are in bounds by the assertions.
        unsafe {
            words(bytes.as_ptr(), [rows, depth, stride], width, out.as_mut_ptr());
        }
    }

    /// # Safety
    /// AVX-512F; `rows` rows of `depth` words, `stride` bytes apart; room for `depth * width`.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn words(data: *const u8, shape: [usize; 3], width: usize, out: *mut f32) {
        use std::arch::x86_64::*;
        let [rows, depth, stride] = shape;
        for k in (0..depth).step_by(16) {
            for first in (0..width).step_by(16) {
                let steps = (depth - k).min(16);
                let loaded = (u32::MAX >> (32 - steps)) as u16;
                let mut r = [_mm512_setzero_ps(); 16];
                for (i, r) in r.iter_mut().enumerate() {
                    if first + i < rows {
                        // SAFETY: masked to the words of the row, which are in bounds.
                        *r = unsafe {
                            let at = data.add((first + i) * stride + 4 * k).cast::<f32>();
                            _mm512_maskz_loadu_ps(loaded, at)
                        };
                    }
                }
                let mut t = r;
                for i in 0..8 {
                    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                for i in 0..4 {
                    let d = |x: __m512| _mm512_castps_pd(x);
                    let (a, b, e, f) =
                        (d(t[4 * i]), d(t[4 * i + 1]), d(t[4 * i + 2]), d(t[4 * i + 3]));
                    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, e));
                    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, e));
                    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, f));
                    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, f));
                }
                // r[4 g + c] holds, in its four quarters q, word 4 q + c of rows 4 g .. 4 g + 4.
                for c in 0..4 {
                    let low = _mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]);
                    let high = _mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]);
                    let low2 = _mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
                    let high2 = _mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
                    t[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
                    t[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
                    t[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
                    t[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
                }
                for (l, t) in t.iter().enumerate().take(steps) {
                    let at = (k + l) * width + first;
                    // SAFETY: step `k + l` is in bounds; all lanes before the next step.
                    unsafe { super::store(out.add(at), *t, k + l + 1 == depth, width - first) };
                }
            }
        }
    }
}

/// Panels whose rows are neighbours, in registers: one step of them all is a run of memory, read once.
mod neighbours {
    use std::ops::Range;

    use super::super::Mat;
    use super::super::micro::Kernel;
    use super::transpose;
    use crate::float::Float;

    /// Are these rows neighbours, and is there code for panels so wide?
    pub(super) fn fit<T: Float>(kernel: &Kernel, a: &Mat<'_, T>, width: usize) -> bool {
        let item = kernel.pairs || T::NAME == "f32";
        a.row_stride == 1 && item && matches!(width, 14 | 32) && transpose::fits()
    }

    /// Packs these rows as panels that start `apart` floats from each other: step `k` of row `i` of panel `p` at
    /// `out[p * apart + k * width + i]`, zeros for rows beyond the last.
    pub(super) fn panels<T: Float>(
        kernel: &Kernel,
        a: Mat<'_, T>,
        rows: Range<usize>,
        width: usize,
        apart: usize,
        out: &mut [f32],
    ) {
        let (depth, stride) = (a.cols, a.col_stride);
        let (panels, size) = (rows.len().div_ceil(width), kernel.panel(width, depth));
        if rows.is_empty() || depth == 0 {
            return out.fill(0.0);
        }
        assert!(a.data.len() >= rows.end + (depth - 1) * stride);
        assert!(out.len() >= (panels - 1) * apart + size && (panels == 1 || apart >= size));
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `fit` was asked before; all in bounds by the assertions.
        unsafe {
            let from = a.data.as_ptr().add(rows.start);
            let (out, shape) = (out.as_mut_ptr(), [rows.len(), depth, stride]);
            match (kernel.pairs, width) {
                (true, 14) => x86::pairs::<14>(from.cast(), shape, apart, out),
                (true, _) => x86::pairs::<32>(from.cast(), shape, apart, out),
                (false, 14) => x86::copy::<14>(from.cast(), shape, apart, out),
                (false, _) => x86::copy::<32>(from.cast(), shape, apart, out),
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use std::arch::x86_64::*;

        use super::super::store;

        /// Steps between what is packed and what is asked for: the next rows lie too far away for the machine
        /// to foresee, and what kernels asked for may have lost its place since.
        const SOON: usize = 16;

        /// Lanes `first ..` of `n`, sixteen at most.
        #[inline(always)]
        fn lanes(n: usize, first: usize) -> u16 {
            let lanes = n.saturating_sub(first).min(16) as u32;
            ((1u32 << lanes) - 1) as u16
        }

        /// Panels of f32.
        ///
        /// # Safety
        /// AVX-512F; what `neighbours::panels` asserts.
        #[target_feature(enable = "avx512f")]
        pub(super) unsafe fn copy<const W: usize>(
            data: *const f32,
            [rows, depth, stride]: [usize; 3],
            apart: usize,
            out: *mut f32,
        ) {
            for k in 0..depth {
                let step = |p: usize, rows: usize| {
                    for first in (0..W).step_by(16) {
                        // SAFETY: masked to what is in bounds.
                        unsafe {
                            let at = data.wrapping_add(k * stride + p * W + first);
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(SOON * stride).cast());
                            let x = _mm512_maskz_loadu_ps(lanes(rows, first), at);
                            let out = out.add(p * apart + k * W + first);
                            store(out, x, k + 1 == depth, W - first);
                        }
                    }
                };
                (0..rows / W).for_each(|p| step(p, W));
                if !rows.is_multiple_of(W) {
                    step(rows / W, rows % W);
                }
            }
        }

        /// Panels of bf16, two steps side by side in 32 bits; an odd last one beside zeros.
        ///
        /// # Safety
        /// AVX-512 F, BW and VL; what `neighbours::panels` asserts.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        pub(super) unsafe fn pairs<const W: usize>(
            data: *const i16,
            [rows, depth, stride]: [usize; 3],
            apart: usize,
            out: *mut f32,
        ) {
            for k in (0..depth).step_by(2) {
                let step = |p: usize, rows: usize| {
                    for first in (0..W).step_by(16) {
                        let from = lanes(rows, first);
                        let odd = if k + 1 < depth { from } else { 0 };
                        // SAFETY: masked to what is in bounds.
                        unsafe {
                            let at = data.wrapping_add(k * stride + p * W + first);
                            // A line is two vectors of these.
                            if first % 32 == 0 {
                                let soon = at.wrapping_add(SOON * stride);
                                _mm_prefetch::<_MM_HINT_T0>(soon.cast());
                                _mm_prefetch::<_MM_HINT_T0>(soon.wrapping_add(stride).cast());
                            }
                            let low = _mm256_maskz_loadu_epi16(from, at);
                            let high = _mm256_maskz_loadu_epi16(odd, at.wrapping_add(stride));
                            let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                            let both = _mm512_or_epi32(_mm512_cvtepu16_epi32(low), high);
                            let out = out.add(p * apart + k / 2 * W + first);
                            store(out, _mm512_castsi512_ps(both), k + 2 >= depth, W - first);
                        }
                    }
                };
                (0..rows / W).for_each(|p| step(p, W));
                if !rows.is_multiple_of(W) {
                    step(rows / W, rows % W);
                }
            }
        }
    }
}

/// May steps of this width be written by [`store`]? All vectors of a step are whole, or it is one whose
/// end the next step covers.
fn stores(width: usize) -> bool {
    width.is_multiple_of(16) || (8..16).contains(&width)
}

/// Stores the first `width` lanes; lanes beyond may be lost in a step that is not the last one, where
/// the next step writes over them: a store of all lanes costs half of a masked one.
///
/// # Safety
/// Room for a step of so many lanes, and unless it is the `last` one for the next step of as many.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store(out: *mut f32, x: std::arch::x86_64::__m512, last: bool, width: usize) {
    use std::arch::x86_64::*;
    // SAFETY: by contract.
    unsafe {
        match last && width < 16 {
            false => _mm512_storeu_ps(out, x),
            true => _mm512_mask_storeu_ps(out, (1u16 << width) - 1, x),
        }
    }
}
