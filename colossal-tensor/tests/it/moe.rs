//! Mixtures of experts: routers, losses, capacity, balancing, dispatch.

use std::sync::Arc;

use colossal_comm::{Mesh, Verb, on_ranks};
use colossal_tensor::moe::{Journey, Routing, Score};
use colossal_tensor::nn::Moe;
use colossal_tensor::*;

use crate::{gradients, noise};

#[test]
fn routing_dispatch_experts_and_combine_by_finite_differences() {
    let sigmoid = Routing { score: Score::Sigmoid, scale: 2.5, ..Routing::top_k(4, 2) };
    let plain = Routing { normalize: false, ..Routing::top_k(4, 1) };
    for routing in [Routing::top_k(4, 2), sigmoid, plain] {
        gradients("route", &[&[5, 4]], &|x| Ok(x[0].scale(3.0)?.route(&routing, None, 0.0)?.0));
        gradients("experts", &[&[1, 5, 3], &[4, 3], &[4, 6, 3], &[4, 3, 6]], &|x| {
            let (weights, choice) = x[0].linear(&x[1], None)?.route(&routing, None, 0.0)?;
            let journey = Journey::new(&choice, &routing, &x[2])?;
            let rows = x[0].dispatch(&journey)?.grouped_linear(&x[2], &journey)?.silu()?;
            rows.grouped_linear(&x[3], &journey)?.combine_rows(&weights, &journey)
        });
    }
}

/// `E Σ f_e P_e` and `mean logsumexp²`, by their definitions.
fn auxiliary(logits: &[f32], experts: usize, k: usize) -> (f64, f64) {
    let tokens = logits.len() / experts;
    let (mut share, mut mean, mut z) = (vec![0.0; experts], vec![0.0; experts], 0.0);
    for row in logits.chunks(experts) {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        z += sum.ln().powi(2) / tokens as f64;
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        order[..k].iter().for_each(|e| share[*e] += 1.0 / tokens as f64);
        for (m, x) in mean.iter_mut().zip(row) {
            *m += f64::from(*x).exp() / sum / tokens as f64;
        }
    }
    (share.iter().zip(&mean).map(|(f, p)| f * p).sum::<f64>() * experts as f64, z)
}

#[test]
fn auxiliary_and_z_losses_add_their_gradients() {
    let (experts, k, tokens) = (6, 2, 7);
    let values = noise(tokens * experts, 3);
    for (aux, z) in [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)] {
        let p = Params::new(&Scope::solo(), 0, Dtype::F32);
        let dims = [Dim::Other(tokens), Dim::Other(experts)];
        let x = p.tensor("x", &dims, Init::Constant(0.0)).unwrap();
        x.set(&values).unwrap();
        let routing = Routing { auxiliary: aux, z, ..Routing::top_k(experts, k) };
        let grad = |share: f32| {
            let (w, _) = x.tensor().route(&routing, None, share).unwrap();
            w.sum().unwrap().backward().unwrap().get(&x).unwrap().to_vec()
        };
        // The weights sum to one: only the losses have a gradient here.
        let (with, without) = (grad(0.5), grad(0.0));
        assert!(without.iter().all(|g| g.abs() < 1e-6));
        for i in 0..values.len() {
            let at = |h: f32| {
                let mut moved = values.clone();
                moved[i] += h;
                let (a, b) = auxiliary(&moved, experts, k);
                0.5 * (f64::from(aux) * a + f64::from(z) * b)
            };
            let wanted = (at(1e-3) - at(-1e-3)) / 2e-3;
            assert!((f64::from(with[i]) - wanted).abs() < 1e-4, "{i}: {} {wanted}", with[i]);
        }
    }
}

#[test]
fn groups_and_a_bias_limit_and_move_the_choice_but_not_the_weights() {
    // Two groups of three; the best expert lies in group 0, the best pair in group 1.
    let logits = Tensor::of(&[3.0f32, -2.0, -2.0, 2.0, 2.5, 0.0], &[1, 6]).unwrap();
    let grouped =
        Routing { score: Score::Sigmoid, groups: 2, top_groups: 1, ..Routing::top_k(6, 2) };
    let chosen = |routing: &Routing, bias: Option<&[f32]>| {
        let (w, choice) = logits.route(routing, bias, 0.0).unwrap();
        (w.to_vec().unwrap(), choice.to_vec_of::<i32>().unwrap())
    };
    let (w, choice) = chosen(&grouped, None);
    assert_eq!(choice, [4, 3]);
    let s = |x: f32| 1.0 / (1.0 + (-x).exp());
    assert!((w[0] - s(2.5) / (s(2.0) + s(2.5))).abs() < 1e-6, "{w:?}");
    let free = Routing { score: Score::Sigmoid, normalize: false, ..Routing::top_k(6, 2) };
    assert_eq!(chosen(&free, None).1, [0, 4]);
    let (w, choice) = chosen(&free, Some(&[0.0, 0.0, 0.0, 0.0, 0.0, 9.0]));
    assert_eq!((choice, w), (vec![5, 0], vec![0.5, s(3.0)]));
    let text = Routing::top_k(4, 5).validate().unwrap_err().to_string();
    assert!(text.contains("top_k 5") && text.contains("1 to 4"), "{text}");
    let text = Routing { groups: 4, ..Routing::top_k(6, 2) }.validate().unwrap_err().to_string();
    assert!(text.contains("6 experts") && text.contains("4 groups"), "{text}");
}

#[test]
fn capacity_drops_later_tokens_and_dropless_none() {
    // All four tokens choose expert 1.
    let logits = Tensor::of(&[0.0f32, 4.0].repeat(4), &[4, 2]).unwrap();
    let x = Tensor::of(&[1.0f32, 2.0, 3.0, 4.0], &[4, 1]).unwrap();
    let w = Tensor::of(&[1.0f32, 10.0], &[2, 1, 1]).unwrap();
    let run = |capacity: Option<f32>| {
        let routing = Routing { capacity, ..Routing::top_k(2, 1) };
        let (weights, choice) = logits.route(&routing, None, 0.0).unwrap();
        let journey = Journey::new(&choice, &routing, &w).unwrap();
        assert_eq!(journey.load(), [0, 4]);
        let rows = x.dispatch(&journey).unwrap().grouped_linear(&w, &journey).unwrap();
        (rows.combine_rows(&weights, &journey).unwrap().to_vec().unwrap(), journey.dropped())
    };
    assert_eq!(run(None), (vec![10.0, 20.0, 30.0, 40.0], 0));
    assert_eq!(run(Some(1.0)), (vec![10.0, 20.0, 0.0, 0.0], 2));
    assert_eq!(run(Some(1.5)), (vec![10.0, 20.0, 30.0, 0.0], 1));
}

#[test]
fn a_bias_balances_experts_without_a_loss() {
    let p = Params::new(&Scope::solo(), 1, Dtype::F32);
    let routing = Routing { score: Score::Sigmoid, ..Routing::top_k(8, 2) };
    let moe = Moe::new(&p, Dim::Embed(4), 8, routing.clone(), Some(6), true).unwrap();
    // A router that likes some experts: its logits share an offset.
    let gate = p.get("gate.weight").unwrap();
    let mut values = noise(32, 2);
    values.chunks_mut(4).enumerate().for_each(|(e, row)| row[0] += 2.0 * (e % 3) as f32);
    gate.set(&values).unwrap();
    let mut x = noise(4 * 256, 5);
    x.chunks_mut(4).for_each(|row| row[0] = 1.0);
    let x = Tensor::of(&x, &[4, 64, 4]).unwrap();
    let spread = |bias: &[f32]| {
        let logits = x.linear(&gate.tensor(), None).unwrap();
        let (_, choice) = logits.route(&routing, Some(bias), 0.0).unwrap();
        let mut load = [0; 8];
        choice.to_vec_of::<i32>().unwrap().iter().for_each(|e| load[*e as usize] += 1);
        *load.iter().max().unwrap() as f32 / 64.0
    };
    let bias = p.get("gate.e_score_correction_bias").unwrap();
    let before = spread(&bias.to_vec().unwrap());
    for _ in 0..200 {
        no_grad(|| moe.forward(&x, 0.0)).unwrap();
        moe.balance(0.01).unwrap();
    }
    let after = spread(&bias.to_vec().unwrap());
    // 64 choices an expert would be even.
    assert!(before > 2.0 && after < 1.25, "{before} {after}");
    let without = Moe::new(&p.at("b"), Dim::Embed(4), 8, routing, None, false).unwrap();
    assert!(without.balance(0.1).unwrap_err().to_string().contains("correction bias"));
}

/// Every token's rows travel to the experts and back once a pass, whoever has them.
#[test]
fn bytes_of_dispatch_and_combine_equal_the_formula() {
    let (p, tokens, k, h) = (4, 8, 2, 6);
    on_ranks(p, |world| {
        let mesh = Mesh::new(&world, &[("ep", p)]).unwrap();
        let group = mesh.group("ep").unwrap().clone();
        let scope = Scope::new(mesh, Sharding::new(vec![Role::expert()]));
        let params = Params::new(&scope, 0, Dtype::F32);
        let dims = [Dim::Experts(p), Dim::Mlp(5), Dim::Embed(h)];
        let w1 = params.tensor("w1", &dims, Init::Normal(1.0)).unwrap();
        let dims = [Dim::Experts(p), Dim::Embed(h), Dim::Mlp(5)];
        let w2 = params.tensor("w2", &dims, Init::Normal(1.0)).unwrap();
        let table = params.at("t");
        let table = nn::Embedding::new(&table, Dim::Other(tokens), Dim::Embed(h)).unwrap();
        let ids: Vec<i32> = (0..tokens as i32).collect();
        let ids = scope.batch(&ids, &[1, tokens]).unwrap();
        let x = table.forward(&ids).unwrap();
        // Balanced: token t chooses experts t and t + 1.
        let choice: Vec<i32> =
            (0..tokens).flat_map(|t| [t % p, (t + 1) % p]).map(|e| e as i32).collect();
        let layout = x.layout();
        let choice = Tensor::from_slice(&scope, &choice, &[1, tokens, k], layout).unwrap();
        let weights = vec![0.5f32; tokens * k];
        let weights = Tensor::from_slice(&scope, &weights, &[1, tokens, k], layout).unwrap();
        let journey: Arc<Journey> =
            Journey::new(&choice, &Routing::top_k(p, k), &w1.tensor()).unwrap();
        let rows = tokens * k * h * size_of::<f32>() * (p - 1) / p;
        let sent = || group.counters().bytes_of(Verb::AllToAll) as usize;
        let before = sent();
        let y = x.dispatch(&journey).unwrap();
        assert_eq!(sent() - before, rows);
        let y = y.grouped_linear(&w1.tensor(), &journey).unwrap();
        let y = y.grouped_linear(&w2.tensor(), &journey).unwrap();
        let y = y.combine_rows(&weights, &journey).unwrap();
        assert_eq!(sent() - before, 2 * rows);
        y.sum().unwrap().backward().unwrap();
        assert_eq!(sent() - before, 4 * rows);
        // Tokens that are not cut along the experts' axis would be computed by everybody.
        let layout = layout.with(0, Placement::Replicate);
        let whole = Tensor::from_slice(&scope, &[0i32; 2], &[1, 1, 2], layout).unwrap();
        let text = Journey::new(&whole, &Routing::top_k(p, k), &w1.tensor()).unwrap_err();
        assert!(
            text.to_string().starts_with("dispatch has no rule for [Replicate, Shard(0)] along ep"),
            "{text}"
        );
    });
}
