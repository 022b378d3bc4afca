//! Products of Rust's libraries at a prompt, for `cargo xtask bench kernels --peer gemm`: arguments are
//! threads and the library; each line names a case, as `gemm f32 512 512 512`: `x [m, k]` times the
//! transpose of `w [n, k]`. The answer is its calls per second, the median over about 0.3 s.

use std::time::Instant;

use faer::{Accum, MatMut, MatRef, Par};
use gemm::Parallelism;
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensor, NdTensorView};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(1);
    let library = arguments.next().unwrap_or_default();
    let name = match library.as_str() {
        "faer" => "faer 0.24.4".into(),
        "rten-gemm" => {
            let f32 = GemmExecutor::<f32>::default();
            let int8 = GemmExecutor::<u8, i8, i32>::default();
            format!("rten-gemm 0.27.0 ({}, {})", f32.kernel_name(), int8.kernel_name())
        }
        _ => "gemm 0.19.0 (x86-v4)".into(),
    };
    println!("{{\"name\": \"{name}\"}}");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let sizes: Vec<usize> = words.iter().skip(2).filter_map(|w| w.parse().ok()).collect();
        let dtype = words.get(1).copied().unwrap_or("");
        let speed = match (words.first(), &sizes[..], dtype, library.as_str()) {
            (Some(&"gemm"), &[m, n, k], "f32", "faer") => speed([m, n, k], faer(threads)),
            (Some(&"gemm"), &[m, n, k], "f32", "rten-gemm") => speed([m, n, k], rten()),
            (Some(&"gemm"), &[m, n, k], "f32", _) => speed([m, n, k], gemm(threads)),
            (Some(&"gemm"), &[m, n, k], "int8", "rten-gemm") => int8([m, n, k]),
            _ => {
                println!("{{\"error\": \"no such case\"}}");
                continue;
            }
        };
        println!("{{\"speed\": {speed}}}");
    }
}

/// `y [m, n] = x [m, k] w [n, k]ᵀ`, each dense.
type Product = Box<dyn Fn([usize; 3], &[f32], &[f32], &mut [f32])>;

fn faer(threads: usize) -> Product {
    let par = if threads > 1 { Par::rayon(threads) } else { Par::Seq };
    Box::new(move |[m, n, k], x, w, y| {
        let (x, w) = (MatRef::from_row_major_slice(x, m, k), MatRef::from_row_major_slice(w, n, k));
        let y = MatMut::from_row_major_slice_mut(y, m, n);
        faer::linalg::matmul::matmul(y, Accum::Replace, x, w.transpose(), 1.0, par);
    })
}

/// Its threads are Rayon's.
fn rten() -> Product {
    let executor = GemmExecutor::<f32>::default();
    Box::new(move |[m, n, k], x, w, y| {
        let (x, w) = (NdTensorView::from_data([m, k], x), NdTensorView::from_data([n, k], w));
        let (a, b) = (GemmInputA::Unpacked(x), GemmInputB::Unpacked(w.transposed()));
        executor.gemm(y, a, b, GemmOptions::default()).expect("shapes fit");
    })
}

fn gemm(threads: usize) -> Product {
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    Box::new(move |[m, n, k], x, w, y| {
        assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
        let [rows, depth] = [n as isize, k as isize];
        // SAFETY: column and row strides of dense row-major y [m, n] and x [m, k], and of the
        // transpose of w [n, k], which hold that much by the assertion.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                y.as_mut_ptr(),
                1,
                rows,
                false,
                x.as_ptr(),
                1,
                depth,
                w.as_ptr(),
                depth,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    })
}

fn speed([m, n, k]: [usize; 3], product: Product) -> f64 {
    let noise =
        |len: usize| -> Vec<f32> { (0..len).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect() };
    // Few rows are about reading weights, which no cache may hold.
    let copies = if m <= 16 { ((256 << 20) / (4 * n * k)).max(2) } else { 1 };
    let (x, mut y) = (noise(m * k), vec![0.0f32; m * n]);
    let weights: Vec<Vec<f32>> = (0..copies).map(|_| noise(n * k)).collect();
    let mut next = (0..copies).cycle();
    let speed = calls(|| product([m, n, k], &x, &weights[next.next().unwrap_or(0)], &mut y));
    let last: f32 =
        x[(m - 1) * k..].iter().zip(&weights[0][(n - 1) * k..]).map(|(x, w)| x * w).sum();
    assert!((y[m * n - 1] - last).abs() < 1e-5 * k as f32, "{} is not {last}", y[m * n - 1]);
    speed
}

/// Sums of weights that are packed once and rows in 8 bits: neither rounds the rows nor scales the sums.
fn int8([m, n, k]: [usize; 3]) -> f64 {
    let executor = GemmExecutor::<u8, i8, i32>::default();
    let x = NdTensor::from_data([m, k], (0..m * k).map(|i| (i % 251) as u8).collect::<Vec<_>>());
    let w = NdTensor::from_data([n, k], (0..n * k).map(|i| (i % 241) as i8).collect::<Vec<_>>());
    let packed = executor.prepack_b(w.view().transposed());
    let mut y = vec![0; m * n];
    calls(|| {
        let (a, b) = (GemmInputA::Unpacked(x.view()), GemmInputB::Packed(&packed));
        executor.gemm(&mut y, a, b, GemmOptions::default()).expect("shapes fit");
    })
}

/// Calls per second.
fn calls(mut run: impl FnMut()) -> f64 {
    let (began, mut times) = (Instant::now(), vec![]);
    while began.elapsed().as_secs_f64() < 0.3 || times.len() < 5 {
        let start = Instant::now();
        run();
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    1.0 / times[times.len() / 2]
}
