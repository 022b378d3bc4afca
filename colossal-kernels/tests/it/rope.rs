//! Rotary embedding.

use colossal_kernels::*;

use crate::check::{close, everywhere, noise, wide};

#[test]
fn rope_turns_and_its_gradient_turns_back() {
    everywhere(|place| {
        let (heads, d, positions) = (3, 10, [4, 0, 2, 4]);
        let angles: Vec<f32> = noise(5 * d / 2, 1);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let x: Vec<f32> = noise(4 * heads * d, 2);
        let (mut y, mut back) = (x.clone(), x.clone());
        rope(&x, &positions, &cos, &sin, heads, d, &mut y);
        close(
            place,
            &y,
            &reference::rope(&wide(&x), &positions, &wide(&cos), &wide(&sin), heads, d),
            1e-6,
        );
        rope_backward(&y, &positions, &cos, &sin, heads, d, &mut back);
        close(place, &back, &wide(&x), 1e-6);
    });
}
