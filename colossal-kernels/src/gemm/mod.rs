//! Matrix product `c = act(alpha * a b + bias)` (or `c += …`) for any strides.
//!
//! The shape of it (Goto & van de Geijn, 2008): both operands are packed into panels that the
//! micro-kernel reads in order, `MR` rows of `a` against `NR` columns of `b`. Threads pack `b`
//! together; a group of rows of `a`, small enough for the second-level cache, meets all columns;
//! the thread that uses it packs it, unless the kernel can read it where it lies. The tile is kept in registers over the whole depth
//! and passes through the epilogue once, on its way out.
//! Few rows against a transposed `b` (decoding, small batches) go without packing: see `skinny`.

mod grouped;
pub(crate) mod micro;
pub(crate) mod pack;
mod skinny;

pub use grouped::{Product, gemm_grouped};

use std::cell::RefCell;

use crate::float::Float;
use crate::isa::simd;
#[cfg(target_arch = "x86_64")]
use crate::isa::{Isa, isa};
use crate::math::{erf, sigmoid, tanh};
use crate::memory::Block;
use crate::profile::{self, Work};
use crate::threads::{Parts, count, parallel_each, parallel_for};
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

impl<T> Epilogue<'_, T> {
    fn is_plain(&self) -> bool {
        self.alpha == 1.0 && self.bias.is_none() && self.activation == Activation::None
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

/// Steps of depth of one pass; longer products are added up in f32.
const DEPTH: usize = 1024;
/// Multiply-adds of one item of work, in floats: some 100 microseconds.
const ITEM: usize = 6 << 20;
/// Panels of one group of rows at most: they should stay in a 1 MiB second-level cache.
const GROUP: usize = 8;

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
        data: Parts::new(&mut *c.data),
        row_stride: c.row_stride,
        col_stride: c.col_stride,
        epilogue: *e,
    };
    let depth = if Kernel::of::<T>().pairs { 2 * DEPTH } else { DEPTH };
    if skinny::fits(&a, &b) || a.cols <= depth {
        return one_pass(a, b, &sink);
    }
    if O::NAME == "f32" && e.is_plain() {
        // Deep products whose result is f32 anyway add up in place.
        for (i, [part_a, part_b]) in slabs(a, b, depth).enumerate() {
            let epilogue = Epilogue { accumulate: e.accumulate || i > 0, ..*e };
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
    match skinny::fits(&a, &b) {
        true => skinny::gemm(a, b, sink),
        false => pass(a, b, sink),
    }
}

/// The same, packed.
fn pass<T: Float, O: Float, E: Float>(a: Mat<'_, T>, b: Mat<'_, T>, sink: &Sink<'_, O, E>) {
    let kernel = Kernel::of::<T>();
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let (mr, nr) = (kernel.mr, kernel.nr);
    let (panels_a, panels_b) = (m.div_ceil(mr), n.div_ceil(nr));
    let (size_a, size_b) = (kernel.panel(mr, k), kernel.panel(nr, k));
    let steps = kernel.steps(k);
    let small = m * n * k < 64 * 64 * 64;
    let in_place = pack::in_place(&kernel, &a);
    // Pairs of bf16 take the room of one f32: the workspace is counted in floats either way.
    with_workspace(panels_b * size_b, |space_b| {
        let parts = Parts::new(space_b);
        let grain = if small { usize::MAX } else { (8192 / size_b.max(1)).max(1) };
        parallel_for(panels_b, grain, |range| {
            // SAFETY: each panel belongs to one piece.
            let panels = unsafe { parts.range(range.start * size_b..range.end * size_b) };
            pack::panels(&kernel, b.t(), range.start * nr, nr, panels);
        });
        let space_b = &*space_b;
        let Split { groups, blocks } = Split::of(panels_a, panels_b, size_a * nr);
        let item = |item: usize| {
            let (group, block) = (item / blocks, item % blocks);
            let rows = panels_a * group / groups..panels_a * (group + 1) / groups;
            let columns = panels_b * block / blocks..panels_b * (block + 1) / blocks;
            let packed = if in_place.is_some() { 0 } else { rows.len() * size_a };
            with_workspace(packed, |space_a| {
                if packed > 0 {
                    pack::panels(&kernel, a, rows.start * mr, mr, space_a);
                }
                let mut tile = Tile([0.0; TILE]);
                for pb in columns {
                    let panel_b = &space_b[pb * size_b..(pb + 1) * size_b];
                    for pa in rows.clone() {
                        let (row, col) = (pa * mr, pb * nr);
                        let size = [mr.min(m - row), nr.min(n - col)];
                        let (rows_a, strides) = match &in_place {
                            Some(a) => (&a.data[row * a.row_stride..], [a.row_stride, 1]),
                            None => (&space_a[(pa - rows.start) * size_a..], [1, mr]),
                        };
                        let next = rows_a.as_ptr().wrapping_add(match &in_place {
                            Some(a) => mr * a.row_stride,
                            None => size_a,
                        });
                        if size[1] == nr
                            && let Some(c) = sink.direct(row, col, size)
                        {
                            let (stride, add) = (sink.row_stride, sink.epilogue.accumulate);
                            // SAFETY: whole rows of f32 in bounds, this item's alone.
                            unsafe {
                                kernel.tile_at(
                                    size[0], steps, rows_a, strides, panel_b, c, stride, add, next,
                                );
                            }
                        } else {
                            let c = &mut tile.0;
                            kernel.tile(size[0], steps, rows_a, strides, panel_b, c, nr, false);
                            sink.store_tile([row, col], size, &tile.0, nr);
                        }
                    }
                }
            });
        };
        match small {
            true => (0..groups * blocks).for_each(item),
            false => parallel_each(groups * blocks, item),
        }
    });
}

/// How a product is cut into items of work: groups of rows, which the thread that runs the item
/// packs for itself, times blocks of columns.
struct Split {
    groups: usize,
    blocks: usize,
}

impl Split {
    /// Equal items, a multiple of the threads in number: small enough that threads end together,
    /// and that a group stays in the second-level cache while columns pass by.
    fn of(panels_a: usize, panels_b: usize, tile: usize) -> Split {
        let threads = count();
        let most = (ITEM / (tile * panels_b).max(1)).clamp(1, GROUP);
        let rounds = panels_a.div_ceil(most * threads);
        let groups = (rounds * threads).min(panels_a);
        // Few rows: threads share them and split the columns.
        let blocks = if groups >= 2 * threads { 1 } else { panels_b.div_ceil(16).min(4 * threads) };
        Split { groups, blocks }
    }
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
    /// Where a tile of c starts, if the kernel may write it by itself.
    #[inline(always)]
    fn direct(&self, row: usize, col: usize, [rows, cols]: [usize; 2]) -> Option<*mut f32> {
        if O::NAME != "f32" || self.col_stride != 1 || !self.epilogue.is_plain() {
            return None;
        }
        let at = row * self.row_stride + col;
        Some(self.data.at(at..at + (rows - 1) * self.row_stride + cols).cast())
    }

    /// Writes a tile, whose rows lie `stride` apart, at `(row, col)` of c.
    #[inline(always)]
    fn store_tile(
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
