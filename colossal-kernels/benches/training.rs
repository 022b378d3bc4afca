//! What a training step runs beside products: attention, norms, the loss and the optimizer.
//! Attention counts flops of the causal half, the others bytes read and written.

use std::hint::black_box;

use colossal_kernels::*;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn attention(c: &mut Criterion, count: usize) {
    let mut group = c.benchmark_group(format!("attention {count} threads"));
    group.sample_size(10);
    for [batch, len, heads, d] in [[4, 256, 8, 64], [1, 2048, 8, 64]] {
        let s = AttentionShape::new(batch, len, len, heads, heads, d);
        let n = batch * len * heads * d;
        let (q, k, v, dout) = (vec![0.1f32; n], vec![0.2; n], vec![0.3; n], vec![0.4; n]);
        let (mut out, mut lse) = (vec![0.0; n], vec![0.0; batch * heads * len]);
        let (mut dq, mut dk, mut dv) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        let product = (batch * heads * len * len * d) as u64;
        group.throughput(Throughput::Elements(2 * product));
        group.bench_function(format!("forward {batch}x{len}x{heads}x{d}"), |b| {
            b.iter(|| flash_attention(&s, &q, &k, &v, &mut out, &mut lse));
        });
        group.throughput(Throughput::Elements(5 * product));
        group.bench_function(format!("backward {batch}x{len}x{heads}x{d}"), |b| {
            b.iter(|| {
                flash_attention_backward(
                    &s, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
                );
            });
        });
    }
    let s = AttentionShape::new(8, 1, 1024, 12, 12, 64);
    let (q, k, v) = (vec![0.1f32; 8 * 768], vec![0.2; 8 * 1024 * 768], vec![0.3; 8 * 1024 * 768]);
    let (mut out, mut lse) = (vec![0.0; 8 * 768], vec![0.0; 8 * 12]);
    group.throughput(Throughput::Bytes(8 * k.len() as u64));
    group.bench_function("decode 8x1024x12x64", |b| {
        b.iter(|| flash_attention(&s, &q, &k, &v, &mut out, &mut lse));
    });
}

fn memory_bound(c: &mut Criterion, count: usize) {
    let mut group = c.benchmark_group(format!("memory {count} threads"));
    group.sample_size(10);
    let (rows, dim, vocab) = (1024, 512, 8192);
    let (x, w) = (vec![0.5f32; rows * dim], vec![1.0f32; dim]);
    let (mut y, mut dy, mut rstd) = (x.clone(), x.clone(), vec![0.0; rows]);
    let mut dw = vec![0.0; dim];
    group.throughput(Throughput::Bytes(8 * x.len() as u64));
    group.bench_function("rms_norm 1024x512", |b| {
        b.iter(|| rms_norm(&x, &w, 1e-5, &mut y, &mut rstd));
    });
    group.throughput(Throughput::Bytes(16 * x.len() as u64));
    group.bench_function("rms_norm_backward 1024x512", |b| {
        b.iter(|| rms_norm_backward(&mut dy, &x, &w, &rstd, false, &mut y, &mut dw));
    });
    group.throughput(Throughput::Bytes(12 * x.len() as u64));
    group.bench_function("swiglu 1024x512", |b| b.iter(|| swiglu(&x, &x, &mut y)));
    let (mut logits, targets) = (vec![0.1f32; rows * vocab], vec![7; rows]);
    let (mut loss, mut lse, dloss) = (vec![0.0; rows], vec![0.0; rows], vec![0.0001; rows]);
    group.throughput(Throughput::Bytes(4 * logits.len() as u64));
    group.bench_function("cross_entropy 1024x8192", |b| {
        b.iter(|| cross_entropy(&logits, &targets, vocab, -100, &mut loss, &mut lse));
    });
    group.throughput(Throughput::Bytes(8 * logits.len() as u64));
    group.bench_function("cross_entropy_backward 1024x8192", |b| {
        b.iter(|| {
            cross_entropy_backward(&dloss, &targets, vocab, -100, &lse, black_box(&mut logits));
        });
    });
    let n = 10_000_000;
    let (mut p, g, mut m, mut v) = (vec![0.1f32; n], vec![0.1f32; n], vec![0.0; n], vec![0.0; n]);
    let rule = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    group.throughput(Throughput::Bytes(28 * n as u64));
    group.bench_function("adamw 10M", |b| b.iter(|| rule.step(9, &mut p, &g, &mut m, &mut v)));
}

fn all(c: &mut Criterion) {
    for count in [1, 2] {
        threads::set(Threads::new(count));
        attention(c, count);
        memory_bound(c, count);
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
