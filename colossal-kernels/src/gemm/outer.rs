//! Few rows times a matrix whose rows are contiguous: sums of outer products, in f32 or bf16, which AVX-512
//! multiplies by `vdpbf16ps` and AVX2 as f32.
//!
//! The sums of a block of columns stay in the first-level cache. Some steps of depth at a time, their rows of `b`
//! pass by, each read from its left to its right as it lies in memory, and are added up in registers; meanwhile
//! the rows of the next steps are asked for into the second level.

mod avx2;
mod avx512;

use super::micro::Kernel;
use super::skinny::Results;
use super::{Mat, pack, with_workspace};
use crate::float::Float;
use crate::isa::{Isa, isa};
use crate::threads::{count, parallel_each};

/// Rows of a tile at most …
const ROWS: usize = 8;
/// … and with AVX2, which has half of the registers.
const ROWS_AVX2: usize = 6;
/// Floats from one step of packed rows to the next.
const APART: usize = 8;
/// Rows of a tile at most that leave registers for more columns.
const FEW: usize = 4;
/// Steps of depth whose products are added up in registers.
const STEPS: usize = 16;
/// Sums of a block of columns, about: half of the first-level cache.
const SUMS: usize = 6 << 10;
/// Bytes between what is multiplied and what is asked for, at least.
const AHEAD: usize = 32 << 10;

/// Rows up to which this is faster than packing `b`.
pub(super) fn rows<T: Float>() -> usize {
    match (isa(), size_of::<T>()) {
        (Isa::Avx2, _) => 24,
        (_, 4) => 48,
        _ => 16,
    }
}

/// `a [m, k]` times `b [k, n]`, whose rows are contiguous, where `few_rows::fits` says so.
pub(super) fn gemm<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    results: &Results<'_, O, E>,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    let kernel = Kernel::of::<T>();
    let steps = kernel.steps(k);
    let tiles = m.div_ceil(if isa() == Isa::Avx2 { ROWS_AVX2 } else { ROWS });
    let each = m.div_ceil(tiles);
    with_workspace(tiles * steps * APART, |packed| {
        for (t, packed) in packed.chunks_exact_mut((steps * APART).max(1)).enumerate() {
            let data = &a.data[(t * each * a.row_stride).min(a.data.len())..];
            let a = Mat { data, rows: each.min(m - (t * each).min(m)), ..a };
            pack::panel(&kernel, a, 0, APART, packed);
        }
        let packed = &*packed;
        // As many blocks for one thread as for another.
        let blocks = (m * n).div_ceil(SUMS).next_multiple_of(count());
        let width = n.div_ceil(blocks).next_multiple_of(across(each));
        parallel_each(n.div_ceil(width), |i| {
            let (first, columns) = (i * width, width.min(n - i * width));
            with_workspace(tiles * each * width, |sums| {
                sums.fill(0.0);
                let block = Block {
                    a: packed,
                    b: &b.data[first..],
                    stride: b.row_stride,
                    k,
                    columns,
                    sums,
                    width,
                };
                block.add(&kernel, tiles, each);
                results.rows(first, columns, sums, width);
            });
        });
    });
}

/// Columns of a tile of so many rows.
fn across(rows: usize) -> usize {
    if rows <= FEW { 64 } else { 32 }
}

/// A block of columns under way.
struct Block<'a, T> {
    /// Tiles of rows: of each step [`APART`] of them.
    a: &'a [f32],
    /// Rows of this block, `stride` apart.
    b: &'a [T],
    stride: usize,
    /// Depth.
    k: usize,
    columns: usize,
    /// Of all rows, `width` apart.
    sums: &'a mut [f32],
    width: usize,
}

/// Room for a tile's columns of `b`, as the kernel multiplies them.
#[repr(align(64))]
struct Columns([f32; STEPS * 32]);

impl Columns {
    /// How a tile reads its columns: where they lie, …
    const READ: u8 = 0;
    /// … so as well, and keeps them for the next tiles, for in the first level they crowd into few sets, …
    const KEEP: u8 = 1;
    /// … or as the tile before has kept them.
    const KEPT: u8 = 2;
}

/// What a tile of sums is added up of.
struct Tile<T> {
    /// Of each step [`APART`] rows.
    a: *const f32,
    /// Rows of a tile's columns, `stride` elements apart.
    b: *const T,
    stride: usize,
    /// Rows of `b`.
    k: usize,
    /// Columns of the tile.
    columns: usize,
    /// What is asked for into the second level: so many elements behind.
    ahead: usize,
    /// Room for what tiles of the same columns share.
    kept: *mut f32,
    /// Where sums lie, `width` apart.
    sums: *mut f32,
    width: usize,
}

impl<T: Float> Block<'_, T> {
    /// Adds all products to the sums of `tiles` of `rows` rows.
    fn add(self, kernel: &Kernel, tiles: usize, rows: usize) {
        let Block { a, b, stride, k, columns, sums, width } = self;
        if k == 0 || columns == 0 {
            return;
        }
        let (each, steps) = (if kernel.pairs { 2 } else { 1 }, kernel.steps(k));
        assert!(b.len() >= (k - 1) * stride + columns && a.len() >= tiles * steps * APART);
        assert!(sums.len() >= tiles * rows * width && columns <= width);
        let across = across(rows);
        assert!(rows <= APART && width.is_multiple_of(across));
        let step = if rows <= FEW { 2 * STEPS * each } else { STEPS * each };
        let ahead = (AHEAD / (columns * size_of::<T>())).next_multiple_of(step).max(step) * stride;
        let mut kept = Columns([0.0; STEPS * 32]);
        for at in (0..k).step_by(step) {
            for column in (0..columns).step_by(across) {
                for t in 0..tiles {
                    let tile = Tile {
                        a: a[(t * steps + at / each) * APART..].as_ptr(),
                        b: b[at * stride + column..].as_ptr(),
                        stride,
                        k: step.min(k - at),
                        columns: across.min(columns - column),
                        ahead,
                        kept: kept.0.as_mut_ptr(),
                        sums: sums[t * rows * width + column..].as_mut_ptr(),
                        width,
                    };
                    let columns = match t {
                        _ if tiles == 1 => Columns::READ,
                        0 => Columns::KEEP,
                        _ => Columns::KEPT,
                    };
                    // SAFETY: `few_rows::fits` was asked; in bounds by the assertions.
                    unsafe { tile.add(rows, columns) };
                }
            }
        }
    }
}

impl<T: Float> Tile<T> {
    /// # Safety
    /// `few_rows::fits` was asked, and pointers lead where the fields say: to `rows` rows of sums.
    unsafe fn add(&self, rows: usize, columns: u8) {
        macro_rules! call {
            ($($m:literal $v:literal),*; $($many:literal),*) => {
                match (size_of::<T>(), rows, columns) {
                    // SAFETY: by contract.
                    $((4, $m, 0) => unsafe { avx512::tile_f32::<T, $m, $v, 0>(self) },)*
                    // SAFETY: by contract.
                    $((4, $many, 1) => unsafe { avx512::tile_f32::<T, $many, 2, 1>(self) },)*
                    // SAFETY: by contract.
                    $((4, $many, 2) => unsafe { avx512::tile_f32::<T, $many, 2, 2>(self) },)*
                    // SAFETY: by contract.
                    $((_, $m, 0) => unsafe { avx512::tile_bf16::<T, $m, $v, 0>(self) },)*
                    // SAFETY: by contract.
                    $((_, $many, 1) => unsafe { avx512::tile_bf16::<T, $many, 2, 1>(self) },)*
                    // SAFETY: by contract.
                    $((_, $many, 2) => unsafe { avx512::tile_bf16::<T, $many, 2, 2>(self) },)*
                    _ => unreachable!("no kernel of {rows} rows"),
                }
            };
        }
        macro_rules! call_avx2 {
            ($($m:literal),*) => {
                match rows {
                    // SAFETY: by contract.
                    $($m => unsafe { avx2::tile::<T, $m>(self) },)*
                    _ => unreachable!("no kernel of {rows} rows"),
                }
            };
        }
        match isa() {
            Isa::Avx2 => call_avx2!(1, 2, 3, 4, 5, 6),
            _ => call!(1 4, 2 4, 3 4, 4 4, 5 2, 6 2, 7 2, 8 2; 5, 6, 7, 8),
        }
    }
}
