//! Numbers of 8 bits (e4m3, e5m2; Micikevicius et al., 2022), and products of them.
//!
//! A matrix is rounded with one scale, with a scale for 1 x 128 elements, or one for 128 x 128 (as
//! DeepSeek-V3 does for activations and weights). Rows lie along the depth of the product and are
//! padded with zeros to 16 bytes ([`fp8_pitch`]), which tensor cores ask for. A linear layer
//! `y = x wᵀ` takes three products; what is not along the depth is rounded transposed:
//!
//! | result | left | right |
//! | --- | --- | --- |
//! | `y [m, n]` | `x` e4m3 | `w` e4m3 |
//! | `dx [m, k]` | `dy` e5m2 | `wᵀ` e4m3 |
//! | `dw [n, k]` | `dyᵀ` e5m2 | `xᵀ` e4m3 |
//!
//! With blocks all of them are e4m3, as there.

use std::sync::OnceLock;

use half::bf16;

use crate::float::Float;
use crate::gemm::{Epilogue, Mat, MatMut, gemm, with_workspace};
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// Elements along the depth that share a scale.
const GROUP: usize = 128;
/// The least maximum that a scale is made of: zeros have a scale too.
const LEAST: f32 = 1e-30;

/// A format of 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// Three digits, up to 448: values.
    E4m3,
    /// Two digits, up to 57344: gradients.
    E5m2,
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8Scaling {
    /// The whole matrix.
    Tensor,
    /// 128 elements of a row.
    Rows,
    /// 128 rows by 128 columns.
    Blocks,
}

/// A matrix in 8 bits `[rows, cols]`: rows of [`fp8_pitch`] bytes.
#[derive(Debug, Clone, Copy)]
pub struct Fp8Mat<'a> {
    /// The numbers.
    pub data: &'a [u8],
    /// As many as [`Fp8Scaling::count`], row by row.
    pub scales: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The format.
    pub format: Fp8,
    /// What shares a scale.
    pub scaling: Fp8Scaling,
}

/// Bytes from row to row.
pub fn fp8_pitch(cols: usize) -> usize {
    cols.next_multiple_of(16)
}

impl Fp8 {
    /// The largest number.
    pub fn max(self) -> f32 {
        match self {
            Fp8::E4m3 => 448.0,
            Fp8::E5m2 => 57344.0,
        }
    }

    /// Digits behind the first, and what is added to exponents.
    fn layout(self) -> (u32, u32) {
        match self {
            Fp8::E4m3 => (3, 7),
            Fp8::E5m2 => (2, 15),
        }
    }

    /// Rounds to nearest even; what is too large becomes the largest.
    #[inline]
    pub fn encode(self, x: f32) -> u8 {
        let (digits, bias) = self.layout();
        let (sign, size) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs().min(self.max()));
        // Below the least normal number, steps of the least number, which lead on to it: added to 2^23
        // they are rounded to whole ones.
        let steps = size * f32::from_bits((127 + bias - 1 + digits) << 23);
        let small = (steps + 8_388_608.0).to_bits() & 0xff;
        let (bits, drop) = (size.to_bits(), 23 - digits);
        let rounded = (bits + (1 << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop;
        let normal = rounded.wrapping_sub((127 - bias) << digits);
        let code = sign | if steps < (1 << digits) as f32 { small as u8 } else { normal as u8 };
        if x.is_nan() { 0x7f } else { code }
    }

    /// The number, exactly.
    pub fn decode(self, x: u8) -> f32 {
        let (digits, bias) = self.layout();
        let (size, sign) = (u32::from(x & 0x7f), if x & 0x80 == 0 { 1.0 } else { -1.0 });
        let (exponent, rest) = (size >> digits, size & ((1 << digits) - 1));
        let least = f32::from_bits((127 + 1 - bias - digits) << 23);
        sign * match (self, exponent) {
            (Fp8::E4m3, _) if size == 0x7f => f32::NAN,
            (Fp8::E5m2, 31) if rest > 0 => f32::NAN,
            (Fp8::E5m2, 31) => f32::INFINITY,
            (_, 0) => rest as f32 * least,
            _ => f32::from_bits((exponent + 127 - bias) << 23 | rest << (23 - digits)),
        }
    }
}

/// All numbers of a format, by their codes.
fn numbers(format: Fp8) -> &'static [f32; 256] {
    static NUMBERS: [OnceLock<[f32; 256]>; 2] = [OnceLock::new(), OnceLock::new()];
    let own = &NUMBERS[usize::from(format == Fp8::E5m2)];
    own.get_or_init(|| std::array::from_fn(|code| format.decode(code as u8)))
}

impl Fp8Scaling {
    /// Scales of a matrix.
    pub fn count(self, rows: usize, cols: usize) -> usize {
        let [rows, _, _] = match self {
            Fp8Scaling::Tensor => return 1,
            _ => [rows.div_ceil(1 << self.steps()[0]), 0, 0],
        };
        rows * cols.div_ceil(GROUP)
    }

    /// Where the scale of `(row, block of 128 columns)` is:
    /// `(row >> s[0]) * s[1] * blocks + block * s[2]`.
    pub(crate) fn steps(self) -> [usize; 3] {
        match self {
            Fp8Scaling::Tensor => [32, 0, 0],
            Fp8Scaling::Rows => [0, 1, 1],
            Fp8Scaling::Blocks => [7, 1, 1],
        }
    }

    fn place(self, row: usize, col: usize, cols: usize) -> usize {
        let [shift, row_step, step] = self.steps();
        (row >> shift) * row_step * cols.div_ceil(GROUP) + col / GROUP * step
    }
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
}

/// The sizes of a matrix `[rows, cols]` in fp8, checked.
pub(crate) fn check_quantize(
    x: usize,
    [rows, cols]: [usize; 2],
    transposed: bool,
    scaling: Fp8Scaling,
    [q, scales]: [usize; 2],
) -> [usize; 2] {
    let [r, c] = if transposed { [cols, rows] } else { [rows, cols] };
    assert_eq!(x, rows * cols, "quantize_fp8: {x} elements are not [{rows}, {cols}]");
    let (bytes, count) = (r * fp8_pitch(c), scaling.count(r, c));
    assert!(
        q == bytes && scales == count,
        "quantize_fp8: [{r}, {c}] takes {bytes} bytes and {count} scales, not {q} and {scales}"
    );
    [r, c]
}

/// Rounds `x [rows, cols]`, or its transpose, each scale from the largest of its elements.
///
/// ```
/// use colossal_kernels::{Fp8, Fp8Scaling, fp8_pitch, quantize_fp8};
/// let (mut q, mut scales) = (vec![0; fp8_pitch(3)], [0.0]);
/// let x = [1.0f32, -2.0, 448.0];
/// quantize_fp8(&x, 1, 3, false, Fp8::E4m3, Fp8Scaling::Tensor, &mut q, &mut scales);
/// assert_eq!(scales, [1.0]);
/// assert_eq!(Fp8::E4m3.decode(q[1]), -2.0);
/// ```
///
/// # Panics
/// When lengths do not fit.
pub fn quantize_fp8<T: Float>(
    x: &[T],
    rows: usize,
    cols: usize,
    transposed: bool,
    format: Fp8,
    scaling: Fp8Scaling,
    q: &mut [u8],
    scales: &mut [f32],
) {
    let sizes = [q.len(), scales.len()];
    let [r, c] = check_quantize(x.len(), [rows, cols], transposed, scaling, sizes);
    let _span = profile::moves::<T>("quantize_fp8", x.len(), 2);
    let (pitch, height) = (fp8_pitch(c), 1usize << scaling.steps()[0].min(7));
    // Elements of a row of the result, as they lie in x or across it.
    let read = |i: usize, from: usize, to: &mut [f32]| match transposed {
        false => {
            let row = &x[i * cols + from..][..to.len()];
            to.iter_mut().zip(row).for_each(|(to, x)| *to = x.to_f32());
        }
        true => {
            let column = x[from * cols + i..].iter().step_by(cols);
            to.iter_mut().zip(column).for_each(|(to, x)| *to = x.to_f32());
        }
    };
    // Bits of magnitudes are in the order of values, NaN above all: it is not lost.
    let magnitude = |x: f32| x.to_bits() & 0x7fff_ffff;
    let scale_of = |most: u32| match f32::from_bits(most) {
        largest if largest < LEAST => LEAST,
        largest => largest,
    };
    let tensor = scaling == Fp8Scaling::Tensor;
    if tensor {
        let most = x.iter().fold(0, |m, x| m.max(magnitude(x.to_f32())));
        scales[0] = scale_of(most) / format.max();
    }
    let whole = scales.first().copied().unwrap_or(1.0);
    let (q, scales) = (Parts::new(q), Parts::new(scales));
    parallel_for(r.div_ceil(height), 1 + (1 << 14) / (height * c).max(1), |bands| {
        let mut tile = vec![0.0f32; height * GROUP];
        for band in bands {
            let own = band * height..((band + 1) * height).min(r);
            // SAFETY: each band has rows and scales of its own.
            let q = unsafe { q.range(own.start * pitch..own.end * pitch) };
            for (block, from) in (0..c).step_by(GROUP).enumerate() {
                let width = GROUP.min(c - from);
                let rows = || own.clone().zip(0..height);
                for (i, at) in rows() {
                    read(i, from, &mut tile[at * width..(at + 1) * width]);
                }
                let inverse = if tensor {
                    1.0 / whole
                } else {
                    let all = &tile[..own.len() * width];
                    let largest = scale_of(all.iter().fold(0, |m, x| m.max(magnitude(*x))));
                    let place = band * c.div_ceil(GROUP) + block;
                    // SAFETY: as above.
                    let scale = unsafe { scales.range(place..place + 1) };
                    scale[0] = largest / format.max();
                    format.max() / largest
                };
                for (_, at) in rows() {
                    let (x, q) =
                        (&tile[at * width..][..width], &mut q[at * pitch + from..][..width]);
                    match format {
                        Fp8::E4m3 => round(x, inverse, q, Fp8::E4m3),
                        Fp8::E5m2 => round(x, inverse, q, Fp8::E5m2),
                    }
                }
            }
            for q in q.chunks_mut(pitch.max(1)) {
                q[c..].fill(0);
            }
        }
    });
}

/// A loop that the compiler makes of vectors, once for each format.
#[inline(always)]
fn round(x: &[f32], inverse: f32, q: &mut [u8], format: Fp8) {
    q.iter_mut().zip(x).for_each(|(q, x)| *q = format.encode(x * inverse));
}

/// The values of `a`, to a dense `[rows, cols]`.
///
/// # Panics
/// When lengths do not fit.
pub fn dequantize_fp8<T: Float>(a: Fp8Mat<'_>, y: &mut [T]) {
    a.check("dequantize_fp8");
    assert_eq!(y.len(), a.rows * a.cols, "dequantize_fp8: [{}, {}]", a.rows, a.cols);
    widen(a, true, y);
}

/// The numbers of `a`, times their scales or as they are.
fn widen<T: Float>(a: Fp8Mat<'_>, scaled: bool, y: &mut [T]) {
    let _span = profile::moves::<T>("dequantize_fp8", y.len(), 2);
    let (y, numbers) = (Parts::new(y), numbers(a.format));
    parallel_for(a.rows, 1 + (1 << 14) / a.cols.max(1), |rows| {
        for i in rows {
            // SAFETY: rows are disjoint.
            let y = unsafe { y.range(i * a.cols..(i + 1) * a.cols) };
            let q = &a.data[i * fp8_pitch(a.cols)..][..a.cols];
            for (block, (y, q)) in y.chunks_mut(GROUP).zip(q.chunks(GROUP)).enumerate() {
                let own = a.scaling.place(i, block * GROUP, a.cols);
                let scale = if scaled { a.scales[own] } else { 1.0 };
                for (y, q) in y.iter_mut().zip(q) {
                    *y = T::from_f32(numbers[usize::from(*q)] * scale);
                }
            }
        }
    });
}

/// `y [m, n] = a bᵀ + bias`, or `y += …`, of `a [m, k]` and `b [n, k]`. Nothing on a CPU multiplies them
/// as they are: they are widened first, in scratch; to f32, or, where each has one scale, to bf16, which
/// holds both formats exactly.
///
/// # Panics
/// When sizes do not fit.
pub fn gemm_fp8<T: Float>(
    a: Fp8Mat<'_>,
    b: Fp8Mat<'_>,
    bias: Option<&[T]>,
    accumulate: bool,
    y: &mut [T],
) {
    check_gemm([a.rows, a.cols], [b.rows, b.cols], bias.map(<[T]>::len), y.len());
    a.check("gemm_fp8");
    b.check("gemm_fp8");
    if let Some(bias) = bias {
        for row in y.chunks_mut(bias.len().max(1)) {
            match accumulate {
                false => row.copy_from_slice(bias),
                true => {
                    let sums = row.iter_mut().zip(bias);
                    sums.for_each(|(y, b)| *y = T::from_f32(y.to_f32() + b.to_f32()));
                }
            }
        }
    }
    let accumulate = accumulate || bias.is_some();
    if [a.scaling, b.scaling] == [Fp8Scaling::Tensor; 2] {
        product::<bf16, T>(a, b, Some(a.scales[0] * b.scales[0]), accumulate, y);
    } else {
        product::<f32, T>(a, b, None, accumulate, y);
    }
}

/// By a product of `W`; `alpha` instead of scales.
fn product<W: Float, T: Float>(
    a: Fp8Mat<'_>,
    b: Fp8Mat<'_>,
    alpha: Option<f32>,
    accumulate: bool,
    y: &mut [T],
) {
    let (m, n, k) = (a.rows, b.rows, a.cols);
    with_workspace(((m + n) * k * size_of::<W>()).div_ceil(size_of::<f32>()), |space| {
        let space = &mut bytemuck::cast_slice_mut::<f32, W>(space)[..(m + n) * k];
        let (x, w) = space.split_at_mut(m * k);
        widen(a, alpha.is_none(), x);
        widen(b, alpha.is_none(), w);
        let e = Epilogue { alpha: alpha.unwrap_or(1.0), accumulate, ..Epilogue::default() };
        gemm(Mat::new(x, m, k), Mat::new(w, n, k).t(), MatMut::new(y, m, n), &e);
    });
}

pub(crate) fn check_gemm(
    [m, k]: [usize; 2],
    [n, depth]: [usize; 2],
    bias: Option<usize>,
    y: usize,
) {
    assert!(
        k == depth && y == m * n && bias.is_none_or(|b| b == n),
        "gemm_fp8: [{m}, {k}] x [{n}, {depth}] transposed does not give {y} elements"
    );
}
