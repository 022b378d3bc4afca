//! Convolution and its gradients.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{ConvShape, Float, conv, conv_backward_input, conv_backward_weight};

use crate::check::{Device, close, noise, rounding};

fn convolutions<T: Float>(stream: &Stream) {
    let two = ConvShape::conv2d;
    for s in [
        two(0, 2, 3, [4, 4], [3, 3]),
        two(2, 3, 5, [7, 9], [3, 2]),
        ConvShape { padding: [0, 1, 1], stride: [1, 2, 2], ..two(3, 4, 6, [9, 8], [3, 3]) },
        ConvShape {
            padding: [0, 2, 3],
            dilation: [1, 2, 3],
            groups: 2,
            ..two(1, 6, 4, [8, 7], [2, 3])
        },
        ConvShape {
            padding: [1, 0, 2],
            stride: [2, 1, 3],
            ..ConvShape::conv3d(2, 3, 4, [5, 6, 7], [2, 3, 3])
        },
        // Patches, as of a vision transformer.
        ConvShape { stride: [1, 4, 4], ..two(2, 3, 10, [8, 12], [4, 4]) },
    ] {
        let out: usize = s.out_size().iter().product();
        let n = s.batch * s.channels * s.size.iter().product::<usize>();
        let m = s.batch * s.out_channels * out;
        let k = s.out_channels * s.channels / s.groups * s.kernel.iter().product::<usize>();
        let [x, w, dy] = [(n, 1), (k, 2), (m, 3)].map(|(n, i)| noise::<T>(n, i));
        let (mut y, mut dx, mut dw) = (noise::<T>(m, 4), noise::<T>(n, 5), noise::<f32>(k, 6));
        let (dw_before, y_before) = (dw.clone(), y.clone());
        conv(&s, &x, &w, &mut y);
        conv_backward_input(&s, &dy, &w, &mut dx);
        conv_backward_weight(&s, &dy, &x, &mut dw);
        // Where cuDNN is there it takes what is aligned; all else is products of patches.
        for skip in [0, 1] {
            let [x2, w2, dy2] = [&x, &w, &dy].map(|x| Device::new(stream, x, skip));
            let [mut y2, mut dx2] = [&y_before, &dx].map(|x| Device::new(stream, x, 0));
            let mut dw2 = Device::new(stream, &dw_before, 0);
            let (x2, w2, dy2) = (x2.all(), w2.all(), dy2.all());
            let before = by_library();
            cuda::conv(stream, &s, x2, w2, y2.all_mut()).unwrap();
            cuda::conv_backward_input(stream, &s, dy2, w2, dx2.all_mut()).unwrap();
            cuda::conv_backward_weight(stream, &s, dy2, x2, dw2.all_mut()).unwrap();
            // NVIDIA's own may go through transforms.
            let tolerance = if library() && before.is_none() { 1e-4 } else { 1e-5 };
            close("conv", &y2.get(), &y, tolerance);
            close("conv_backward_input", &dx2.get(), &dx, tolerance);
            // cuDNN rounds what is added to the gradient of a weight.
            let known = skip == 0 && n > 0 && !(s.size[0] > 1 && T::NAME == "f16");
            let rounded = if known && library() { rounding::<T>() } else { 0.0 };
            close("conv_backward_weight", &dw2.get(), &dw, tolerance + rounded);
            if let (Some(before), Some(after)) = (before, by_library()) {
                // Others may run beside it.
                assert!(!known || after >= before + 3, "{after} by the library, {before} before");
            }
        }
    }
}

/// Is cuDNN there, and wanted?
fn library() -> bool {
    cuda::found().cudnn && std::env::var_os("COLOSSAL_NO_CUDNN").is_none()
}

/// How many convolutions the stand-in for cuDNN has done, if that is what is there.
fn by_library() -> Option<u32> {
    if !library() {
        return None;
    }
    // SAFETY: it is loaded already; the function is the stand-in's, of this type.
    unsafe {
        let library = libloading::Library::new("libcudnn.so.9").ok()?;
        let count =
            library.get::<unsafe extern "C" fn() -> u32>(b"stand_in_convolutions\0").ok()?;
        Some(count())
    }
}

mod on_each {
    crate::check::each_type! { convolutions }
}
