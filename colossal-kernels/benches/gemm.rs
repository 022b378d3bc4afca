//! Products of the sizes that training and decoding meet: throughput is in flops.

use colossal_kernels::{Epilogue, Float, Mat, MatMut, Threads, gemm, threads};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;

const SHAPES: [[usize; 3]; 6] = [
    [512, 512, 512],
    [1024, 1024, 1024],
    [1024, 2048, 512],
    [4096, 768, 3072],
    [1, 2048, 512],
    [8, 2048, 512],
];

fn products<T: Float>(c: &mut Criterion, count: usize) {
    threads::set(Threads::new(count));
    let mut group = c.benchmark_group(format!("gemm {} {count} threads", T::NAME));
    group.sample_size(10);
    for [m, n, k] in SHAPES {
        let a = vec![T::from_f32(0.5); m * k];
        let b = vec![T::from_f32(0.25); n * k];
        let mut out = vec![0.0f32; m * n];
        group.throughput(Throughput::Elements(2 * (m * n * k) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{m}x{n}x{k}")), |bench| {
            bench.iter(|| {
                let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, n, k).t());
                gemm(a, b, MatMut::new(&mut out, m, n), &Epilogue::default());
            });
        });
    }
}

fn all(c: &mut Criterion) {
    for count in [1, 2] {
        products::<f32>(c, count);
        products::<bf16>(c, count);
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
