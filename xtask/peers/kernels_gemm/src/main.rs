//! Products of the `gemm` crate at a prompt, for `cargo xtask bench kernels --peer gemm`: each line
//! names a case, as `gemm f32 512 512 512`: `x [m, k]` times the transpose of `w [n, k]`. The answer is
//! its calls per second, the median over about 0.3 s.

use std::time::Instant;

use gemm::Parallelism;

fn main() {
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    println!("{{\"name\": \"gemm 0.19.0 (x86-v4)\"}}");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let sizes: Vec<usize> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        match (&sizes[..], line.contains("f32")) {
            (&[m, n, k], true) => println!("{{\"speed\": {}}}", speed([m, n, k], threads)),
            _ => println!("{{\"error\": \"no such case\"}}"),
        }
    }
}

fn speed([m, n, k]: [usize; 3], threads: usize) -> f64 {
    let noise = |len: usize| -> Vec<f32> { (0..len).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect() };
    // Few rows are about reading weights, which no cache may hold.
    let copies = if m <= 16 { ((256 << 20) / (4 * n * k)).max(2) } else { 1 };
    let (x, mut y) = (noise(m * k), vec![0.0f32; m * n]);
    let weights: Vec<Vec<f32>> = (0..copies).map(|_| noise(n * k)).collect();
    let mut next = weights.iter().cycle();
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    let [rows, depth] = [n as isize, k as isize];
    let (began, mut times) = (Instant::now(), vec![]);
    while began.elapsed().as_secs_f64() < 0.3 || times.len() < 5 {
        let Some(w) = next.next() else { break };
        let start = Instant::now();
        // SAFETY: column and row strides of dense row-major y [m, n] and x [m, k], and of the
        // transpose of w [n, k].
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
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    1.0 / times[times.len() / 2]
}
