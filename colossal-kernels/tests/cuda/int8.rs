//! Products with int8 weights.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{Float, Int8Matrix, gemm_int8};

use crate::check::{Device, close, noise};

fn int8<T: Float>(stream: &Stream) {
    for (m, n, k, skip) in [
        (0, 5, 3, 0),
        (1, 7, 5, 1),
        (3, 33, 600, 0),
        (13, 18, 64, 3),
        (17, 70, 129, 0),
        (70, 9, 300, 1),
    ] {
        let (x, w) = (noise::<T>(m * k, 1), noise::<T>(n * k, 2));
        let bias = noise::<T>(n, 3);
        let w = Int8Matrix::quantize(&w, n, k);
        let [x2, bias2] = [&x, &bias].map(|x| Device::new(stream, x, skip));
        for bias in [None, Some((&bias[..], bias2.all()))] {
            let mut y = vec![T::zeroed(); m * n];
            gemm_int8(&x, m, &w, bias.map(|b| b.0), &mut y);
            let mut y2 = Device::new(stream, &vec![T::zeroed(); m * n], skip);
            cuda::gemm_int8(stream, x2.all(), m, &w, bias.map(|b| b.1), y2.all_mut()).unwrap();
            close(&format!("int8 {m} x {n} x {k}"), &y2.get(), &y, 1e-6);
        }
    }
}

mod on_each {
    crate::check::each_type! { int8 }
}
