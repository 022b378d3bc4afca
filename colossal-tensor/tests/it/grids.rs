//! 2D, 2.5D and 3D tensor parallelism: bytes and memory equal the formulas, mistakes are refused.

use colossal_comm::{Mesh, on_ranks};
use colossal_tensor::nn::{Embedding, LayerNorm, Linear, RmsNorm};
use colossal_tensor::storage::{memory_stats, reset_peak};
use colossal_tensor::*;

use crate::noise;

/// Sequences, tokens, width, feed-forward width, vocabulary: powers of two, as the allocator's.
const BATCH: usize = 8;
const SEQ: usize = 16;
const EMBED: usize = 64;
const MLP: usize = 128;
const VOCAB: usize = 256;
const F32: usize = size_of::<f32>();

type Axes = Vec<(&'static str, usize)>;

fn line(p: usize) -> (Axes, Vec<Role>) {
    (vec![("tp", p)], vec![Role::tensor(false)])
}

fn summa(q: usize, depth: usize) -> (Axes, Vec<Role>) {
    let [row, col] = Role::summa();
    (vec![("depth", depth), ("row", q), ("col", q)], vec![Role::data(), row, col])
}

fn cube(q: usize) -> (Axes, Vec<Role>) {
    (vec![("row", q), ("col", q), ("depth", q)], Role::cube().to_vec())
}

fn scope((axes, roles): (Axes, Vec<Role>), world: &Group) -> Scope {
    Scope::new(Mesh::new(world, &axes).unwrap(), Sharding::new(roles))
}

/// Bytes that `f` sends along each axis.
fn sent<R>(scope: &Scope, f: impl FnOnce() -> R) -> (Vec<usize>, R) {
    let read = || -> Vec<usize> {
        let groups = scope.mesh().axes().iter().map(|(a, _)| scope.mesh().group(a).unwrap());
        groups.map(|g| g.counters().bytes() as usize).collect()
    };
    let before = read();
    let result = f();
    (read().iter().zip(before).map(|(now, then)| now - then).collect(), result)
}

/// The layers of a model in small: embedding, norm, up, down, head, loss.
struct Layers {
    table: Embedding,
    norm: RmsNorm,
    layer_norm: LayerNorm,
    up: Linear,
    down: Linear,
    head: Linear,
}

fn layers(p: &Params) -> Result<Layers> {
    use Dim::{Embed, Mlp, Vocab};
    let table = Embedding::new(&p.at("table"), Vocab(VOCAB), Embed(EMBED))?;
    Ok(Layers {
        norm: RmsNorm::new(&p.at("norm"), Embed(EMBED), 1e-5)?,
        layer_norm: LayerNorm::new(&p.at("layer_norm"), Embed(EMBED), 1e-5)?,
        up: Linear::new(&p.at("up"), Embed(EMBED), Mlp(MLP), false)?,
        down: Linear::new(&p.at("down"), Mlp(MLP), Embed(EMBED), false)?,
        head: Linear::tied(table.weight().clone()),
        table,
    })
}

fn ids(scope: &Scope) -> Tensor {
    let (part, parts) = scope.batch_part();
    let all: Vec<i32> = (0..BATCH * SEQ).map(|i| (i * 37 % VOCAB) as i32).collect();
    let rows = BATCH / parts;
    scope.batch(&all[part * rows * SEQ..][..rows * SEQ], &[rows, SEQ]).unwrap()
}

/// Bytes sent along each axis by: embedding, RMSNorm, LayerNorm, up, down, head, loss; and by
/// the backward pass.
fn bytes_of_each(scope: &Scope) -> Vec<Vec<usize>> {
    let p = Params::new(scope, 0, Dtype::F32);
    let l = layers(&p).unwrap();
    let ids = ids(scope);
    let (b0, x) = sent(scope, || l.table.forward(&ids).unwrap());
    let (b1, h) = sent(scope, || l.norm.forward(&x).unwrap());
    let (b2, h) = sent(scope, || l.layer_norm.forward(&h).unwrap());
    let (b3, h) = sent(scope, || l.up.forward(&h).unwrap());
    let (b4, h) = sent(scope, || l.down.forward(&h).unwrap());
    let (b5, logits) = sent(scope, || l.head.forward(&h).unwrap());
    let (b6, loss) = sent(scope, || logits.cross_entropy(&ids).unwrap().sum().unwrap());
    let (b7, _) = sent(scope, || loss.backward().unwrap());
    vec![b0, b1, b2, b3, b4, b5, b6, b7]
}

/// ColossalAI's published costs leave out bias, norm, embedding and loss (W06).
#[test]
fn w06_bytes_of_every_layer_along_every_axis_equal_the_formulas_2d() {
    for (q, depth) in [(2, 1), (2, 2)] {
        on_ranks(q * q * depth, |world| {
            let scope = scope(summa(q, depth), &world);
            let tokens = BATCH / depth * SEQ;
            // Elements of a rank's block, in bytes.
            let (x, h, y) = (EMBED, MLP, VOCAB);
            let [x, h, y] = [x, h, y].map(|n| F32 * tokens * n / (q * q));
            let (w, table) = (F32 * EMBED * MLP / (q * q), F32 * VOCAB * EMBED / (q * q));
            let rows = F32 * tokens / q;
            let ids = rows * (q - 1);
            // One number a token, all-reduced over the row: 2 (q - 1) / q.
            let number = 2 * rows * (q - 1) / q;
            let want = [
                // Axes: depth, row (along columns), col (along rows).
                vec![0, ids + (q - 1) * x, 0],
                vec![0, 0, number],
                vec![0, 0, 2 * number],
                vec![0, w, x],
                vec![0, w, h],
                vec![0, table, (q - 1) * y],
            ];
            let got = bytes_of_each(&scope);
            assert_eq!(got[..6], want[..], "{q} x {q} x {depth}");
            // The vocabulary of the logits lies on columns: three numbers a token.
            assert_eq!(got[6], vec![0, 0, 3 * number]);
            // Backward: head (input: logits' gradient and table; weight: the same gradient again,
            // sums of the table), down and up (input and weight), norms, the table's rows.
            let along_rows = (y + y) + ((q - 1) * h + h) + ((q - 1) * x + x) + 2 * number + number;
            let along_columns = (table + (q - 1) * table) + 2 * (w + (q - 1) * w) + x;
            assert_eq!(got[7], vec![0, along_columns, along_rows], "{q} x {q} x {depth}");
        });
    }
}

#[test]
fn w06_bytes_of_every_layer_along_every_axis_equal_the_formulas_3d() {
    let q = 2;
    on_ranks(q * q * q, |world| {
        let scope = scope(cube(q), &world);
        let tokens = BATCH * SEQ;
        let [x, h, y] = [EMBED, MLP, VOCAB].map(|n| F32 * tokens * n / (q * q * q));
        let [w, table] = [EMBED * MLP, VOCAB * EMBED].map(|n| F32 * n / (q * q * q));
        let rows = F32 * tokens / (q * q);
        let number = 2 * rows * (q - 1) / q;
        let r = q - 1;
        let got = bytes_of_each(&scope);
        // Axes: row, col, depth. Ids are gathered over depth, then over rows.
        assert_eq!(got[0], vec![r * q * rows + r * x, 0, r * rows + r * q * x], "embedding");
        assert_eq!(got[1], vec![0, number, 0], "rms_norm");
        assert_eq!(got[2], vec![0, 2 * number, 0], "layer_norm");
        // Up: x gathered over rows, scattered over columns. Down: the other way.
        assert_eq!(got[3], vec![r * x, r * h, r * w], "up");
        assert_eq!(got[4], vec![r * x, r * h, r * w], "down");
        assert_eq!(got[5], vec![r * x, r * y, r * table], "head");
        // Targets follow the logits' rows, then three numbers a token.
        assert_eq!(got[6], vec![r * rows + 3 * number, 0, 0], "loss");
        // Each product: dy and w gathered, dx scattered, x gathered again, dw scattered.
        let products = [(x, y, table), (h, x, w), (x, h, w)];
        let mut back = [0; 3];
        for (i, (input, output, weight)) in products.into_iter().enumerate() {
            let (from, to) = if i == 1 { (1, 0) } else { (0, 1) };
            back[from] += r * 2 * input;
            back[to] += r * output;
            back[2] += r * 2 * weight;
        }
        back[1] += 3 * number;
        // The table's rows: blocks of the gradient from each row, gathered over depth.
        back[0] += x;
        back[2] += r * q * x;
        assert_eq!(got[7], back.to_vec(), "backward");
    });
}

/// Bytes held after a forward pass of up and down, and the most held during it.
fn held(scope: &Scope) -> (usize, usize) {
    let base = memory_stats().in_use;
    let p = Params::new(scope, 0, Dtype::F32);
    let up = Linear::new(&p.at("up"), Dim::Embed(EMBED), Dim::Mlp(MLP), false).unwrap();
    let down = Linear::new(&p.at("down"), Dim::Mlp(MLP), Dim::Embed(EMBED), false).unwrap();
    let layout = scope.sharding().region(Region::TensorParallel);
    let (_, parts) = scope.batch_part();
    let width = scope.mesh().size("col").unwrap_or(1);
    let shape = [BATCH / parts, SEQ, EMBED / width];
    let x = noise(shape.iter().product(), 1);
    let x = Tensor::from_slice(scope, &x, &shape, layout).unwrap();
    reset_peak();
    let h = up.forward(&x).unwrap();
    let y = down.forward(&h).unwrap();
    drop((x, h));
    let held = memory_stats().in_use - base;
    let peak = memory_stats().peak - base;
    drop(y);
    (held, peak)
}

/// ColossalAI's 3D keeps what it gathered, 1/q² instead of 1/q³ (W04).
#[test]
fn w04_a_layer_holds_what_the_formula_says_and_nothing_gathered() {
    let tokens = BATCH * SEQ;
    let (weights, x, h) = (2 * EMBED * MLP * F32, tokens * EMBED * F32, tokens * MLP * F32);
    let (w, activations) = (weights / 2, x + h + x);
    let near = |what: &str, got: usize, wanted: usize| {
        let off = (got as f64 / wanted as f64 - 1.0).abs();
        assert!(off < 0.05, "{what}: {got} bytes held, the formula says {wanted}");
    };
    let on = |plan: (Axes, Vec<Role>)| {
        let n = plan.0.iter().map(|(_, n)| n).product();
        on_ranks(n, |world| held(&scope(plan.clone(), &world)))
    };
    for p in [4, 8] {
        for (saved, peak) in on(line(p)) {
            near("1d", saved, weights / p + x + h / p + x);
            near("1d at most", peak, weights / p + x + h / p + x);
        }
    }
    for (q, depth) in [(2, 1), (2, 2)] {
        let (area, p) = (q * q, q * q * depth);
        for (saved, peak) in on(summa(q, depth)) {
            near("2d", saved, weights / area + activations / p);
            // Two blocks of each operand in flight: this step's and the next one's.
            let flight = 2 * (w / area + h.max(x) / p);
            near("2d at most", peak, weights / area + activations / p + flight);
        }
    }
    let (q, p) = (2, 8);
    for (saved, peak) in on(cube(q)) {
        near("3d", saved, (weights + activations) / p);
        // While it multiplies: both operands and the sums of one product, gathered.
        let gathered = q * (w + x + h) / p;
        near("3d at most", peak, (weights + activations) / p + gathered);
    }
}

/// ColossalAI's 2D to 3D cast everything to fp16 (W05).
#[test]
fn w05_grids_compute_in_the_dtype_they_are_given() {
    let run = |scope: &Scope, dtype: Dtype| {
        let p = Params::new(scope, 0, dtype);
        let l = layers(&p).unwrap();
        let ids = ids(scope);
        let h = l.norm.forward(&l.table.forward(&ids).unwrap()).unwrap();
        let h = l.down.forward(&l.up.forward(&h).unwrap().gelu().unwrap()).unwrap();
        let logits = l.head.forward(&h).unwrap();
        assert_eq!(logits.dtype(), dtype);
        let loss = logits.cross_entropy(&ids).unwrap().sum().unwrap();
        let mut layout = loss.layout();
        for axis in 0..scope.mesh().axes().len() {
            layout[axis] = Placement::Invariant;
        }
        loss.backward().unwrap();
        no_grad(|| loss.detach().to_layout(layout)).unwrap().item().unwrap()
    };
    for (dtype, tolerance) in [(Dtype::F32, 2e-6), (Dtype::Bf16, 2e-3)] {
        let serial = run(&Scope::solo(), dtype);
        for plan in [summa(2, 1), summa(2, 2), cube(2)] {
            let n = plan.0.iter().map(|(_, n)| n).product();
            for loss in on_ranks(n, |world| run(&scope(plan.clone(), &world), dtype)) {
                assert!((loss - serial).abs() < tolerance * serial, "{dtype} {loss} {serial}");
            }
        }
    }
}

#[test]
fn a_wrong_layout_on_a_grid_is_refused_with_the_op_and_both_layouts() {
    let fake = |(axes, roles): (Axes, Vec<Role>)| Scope::fake(&axes, Sharding::new(roles));
    for (plan, axis, says) in [
        (summa(32, 1), "col", "linear has no rule for [Invariant, Shard(0)] along col"),
        (summa(16, 4), "col", "linear has no rule for [Invariant, Shard(0)] along col"),
        (summa(16, 4), "depth", "linear has no rule for [Invariant, Replicate] along depth"),
        (cube(16), "row", "linear has no rule for [Invariant, Shard(0)] along row"),
    ] {
        let scope = fake(plan);
        let p = Params::new(&scope, 0, Dtype::F32);
        let embed = 4096;
        let up = Linear::new(&p.at("up"), Dim::Embed(embed), Dim::Mlp(2 * embed), false).unwrap();
        let width = scope.mesh().size("col").unwrap();
        let layout = scope.sharding().region(Region::Residual);
        let x = |layout, width| {
            Tensor::from_slice(&scope, &[] as &[f32], &[1, SEQ, width], layout).unwrap()
        };
        assert!(up.forward(&x(layout, embed / width)).is_ok());
        let index = scope.mesh().axes().iter().position(|(name, _)| *name == axis).unwrap();
        let text = up
            .forward(&x(layout.with(index, Placement::Invariant), embed / width))
            .unwrap_err()
            .to_string();
        assert!(text.starts_with(says), "{text}");
    }
    let scope = fake((vec![("row", 2), ("col", 3)], Role::summa().to_vec()));
    let p = Params::new(&scope, 0, Dtype::F32);
    let text =
        p.tensor("w", &[Dim::Mlp(8), Dim::Embed(9)], Init::Constant(0.0)).unwrap_err().to_string();
    assert!(text.contains("does not divide by the"), "{text}");
}
