//! A product of bounded depth from packed panels.
//!
//! A large product is cut into a cell a thread, whose operands that thread packs for itself; threads
//! share the panels of smaller ones. In a cell the first rows of `a` meet each panel of `b` while it is
//! fresh. Then a group of rows, small enough for the second-level cache, meets all columns; the thread
//! that uses it packs it, unless the kernel can read it where it lies. What is packed next is fetched
//! from memory by the kernels that run before, so that packing costs little more than its instructions.

use std::ops::Range;

use super::epilogue::Sink;
use super::micro::{Ahead, Kernel, Out, TILE};
use super::{Mat, pack, with_workspace};
use crate::float::Float;
use crate::threads::{Parts, count, parallel_each, parallel_for};

/// Multiply-adds of one item of work, in floats: some 400 microseconds. Smaller ones would have groups of one
/// panel, whose packing then reads parts of lines.
const ITEM: usize = 24 << 20;
/// Panels of one group of rows at most …
const GROUP: usize = 8;
/// … and the floats in them: they should stay in a 1 MiB second-level cache.
const ROOM: usize = 112 << 10;
/// Rows times columns of a cell over their sum, at least: of 256 x 256 it is this.
const CELL: usize = 128;
/// Panels of rows that meet a panel of `b` as soon as it is packed; while they do, the next is fetched.
const FIRST: usize = 2;

/// `c = act(alpha * a b + bias)` where the kernel's sums take the whole depth.
pub(super) fn pass<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    sink: &Sink<'_, O, E>,
) {
    let Some([down, across]) = grid(a.rows, b.cols) else { return together(a, b, sink) };
    let kernel = Kernel::of::<T>();
    let (panels_a, panels_b) = (a.rows.div_ceil(kernel.mr), b.cols.div_ceil(kernel.nr));
    parallel_each(down * across, |cell| {
        let (i, j) = (cell / across, cell % across);
        let rows = panels_a * i / down * kernel.mr..panels_a * (i + 1) / down * kernel.mr;
        let cols = panels_b * j / across * kernel.nr..panels_b * (j + 1) / across * kernel.nr;
        let a = Mat {
            data: &a.data[rows.start * a.row_stride..],
            rows: rows.end.min(a.rows) - rows.start,
            ..a
        };
        let b = Mat {
            data: &b.data[cols.start * b.col_stride..],
            cols: cols.end.min(b.cols) - cols.start,
            ..b
        };
        together(a, b, &sink.from(rows.start, cols.start));
    });
}

/// How many rows and columns of cells, one a thread, cut a product so large that packing a cell's operands
/// is little beside multiplying them: then each thread packs its own, and nothing passes from one
/// core's cache to another's.
fn grid(m: usize, n: usize) -> Option<[usize; 2]> {
    let threads = count();
    let cells = (1..=threads).filter(|down| threads.is_multiple_of(*down));
    let cells = cells.map(|down| [down, threads / down]);
    let cost = |[down, across]: &[usize; 2]| m / down + n / across;
    let best = cells.min_by_key(cost)?;
    let (rows, cols) = (m / best[0], n / best[1]);
    (threads > 1 && rows * cols >= CELL * (rows + cols)).then_some(best)
}

/// The same by all threads that are free.
fn together<T: Float, O: Float, E: Float>(a: Mat<'_, T>, b: Mat<'_, T>, sink: &Sink<'_, O, E>) {
    let kernel = Kernel::of::<T>();
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let (panels_a, panels_b) = (m.div_ceil(kernel.mr), n.div_ceil(kernel.nr));
    let size_b = kernel.panel(kernel.nr, k);
    let small = m * n * k < 64 * 64 * 64;
    let words = pack::in_place(&kernel, &a);
    let product = Packed { kernel, a, words, b: b.t(), steps: kernel.steps(k), sink };
    let first = FIRST.min(panels_a);
    // Pairs of bf16 take the room of one f32: the workspace is counted in floats either way.
    with_workspace(panels_b * size_b, |space_b| {
        let parts = Parts::new(space_b);
        let grain = if small { usize::MAX } else { (8192 / size_b.max(1)).max(1) };
        parallel_for(panels_b, grain, |range| {
            product.with_rows(0..first, |rows| {
                for column in range {
                    // SAFETY: each panel belongs to one piece.
                    let panel = unsafe { parts.range(column * size_b..(column + 1) * size_b) };
                    pack::panel(&kernel, b.t(), column * kernel.nr, kernel.nr, panel);
                    for row in 0..first {
                        let next = product.ahead(&product.b, (column + 1) * kernel.nr, row);
                        rows.tile(row, column, panel, next);
                    }
                }
            });
        });
        let space_b = &*space_b;
        let Split { groups, blocks } =
            Split::of(panels_a - first, panels_b, kernel.panel(kernel.mr, k), kernel.nr);
        let bound = |group: usize| first + (panels_a - first) * group / groups;
        let item = |item: usize| {
            let (group, block) = (item / blocks, item % blocks);
            let columns = panels_b * block / blocks..panels_b * (block + 1) / blocks;
            // The rows that this thread takes next.
            let after = bound((item + 1) / blocks) * kernel.mr;
            product.with_rows(bound(group)..bound(group + 1), |rows| {
                for column in columns.clone() {
                    let panel = &space_b[column * size_b..(column + 1) * size_b];
                    let left = columns.end - column - 1;
                    for row in rows.panels.clone() {
                        let next = match left {
                            0 | 1 => {
                                let at = after + (row - rows.panels.start) * kernel.mr;
                                product.ahead(&product.a, at, 1 - left)
                            }
                            _ => rows.next(row),
                        };
                        rows.tile(row, column, panel, next);
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

/// A product under way.
struct Packed<'a, T, O, E> {
    kernel: Kernel,
    a: Mat<'a, T>,
    /// `a` as the kernel reads it, if it can.
    words: Option<Mat<'a, f32>>,
    /// The columns of b.
    b: Mat<'a, T>,
    steps: usize,
    sink: &'a Sink<'a, O, E>,
}

/// Panels of rows, ready for the kernel.
struct Rows<'a, T, O, E> {
    product: &'a Packed<'a, T, O, E>,
    panels: Range<usize>,
    packed: &'a [f32],
    /// Floats from the start of a packed panel to that of the next.
    apart: usize,
    scratch: Tile,
}

#[repr(align(64))]
struct Tile([f32; TILE]);

impl<T: Float, O: Float, E: Float> Packed<'_, T, O, E> {
    /// Packs these panels of `a`, unless they can be read where they lie.
    fn with_rows(&self, panels: Range<usize>, f: impl FnOnce(&mut Rows<'_, T, O, E>)) {
        let mr = self.kernel.mr;
        let apart = pack::apart(mr * self.steps);
        let len = if self.words.is_some() { 0 } else { panels.len() * apart };
        with_workspace(len, |packed| {
            if len > 0 {
                pack::panels(&self.kernel, self.a, panels.start * mr, mr, apart, packed);
            }
            f(&mut Rows { product: self, panels, packed, apart, scratch: Tile([0.0; TILE]) });
        });
    }

    /// Part 0 or 1 of a panel of rows of `x` from `first` on: what one tile has the time to fetch.
    fn ahead(&self, x: &Mat<'_, T>, first: usize, part: usize) -> Ahead {
        Ahead::rows(x, first, self.steps, part)
    }
}

impl<T: Float, O: Float, E: Float> Rows<'_, T, O, E> {
    /// Where panel `row` starts, and the strides of its rows and steps.
    fn at(&self, row: usize) -> (&[f32], [usize; 2]) {
        let mr = self.product.kernel.mr;
        match &self.product.words {
            Some(a) => (&a.data[row * mr * a.row_stride..], [a.row_stride, 1]),
            None => (&self.packed[(row - self.panels.start) * self.apart..], [1, mr]),
        }
    }

    /// The panel behind `row`, which is read after it.
    fn next(&self, row: usize) -> Ahead {
        let Packed { kernel, a, words, steps, .. } = self.product;
        match words {
            Some(_) => Ahead::rows(a, (row + 1) * kernel.mr, *steps, 0),
            None => Ahead::lines(self.at(row).0.as_ptr().wrapping_add(self.apart)),
        }
    }

    /// Multiplies panel `row` of `a` with panel `column` of `b`.
    fn tile(&mut self, row: usize, column: usize, panel: &[f32], next: Ahead) {
        let Packed { kernel, a, b, steps, sink, .. } = self.product;
        let (i, j) = (row * kernel.mr, column * kernel.nr);
        let size = [kernel.mr.min(a.rows - i), kernel.nr.min(b.rows - j)];
        let direct = match size[1] == kernel.nr {
            true => sink.direct([i, j], size, kernel.narrows(), &mut self.scratch.0),
            false => None,
        };
        let out = direct.unwrap_or(Out::new(self.scratch.0.as_mut_ptr(), kernel.nr, false));
        let (rows, strides) = self.at(row);
        // SAFETY: whole rows in bounds that are this item's alone, or scratch, which has room for any
        // kernel's tile.
        unsafe { kernel.tile_at(size[0], *steps, rows, strides, panel, out, next) }
        if direct.is_none() {
            sink.store_tile([i, j], size, &self.scratch.0, kernel.nr);
        }
    }
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
    fn of(panels_a: usize, panels_b: usize, panel: usize, nr: usize) -> Split {
        let threads = count();
        let room = (ROOM / panel.max(1)).clamp(1, GROUP);
        let most = (ITEM / (panel * nr * panels_b).max(1)).clamp(1, room);
        let rounds = panels_a.div_ceil(most * threads);
        let groups = (rounds * threads).min(panels_a);
        // Few rows: threads share them and split the columns.
        let blocks = if groups >= 2 * threads { 1 } else { panels_b.div_ceil(16).min(4 * threads) };
        Split { groups, blocks }
    }
}
