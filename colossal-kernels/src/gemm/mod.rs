//! Matrix product `c = act(alpha * a b + bias)` (or `c += …`) for any strides.
//!
//! The shape of it (Goto & van de Geijn, 2008): both operands are packed into panels that the
//! micro-kernel reads in order, `MR` rows of `a` against `NR` columns of `b`; a block of columns
//! of `b` that fits the second-level cache meets all rows of `a` before the next one. The tile is
//! kept in registers over the whole depth and passes through the epilogue once, on its way out.
//! Few rows against a transposed `b` (decoding, small batches) go without packing: see `skinny`.

mod micro;
mod pack;
mod skinny;

use std::cell::RefCell;

use crate::float::Float;
use crate::isa::{isa, simd};
use crate::math::{erf, sigmoid, tanh};
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for};
use micro::{Kernel, TILE};

/// A strided matrix: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    /// The elements.
    pub data: &'a [T],
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
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Mat<'a, T> {
        Mat { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Its transpose, without moving anything.
    pub fn t(self) -> Mat<'a, T> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn check(&self, name: &str) {
        let last = match self.rows * self.cols {
            0 => 0,
            _ => (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1,
        };
        assert!(last <= self.data.len(), "gemm: {name} reaches beyond its data");
    }
}

/// A strided matrix to write to.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    /// The elements.
    pub data: &'a mut [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between columns.
    pub col_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// A dense row-major matrix.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> MatMut<'a, T> {
        MatMut { data, rows, cols, row_stride: cols, col_stride: 1 }
    }
}

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

thread_local! {
    /// Scratch of this thread, grown once to the largest need.
    static WORKSPACE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` floats of this thread's scratch (unspecified values) to `f`. May be nested.
pub(crate) fn with_workspace<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut space = WORKSPACE.with_borrow_mut(|w| w.pop()).unwrap_or_default();
    // Cache-line aligned start, so that vector loads never straddle lines.
    if space.len() < len + 16 {
        space.resize(len + 16, 0.0);
    }
    let skip = space.as_ptr().align_offset(64).min(16);
    let result = f(&mut space[skip..skip + len]);
    WORKSPACE.with_borrow_mut(|w| w.push(space));
    result
}

/// Depth of one pass: longer products are added up in f32.
const DEPTH: usize = 1024;
/// Floats of packed `b` that one block of columns may take: half of a 1 MiB second-level cache.
const BLOCK: usize = 128 * 1024;

/// `c = act(alpha * a b + bias)`; see the module's head and [`Epilogue`].
///
/// ```
/// use colossal_kernels::{Epilogue, Mat, MatMut, gemm};
/// let (a, b, mut c) = ([1.0f32, 2.0, 3.0, 4.0], [1.0f32, 0.0, 0.0, 1.0], [0.0f32; 4]);
/// gemm(Mat::new(&a, 2, 2).t(), Mat::new(&b, 2, 2), MatMut::new(&mut c, 2, 2), &Epilogue::default());
/// assert_eq!(c, [1.0, 3.0, 2.0, 4.0]);
/// ```
///
/// # Panics
/// When sizes do not fit.
pub fn gemm<T: Float, O: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    c: MatMut<'_, O>,
    e: &Epilogue<'_, T>,
) {
    assert!(
        a.cols == b.rows && c.rows == a.rows && c.cols == b.cols,
        "gemm: [{}, {}] x [{}, {}] does not give [{}, {}]",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        c.rows,
        c.cols
    );
    a.check("a");
    b.check("b");
    Mat {
        data: &*c.data,
        rows: c.rows,
        cols: c.cols,
        row_stride: c.row_stride,
        col_stride: c.col_stride,
    }
    .check("c");
    assert!(
        c.rows <= 1
            || c.cols <= 1
            || (c.col_stride > 0 && c.row_stride > (c.cols - 1) * c.col_stride)
            || (c.row_stride > 0 && c.col_stride > (c.rows - 1) * c.row_stride),
        "gemm: elements of c overlap: strides {} and {} of [{}, {}]",
        c.row_stride,
        c.col_stride,
        c.rows,
        c.cols
    );
    assert!(
        (c.rows <= 1 || c.row_stride > 0) && (c.cols <= 1 || c.col_stride > 0),
        "gemm: elements of c overlap: stride 0"
    );
    if let Some(bias) = e.bias {
        assert_eq!(bias.len(), c.cols, "gemm: bias has one element per column");
    }
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let _span = profile::span::<T>("gemm", [m, n, k], || Work {
        flops: 2 * (m * n * k) as u64,
        bytes: ((m + n) * k * size_of::<T>() + m * n * size_of::<O>()) as u64,
    });
    let sink = Sink {
        data: Parts::new(c.data),
        row_stride: c.row_stride,
        col_stride: c.col_stride,
        epilogue: *e,
    };
    if skinny::fits(&a, &b) {
        return skinny::gemm(a, b, &sink);
    }
    if a.cols <= DEPTH {
        return pass(a, b, &sink);
    }
    // Deep products: partial sums in f32, the epilogue after the last.
    with_workspace(c.rows * c.cols, |sum| {
        let mut first = true;
        let mut at = 0;
        while at < a.cols {
            let len = if a.cols - at <= DEPTH { a.cols - at } else { DEPTH };
            let part_a = Mat { data: &a.data[at * a.col_stride..], cols: len, ..a };
            let part_b = Mat { data: &b.data[at * b.row_stride..], rows: len, ..b };
            let partial = Sink {
                data: Parts::new(&mut *sum),
                row_stride: c.cols,
                col_stride: 1,
                epilogue: Epilogue::<T> { accumulate: !first, ..Epilogue::default() },
            };
            pass(part_a, part_b, &partial);
            first = false;
            at += len;
        }
        let sum = &*sum;
        parallel_for(c.rows, (16384 / c.cols).max(1), |rows| {
            for i in rows {
                sink.store_row(i, 0, &sum[i * c.cols..(i + 1) * c.cols]);
            }
        });
    });
}

/// `batch` products whose operands lie `a_stride`, `b_stride` and `c_stride` elements apart.
pub fn gemm_batched<T: Float, O: Float>(
    batch: usize,
    a: Mat<'_, T>,
    a_stride: usize,
    b: Mat<'_, T>,
    b_stride: usize,
    c: MatMut<'_, O>,
    c_stride: usize,
    e: &Epilogue<'_, T>,
) {
    for i in 0..batch {
        let c = MatMut {
            data: &mut c.data[i * c_stride..],
            rows: c.rows,
            cols: c.cols,
            row_stride: c.row_stride,
            col_stride: c.col_stride,
        };
        let a = Mat { data: &a.data[i * a_stride..], ..a };
        gemm(a, Mat { data: &b.data[i * b_stride..], ..b }, c, e);
    }
}

/// One product of bounded depth, packed.
fn pass<T: Float, O: Float, E: Float>(a: Mat<'_, T>, b: Mat<'_, T>, sink: &Sink<'_, O, E>) {
    let kernel = Kernel::choose::<T>(isa());
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let (mr, nr) = (kernel.mr, kernel.nr);
    let (panels_a, panels_b) = (m.div_ceil(mr), n.div_ceil(nr));
    let (size_a, size_b) = (kernel.panel(mr, k), kernel.panel(nr, k));
    // Pairs of bf16 take the room of one f32: the workspace is counted in floats either way.
    with_workspace(panels_a * size_a + panels_b * size_b + 16, |space| {
        let (space_a, space_b) = space.split_at_mut((panels_a * size_a).next_multiple_of(16));
        let parts = Parts::new(space_a);
        parallel_for(panels_a, (8192 / size_a.max(1)).max(1), |range| {
            for p in range {
                // SAFETY: each panel belongs to one piece.
                let panel = unsafe { parts.range(p * size_a..(p + 1) * size_a) };
                pack::panel(&kernel, a, p * mr, mr, panel);
            }
        });
        let parts = Parts::new(space_b);
        parallel_for(panels_b, (8192 / size_b.max(1)).max(1), |range| {
            for p in range {
                // SAFETY: each panel belongs to one piece.
                let panel = unsafe { parts.range(p * size_b..(p + 1) * size_b) };
                pack::panel(&kernel, b.t(), p * nr, nr, panel);
            }
        });
        let (space_a, space_b) = (&*space_a, &*space_b);
        // Work is cut into blocks of columns times groups of rows.
        let per_block = (BLOCK / size_b.max(1)).clamp(1, panels_b);
        let blocks = panels_b.div_ceil(per_block);
        let groups = panels_a.div_ceil(16);
        parallel_for(
            blocks * groups,
            if m * n * k < 64 * 64 * 64 { usize::MAX } else { 1 },
            |range| {
                let mut tile = Tile([0.0; TILE]);
                for piece in range {
                    let (block, group) = (piece / groups, piece % groups);
                    for pa in group * 16..((group + 1) * 16).min(panels_a) {
                        let panel_a = &space_a[pa * size_a..(pa + 1) * size_a];
                        for pb in block * per_block..((block + 1) * per_block).min(panels_b) {
                            let panel_b = &space_b[pb * size_b..(pb + 1) * size_b];
                            kernel.run(k, panel_a, panel_b, &mut tile.0);
                            let (rows, cols) = (mr.min(m - pa * mr), nr.min(n - pb * nr));
                            for i in 0..rows {
                                sink.store_row(
                                    pa * mr + i,
                                    pb * nr,
                                    &tile.0[i * nr..i * nr + cols],
                                );
                            }
                        }
                    }
                }
            },
        );
    });
}

#[repr(align(64))]
struct Tile([f32; TILE]);

/// Where results go, and what happens to them on the way.
struct Sink<'a, O, E> {
    data: Parts<O>,
    row_stride: usize,
    col_stride: usize,
    epilogue: Epilogue<'a, E>,
}

impl<O: Float, E: Float> Sink<'_, O, E> {
    /// Writes part of a row, starting at column `col`.
    #[inline(always)]
    fn store_row(&self, row: usize, col: usize, values: &[f32]) {
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
        if e.alpha == 1.0 && e.bias.is_none() && e.activation == Activation::None {
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
