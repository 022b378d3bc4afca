//! Kernels of rows that ranks share: norms, losses and attention in parts.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{self as cpu, ELSEWHERE, Float};

use crate::check::{Device, close, noise};

fn zeros<T: Float>(n: usize) -> Vec<T> {
    vec![T::zeroed(); n]
}

fn wide_norms<T: Float>(stream: &Stream) {
    for (rows, dim, skip) in [(0, 8, 0), (1, 1, 0), (30, 64, 0), (5, 64, 1), (9, 515, 0)] {
        let n = rows * dim;
        let [x, dy] = [1, 2].map(|seed| noise::<T>(n, seed));
        let [w, b] = [3, 4].map(|seed| noise::<T>(dim, seed));
        let mean = noise::<f32>(rows, 5);
        let variance: Vec<f32> = noise::<f32>(rows, 6).iter().map(|v| v.abs()).collect();
        let sums = noise::<f32>(2 * rows, 7);
        let [x2, dy2, w2, b2] = [&x, &dy, &w, &b].map(|v| Device::new(stream, v, skip));
        let [m2, v2, s2] = [&mean, &variance, &sums].map(|v| Device::new(stream, v, 0));
        let (m, v, w3) = (m2.all(), v2.all(), w2.all());
        for centred in [false, true] {
            let (mut out, mut out2) = (zeros(rows), Device::new(stream, &zeros::<f32>(rows), 0));
            cpu::row_moment(&x, centred.then_some(&mean[..]), 0.5, &mut out);
            let about = centred.then_some(m);
            cuda::row_moment(stream, x2.all(), about, 0.5, out2.all_mut()).unwrap();
            close("row_moment", &out2.get(), &out, 1e-5);
            let (mut y, mut y2) = (zeros(n), Device::new(stream, &zeros::<T>(n), skip));
            cpu::wide_norm(&x, &mean, &variance, 0.1, &w, centred.then_some(&b[..]), &mut y);
            let bias = centred.then_some(b2.all());
            cuda::wide_norm(stream, x2.all(), m, v, 0.1, w3, bias, y2.all_mut()).unwrap();
            close("wide_norm", &y2.get(), &y, 1e-5);
        }
        let (mut out, mut out2) =
            (zeros(2 * rows), Device::new(stream, &zeros::<f32>(2 * rows), 0));
        cpu::wide_norm_sums(&dy, &x, &mean, &variance, 0.1, &w, 0.5, &mut out);
        let o = out2.all_mut();
        cuda::wide_norm_sums(stream, dy2.all(), x2.all(), m, v, 0.1, w3, 0.5, o).unwrap();
        close("wide_norm_sums", &out2.get(), &out, 2e-5);
        let (mut dx, mut dw) = (zeros(n), zeros(n));
        let mut dx2 = Device::new(stream, &zeros::<T>(n), skip);
        let mut dw2 = Device::new(stream, &zeros::<f32>(n), 0);
        cpu::wide_norm_backward(&dy, &x, &mean, &variance, 0.1, &w, &sums, &mut dx, &mut dw);
        let (d, s, dx3, dw3) = (dy2.all(), s2.all(), dx2.all_mut(), dw2.all_mut());
        cuda::wide_norm_backward(stream, d, x2.all(), m, v, 0.1, w3, s, dx3, dw3).unwrap();
        close("wide_norm_backward", &dx2.get(), &dx, 2e-5);
        close("wide_norm_backward, weight", &dw2.get(), &dw, 1e-5);
    }
}

fn vocabularies<T: Float>(stream: &Stream) {
    for (rows, vocab) in [(0, 8), (1, 1), (5, 64), (300, 7)] {
        let x = noise::<T>(rows * vocab, 1);
        let mut targets: Vec<i32> = (0..rows).map(|r| (r * 7 % vocab) as i32).collect();
        targets.iter_mut().skip(1).zip([-100, ELSEWHERE]).for_each(|(t, odd)| *t = odd);
        let [own, max] = [2, 3].map(|seed| noise::<f32>(rows, seed));
        let mut terms: Vec<f32> = noise(2 * rows, 4).iter().map(|t: &f32| 1.0 + t.abs()).collect();
        let (x2, t2) = (Device::new(stream, &x, 0), Device::new(stream, &targets, 0));
        let (own2, max2) = (Device::new(stream, &own, 0), Device::new(stream, &max, 0));
        let mut terms2 = Device::new(stream, &terms, 0);
        cpu::vocabulary_terms(&x, &targets, vocab, &own, &max, &mut terms);
        let (o, m, t) = (own2.all(), max2.all(), terms2.all_mut());
        cuda::vocabulary_terms(stream, x2.all(), t2.all(), vocab, o, m, t).unwrap();
        close("vocabulary_terms", &terms2.get(), &terms, 1e-6);
        let [mut loss, mut lse] = [(); 2].map(|()| zeros::<f32>(rows));
        let [mut loss2, mut lse2] = [(); 2].map(|()| Device::new(stream, &zeros::<f32>(rows), 0));
        cpu::vocabulary_loss(&max, &terms, &targets, -100, &mut loss, &mut lse);
        let (l, z) = (loss2.all_mut(), lse2.all_mut());
        cuda::vocabulary_loss(stream, m, terms2.all(), t2.all(), -100, l, z).unwrap();
        close("vocabulary_loss", &loss2.get(), &loss, 2e-6);
        close("vocabulary_loss, lse", &lse2.get(), &lse, 2e-6);
    }
}

fn merges<T: Float>(stream: &Stream) {
    for (batch, tokens, heads, d) in [(0, 3, 2, 8), (2, 3, 2, 8), (1, 5, 3, 64), (2, 9, 1, 7)] {
        let rows = batch * tokens * heads;
        let (part, mut sum) = (noise::<T>(rows * d, 1), noise::<f32>(rows * d, 2));
        let (mut part_lse, mut lse) = (noise::<f32>(rows, 3), noise::<f32>(rows, 4));
        // A part without keys, and the first part that has some.
        part_lse.iter_mut().skip(1).step_by(5).for_each(|l| *l = f32::NEG_INFINITY);
        lse.iter_mut().skip(2).step_by(5).for_each(|l| *l = f32::NEG_INFINITY);
        let (part2, part_lse2) = (Device::new(stream, &part, 0), Device::new(stream, &part_lse, 0));
        let (mut sum2, mut lse2) = (Device::new(stream, &sum, 0), Device::new(stream, &lse, 0));
        cpu::merge_attention(&part, &part_lse, heads, tokens, &mut sum, &mut lse);
        let (p, l, s, z) = (part2.all(), part_lse2.all(), sum2.all_mut(), lse2.all_mut());
        cuda::merge_attention(stream, p, l, heads, tokens, s, z).unwrap();
        close("merge_attention", &sum2.get(), &sum, 2e-6);
        close("merge_attention, lse", &lse2.get(), &lse, 2e-6);
    }
}

mod on_each {
    crate::check::each_type! { wide_norms vocabularies merges }
}
