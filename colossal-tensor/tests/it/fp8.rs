//! Linear layers in fp8 against PyTorch's rounding, on the host and on a GPU where there is one.

use colossal_comm::on_ranks;
use colossal_kernels::{Fp8, cuda::Stream};
use colossal_tensor::moe::{Journey, Routing};
use colossal_tensor::nn::{Linear, Moe};
use colossal_tensor::safetensors::Archive;
use colossal_tensor::*;

use crate::{noise, param, tp_scope};

fn golden() -> Archive {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/fp8.safetensors");
    Archive::open(&[path.into()]).unwrap()
}

const RECIPES: [(Fp8Recipe, &str); 2] =
    [(Fp8Recipe::Tensor, "tensor"), (Fp8Recipe::Block, "block")];

#[test]
fn numbers_are_rounded_to_the_bytes_of_pytorch() {
    let golden = golden();
    let values = golden.get("values").unwrap().to_vec().unwrap();
    for (format, name) in [(Fp8::E4m3, "e4m3"), (Fp8::E5m2, "e5m2")] {
        let bytes = golden.get(name).unwrap().to_ints().unwrap();
        assert_eq!(bytes.len(), values.len());
        for (value, byte) in values.iter().zip(bytes) {
            assert_eq!(i64::from(format.encode(*value)), byte, "{value} in {name}");
        }
    }
}

/// The host, and the first GPU.
fn devices() -> Vec<Device> {
    let there = Stream::new(0);
    let required = std::env::var("COLOSSAL_CUDA").is_ok_and(|v| v == "required");
    assert!(!required || there.is_ok(), "COLOSSAL_CUDA=required, but {there:?}");
    std::iter::once(Device::Cpu).chain(there.ok().map(Device::Cuda)).collect()
}

#[test]
fn fp8_layers_and_their_gradients_equal_products_of_what_pytorch_has_rounded() {
    let golden = golden();
    let read = |name: String| golden.get(&name).unwrap().to_vec().unwrap();
    for (case, [m, n, k]) in [("y", [3, 7, 300]), ("dx", [5, 140, 6]), ("dw", [150, 5, 4])] {
        let [x_values, w, bias, dy] = ["x", "w", "bias", "dy"].map(|t| read(format!("{case}.{t}")));
        for device in devices() {
            for (dtype, tolerance) in [(Dtype::F32, 1e-6), (Dtype::Bf16, 4e-3)] {
                let p = Params::new(&Scope::solo().on(&device), 0, dtype);
                let x = param(&p, "x", &[m, k], &x_values);
                let layer = Linear::new(&p, Dim::Embed(k), Dim::Mlp(n), true).unwrap();
                let [weight, b] = ["weight", "bias"].map(|name| p.get(name).unwrap());
                weight.set(&w).unwrap();
                b.set(&bias).unwrap();
                for (recipe, name) in RECIPES {
                    weight.set_fp8(Some(recipe));
                    let y = layer.forward(&x.tensor()).unwrap();
                    let grads = y.weighted_sum(&dy).unwrap().backward().unwrap();
                    let ours = [
                        ("y", y.to_vec().unwrap(), tolerance),
                        ("dx", grads.get(&x).unwrap().to_vec(), tolerance),
                        // Gradients of weights are f32 whatever the type.
                        ("dw", grads.get(&weight).unwrap().to_vec(), 1e-6),
                    ];
                    for (what, ours, tolerance) in ours {
                        let theirs = read(format!("{case}.{name}.{what}"));
                        let largest = theirs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        let off = ours.iter().zip(&theirs);
                        let off = off.fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
                        assert!(
                            ours.len() == theirs.len() && off <= tolerance,
                            "{case} {name} {dtype} on {device}: {what} is off by {off}"
                        );
                    }
                }
            }
        }
    }
}

/// Experts, each by itself, are layers: the same bits, and an expert without rows has no gradient.
#[test]
fn fp8_experts_are_layers_each_of_its_rows() {
    let (tokens, experts, n, k) = (150, 4, 6, 140);
    // The second is nobody's choice.
    let choice_of = |t: usize| [0, 2, 3][(t * t + t / 7) % 3];
    for device in devices() {
        for (recipe, name) in RECIPES {
            let scope = Scope::solo().on(&device);
            let p = Params::new(&scope, 0, Dtype::F32);
            let dims = [Dim::Experts(experts), Dim::Mlp(n), Dim::Embed(k)];
            let routing = Routing::top_k(experts, 1);
            let moe = Moe::new(&p, Dim::Embed(k), n, routing.clone(), None, false).unwrap();
            let w1 = p.get("experts.w1").unwrap();
            assert_eq!(w1.dims(), dims);
            p.all().iter().for_each(|p| p.set_fp8(Some(recipe)));
            assert!(w1.fp8().is_some() && p.get("gate.weight").unwrap().fp8().is_none());
            let scores: Vec<f32> = (0..tokens)
                .flat_map(|t| (0..experts).map(move |e| if e == choice_of(t) { 5.0 } else { 0.0 }))
                .collect();
            let layout = Layout::default();
            let of = |values: &[f32], shape: &[usize]| {
                Tensor::from_slice(&scope, values, shape, layout).unwrap()
            };
            let scores = of(&scores, &[tokens, experts]);
            let (_, choice) = scores.route(&routing, None, None).unwrap();
            let journey = Journey::new(&choice, &routing, &w1.tensor()).unwrap();
            let (x, dy) = (noise(tokens * k, 1), noise(tokens * n, 2));
            let x = param(&p, "x", &[tokens, k], &x);
            let rows = x.tensor().dispatch(&journey).unwrap();
            let y = rows.grouped_linear(&w1.tensor(), &journey).unwrap();
            let grads = y.weighted_sum(&dy).unwrap().backward().unwrap();
            let (rows, y, w) = (rows.to_vec().unwrap(), y.to_vec().unwrap(), w1.to_vec().unwrap());
            let dw = grads.get(&w1).unwrap();
            let mut at = 0;
            for e in 0..experts {
                let own = e * n * k..(e + 1) * n * k;
                let tokens: Vec<usize> = (0..tokens).filter(|t| choice_of(*t) == e).collect();
                let m = tokens.len();
                if m == 0 {
                    assert!(dw[own].iter().all(|g| *g == 0.0));
                    continue;
                }
                let p = Params::new(&scope, 0, Dtype::F32);
                let layer = Linear::new(&p, Dim::Embed(k), Dim::Mlp(n), false).unwrap();
                let weight = p.get("weight").unwrap();
                weight.set(&w[own.clone()]).unwrap();
                weight.set_fp8(Some(recipe));
                let own_x = param(&p, "x", &[m, k], &rows[at * k..(at + m) * k]);
                let part = layer.forward(&own_x.tensor()).unwrap();
                let loss = part.weighted_sum(&dy[at * n..(at + m) * n]).unwrap();
                let alone = loss.backward().unwrap();
                assert_eq!(part.to_vec().unwrap(), y[at * n..(at + m) * n], "{name} on {device}");
                assert_eq!(alone.get(&weight).unwrap(), &dw[own], "{name} on {device}");
                let dx: Vec<&[f32]> = grads.get(&x).unwrap().chunks(k).collect();
                let dx: Vec<f32> = tokens.iter().flat_map(|t| dx[*t].to_vec()).collect();
                assert_eq!(alone.get(&own_x).unwrap(), dx, "{name} on {device}");
                at += m;
            }
            assert_eq!(at, tokens);
            drop(moe);
        }
    }
}

/// Up and down, as in a block: cut between blocks of 128 it rounds as one rank does.
#[test]
fn fp8_by_blocks_under_tensor_parallelism_rounds_as_one_rank_does() {
    let run = |world: &Group| {
        let p = Params::new(&tp_scope(world), 1, Dtype::F32);
        let (embed, mlp) = (Dim::Embed(96), Dim::Mlp(256));
        let up = Linear::new(&p.at("up"), embed, mlp, true).unwrap();
        let down = Linear::new(&p.at("down"), mlp, embed, true).unwrap();
        p.all().iter().for_each(|p| p.set_fp8(Some(Fp8Recipe::Block)));
        let x = p.scope().batch(&noise(5 * 96, 1), &[5, 96]).unwrap();
        let h = up.forward(&x.redistribute(Region::TensorParallel).unwrap()).unwrap();
        let y = down.forward_to(&h.silu().unwrap(), Region::Residual).unwrap();
        let grads = y.weighted_sum(&noise(5 * 96, 2)).unwrap().backward().unwrap();
        let up = p.get("up.weight").unwrap();
        let range = up.local_ranges()[0].clone();
        (y.to_vec().unwrap(), range, grads.get(&up).unwrap().to_vec())
    };
    let (y, _, dw) = run(&Group::solo());
    for (part, range, dw_part) in on_ranks(2, |world| run(&world)) {
        let largest = y.iter().fold(0.0f32, |m, y| m.max(y.abs()));
        assert!(y.iter().zip(&part).all(|(a, b)| (a - b).abs() <= 1e-5 * largest));
        let own = &dw[range.start * 96..range.end * 96];
        let largest = dw.iter().fold(0.0f32, |m, y| m.max(y.abs()));
        let off = own.iter().zip(&dw_part).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(own.len() == dw_part.len() && off <= 1e-5 * largest, "{off} of {largest}");
    }
}

#[test]
fn fp8_is_for_matrices_of_blocks_alone() {
    let p = Params::new(&Scope::solo(), 0, Dtype::F32);
    Linear::new(&p.at("head"), Dim::Embed(8), Dim::Vocab(10), false).unwrap();
    Linear::new(&p.at("router"), Dim::Embed(8), Dim::Other(4), false).unwrap();
    Linear::new(&p.at("up"), Dim::Embed(8), Dim::Mlp(4), true).unwrap();
    let table = nn::Embedding::new(&p.at("table"), Dim::Vocab(10), Dim::Embed(8)).unwrap();
    let recipe = Some(Fp8Recipe::Tensor);
    p.all().iter().for_each(|p| p.set_fp8(recipe));
    let rounded: Vec<_> = p.all().into_iter().filter(|p| p.fp8().is_some()).collect();
    assert_eq!(rounded.iter().map(|p| p.name()).collect::<Vec<_>>(), ["up.weight"]);
    rounded[0].set_fp8(None);
    assert_eq!(rounded[0].fp8(), None);
    drop(table);
    // A product that sends parts round has no such form.
    on_ranks(4, |world| {
        let mesh = Mesh::new(&world, &[("row", 2), ("col", 2)]).unwrap();
        let scope = Scope::new(mesh, Sharding::new(Role::summa().to_vec()));
        let p = Params::new(&scope, 0, Dtype::F32);
        let layer = Linear::new(&p.at("up"), Dim::Embed(8), Dim::Mlp(4), false).unwrap();
        p.all().iter().for_each(|p| p.set_fp8(recipe));
        let x = scope.batch(&noise(64, 1), &[4, 2, 8]).unwrap();
        let error = x.redistribute(Region::TensorParallel).and_then(|x| layer.forward(&x));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("up.weight") && error.contains("fp8"), "{error}");
    });
}
