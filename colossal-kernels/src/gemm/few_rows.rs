//! Few rows times a transposed matrix, in registers: f32 or bf16, which AVX-512 multiplies by `vdpbf16ps` and
//! AVX2 as f32.
//!
//! Weights come from memory while those before them are multiplied: in the order of addresses, which
//! memory is fastest in, a group of columns is asked into the second-level cache while the group before
//! it is multiplied. Of what it is asked for the processor drops a part when too much is on its way, be it
//! from the second level to the first: so `a` is cut along the depth into parts that stay in the first level
//! while a group passes by, only the next columns are asked for from there, and what comes from memory is
//! asked for twice where there is time. Whatever else a kernel looks up meanwhile has left the first level, and
//! comes late: a pass is walked with addresses that fit into registers. Two tiles meet the same columns in turn,
//! which the second finds in the first level.
//! One row or two are no more than reading, nor are three or four whose `a` leaves room in the first
//! level: under AVX-512 they take columns whole, in the order of addresses.

mod avx2;
mod avx512;

use super::skinny::Results;
use super::{Mat, with_workspace};
use crate::float::Float;
use crate::isa::{Isa, isa};
use crate::threads::{count, parallel_each};

/// Rows of a tile at most …
const ROWS: usize = 8;
/// … and with AVX2, which has half of the registers.
const ROWS_AVX2: usize = 4;
/// Vectors of `a` of three or four rows beside which the first-level cache has room for columns as they come.
const STREAM: usize = 256;
/// Bytes of columns that threads take at a time, about.
const PIECE: usize = 512 << 10;
/// Columns of a group at most.
const GROUP: usize = 48;
/// Bytes of a group's columns, about: it and the next share the second-level cache with `a`.
const PASSING: usize = 192 << 10;
/// Bytes of a column from which on AVX2 takes several columns for one row or two: the processor foresees
/// where a long one goes on.
const SHORT: usize = 2048;
/// Vectors of `a` that stay in the first-level cache.
const PART: usize = 384;
/// Floats of a vector; a step of depth is one vector of each operand.
const LANES: usize = 16;

/// Has this machine the instructions for `T`, and may they be used?
pub(super) fn fits<T: Float>() -> bool {
    match T::NAME {
        "f32" => isa() >= Isa::Avx2,
        "bf16" => matches!(isa(), Isa::Avx2 | Isa::Avx512Bf16),
        _ => false,
    }
}

/// `a [m, k]` times the transpose of rows `[n, k]`, where [`fits`] says so.
pub(super) fn gemm<T: Float, O: Float, E: Float>(
    a: Mat<'_, T>,
    b: Mat<'_, T>,
    results: &Results<'_, O, E>,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    let steps = k.div_ceil(lanes::<T>());
    let apart = (b.col_stride * size_of::<T>()).max(1);
    let plan = Plan::new(m, steps, apart);
    let each = plan.each;
    let rows = plan.tiles * each;
    with_workspace(rows * steps * LANES, |packed| {
        for (t, packed) in packed.chunks_mut(each * steps * LANES).enumerate() {
            match size_of::<T>() * lanes::<T>() == size_of::<[f32; LANES]>() {
                true => pack(&a, t * each, each, bytemuck::cast_slice_mut::<_, T>(packed), |x| x),
                false => pack(&a, t * each, each, packed, T::to_f32),
            }
        }
        let packed = &*packed;
        // Small enough that threads finish together, large enough to be worth handing out.
        let (even, worth) = (n.div_ceil(4 * count()), 65536 / (m * k));
        let piece = (PIECE / apart).min(even).max(worth).next_multiple_of(plan.group.min(12));
        parallel_each(n.div_ceil(piece), |i| {
            let columns = i * piece..((i + 1) * piece).min(n);
            with_workspace(rows.max(m) * GROUP, |sums| {
                for first in columns.clone().step_by(plan.group) {
                    let count = plan.group.min(columns.end - first);
                    let group = Group { b: &b, first, count };
                    if plan.whole {
                        group.stream(packed, m, sums);
                        results.rows(first, count, sums, GROUP);
                    } else {
                        group.product(packed, &plan, sums);
                        results.columns(first, count, sums, rows);
                    }
                }
            });
        });
    });
}

/// How a product is cut.
struct Plan {
    /// Rows of a tile; the last one is filled up with zeros.
    each: usize,
    /// Tiles.
    tiles: usize,
    /// Tiles whose parts of `a` are in the first-level cache together.
    near: usize,
    /// Steps of depth of a part.
    part: usize,
    /// Columns of a tile.
    width: usize,
    /// Columns that pass by a part, and whose results are stored together.
    group: usize,
    /// Columns are taken whole, in the order of addresses: there is little to do beside reading.
    whole: bool,
}

impl Plan {
    /// Of `m` rows, so many steps deep; columns of `b` lie `apart` bytes from each other.
    fn new(m: usize, steps: usize, apart: usize) -> Plan {
        let avx2 = isa() == Isa::Avx2;
        let tiles = m.div_ceil(if avx2 { ROWS_AVX2 } else { ROWS });
        let each = m.div_ceil(tiles);
        let near = tiles.min(2);
        // Rows of one tile wait for memory, which gives columns fastest one after the other.
        let (part, width) = match m {
            3.. if avx2 => (PART / (near * each), 3),
            1 | 2 if apart >= SHORT => (PART / m, 6),
            1..=ROWS => (PART / 2 / m, 1),
            _ => (PART / (near * each), 3),
        };
        // Parts of about the same size.
        let part = steps.div_ceil(steps.div_ceil(part));
        let group = (PASSING / apart).clamp(width, GROUP) / width * width;
        let whole = !avx2 && (m <= 2 || m <= 4 && m * steps <= STREAM);
        Plan { each, tiles, near, part, width, group, whole }
    }
}

/// Elements of a step: a line of them, but for AVX2 as many as are a line of f32.
fn lanes<T>() -> usize {
    if isa() == Isa::Avx2 { LANES } else { 64 / size_of::<T>() }
}

/// Interleaves `rows` rows of `a` from `first` on: a vector of each, step after step. Those that `a` lacks are zeros.
fn pack<T: Float, P: Float>(
    a: &Mat<'_, T>,
    first: usize,
    rows: usize,
    out: &mut [P],
    to: impl Fn(T) -> P,
) {
    let lanes = lanes::<T>();
    if a.col_stride != 1 {
        out.fill(P::zeroed());
        for k in 0..a.cols {
            let x = &a.data[k * a.col_stride..];
            let out = &mut out[k / lanes * rows * lanes + k % lanes..];
            for r in first..(first + rows).min(a.rows) {
                out[(r - first) * lanes] = to(x[r * a.row_stride]);
            }
        }
        return;
    }
    for r in 0..rows {
        let row = match first + r < a.rows {
            true => &a.data[(first + r) * a.row_stride..][..a.cols],
            false => &[],
        };
        let row = row.chunks(lanes).chain(std::iter::repeat(&[][..]));
        for (x, out) in row.zip(out.chunks_exact_mut(rows * lanes)) {
            let out = &mut out[r * lanes..(r + 1) * lanes];
            out.iter_mut().zip(x).for_each(|(out, x)| *out = to(*x));
            out[x.len()..].fill(P::zeroed());
        }
    }
}

/// Neighbouring columns that meet a part of the depth of some tiles. Pointers lead to memory that holds all of it,
/// but for what is only asked for, which may lie anywhere.
struct Pass<T> {
    /// The first tile: of each step a vector of every row.
    a: *const f32,
    /// Tiles.
    tiles: usize,
    /// Bytes between tiles.
    tile: usize,
    /// The first column.
    b: *const T,
    /// Elements between columns.
    apart: usize,
    /// Columns.
    count: usize,
    /// Elements of a column.
    k: usize,
    /// What comes after all of them: the next columns are asked for into the first level.
    after: *const T,
    /// What is asked for into the second level …
    far: *const i8,
    /// … and how many bytes of it a step.
    stride: usize,
    /// Results, column after column.
    sums: *mut f32,
    /// Elements between columns of results.
    rows: usize,
    /// Results are added to those of parts before.
    add: bool,
}

impl<T: Float> Pass<T> {
    /// Multiplies all of it: tiles of `rows`, by so many columns at a time.
    ///
    /// # Safety
    /// `fits` was asked, and pointers lead where the fields say.
    unsafe fn run(&self, rows: usize, width: usize) {
        macro_rules! call {
            ($kernel:ident: $($m:literal $s:literal),*) => {
                match (rows, width) {
                    // SAFETY: by contract.
                    $(($m, $s) => unsafe { avx512::$kernel::<T, $m, $s>(self) },)*
                    _ => unreachable!("no kernel of {rows} rows and {width} columns"),
                }
            };
        }
        macro_rules! call_avx2 {
            ($($m:literal $s:literal),*) => {
                match (rows, width) {
                    // SAFETY: by contract.
                    $(($m, $s) => unsafe { avx2::tiles::<T, $m, $s>(self) },)*
                    _ => unreachable!("no kernel of {rows} rows and {width} columns"),
                }
            };
        }
        match size_of::<T>() {
            _ if isa() == Isa::Avx2 => call_avx2!(1 1, 1 6, 2 1, 2 6, 3 1, 3 3, 4 1, 4 3),
            4 => call!(tiles_f32: 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 5 3, 6 3, 7 3, 8 3),
            _ => call!(tiles_bf16: 3 1, 4 1, 5 1, 6 1, 7 1, 8 1, 5 3, 6 3, 7 3, 8 3),
        }
    }
}

/// Neighbouring columns of `b` that all rows meet before the next ones.
struct Group<'a, T> {
    b: &'a Mat<'a, T>,
    first: usize,
    count: usize,
}

impl<T: Float> Group<'_, T> {
    /// Products with `packed` into `sums`, column after column: for so many rows as stay in the first level, a part
    /// of the depth after the other, in which a few columns meet all tiles before the next ones do.
    fn product(&self, packed: &[f32], plan: &Plan, sums: &mut [f32]) {
        let Group { b, first, count } = *self;
        let Plan { each, tiles, near, width, part, group, .. } = *plan;
        let (steps, rows, apart) = (b.rows.div_ceil(lanes::<T>()), tiles * each, b.col_stride);
        assert!(count > 0 && (first + count - 1) * apart + b.rows <= b.data.len());
        assert!(packed.len() >= rows * steps * LANES && sums.len() >= rows * count);
        // All tiles together ask for as much as they multiply.
        let stride = (width * lanes::<T>() * size_of::<T>()).div_ceil(tiles);
        let mut far = self.at(group, 0).cast::<i8>();
        // Columns that are left over come one by one.
        let whole = count / width * width;
        for tile in (0..tiles).step_by(near) {
            for at in (0..steps).step_by(part) {
                let (from, len) = (at * lanes::<T>(), part.min(steps - at));
                for (start, end, width) in [(0, whole, width), (whole, count, 1)] {
                    if start == end {
                        continue;
                    }
                    let after = match () {
                        () if end < count => self.at(end, from),
                        () if at + len < steps => self.at(0, from + len * lanes::<T>()),
                        () => self.at(count, 0),
                    };
                    let pass = Pass {
                        a: packed[(tile * steps + at) * each * LANES..].as_ptr(),
                        tiles: near.min(tiles - tile),
                        tile: steps * each * size_of::<[f32; LANES]>(),
                        b: self.at(start, from),
                        apart,
                        count: end - start,
                        k: (b.rows - from).min(len * lanes::<T>()),
                        after,
                        far,
                        stride,
                        sums: sums[start * rows + tile * each..].as_mut_ptr(),
                        rows,
                        add: at > 0,
                    };
                    far = far.wrapping_add((end - start) / width * pass.tiles * len * stride);
                    // SAFETY: `fits` was asked; tiles, columns and sums are in bounds by the assertions.
                    unsafe { pass.run(each, width) };
                }
            }
        }
    }

    /// The same of at most four rows, by whole columns.
    fn stream(&self, packed: &[f32], rows: usize, sums: &mut [f32]) {
        let Group { b, first, count } = *self;
        assert!(packed.len() >= rows * b.rows.div_ceil(lanes::<T>()) * LANES);
        assert!(sums.len() >= (rows - 1) * GROUP + count);
        assert!(count > 0 && (first + count - 1) * b.col_stride + b.rows <= b.data.len());
        let (a, from) = (packed.as_ptr(), b.data[first * b.col_stride..].as_ptr());
        let out = (sums.as_mut_ptr(), count);
        macro_rules! call {
            ($kernel:ident: $($m:literal $chains:literal),*) => {
                match rows {
                    // SAFETY: `fits` was asked; rows, columns and sums are in bounds by the assertions.
                    $($m => unsafe {
                        avx512::$kernel::<$m, $chains>(a.cast(), from.cast(), b.col_stride, b.rows, out)
                    },)*
                    _ => unreachable!("no kernel of {rows} rows"),
                }
            };
        }
        match size_of::<T>() {
            4 => call!(stream_f32: 1 4, 2 2, 3 2, 4 2),
            _ => call!(stream_bf16: 1 4, 2 2, 3 2, 4 2),
        }
    }

    /// Where an element of a column lies; of any number, to be asked for only.
    fn at(&self, column: usize, at: usize) -> *const T {
        self.b.data.as_ptr().wrapping_add((self.first + column) * self.b.col_stride + at)
    }
}
