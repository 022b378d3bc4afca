//! Products: of matrices, of ragged groups, with weights in int8, of fp8.

use colossal_kernels::cuda;
use colossal_kernels::{Float, Fp8, Fp8Scaling, Int8Matrix};

use super::operand::{Lend, Operand, on_cuda, on_host, stream_of};
use crate::error::Result;
use crate::view::{View, ViewMut};

/// A strided matrix, as [`colossal_kernels::Mat`].
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    /// The elements.
    pub data: View<'a, T>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A dense row-major matrix.
    pub fn new(data: View<'a, T>, rows: usize, cols: usize) -> Mat<'a, T> {
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Its transpose, without moving anything.
    pub fn t(self) -> Mat<'a, T> {
        let Mat { data, rows, cols, row_stride, col_stride } = self;
        Mat { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// Elements of `b` that a thread of the host packs at once: the columns of a wider one, as a head's, take
/// turns in that much scratch.
const PACKED: usize = 512 << 10;
/// The deepest packed panels of the host's products.
const DEPTH: usize = 2048;

/// How many columns of a product on the host are computed at once.
fn at_once(rows: usize, cols: usize, depth: usize) -> usize {
    let most = PACKED * colossal_kernels::threads::count() / depth.clamp(1, DEPTH);
    // Few rows are multiplied without packing.
    if rows < 64 || cols <= most { cols.max(1) } else { (most / 64).max(1) * 64 }
}

/// `c [rows, cols] = act(alpha * a b + bias)`, or `+=`: [`colossal_kernels::gemm`]. `c` is dense.
pub fn gemm<T: Float, O: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    c: ViewMut<'_, O>,
    bias: Option<View<'_, T>>,
    accumulate: bool,
) -> Result<()> {
    let (x, y) = (a.data, b.data);
    let (rows, cols) = (a.rows, b.cols);
    match stream_of!(x, y, c, bias) {
        Some(stream) => on_cuda!(stream, (x, y, c, bias) => {
            let [a, b] = [(a, x), (b, y)].map(|(m, data)| cuda::Mat {
                data,
                rows: m.rows,
                cols: m.cols,
                row_stride: m.row_stride,
                col_stride: m.col_stride,
            });
            let e = cuda::Epilogue { bias, accumulate, ..Default::default() };
            cuda::gemm(&stream, a, b, cuda::MatMut::new(c, rows, cols), &e)
        }),
        None => on_host!((x, y, c, bias) => {
            use colossal_kernels::{Epilogue, Mat, MatMut};
            let some = at_once(rows, cols, a.cols);
            for at in (0..cols).step_by(some) {
                let (row_stride, col_stride, count) = (b.row_stride, b.col_stride, some.min(cols - at));
                let data = &y[(at * col_stride).min(y.len())..];
                let part = Mat { data, rows: b.rows, cols: count, row_stride, col_stride };
                let a = Mat {
                    data: x,
                    rows,
                    cols: a.cols,
                    row_stride: a.row_stride,
                    col_stride: a.col_stride,
                };
                let data = &mut c[at..];
                let c = MatMut { data, rows, cols: count, row_stride: cols, col_stride: 1 };
                let bias = bias.map(|bias| &bias[at..at + count]);
                let e = Epilogue { bias, accumulate, ..Default::default() };
                colossal_kernels::gemm(a, part, c, &e);
            }
        }),
    }
    Ok(())
}

/// As [`gemm`], onto `residual`: `c = residual + a b + bias`. Both are dense.
pub fn gemm_onto<T: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    mut c: ViewMut<'_, T>,
    bias: Option<View<'_, T>>,
    residual: View<'_, T>,
) -> Result<()> {
    if stream_of!(residual).is_some() {
        gemm(a, b, c.reborrow(), bias, false)?;
        return super::add_assign(residual, c);
    }
    let (x, y) = (a.data, b.data);
    let (rows, cols) = (a.rows, b.cols);
    on_host!((x, y, c, bias, residual) => {
        let [a, b] = [(a, x), (b, y)].map(|(m, data)| colossal_kernels::Mat {
            data,
            rows: m.rows,
            cols: m.cols,
            row_stride: m.row_stride,
            col_stride: m.col_stride,
        });
        let residual = Some(colossal_kernels::Mat::new(residual, rows, cols));
        let e = colossal_kernels::Epilogue { bias, residual, ..Default::default() };
        colossal_kernels::gemm(a, b, colossal_kernels::MatMut::new(c, rows, cols), &e);
    });
    Ok(())
}

/// A matrix within an operand of [`gemm_grouped`]: where it begins, and how it lies.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    at: usize,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Part {
    /// A dense row-major matrix that begins at an element.
    pub fn new(at: usize, rows: usize, cols: usize) -> Part {
        Part { at, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Its transpose, without moving anything.
    pub fn t(self) -> Part {
        let Part { at, rows, cols, row_stride, col_stride } = self;
        Part { at, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// [`colossal_kernels::gemm_grouped`], products of parts `(a, b, where the result begins)` of `x`
/// and `w`.
pub fn gemm_grouped<T: Float, O: Float>(
    x: View<'_, T>,
    w: View<'_, T>,
    parts: &[(Part, Part, usize)],
    y: ViewMut<'_, O>,
    accumulate: bool,
) -> Result<()> {
    macro_rules! products {
        ($module:ident, $x:ident, $w:ident, |$data:ident: $ty:ty, $from:ident| $tail:expr) => {{
            let product = |(a, b, at): &(Part, Part, usize)| {
                let [a, b] = [($x, a), ($w, b)].map(|($data, p): ($ty, &Part)| {
                    let $from = p.at;
                    $module::Mat {
                        data: $tail,
                        rows: p.rows,
                        cols: p.cols,
                        row_stride: p.row_stride,
                        col_stride: p.col_stride,
                    }
                });
                $module::Product { a, b, at: *at }
            };
            parts.iter().map(product).collect::<Vec<_>>()
        }};
    }
    match stream_of!(x, w, y) {
        Some(stream) => on_cuda!(stream, (x, w, y) => {
            let e = cuda::Epilogue { accumulate, ..Default::default() };
            let list = products!(cuda, x, w, |data: cuda::Slice<'_, T>, from| data.range(from..data.len()));
            cuda::gemm_grouped(&stream, &list, y, &e)
        }),
        None => on_host!((x, w, y) => {
            let e = colossal_kernels::Epilogue { accumulate, ..Default::default() };
            let list = products!(colossal_kernels, x, w, |data: &[T], from| &data[from..]);
            colossal_kernels::gemm_grouped(&list, y, &e);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::gemm_int8`]
pub fn gemm_int8<T: Float>(
    x: View<'_, T>,
    m: usize,
    w: &Int8Matrix,
    bias: Option<View<'_, T>>,
    y: ViewMut<'_, T>,
) -> Result<()> {
    match stream_of!(x, y, bias) {
        Some(stream) => {
            on_cuda!(stream, (x, bias, y) => cuda::gemm_int8(&stream, x, m, w, bias, y))
        }
        None => on_host!((x, bias, y) => colossal_kernels::gemm_int8(x, m, w, bias, y)),
    }
    Ok(())
}

/// A matrix in 8 bits, as [`colossal_kernels::Fp8Mat`].
#[derive(Debug, Clone, Copy)]
pub struct Fp8Mat<'a> {
    /// The numbers, rows of [`colossal_kernels::fp8_pitch`] bytes.
    pub data: View<'a, u8>,
    /// As many as [`Fp8Scaling::count`].
    pub scales: View<'a, f32>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The format.
    pub format: Fp8,
    /// What shares a scale.
    pub scaling: Fp8Scaling,
}

/// [`colossal_kernels::quantize_fp8`]
pub fn quantize_fp8<T: Float>(
    x: View<'_, T>,
    rows: usize,
    cols: usize,
    transposed: bool,
    format: Fp8,
    scaling: Fp8Scaling,
    q: ViewMut<'_, u8>,
    scales: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(x, q, scales) {
        Some(stream) => on_cuda!(stream, (x, q, scales) => {
            cuda::quantize_fp8(&stream, x, rows, cols, transposed, format, scaling, q, scales)
        }),
        None => on_host!((x, q, scales) => {
            colossal_kernels::quantize_fp8(x, rows, cols, transposed, format, scaling, q, scales);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::gemm_fp8`]
pub fn gemm_fp8<T: Float>(
    a: Fp8Mat<'_>,
    b: Fp8Mat<'_>,
    bias: Option<View<'_, T>>,
    accumulate: bool,
    y: ViewMut<'_, T>,
) -> Result<()> {
    let (x, w, x_scales, w_scales) = (a.data, b.data, a.scales, b.scales);
    macro_rules! mats {
        ($module:ident, $x:ident, $x_scales:ident, $w:ident, $w_scales:ident) => {
            [(a, $x, $x_scales), (b, $w, $w_scales)].map(|(m, data, scales)| $module::Fp8Mat {
                data,
                scales,
                rows: m.rows,
                cols: m.cols,
                format: m.format,
                scaling: m.scaling,
            })
        };
    }
    match stream_of!(x, w, x_scales, w_scales, bias, y) {
        Some(stream) => on_cuda!(stream, (x, w, x_scales, w_scales, bias, y) => {
            let [a, b] = mats!(cuda, x, x_scales, w, w_scales);
            cuda::gemm_fp8(&stream, a, b, bias, accumulate, y)
        }),
        None => on_host!((x, w, x_scales, w_scales, bias, y) => {
            let [a, b] = mats!(colossal_kernels, x, x_scales, w, w_scales);
            colossal_kernels::gemm_fp8(a, b, bias, accumulate, y);
        }),
    }
    Ok(())
}
