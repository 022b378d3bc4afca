//! Many products at once, of sizes that differ: one an expert. Each unit of work is a block of columns
//! of one product, packed and multiplied by one thread: nobody waits between packing and multiplying,
//! and what a thread packs stays in its caches.

use super::micro::Kernel;
use super::{Epilogue, Mat, MatMut, Sink, gemm, one_pass, pack};
use crate::float::Float;
use crate::profile::{self, Work};
use crate::threads::{Parts, count, parallel_each};

/// Elements of depth that a thread multiplies in one pass.
const DEEP: usize = 2048;

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

/// `c[at ..] = a b` (or `+=`) for each product; results lie one after the other in `c`.
///
/// ```
/// use colossal_kernels::{Epilogue, Mat, Product, gemm_grouped};
/// let (x, w) = ([1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0f32, 1.0, 2.0, 0.0]);
/// // Two rows times the first weight [1, 2], one row times the second.
/// let products = [
///     Product { a: Mat::new(&x[..4], 2, 2), b: Mat::new(&w[..2], 1, 2).t(), at: 0 },
///     Product { a: Mat::new(&x[4..], 1, 2), b: Mat::new(&w[2..], 1, 2).t(), at: 2 },
/// ];
/// let mut y = [0.0f32; 3];
/// gemm_grouped(&products, &mut y, &Epilogue::default());
/// assert_eq!(y, [3.0, 7.0, 10.0]);
/// ```
///
/// # Panics
/// When sizes do not fit, or results overlap.
pub fn gemm_grouped<T: Float, O: Float>(
    products: &[Product<'_, T>],
    c: &mut [O],
    e: &Epilogue<'_, T>,
) {
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
        a.check("a");
        b.check("b");
    }
    assert!(end <= c.len(), "gemm_grouped: results end at {end} of {}", c.len());
    assert!(
        e.bias.is_none() && e.gate.is_none() && e.residual.is_none(),
        "gemm_grouped: products have no bias, gate or residual"
    );
    let work = |p: &Product<'_, T>| p.a.rows * p.b.cols * p.a.cols;
    let rows = products.iter().map(|p| p.a.rows).sum();
    let depth = products.iter().map(|p| p.a.cols).sum::<usize>();
    let (n, k) = (products.first().map_or(0, |p| p.b.cols), depth / products.len().max(1));
    let _span = profile::span::<T>("gemm_grouped", [rows, n, k], || Work {
        flops: 2 * products.iter().map(work).sum::<usize>() as u64,
        bytes: products
            .iter()
            .map(|Product { a, b, .. }| {
                (a.rows + b.cols) * a.cols * size_of::<T>() + a.rows * b.cols * size_of::<O>()
            })
            .sum::<usize>() as u64,
    });
    let kernel = Kernel::of::<T>();
    let nr = kernel.nr;
    let most = products.iter().map(work).max().unwrap_or(0);
    let mut units = Vec::new();
    for product in products.iter().filter(|p| work(p) > 0 || !e.accumulate) {
        let Product { a, b, at } = *product;
        if a.cols > DEEP {
            // Sums of several passes: all threads share one product after the other.
            let c = &mut c[at..at + a.rows * b.cols];
            gemm(a, b, MatMut::new(c, a.rows, b.cols), e);
            continue;
        }
        // Large products are cut, so that threads end together; less where each block packs `a`.
        let panels = b.cols.div_ceil(nr).max(1);
        let each = if pack::in_place(&kernel, &a).is_some() { 2 * count() } else { count() };
        let blocks = (each * work(product)).div_ceil(most.max(1)).clamp(1, panels);
        units.extend((0..blocks).map(|i| {
            let columns = panels * i / blocks * nr..(panels * (i + 1) / blocks * nr).min(b.cols);
            (product, columns)
        }));
    }
    units.sort_by_key(|(p, columns)| std::cmp::Reverse(p.a.rows * columns.len() * p.a.cols));
    let all = Parts::new(c);
    parallel_each(units.len(), |i| {
        let (Product { a, b, at }, columns) = (units[i].0, units[i].1.clone());
        let first = columns.start;
        let data = &b.data[(first * b.col_stride).min(b.data.len())..];
        let block = Mat { data, cols: columns.len(), ..*b };
        let rest = at + first..at + a.rows * b.cols;
        let sink = Sink { data: all.part(rest), row_stride: b.cols, col_stride: 1, epilogue: *e };
        one_pass(*a, block, &sink);
    });
}
