//! Kernels that take rows: norms, softmax, cross-entropy, rotary embedding, tables, experts' rows.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{self as cpu, ELSEWHERE, Float};

use crate::check::{Device, close, noise};

/// Rows, columns, and how far slices begin behind their allocation.
const SHAPES: [(usize, usize, usize); 8] = [
    (0, 8, 0),
    (1, 1, 0),
    (3, 7, 0),
    (70, 64, 0),
    (5, 64, 1),
    (20, 1000, 0),
    (9, 515, 0),
    (2, 5003, 0),
];

fn zeros<T: Float>(n: usize) -> Vec<T> {
    vec![T::zeroed(); n]
}

fn rms_norms<T: Float>(stream: &Stream) {
    for (rows, dim, skip) in SHAPES {
        let n = rows * dim;
        let [x, w, dy] = [(n, 1), (dim, 2), (n, 3)].map(|(n, seed)| noise::<T>(n, seed));
        let (mut y, mut rstd) = (zeros(n), zeros(rows));
        cpu::rms_norm(&x, &w, 1e-5, &mut y, &mut rstd);
        let (mut dx, mut dw) = (zeros(n), noise::<f32>(dim, 4));
        let [x2, w2] = [&x, &w].map(|x| Device::new(stream, x, skip));
        let mut y2 = Device::new(stream, &zeros::<T>(n), skip);
        let mut rstd2 = Device::new(stream, &zeros::<f32>(rows), 0);
        let mut dx2 = Device::new(stream, &zeros::<T>(n), skip);
        let mut dw2 = Device::new(stream, &dw, 0);
        cuda::rms_norm(stream, x2.all(), w2.all(), 1e-5, y2.all_mut(), rstd2.all_mut()).unwrap();
        close("rms_norm", &y2.get(), &y, 5e-6);
        close("rms_norm, rstd", &rstd2.get(), &rstd, 5e-6);
        for add in [false, true] {
            let (mut back, mut back2) = (dy.clone(), Device::new(stream, &dy, skip));
            cpu::rms_norm_backward(&mut back, &x, &w, &rstd, add, &mut dx, &mut dw);
            let (x, w, rstd) = (x2.all(), w2.all(), rstd2.all());
            let (dy3, dx3, dw3) = (back2.all_mut(), dx2.all_mut(), dw2.all_mut());
            cuda::rms_norm_backward(stream, dy3, x, w, rstd, add, dx3, dw3).unwrap();
            close("rms_norm_backward, result", &back2.get(), &back, 5e-6);
            close("rms_norm_backward", &dx2.get(), &dx, 2e-5);
            close("rms_norm_backward, weight", &dw2.get(), &dw, 2e-5);
        }
    }
}

fn layer_norms<T: Float>(stream: &Stream) {
    for (rows, dim, skip) in SHAPES {
        // One column has no variance: its gradient is nothing but rounding.
        let dim = dim.max(2);
        let n = rows * dim;
        let x = noise::<T>(n, 1);
        let [w, b, dy] = [(dim, 2), (dim, 3), (n, 4)].map(|(n, seed)| noise::<T>(n, seed));
        let (mut y, mut mean, mut rstd) = (zeros(n), zeros(rows), zeros(rows));
        cpu::layer_norm(&x, &w, &b, 1e-5, &mut y, &mut mean, &mut rstd);
        let (mut dx, mut dw, mut db) = (zeros(n), noise::<f32>(dim, 5), noise::<f32>(dim, 6));
        let [x2, w2, b2] = [&x, &w, &b].map(|x| Device::new(stream, x, skip));
        let mut y2 = Device::new(stream, &zeros::<T>(n), skip);
        let mut mean2 = Device::new(stream, &zeros::<f32>(rows), 0);
        let mut rstd2 = Device::new(stream, &zeros::<f32>(rows), 0);
        let mut dx2 = Device::new(stream, &zeros::<T>(n), skip);
        let (mut dw2, mut db2) = (Device::new(stream, &dw, 0), Device::new(stream, &db, 0));
        let (m, r) = (mean2.all_mut(), rstd2.all_mut());
        cuda::layer_norm(stream, x2.all(), w2.all(), b2.all(), 1e-5, y2.all_mut(), m, r).unwrap();
        close("layer_norm", &y2.get(), &y, 1e-5);
        close("layer_norm, mean", &mean2.get(), &mean, 5e-6);
        close("layer_norm, rstd", &rstd2.get(), &rstd, 5e-6);
        for add in [false, true] {
            let (mut back, mut back2) = (dy.clone(), Device::new(stream, &dy, skip));
            let (dw1, db1) = (&mut dw, &mut db);
            cpu::layer_norm_backward(&mut back, &x, &w, &b, &mean, &rstd, add, &mut dx, dw1, db1);
            let (x, w, b, m, r) = (x2.all(), w2.all(), b2.all(), mean2.all(), rstd2.all());
            let (dy3, dx3) = (back2.all_mut(), dx2.all_mut());
            let (dw3, db3) = (dw2.all_mut(), db2.all_mut());
            cuda::layer_norm_backward(stream, dy3, x, w, b, m, r, add, dx3, dw3, db3).unwrap();
            close("layer_norm_backward, result", &back2.get(), &back, 1e-5);
            close("layer_norm_backward", &dx2.get(), &dx, 5e-5);
            close("layer_norm_backward, weight", &dw2.get(), &dw, 2e-5);
            close("layer_norm_backward, bias", &db2.get(), &db, 2e-5);
        }
    }
}

fn softmaxes<T: Float>(stream: &Stream) {
    for (rows, dim, skip) in SHAPES {
        let n = rows * dim;
        let x: Vec<T> = noise::<T>(n, 1).iter().map(|x| T::from_f32(8.0 * x.to_f32())).collect();
        let dy = noise::<T>(n, 2);
        let (x2, dy2) = (Device::new(stream, &x, skip), Device::new(stream, &dy, skip));
        let mut y2 = Device::new(stream, &zeros::<T>(n), skip);
        let mut dx2 = Device::new(stream, &zeros::<T>(n), skip);
        let (mut y, mut dx) = (zeros(n), zeros(n));

        cpu::softmax(&x, dim, &mut y);
        cuda::softmax(stream, x2.all(), dim, y2.all_mut()).unwrap();
        close("softmax", &y2.get(), &y, 2e-6);
        y = y2.get();
        cpu::softmax_backward(&dy, &y, dim, &mut dx);
        cuda::softmax_backward(stream, dy2.all(), y2.all(), dim, dx2.all_mut()).unwrap();
        close("softmax_backward", &dx2.get(), &dx, 2e-6);

        cpu::log_softmax(&x, dim, &mut y);
        cuda::log_softmax(stream, x2.all(), dim, y2.all_mut()).unwrap();
        close("log_softmax", &y2.get(), &y, 5e-6);
        y = y2.get();
        cpu::log_softmax_backward(&dy, &y, dim, &mut dx);
        cuda::log_softmax_backward(stream, dy2.all(), y2.all(), dim, dx2.all_mut()).unwrap();
        close("log_softmax_backward", &dx2.get(), &dx, 5e-6);
    }
}

fn losses<T: Float>(stream: &Stream) {
    for (rows, vocab, skip) in SHAPES {
        let n = rows * vocab;
        let x: Vec<T> = noise::<T>(n, 1).iter().map(|x| T::from_f32(8.0 * x.to_f32())).collect();
        let mut targets: Vec<i32> = (0..rows).map(|r| (r * 7 % vocab) as i32).collect();
        targets.iter_mut().skip(1).zip([-100, ELSEWHERE, -3]).for_each(|(t, odd)| *t = odd);
        let mut dloss = noise::<f32>(rows, 2);
        dloss.iter_mut().skip(5).take(1).for_each(|d| *d = 0.0);
        let [mut loss, mut lse, mut max, mut sum] = [(); 4].map(|()| zeros::<f32>(rows));
        cpu::cross_entropy(&x, &targets, vocab, -100, &mut loss, &mut lse);
        cpu::logits_stats(&x, vocab, &mut max, &mut sum);
        let mut x2 = Device::new(stream, &x, skip);
        let (t2, d2) = (Device::new(stream, &targets, 0), Device::new(stream, &dloss, 0));
        let [mut loss2, mut lse2, mut max2, mut sum2] =
            [(); 4].map(|()| Device::new(stream, &zeros::<f32>(rows), 0));
        let (l, z) = (loss2.all_mut(), lse2.all_mut());
        cuda::cross_entropy(stream, x2.all(), t2.all(), vocab, -100, l, z).unwrap();
        cuda::logits_stats(stream, x2.all(), vocab, max2.all_mut(), sum2.all_mut()).unwrap();
        close("cross_entropy", &loss2.get(), &loss, 5e-6);
        close("cross_entropy, lse", &lse2.get(), &lse, 5e-6);
        close("logits_stats, max", &max2.get(), &max, 0.0);
        close("logits_stats, sum", &sum2.get(), &sum, 5e-6);
        // Rounded so that some are alike: the first of them counts.
        let alike: Vec<T> = x.iter().map(|x| T::from_f32(x.to_f32().round())).collect();
        let alike2 = Device::new(stream, &alike, skip);
        let (mut best, mut best2) = (vec![-1; rows], Device::new(stream, &vec![-1; rows], 0));
        cpu::logits_best(&alike, vocab, &mut best, &mut max);
        let (b, l) = (best2.all_mut(), max2.all_mut());
        cuda::logits_best(stream, alike2.all(), vocab, b, l).unwrap();
        assert_eq!(best2.get(), best);
        close("logits_best", &max2.get(), &max, 5e-6);
        let mut dx = x.clone();
        cpu::cross_entropy_backward(&dloss, &targets, vocab, -100, &lse, &mut dx);
        let (d, t, z) = (d2.all(), t2.all(), lse2.all());
        cuda::cross_entropy_backward(stream, d, t, vocab, -100, z, x2.all_mut()).unwrap();
        close("cross_entropy_backward", &x2.get(), &dx, 5e-6);
    }
}

fn rotations<T: Float>(stream: &Stream) {
    for (tokens, heads, d, skip) in [(0, 2, 8, 0), (5, 3, 64, 0), (7, 2, 6, 0), (4, 2, 32, 1)] {
        let n = tokens * heads * d;
        let x = noise::<T>(n, 1);
        let positions: Vec<i32> = (0..tokens).map(|t| (t * 5 % 11) as i32).collect();
        let (cos, sin) = (noise::<f32>(11 * d / 2, 2), noise::<f32>(11 * d / 2, 3));
        let (mut y, mut dx) = (zeros(n), zeros(n));
        cpu::rope(&x, &positions, &cos, &sin, heads, d, &mut y);
        cpu::rope_backward(&x, &positions, &cos, &sin, heads, d, &mut dx);
        let (x, p) = (Device::new(stream, &x, skip), Device::new(stream, &positions, 0));
        let (c, s) = (Device::new(stream, &cos, 0), Device::new(stream, &sin, 0));
        let (x, p, c, s) = (x.all(), p.all(), c.all(), s.all());
        let mut y2 = Device::new(stream, &zeros::<T>(n), skip);
        cuda::rope(stream, x, p, c, s, heads, d, y2.all_mut()).unwrap();
        close("rope", &y2.get(), &y, 1e-6);
        cuda::rope_backward(stream, x, p, c, s, heads, d, y2.all_mut()).unwrap();
        close("rope_backward", &y2.get(), &dx, 1e-6);
    }
}

fn tables<T: Float>(stream: &Stream) {
    for (tokens, dim, skip) in
        [(0, 8, 0), (5, 16, 0), (700, 24, 1), (3000, 5, 0), (40, 2100, 0), (9, 7, 0)]
    {
        let entries = 13;
        let mut ids: Vec<i32> = (0..tokens).map(|t| (t * t % 17) as i32).collect();
        ids.iter_mut().skip(2).take(1).for_each(|id| *id = -1);
        let (table, dy) = (noise::<T>(entries * dim, 1), noise::<T>(tokens * dim, 2));
        let (mut y, mut dtable) = (zeros(tokens * dim), noise::<f32>(entries * dim, 3));
        let mut dtable2 = Device::new(stream, &dtable, 0);
        cpu::embedding(&ids, &table, dim, &mut y);
        cpu::embedding_backward(&ids, &dy, dim, &mut dtable);
        let ids = Device::new(stream, &ids, 0);
        let (table, dy) = (Device::new(stream, &table, skip), Device::new(stream, &dy, skip));
        let mut y2 = Device::new(stream, &zeros::<T>(tokens * dim), skip);
        cuda::embedding(stream, ids.all(), table.all(), dim, y2.all_mut()).unwrap();
        close("embedding", &y2.get(), &y, 0.0);
        cuda::embedding_backward(stream, ids.all(), dy.all(), dim, dtable2.all_mut()).unwrap();
        // In the same order: the same bits.
        assert_eq!(dtable2.get(), dtable, "embedding_backward of {}", T::NAME);
    }
}

fn row_sums<T: Float>(stream: &Stream) {
    for (rows, dim, skip) in SHAPES.into_iter().chain([(300, 40, 0)]) {
        let x = noise::<T>(rows * dim, 1);
        let on = Device::new(stream, &x, skip);
        let (mut last, mut columns) = (zeros::<f32>(rows), noise::<f32>(dim, 2));
        let mut last2 = Device::new(stream, &last, 0);
        let mut columns2 = Device::new(stream, &columns, 0);
        cpu::sum_last(&x, dim, &mut last);
        cpu::sum_rows(&x, dim, &mut columns);
        cuda::sum_last(stream, on.all(), dim, last2.all_mut()).unwrap();
        cuda::sum_rows(stream, on.all(), dim, columns2.all_mut()).unwrap();
        close("sum_last", &last2.get(), &last, 1e-5);
        close("sum_rows", &columns2.get(), &columns, 1e-5);
    }
}

fn shared_rows<T: Float>(stream: &Stream) {
    for (tokens, k, width, skip) in [(0, 2, 8, 0), (5, 2, 64, 0), (7, 3, 13, 0), (3, 1, 600, 1)] {
        let count = tokens * k + 2;
        let mut at: Vec<i32> = (0..tokens * k).map(|i| ((i * 5 + 1) % count) as i32).collect();
        let stride_hits_all = count % 5 != 0;
        if !stride_hits_all {
            at = (0..tokens * k).map(|i| i as i32).collect();
        }
        at.iter_mut().skip(1).take(1).for_each(|at| *at = -1);
        let w = noise::<f32>(tokens * k, 1);
        let (rows, dy) = (noise::<T>(count * width, 2), noise::<T>(tokens * width, 3));
        let (mut y, mut drows) = (zeros(tokens * width), noise::<T>(count * width, 4));
        let mut drows2 = Device::new(stream, &drows, skip);
        let mut dw = zeros::<f32>(tokens * k);
        let mut dw2 = Device::new(stream, &dw, 0);
        cpu::combine_rows(&at, &w, k, &rows, width, &mut y);
        cpu::combine_rows_backward(&at, &w, k, &rows, width, &dy, &mut drows, &mut dw);
        let (at, w) = (Device::new(stream, &at, 0), Device::new(stream, &w, 0));
        let (rows, dy) = (Device::new(stream, &rows, skip), Device::new(stream, &dy, skip));
        let (at, w, rows, dy) = (at.all(), w.all(), rows.all(), dy.all());
        let mut y2 = Device::new(stream, &zeros::<T>(tokens * width), skip);
        cuda::combine_rows(stream, at, w, k, rows, width, y2.all_mut()).unwrap();
        close("combine_rows", &y2.get(), &y, 1e-6);
        let (dr, dw3) = (drows2.all_mut(), dw2.all_mut());
        cuda::combine_rows_backward(stream, at, w, k, rows, width, dy, dr, dw3).unwrap();
        close("combine_rows_backward", &drows2.get(), &drows, 1e-6);
        close("combine_rows_backward, weights", &dw2.get(), &dw, 1e-5);
    }
}

mod on_each {
    crate::check::each_type! {
        rms_norms layer_norms softmaxes losses rotations tables row_sums shared_rows
    }
}
