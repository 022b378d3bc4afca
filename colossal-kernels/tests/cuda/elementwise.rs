//! Kernels that take elements one by one, and sums of all of them.

use colossal_kernels::cuda::{self, Result, Slice, SliceMut, Stream};
use colossal_kernels::{self as cpu, Float};
use half::{bf16, f16};

use crate::check::{Device, close, noise};

/// Lengths with and without a tail, and how far slices begin behind their allocation.
const CASES: [(usize, usize); 6] = [(0, 0), (1, 0), (7, 1), (256, 0), (4099, 0), (2050, 3)];

type Two<'a, T> = (&'a str, fn(&[T], &[T], &mut [T]), On2<T>);
type On2<T> = fn(&Stream, Slice<'_, T>, Slice<'_, T>, SliceMut<'_, T>) -> Result<()>;
type One<'a, T> = (&'a str, fn(&[T], &mut [T]), On1<T>);
type On1<T> = fn(&Stream, Slice<'_, T>, SliceMut<'_, T>) -> Result<()>;

fn two_operands<T: Float>(stream: &Stream) {
    let kernels: [Two<'_, T>; 4] = [
        ("add", cpu::add, cuda::add),
        ("sub", cpu::sub, cuda::sub),
        ("mul", cpu::mul, cuda::mul),
        ("swiglu", cpu::swiglu, cuda::swiglu),
    ];
    for (name, on_cpu, on_cuda) in kernels {
        for (n, skip) in CASES {
            let (a, b) = (noise::<T>(n, 1), spread::<T>(n, 2));
            let mut want = vec![T::zeroed(); n];
            on_cpu(&a, &b, &mut want);
            let (a, b) = (Device::new(stream, &a, skip), Device::new(stream, &b, skip));
            let mut y = Device::new(stream, &vec![T::zeroed(); n], skip);
            on_cuda(stream, a.all(), b.all(), y.all_mut()).expect(name);
            close(name, &y.get(), &want, 2e-6);
        }
    }
}

fn one_operand<T: Float>(stream: &Stream) {
    let kernels: [One<'_, T>; 6] = [
        ("silu", cpu::silu, cuda::silu),
        ("relu", cpu::relu, cuda::relu),
        ("gelu", cpu::gelu, cuda::gelu),
        ("gelu_tanh", cpu::gelu_tanh, cuda::gelu_tanh),
        ("scale", |x, y| cpu::scale(x, 0.3, y), |s, x, y| cuda::scale(s, x, 0.3, y)),
        (
            "fill",
            |_, y| cpu::fill(y, T::from_f32(0.7)),
            |s, _, y| cuda::fill(s, y, T::from_f32(0.7)),
        ),
    ];
    for (name, on_cpu, on_cuda) in kernels {
        for (n, skip) in CASES {
            let x = spread::<T>(n, 3);
            let mut want = vec![T::zeroed(); n];
            on_cpu(&x, &mut want);
            let x = Device::new(stream, &x, skip);
            let mut y = Device::new(stream, &vec![T::zeroed(); n], skip);
            on_cuda(stream, x.all(), y.all_mut()).expect(name);
            close(name, &y.get(), &want, 2e-6);
        }
    }
}

/// Numbers up to 100 in size: activations at their ends, too.
fn spread<T: Float>(n: usize, seed: u64) -> Vec<T> {
    let wide = |x: &T| T::from_f32(x.to_f32().powi(3) * 100.0);
    noise::<T>(n, seed).iter().map(wide).collect()
}

fn added_to<T: Float>(stream: &Stream) {
    for (n, skip) in CASES {
        let (x, start) = (noise::<T>(n, 4), noise::<T>(n, 5));
        let mut want = start.clone();
        cpu::axpy(0.7, &x, &mut want);
        cpu::add_assign(&x, &mut want);
        let on = Device::new(stream, &x, skip);
        let mut y = Device::new(stream, &start, skip);
        cuda::axpy(stream, 0.7, on.all(), y.all_mut()).expect("axpy");
        cuda::add_assign(stream, on.all(), y.all_mut()).expect("add_assign");
        close("axpy and add_assign", &y.get(), &want, 1e-6);

        let start = noise::<f32>(n, 6);
        let mut want = start.clone();
        cpu::add_into(&x, &mut want);
        let mut y = Device::new(stream, &start, skip);
        cuda::add_into(stream, on.all(), y.all_mut()).expect("add_into");
        close("add_into", &y.get(), &want, 0.0);
    }
}

type Back<T> = (&'static str, fn(&mut [T], &mut [T]), OnBack<T>);
type OnBack<T> = fn(&Stream, SliceMut<'_, T>, SliceMut<'_, T>) -> Result<()>;

fn in_place<T: Float>(stream: &Stream) {
    let kernels: [Back<T>; 4] = [
        ("silu_backward", cpu::silu_backward, cuda::silu_backward),
        ("relu_backward", cpu::relu_backward, cuda::relu_backward),
        ("gelu_backward", cpu::gelu_backward, cuda::gelu_backward),
        ("gelu_tanh_backward", cpu::gelu_tanh_backward, cuda::gelu_tanh_backward),
    ];
    for (n, skip) in CASES {
        for (name, on_cpu, on_cuda) in kernels {
            let mut x = [noise::<T>(n, 1), spread::<T>(n, 2)];
            let [mut a, mut b] = x.each_ref().map(|x| Device::new(stream, x, skip));
            let [dy, of] = &mut x;
            on_cpu(dy, of);
            on_cuda(stream, a.all_mut(), b.all_mut()).expect(name);
            close(name, &a.get(), &x[0], 2e-6);
            close(name, &b.get(), &x[1], 2e-6);
        }
        let mut x = [7, 8, 9].map(|seed| noise::<T>(n, seed));
        let [mut a, mut b, mut c] = x.each_ref().map(|x| Device::new(stream, x, skip));
        let [dy, gate, up] = &mut x;
        cpu::swiglu_backward(dy, gate, up);
        cuda::swiglu_backward(stream, a.all_mut(), b.all_mut(), c.all_mut()).expect("swiglu");
        for (name, got, want) in [("result", a, &x[0]), ("gate", b, &x[1]), ("up", c, &x[2])] {
            close(&format!("swiglu_backward, {name}"), &got.get(), want, 2e-6);
        }
    }
}

fn biases<T: Float>(stream: &Stream) {
    for (rows, dim, skip) in [(0, 8, 0), (3, 1, 0), (5, 40, 0), (9, 24, 1), (4, 523, 0)] {
        let (x, bias) = (noise::<T>(rows * dim, 10), noise::<T>(dim, 11));
        let mut want = vec![T::zeroed(); rows * dim];
        cpu::add_bias(&x, &bias, &mut want);
        let (x, bias) = (Device::new(stream, &x, skip), Device::new(stream, &bias, skip));
        let mut y = Device::new(stream, &vec![T::zeroed(); rows * dim], skip);
        cuda::add_bias(stream, x.all(), bias.all(), y.all_mut()).expect("add_bias");
        close("add_bias", &y.get(), &want, 0.0);
    }
}

fn casts<T: Float>(stream: &Stream) {
    to::<T, f32>(stream);
    to::<T, bf16>(stream);
    to::<T, f16>(stream);
}

fn to<A: Float, B: Float>(stream: &Stream) {
    for (n, skip) in CASES {
        let mut x = noise::<A>(n, 12);
        let ends = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 65504.0, 1e-7, 0.0];
        x.iter_mut().zip(ends).for_each(|(x, end)| *x = A::from_f32(end));
        let mut want = vec![B::zeroed(); n];
        cpu::cast(&x, &mut want);
        let x = Device::new(stream, &x, skip);
        let mut y = Device::new(stream, &vec![B::zeroed(); n], skip);
        cuda::cast(stream, x.all(), y.all_mut()).expect("cast");
        for (got, want) in y.get().iter().zip(&want) {
            let (got, want) = (got.to_f32(), want.to_f32());
            assert!(got == want || (got.is_nan() && want.is_nan()), "{got}, not {want}");
        }
    }
}

fn reductions<T: Float>(stream: &Stream) {
    for (n, skip) in CASES.into_iter().chain([(100_000, 1)]) {
        let x = noise::<T>(n, 13);
        let on = Device::new(stream, &x, skip);
        let mut out = Device::new(stream, &[0.0f32], 0);
        cuda::sum(stream, on.all(), out.all_mut()).expect("sum");
        close("sum", &out.get(), &[cpu::sum(&x)], 1e-5);
        cuda::max(stream, on.all(), out.all_mut()).expect("max");
        close("max", &out.get(), &[cpu::max(&x)], 0.0);
    }
}

mod on_each {
    crate::check::each_type! { two_operands one_operand added_to in_place biases casts reductions }
}
