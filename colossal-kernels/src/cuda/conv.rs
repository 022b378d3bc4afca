//! Convolution: by cuDNN where it is there, else as products of patches.

use super::dnn::{Convolution, Pass};
use super::launch::Plain;
use super::{
    Epilogue, Grid, Mat, MatMut, Result, Slice, SliceMut, Source, Stream, add_into, args,
    gemm_batched, source,
};
use crate::ConvShape;
use crate::float::Float;

pub(super) static CONV: Source = source!("conv");

/// Bytes of columns that are made at once, at most, if an image's are fewer.
const ROOM: usize = 256 << 20;

/// `Conv` of the kernels.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Conv {
    channels: u32,
    dims: [[u32; 3]; 6],
}

/// A call's sizes, by group and image.
struct Call<'a> {
    stream: &'a Stream,
    s: &'a ConvShape,
    places: usize,
    depth: usize,
    /// Output channels of a group.
    rows: usize,
    /// Elements of an image of x, and of y.
    images: [usize; 2],
}

impl<'a> Call<'a> {
    fn new(stream: &'a Stream, s: &'a ConvShape) -> Call<'a> {
        let (places, depth, rows) = (s.places(), s.depth(), s.out_channels / s.groups);
        Call { stream, s, places, depth, rows, images: s.images() }
    }

    fn sizes(&self) -> Plain<Conv> {
        let s = self.s;
        let dims = [s.size, s.kernel, s.stride, s.padding, s.dilation, s.out_size()];
        Plain(Conv { channels: s.channels as u32, dims: dims.map(|d| d.map(|n| n as u32)) })
    }

    /// `f(first image, images, room for their columns)` for as many at once as there is room.
    fn chunks<C: bytemuck::Pod>(
        &self,
        mut f: impl FnMut(usize, usize, SliceMut<'_, C>) -> Result<()>,
    ) -> Result<()> {
        let own = self.s.columns();
        let at_once = (ROOM / (own * size_of::<C>()).max(1)).clamp(1, self.s.batch.max(1));
        self.stream.with_scratch(at_once * own, |mut columns: SliceMut<'_, C>| {
            for first in (0..self.s.batch).step_by(at_once) {
                let count = at_once.min(self.s.batch - first);
                f(first, count, columns.reborrow().range(0..count * own))?;
            }
            Ok(())
        })
    }

    /// Columns of so many images.
    fn columns<T: Float>(&self, x: Slice<'_, T>, to: SliceMut<'_, T>) -> Result<()> {
        let f = self.stream.function(&CONV, &[("TYPE", T::CUDA)], "conv_columns")?;
        let n = to.len();
        f.launch(Grid::line(n.div_ceil(256), 256), args![x, self.sizes(), n as u64, to])
    }

    /// The columns of group `g` in the first image of `columns`.
    fn group<'b, C>(&self, g: usize, columns: Slice<'b, C>) -> Mat<'b, C> {
        let from = g * self.depth * self.places;
        Mat::new(columns.range(from..columns.len()), self.depth, self.places)
    }

    /// The weights of group `g`.
    fn weight<'b, T>(&self, g: usize, weight: Slice<'b, T>) -> Mat<'b, T> {
        let size = self.rows * self.depth;
        Mat::new(weight.range(g * size..(g + 1) * size), self.rows, self.depth)
    }

    /// Where y's group `g` begins in image `first`.
    fn out(&self, first: usize, g: usize) -> usize {
        first * self.images[1] + g * self.rows * self.places
    }
}

/// By cuDNN, if it has a way: x, the weights and y, or their gradients, as `addresses`.
fn by_library<T: Float>(
    stream: &Stream,
    shape: &ConvShape,
    pass: Pass,
    addresses: [u64; 3],
    accumulate: bool,
) -> Result<bool> {
    stream.convolution(&Convolution { shape, pass, element: T::NAME, addresses, accumulate })
}

/// `y = x * weight`: the twin of [`conv`](crate::conv); of products the images of a group in one launch.
///
/// # Panics
/// When lengths do not fit.
pub fn conv<T: Float>(
    stream: &Stream,
    s: &ConvShape,
    x: Slice<'_, T>,
    weight: Slice<'_, T>,
    mut y: SliceMut<'_, T>,
) -> Result<()> {
    s.check("conv", [x.len(), weight.len(), y.len()]);
    let addresses = [x.address(), weight.address(), y.address()];
    if by_library::<T>(stream, s, Pass::Forward, addresses, false)? {
        return Ok(());
    }
    let call = Call::new(stream, s);
    let [image, out] = call.images;
    call.chunks(|first, count, mut columns: SliceMut<'_, T>| {
        let x = x.range(first * image..(first + count) * image);
        call.columns(x, columns.reborrow())?;
        for g in 0..s.groups {
            let (w, c) = (call.weight(g, weight), call.group(g, columns.as_slice()));
            let to = y.reborrow().range(call.out(first, g)..(first + count) * out);
            let to = MatMut::new(to, call.rows, call.places);
            gemm_batched(stream, count, w, 0, c, s.columns(), to, out, &Epilogue::default())?;
        }
        Ok(())
    })
}

/// The gradient of [`conv`] to its input: `dx` is overwritten.
///
/// # Panics
/// When lengths do not fit.
pub fn conv_backward_input<T: Float>(
    stream: &Stream,
    s: &ConvShape,
    dy: Slice<'_, T>,
    weight: Slice<'_, T>,
    mut dx: SliceMut<'_, T>,
) -> Result<()> {
    s.check("conv_backward_input", [dx.len(), weight.len(), dy.len()]);
    let addresses = [dx.address(), weight.address(), dy.address()];
    if by_library::<T>(stream, s, Pass::Input, addresses, false)? {
        return Ok(());
    }
    let call = Call::new(stream, s);
    let [image, out] = call.images;
    let f = stream.function(&CONV, &[("TYPE", T::CUDA)], "conv_image")?;
    call.chunks(|first, count, mut columns: SliceMut<'_, f32>| {
        let own = s.columns();
        for g in 0..s.groups {
            let w = call.weight(g, weight).t();
            let dy = dy.range(call.out(first, g)..(first + count) * out);
            let dy = Mat::new(dy, call.rows, call.places);
            let to = columns.reborrow().range(g * call.depth * call.places..count * own);
            let to = MatMut::new(to, call.depth, call.places);
            gemm_batched(stream, count, w, 0, dy, out, to, own, &Epilogue::default())?;
        }
        let n = count * image;
        let to = dx.reborrow().range(first * image..first * image + n);
        let grid = Grid::line(n.div_ceil(256), 256);
        f.launch(grid, args![columns.as_slice(), call.sizes(), n as u64, to])
    })
}

/// `dweight +=` the gradient of [`conv`] to its weights: of products image after image. cuDNN gives it in
/// the type of x: for 16 bits it is rounded once before it is added.
///
/// # Panics
/// When lengths do not fit.
pub fn conv_backward_weight<T: Float>(
    stream: &Stream,
    s: &ConvShape,
    dy: Slice<'_, T>,
    x: Slice<'_, T>,
    mut dweight: SliceMut<'_, f32>,
) -> Result<()> {
    s.check("conv_backward_weight", [x.len(), dweight.len(), dy.len()]);
    let (pass, [x_at, dy_at]) = (Pass::Weight, [x.address(), dy.address()]);
    let done = if T::NAME == "f32" {
        by_library::<T>(stream, s, pass, [x_at, dweight.address(), dy_at], true)?
    } else {
        stream.with_scratch(dweight.len(), |room: SliceMut<'_, T>| {
            let done = by_library::<T>(stream, s, pass, [x_at, room.address(), dy_at], false)?;
            if done {
                add_into(stream, room.as_slice(), dweight.reborrow())?;
            }
            Ok(done)
        })?
    };
    if done {
        return Ok(());
    }
    let call = Call::new(stream, s);
    let [image, _] = call.images;
    let e = Epilogue { accumulate: true, ..Epilogue::default() };
    call.chunks(|first, count, mut columns: SliceMut<'_, T>| {
        call.columns(x.range(first * image..(first + count) * image), columns.reborrow())?;
        for (i, g) in (0..count).flat_map(|i| (0..s.groups).map(move |g| (i, g))) {
            let from = call.out(first + i, g);
            let dy =
                Mat::new(dy.range(from..from + call.rows * call.places), call.rows, call.places);
            let own = columns.as_slice().range(i * s.columns()..(i + 1) * s.columns());
            let size = call.rows * call.depth;
            let to = dweight.reborrow().range(g * size..(g + 1) * size);
            let to = MatMut::new(to, call.rows, call.depth);
            super::gemm(stream, dy, call.group(g, own).t(), to, &e)?;
        }
        Ok(())
    })
}
