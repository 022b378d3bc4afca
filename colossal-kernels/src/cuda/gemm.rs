//! Matrix product `c = act(alpha * a b + bias)` (or `c += …`) for any strides: by cuBLASLt where it
//! is there and knows the product, else by the kernel in `cuda/gemm.cu`.

use super::blas::{self, Side};
use super::launch::Plain;
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::Activation;
use crate::float::Float;

pub(super) static GEMM: Source = source!("gemm");

/// A strided matrix on the device: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    /// The elements.
    pub data: Slice<'a, T>,
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
    pub fn new(data: Slice<'a, T>, rows: usize, cols: usize) -> Mat<'a, T> {
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

    /// As cuBLASLt takes it, if a row or a column is contiguous.
    fn side(&self) -> Option<Side> {
        let (address, [rows, cols]) = (self.data.address(), [self.rows, self.cols]);
        if (self.col_stride == 1 || cols <= 1) && (self.row_stride >= cols || rows <= 1) {
            Some(Side { address, stride: self.row_stride.max(cols), transposed: false })
        } else if (self.row_stride == 1 || rows <= 1) && (self.col_stride >= rows || cols <= 1) {
            Some(Side { address, stride: self.col_stride.max(rows), transposed: true })
        } else {
            None
        }
    }
}

/// A strided matrix to write to.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    /// The elements.
    pub data: SliceMut<'a, T>,
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
    pub fn new(data: SliceMut<'a, T>, rows: usize, cols: usize) -> MatMut<'a, T> {
        MatMut { data, rows, cols, row_stride: cols, col_stride: 1 }
    }
}

/// What happens to a product on its way out: the twin of [`Epilogue`](crate::Epilogue).
#[derive(Debug, Clone, Copy)]
pub struct Epilogue<'a, T> {
    /// Factor of the product.
    pub alpha: f32,
    /// Add to what is there.
    pub accumulate: bool,
    /// Added to every row; one per column.
    pub bias: Option<Slice<'a, T>>,
    /// Applied last.
    pub activation: Activation,
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Epilogue { alpha: 1.0, accumulate: false, bias: None, activation: Activation::None }
    }
}

/// One product of [`gemm_grouped`].
#[derive(Debug, Clone, Copy)]
pub struct Product<'a, T> {
    /// The left operand `[m, k]`.
    pub a: Mat<'a, T>,
    /// The right operand `[k, n]`.
    pub b: Mat<'a, T>,
    /// Where the dense result `[m, n]` begins in `c`.
    pub at: usize,
}

/// `c = act(alpha * a b + bias)`; see [`Epilogue`].
///
/// # Panics
/// When sizes do not fit.
pub fn gemm<T: Float, O: Float>(
    stream: &Stream,
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    c: MatMut<'_, O>,
    e: &Epilogue<'_, T>,
) -> Result<()> {
    gemm_batched(stream, 1, a, 0, b, 0, c, 0, e)
}

/// `batch` products whose operands lie `a_stride`, `b_stride` and `c_stride` elements apart.
///
/// # Panics
/// When sizes do not fit.
pub fn gemm_batched<T: Float, O: Float>(
    stream: &Stream,
    batch: usize,
    a: Mat<'_, T>,
    a_stride: usize,
    b: Mat<'_, T>,
    b_stride: usize,
    c: MatMut<'_, O>,
    c_stride: usize,
    e: &Epilogue<'_, T>,
) -> Result<()> {
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
    if batch == 0 || c.rows == 0 || c.cols == 0 {
        return Ok(());
    }
    let more = batch - 1;
    let reach = |rows: usize, cols: usize, row: usize, col: usize, apart: usize| match rows * cols {
        0 => 0,
        _ => more * apart + (rows - 1) * row + (cols - 1) * col + 1,
    };
    let inside = |name, reach, len| assert!(reach <= len, "gemm: {name} reaches beyond its data");
    inside("a", reach(a.rows, a.cols, a.row_stride, a.col_stride, a_stride), a.data.len());
    inside("b", reach(b.rows, b.cols, b.row_stride, b.col_stride, b_stride), b.data.len());
    inside("c", reach(c.rows, c.cols, c.row_stride, c.col_stride, c_stride), c.data.len());
    let apart =
        |inner: usize, inners: usize, outer: usize| inner > 0 && outer > (inners - 1) * inner;
    assert!(
        match (c.rows, c.cols) {
            (..=1, ..=1) => true,
            (..=1, _) => c.col_stride > 0,
            (_, ..=1) => c.row_stride > 0,
            _ =>
                apart(c.col_stride, c.cols, c.row_stride)
                    || apart(c.row_stride, c.rows, c.col_stride),
        },
        "gemm: elements of c overlap: strides {} and {} of [{}, {}]",
        c.row_stride,
        c.col_stride,
        c.rows,
        c.cols
    );
    if let Some(bias) = e.bias {
        assert_eq!(bias.len(), c.cols, "gemm: bias has one element per column");
    }
    let strides = [a_stride, b_stride, c_stride];
    if e.activation == Activation::None
        && a.cols > 0
        && (c.col_stride == 1 || c.cols == 1)
        && (O::NAME == T::NAME || (O::NAME == "f32" && e.bias.is_none()))
        && let (Some(side_a), Some(side_b)) = (a.side(), b.side())
    {
        let product = blas::Product {
            sizes: [c.rows, c.cols, a.cols],
            a: side_a,
            b: side_b,
            c: c.data.address(),
            c_stride: c.row_stride.max(c.cols),
            alpha: e.alpha,
            accumulate: e.accumulate,
            bias: e.bias.map(|b| b.address()),
            scales: None,
            inputs: [T::NAME; 2],
            output: O::NAME,
            batch,
            strides,
        };
        if stream.product(&product)? {
            return Ok(());
        }
    }
    let problem = Problem::new(&a, &b, c.data.address(), [c.row_stride, c.col_stride]);
    run::<T, O>(stream, layout(&a, &b), &[problem], batch, strides, e)
}

/// `c[at ..] = a b` (or `+=`) for each product; results lie one after the other in `c`.
///
/// # Panics
/// When sizes do not fit, or results overlap.
pub fn gemm_grouped<T: Float, O: Float>(
    stream: &Stream,
    products: &[Product<'_, T>],
    mut c: SliceMut<'_, O>,
    e: &Epilogue<'_, T>,
) -> Result<()> {
    let mut end = 0;
    for Product { a, b, at } in products {
        assert!(
            a.cols == b.rows,
            "gemm_grouped: [{}, {}] x [{}, {}]",
            a.rows,
            a.cols,
            b.rows,
            b.cols
        );
        assert!(
            *at >= end,
            "gemm_grouped: the result at {at} begins before {end}, where another ends"
        );
        end = at + a.rows * b.cols;
        for (name, m) in [("a", a), ("b", b)] {
            let last = match m.rows * m.cols {
                0 => 0,
                _ => (m.rows - 1) * m.row_stride + (m.cols - 1) * m.col_stride + 1,
            };
            assert!(last <= m.data.len(), "gemm_grouped: {name} reaches beyond its data");
        }
    }
    assert!(end <= c.len(), "gemm_grouped: results end at {end} of {}", c.len());
    assert!(e.bias.is_none(), "gemm_grouped: products have no bias");
    let mut groups: [Vec<Problem>; 4] = Default::default();
    for Product { a, b, at } in products.iter().filter(|p| p.a.rows * p.b.cols > 0) {
        if a.rows * b.cols * a.cols >= LARGE {
            // Enough for the whole device.
            let data = c.reborrow().range(*at..at + a.rows * b.cols);
            gemm(stream, *a, *b, MatMut::new(data, a.rows, b.cols), e)?;
            continue;
        }
        let address = c.address() + (at * size_of::<O>()) as u64;
        groups[layout(a, b)].push(Problem::new(a, b, address, [b.cols, 1]));
    }
    for (layout, problems) in groups.iter().enumerate() {
        for problems in problems.chunks(MOST) {
            run::<T, O>(stream, layout, problems, 1, [0; 3], e)?;
        }
    }
    Ok(())
}

/// Multiply-adds of a product that is worth a launch of its own.
const LARGE: usize = 1 << 31;
/// Products of one launch.
const MOST: usize = 32;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Problem {
    operands: [u64; 3],
    strides: [u64; 6],
    sizes: [u32; 3],
    first: u32,
}

impl Problem {
    fn new<T>(a: &Mat<'_, T>, b: &Mat<'_, T>, c: u64, c_strides: [usize; 2]) -> Problem {
        let strides =
            [a.row_stride, a.col_stride, b.row_stride, b.col_stride, c_strides[0], c_strides[1]];
        Problem {
            operands: [a.data.address(), b.data.address(), c],
            strides: strides.map(|s| s as u64),
            sizes: [a.rows, b.cols, a.cols].map(|n| n as u32),
            first: 0,
        }
    }

    fn tiles(&self, tile: u32) -> usize {
        self.sizes[0].div_ceil(tile) as usize * self.sizes[1].div_ceil(tile) as usize
    }
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Group {
    problems: [Problem; MOST],
    bias: u64,
    strides: [u64; 3],
    alpha: f32,
    count: u32,
    accumulate: u32,
    activation: u32,
}

/// Which of the entries reads these operands in the order in which they lie.
const ENTRIES: [&str; 4] = ["gemm_mm", "gemm_mk", "gemm_km", "gemm_kk"];

fn layout<T>(a: &Mat<'_, T>, b: &Mat<'_, T>) -> usize {
    let deep_a = a.col_stride == 1 || a.row_stride != 1;
    let deep_b = b.row_stride == 1 || b.col_stride != 1;
    usize::from(deep_a) * 2 + usize::from(deep_b)
}

fn run<T: Float, O: Float>(
    stream: &Stream,
    layout: usize,
    problems: &[Problem],
    batch: usize,
    strides: [usize; 3],
    e: &Epilogue<'_, T>,
) -> Result<()> {
    let tiles = |tile| problems.iter().map(|p| p.tiles(tile)).sum::<usize>();
    // Large tiles where there are enough of them for the whole device.
    let tile = if tiles(128) * batch >= stream.device().multiprocessors() { 128 } else { 64 };
    let mut group: Group = bytemuck::Zeroable::zeroed();
    let mut first = 0;
    for (to, p) in group.problems.iter_mut().zip(problems) {
        *to = Problem { first, ..*p };
        first += p.tiles(tile) as u32;
    }
    group.bias = e.bias.map_or(0, |b| b.address());
    group.alpha = e.alpha;
    group.count = problems.len() as u32;
    group.accumulate = u32::from(e.accumulate);
    group.activation = e.activation as u32;
    group.strides = strides.map(|s| s as u64);
    let half = T::NAME != "f32";
    let f = stream.function(&GEMM, &defines(T::CUDA, O::CUDA, tile), ENTRIES[layout])?;
    // The slabs of all stages, and afterwards the finished tile.
    let slabs = if half { 4 * 2 * tile * 32 * 2 } else { 4 * 16 * (tile + 4) * 4 };
    let shared = slabs.max(tile * (tile + 4) * 4);
    let threads = if half && tile == 64 { 128 } else { 256 };
    for from in (0..batch).step_by(65535) {
        let now = (batch - from).min(65535);
        let mut group = group;
        let sizes = [size_of::<T>(), size_of::<T>(), size_of::<O>()];
        for p in &mut group.problems[..problems.len()] {
            for i in 0..3 {
                p.operands[i] += (from * strides[i] * sizes[i]) as u64;
            }
        }
        let grid = Grid { blocks: [first, now as u32, 1], threads: [threads, 1, 1], shared };
        f.launch(grid, args![Plain(group)])?;
    }
    Ok(())
}

/// What the kernels are compiled under.
pub(super) fn defines(
    input: &'static str,
    output: &'static str,
    tile: u32,
) -> [(&'static str, &'static str); 4] {
    let tile = if tile == 128 { "128" } else { "64" };
    let half = if input == "float" { "0" } else { "1" };
    [("TYPE", input), ("OUT", output), ("TILE", tile), ("HALF", half)]
}
