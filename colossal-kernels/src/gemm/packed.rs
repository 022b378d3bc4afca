//! A product of bounded depth from packed panels.
//!
//! It is cut into a cell a thread, whose columns of `b` that thread packs for itself, and from whose items of
//! work others take when they are done with their own. First rows of `a` meet each panel of `b` while it is
//! fresh. Then a group of rows, small enough for the second-level cache, meets all columns; the thread that
//! uses it packs it. Either is read where it lies if the kernel can. What is packed or read next is fetched from
//! memory by the kernels that run before, so that packing costs little more than its instructions.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};

use super::epilogue::Sink;
use super::micro::{Ahead, Kernel, Out, TILE};
use super::{Mat, pack, with_workspace};
use crate::float::Float;
use crate::threads::{Parts, count, parallel_each};

/// Multiply-adds that a thread takes from a cell at a time: some 70 microseconds.
const SHARE: usize = 4 << 20;
/// Panels of one group of rows at most.
const GROUP: usize = 8;
/// Multiply-adds of a product that one thread has done before another has begun.
const ALONE: usize = 64 * 64 * 64;
/// Panels of rows that meet a panel of `b` as soon as it is packed; while they do, the next is fetched.
const FIRST: usize = 2;

/// `c = act(alpha * a b + bias)` where the kernel's sums take the whole depth: so many columns at a time as stay
/// near when they are packed.
pub(super) fn pass<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    sink: &Sink<'_, O, E>,
) {
    let kernel = Kernel::of::<T>();
    let (panels, size) = (b.cols.div_ceil(kernel.nr), kernel.panel(kernel.nr, a.cols).max(1));
    let parts = (panels * size).div_ceil(kernel.columns).clamp(1, panels.max(1));
    for part in 0..parts {
        let first = panels * part / parts * kernel.nr;
        let end = (panels * (part + 1) / parts * kernel.nr).min(b.cols);
        let data = &b.data[(first * b.col_stride).min(b.data.len())..];
        near(a, Mat { data, cols: end - first, ..b }, &sink.from(0, first));
    }
}

/// Of columns so few that what is packed of them stays in the last-level cache.
fn near<T: Float, O: Float, E: Float>(a: Mat<'_, T>, b: Mat<'_, T>, sink: &Sink<'_, O, E>) {
    let kernel = Kernel::of::<T>();
    let [down, across] = grid([a.rows, b.cols, a.cols]);
    let (panels_a, panels_b) = (a.rows.div_ceil(kernel.mr), b.cols.div_ceil(kernel.nr));
    let cell = |cell: usize| {
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
        Cell::new(Packed::new(kernel, a, b, sink.from(rows.start, cols.start)))
    };
    let cells: Vec<_> = (0..down * across).map(cell).collect();
    let each = cells.iter().map(|cell| cell.product.room()).max().unwrap_or(0);
    with_workspace(cells.len() * each, |space| {
        let parts = Parts::new(space);
        parallel_each(cells.len(), |own| {
            let room = |cell: usize| cell * each..cell * each + cells[cell].product.room();
            let product = &cells[own].product;
            // SAFETY: this cell's own, until it is said to be packed.
            product.first(unsafe { parts.range(room(own)) });
            cells[own].packed.store(true, Release);
            for other in (own..cells.len()).chain(0..own) {
                // Cells of all columns pack the same: then what this thread has packed is nearer.
                let packed = if across == 1 { own } else { other };
                if cells[packed].packed.load(Acquire) {
                    // SAFETY: written before it was said to be packed, and by nobody afterwards.
                    cells[other].work(unsafe { parts.shared(room(packed)) });
                }
            }
        });
    });
}

/// A part of a product: one thread packs its columns, and whoever is free takes its items of work.
struct Cell<'a, T, O, E> {
    product: Packed<'a, T, O, E>,
    split: Split,
    /// Are its columns packed, and its first rows multiplied?
    packed: AtomicBool,
    /// The next item.
    next: AtomicUsize,
}

impl<'a, T: Float, O: Float, E: Float> Cell<'a, T, O, E> {
    fn new(product: Packed<'a, T, O, E>) -> Self {
        let split = Split::of_cell(&product);
        Cell { product, split, packed: AtomicBool::new(false), next: AtomicUsize::new(0) }
    }

    /// Works on items that nobody has begun, until there are none.
    fn work(&self, columns: &[f32]) {
        self.product.items(&self.split, columns, || self.next.fetch_add(1, Relaxed));
    }
}

/// How many rows and columns of cells, one a thread, cut a product: those with the least to pack.
fn grid([m, n, k]: [usize; 3]) -> [usize; 2] {
    let threads = if m * n * k < ALONE { 1 } else { count() };
    let cells = (1..=threads).filter(|down| threads.is_multiple_of(*down));
    let cells = cells.map(|down| [down, threads / down]);
    cells.min_by_key(|[down, across]| m / down + n / across).unwrap_or([1, 1])
}

/// A product under way.
struct Packed<'a, T, O, E> {
    kernel: Kernel,
    a: Mat<'a, T>,
    /// `a` as the kernel reads it, if it can.
    words: Option<Mat<'a, f32>>,
    /// The columns of b.
    b: Mat<'a, T>,
    /// They as the kernel reads them, if it can.
    columns: Option<&'a [f32]>,
    steps: usize,
    sink: Sink<'a, O, E>,
}

/// Panels of rows, ready for the kernel.
struct Rows<'a, T, O, E> {
    product: &'a Packed<'a, T, O, E>,
    panels: Range<usize>,
    packed: &'a mut [f32],
    /// Floats from the start of a packed panel to that of the next.
    apart: usize,
    scratch: Tile,
}

#[repr(align(64))]
struct Tile([f32; TILE]);

impl<'a, T: Float, O: Float, E: Float> Packed<'a, T, O, E> {
    fn new(kernel: Kernel, a: Mat<'a, T>, b: Mat<'a, T>, sink: Sink<'a, O, E>) -> Self {
        let (words, b) = (pack::in_place(&kernel, &a), b.t());
        let columns = pack::columns_in_place(&kernel, &b);
        Packed { kernel, a, words, b, columns, steps: kernel.steps(a.cols), sink }
    }

    fn panels_a(&self) -> usize {
        self.a.rows.div_ceil(self.kernel.mr)
    }

    fn panels_b(&self) -> usize {
        self.b.rows.div_ceil(self.kernel.nr)
    }

    /// Floats of a panel of `b`. Pairs of bf16 take the room of one f32.
    fn size_b(&self) -> usize {
        self.kernel.nr * self.steps
    }

    /// Floats of all that are packed.
    fn room(&self) -> usize {
        if self.columns.is_some() { 0 } else { self.panels_b() * self.size_b() }
    }

    /// A panel of columns of these, and the floats from step to step.
    fn panel<'x>(&'x self, packed: &'x [f32], column: usize) -> (&'x [f32], usize) {
        match self.columns {
            Some(columns) => (&columns[column * self.kernel.nr..], self.b.col_stride),
            None => (&packed[column * self.size_b()..], self.kernel.nr),
        }
    }

    /// Panels of rows behind the first ones.
    fn panels_left(&self) -> usize {
        self.panels_a() - FIRST.min(self.panels_a())
    }

    /// Panels of a group of rows at most: as many as stay in the second-level cache while columns pass by.
    fn group(&self) -> usize {
        (self.kernel.room / (self.kernel.mr * self.steps).max(1)).clamp(1, GROUP)
    }

    /// Packs the columns, each into its part of the room, and multiplies the first rows with them.
    fn first(&self, room: &mut [f32]) {
        let (nr, size) = (self.kernel.nr, self.size_b());
        let first = FIRST.min(self.panels_a());
        self.with_rows(first, |rows| {
            rows.take(0..first);
            for column in 0..self.panels_b() {
                let panel = match self.columns {
                    Some(_) => self.panel(&[], column),
                    None => {
                        let panel = &mut room[column * size..(column + 1) * size];
                        pack::panel(&self.kernel, self.b, column * nr, nr, panel);
                        (&*panel, nr)
                    }
                };
                for row in 0..first {
                    let next = self.ahead(&self.b, (column + 1) * nr, row);
                    rows.tile(row, column, panel, next);
                }
            }
        });
    }

    /// Multiplies the groups of rows behind the first ones: those items that `next` says, up to one too large.
    fn items(&self, split: &Split, columns: &[f32], mut next: impl FnMut() -> usize) {
        let Split { groups, blocks } = *split;
        let left = self.panels_left();
        let bound = |group: usize| self.panels_a() - left + left * group / groups;
        self.with_rows(left.div_ceil(groups.max(1)), |rows| {
            loop {
                let item = next();
                if item >= groups * blocks {
                    break;
                }
                let block = item % blocks;
                let end = self.panels_b() * (block + 1) / blocks;
                rows.take(bound(item / blocks)..bound(item / blocks + 1));
                // The rows that this thread is likely to take next.
                let after = bound((item + 1) / blocks);
                for column in self.panels_b() * block / blocks..end {
                    let panel = self.panel(columns, column);
                    let left = end - column - 1;
                    for row in rows.panels.clone() {
                        let next = match left {
                            0 | 1 if after > rows.panels.start => {
                                let at = (after + row - rows.panels.start) * self.kernel.mr;
                                self.ahead(&self.a, at, 1 - left)
                            }
                            _ => rows.next(row),
                        };
                        rows.tile(row, column, panel, next);
                    }
                }
            }
        });
    }

    /// Lends room for so many panels of rows.
    fn with_rows(&self, most: usize, f: impl FnOnce(&mut Rows<'_, T, O, E>)) {
        let apart = pack::apart(self.kernel.mr * self.steps);
        let len = if self.words.is_some() { 0 } else { most * apart };
        with_workspace(len, |packed| {
            f(&mut Rows { product: self, panels: 0..0, packed, apart, scratch: Tile([0.0; TILE]) });
        });
    }

    /// Part 0 or 1 of a panel of rows of `x` from `first` on: what one tile has the time to fetch.
    fn ahead(&self, x: &Mat<'_, T>, first: usize, part: usize) -> Ahead {
        Ahead::rows(x, first, self.steps, part)
    }
}

impl<T: Float, O: Float, E: Float> Rows<'_, T, O, E> {
    /// Packs these panels of `a`, unless they are there or can be read where they lie.
    fn take(&mut self, panels: Range<usize>) {
        if panels == self.panels {
            return;
        }
        let Packed { kernel, a, words, .. } = self.product;
        if words.is_none() {
            let packed = &mut self.packed[..panels.len() * self.apart];
            pack::panels(kernel, *a, panels.start * kernel.mr, kernel.mr, self.apart, packed);
        }
        self.panels = panels;
    }

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
    fn tile(&mut self, row: usize, column: usize, (panel, run): (&[f32], usize), next: Ahead) {
        let Packed { kernel, a, b, steps, sink, .. } = self.product;
        let (i, j) = (row * kernel.mr, column * kernel.nr);
        let size = [kernel.mr.min(a.rows - i), kernel.nr.min(b.rows - j)];
        // The tile after this one.
        let [i2, j2] = match row + 1 < self.panels.end {
            true => [i + kernel.mr, j],
            false => [self.panels.start * kernel.mr, j + kernel.nr],
        };
        sink.ask([i2, j2], [kernel.mr, kernel.nr]);
        let direct = match size[1] == kernel.nr {
            true => sink.direct([i, j], size, kernel.narrows(), &mut self.scratch.0),
            false => None,
        };
        let out = direct.unwrap_or(Out::new(self.scratch.0.as_mut_ptr(), kernel.nr, false));
        let (rows, [by_row, by_step]) = self.at(row);
        let strides = [by_row, by_step, run];
        // SAFETY: whole rows in bounds that are this item's alone, or scratch, which has room for any
        // kernel's tile.
        unsafe { kernel.tile_at(size[0], *steps, rows, panel, strides, out, next) }
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
    /// Of a cell: items so small that a thread that takes the last one is not waited for long.
    fn of_cell<T: Float, O: Float, E: Float>(product: &Packed<'_, T, O, E>) -> Split {
        let Packed { kernel, steps, .. } = product;
        let work = product.group() * kernel.mr * kernel.nr * steps;
        let columns = (SHARE / work.max(1)).max(1);
        Split {
            groups: product.panels_left().div_ceil(product.group()),
            blocks: product.panels_b().div_ceil(columns),
        }
    }
}
