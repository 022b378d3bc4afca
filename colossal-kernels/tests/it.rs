//! Every kernel against its plain form or finite differences, on every instruction set that the
//! machine has and on one, two and three threads.

use std::sync::Mutex;

use colossal_kernels::*;
use half::{bf16, f16};
use proptest::prelude::*;

/// Runs `f` on each instruction set and number of threads; one test at a time, since the
/// instruction set belongs to the process.
fn everywhere(f: impl Fn(&str)) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    for wanted in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
        if force_isa(wanted) != wanted {
            continue;
        }
        for n in [1, 2, 3] {
            threads::set(Threads::new(n));
            f(&format!("{wanted:?}, {n} threads"));
        }
    }
    threads::set(Threads::new(1));
}

/// Reproducible numbers in `-1 .. 1`, as `T` holds them.
fn noise<T: Float>(n: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// `|got - want| <= tolerance (1 + |want|)`.
fn close<T: Float>(what: &str, got: &[T], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let g = f64::from(g.to_f32());
        assert!(
            (g - w).abs() <= tolerance * (1.0 + w.abs()),
            "{what}: element {i} is {g}, not {w}"
        );
    }
}

/// What rounding a result to `T` costs.
fn rounding<T: Float>() -> f64 {
    match T::NAME {
        "bf16" => 4.0e-3,
        "f16" => 6.0e-4,
        _ => 0.0,
    }
}

/// Central differences of a scalar function in f64.
fn slope(f: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    let mut x = x.to_vec();
    let h = 1e-5;
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + h;
            let up = f(&x);
            x[i] = at - h;
            let down = f(&x);
            x[i] = at;
            (up - down) / (2.0 * h)
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn transposed<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols * rows).map(|i| x[i % rows * cols + i / rows]).collect()
}

fn activation(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Silu => reference::silu(x),
        Activation::Gelu => reference::gelu(x),
        Activation::GeluTanh => reference::gelu_tanh(x),
    }
}

const SHAPES: [[usize; 3]; 13] = [
    [17, 40, 0],
    [1, 1, 1],
    [1, 37, 65],
    [1, 200, 1500],
    [3, 5, 7],
    [7, 130, 64],
    [14, 32, 64],
    [15, 33, 17],
    [49, 70, 33],
    [65, 100, 2],
    [100, 65, 1],
    [60, 65, 1030],
    [113, 259, 130],
];

fn products<T: Float, O: Float>(place: &str) {
    for (seed, [m, n, k]) in SHAPES.into_iter().enumerate() {
        let (a, b): (Vec<T>, Vec<T>) =
            (noise(m * k, seed as u64 + 1), noise(k * n, seed as u64 + 50));
        let (bias, before): (Vec<T>, Vec<O>) = (noise(n, 7), noise(m * n, 8));
        let product = reference::gemm(m, n, k, &wide(&a), &wide(&b));
        let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
        for layout in 0..4 {
            let kinds = [
                Activation::None,
                Activation::Relu,
                Activation::Silu,
                Activation::Gelu,
                Activation::GeluTanh,
            ];
            let kind = kinds[(seed + layout) % 5];
            let a = if layout & 1 == 0 { Mat::new(&a, m, k) } else { Mat::new(&at, k, m).t() };
            let b = if layout & 2 == 0 { Mat::new(&b, k, n) } else { Mat::new(&bt, n, k).t() };
            let name = format!(
                "gemm {} {} {m}x{n}x{k}, layout {layout}, {kind:?}, {place}",
                T::NAME,
                O::NAME
            );
            let tolerance = 1e-6 * (k as f64).sqrt() + 2e-6 + rounding::<O>();
            let mut c = before.clone();
            gemm(a, b, MatMut::new(&mut c, m, n), &Epilogue::default());
            close(&name, &c, &product, tolerance);
            let e = Epilogue { alpha: 0.5, accumulate: true, bias: Some(&bias), activation: kind };
            let mut c = before.clone();
            gemm(a, b, MatMut::new(&mut c, m, n), &e);
            let want: Vec<f64> = product
                .iter()
                .enumerate()
                .map(|(i, x)| {
                    let x = 0.5 * x + f64::from(bias[i % n].to_f32());
                    f64::from(before[i].to_f32()) + activation(kind, x)
                })
                .collect();
            close(&name, &c, &want, 2.0 * tolerance);
        }
    }
}

#[test]
fn products_of_all_layouts_and_epilogues() {
    everywhere(|place| {
        products::<f32, f32>(place);
        products::<bf16, f32>(place);
        products::<bf16, bf16>(place);
        products::<f16, f32>(place);
    });
}

#[test]
fn batched_products_take_strides() {
    everywhere(|place| {
        let (batch, m, n, k) = (5, 6, 9, 20);
        let (a, b): (Vec<f32>, Vec<f32>) = (noise(batch * m * k, 1), noise(k * n, 2));
        let mut c = vec![0.0f32; batch * (m * n + 3)];
        let out = MatMut::new(&mut c, m, n);
        let (a_mat, b_mat) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
        gemm_batched(batch, a_mat, m * k, b_mat, 0, out, m * n + 3, &Epilogue::default());
        for i in 0..batch {
            let want = reference::gemm(m, n, k, &wide(&a[i * m * k..(i + 1) * m * k]), &wide(&b));
            let at = i * (m * n + 3);
            close(place, &c[at..at + m * n], &want, 1e-5);
            assert_eq!(c[at + m * n..at + m * n + 3], [0.0; 3]);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_of_any_strides(
        m in 1usize..70, n in 1usize..80, k in 0usize..90, gap in 0usize..3, step in 1usize..3, layout in 0usize..8,
    ) {
        // A matrix with gaps between rows and between elements, maybe stored by columns.
        let strides = |rows: usize, cols: usize, flip: bool| match flip {
            false => (cols * step + gap, step),
            true => (step, rows * step + gap),
        };
        let size = |rows: usize, cols: usize| (rows * step + gap + 1) * (cols * step + gap + 1);
        let (a, b): (Vec<f32>, Vec<f32>) = (noise(size(m, k), 1), noise(size(k, n), 2));
        let (ra, ca) = strides(m, k, layout & 1 != 0);
        let (rb, cb) = strides(k, n, layout & 2 != 0);
        let (rc, cc) = strides(m, n, layout & 4 != 0);
        let mut c = vec![9.0f32; size(m, n)];
        gemm(
            Mat { data: &a, rows: m, cols: k, row_stride: ra, col_stride: ca },
            Mat { data: &b, rows: k, cols: n, row_stride: rb, col_stride: cb },
            MatMut { data: &mut c, rows: m, cols: n, row_stride: rc, col_stride: cc },
            &Epilogue::default(),
        );
        let mut want = vec![9.0f64; size(m, n)];
        for i in 0..m {
            for j in 0..n {
                want[i * rc + j * cc] = (0..k)
                    .map(|l| f64::from(a[i * ra + l * ca]) * f64::from(b[l * rb + j * cb]))
                    .sum();
            }
        }
        close("gemm of any strides", &c, &want, 1e-5);
    }
}

#[test]
#[should_panic(expected = "elements of c overlap")]
fn a_product_into_overlapping_rows_is_refused() {
    let x = [1.0f32; 4];
    let mut c = [0.0f32; 4];
    let c = MatMut { data: &mut c, rows: 2, cols: 2, row_stride: 1, col_stride: 1 };
    gemm(Mat::new(&x, 2, 2), Mat::new(&x, 2, 2), c, &Epilogue::default());
}

fn attention_cases(f: impl Fn(&AttentionShape<'_>)) {
    let plain = AttentionShape::new;
    f(&plain(1, 1, 1, 1, 1, 1));
    f(&plain(2, 1, 150, 4, 2, 16));
    f(&plain(2, 3, 40, 4, 1, 20));
    f(&plain(1, 150, 150, 2, 2, 16));
    f(&plain(1, 70, 200, 4, 2, 24));
    f(&plain(1, 75, 130, 2, 1, 40));
    f(&AttentionShape { causal: false, ..plain(2, 66, 131, 2, 1, 8) });
    f(&AttentionShape { window: Some(20), ..plain(1, 140, 140, 2, 2, 12) });
    let (q_lens, kv_lens) = ([40, 0, 70], [60, 5, 33]);
    f(&AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        ..plain(3, 70, 80, 2, 1, 16)
    });
    f(&AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        causal: false,
        ..plain(3, 70, 80, 2, 1, 16)
    });
    let data: Vec<f32> = noise(2 * 30 * 50, 3);
    let bias = AttentionBias { data: &data, batch_stride: 0, head_stride: 30 * 50 };
    f(&AttentionShape { bias: Some(bias), ..plain(2, 30, 50, 2, 2, 16) });
    f(&AttentionShape { bias: Some(bias), causal: false, ..plain(1, 30, 50, 2, 2, 16) });
}

fn attention_forward<T: Float>(place: &str) {
    attention_cases(|s| {
        let (nq, nk) =
            (s.batch * s.q_len * s.heads * s.head_dim, s.kv_len * s.kv_heads * s.head_dim);
        // A cache with room beyond the keys.
        let s = AttentionShape { kv_batch_stride: nk + 24, ..*s };
        let q: Vec<T> = noise(nq, 1);
        let k: Vec<T> = noise(s.batch * (nk + 24), 2);
        let v: Vec<T> = noise(s.batch * (nk + 24), 3);
        let mut out: Vec<T> = noise(nq, 4);
        let mut lse = vec![0.0; s.batch * s.heads * s.q_len];
        flash_attention(&s, &q, &k, &v, &mut out, &mut lse);
        let want = reference::attention(&s, &wide(&q), &wide(&k), &wide(&v));
        close(&format!("attention {} {s:?} {place}", T::NAME), &out, &want, 5e-6 + rounding::<T>());
    });
}

#[test]
fn attention_forward_against_the_whole_matrix() {
    everywhere(|place| {
        attention_forward::<f32>(place);
        attention_forward::<bf16>(place);
    });
}

/// Along random directions: the gradients' products with them against differences in f64.
fn attention_backward<T: Float>(place: &str, tolerance: f64) {
    attention_cases(|s| {
        let (nq, nk) = (s.q_len * s.heads * s.head_dim, s.kv_len * s.kv_heads * s.head_dim);
        let (nq, nk) = (s.batch * nq, s.batch * nk);
        let x: [Vec<T>; 3] = [noise(nq, 1), noise(nk, 2), noise(nk, 3)];
        let dout: Vec<T> = noise(nq, 4);
        let (mut out, mut lse) = (vec![T::zeroed(); nq], vec![0.0; s.batch * s.heads * s.q_len]);
        flash_attention(s, &x[0], &x[1], &x[2], &mut out, &mut lse);
        let (mut dq, mut dk, mut dv): (Vec<T>, Vec<T>, Vec<T>) =
            (noise(nq, 5), noise(nk, 6), noise(nk, 7));
        flash_attention_backward(
            s, &x[0], &x[1], &x[2], &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
        );
        let exact: Vec<Vec<f64>> = x.iter().map(|x| wide(x)).collect();
        for (which, grad) in [dq, dk, dv].iter().enumerate() {
            for seed in 0..2 {
                let u: Vec<f64> = wide(&noise::<f32>(grad.len(), 100 + seed));
                let loss = |h: f64| {
                    let mut x = exact.clone();
                    x[which].iter_mut().zip(&u).for_each(|(x, u)| *x += h * u);
                    dot(&reference::attention(s, &x[0], &x[1], &x[2]), &wide(&dout))
                };
                let want = (loss(1e-5) - loss(-1e-5)) / 2e-5;
                let grad = wide(grad);
                let got = dot(&grad, &u);
                // Errors of elements add up like a random walk.
                let size = dot(&grad, &grad).sqrt() + 1.0;
                assert!(
                    (got - want).abs() <= tolerance * size,
                    "attention backward {} {which} {s:?} {place}: {got}, not {want}",
                    T::NAME
                );
            }
        }
    });
}

#[test]
fn attention_backward_against_differences() {
    everywhere(|place| {
        attention_backward::<f32>(place, 1e-5);
        attention_backward::<bf16>(place, 2e-2);
    });
}

#[test]
fn padded_rows_and_keys_have_zero_gradients() {
    let (q_lens, kv_lens) = ([2], [3]);
    let s = AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        ..AttentionShape::new(1, 4, 5, 1, 1, 2)
    };
    let (q, k, v): (Vec<f32>, Vec<f32>, Vec<f32>) = (noise(8, 1), noise(10, 2), noise(10, 3));
    let (mut out, mut lse) = (vec![1.0; 8], vec![0.0; 4]);
    flash_attention(&s, &q, &k, &v, &mut out, &mut lse);
    assert_eq!(out[4..], [0.0; 4]);
    let (mut dq, mut dk, mut dv) = (vec![1.0; 8], vec![1.0; 10], vec![1.0; 10]);
    flash_attention_backward(&s, &q, &k, &v, &out, &lse, &[1.0; 8], &mut dq, &mut dk, &mut dv);
    assert_eq!(
        (&dq[4..], &dk[6..], &dv[6..]),
        (&[0.0f32; 4][..], &[0.0f32; 4][..], &[0.0f32; 4][..])
    );
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
        rms_norm_backward(&dy, &x, &w, &rstd, &mut dx, &mut dw);
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
        layer_norm_backward(&dy, &x, &w, &mean, &rstd, &mut dx, &mut dw, &mut db);
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

#[test]
fn activations_and_their_gradients() {
    type Pair = (fn(&[f32], &mut [f32]), fn(&[f32], &[f32], &mut [f32]), Activation);
    let all: [Pair; 4] = [
        (silu, silu_backward, Activation::Silu),
        (relu, relu_backward, Activation::Relu),
        (gelu, gelu_backward, Activation::Gelu),
        (gelu_tanh, gelu_tanh_backward, Activation::GeluTanh),
    ];
    everywhere(|place| {
        let x: Vec<f32> = (-4000..=4001).map(|i| i as f32 / 1000.0 + 0.000_3).collect();
        let dy: Vec<f32> = noise(x.len(), 2);
        let h = 1e-5;
        for (forward, backward, kind) in all {
            let name = format!("{kind:?} {place}");
            let (mut y, mut dx) = (x.clone(), x.clone());
            forward(&x, &mut y);
            close(
                &name,
                &y,
                &wide(&x).iter().map(|x| activation(kind, *x)).collect::<Vec<_>>(),
                1e-6,
            );
            backward(&dy, &x, &mut dx);
            let want: Vec<f64> = wide(&x)
                .iter()
                .zip(&dy)
                .map(|(x, dy)| {
                    let difference = activation(kind, x + h) - activation(kind, x - h);
                    f64::from(*dy) * difference / (2.0 * h)
                })
                .collect();
            close(&name, &dx, &want, 2e-6);
        }
        let up: Vec<f32> = noise(x.len(), 3);
        let (mut y, mut dg, mut du) = (x.clone(), x.clone(), x.clone());
        swiglu(&x, &up, &mut y);
        swiglu_backward(&dy, &x, &up, &mut dg, &mut du);
        for i in 0..x.len() {
            let [g, u, d] = [x[i], up[i], dy[i]].map(f64::from);
            let slope = (reference::silu(g + h) - reference::silu(g - h)) / (2.0 * h);
            close(place, &[y[i]], &[reference::silu(g) * u], 1e-6);
            close(place, &[dg[i], du[i]], &[d * u * slope, d * reference::silu(g)], 2e-6);
        }
    });
}

#[test]
fn rope_turns_and_its_gradient_turns_back() {
    everywhere(|place| {
        let (heads, d, positions) = (3, 10, [4, 0, 2, 4]);
        let angles: Vec<f32> = noise(5 * d / 2, 1);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let x: Vec<f32> = noise(4 * heads * d, 2);
        let (mut y, mut back) = (x.clone(), x.clone());
        rope(&x, &positions, &cos, &sin, heads, d, &mut y);
        close(
            place,
            &y,
            &reference::rope(&wide(&x), &positions, &wide(&cos), &wide(&sin), heads, d),
            1e-6,
        );
        rope_backward(&y, &positions, &cos, &sin, heads, d, &mut back);
        close(place, &back, &wide(&x), 1e-6);
    });
}

#[test]
fn embeddings_gather_and_scatter() {
    everywhere(|place| {
        let (dim, ids) = (130, [3, -1, 0, 3, 7, 4]);
        let table: Vec<f32> = noise(5 * dim, 1);
        let mut y: Vec<f32> = noise(ids.len() * dim, 2);
        let dy = y.clone();
        embedding(&ids, &table, dim, &mut y);
        let mut dtable = vec![1.0f32; 5 * dim];
        embedding_backward(&ids, &dy, dim, &mut dtable);
        for c in 0..dim {
            let want = [3, 9, 0, 3, 9, 4].map(|id| if id < 5 { table[id * dim + c] } else { 0.0 });
            for (i, want) in want.iter().enumerate() {
                assert_eq!(y[i * dim + c], *want, "{place}");
            }
            assert_eq!(dtable[3 * dim + c], 1.0 + dy[c] + dy[3 * dim + c], "{place}");
            assert_eq!(dtable[dim + c], 1.0, "{place}");
        }
    });
}

#[test]
fn adamw_steps() {
    everywhere(|place| {
        let rule = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
        let n = 40_003;
        let (mut p, g): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let mut want: Vec<[f64; 3]> = p.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
        let (mut master, mut low) = (p.clone(), vec![bf16::ZERO; n]);
        let (mut m2, mut v2) = (m.clone(), v.clone());
        for t in 1..=3 {
            rule.step_grad_scale(t, &mut p, &g, &mut m, &mut v, 0.5);
            rule.step_masters(t, 0.5, &mut master, &mut low, &g, &mut m2, &mut v2);
            for (w, g) in want.iter_mut().zip(&g) {
                *w = reference::adamw(&rule, t, w[0], 0.5 * f64::from(*g), w[1], w[2]);
            }
        }
        close(place, &p, &want.iter().map(|w| w[0]).collect::<Vec<_>>(), 1e-6);
        close(place, &m, &want.iter().map(|w| w[1]).collect::<Vec<_>>(), 1e-6);
        close(place, &v, &want.iter().map(|w| w[2]).collect::<Vec<_>>(), 1e-6);
        assert_eq!((&p, &m, &v), (&master, &m2, &v2), "{place}");
        assert!(low.iter().zip(&master).all(|(l, m)| *l == bf16::from_f32(*m)), "{place}");
    });
}

#[test]
fn lion_lamb_and_lars_step() {
    let lion = Lion { lr: 0.01, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    let lamb = Lamb { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
    let lars = Lars { lr: 0.1, momentum: 0.9, trust: 0.01, eps: 1e-8, weight_decay: 0.1 };
    everywhere(|place| {
        for n in [1, 17, 20_003] {
            let (start, g): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
            let halves: Vec<f64> = g.iter().map(|g| 0.5 * f64::from(*g)).collect();
            let same = |what: &str, got: [&[f32]; 2], want: [Vec<f64>; 2]| {
                for (got, want) in got.into_iter().zip(want) {
                    close(&format!("{what} {n} {place}"), got, &want, 2e-6);
                }
            };
            let (mut p, mut m) = (start.clone(), vec![0.0; n]);
            let mut want: Vec<[f64; 2]> = start.iter().map(|p| [f64::from(*p), 0.0]).collect();
            for _ in 0..3 {
                lion.step(&mut p, &g, &mut m, 0.5);
                for (w, g) in want.iter_mut().zip(&halves) {
                    *w = reference::lion(&lion, w[0], *g, w[1]);
                }
            }
            same("lion", [&p, &m], [0, 1].map(|i| want.iter().map(|w| w[i]).collect()));

            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
            let mut want: Vec<[f64; 3]> = start.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
            for t in 1..=3 {
                lamb.step(t, &mut p, &g, &mut m, &mut v, 0.5);
                reference::lamb(&lamb, t, &mut want, &halves);
            }
            same("lamb", [&p, &v], [0, 2].map(|i| want.iter().map(|w| w[i]).collect()));

            let (mut p, mut m) = (start.clone(), vec![0.0; n]);
            let mut want: Vec<[f64; 2]> = start.iter().map(|p| [f64::from(*p), 0.0]).collect();
            for _ in 0..3 {
                lars.step(&mut p, &g, &mut m, 0.5);
                reference::lars(&lars, &mut want, &halves);
            }
            same("lars", [&p, &m], [0, 1].map(|i| want.iter().map(|w| w[i]).collect()));
        }
    });
}

#[test]
fn elementwise_reductions_and_casts() {
    everywhere(|place| {
        for n in [0, 1, 15, 33, 20_011] {
            let (a, b): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
            let check = |got: &[f32], f: &dyn Fn(f64, f64) -> f64| {
                let want: Vec<f64> =
                    a.iter().zip(&b).map(|(a, b)| f(f64::from(*a), f64::from(*b))).collect();
                close(place, got, &want, 2e-7);
            };
            let mut y = vec![0.0; n];
            add(&a, &b, &mut y);
            check(&y, &|a, b| a + b);
            sub(&a, &b, &mut y);
            check(&y, &|a, b| a - b);
            mul(&a, &b, &mut y);
            check(&y, &|a, b| a * b);
            scale(&a, 3.0, &mut y);
            check(&y, &|a, _| 3.0 * a);
            y.copy_from_slice(&b);
            add_assign(&a, &mut y);
            check(&y, &|a, b| a + b);
            y.copy_from_slice(&b);
            axpy(-2.0, &a, &mut y);
            check(&y, &|a, b| b - 2.0 * a);
            let total: f64 = wide(&a).iter().sum();
            close(place, &[sum(&a)], &[total], 1e-4);
            let squares = dot(&wide(&a), &wide(&a));
            assert!(
                (sum_of_squares_many(&[&a, &b[..0]]) - squares).abs() <= 1e-6 * (1.0 + squares)
            );
            let mut scaled = a.clone();
            scale_many(&mut [&mut scaled], 0.5);
            check(&scaled, &|a, _| 0.5 * a);
            let mut low = vec![bf16::ZERO; n];
            cast(&a, &mut low);
            assert!(low.iter().zip(&a).all(|(l, a)| *l == bf16::from_f32(*a)), "{place}");
            let mut half = vec![f16::ZERO; n];
            cast(&a, &mut half);
            assert!(half.iter().zip(&a).all(|(l, a)| *l == f16::from_f32(*a)), "{place}");
        }
        let x: Vec<f32> = noise(7 * 300, 3);
        let (mut down, mut along, mut y) = (vec![1.0; 300], vec![0.0; 7], x.clone());
        sum_rows(&x, 300, &mut down);
        sum_last(&x, 300, &mut along);
        add_bias(&x, &down, &mut y);
        for c in 0..300 {
            let want: f64 = 1.0 + (0..7).map(|r| f64::from(x[r * 300 + c])).sum::<f64>();
            close(place, &[down[c]], &[want], 1e-6);
            assert_eq!(y[300 + c], x[300 + c] + down[c], "{place}");
        }
        for r in 0..7 {
            close(place, &[along[r]], &[wide(&x[r * 300..(r + 1) * 300]).iter().sum()], 1e-5);
        }
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(max(&x), largest, "{place}");
    });
}
