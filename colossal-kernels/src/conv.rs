//! Convolution over two or three dims, as products: the patches under the kernel become columns of a
//! matrix (im2col), whose product with the weights is the result.
//!
//! Tensors are dense: `x [batch, channels, size..]`, `weight [out_channels, channels / groups,
//! kernel..]`, `y [batch, out_channels, out_size..]`. There is no bias: it is one addition over y.

use crate::float::Float;
use crate::gemm::{Epilogue, Mat, MatMut, gemm, with_workspace};
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// Sizes of a convolution; of two dims the first of the three is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConvShape {
    /// Images.
    pub batch: usize,
    /// Channels of x.
    pub channels: usize,
    /// Channels of y.
    pub out_channels: usize,
    /// Depth, height and width of x.
    pub size: [usize; 3],
    /// Of the kernel.
    pub kernel: [usize; 3],
    /// From one place of the kernel to the next.
    pub stride: [usize; 3],
    /// Zeros around x.
    pub padding: [usize; 3],
    /// From one element under the kernel to the next.
    pub dilation: [usize; 3],
    /// Channels are cut into so many, each with weights of its own; divides both.
    pub groups: usize,
}

impl ConvShape {
    /// Over height and width: stride 1, no padding.
    pub fn conv2d(
        batch: usize,
        channels: usize,
        out_channels: usize,
        [height, width]: [usize; 2],
        [kernel_height, kernel_width]: [usize; 2],
    ) -> ConvShape {
        let (size, kernel) = ([1, height, width], [1, kernel_height, kernel_width]);
        ConvShape::conv3d(batch, channels, out_channels, size, kernel)
    }

    /// Over depth, height and width: stride 1, no padding.
    pub fn conv3d(
        batch: usize,
        channels: usize,
        out_channels: usize,
        size: [usize; 3],
        kernel: [usize; 3],
    ) -> ConvShape {
        let (stride, padding, dilation, groups) = ([1; 3], [0; 3], [1; 3], 1);
        ConvShape { batch, channels, out_channels, size, kernel, stride, padding, dilation, groups }
    }

    /// Depth, height and width of y.
    ///
    /// # Panics
    /// When the kernel is larger than x with its padding.
    pub fn out_size(&self) -> [usize; 3] {
        std::array::from_fn(|i| {
            let (room, reach) =
                (self.size[i] + 2 * self.padding[i], self.dilation[i] * (self.kernel[i] - 1) + 1);
            assert!(
                room >= reach,
                "conv: a kernel that reaches over {reach} of {room}, in dim {i}"
            );
            (room - reach) / self.stride[i] + 1
        })
    }

    /// Rows of the columns of a group: elements under its kernel.
    pub(crate) fn depth(&self) -> usize {
        self.channels / self.groups * self.kernel.iter().product::<usize>()
    }

    /// Elements of an image's columns, of all groups.
    pub(crate) fn columns(&self) -> usize {
        self.groups * self.depth() * self.places()
    }

    /// Places of the kernel in an image.
    pub(crate) fn places(&self) -> usize {
        self.out_size().iter().product()
    }

    /// Elements of an image of x, and of y.
    pub(crate) fn images(&self) -> [usize; 2] {
        [self.channels * self.size.iter().product::<usize>(), self.out_channels * self.places()]
    }

    pub(crate) fn check(&self, what: &str, [x, weight, y]: [usize; 3]) {
        assert!(
            self.groups > 0
                && self.channels.is_multiple_of(self.groups)
                && self.out_channels.is_multiple_of(self.groups)
                && self.stride.iter().chain(&self.kernel).all(|n| *n > 0),
            "{what}: {} channels to {} in {} groups, kernel {:?}, stride {:?}",
            self.channels,
            self.out_channels,
            self.groups,
            self.kernel,
            self.stride
        );
        let [image, out] = self.images();
        let want = [self.batch * image, self.out_channels * self.depth(), self.batch * out];
        assert_eq!([x, weight, y], want, "{what}: elements of x, weight and y for {self:?}");
    }

    /// Where in x the element `k` of the kernel at place `o` lies, along dim `i`.
    fn under(&self, i: usize, o: usize, k: usize) -> Option<usize> {
        (o * self.stride[i] + k * self.dilation[i])
            .checked_sub(self.padding[i])
            .filter(|at| *at < self.size[i])
    }

    /// The place at which the element `k` of the kernel lies over `at`, along dim `i`.
    fn over(&self, i: usize, at: usize, k: usize) -> Option<usize> {
        let from = (at + self.padding[i]).checked_sub(k * self.dilation[i])?;
        (from % self.stride[i] == 0).then_some(from / self.stride[i])
    }
}

/// `columns [channels * kernel, places]` of an image.
fn columns<T: Float>(s: &ConvShape, x: &[T], to: &mut [T]) {
    let ([d, h, w], [od, oh, ow]) = (s.size, s.out_size());
    let (places, volume) = (s.places(), s.kernel.iter().product::<usize>());
    let to = Parts::new(to);
    parallel_for(s.channels * volume, 1 + (1 << 14) / places.max(1), |rows| {
        for row in rows {
            let (channel, at) = (row / volume, row % volume);
            let k = [
                at / (s.kernel[1] * s.kernel[2]),
                at / s.kernel[2] % s.kernel[1],
                at % s.kernel[2],
            ];
            // SAFETY: rows are disjoint.
            let to = unsafe { to.range(row * places..(row + 1) * places) };
            let x = &x[channel * d * h * w..];
            for (line, to) in to.chunks_mut(ow).enumerate() {
                let (z, y) = (s.under(0, line / oh % od, k[0]), s.under(1, line % oh, k[1]));
                let Some((z, y)) = z.zip(y) else {
                    to.fill(T::zeroed());
                    continue;
                };
                for (o, to) in to.iter_mut().enumerate() {
                    let at = s.under(2, o, k[2]);
                    *to = at.map_or(T::zeroed(), |at| x[(z * h + y) * w + at]);
                }
            }
        }
    });
}

/// The sum over `columns` of what each element of an image gave to them.
fn image<T: Float>(s: &ConvShape, columns: &[f32], dx: &mut [T]) {
    let ([d, h, w], [od, oh, ow]) = (s.size, s.out_size());
    let (places, volume) = (s.places(), s.kernel.iter().product::<usize>());
    let dx = Parts::new(dx);
    parallel_for(s.channels * d * h, 1 + (1 << 12) / (w * volume).max(1), |lines| {
        for line in lines {
            let (channel, z, y) = (line / (d * h), line / h % d, line % h);
            // SAFETY: lines are disjoint.
            let to = unsafe { dx.range(line * w..(line + 1) * w) };
            for (x, to) in to.iter_mut().enumerate() {
                let mut sum = 0.0;
                for at in 0..volume {
                    let k = [
                        at / (s.kernel[1] * s.kernel[2]),
                        at / s.kernel[2] % s.kernel[1],
                        at % s.kernel[2],
                    ];
                    let o = [s.over(0, z, k[0]), s.over(1, y, k[1]), s.over(2, x, k[2])];
                    if let [Some(a), Some(b), Some(c)] = o
                        && a < od
                        && b < oh
                        && c < ow
                    {
                        sum += columns[(channel * volume + at) * places + (a * oh + b) * ow + c];
                    }
                }
                *to = T::from_f32(sum);
            }
        }
    });
}

/// `y = x * weight`: a product for each image and group.
///
/// ```
/// use colossal_kernels::{ConvShape, conv};
/// let s = ConvShape::conv2d(1, 1, 1, [2, 3], [2, 2]);
/// let mut y = [0.0f32; 2];
/// conv(&s, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, 0.0, 0.0, 1.0], &mut y);
/// assert_eq!(y, [6.0, 8.0]);
/// ```
///
/// # Panics
/// When lengths do not fit.
pub fn conv<T: Float>(s: &ConvShape, x: &[T], weight: &[T], y: &mut [T]) {
    s.check("conv", [x.len(), weight.len(), y.len()]);
    let _span = profile::moves::<T>("conv", y.len(), 2);
    let ([image, out], depth, places) = (s.images(), s.depth(), s.places());
    let rows = s.out_channels / s.groups;
    with_workspace(s.columns(), |space| {
        let space: &mut [T] = &mut bytemuck::cast_slice_mut(space)[..s.columns()];
        for (x, y) in x.chunks(image.max(1)).zip(y.chunks_mut(out.max(1))) {
            columns(s, x, space);
            for g in 0..s.groups {
                let w = Mat::new(&weight[g * rows * depth..(g + 1) * rows * depth], rows, depth);
                let c =
                    Mat::new(&space[g * depth * places..(g + 1) * depth * places], depth, places);
                let y = &mut y[g * rows * places..(g + 1) * rows * places];
                gemm(w, c, MatMut::new(y, rows, places), &Epilogue::default());
            }
        }
    });
}

/// The gradient of [`conv`] to its input: `dx` is overwritten.
///
/// # Panics
/// When lengths do not fit.
pub fn conv_backward_input<T: Float>(s: &ConvShape, dy: &[T], weight: &[T], dx: &mut [T]) {
    s.check("conv_backward_input", [dx.len(), weight.len(), dy.len()]);
    let _span = profile::moves::<T>("conv_backward_input", dy.len(), 2);
    let ([size, out], depth, places) = (s.images(), s.depth(), s.places());
    let rows = s.out_channels / s.groups;
    with_workspace(s.columns(), |space| {
        for (dx, dy) in dx.chunks_mut(size.max(1)).zip(dy.chunks(out.max(1))) {
            for g in 0..s.groups {
                let w = Mat::new(&weight[g * rows * depth..(g + 1) * rows * depth], rows, depth);
                let dy = Mat::new(&dy[g * rows * places..(g + 1) * rows * places], rows, places);
                let c = &mut space[g * depth * places..(g + 1) * depth * places];
                gemm(w.t(), dy, MatMut::new(c, depth, places), &Epilogue::default());
            }
            image(s, space, dx);
        }
    });
}

/// `dweight +=` the gradient of [`conv`] to its weights, image after image.
///
/// # Panics
/// When lengths do not fit.
pub fn conv_backward_weight<T: Float>(s: &ConvShape, dy: &[T], x: &[T], dweight: &mut [f32]) {
    s.check("conv_backward_weight", [x.len(), dweight.len(), dy.len()]);
    let _span = profile::moves::<T>("conv_backward_weight", dy.len(), 2);
    let ([image, out], depth, places) = (s.images(), s.depth(), s.places());
    let rows = s.out_channels / s.groups;
    let e = Epilogue { accumulate: true, ..Epilogue::default() };
    with_workspace(s.columns(), |space| {
        let space: &mut [T] = &mut bytemuck::cast_slice_mut(space)[..s.columns()];
        for (x, dy) in x.chunks(image.max(1)).zip(dy.chunks(out.max(1))) {
            columns(s, x, space);
            for g in 0..s.groups {
                let dy = Mat::new(&dy[g * rows * places..(g + 1) * rows * places], rows, places);
                let c =
                    Mat::new(&space[g * depth * places..(g + 1) * depth * places], depth, places);
                let dw = &mut dweight[g * rows * depth..(g + 1) * rows * depth];
                gemm(dy, c.t(), MatMut::new(dw, rows, depth), &e);
            }
        }
    });
}
