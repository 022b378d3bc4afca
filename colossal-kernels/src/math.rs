//! Elementary functions and sums in plain code that vectorises.

use std::f32::consts::LOG2_E;

use crate::float::Float;

/// How many sums run side by side: two vectors of sixteen, so that one addition need not wait for
/// the other.
pub(crate) const LANES: usize = 32;

/// The sum of the lanes, by halves.
#[inline(always)]
pub(crate) fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `e^x`, within 2 units in the last place; 0 below -87.3, finite up to 88.7.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let y = positive_exp(x);
    if x < -87.336_54 { 0.0 } else { y }
}

/// The same, but never below the smallest normal number.
#[inline(always)]
fn positive_exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let n = clamped.mul_add(LOG2_E, MAGIC);
    let power = (n.to_bits() as i32) << 23;
    let n = n - MAGIC;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = (p * r).mul_add(r, r) + 1.0;
    // Multiply by 2^n through the exponent; 2^128 does not occur thanks to the clamp.
    f32::from_bits((y.to_bits() as i32).wrapping_add(power) as u32)
}

/// `2^x` up to 127: within 1.4 units in the last place for f32, within 4e-6 of it for the narrow types,
/// whose own rounding is a hundred times that. Exactly zero from -127 down; between -127 and -126 some
/// denormal number.
#[inline(always)]
pub(crate) fn exp2<T: Float>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let x = if x < -127.0 { -127.0 } else { x };
    let n = x + MAGIC;
    let power = (n.to_bits() as i32) << 23;
    let r = x - (n - MAGIC);
    let p = if size_of::<T>() == size_of::<f32>() {
        let p = 1.535_336_2e-4f32;
        let p = p.mul_add(r, 1.339_887_5e-3);
        let p = p.mul_add(r, 9.618_437e-3);
        let p = p.mul_add(r, 5.550_332_4e-2);
        let p = p.mul_add(r, 2.402_264_8e-1);
        p.mul_add(r, 6.931_472e-1)
    } else {
        let p = 9.582_855e-3f32;
        let p = p.mul_add(r, 5.590_643e-2);
        let p = p.mul_add(r, 2.402_41e-1);
        p.mul_add(r, 6.931_242e-1)
    };
    // At -127 the exponent of 1.0 becomes zero, which with its mantissa is 0.0.
    let y = p.mul_add(r, 1.0);
    f32::from_bits((y.to_bits() as i32).wrapping_add(power) as u32)
}

/// `1 / (1 + e^-x)`: within 2e-7 for f32, within 2e-6 for the narrow types.
#[inline(always)]
pub(crate) fn sigmoid<T: Float>(x: f32) -> f32 {
    if size_of::<T>() == size_of::<f32>() {
        return 1.0 / (1.0 + positive_exp(-x));
    }
    let x = -LOG2_E * x;
    1.0 / (1.0 + exp2::<T>(if x > 126.0 { 126.0 } else { x }))
}

/// `max ln 2 + ln sum`, the logarithm within 2e-7 of it or of 1; minus infinity where `max` is.
#[inline(always)]
pub(crate) fn log_sum_exp(max: f32, sum: f32) -> f32 {
    // sum = 2^n m, m around 1; ln m by the series in (m - 1) / (m + 1).
    let n = (sum.to_bits() as i32 - std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32) >> 23;
    let m = f32::from_bits((sum.to_bits() as i32 - (n << 23)) as u32);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let p = (2.0f32 / 9.0).mul_add(z, 2.0 / 7.0);
    let p = p.mul_add(z, 2.0 / 5.0);
    let p = p.mul_add(z, 2.0 / 3.0);
    let ln = s.mul_add(2.0, p * z * s);
    ((f64::from(max) + f64::from(n)) * std::f64::consts::LN_2 + f64::from(ln)) as f32
}

/// The error function, within 2e-7 (Abramowitz & Stegun 7.1.26 is too coarse; this is the
/// complementary form of Numerical Recipes, 1.2e-7 relative).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let y = 1.0 - t * exp(p - z * z);
    if x < 0.0 { -y } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_its_stated_error() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 2.4e-7, "exp({x}): {error}");
        }
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sigmoid_and_erf_are_within_their_stated_errors() {
        for i in -6000..6000 {
            let x = i as f32 / 1000.0;
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!((f64::from(sigmoid::<f32>(x)) - exact).abs() < 2e-7, "sigmoid({x})");
            let narrow = f64::from(sigmoid::<half::bf16>(x));
            assert!((narrow - exact).abs() < 2e-6, "sigmoid({x}) in bf16");
            assert!((f64::from(erf(x)) - erf_series(f64::from(x))).abs() < 4e-7, "erf({x})");
        }
        for sigmoid in [sigmoid::<f32>, sigmoid::<half::bf16>] {
            assert!(sigmoid(200.0) == 1.0 && sigmoid(-200.0) < 2e-37);
            assert!(sigmoid(f32::INFINITY) == 1.0 && sigmoid(f32::NEG_INFINITY) < 2e-37);
            assert!(sigmoid(f32::NAN).is_nan());
        }
    }

    #[test]
    fn exp2_is_within_its_stated_error() {
        for i in -126_000..127_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp2();
            let error = |y: f32| (f64::from(y) - exact).abs() / exact;
            assert!(error(exp2::<f32>(x)) < 8e-8, "exp2({x}): {}", error(exp2::<f32>(x)));
            let narrow = error(exp2::<half::bf16>(x));
            assert!(narrow < 4e-6, "exp2({x}) in bf16: {narrow}");
        }
        let tiny = exp2::<f32>(-126.4);
        assert!((0.0..1.2e-38).contains(&tiny));
        for zero in [-127.0, -1e9, f32::NEG_INFINITY] {
            assert_eq!([exp2::<f32>(zero), exp2::<half::bf16>(zero)], [0.0; 2]);
        }
        assert!(exp2::<f32>(f32::NAN).is_nan());
    }

    #[test]
    fn the_log_of_a_sum_is_within_its_stated_error() {
        for i in 1..100_000 {
            let sum = i as f32 / 97.0;
            let exact = f64::from(sum).ln();
            let error = (f64::from(log_sum_exp(0.0, sum)) - exact).abs();
            assert!(error < 2e-7 * exact.abs().max(1.0), "ln({sum}): {error}");
        }
        assert_eq!(log_sum_exp(f32::NEG_INFINITY, 0.0), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(1.0, 1.0), std::f32::consts::LN_2);
    }

    /// By the integral, Simpson's rule.
    fn erf_series(x: f64) -> f64 {
        let n = 400;
        let h = x / f64::from(n);
        let f = |t: f64| (-t * t).exp();
        let inner: f64 =
            (1..n).map(|i| f(h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        (f(0.0) + inner + f(x)) * h / 3.0 * 2.0 / std::f64::consts::PI.sqrt()
    }
}
