//! Kernels at a prompt, for `cargo xtask bench kernels`: each line names a case, as
//! `gemm f32 512 512 512` or `attention bf16 4 256 8 64`; the answer is its calls per second
//! (median over about 0.3 s) and what the machine would allow.
//!
//! `cargo run --release -p colossal-kernels --example kernel_bench -- 2`
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use colossal_kernels::memory::Block;
use colossal_kernels::*;
use half::bf16;

fn main() {
    let count = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    threads::set(Threads::new(count));
    println!("{{\"name\": \"colossal-kernels\"}}");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let sizes: Vec<usize> = words.iter().skip(2).filter_map(|w| w.parse().ok()).collect();
        let dtype = words.get(1).copied().unwrap_or("");
        if let (Some(kernel @ ("gemm" | "gemm_nn")), &[m, n, k]) =
            (words.first().copied(), &sizes[..])
            && m <= FEW
            && dtype != "int8"
        {
            match dtype {
                "f32" => few_rows::<f32>([m, n, k], kernel == "gemm"),
                _ => few_rows::<bf16>([m, n, k], kernel == "gemm"),
            }
            continue;
        }
        let run: Option<Box<dyn FnMut()>> = match (words.first().copied(), dtype) {
            (Some(kernel), "f32") => case::<f32>(kernel, &sizes),
            (Some(kernel), "bf16") => case::<bf16>(kernel, &sizes),
            (Some("gemm"), "int8") => int8(&sizes),
            _ => None,
        };
        let Some(mut run) = run else {
            println!("{{\"error\": \"no such case: {}\"}}", line.replace(['"', '\\'], "'"));
            continue;
        };
        profile::start();
        run();
        let events = profile::stop().events;
        let floor = Floor::measure();
        let least: f64 = events.iter().map(|e| e.floor(&floor)).sum::<f64>() / 1e9;
        let (began, mut times) = (Instant::now(), vec![]);
        while began.elapsed().as_secs_f64() < 0.3 || times.len() < 5 {
            let start = Instant::now();
            run();
            times.push(start.elapsed().as_secs_f64());
        }
        println!("{{\"speed\": {}, \"floor\": {}}}", 1.0 / median(times), 1.0 / least);
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Rows in f32, rounded as they come, times weights `[n, k]` in int8.
fn int8(sizes: &[usize]) -> Option<Box<dyn FnMut()>> {
    let &[m, n, k] = sizes else { return None };
    let w = Int8Matrix::quantize(&noise::<f32>(n * k, 1), n, k);
    let (x, mut y) = (noise::<f32>(m * k, 2), vec![0.0f32; m * n]);
    Some(Box::new(move || gemm_int8(&x, m, &w, None, &mut y)))
}

/// Products of so few rows are about reading weights.
const FEW: usize = 16;
/// Bytes of weights that take turns: no cache holds what is read next.
const COLD: usize = 256 << 20;

/// `x [m, k]` times weights, which lie in memory as a model's do, `[n, k]` or `[k, n]`. The floor is
/// reading the same weights, in turns with the products, or multiplying if that takes longer: on two
/// cores of Zen 4 reading binds up to 8 rows, multiplying at 16.
fn few_rows<T: Float>([m, n, k]: [usize; 3], transposed: bool) {
    let bytes = n * k * size_of::<T>();
    let weights: Vec<Block> =
        (0..(COLD / bytes).max(2)).map(|i| large::<T>(n * k, i as u32)).collect();
    let mut next = weights.iter().map(|w| w.bytes(bytes)).cycle();
    let (x, mut y) = (noise::<T>(m * k, 1), vec![T::zeroed(); m * n]);
    let (mut times, mut reads) = (vec![], vec![]);
    let began = Instant::now();
    while began.elapsed().as_secs_f64() < 0.6 || times.len() < 5 {
        reads.extend(next.next().map(|w| Floor::read_once(bytemuck::cast_slice(w))));
        let w = bytemuck::cast_slice(next.next().unwrap_or_default());
        let start = Instant::now();
        let w = if transposed { Mat::new(w, n, k).t() } else { Mat::new(w, k, n) };
        gemm(Mat::new(&x, m, k), w, MatMut::new(&mut y, m, n), &Epilogue::default());
        times.push(start.elapsed().as_secs_f64());
    }
    let floor = Floor::measure();
    let flops = if T::NAME == "bf16" { floor.bf16_flops } else { floor.f32_flops };
    let least = median(reads).max((2 * m * n * k) as f64 / flops);
    println!("{{\"speed\": {}, \"floor\": {}}}", 1.0 / median(times), 1.0 / least);
}

fn noise<T: Float>(n: usize, seed: u32) -> Vec<T> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        T::from_f32(state as f32 / 2f32.powi(31) - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

/// Noise on huge pages, where a model's tensors lie.
fn large<T: Float>(n: usize, seed: u32) -> Block {
    let bytes = n * size_of::<T>();
    let mut block = Block::zeroed(bytes);
    block.bytes_mut(bytes).copy_from_slice(bytemuck::cast_slice(&noise::<T>(n, seed)));
    block
}

fn values<T: Float>(x: &Block, n: usize) -> &[T] {
    bytemuck::cast_slice(x.bytes(n * size_of::<T>()))
}

fn case<T: Float>(kernel: &str, sizes: &[usize]) -> Option<Box<dyn FnMut()>> {
    Some(match (kernel, sizes) {
        // A linear layer, the gradient of its input, and that of its weights.
        ("gemm" | "gemm_nn" | "gemm_tn", &[m, n, k]) => {
            let (a, b, mut c) = (large::<T>(m * k, 1), large::<T>(n * k, 2), large::<T>(m * n, 3));
            let (left, right) = (kernel == "gemm_tn", kernel == "gemm");
            Box::new(move || {
                let [a, b] = [(&a, m * k), (&b, n * k)].map(|(x, n)| values::<T>(x, n));
                let a = if left { Mat::new(a, k, m).t() } else { Mat::new(a, m, k) };
                let b = if right { Mat::new(b, n, k).t() } else { Mat::new(b, k, n) };
                let c = bytemuck::cast_slice_mut(c.bytes_mut(m * n * size_of::<T>()));
                gemm(a, b, MatMut::<T>::new(c, m, n), &Epilogue::default());
            })
        }
        ("attention", &[batch, len, heads, d]) => {
            let s = AttentionShape::new(batch, len, len, heads, heads, d);
            let n = batch * len * heads * d;
            let new = |seed| noise::<T>(n, seed);
            let (q, k, v, dout) = (new(1), new(2), new(3), new(4));
            let (mut out, mut lse) = (new(5), vec![0.0; batch * heads * len]);
            let (mut dq, mut dk, mut dv) = (new(6), new(7), new(8));
            Box::new(move || {
                flash_attention(&s, &q, &k, &v, &mut out, &mut lse);
                flash_attention_backward(
                    &s, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
                );
            })
        }
        ("decode", &[batch, len, heads, d]) => {
            let s = AttentionShape::new(batch, 1, len, heads, heads, d);
            let (n, row) = (batch * len * heads * d, batch * heads * d);
            let (q, k, v) = (noise::<T>(row, 1), noise::<T>(n, 2), noise::<T>(n, 3));
            let (mut out, mut lse) = (noise::<T>(row, 4), vec![0.0; batch * heads]);
            Box::new(move || flash_attention(&s, &q, &k, &v, &mut out, &mut lse))
        }
        ("gelu_tanh" | "gelu_tanh_backward" | "swiglu" | "swiglu_backward", &[n]) => {
            let (mut x, mut dy, mut up) = (noise::<T>(n, 1), noise::<T>(n, 2), noise::<T>(n, 3));
            let mut y = vec![T::zeroed(); n];
            match kernel {
                "gelu_tanh" => Box::new(move || gelu_tanh(&x, &mut y)),
                "gelu_tanh_backward" => Box::new(move || gelu_tanh_backward(&mut dy, &mut x)),
                "swiglu" => Box::new(move || swiglu(&x, &up, &mut y)),
                _ => Box::new(move || swiglu_backward(&mut dy, &mut x, &mut up)),
            }
        }
        ("layer_norm" | "layer_norm_backward" | "rms_norm", &[rows, dim]) => {
            let (x, mut dy) = (noise::<T>(rows * dim, 1), noise::<T>(rows * dim, 2));
            let (w, b, mut y) = (noise::<T>(dim, 3), noise::<T>(dim, 4), noise::<T>(rows * dim, 5));
            let (mut mean, mut rstd) = (vec![0.0; rows], vec![1.0; rows]);
            let (mut dw, mut db) = (vec![0.0; dim], vec![0.0; dim]);
            match kernel {
                "layer_norm" => Box::new(move || {
                    layer_norm(&x, &w, &b, 1e-5, &mut y, &mut mean, &mut rstd);
                }),
                "rms_norm" => Box::new(move || rms_norm(&x, &w, 1e-5, &mut y, &mut rstd)),
                _ => Box::new(move || {
                    let (dw, db) = (&mut dw, &mut db);
                    layer_norm_backward(&mut dy, &x, &w, &b, &mean, &rstd, false, &mut y, dw, db);
                }),
            }
        }
        ("sum_rows", &[rows, dim]) => {
            let (x, mut sums) = (noise::<T>(rows * dim, 1), vec![0.0; dim]);
            Box::new(move || sum_rows(&x, dim, &mut sums))
        }
        ("cross_entropy", &[rows, vocab]) => {
            let mut logits = noise::<T>(rows * vocab, 1);
            let targets: Vec<i32> = (0..rows).map(|r| (r * 37 % vocab) as i32).collect();
            let (mut loss, mut lse) = (vec![0.0; rows], vec![0.0; rows]);
            let dloss = vec![1.0 / rows as f32; rows];
            Box::new(move || {
                cross_entropy(&logits, &targets, vocab, -100, &mut loss, &mut lse);
                cross_entropy_backward(&dloss, &targets, vocab, -100, &lse, black_box(&mut logits));
            })
        }
        ("adamw", &[n]) => {
            let zeros = || Block::zeroed(n * size_of::<f32>());
            let mut states = [large::<f32>(n, 0), large::<f32>(n, 1), zeros(), zeros()];
            let rule = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
            Box::new(move || {
                let [p, g, m, v] = states
                    .each_mut()
                    .map(|state| bytemuck::cast_slice_mut(state.bytes_mut(n * size_of::<f32>())));
                rule.step(9, p, g, m, v);
            })
        }
        _ => return None,
    })
}
