//! What launchers share: how kernels are spread, and plain structs as arguments.

use std::ffi::c_void;

use bytemuck::Pod;

use super::{Arg, Grid, Stream};

/// 16 bytes of `n` elements a thread, of the type `T`.
pub(super) fn vectors<T>(n: usize) -> Grid {
    Grid::line(n.div_ceil(256 * 16 / size_of::<T>()), 256)
}

/// A block a row of `dim` elements of `T`: whole warps, one vector a thread up to `most` threads.
pub(super) fn per_row<T>(rows: usize, dim: usize, most: usize) -> Grid {
    Grid::line(rows, warps(dim.div_ceil(16 / size_of::<T>()), most))
}

/// A block a row as [`per_row`], or a warp each for 8 short rows: kernels that ask `own_row`.
pub(super) fn rows<T>(rows: usize, dim: usize) -> Grid {
    if dim <= 128 * 16 / size_of::<T>() {
        Grid { threads: [32, 8, 1], ..Grid::line(rows.div_ceil(8), 32) }
    } else {
        per_row::<T>(rows, dim, 512)
    }
}

/// At least `threads` in whole warps, but between one warp and `most`.
pub(super) fn warps(threads: usize, most: usize) -> u32 {
    threads.clamp(1, most).next_multiple_of(32) as u32
}

/// Blocks that keep the device busy, for kernels whose blocks take work by turns.
pub(super) fn resident(stream: &Stream) -> usize {
    4 * stream.device().multiprocessors()
}

/// A plain struct as the kernel's parameter.
pub(super) struct Plain<T>(pub(super) T);

// SAFETY: laid out as the struct of the kernel, which has the same members.
unsafe impl<T: Pod> Arg for Plain<T> {
    fn pointer(&self) -> *mut c_void {
        (&raw const self.0).cast_mut().cast()
    }
}
