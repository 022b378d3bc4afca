//! Products with int8 weights: exact in their rounded operands, close to f64 in the given ones.

use colossal_kernels::*;
use half::bf16;

use crate::check::{everywhere, noise, wide};

const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [1, 16, 4],
    [1, 17, 3],
    [2, 100, 65],
    [3, 31, 130],
    [5, 64, 64],
    [7, 200, 33],
    [13, 33, 517],
    [16, 130, 1027],
];

/// What the rounding of a row costs, against the exact product.
fn products<T: Float>(place: &str, rounding: f64) {
    for (seed, [m, n, k]) in SHAPES.into_iter().enumerate() {
        let (mut x, w): (Vec<T>, Vec<T>) =
            (noise(m * k, 1 + seed as u64), noise(n * k, 50 + seed as u64));
        // Rows of unlike size; the last one is zero.
        for (i, x) in x.iter_mut().enumerate() {
            *x = T::from_f32(x.to_f32() * [1.0, 100.0, 1e-3][i / k % 3]);
        }
        if m > 1 {
            x[(m - 1) * k..].fill(T::zeroed());
        }
        let bias: Vec<T> = noise(n, 3);
        let q = Int8Matrix::quantize(&w, n, k);
        for bias in [None, Some(&bias[..])] {
            let mut y = vec![T::zeroed(); m * n];
            gemm_int8(&x, m, &q, bias, &mut y);
            for (i, row) in wide(&x).chunks(k).enumerate() {
                let largest = row.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                // The row as it is rounded, with f32's choice at ties.
                let scale = largest as f32 / 127.0;
                let inverse = if largest > 0.0 { 127.0 / largest as f32 } else { 0.0 };
                let rounded: Vec<f64> = row
                    .iter()
                    .map(|x| f64::from((*x as f32 * inverse).round_ties_even() * scale))
                    .collect();
                for j in 0..n {
                    let b = bias.map_or(0.0, |b| f64::from(b[j].to_f32()));
                    let in_int8 = (0..k).map(|l| rounded[l] * f64::from(q.get(j, l))).sum::<f64>();
                    let exact = (0..k).map(|l| row[l] * f64::from(w[j * k + l].to_f32()));
                    let size = largest * k as f64;
                    let got = f64::from(y[i * n + j].to_f32());
                    let off = (got - in_int8 - b).abs();
                    let most = 1e-6 * size + rounding * (in_int8.abs() + b.abs());
                    assert!(off <= most + 1e-9, "{m} {n} {k} {i} {j} {place}: {off} > {most}");
                    // Each of k terms is off by 1/254 of either operand's largest, at most.
                    let off = (got - exact.sum::<f64>() - b).abs();
                    let most = size * (2.0 / 254.0 + 1.0 / (254.0 * 254.0)) + rounding * got.abs();
                    assert!(off <= most + 1e-9, "{m} {n} {k} {i} {j} {place}: {off} > {most}");
                }
            }
        }
    }
}

#[test]
fn products_with_int8_weights() {
    everywhere(|place| {
        products::<f32>(place, 1e-6);
        products::<bf16>(place, 4e-3);
    });
}

/// Where `vpmaddubsw` would saturate, and sums are as large as they get.
#[test]
fn the_largest_values_do_not_saturate() {
    everywhere(|place| {
        for (x, w) in [(1.0f32, 1.0f32), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
            let (m, n, k) = (3, 20, 4097);
            let q = Int8Matrix::quantize(&vec![w; n * k], n, k);
            let mut y = vec![0.0f32; m * n];
            gemm_int8(&vec![x; m * k], m, &q, None, &mut y);
            let want = x * w * k as f32;
            assert!(y.iter().all(|y| (y - want).abs() <= 1e-5 * want.abs()), "{place}: {}", y[0]);
        }
    });
}

#[test]
#[should_panic(expected = "what an i32 can sum")]
fn a_product_too_deep_is_refused() {
    Int8Matrix::quantize(&vec![0.0f32; 70_000], 1, 70_000);
}
