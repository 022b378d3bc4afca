//! Optimizers, and norm and scale of many tensors.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{self as cpu, Adafactor, AdamW, Came, Float, Lamb, Lars, Lion, Piece};

use crate::check::{Device, close, noise, stream};

const RULE: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

#[test]
fn adamw() {
    let Some(stream) = stream() else { return };
    for (n, skip) in [(0, 0), (5, 1), (1030, 0)] {
        let (mut p, mut m, mut v) = (noise::<f32>(n, 1), vec![0.0; n], vec![0.0; n]);
        let [mut p2, mut m2, mut v2] = [&p, &m, &v].map(|x| Device::new(&stream, x, skip));
        for t in 1..4 {
            let g = noise::<f32>(n, 10 + u64::from(t));
            RULE.step_grad_scale(t, &mut p, &g, &mut m, &mut v, 0.5);
            let g = Device::new(&stream, &g, skip);
            let (p, m, v) = (p2.all_mut(), m2.all_mut(), v2.all_mut());
            cuda::adamw(&stream, &RULE, t, p, g.all(), m, v, 0.5).unwrap();
        }
        close("adamw", &p2.get(), &p, 1e-6);
        close("adamw, m", &m2.get(), &m, 1e-6);
        close("adamw, v", &v2.get(), &v, 1e-6);
    }
}

fn masters<T: Float>(stream: &Stream) {
    for (n, skip) in [(0, 0), (5, 1), (1030, 0)] {
        let (mut w, g, mut m, mut v) =
            (noise::<f32>(n, 1), noise::<f32>(n, 2), noise::<f32>(n, 3), vec![0.1; n]);
        let mut p = vec![T::zeroed(); n];
        let mut p2 = Device::new(stream, &p, skip);
        let [mut w2, g2, mut m2, mut v2] = [&w, &g, &m, &v].map(|x| Device::new(stream, x, skip));
        RULE.step_masters(3, 0.7, &mut w, &mut p, &g, &mut m, &mut v);
        let (wm, pm, mm, vm) = (w2.all_mut(), p2.all_mut(), m2.all_mut(), v2.all_mut());
        cuda::adamw_masters(stream, &RULE, 3, 0.7, wm, pm, g2.all(), mm, vm).unwrap();
        close("adamw_masters", &w2.get(), &w, 1e-6);
        close("adamw_masters, parameters", &p2.get(), &p, 1e-6);
        close("adamw_masters, m", &m2.get(), &m, 1e-6);
        close("adamw_masters, v", &v2.get(), &v, 1e-6);
    }
}

#[test]
fn lion() {
    let Some(stream) = stream() else { return };
    let rule = Lion { lr: 1e-2, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    for (n, skip) in [(0, 0), (5, 1), (1030, 0)] {
        let (mut p, g, mut m) = (noise::<f32>(n, 1), noise::<f32>(n, 2), noise::<f32>(n, 3));
        let [mut p2, g2, mut m2] = [&p, &g, &m].map(|x| Device::new(&stream, x, skip));
        rule.step(&mut p, &g, &mut m, 0.5);
        cuda::lion(&stream, &rule, p2.all_mut(), g2.all(), m2.all_mut(), 0.5).unwrap();
        close("lion", &p2.get(), &p, 1e-6);
        close("lion, m", &m2.get(), &m, 1e-6);
    }
}

/// Adds a hundredth, as other ranks might: shows that sums are asked for, and used.
fn others(sums: &mut [f64]) {
    sums.iter_mut().for_each(|x| *x *= 1.01);
}

#[test]
fn lamb_and_lars() {
    let Some(stream) = stream() else { return };
    let lamb = Lamb { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
    let lars = Lars { lr: 0.1, momentum: 0.9, trust: 0.01, eps: 1e-8, weight_decay: 0.1 };
    for (n, skip) in [(0, 0), (5, 1), (1030, 0), (40_003, 0)] {
        let (mut p, mut m, mut v) = (noise::<f32>(n, 1), vec![0.0; n], vec![0.0; n]);
        let [mut p2, mut m2, mut v2] = [&p, &m, &v].map(|x| Device::new(&stream, x, skip));
        let (mut q, mut k) = (noise::<f32>(n, 2), noise::<f32>(n, 3));
        let [mut q2, mut k2] = [&q, &k].map(|x| Device::new(&stream, x, skip));
        for t in 1..4 {
            let g = noise::<f32>(n, 10 + u64::from(t));
            lamb.step(t, &mut p, &g, &mut m, &mut v, 0.5, &mut others);
            lars.step(&mut q, &g, &mut k, 0.5, &mut others);
            let g = Device::new(&stream, &g, skip);
            let (p, m, v) = (p2.all_mut(), m2.all_mut(), v2.all_mut());
            cuda::lamb(&stream, &lamb, t, p, g.all(), m, v, 0.5, &mut others).unwrap();
            let (q, k) = (q2.all_mut(), k2.all_mut());
            cuda::lars(&stream, &lars, q, g.all(), k, 0.5, &mut others).unwrap();
        }
        close("lamb", &p2.get(), &p, 1e-6);
        close("lamb, m", &m2.get(), &m, 1e-6);
        close("lamb, v", &v2.get(), &v, 1e-6);
        close("lars", &q2.get(), &q, 1e-6);
        close("lars, m", &k2.get(), &k, 1e-6);
    }
}

#[test]
fn factored() {
    let Some(stream) = stream() else { return };
    let pieces = [
        Piece::whole(&[37]),
        Piece::whole(&[40, 133]),
        Piece::whole(&[3, 18, 7]),
        // Parts of rows, out of order, over a stack of matrices of which one is not held.
        Piece::new(&[4, 20, 150], [(9100, 1000), (13, 2900), (3007, 40)]),
        Piece::new(&[4, 5], []),
    ];
    for piece in &pieces {
        for (decay, scale_parameter) in [(0.0, true), (0.1, false)] {
            let adafactor = Adafactor {
                lr: 1e-2,
                decay_rate: 0.8,
                eps: (1e-30, 1e-3),
                clip: 1.0,
                weight_decay: decay,
                scale_parameter,
            };
            let betas = (0.9, 0.999, 0.9999);
            let came =
                Came { lr: 1e-2, betas, eps: (1e-30, 1e-16), clip: 1.0, weight_decay: decay };
            let n = piece.len();
            let (mut p, mut q, mut m) = (noise::<f32>(n, 1), noise::<f32>(n, 2), vec![0.0; n]);
            let [mut p2, mut q2, mut m2] = [&p, &q, &m].map(|x| Device::new(&stream, x, 1));
            let mut states = [(); 6].map(|()| piece.factors());
            // So that rows that nobody holds have means.
            states.iter_mut().for_each(|s| (s.rows.fill(0.1), s.cols.fill(0.1)).0);
            let [a, b, c, a2, b2, c2] = &mut states;
            for t in 1..4 {
                let g = noise::<f32>(n, 10 + u64::from(t));
                adafactor.step(t + 1, piece, &mut p, &g, a, 0.5, &mut others);
                came.step(piece, &mut q, &g, &mut m, [b, c], 0.5, &mut others);
                let g = Device::new(&stream, &g, 0);
                let p = p2.all_mut();
                cuda::adafactor(
                    &stream,
                    &adafactor,
                    t + 1,
                    piece,
                    p,
                    g.all(),
                    a2,
                    0.5,
                    &mut others,
                )
                .unwrap();
                let (q, m, states) = (q2.all_mut(), m2.all_mut(), [&mut *b2, &mut *c2]);
                cuda::came(&stream, &came, piece, q, g.all(), m, states, 0.5, &mut others).unwrap();
            }
            close("adafactor", &p2.get(), &p, 2e-6);
            close("came", &q2.get(), &q, 2e-6);
            close("came, m", &m2.get(), &m, 2e-6);
            for (what, got, want) in [("adafactor", a2, a), ("came", b2, b), ("came", c2, c)] {
                close(&format!("{what}, rows"), &got.rows, &want.rows, 1e-6);
                close(&format!("{what}, columns"), &got.cols, &want.cols, 1e-6);
            }
        }
    }
}

#[test]
fn many_tensors() {
    let Some(stream) = stream() else { return };
    // More than one launch takes, of odd lengths, one misaligned, some empty.
    let mut tensors: Vec<Vec<f32>> =
        (0..40).map(|i| noise((i * 37 % 50) * (i % 7), i as u64)).collect();
    tensors.push(noise(30_000, 99));
    let mut on: Vec<_> =
        tensors.iter().enumerate().map(|(i, t)| Device::new(&stream, t, i % 2)).collect();
    let mut out = Device::new(&stream, &[0.0f64], 0);
    let slices: Vec<_> = on.iter().map(|t| t.all()).collect();
    cuda::sum_of_squares_many(&stream, &slices, out.all_mut()).unwrap();
    let all: Vec<&[f32]> = tensors.iter().map(|t| &t[..]).collect();
    let want = cpu::sum_of_squares_many(&all);
    assert!((out.get()[0] - want).abs() < 1e-5 * want, "{} is not {want}", out.get()[0]);
    cuda::sum_of_squares(&stream, on[3].all(), out.all_mut()).unwrap();
    let want = cpu::sum_of_squares(&tensors[3]);
    assert!((out.get()[0] - want).abs() < 1e-5 * want, "{} is not {want}", out.get()[0]);
    let mut slices: Vec<_> = on.iter_mut().map(|t| t.all_mut()).collect();
    cuda::scale_many(&stream, &mut slices, 0.3).unwrap();
    for (t, on) in tensors.iter_mut().zip(&on) {
        cpu::scale_many(&mut [&mut t[..]], 0.3);
        assert_eq!(on.get(), *t);
    }
    cuda::sum_of_squares_many(&stream, &[], out.all_mut()).unwrap();
    assert_eq!(out.get(), [0.0]);
}

mod on_each {
    crate::check::each_type! { masters }
}
