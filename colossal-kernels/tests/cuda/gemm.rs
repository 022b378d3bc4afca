//! Products: all layouts, strides, epilogues, batches and groups.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{self as cpu, Activation, Float};

use crate::check::{Device, close, noise};

/// How an operand lies: rows by rows, transposed, with room between rows, or with no stride of one.
#[derive(Clone, Copy)]
struct Lie {
    transposed: bool,
    room: usize,
    step: usize,
    skip: usize,
}

const LIES: [Lie; 6] = [
    Lie { transposed: false, room: 0, step: 1, skip: 0 },
    Lie { transposed: true, room: 0, step: 1, skip: 0 },
    Lie { transposed: false, room: 8, step: 1, skip: 0 },
    Lie { transposed: true, room: 3, step: 1, skip: 0 },
    Lie { transposed: false, room: 8, step: 1, skip: 1 },
    Lie { transposed: true, room: 0, step: 2, skip: 0 },
];

/// `[rows, cols, row stride, col stride]` and how many elements that takes.
fn strides(rows: usize, cols: usize, lie: Lie) -> ([usize; 2], usize) {
    let (inner, outers) = if lie.transposed { (rows, cols) } else { (cols, rows) };
    let outer = inner * lie.step + lie.room;
    let len = outers * outer;
    (if lie.transposed { [lie.step, outer] } else { [outer, lie.step] }, len)
}

struct Case<T> {
    values: Vec<T>,
    on: Device<T>,
    size: [usize; 2],
    strides: [usize; 2],
}

impl<T: Float> Case<T> {
    fn new(stream: &Stream, size: [usize; 2], lie: Lie, seed: u64) -> Case<T> {
        let (strides, len) = strides(size[0], size[1], lie);
        let values = noise::<T>(len, seed);
        let on = Device::new(stream, &values, lie.skip);
        Case { values, on, size, strides }
    }

    fn cpu(&self) -> cpu::Mat<'_, T> {
        let ([rows, cols], [row_stride, col_stride]) = (self.size, self.strides);
        cpu::Mat { data: &self.values, rows, cols, row_stride, col_stride }
    }

    fn cuda(&self) -> cuda::Mat<'_, T> {
        let ([rows, cols], [row_stride, col_stride]) = (self.size, self.strides);
        cuda::Mat { data: self.on.all(), rows, cols, row_stride, col_stride }
    }
}

fn compare<T: Float, O: Float>(
    stream: &Stream,
    [m, n, k]: [usize; 3],
    lies: [Lie; 3],
    (alpha, accumulate, bias, activation): (f32, bool, bool, Activation),
) {
    let a = Case::<T>::new(stream, [m, k], lies[0], 1);
    let b = Case::<T>::new(stream, [k, n], lies[1], 2);
    let bias = bias.then(|| noise::<T>(n, 3));
    let bias_on = bias.as_ref().map(|bias| Device::new(stream, bias, 0));
    let mut c = Case::<O>::new(stream, [m, n], lies[2], 4);
    let mut want = c.values.clone();
    let [row_stride, col_stride] = c.strides;
    cpu::gemm(
        a.cpu(),
        b.cpu(),
        cpu::MatMut { data: &mut want, rows: m, cols: n, row_stride, col_stride },
        &cpu::Epilogue {
            alpha,
            accumulate,
            bias: bias.as_deref(),
            activation,
            ..Default::default()
        },
    );
    let data = c.on.all_mut();
    cuda::gemm(
        stream,
        a.cuda(),
        b.cuda(),
        cuda::MatMut { data, rows: m, cols: n, row_stride, col_stride },
        &cuda::Epilogue { alpha, accumulate, bias: bias_on.as_ref().map(Device::all), activation },
    )
    .unwrap();
    // Sums of k products of numbers below one; the CPU's bf16 products round nothing either.
    close(&format!("gemm {m} {n} {k}"), &c.on.get(), &want, 1e-6 * (k as f32 + 8.0));
}

const PLAIN: (f32, bool, bool, Activation) = (1.0, false, false, Activation::None);

fn layouts<T: Float>(stream: &Stream) {
    for a in LIES {
        for b in LIES {
            compare::<T, T>(stream, [37, 50, 45], [a, b, LIES[0]], PLAIN);
        }
    }
    for c in LIES {
        compare::<T, f32>(stream, [30, 41, 24], [LIES[0], LIES[1], c], PLAIN);
    }
}

fn sizes<T: Float>(stream: &Stream) {
    let plain = [LIES[0], LIES[1], LIES[0]];
    for size in [[0, 3, 4], [3, 4, 0], [1, 1, 1], [1, 200, 8], [130, 3, 33]] {
        compare::<T, T>(stream, size, plain, PLAIN);
    }
    // Large tiles, several bands of them, and a depth of many slabs.
    compare::<T, f32>(stream, [300, 270, 72], plain, PLAIN);
    compare::<T, T>(stream, [257, 384, 40], [LIES[1], LIES[0], LIES[0]], PLAIN);
    compare::<T, f32>(stream, [40, 30, 700], [LIES[1], LIES[0], LIES[0]], PLAIN);
}

fn epilogues<T: Float>(stream: &Stream) {
    use Activation::{Gelu, GeluTanh, None, Relu, Silu};
    let lies = [LIES[0], LIES[1], LIES[0]];
    for activation in [None, Gelu, GeluTanh, Silu, Relu] {
        compare::<T, T>(stream, [33, 20, 16], lies, (0.5, false, true, activation));
        compare::<T, f32>(stream, [9, 70, 20], lies, (2.0, true, true, activation));
    }
    compare::<T, T>(stream, [9, 70, 20], [LIES[0], LIES[1], LIES[4]], (1.0, true, false, None));
}

fn batches<T: Float>(stream: &Stream) {
    let (batch, m, n, k) = (5, 20, 30, 16);
    let (a, b) = (noise::<T>(batch * m * k, 1), noise::<T>(batch * k * n, 2));
    let mut want = vec![T::zeroed(); batch * m * n];
    let (dense_a, dense_b) = (cpu::Mat::new(&a, m, k), cpu::Mat::new(&b, n, k).t());
    let to = cpu::MatMut::new(&mut want, m, n);
    let e = cpu::Epilogue::default();
    cpu::gemm_batched(batch, dense_a, m * k, dense_b, k * n, to, m * n, &e);
    let (a, b) = (Device::new(stream, &a, 0), Device::new(stream, &b, 0));
    let mut c = Device::new(stream, &vec![T::zeroed(); batch * m * n], 0);
    let (dense_a, dense_b) = (cuda::Mat::new(a.all(), m, k), cuda::Mat::new(b.all(), n, k).t());
    let to = cuda::MatMut::new(c.all_mut(), m, n);
    let e = cuda::Epilogue::default();
    cuda::gemm_batched(stream, batch, dense_a, m * k, dense_b, k * n, to, m * n, &e).unwrap();
    close("gemm_batched", &c.get(), &want, 2e-5);
}

fn groups<T: Float>(stream: &Stream) {
    // More products than one launch takes, some empty, of two layouts.
    let (k, n) = (24, 18);
    let rows: Vec<usize> = (0..40).map(|i| (i * 7) % 11).collect();
    let total: usize = rows.iter().sum();
    let (x, w) = (noise::<T>(total * k, 1), noise::<T>(rows.len() * n * k, 2));
    let start = noise::<f32>(total * n, 3);
    let firsts: Vec<usize> = rows
        .iter()
        .scan(0, |at, n| {
            *at += n;
            Some(*at - n)
        })
        .collect();
    for accumulate in [false, true] {
        let mut want = start.clone();
        let on_cpu: Vec<_> = (0..rows.len())
            .map(|i| {
                let a = cpu::Mat::new(&x[firsts[i] * k..(firsts[i] + rows[i]) * k], rows[i], k);
                let w = &w[i * n * k..(i + 1) * n * k];
                let b =
                    if i % 2 == 0 { cpu::Mat::new(w, n, k).t() } else { cpu::Mat::new(w, k, n) };
                cpu::Product { a, b, at: firsts[i] * n }
            })
            .collect();
        let e = cpu::Epilogue { accumulate, ..cpu::Epilogue::default() };
        cpu::gemm_grouped(&on_cpu, &mut want, &e);
        let (x, w) = (Device::new(stream, &x, 0), Device::new(stream, &w, 0));
        let mut c = Device::new(stream, &start, 0);
        let on_cuda: Vec<_> = (0..rows.len())
            .map(|i| {
                let part = x.all().range(firsts[i] * k..(firsts[i] + rows[i]) * k);
                let a = cuda::Mat::new(part, rows[i], k);
                let w = w.all().range(i * n * k..(i + 1) * n * k);
                let b = match i % 2 {
                    0 => cuda::Mat::new(w, n, k).t(),
                    _ => cuda::Mat::new(w, k, n),
                };
                cuda::Product { a, b, at: firsts[i] * n }
            })
            .collect();
        let e = cuda::Epilogue { accumulate, ..cuda::Epilogue::default() };
        cuda::gemm_grouped(stream, &on_cuda, c.all_mut(), &e).unwrap();
        close("gemm_grouped", &c.get(), &want, 3e-5);
    }
}

mod on_each {
    crate::check::each_type! { layouts sizes epilogues batches groups }
}
