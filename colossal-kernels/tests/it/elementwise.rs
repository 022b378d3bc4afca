//! Element-wise arithmetic, reductions and casts.

use colossal_kernels::*;
use half::{bf16, f16};

use crate::check::{close, dot, everywhere, noise, wide};

#[test]
fn elementwise_reductions_and_casts() {
    everywhere(|place| {
        for n in [0, 1, 15, 33, 20_011] {
            let (a, b): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
            let check = |got: &[f32], f: &dyn Fn(f64, f64) -> f64| {
                let want: Vec<f64> =
                    a.iter().zip(&b).map(|(a, b)| f(f64::from(*a), f64::from(*b))).collect();
                close(place, got, &want, 2e-7);
            };
            let mut y = vec![0.0; n];
            add(&a, &b, &mut y);
            check(&y, &|a, b| a + b);
            sub(&a, &b, &mut y);
            check(&y, &|a, b| a - b);
            mul(&a, &b, &mut y);
            check(&y, &|a, b| a * b);
            scale(&a, 3.0, &mut y);
            check(&y, &|a, _| 3.0 * a);
            y.copy_from_slice(&b);
            add_assign(&a, &mut y);
            check(&y, &|a, b| a + b);
            y.copy_from_slice(&b);
            axpy(-2.0, &a, &mut y);
            check(&y, &|a, b| b - 2.0 * a);
            let total: f64 = wide(&a).iter().sum();
            close(place, &[sum(&a)], &[total], 1e-4);
            let squares = dot(&wide(&a), &wide(&a));
            assert!(
                (sum_of_squares_many(&[&a, &b[..0]]) - squares).abs() <= 1e-6 * (1.0 + squares)
            );
            let mut scaled = a.clone();
            scale_many(&mut [&mut scaled], 0.5);
            check(&scaled, &|a, _| 0.5 * a);
            let mut low = vec![bf16::ZERO; n];
            cast(&a, &mut low);
            assert!(low.iter().zip(&a).all(|(l, a)| *l == bf16::from_f32(*a)), "{place}");
            let mut half = vec![f16::ZERO; n];
            cast(&a, &mut half);
            assert!(half.iter().zip(&a).all(|(l, a)| *l == f16::from_f32(*a)), "{place}");
        }
        let x: Vec<f32> = noise(7 * 300, 3);
        let (mut down, mut along, mut y) = (vec![1.0; 300], vec![0.0; 7], x.clone());
        sum_rows(&x, 300, &mut down);
        sum_last(&x, 300, &mut along);
        add_bias(&x, &down, &mut y);
        for c in 0..300 {
            let want: f64 = 1.0 + (0..7).map(|r| f64::from(x[r * 300 + c])).sum::<f64>();
            close(place, &[down[c]], &[want], 1e-6);
            assert_eq!(y[300 + c], x[300 + c] + down[c], "{place}");
        }
        for r in 0..7 {
            close(place, &[along[r]], &[wide(&x[r * 300..(r + 1) * 300]).iter().sum()], 1e-5);
        }
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(max(&x), largest, "{place}");
    });
}

/// Down to the smallest numbers there are: a checkpoint must survive the way through f32.
#[test]
fn every_number_survives_a_cast_to_f32_and_back() {
    fn through_f32<T: Float + PartialEq>(all: &[T], place: &str) {
        let (mut wide, mut back) = (vec![0.0f32; all.len()], vec![T::zeroed(); all.len()]);
        cast(all, &mut wide);
        cast(&wide, &mut back);
        for (x, y) in all.iter().zip(&back) {
            assert!(bytemuck::bytes_of(x) == bytemuck::bytes_of(y), "{x:?} became {y:?}, {place}");
        }
    }
    let all = || 0..=u16::MAX;
    let bf16: Vec<bf16> = all().map(bf16::from_bits).filter(|x| !x.is_nan()).collect();
    let f16: Vec<f16> = all().map(f16::from_bits).filter(|x| !x.is_nan()).collect();
    everywhere(|place| {
        through_f32(&bf16, place);
        through_f32(&f16, place);
    });
}
