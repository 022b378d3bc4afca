//! Powers of two and the logarithm, as softmax needs them.

use crate::float::Float;

/// `2^x` up to 127: within 1.4 units in the last place for f32, within 4e-6 of it for the narrow types,
/// whose own rounding is a hundred times that. Exactly zero from -127 down; between -127 and -126 some
/// denormal number.
#[inline(always)]
pub(super) fn exp2<T: Float>(x: f32) -> f32 {
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

/// `max ln 2 + ln sum`, the logarithm within 2e-7 of it or of 1; minus infinity where `max` is.
#[inline(always)]
pub(super) fn log_sum_exp(max: f32, sum: f32) -> f32 {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
