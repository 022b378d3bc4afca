//! Numbers of 8 bits: rounding bit for bit, products.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{
    Float, Fp8, Fp8Mat, Fp8Scaling, dequantize_fp8, fp8_pitch, gemm_fp8, quantize_fp8,
};

use crate::check::{Device, close, hopper, noise};

const FORMATS: [Fp8; 2] = [Fp8::E4m3, Fp8::E5m2];
const SCALINGS: [Fp8Scaling; 3] = [Fp8Scaling::Tensor, Fp8Scaling::Rows, Fp8Scaling::Blocks];

/// A matrix on both sides.
struct Both {
    q: Vec<u8>,
    scales: Vec<f32>,
    q2: Device<u8>,
    scales2: Device<f32>,
    sizes: [usize; 2],
    format: Fp8,
    scaling: Fp8Scaling,
}

impl Both {
    /// `x [rows, cols]`, or its transpose, rounded by each twin: to the same bits.
    fn new<T: Float>(
        stream: &Stream,
        x: &[T],
        [rows, cols]: [usize; 2],
        transposed: bool,
        format: Fp8,
        scaling: Fp8Scaling,
    ) -> Both {
        let sizes @ [r, c] = if transposed { [cols, rows] } else { [rows, cols] };
        let mut q = vec![0xee; r * fp8_pitch(c)];
        let mut scales = vec![0.0; scaling.count(r, c)];
        let mut q2 = Device::new(stream, &q, 0);
        let mut scales2 = Device::new(stream, &scales, 0);
        quantize_fp8(x, rows, cols, transposed, format, scaling, &mut q, &mut scales);
        let there = Device::new(stream, x, 1);
        let (to, scales_to) = (q2.all_mut(), scales2.all_mut());
        cuda::quantize_fp8(
            stream,
            there.all(),
            rows,
            cols,
            transposed,
            format,
            scaling,
            to,
            scales_to,
        )
        .unwrap();
        let what = format!("{rows} x {cols} {transposed} {format:?} {scaling:?}");
        assert_eq!(scales2.get(), scales, "{what}");
        assert_eq!(q2.get(), q, "{what}");
        Both { q, scales, q2, scales2, sizes, format, scaling }
    }

    fn here(&self) -> Fp8Mat<'_> {
        let [rows, cols] = self.sizes;
        let (format, scaling) = (self.format, self.scaling);
        Fp8Mat { data: &self.q, scales: &self.scales, rows, cols, format, scaling }
    }

    fn there(&self) -> cuda::Fp8Mat<'_> {
        let [rows, cols] = self.sizes;
        let (format, scaling) = (self.format, self.scaling);
        let (data, scales) = (self.q2.all(), self.scales2.all());
        cuda::Fp8Mat { data, scales, rows, cols, format, scaling }
    }
}

/// Numbers of many sizes, over twice so many octaves.
fn spread<T: Float>(n: usize, octaves: f32, seed: u64) -> Vec<T> {
    let sizes: Vec<f32> = noise(n, seed + 99);
    let wide = |(x, s): (f32, f32)| T::from_f32(x * (s * octaves).exp2());
    noise::<f32>(n, seed).into_iter().zip(sizes).map(wide).collect()
}

fn quantize<T: Float>(stream: &Stream) {
    for sizes @ [rows, cols] in [[1, 1], [3, 130], [129, 40], [70, 300]] {
        let x = spread::<T>(rows * cols, 12.0, 1);
        for (format, scaling) in FORMATS.iter().flat_map(|f| SCALINGS.map(|s| (*f, s))) {
            for transposed in [false, true] {
                let both = Both::new(stream, &x, sizes, transposed, format, scaling);
                let mut y = vec![T::zeroed(); rows * cols];
                let mut y2 = Device::new(stream, &y, 0);
                dequantize_fp8(both.here(), &mut y);
                cuda::dequantize_fp8(stream, both.there(), y2.all_mut()).unwrap();
                close("dequantize_fp8", &y2.get(), &y, 0.0);
                // And it is x, to half a unit of the last digit, or a step of the least number.
                let half = if format == Fp8::E4m3 { 1.0 / 16.0 } else { 1.0 / 8.0 };
                for (i, y) in y.iter().enumerate() {
                    let [r, c] = [i / both.sizes[1], i % both.sizes[1]];
                    let x = if transposed { x[c * cols + r] } else { x[i] }.to_f32();
                    let least = both.scales.iter().fold(0.0f32, |m, s| m.max(*s)) / 512.0;
                    let off = (y.to_f32() - x).abs();
                    assert!(off <= 1.01 * half * x.abs() + least, "{x} became {y:?}");
                }
            }
        }
    }
}

fn products<T: Float>(stream: &Stream) {
    // The three products of a linear layer, by each kind of scales.
    for (m, n, k) in [(5, 7, 3), (70, 33, 300), (16, 144, 160)] {
        let (x, w) = (spread::<T>(m * k, 3.0, 1), spread::<T>(n * k, 3.0, 2));
        let dy = spread::<T>(m * n, 3.0, 3);
        for scaling in SCALINGS {
            // Weights and gradients of them keep squares where activations keep rows.
            let other = if scaling == Fp8Scaling::Rows { Fp8Scaling::Blocks } else { scaling };
            let of = |x: &[T], sizes, t, f, s| Both::new(stream, x, sizes, t, f, s);
            let [e4m3, e5m2] = FORMATS;
            for (what, a, b) in [
                ("y", of(&x, [m, k], false, e4m3, scaling), of(&w, [n, k], false, e4m3, other)),
                ("dx", of(&dy, [m, n], false, e5m2, scaling), of(&w, [n, k], true, e4m3, other)),
                ("dw", of(&dy, [m, n], true, e5m2, scaling), of(&x, [m, k], true, e4m3, scaling)),
                (
                    "both e5m2",
                    of(&x, [m, k], false, e5m2, other),
                    of(&w, [n, k], false, e5m2, scaling),
                ),
            ] {
                // Outputs have a bias, gradients of weights add up.
                let mut y = noise::<T>(a.sizes[0] * b.sizes[0], 4);
                let mut y2 = Device::new(stream, &y, 0);
                let (bias, add) = (noise::<T>(b.sizes[0], 5), what == "dw");
                let bias2 = Device::new(stream, &bias, 0);
                gemm_fp8(a.here(), b.here(), (what == "y").then_some(&bias), add, &mut y);
                let bias2 = (what == "y").then(|| bias2.all());
                cuda::gemm_fp8(stream, a.there(), b.there(), bias2, add, y2.all_mut()).unwrap();
                // Relative to the largest: terms are of many sizes.
                let top = y.iter().fold(0.0f32, |m, y| m.max(y.to_f32().abs()));
                let scaled = |y: &[T]| -> Vec<T> {
                    y.iter().map(|y| T::from_f32(y.to_f32() / top)).collect()
                };
                close(
                    &format!("fp8 {what} {m} {n} {k} {scaling:?}"),
                    &scaled(&y2.get()),
                    &scaled(&y),
                    2e-6,
                );
            }
        }
    }
}

#[test]
fn nothing_is_lost() {
    let Some(stream) = crate::check::stream() else { return };
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = noise::<f32>(4 * 140, 1);
        x[200] = bad;
        let w = noise::<f32>(8 * 140, 2);
        for scaling in SCALINGS {
            let [mut q, mut q2] = [4, 8].map(|r| Device::new(&stream, &vec![0u8; r * 144], 0));
            let [mut s, mut s2] =
                [4, 8].map(|r| Device::new(&stream, &vec![0f32; scaling.count(r, 140)], 0));
            for (x, rows, q, s) in [(&x, 4, &mut q, &mut s), (&w, 8, &mut q2, &mut s2)] {
                let x = Device::new(&stream, x, 0);
                let (q, s) = (q.all_mut(), s.all_mut());
                cuda::quantize_fp8(&stream, x.all(), rows, 140, false, Fp8::E4m3, scaling, q, s)
                    .unwrap();
            }
            let (cols, format) = (140, Fp8::E4m3);
            let a = cuda::Fp8Mat { data: q.all(), scales: s.all(), rows: 4, cols, format, scaling };
            let b =
                cuda::Fp8Mat { data: q2.all(), scales: s2.all(), rows: 8, cols, format, scaling };
            let mut y = Device::new(&stream, &[0f32; 32], 0);
            cuda::gemm_fp8(&stream, a, b, None, false, y.all_mut()).unwrap();
            assert!(y.get()[8..16].iter().all(|y| !y.is_finite()), "{bad} is lost: {:?}", y.get());
        }
    }
}

#[test]
fn products_of_the_library() {
    let Some(stream) = hopper() else { return };
    products::<half::bf16>(&stream);
    products::<f32>(&stream);
}

mod on_each {
    crate::check::each_type! { quantize products }
}
