//! Autograd against finite differences, placements against one device, and the errors of the design.

use colossal_comm::{Mesh, on_ranks};
use colossal_tensor::*;
use proptest::prelude::*;

#[path = "it/context.rs"]
mod context;
#[path = "it/fp8.rs"]
mod fp8;
#[path = "it/grids.rs"]
mod grids;
#[path = "it/moe.rs"]
mod moe;

pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let s = random::Stream::new(seed, 0);
    (0..len as u64).map(|i| s.normal(i)).collect()
}

/// A parameter with these values.
fn param(p: &Params, name: &str, shape: &[usize], values: &[f32]) -> std::sync::Arc<Param> {
    let dims: Vec<Dim> = shape.iter().map(|n| Dim::Other(*n)).collect();
    let param = p.tensor(name, &dims, Init::Constant(0.0)).unwrap();
    param.set(values).unwrap();
    param
}

pub(crate) type Loss<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// Compares the gradient of `f` with respect to every input with central differences.
pub(crate) fn gradients(what: &str, shapes: &[&[usize]], f: &Loss<'_>) {
    let p = Params::new(&Scope::solo(), 0, Dtype::F32);
    let params: Vec<_> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| {
            param(&p, &format!("x{i}"), shape, &noise(shape.iter().product(), i as u64 + 1))
        })
        .collect();
    let run = || {
        let y = f(&params.iter().map(|p| p.tensor()).collect::<Vec<_>>()).unwrap();
        let w = noise(y.len(), 99);
        y.weighted_sum(&w).unwrap()
    };
    let grads = run().backward().unwrap();
    for (i, param) in params.iter().enumerate() {
        let x = param.to_vec().unwrap();
        let grad = grads.get(param).unwrap_or_else(|| panic!("{what}: input {i} has no gradient"));
        let direction = noise(x.len(), 50 + i as u64);
        let at = |h: f32| {
            let moved: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + h * d).collect();
            param.set(&moved).unwrap();
            f64::from(no_grad(run).item().unwrap())
        };
        let numeric = (at(3e-3) - at(-3e-3)) / 6e-3;
        param.set(&x).unwrap();
        let exact: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        let off = (numeric - exact).abs() / (1.0 + numeric.abs());
        assert!(off < 1e-2, "{what}, input {i}: {exact} against {numeric}");
    }
}

#[test]
fn every_op_by_finite_differences() {
    let ids = Tensor::of(&[2i32, 0, 2, 1], &[2, 2]).unwrap();
    let targets = Tensor::of(&[3i32, -100, 1, 0], &[2, 2]).unwrap();
    let table = RopeTable::new(&[1.0, 0.3], 8);
    let positions = Tensor::of(&[0, 1, 2, 3, 4, 5], &[2, 3]).unwrap();
    gradients("add, sub, mul", &[&[3, 4], &[3, 4]], &|x| (&x[0] * &x[1])?.sub(&x[0])?.add(&x[1]));
    gradients("scale, silu", &[&[7]], &|x| x[0].scale(0.7)?.silu());
    gradients("gelu", &[&[9]], &|x| x[0].gelu());
    gradients("gelu_tanh", &[&[9]], &|x| x[0].gelu_tanh());
    gradients("swiglu", &[&[5, 3], &[5, 3]], &|x| x[0].swiglu(&x[1]));
    gradients("linear", &[&[2, 3, 5], &[4, 5], &[4]], &|x| x[0].linear(&x[1], Some(&x[2])));
    gradients("linear onto", &[&[2, 3, 5], &[4, 5], &[4], &[2, 3, 4]], &|x| {
        let y = x[0].linear_onto(&x[1], Some(&x[2]), &x[3])?.expect("one rank sums at once");
        let apart = (&x[3] + &x[0].linear(&x[1], Some(&x[2]))?)?;
        let off = y.to_vec()?.iter().zip(apart.to_vec()?).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(off, "the sum on the way out is the sum afterwards");
        Ok(y)
    });
    gradients("linear of a computed weight", &[&[3, 5], &[4, 5]], &|x| {
        x[0].linear(&x[1].scale(2.0)?, None)
    });
    gradients("add_bias", &[&[3, 4], &[4]], &|x| x[0].add_bias(&x[1]));
    gradients("rms_norm", &[&[3, 6], &[6]], &|x| x[0].rms_norm(&x[1], 1e-5));
    gradients("layer_norm", &[&[3, 6], &[6], &[6]], &|x| x[0].layer_norm(&x[1], &x[2], 1e-5));
    gradients("softmax", &[&[3, 6]], &|x| x[0].softmax());
    gradients("embedding", &[&[3, 5]], &|x| Tensor::embedding(&x[0], &ids));
    gradients("take_rows", &[&[2, 3, 4]], &|x| x[0].take_rows(&[2, 0]));
    gradients("narrow, reshape", &[&[4, 6]], &|x| x[0].narrow(1..3)?.reshape(&[3, 4]));
    gradients("rope", &[&[2, 3, 2, 4]], &|x| x[0].rope(&positions, &table));
    gradients("cross_entropy", &[&[2, 2, 5]], &|x| x[0].scale(1.0)?.cross_entropy(&targets));
    gradients("dropout", &[&[40]], &|x| x[0].dropout(0.3, random::Stream::new(1, 1), 0));
    gradients("attention", &[&[2, 5, 4, 3], &[2, 5, 2, 3], &[2, 5, 2, 3]], &|x| {
        x[0].attention(&x[1], &x[2], &AttentionMask::causal())
    });
    gradients("sum", &[&[3, 4]], &|x| (&x[0] * &x[0])?.sum());
    gradients("used twice", &[&[4, 4], &[4, 4]], &|x| {
        x[0].linear(&x[1], None)?.linear(&x[1], None)
    });
    gradients("recompute", &[&[3, 4], &[4, 4]], &|x| {
        let w = x[1].clone();
        recompute(&x[0].scale(1.5)?, move |h| h.linear(&w, None)?.silu())
    });
}

#[test]
fn backward_hands_gradients_on_as_they_complete_and_consumes_the_graph() {
    let p = Params::new(&Scope::solo(), 0, Dtype::F32);
    let a = param(&p, "a", &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let b = param(&p, "b", &[2, 2], &[0.5; 4]);
    let x = Tensor::of(&[1.0f32, 1.0], &[1, 2]).unwrap();
    let forward = || {
        let h = x.linear(&a.tensor(), None).unwrap();
        h.linear(&b.tensor(), None).unwrap().sum().unwrap()
    };
    let loss = forward();
    let grads = loss.backward().unwrap();
    assert_eq!(grads.completed(), ["b", "a"], "the last layer's first");
    assert!(loss.backward().unwrap_err().to_string().contains("consumed"));
    // Deferred: the same gradients, later.
    let (mut sink, mut deferred) = (Grads::default(), Deferred::default());
    forward().backward_into(&mut sink, Some(&mut deferred)).unwrap();
    assert_eq!((deferred.len(), sink.completed().len()), (2, 0));
    deferred.run(&mut sink).unwrap();
    assert_eq!(sink.completed(), ["b", "a"]);
    assert_eq!((sink.get(&a), sink.get(&b)), (grads.get(&a), grads.get(&b)));
    // Frozen, or without a graph: no gradient, and an error that says why.
    a.set_trainable(false);
    assert!(forward().backward().unwrap().get(&a).is_none());
    assert!(no_grad(forward).backward().unwrap_err().to_string().contains("no_grad"));
    assert!(x.backward().unwrap_err().to_string().contains("scalar"));
}

#[test]
fn a_parameter_is_borrowed_not_kept() {
    let p = Params::new(&Scope::solo(), 0, Dtype::F32);
    let w = param(&p, "w", &[2, 2], &[1.0; 4]);
    let y = w.tensor().silu().unwrap().sum().unwrap();
    w.set(&[2.0; 4]).unwrap(); // the graph holds the handle only
    let held = w.tensor().read::<f32>().unwrap();
    assert!(w.set(&[3.0; 4]).unwrap_err().to_string().contains("in use"));
    assert_eq!(held.as_slice::<f32>(), [2.0; 4]);
    drop((held, y));
    w.set(&[3.0; 4]).unwrap();
}

fn tp_scope(world: &Group) -> Scope {
    let mesh = Mesh::new(world, &[("tp", world.world_size())]).unwrap();
    Scope::new(mesh, Sharding::new(vec![Role::tensor(false)]))
}

#[test]
fn a_forgotten_redistribute_names_the_op_and_both_layouts() {
    on_ranks(2, |world| {
        let p = Params::new(&tp_scope(&world), 0, Dtype::F32);
        let up = nn::Linear::new(&p.at("up"), Dim::Embed(4), Dim::Mlp(8), false).unwrap();
        let x = p.scope().batch(&[0.5f32; 8], &[2, 4]).unwrap();
        let error = up.forward(&x).unwrap_err();
        assert!(error.is_layout());
        assert!(
            error.to_string().starts_with("linear has no rule for [Invariant, Shard(0)] along tp"),
            "{error}"
        );
    });
}

#[test]
fn every_move_and_its_dual() {
    use Placement::{Invariant, Partial, Replicate, Shard};
    let n = 2;
    let whole = noise(4 * 6, 1);
    let dy = noise(4 * 6, 2);
    // This rank's part of a tensor under a placement.
    let part = |values: &[f32], place: Placement, rank: usize| -> (Vec<f32>, Vec<usize>) {
        match place {
            Shard(0) => (values[rank * 12..(rank + 1) * 12].to_vec(), vec![2, 6]),
            Shard(_) => {
                let rows = values.chunks(6).flat_map(|r| r[rank * 3..(rank + 1) * 3].to_vec());
                (rows.collect(), vec![4, 3])
            }
            // Terms that add up to the whole.
            Partial => {
                let share = if rank == 0 { 0.25 } else { 0.75 };
                (values.iter().map(|x| x * share).collect(), vec![4, 6])
            }
            _ => (values.to_vec(), vec![4, 6]),
        }
    };
    let places = [Invariant, Replicate, Partial, Shard(0), Shard(1)];
    let mut moves = 0;
    for from in places {
        for to in places {
            if to == Partial && from != Partial {
                continue; // only as a dual
            }
            moves += 1;
            let parts = on_ranks(n, |world| {
                let scope = tp_scope(&world);
                let (values, shape) = part(&whole, from, world.rank());
                let layout = Layout::default().with(0, from);
                let x = Tensor::from_slice(&scope, &values, &shape, layout).unwrap();
                let y = x.distribute("tp", to).unwrap();
                if to != Partial {
                    let (wanted, shape) = part(&whole, to, world.rank());
                    let off = y
                        .to_vec()
                        .unwrap()
                        .iter()
                        .zip(&wanted)
                        .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(off < 1e-6 && y.shape() == shape, "{from} to {to}");
                }
                // The gradient, taken through the dual move.
                let (grad, shape) = part(&dy, to.dual(), world.rank());
                let dual = Layout::default().with(0, to.dual());
                let g = Tensor::from_slice(&scope, &grad, &shape, dual).unwrap();
                let back = g.to_layout(Layout::default().with(0, from.dual())).unwrap();
                (back.to_vec().unwrap(), from.dual())
            });
            // Whatever the way, the gradients of all ranks together are the whole gradient.
            for (rank, (back, place)) in parts.iter().enumerate() {
                if *place == Partial {
                    continue;
                }
                let (wanted, _) = part(&dy, *place, rank);
                assert!(
                    back.iter().zip(&wanted).all(|(a, b)| (a - b).abs() < 1e-6),
                    "{from} to {to}"
                );
            }
            if parts[0].1 == Partial {
                for (i, dy) in dy.iter().enumerate() {
                    let sum = parts[0].0[i] + parts[1].0[i];
                    assert!((sum - dy).abs() < 1e-6, "{from} to {to}");
                }
            }
        }
    }
    assert_eq!(moves, 21);
    on_ranks(2, |world| {
        let x =
            Tensor::from_slice(&tp_scope(&world), &[0.0f32; 3], &[3], Layout::default()).unwrap();
        let e = x.distribute("tp", Shard(0)).unwrap_err().to_string();
        assert!(e.contains("does not divide by the 2 ranks"), "{e}");
        assert!(x.distribute("pp", Replicate).unwrap_err().to_string().contains("[tp]"));
    });
}

#[test]
fn shapes_and_dtypes_that_do_not_fit_are_named() {
    let a = Tensor::of(&[0.0f32; 6], &[2, 3]).unwrap();
    let b = Tensor::of(&[0.0f32; 6], &[3, 2]).unwrap();
    let text = a.add(&b).unwrap_err().to_string();
    assert!(text.contains("add") && text.contains("[2, 3]") && text.contains("[3, 2]"), "{text}");
    let text = a.add(&a.to_dtype(Dtype::Bf16).unwrap()).unwrap_err().to_string();
    assert!(text.contains("f32 and bf16") && text.contains("to_dtype"), "{text}");
    assert!(a.linear(&b, None).unwrap_err().to_string().contains("last dim"));
    let ids = Tensor::of(&[7i32], &[1]).unwrap();
    assert!(Tensor::embedding(&a, &ids).unwrap_err().to_string().contains("outside 0..2"));
}

#[test]
fn initial_values_do_not_depend_on_the_mesh() {
    let whole = {
        let p = Params::new(&Scope::solo(), 5, Dtype::F32);
        p.tensor("w", &[Dim::Mlp(4), Dim::Embed(3)], Init::Normal(1.0)).unwrap().to_vec().unwrap()
    };
    let parts = on_ranks(2, |world| {
        let p = Params::new(&tp_scope(&world), 5, Dtype::F32);
        p.tensor("w", &[Dim::Mlp(4), Dim::Embed(3)], Init::Normal(1.0)).unwrap().to_vec().unwrap()
    });
    assert_eq!(parts.concat(), whole);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn safetensors_round_trip_and_never_panic_on_damage(
        values in prop::collection::vec(-1e3f32..1e3, 1..40), cut in 0usize..200, flip in 0usize..200,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let one = safetensors::Owned::from_f32(&values, &[values.len()], Dtype::F32).unwrap();
        safetensors::save(&path, &[("x".to_string(), one)].into(), &Default::default()).unwrap();
        let open = || safetensors::Archive::open(std::slice::from_ref(&path));
        prop_assert_eq!(open().unwrap().get("x").unwrap().to_vec().unwrap(), values);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = flip % bytes.len();
        bytes[at] ^= 0x55;
        bytes.truncate(bytes.len().saturating_sub(cut));
        std::fs::write(&path, bytes).unwrap();
        if let Ok(archive) = open() {
            for name in archive.names().map(str::to_string).collect::<Vec<_>>() {
                if let Some(entry) = archive.get(&name) {
                    let _ = entry.to_vec();
                }
            }
        }
    }
}
