//! Mixtures of experts: routers, losses, capacity, balancing, dispatch.

use std::sync::Arc;

use colossal_comm::{Mesh, Verb, on_ranks};
use colossal_tensor::moe::{Balance, Journey, Routing, Score, Watch};
use colossal_tensor::nn::Moe;
use colossal_tensor::safetensors::Archive;
use colossal_tensor::*;

use crate::{gradients, noise};

#[test]
fn routing_dispatch_experts_and_combine_by_finite_differences() {
    let sigmoid = Routing { score: Score::Sigmoid, scale: 2.5, ..Routing::top_k(4, 2) };
    let plain = Routing { normalize: false, ..Routing::top_k(4, 1) };
    for routing in [Routing::top_k(4, 2), sigmoid, plain] {
        gradients("route", &[&[5, 4]], &|x| Ok(x[0].scale(3.0)?.route(&routing, None, None)?.0));
        gradients("experts", &[&[1, 5, 3], &[4, 3], &[4, 6, 3], &[4, 3, 6]], &|x| {
            let (weights, choice) = x[0].linear(&x[1], None)?.route(&routing, None, None)?;
            let journey = Journey::new(&choice, &routing, &x[2])?;
            let rows = x[0].dispatch(&journey)?.grouped_linear(&x[2], &journey)?.silu()?;
            rows.grouped_linear(&x[3], &journey)?.combine_rows(&weights, &journey)
        });
    }
}

fn golden() -> Archive {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/routing.safetensors");
    Archive::open(&[path.into()]).unwrap()
}

fn close(what: &str, ours: &[f32], theirs: &[f32]) {
    let largest = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let off = ours.iter().zip(theirs).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(ours.len() == theirs.len() && off <= 1e-5 * largest, "{what}: {off} of {largest}");
}

/// transformers' `load_balancing_loss_func` and `router_z_loss_func`: values and gradients.
#[test]
fn auxiliary_and_z_losses_of_two_layers_with_padding_equal_transformers() {
    let golden = golden();
    let read = |name: &str| golden.get(name).unwrap().to_vec().unwrap();
    let real: Vec<i32> =
        golden.get("real").unwrap().to_ints().unwrap().iter().map(|r| *r as i32).collect();
    let real = Tensor::of(&real, &[2, 5]).unwrap();
    for (aux, z) in [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)] {
        let p = Params::new(&Scope::solo(), 0, Dtype::F32);
        let layers: Vec<_> = (0..2)
            .map(|i| {
                let dims = [Dim::Other(10), Dim::Other(6)];
                let x = p.at(i).tensor("logits", &dims, Init::Constant(0.0)).unwrap();
                x.set(&read(&format!("logits.{i}"))).unwrap();
                x
            })
            .collect();
        let routing = Routing { auxiliary: aux, z, ..Routing::top_k(6, 2) };
        let balance = Balance::new(0.5);
        // The weights of a token sum to one: only the losses have a gradient here.
        let mut loss = Tensor::of(&[0.0f32], &[1]).unwrap().sum().unwrap();
        for x in &layers {
            let watch = Watch { balance: &balance, layer: x.name(), real: Some(&real) };
            let logits = x.tensor().reshape(&[2, 5, 6]).unwrap();
            let (weights, _) = logits.route(&routing, None, Some(watch)).unwrap();
            loss = loss.add(&weights.sum().unwrap()).unwrap();
        }
        let value = 0.5 * (aux * read("even")[0] + z * read("z")[0]);
        close("value", &[balance.loss()], &[value]);
        let grads = loss.backward().unwrap();
        for (i, x) in layers.iter().enumerate() {
            let (even, lse) = (read(&format!("even.{i}")), read(&format!("z.{i}")));
            let both: Vec<f32> =
                even.iter().zip(&lse).map(|(e, l)| 0.5 * (aux * e + z * l)).collect();
            close(&format!("{aux} {z}, layer {i}"), grads.get(x).unwrap(), &both);
        }
    }
}

/// Sigmoid, groups, a bias in the choice only, a factor.
#[test]
fn the_router_of_deepseek_v3_equals_transformers() {
    let golden = golden();
    for (kind, normalize) in [("normalized", true), ("plain", false)] {
        let read = |name: &str| golden.get(&format!("{kind}.{name}")).unwrap();
        let routing = Routing {
            score: Score::Sigmoid,
            groups: 4,
            top_groups: 2,
            normalize,
            scale: 2.5,
            ..Routing::top_k(12, 3)
        };
        let logits = Tensor::of(&read("logits").to_vec().unwrap(), &[9, 12]).unwrap();
        let bias = read("bias").to_vec().unwrap();
        let (weights, choice) = logits.route(&routing, Some(&bias), None).unwrap();
        let (weights, choice) = (weights.to_vec().unwrap(), choice.to_vec_of::<i32>().unwrap());
        // Theirs come in no order; the golden's by weight.
        let mut sorted: Vec<(f32, i32)> = weights.into_iter().zip(choice).collect();
        sorted.chunks_mut(3).for_each(|t| t.sort_by(|a, b| b.0.total_cmp(&a.0)));
        let theirs = read("choice").to_ints().unwrap();
        assert!(sorted.iter().map(|(_, e)| i64::from(*e)).eq(theirs), "{kind}");
        let ours: Vec<f32> = sorted.iter().map(|(w, _)| *w).collect();
        close(kind, &ours, &read("weights").to_vec().unwrap());
    }
}

#[test]
fn groups_and_a_bias_limit_and_move_the_choice_but_not_the_weights() {
    // Two groups of three; the best expert lies in group 0, the best pair in group 1.
    let logits = Tensor::of(&[3.0f32, -2.0, -2.0, 2.0, 2.5, 0.0], &[1, 6]).unwrap();
    let grouped =
        Routing { score: Score::Sigmoid, groups: 2, top_groups: 1, ..Routing::top_k(6, 2) };
    let chosen = |routing: &Routing, bias: Option<&[f32]>| {
        let (w, choice) = logits.route(routing, bias, None).unwrap();
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
        let (weights, choice) = logits.route(&routing, None, None).unwrap();
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
        let (_, choice) = logits.route(&routing, Some(bias), None).unwrap();
        let mut load = [0; 8];
        choice.to_vec_of::<i32>().unwrap().iter().for_each(|e| load[*e as usize] += 1);
        *load.iter().max().unwrap() as f32 / 64.0
    };
    let bias = p.get("gate.e_score_correction_bias").unwrap();
    let before = spread(&bias.to_vec().unwrap());
    for _ in 0..200 {
        moe.forward(&x, Some(&Balance::new(1.0)), None).unwrap();
        // What is run without learning does not count.
        no_grad(|| moe.forward(&x, None, None)).unwrap();
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
