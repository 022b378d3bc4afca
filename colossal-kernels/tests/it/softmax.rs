//! Softmax, cross-entropy and their gradients.

use colossal_kernels::*;
use half::bf16;

use crate::check::{close, dot, everywhere, noise, rounding, slope, wide};

#[test]
fn softmaxes_and_their_gradients() {
    everywhere(|place| {
        for (rows, dim) in [(1, 1), (3, 5), (9, 37), (2, 64)] {
            let (x, dy): (Vec<f32>, Vec<f32>) = (noise(rows * dim, 1), noise(rows * dim, 2));
            let (xw, dyw) = (wide(&x), wide(&dy));
            let log =
                |x: &[f64]| reference::softmax(x, dim).iter().map(|p| p.ln()).collect::<Vec<_>>();
            let (mut y, mut dx) = (x.clone(), x.clone());
            softmax(&x, dim, &mut y);
            close(place, &y, &reference::softmax(&xw, dim), 1e-6);
            softmax_backward(&dy, &y, dim, &mut dx);
            close(place, &dx, &slope(|x| dot(&reference::softmax(x, dim), &dyw), &xw), 1e-6);
            log_softmax(&x, dim, &mut y);
            close(place, &y, &log(&xw), 2e-6);
            log_softmax_backward(&dy, &y, dim, &mut dx);
            close(place, &dx, &slope(|x| dot(&log(x), &dyw), &xw), 5e-6);
        }
    });
}

fn cross_entropies<T: Float>(place: &str) {
    let (rows, vocab) = (6, 83);
    let x: Vec<T> = noise(rows * vocab, 1);
    let (targets, dloss) = ([0, 82, -100, 5, 5, 40], [1.0, -0.5, 2.0, 0.0, 0.25, 3.0]);
    let (mut loss, mut lse) = (vec![9.0; rows], vec![0.0; rows]);
    cross_entropy(&x, &targets, vocab, -100, &mut loss, &mut lse);
    close(place, &loss, &reference::cross_entropy(&wide(&x), &targets, vocab, -100), 2e-6);
    let f =
        |x: &[f64]| dot(&reference::cross_entropy(x, &targets, vocab, -100), &dloss.map(f64::from));
    let want = slope(f, &wide(&x));
    let mut grad = x.clone();
    cross_entropy_backward(&dloss, &targets, vocab, -100, &lse, &mut grad);
    close(place, &grad, &want, 3e-6 + rounding::<T>());
    let (mut max, mut sum) = (vec![0.0; rows], vec![0.0; rows]);
    logits_stats(&x, vocab, &mut max, &mut sum);
    let joined: Vec<f32> = max.iter().zip(&sum).map(|(m, s)| m + s.ln()).collect();
    close(place, &joined, &wide(&lse), 1e-6);
}

#[test]
fn cross_entropy_and_its_gradient() {
    everywhere(|place| {
        cross_entropies::<f32>(place);
        cross_entropies::<bf16>(place);
    });
}
