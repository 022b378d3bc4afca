//! Products with int8 weights.

use super::launch::{Plain, per_row};
use super::{Block, Device, Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::Int8Matrix;
use crate::float::Float;

pub(super) static INT8: Source = source!("int8", "bytes");

/// Rows are padded to a multiple of this.
const WIDTH: usize = 16;
/// Up to so many rows weights are read, not multiplied on tensor cores: two chunks of `FEW`.
const FEW: usize = 16;

/// An [`Int8Matrix`] in the memory of a device: rows of `pitch` bytes, then their scales.
#[derive(Debug)]
pub(crate) struct There {
    block: Block,
    pitch: usize,
}

impl There {
    /// Copies the matrix.
    fn new(stream: &Stream, w: &Int8Matrix) -> Result<There> {
        let (n, pitch) = (w.rows(), w.cols().next_multiple_of(WIDTH));
        let mut block = Block::new(stream.device(), n * (pitch + 4))?;
        let mut rows = vec![0i8; n * pitch];
        for (i, row) in rows.chunks_mut(pitch.max(1)).enumerate() {
            w.unpack(i, row);
        }
        stream.upload(&rows, block.slice_mut(0..n * pitch))?;
        let at = n * pitch / 4;
        stream.upload(w.scales(), block.slice_mut(at..at + n))?;
        // Other streams use it too.
        stream.synchronize()?;
        Ok(There { block, pitch })
    }

    /// Is it on this device?
    pub(crate) fn is_on(&self, device: &Device) -> bool {
        self.block.device().ordinal() == device.ordinal()
    }
}

/// `Sides` of the kernels: operands `[m, k]` and `[n, k]` of one byte an element.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Sides {
    data: [u64; 2],
    sizes: [u32; 3],
    padding: u32,
}

impl Sides {
    /// At these addresses; `m`, `n`, and bytes from row to row.
    pub(super) fn new(data: [u64; 2], sizes: [usize; 3]) -> Sides {
        Sides { data, sizes: sizes.map(|s| s as u32), padding: 0 }
    }

    /// A block a tile.
    pub(super) fn grid(&self) -> Grid {
        let [m, n, _] = self.sizes;
        Grid { blocks: [n.div_ceil(64), m.div_ceil(64), 1], threads: [128, 1, 1], shared: 0 }
    }
}

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Operands {
    sides: Sides,
    x_scales: u64,
    w_scales: u64,
    bias: u64,
    y: u64,
}

/// `y [m, n] = x [m, k] wᵀ + bias`: the twin of [`gemm_int8`](crate::gemm_int8). The matrix is copied to
/// the device when it is first used there, and stays.
///
/// # Panics
/// When lengths do not fit.
pub fn gemm_int8<T: Float>(
    stream: &Stream,
    x: Slice<'_, T>,
    m: usize,
    w: &Int8Matrix,
    bias: Option<Slice<'_, T>>,
    y: SliceMut<'_, T>,
) -> Result<()> {
    let (n, k) = (w.rows(), w.cols());
    assert!(
        x.len() == m * k && y.len() == m * n && bias.is_none_or(|b| b.len() == n),
        "gemm_int8: [{}] x [{n}, {k}] in {m} rows does not give [{}]",
        x.len(),
        y.len()
    );
    if m * n == 0 {
        return Ok(());
    }
    let there = w.there(stream.device(), || There::new(stream, w))?;
    let (pitch, types) = (there.pitch, [("TYPE", T::CUDA)]);
    stream.with_scratch(m * (pitch + 4), |mut scratch: SliceMut<'_, u8>| {
        let (rows, scales) = (scratch.address(), scratch.address() + (m * pitch) as u64);
        stream.function(&INT8, &types, "int8_rows")?.launch(
            per_row::<T>(m, pitch, 256),
            args![x, k as u32, pitch as u32, scratch.reborrow(), scales],
        )?;
        let w = there.block.slice::<u8>(0..n * pitch).address();
        let operands = Operands {
            sides: Sides::new([rows, w], [m, n, pitch]),
            x_scales: scales,
            w_scales: w + (n * pitch) as u64,
            bias: bias.map_or(0, |b| b.address()),
            y: y.address(),
        };
        let few = [n.div_ceil(8) as u32, m.div_ceil(8) as u32, 1];
        let (name, grid) = match m <= FEW {
            true => ("int8_few", Grid { blocks: few, ..operands.sides.grid() }),
            false => ("int8_many", operands.sides.grid()),
        };
        stream.function(&INT8, &types, name)?.launch(grid, args![Plain(operands)])
    })
}
