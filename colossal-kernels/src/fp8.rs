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
    pub fn encode(self, x: f32) -> u8 {
        if x.is_nan() {
            return 0x7f;
        }
        let (digits, bias) = self.layout();
        let (sign, size) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs().min(self.max()));
        // Below the least normal number, steps of the least number, which lead on to it.
        let steps = size * f32::from_bits((127 + bias - 1 + digits) << 23);
        if steps < (1 << digits) as f32 {
            return sign | steps.round_ties_even() as u8;
        }
        let (bits, drop) = (size.to_bits(), 23 - digits);
        let rounded = (bits + (1 << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop;
        sign | (rounded - ((127 - bias) << digits)) as u8
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
    let at = |i: usize, j: usize| if transposed { x[j * cols + i] } else { x[i * cols + j] };
    // Bits of magnitudes are in the order of values, NaN above all: it is not lost.
    let magnitude = |x: T| x.to_f32().to_bits() & 0x7fff_ffff;
    let scale_of = |most: u32| match f32::from_bits(most) {
        largest if largest < LEAST => LEAST,
        largest => largest,
    };
    let tensor = scaling == Fp8Scaling::Tensor;
    if tensor {
        let most = x.iter().fold(0, |m, x| m.max(magnitude(*x)));
        scales[0] = scale_of(most) / format.max();
    }
    let whole = scales.first().copied().unwrap_or(1.0);
    let (q, scales) = (Parts::new(q), Parts::new(scales));
    parallel_for(r.div_ceil(height), 1 + (1 << 14) / (height * c).max(1), |bands| {
        for band in bands {
            let own = band * height..((band + 1) * height).min(r);
            // SAFETY: each band has rows and scales of its own.
            let q = unsafe { q.range(own.start * pitch..own.end * pitch) };
            for (block, from) in (0..c).step_by(GROUP).enumerate() {
                let cols = from..(from + GROUP).min(c);
                let inverse = if tensor {
                    1.0 / whole
                } else {
                    let all = own.clone().flat_map(|i| cols.clone().map(move |j| (i, j)));
                    let largest = scale_of(all.fold(0, |m, (i, j)| m.max(magnitude(at(i, j)))));
                    let place = band * c.div_ceil(GROUP) + block;
                    // SAFETY: as above.
                    let scale = unsafe { scales.range(place..place + 1) };
                    scale[0] = largest / format.max();
                    format.max() / largest
                };
                for (i, q) in own.clone().zip(q.chunks_mut(pitch)) {
                    for j in cols.clone() {
                        q[j] = format.encode(at(i, j).to_f32() * inverse);
                    }
                }
            }
            for q in q.chunks_mut(pitch.max(1)) {
                q[c..].fill(0);
            }
        }
    });
}

/// The values of `a`, to a dense `[rows, cols]`.
///
/// # Panics
/// When lengths do not fit.
pub fn dequantize_fp8<T: Float>(a: Fp8Mat<'_>, y: &mut [T]) {
    a.check("dequantize_fp8");
    assert_eq!(y.len(), a.rows * a.cols, "dequantize_fp8: [{}, {}]", a.rows, a.cols);
    let _span = profile::moves::<T>("dequantize_fp8", y.len(), 2);
    let y = Parts::new(y);
    parallel_for(a.rows, 1 + (1 << 14) / a.cols.max(1), |rows| {
        for i in rows {
            // SAFETY: rows are disjoint.
            let y = unsafe { y.range(i * a.cols..(i + 1) * a.cols) };
            for (j, (y, q)) in y.iter_mut().zip(&a.data[i * fp8_pitch(a.cols)..]).enumerate() {
                let scale = a.scales[a.scaling.place(i, j, a.cols)];
                *y = T::from_f32(a.format.decode(*q) * scale);
            }
        }
    });
}

/// `y [m, n] = a bᵀ + bias`, or `y += …`, of `a [m, k]` and `b [n, k]`. Nothing on a CPU multiplies them
/// as they are: both are widened to f32 first, in scratch.
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
    let (m, n, k) = (a.rows, b.rows, a.cols);
    with_workspace((m + n) * k + n, |space| {
        let (x, w) = space.split_at_mut(m * k);
        let (w, wide) = w.split_at_mut(n * k);
        dequantize_fp8(a, x);
        dequantize_fp8(b, w);
        let bias = bias.map(|bias| {
            wide.iter_mut().zip(bias).for_each(|(wide, b)| *wide = b.to_f32());
            &*wide
        });
        let e = Epilogue { bias, accumulate, ..Epilogue::default() };
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
