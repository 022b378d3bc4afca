//! Context parallelism: attention over cut sequences equals attention over whole ones.

use colossal_comm::{Mesh, Verb, on_ranks};
use colossal_tensor::storage::{memory_stats, reset_peak};
use colossal_tensor::*;

use crate::noise;

const HEAD_DIM: usize = 4;

/// A case: sequences, tokens, query heads, key heads.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    seq: usize,
    heads: usize,
    kv_heads: usize,
    causal: bool,
    lengths: bool,
}

const CASE: Case = Case { batch: 2, seq: 48, heads: 4, kv_heads: 2, causal: true, lengths: false };

fn ring() -> Role {
    context(Context::Ring { zigzag: true })
}

fn ulysses() -> Role {
    context(Context::Ulysses)
}

/// The role, with a name for parameters that stand in for activations.
fn context(kind: Context) -> Role {
    Role { cut: Cut::Named(vec![Dim::Mlp(0)]), ..Role::context(kind) }
}

/// Output and gradients of q, k, v for this rank's tokens.
fn attend(scope: &Scope, case: Case, dtype: Dtype) -> [Vec<f32>; 4] {
    let Case { batch, seq, heads, kv_heads, .. } = case;
    let own = scope.tokens(seq).unwrap();
    let p = Params::new(scope, 0, Dtype::F32);
    let make = |name: &str, heads: usize, seed: u64| {
        let row = heads * HEAD_DIM;
        let values = cut(&noise(batch * seq * row, seed), seq, row, &own);
        // A parameter holds this rank's tokens, so that their gradient can be read.
        let dims = [Dim::Other(batch), Dim::Mlp(seq), Dim::Other(row)];
        let param = p.at(name).tensor("x", &dims, Init::Constant(0.0)).unwrap();
        param.set(&values).unwrap();
        let x = param.tensor().to_dtype(dtype).unwrap();
        (param, x.reshape(&[batch, own.len(), heads, HEAD_DIM]).unwrap())
    };
    let ((pq, q), (pk, k), (pv, v)) =
        (make("q", heads, 1), make("k", kv_heads, 2), make("v", kv_heads, 3));
    let lengths = case.lengths.then(|| vec![seq as i32 - 11, seq as i32].into());
    let mask = AttentionMask { causal: case.causal, window: None, lengths };
    let out = q.attention(&k, &v, &mask).unwrap();
    let row = heads * HEAD_DIM;
    let mut weights = noise(batch * seq * row, 4);
    if case.lengths {
        // What is padding has no loss.
        weights[(seq - 11) * row..seq * row].fill(0.0);
    }
    let grads = out.weighted_sum(&cut(&weights, seq, row, &own)).unwrap().backward().unwrap();
    let grad = |p: &Param| grads.get(p).unwrap().to_vec();
    [out.to_vec().unwrap(), grad(&pq), grad(&pk), grad(&pv)]
}

/// The rows of these tokens out of `[batch, seq, row]`.
fn cut<T: Copy>(values: &[T], seq: usize, row: usize, tokens: &[usize]) -> Vec<T> {
    let sequences = values.chunks(seq * row);
    sequences.flat_map(|s| tokens.iter().flat_map(|t| s[t * row..][..row].to_vec())).collect()
}

fn agrees(axes: &[(&'static str, usize)], roles: &[Role], case: Case, dtype: Dtype) {
    let tolerance = if dtype == Dtype::F32 { 2e-5 } else { 3e-2 };
    let serial = attend(&Scope::solo(), case, dtype);
    let n = axes.iter().map(|(_, n)| n).product();
    on_ranks(n, |world| {
        let mesh = Mesh::new(&world, axes).unwrap();
        let scope = Scope::new(mesh, Sharding::new(roles.to_vec()));
        let own = scope.tokens(case.seq).unwrap();
        let parallel = attend(&scope, case, dtype);
        for (i, (ours, whole)) in parallel.iter().zip(&serial).enumerate() {
            let row = if i < 2 { case.heads } else { case.kv_heads } * HEAD_DIM;
            let wanted = cut(whole, case.seq, row, &own);
            let largest = whole.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let off = ours.iter().zip(&wanted).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(
                ours.len() == wanted.len() && off <= tolerance * largest,
                "{axes:?} {case:?} {dtype}, {}: {off}",
                ["out", "dq", "dk", "dv"][i]
            );
        }
    });
}

#[test]
fn ring_and_ulysses_equal_one_device_causal_and_full_with_padding_and_grouped_heads() {
    for causal in [true, false] {
        for lengths in [false, true] {
            for (heads, kv_heads) in [(4, 4), (4, 2), (8, 1)] {
                let case = Case { heads, kv_heads, causal, lengths, ..CASE };
                agrees(&[("ring", 4)], &[ring()], case, Dtype::F32);
                agrees(&[("ulysses", 4)], &[ulysses()], case, Dtype::F32);
                agrees(&[("ring", 2), ("ulysses", 2)], &[ring(), ulysses()], case, Dtype::F32);
                // Without zigzag: contiguous slices.
                let plain = context(Context::Ring { zigzag: false });
                agrees(&[("ring", 3)], &[plain], case, Dtype::F32);
            }
        }
    }
    agrees(&[("ring", 4)], &[ring()], CASE, Dtype::Bf16);
    agrees(&[("ulysses", 4)], &[ulysses()], CASE, Dtype::Bf16);
}

/// Attention and its gradients in f64, by their definitions: out, dq, dk, dv.
fn attention_f64(case: Case, q: &[f32], k: &[f32], v: &[f32], dout: &[f32]) -> [Vec<f64>; 4] {
    let Case { batch, seq, heads, kv_heads, causal, .. } = case;
    let (scale, group) = (1.0 / (HEAD_DIM as f64).sqrt(), heads / kv_heads);
    let at = |b: usize, t: usize, h: usize, of: usize| ((b * seq + t) * of + h) * HEAD_DIM;
    let row = |x: &[f32], i: usize| -> Vec<f64> {
        x[i..i + HEAD_DIM].iter().map(|x| f64::from(*x)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut all = [q.len(), q.len(), k.len(), v.len()].map(|n| vec![0.0; n]);
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        for t in 0..seq {
            let i = at(b, t, h, heads);
            let (q, dout) = (row(q, i), row(dout, i));
            let keys = if causal { t + 1 } else { seq };
            let j = |s: usize| at(b, s, h / group, kv_heads);
            let scores: Vec<f64> =
                (0..keys).map(|s| (scale * dot(&q, &row(k, j(s)))).exp()).collect();
            let sum: f64 = scores.iter().sum();
            let dp: Vec<f64> = (0..keys).map(|s| dot(&dout, &row(v, j(s)))).collect();
            let mean: f64 = scores.iter().zip(&dp).map(|(p, d)| p / sum * d).sum();
            for s in 0..keys {
                let (p, ds) = (scores[s] / sum, scores[s] / sum * (dp[s] - mean) * scale);
                let (key, value) = (row(k, j(s)), row(v, j(s)));
                for d in 0..HEAD_DIM {
                    all[0][i + d] += p * value[d];
                    all[1][i + d] += ds * key[d];
                    all[2][j(s) + d] += ds * q[d];
                    all[3][j(s) + d] += p * dout[d];
                }
            }
        }
    }
    all
}

fn near(what: &str, ours: &[f32], theirs: &[f64]) {
    let largest = theirs.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let off = ours.iter().zip(theirs).fold(0.0f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
    assert!(ours.len() == theirs.len() && off <= 3e-6 * largest, "{what}: {off} of {largest}");
}

/// ColossalAI's `ring` mode has the right output and wrong gradients at every size (W01): here
/// ring attention and Ulysses against f64, causal and full.
#[test]
fn w01_attention_gradients_equal_f64_at_two_to_eight_ranks() {
    for ranks in 2..=8 {
        for causal in [true, false] {
            let seq = 4 * ranks;
            let case =
                Case { batch: 2, seq, heads: 2 * ranks, kv_heads: ranks, causal, lengths: false };
            let values = |heads: usize, seed| noise(2 * seq * heads * HEAD_DIM, seed);
            let (q, k, v) = (values(2 * ranks, 1), values(ranks, 2), values(ranks, 3));
            let whole = attention_f64(case, &q, &k, &v, &values(2 * ranks, 4));
            for (axis, role) in [("ring", ring()), ("ulysses", ulysses())] {
                on_ranks(ranks, |world| {
                    let mesh = Mesh::new(&world, &[(axis, ranks)]).unwrap();
                    let scope = Scope::new(mesh, Sharding::new(vec![role.clone()]));
                    let own = scope.tokens(seq).unwrap();
                    for (i, ours) in attend(&scope, case, Dtype::F32).iter().enumerate() {
                        let row = HEAD_DIM * if i < 2 { 2 * ranks } else { ranks };
                        let what = ["out", "dq", "dk", "dv"][i];
                        let what = format!("{axis} on {ranks}, causal {causal}: {what}");
                        near(&what, ours, &cut(&whole[i], seq, row, &own));
                    }
                });
            }
        }
    }
}

/// The products of `split_gather` and `ring`, up and down, against f64 (W01).
#[test]
fn w01_product_gradients_equal_f64_at_two_to_eight_ranks() {
    let (batch, embed) = (2, 5);
    for ranks in 2..=8 {
        let (seq, mlp) = (2 * ranks, 3 * ranks);
        let tokens = batch * seq;
        let (x, up, down) =
            (noise(tokens * embed, 1), noise(mlp * embed, 2), noise(embed * mlp, 3));
        let dy = noise(tokens * embed, 4);
        // a [m, k] times b [k, n], either of them transposed in memory.
        let product = |[m, k, n]: [usize; 3],
                       a: &dyn Fn(usize, usize) -> f64,
                       b: &dyn Fn(usize, usize) -> f64| {
            let mut c = vec![0.0f64; m * n];
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                c[i * n + j] = (0..k).map(|l| a(i, l) * b(l, j)).sum();
            }
            c
        };
        let at = |of: &[f32], width: usize, i: usize, j: usize| f64::from(of[i * width + j]);
        let h = product([tokens, embed, mlp], &|t, e| at(&x, embed, t, e), &|e, m| {
            at(&up, embed, m, e)
        });
        let dh = product([tokens, embed, mlp], &|t, e| at(&dy, embed, t, e), &|e, m| {
            at(&down, mlp, e, m)
        });
        let dx =
            product([tokens, mlp, embed], &|t, m| dh[t * mlp + m], &|m, e| at(&up, embed, m, e));
        let dup =
            product([mlp, tokens, embed], &|m, t| dh[t * mlp + m], &|t, e| at(&x, embed, t, e));
        let ddown =
            product([embed, tokens, mlp], &|e, t| at(&dy, embed, t, e), &|t, m| h[t * mlp + m]);
        for (mode, role) in
            [("split_gather", Role::tensor(true)), ("ring", Role::tensor_overlapped())]
        {
            on_ranks(ranks, |world| {
                let mesh = Mesh::new(&world, &[("tp", ranks)]).unwrap();
                let scope = Scope::new(mesh, Sharding::new(vec![role.clone()]));
                let p = Params::new(&scope, 0, Dtype::F32);
                let make = |name: &str, dims: &[Dim], whole: &[f32]| {
                    let param = p.tensor(name, dims, Init::Constant(0.0)).unwrap();
                    param.set(&param.shard_of(whole)).unwrap();
                    param
                };
                let input = make("x", &[Dim::Other(batch), Dim::Mlp(seq), Dim::Other(embed)], &x);
                let w1 = make("up", &[Dim::Mlp(mlp), Dim::Embed(embed)], &up);
                let w2 = make("down", &[Dim::Embed(embed), Dim::Mlp(mlp)], &down);
                let y = input.tensor().redistribute(Region::TensorParallel).unwrap();
                let y = y.linear(&w1.tensor(), None).unwrap().linear(&w2.tensor(), None).unwrap();
                let y = y.redistribute(Region::Residual).unwrap();
                let grads = y.weighted_sum(&input.shard_of(&dy)).unwrap().backward().unwrap();
                for (param, whole) in [(&input, &dx), (&w1, &dup), (&w2, &ddown)] {
                    let what = format!("{mode} on {ranks}: {}", param.name());
                    let mut part = vec![];
                    param.for_each_run(|at, n| part.extend_from_slice(&whole[at..at + n]));
                    near(&what, grads.get(param).unwrap(), &part);
                }
            });
        }
    }
}

/// ColossalAI builds wrong groups for its double ring unless inner² = ranks (W02).
#[test]
fn w02_double_rings_of_every_divisor_up_to_sixteen_ranks() {
    for ranks in 2..=16 {
        for inner in (1..=ranks).filter(|inner| ranks % inner == 0) {
            let case = Case { batch: 1, seq: 2 * ranks, heads: 2, kv_heads: 1, ..CASE };
            let axes = [("ring", ranks / inner), ("ring_inner", inner)];
            agrees(&axes, &[ring(), ring()], case, Dtype::F32);
        }
    }
}

#[test]
fn bytes_of_ring_and_ulysses_equal_the_formulas() {
    let (p, n) = (4, CASE.batch * CASE.seq * HEAD_DIM * size_of::<f32>());
    on_ranks(p, |world| {
        let mesh = Mesh::new(&world, &[("ring", p)]).unwrap();
        let group = mesh.group("ring").unwrap().clone();
        attend(&Scope::new(mesh, Sharding::new(vec![ring()])), CASE, Dtype::F32);
        // Keys and values of a rank: p - 1 times forward; backward as often again, and their
        // gradients p times.
        let kv = 2 * n * CASE.kv_heads / p;
        let wanted = kv * (p - 1) + kv * (p - 1) + kv * p;
        assert_eq!(group.counters().bytes(), wanted as u64);

        let mesh = Mesh::new(&world, &[("ulysses", p)]).unwrap();
        let group = mesh.group("ulysses").unwrap().clone();
        attend(&Scope::new(mesh, Sharding::new(vec![ulysses()])), CASE, Dtype::F32);
        // q and out, and k and v: two key heads go to four ranks. As much again backward.
        let each = n * (CASE.heads + CASE.heads + 2 * p) / p;
        assert_eq!(group.counters().bytes_of(Verb::AllToAll), (2 * each * (p - 1) / p) as u64);
    });
}

#[test]
fn a_ring_holds_a_part_of_the_sequence_only() {
    let case = Case { batch: 1, seq: 4096, heads: 2, kv_heads: 2, ..CASE };
    let peak = |scope: &Scope| {
        let own = scope.tokens(case.seq).unwrap().len();
        let layout = scope.sharding().batch();
        let x = noise(own * case.heads * HEAD_DIM, 1);
        let x = Tensor::from_slice(scope, &x, &[1, own, case.heads, HEAD_DIM], layout).unwrap();
        reset_peak();
        let before = memory_stats().in_use;
        let out = no_grad(|| x.attention(&x, &x, &AttentionMask::causal())).unwrap();
        drop(out);
        memory_stats().peak - before
    };
    let ranks = on_ranks(4, |world| {
        let mesh = Mesh::new(&world, &[("ring", 4)]).unwrap();
        peak(&Scope::new(mesh, Sharding::new(vec![ring()])))
    });
    // A rank's q, out and sums of them, and twice its keys and values: parts of the sequence.
    let part = case.seq / 4 * case.heads * HEAD_DIM * size_of::<f32>();
    assert!(ranks.iter().all(|r| *r < 9 * part), "{ranks:?} against parts of {part}");
}

#[test]
fn what_context_parallelism_cannot_do_is_said() {
    on_ranks(2, |world| {
        let mesh = Mesh::new(&world, &[("ulysses", 2)]).unwrap();
        let scope = Scope::new(mesh, Sharding::new(vec![ulysses()]));
        let x = |heads: usize| {
            let values = vec![0.0f32; 4 * heads * 2];
            Tensor::from_slice(&scope, &values, &[1, 4, heads, 2], scope.sharding().batch())
                .unwrap()
        };
        let text = x(3).attention(&x(3), &x(3), &AttentionMask::causal()).unwrap_err().to_string();
        assert!(text.contains("3 query heads") && text.contains("axis ulysses"), "{text}");
        let mesh = Mesh::new(&world, &[("ring", 2)]).unwrap();
        let scope = Scope::new(mesh, Sharding::new(vec![ring()]));
        let text = scope.tokens(10).unwrap_err().to_string();
        assert!(text.contains("does not divide by the 4 ranks"), "{text}");
        let x = Tensor::from_slice(&scope, &[0.0f32; 16], &[1, 4, 2, 2], scope.sharding().batch())
            .unwrap();
        let mask = AttentionMask { window: Some(3), ..AttentionMask::causal() };
        let text = x.attention(&x, &x, &mask).unwrap_err().to_string();
        assert!(text.contains("window") && text.contains("all_to_all"), "{text}");
        // Cut twice, only the outer cut taken back: refused instead of put together out of order.
        let roles = vec![ring(), Role::tensor(true)];
        let scope = Scope::fake(&[("ring", 2), ("tp", 2)], Sharding::new(roles));
        let layout = scope.sharding().region(Region::Residual);
        let x = Tensor::from_slice(&scope, &[0.0f32; 8], &[1, 4, 2], layout).unwrap();
        let text = x.distribute("ring", Placement::Replicate).unwrap_err().to_string();
        assert!(text.contains("further inside"), "{text}");
        assert!(x.redistribute(Region::TensorParallel).is_ok());
    });
}
