//! Numbers of 8 bits, all of them.

use colossal_kernels::*;

#[test]
fn numbers_of_8_bits_are_rounded_to_the_nearest() {
    for format in [Fp8::E4m3, Fp8::E5m2] {
        let all: Vec<f32> = (0..=255).map(|x| format.decode(x)).collect();
        let finite = || all.iter().filter(|x| x.is_finite());
        assert_eq!(finite().fold(0.0f32, |m, x| m.max(*x)), format.max());
        for (code, x) in all.iter().enumerate().filter(|(_, x)| x.is_finite()) {
            assert_eq!(usize::from(format.encode(*x)), code, "{x}");
        }
        assert!(format.decode(format.encode(f32::NAN)).is_nan());
        assert_eq!(format.decode(format.encode(f32::INFINITY)), format.max());
        // Between neighbours: the nearer one, of two equally near the even one.
        let mut sorted: Vec<f32> = finite().copied().filter(|x| *x >= 0.0).collect();
        sorted.sort_by(f32::total_cmp);
        sorted.dedup();
        for pair in sorted.windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = pair.iter().find(|x| format.encode(**x) % 2 == 0);
            assert_eq!(Some(&format.decode(format.encode(middle))), even, "{pair:?}");
            let gap = pair[1] - pair[0];
            assert_eq!(format.decode(format.encode(middle - gap / 64.0)), pair[0]);
            assert_eq!(format.decode(format.encode(-middle - gap / 64.0)), -pair[1]);
        }
    }
}
