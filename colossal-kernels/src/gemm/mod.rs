//! Matrix product `c = silu(gate) * act(alpha * a b + bias) + residual` of what there is of it (or
//! `c += …`), for any strides.
//!
//! The shape of it (Goto & van de Geijn, 2008): both operands are packed into panels that the
//! micro-kernel reads in order, `MR` rows of `a` against `NR` columns of `b`, unless it can read them where they
//! lie: see `packed`. The tile is kept in registers over the whole depth and passes through the epilogue once,
//! on its way out.
//! Few rows or columns (decoding, LoRA) go without packing: see `skinny`, `few_rows`, `outer`.

mod epilogue;
#[cfg(target_arch = "x86_64")]
mod few_rows;
mod grouped;
pub(crate) mod micro;
#[cfg(target_arch = "x86_64")]
mod outer;
pub(crate) mod pack;
mod packed;
mod skinny;

pub use epilogue::{Activation, Epilogue};
pub use grouped::{Product, gemm_grouped};

use std::cell::RefCell;

use crate::float::Float;
use crate::memory::Block;
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for};
use epilogue::Sink;
use micro::Kernel;
use packed::pass;
use skinny::Skinny;

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

thread_local! {
    /// Scratch of this thread, grown once to the largest need.
    static WORKSPACE: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` floats of this thread's scratch (unspecified values) to `f`. May be nested.
pub(crate) fn with_workspace<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let bytes = len * size_of::<f32>();
    let kept = WORKSPACE.with_borrow_mut(|w| w.pop()).filter(|b| b.capacity() >= bytes);
    let mut space = kept.unwrap_or_else(|| Block::zeroed(bytes.next_multiple_of(4096)));
    let result = f(bytemuck::cast_slice_mut(space.bytes_mut(bytes)));
    WORKSPACE.with_borrow_mut(|w| w.push(space));
    result
}

/// The product of `a` and `b` into `c`; see the module's head and [`Epilogue`].
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
    e.check(c.rows, c.cols);
    if c.rows == 0 || c.cols == 0 {
        return;
    }
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let _span = profile::span::<T>("gemm", [m, n, k], || Work {
        flops: 2 * (m * n * k) as u64,
        bytes: ((m + n) * k * size_of::<T>() + m * n * size_of::<O>()) as u64,
    });
    let sink = Sink {
        data: Parts::new(&mut *c.data),
        row_stride: c.row_stride,
        col_stride: c.col_stride,
        epilogue: *e,
    };
    let kernel = Kernel::of::<T>();
    let depth = kernel.depth * if kernel.pairs { 2 } else { 1 };
    if let Some(skinny) = Skinny::of(&a, &b) {
        return skinny.product(&sink);
    }
    if a.cols <= depth {
        return pass(a, b, &sink);
    }
    if O::NAME == "f32" && e.is_sum() {
        // Deep products whose result is f32 anyway add up in place, after bias and residual.
        for (i, [part_a, part_b]) in slabs(a, b, depth).enumerate() {
            let epilogue = match i {
                0 => *e,
                _ => Epilogue { accumulate: true, ..Epilogue::default() },
            };
            pass(part_a, part_b, &Sink { data: Parts::new(&mut *c.data), epilogue, ..sink });
        }
        return;
    }
    // Partial sums in f32, the epilogue after the last.
    with_workspace(c.rows * c.cols, |sum| {
        for (i, [part_a, part_b]) in slabs(a, b, depth).enumerate() {
            let partial = Sink {
                data: Parts::new(&mut *sum),
                row_stride: c.cols,
                col_stride: 1,
                epilogue: Epilogue::<T> { accumulate: i > 0, ..Epilogue::default() },
            };
            pass(part_a, part_b, &partial);
        }
        let sum = &*sum;
        parallel_for(c.rows, (16384 / c.cols).max(1), |rows| {
            for i in rows {
                sink.store_row(i, 0, &sum[i * c.cols..(i + 1) * c.cols]);
            }
        });
    });
}

/// Both operands cut along the depth into equal slabs of at most `most`.
fn slabs<'a, T>(
    a: Mat<'a, T>,
    b: Mat<'a, T>,
    most: usize,
) -> impl Iterator<Item = [Mat<'a, T>; 2]> {
    let depth = a.cols;
    // Even, so that pairs stay whole.
    let each = depth.div_ceil(depth.div_ceil(most)).next_multiple_of(2);
    (0..depth).step_by(each).map(move |at| {
        let len = each.min(depth - at);
        [
            Mat { data: &a.data[at * a.col_stride..], cols: len, ..a },
            Mat { data: &b.data[at * b.row_stride..], rows: len, ..b },
        ]
    })
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

/// One product of bounded depth.
fn one_pass<T: Float, O: Float>(a: Mat<'_, T>, b: Mat<'_, T>, sink: &Sink<'_, O, T>) {
    match Skinny::of(&a, &b) {
        Some(skinny) => skinny.product(sink),
        None => pass(a, b, sink),
    }
}
