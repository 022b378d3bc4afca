//! Norms and their gradients.

use colossal_kernels::*;
use half::{bf16, f16};

use crate::check::{close, dot, everywhere, noise, rounding, slope, wide};

/// `a + b` in f64.
fn added<T: Float>(a: &[T], b: &[f64]) -> Vec<f64> {
    wide(a).iter().zip(b).map(|(a, b)| a + b).collect()
}

fn norms<T: Float>(place: &str) {
    let tolerance = 3e-6 + rounding::<T>();
    for (rows, dim) in [(1, 1), (3, 7), (70, 16), (65, 50), (2, 300)] {
        let name = format!("norm {} {rows}x{dim} {place}", T::NAME);
        let (x, w, b): (Vec<T>, Vec<T>, Vec<T>) =
            (noise(rows * dim, 1), noise(dim, 2), noise(dim, 3));
        let dy: Vec<T> = noise(rows * dim, 4);
        let [xw, ww, bw, dyw] = [wide(&x), wide(&w), wide(&b), wide(&dy)];
        let eps = 0.25;
        let (mut y, mut mean, mut rstd) = (x.clone(), vec![0.0; rows], vec![0.0; rows]);
        let (mut dx, mut dw, mut db) = (x.clone(), vec![1.0; dim], vec![1.0; dim]);
        rms_norm(&x, &w, eps, &mut y, &mut rstd);
        close(&name, &y, &reference::rms_norm(&xw, &ww, 0.25), tolerance);
        let mut again = dy.clone();
        rms_norm_backward(&mut again, &x, &w, &rstd, false, &mut dx, &mut dw);
        assert!(wide(&again) == wide(&y), "{name}: the result once more");
        let (mut again, mut sum, mut twice) = (dy.clone(), dy.clone(), dw.clone());
        rms_norm_backward(&mut again, &x, &w, &rstd, true, &mut sum, &mut twice);
        close(&name, &sum, &added(&dx, &dyw), 2.0 * tolerance);
        // Rows are independent: differences of a few elements of x, all of the weights.
        let want = slope(|w| dot(&reference::rms_norm(&xw, w, 0.25), &dyw), &ww);
        close(&name, &dw, &want.iter().map(|x| x + 1.0).collect::<Vec<_>>(), 1e-5);
        for r in [0, rows - 1] {
            let at = r * dim..(r + 1) * dim;
            let f = |x: &[f64]| dot(&reference::rms_norm(x, &ww, 0.25), &dyw[at.clone()]);
            close(&name, &dx[at.clone()], &slope(f, &xw[at.clone()]), 2.0 * tolerance);
        }

        let mut dw = vec![1.0; dim];
        layer_norm(&x, &w, &b, eps, &mut y, &mut mean, &mut rstd);
        close(&name, &y, &reference::layer_norm(&xw, &ww, &bw, 0.25), tolerance);
        let back = |accumulate: bool, dx: &mut [T], dw: &mut [f32], db: &mut [f32]| {
            let mut again = dy.clone();
            layer_norm_backward(&mut again, &x, &w, &b, &mean, &rstd, accumulate, dx, dw, db);
            assert!(wide(&again) == wide(&y), "{name}: the result once more");
        };
        back(false, &mut dx, &mut dw, &mut db);
        let (mut sum, mut dw2, mut db2) = (dy.clone(), dw.clone(), db.clone());
        back(true, &mut sum, &mut dw2, &mut db2);
        close(&name, &sum, &added(&dx, &dyw), 2.0 * tolerance);
        let want = slope(|w| dot(&reference::layer_norm(&xw, w, &bw, 0.25), &dyw), &ww);
        close(&name, &dw, &want.iter().map(|x| x + 1.0).collect::<Vec<_>>(), 1e-5);
        let want = slope(|b| dot(&reference::layer_norm(&xw, &ww, b, 0.25), &dyw), &bw);
        close(&name, &db, &want.iter().map(|x| x + 1.0).collect::<Vec<_>>(), 1e-5);
        for r in [0, rows - 1] {
            let at = r * dim..(r + 1) * dim;
            let f = |x: &[f64]| dot(&reference::layer_norm(x, &ww, &bw, 0.25), &dyw[at.clone()]);
            close(&name, &dx[at.clone()], &slope(f, &xw[at.clone()]), 2.0 * tolerance);
        }
    }
}

#[test]
fn norms_and_their_gradients() {
    everywhere(|place| {
        norms::<f32>(place);
        norms::<bf16>(place);
        norms::<f16>(place);
    });
}
