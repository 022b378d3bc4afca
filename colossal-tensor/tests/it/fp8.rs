//! Linear layers in fp8 against PyTorch's rounding, on the host and on a GPU where there is one.

use colossal_comm::on_ranks;
use colossal_kernels::{Fp8, cuda::Stream};
use colossal_tensor::nn::Linear;
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
