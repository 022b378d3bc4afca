//! The errors in `docs/accuracy.md`: measured here against f64, on every path of this machine.
//!
//! `cargo test -p colossal-kernels --test it accuracy -- --nocapture` prints the table.

use std::collections::BTreeMap;
use std::sync::Mutex;

use colossal_kernels::*;
use half::{bf16, f16};

use crate::check::{activation, everywhere, noise, wide};

/// The largest and the mean distance from f64, over the root mean square of the exact result.
#[derive(Debug, Clone, Copy, Default)]
struct Errors {
    max: f64,
    mean: f64,
}

/// Rows in order of the table: kernel, type.
type Table = BTreeMap<(usize, usize), (&'static str, &'static str, Errors)>;

struct Measure<'a> {
    table: &'a mut Table,
    at: usize,
    column: usize,
}

impl Measure<'_> {
    fn row<T: Float>(&mut self, name: &'static str, got: &[T], want: &[f64]) {
        self.row_of(name, T::NAME, got, want);
    }

    /// A result that is not of the type of its operands, under theirs.
    fn row_of<R: Float>(
        &mut self,
        name: &'static str,
        dtype: &'static str,
        got: &[R],
        want: &[f64],
    ) {
        let size = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
        let off = got.iter().zip(want).map(|(g, w)| (f64::from(g.to_f32()) - w).abs() / size);
        let errors = off.fold(Errors::default(), |e, x| Errors {
            max: e.max.max(x),
            mean: e.mean + x / want.len() as f64,
        });
        let row = self.table.entry((self.at, self.column)).or_insert((name, dtype, errors));
        row.2 = Errors { max: row.2.max.max(errors.max), mean: row.2.mean.max(errors.mean) };
        self.at += 1;
    }
}

/// Inputs are taken as the type holds them: what is measured is the kernel and its result.
fn measure<T: Float>(table: &mut Table, column: usize) {
    let mut t = Measure { table, at: 0, column };
    let (m, n, k) = (48, 64, 768);
    let (a, b): (Vec<T>, Vec<T>) = (noise(m * k, 1), noise(n * k, 2));
    let (wa, wb) = (wide(&a), wide(&b));
    let transposed: Vec<f64> = (0..k * n).map(|i| wb[i % n * k + i / n]).collect();
    let product = reference::gemm(m, n, k, &wa, &transposed);
    let mut c = vec![T::zeroed(); m * n];
    let (x, w) = (Mat::new(&a, m, k), Mat::new(&b, n, k).t());
    gemm(x, w, MatMut::new(&mut c, m, n), &Epilogue::default());
    t.row("product of depth 768", &c, &product);
    gemm_int8(&a, m, &Int8Matrix::quantize(&b, n, k), None, &mut c);
    t.row("the same with int8 weights", &c, &product);
    for (name, scaling) in [
        ("the same in fp8 (e4m3), a scale a matrix", [Fp8Scaling::Tensor; 2]),
        ("the same in fp8 (e4m3), 1 x 128 and 128 x 128", [Fp8Scaling::Rows, Fp8Scaling::Blocks]),
    ] {
        let rounded = [(&a, m), (&b, n)].into_iter().zip(scaling).map(|((x, rows), scaling)| {
            let mut q = vec![0; rows * fp8_pitch(k)];
            let mut scales = vec![0.0; scaling.count(rows, k)];
            quantize_fp8(x, rows, k, false, Fp8::E4m3, scaling, &mut q, &mut scales);
            (q, scales, rows, scaling)
        });
        let rounded: Vec<_> = rounded.collect();
        let [x, w] = [0, 1].map(|i| {
            let (data, scales, rows, scaling) = &rounded[i];
            let (rows, scaling, format) = (*rows, *scaling, Fp8::E4m3);
            Fp8Mat { data, scales, rows, cols: k, format, scaling }
        });
        gemm_fp8(x, w, None, false, &mut c);
        t.row(name, &c, &product);
    }

    let s = AttentionShape::new(1, 96, 96, 2, 1, 64);
    let (nq, nk) = (96 * 2 * 64, 96 * 64);
    let (q, k, v, dout): (Vec<T>, Vec<T>, Vec<T>, Vec<T>) =
        (noise(nq, 3), noise(nk, 4), noise(nk, 5), noise(nq, 6));
    let (mut out, mut lse) = (vec![T::zeroed(); nq], vec![0.0; 2 * 96]);
    flash_attention(&s, &q, &k, &v, &mut out, &mut lse);
    let [wq, wk, wv, wdout] = [wide(&q), wide(&k), wide(&v), wide(&dout)];
    t.row("attention", &out, &reference::attention(&s, &wq, &wk, &wv));
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    flash_attention_backward(&s, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv);
    let want = attention_gradients(&s, &wq, &wk, &wv, &wdout);
    t.row("attention, gradient of q", &dq, &want[0]);
    t.row("attention, gradient of k", &dk, &want[1]);
    t.row("attention, gradient of v", &dv, &want[2]);

    let (rows, dim) = (32, 384);
    let (x, weight, bias): (Vec<T>, Vec<T>, Vec<T>) =
        (noise(rows * dim, 7), noise(dim, 8), noise(dim, 9));
    let [wx, ww, wb] = [wide(&x), wide(&weight), wide(&bias)];
    let (mut y, mut mean, mut rstd) = (x.clone(), vec![0.0; rows], vec![0.0; rows]);
    rms_norm(&x, &weight, 1e-5, &mut y, &mut rstd);
    t.row("RMS norm", &y, &reference::rms_norm(&wx, &ww, f64::from(1e-5f32)));
    layer_norm(&x, &weight, &bias, 1e-5, &mut y, &mut mean, &mut rstd);
    t.row("layer norm", &y, &reference::layer_norm(&wx, &ww, &wb, f64::from(1e-5f32)));
    softmax(&x, dim, &mut y);
    t.row("softmax", &y, &reference::softmax(&wx, dim));
    let targets: Vec<i32> = (0..rows).map(|r| (r * 11 % dim) as i32).collect();
    let mut loss = vec![0.0f32; rows];
    let mut lse = vec![0.0; rows];
    cross_entropy(&x, &targets, dim, -100, &mut loss, &mut lse);
    let want = reference::cross_entropy(&wx, &targets, dim, -100);
    t.row_of("cross-entropy, in f32", T::NAME, &loss, &want);

    let x: Vec<T> =
        noise::<T>(rows * dim, 10).iter().map(|x| T::from_f32(4.0 * x.to_f32())).collect();
    let wx = wide(&x);
    let exact = |kind| wx.iter().map(|x| activation(kind, *x)).collect::<Vec<_>>();
    gelu(&x, &mut y);
    t.row("GELU", &y, &exact(Activation::Gelu));
    gelu_tanh(&x, &mut y);
    t.row("GELU by tanh", &y, &exact(Activation::GeluTanh));
    silu(&x, &mut y);
    t.row("SiLU", &y, &exact(Activation::Silu));
}

/// `[dq, dk, dv]` of causal attention, by its definition.
fn attention_gradients(
    s: &AttentionShape<'_>,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
) -> [Vec<f64>; 3] {
    let (len, heads, d) = (s.q_len, s.heads, s.head_dim);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scale = 1.0 / (d as f64).sqrt();
    for h in 0..heads {
        for i in 0..len {
            let at = (i * heads + h) * d..(i * heads + h + 1) * d;
            // One key head serves all query heads.
            let key = |j: usize| j * d..(j + 1) * d;
            let mut p: Vec<f64> =
                (0..=i).map(|j| (scale * dot(&q[at.clone()], &k[key(j)])).exp()).collect();
            let sum: f64 = p.iter().sum();
            p.iter_mut().for_each(|p| *p /= sum);
            let dp: Vec<f64> = (0..=i).map(|j| dot(&dout[at.clone()], &v[key(j)])).collect();
            let mean = dot(&p, &dp);
            for j in 0..=i {
                let ds = scale * p[j] * (dp[j] - mean);
                for c in 0..d {
                    dv[j * d + c] += p[j] * dout[at.start + c];
                    dq[at.start + c] += ds * k[j * d + c];
                    dk[j * d + c] += ds * q[at.start + c];
                }
            }
        }
    }
    [dq, dk, dv]
}

#[test]
fn accuracy_is_what_the_docs_say() {
    let table = Mutex::new(Table::new());
    let best = Mutex::new(Isa::Portable);
    everywhere(|_| {
        let mut table = table.lock().unwrap();
        measure::<f32>(&mut table, 0);
        measure::<bf16>(&mut table, 1);
        measure::<f16>(&mut table, 2);
        let mut best = best.lock().unwrap();
        *best = isa().max(*best);
    });
    let table = table.into_inner().unwrap();
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/accuracy.md");
    let docs = std::fs::read_to_string(docs).unwrap_or_default();
    let mut wrong = vec![];
    for (name, dtype, errors) in table.values() {
        let row = format!("| {name} | {dtype} | {:.1e} | {:.1e} |", errors.max, errors.mean);
        println!("{row}");
        let start = format!("| {name} | {dtype} | ");
        let written = docs.lines().find_map(|l| l.strip_prefix(&start));
        let numbers: Vec<f64> = written
            .into_iter()
            .flat_map(|l| l.split('|'))
            .filter_map(|x| x.trim().parse().ok())
            .collect();
        let [max, mean] = numbers[..] else {
            wrong.push(format!("is missing: {row}"));
            continue;
        };
        // Never worse than written, on any machine; where all paths ran, not much better either.
        let worse = errors.max > 1.1 * max || errors.mean > 1.1 * mean;
        let all = *best.lock().unwrap() == Isa::Avx512Bf16;
        if worse || (all && (errors.max < 0.5 * max || errors.mean < 0.5 * mean)) {
            wrong.push(format!("says {max:.1e} and {mean:.1e}: {row}"));
        }
    }
    assert!(wrong.is_empty(), "docs/accuracy.md\n{}", wrong.join("\n"));
}
