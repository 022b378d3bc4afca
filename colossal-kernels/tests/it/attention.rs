//! Attention against the whole matrix, its gradient against differences.

use colossal_kernels::*;
use half::bf16;

use crate::check::{at_its_best, close, dot, everywhere, noise, rounding, wide};

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
    f(&AttentionShape { bias: Some(bias), scale: -0.4, ..plain(1, 30, 50, 2, 2, 16) });
    f(&AttentionShape { scale: 0.0, ..plain(1, 70, 90, 2, 1, 16) });
    // Several blocks of queries and of keys.
    f(&AttentionShape { causal: false, ..plain(1, 71, 300, 1, 1, 5) });
    f(&AttentionShape { window: Some(100), ..plain(1, 300, 300, 1, 1, 4) });
    let data: Vec<f32> = noise(135 * 530, 4);
    let bias = AttentionBias { data: &data, batch_stride: 0, head_stride: 0 };
    f(&AttentionShape { bias: Some(bias), ..plain(1, 135, 530, 2, 1, 4) });
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

/// Long sequences of few heads are cut into chunks of queries: what one thread computes whole.
fn chunks<T: Float + PartialEq>() {
    let (q_lens, kv_lens) = ([1200, 3, 700], [1100, 3, 900]);
    let ragged = AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        ..AttentionShape::new(3, 1300, 1300, 1, 1, 8)
    };
    let grouped = AttentionShape::new(1, 1100, 1500, 2, 1, 8);
    let shapes = [
        ragged,
        AttentionShape { causal: false, ..ragged },
        grouped,
        AttentionShape { window: Some(150), ..grouped },
        AttentionShape::new(1, 1700, 900, 1, 1, 5),
    ];
    for s in shapes {
        let (nq, nk) = (s.q_len * s.heads * s.head_dim, s.kv_len * s.kv_heads * s.head_dim);
        let (nq, nk) = (s.batch * nq, s.batch * nk);
        let x: [Vec<T>; 3] = [noise(nq, 1), noise(nk, 2), noise(nk, 3)];
        let dout: Vec<T> = noise(nq, 4);
        let on = |n: usize| {
            threads::set(Threads::new(n));
            let (mut out, mut lse) = (noise(nq, 5), noise(s.batch * s.heads * s.q_len, 6));
            flash_attention(&s, &x[0], &x[1], &x[2], &mut out, &mut lse);
            let mut grads: [Vec<T>; 3] = [noise(nq, 7), noise(nk, 8), noise(nk, 9)];
            let [dq, dk, dv] = &mut grads;
            flash_attention_backward(&s, &x[0], &x[1], &x[2], &out, &lse, &dout, dq, dk, dv);
            (out, lse, grads)
        };
        let (out, lse, [dq, dk, dv]) = on(1);
        for n in [2, 4, 5] {
            let (out_n, lse_n, [dq_n, dk_n, dv_n]) = on(n);
            assert!(out == out_n && lse == lse_n && dq == dq_n, "{n} threads, {s:?}");
            let (name, tolerance) =
                (format!("chunks on {n} threads {s:?}"), 1e-5 + rounding::<T>());
            close(&name, &dk_n, &wide(&dk), tolerance);
            close(&name, &dv_n, &wide(&dv), tolerance);
        }
    }
}

#[test]
fn chunks_of_queries_equal_the_whole() {
    at_its_best(|| {
        chunks::<f32>();
        chunks::<bf16>();
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

#[test]
fn heads_of_size_zero_have_empty_results() {
    everywhere(|_| {
        for len in [1, 40] {
            let s = AttentionShape { scale: 1.0, ..AttentionShape::new(2, len, len, 2, 1, 0) };
            let (none, mut lse) = (&[0.0f32; 0], vec![9.0; 2 * 2 * len]);
            let [mut out, mut dq, mut dk, mut dv] = [[0.0f32; 0]; 4];
            flash_attention(&s, none, none, none, &mut out, &mut lse);
            // All scores are zero: what is left is the number of keys that a query sees.
            assert!(
                lse.iter()
                    .enumerate()
                    .all(|(i, x)| (x - (1.0 + (i % len) as f32).ln()).abs() < 1e-6)
            );
            flash_attention_backward(
                &s, none, none, none, &out, &lse, none, &mut dq, &mut dk, &mut dv,
            );
        }
    });
}
