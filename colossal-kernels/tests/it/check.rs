//! What the suite compares with, and where it runs.

use std::sync::Mutex;

use colossal_kernels::*;

/// The instruction set belongs to the process: one test at a time has it.
static ONE: Mutex<()> = Mutex::new(());

/// Runs `f` on the best instruction set; it sets its threads itself.
pub(crate) fn at_its_best(f: impl FnOnce()) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    force_isa(Isa::Avx512Bf16);
    f();
    threads::set(Threads::new(1));
}

/// Runs `f` on each instruction set and number of threads.
pub(crate) fn everywhere(f: impl Fn(&str)) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    for wanted in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
        if force_isa(wanted) != wanted {
            continue;
        }
        for n in [1, 2, 3] {
            threads::set(Threads::new(n));
            f(&format!("{wanted:?}, {n} threads"));
        }
    }
    threads::set(Threads::new(1));
}

/// Reproducible numbers in `-1 .. 1`, as `T` holds them.
pub(crate) fn noise<T: Float>(n: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

pub(crate) fn wide<T: Float>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

/// `|got - want| <= tolerance (1 + |want|)`.
pub(crate) fn close<T: Float>(what: &str, got: &[T], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let g = f64::from(g.to_f32());
        assert!(
            (g - w).abs() <= tolerance * (1.0 + w.abs()),
            "{what}: element {i} is {g}, not {w}"
        );
    }
}

/// What rounding a result to `T` costs.
pub(crate) fn rounding<T: Float>() -> f64 {
    match T::NAME {
        "bf16" => 4.0e-3,
        "f16" => 6.0e-4,
        _ => 0.0,
    }
}

/// Central differences of a scalar function in f64.
pub(crate) fn slope(f: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    let mut x = x.to_vec();
    let h = 1e-5;
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + h;
            let up = f(&x);
            x[i] = at - h;
            let down = f(&x);
            x[i] = at;
            (up - down) / (2.0 * h)
        })
        .collect()
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(crate) fn transposed<T: Copy>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols * rows).map(|i| x[i % rows * cols + i / rows]).collect()
}

pub(crate) fn activation(kind: Activation, x: f64) -> f64 {
    match kind {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Silu => reference::silu(x),
        Activation::Gelu => reference::gelu(x),
        Activation::GeluTanh => reference::gelu_tanh(x),
    }
}
