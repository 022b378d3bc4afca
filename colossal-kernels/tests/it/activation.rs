//! Activations and their gradients.

use colossal_kernels::*;

use crate::check::{activation, close, everywhere, noise, wide};

#[test]
fn activations_and_their_gradients() {
    type Pair = (fn(&[f32], &mut [f32]), fn(&mut [f32], &mut [f32]), Activation);
    let all: [Pair; 4] = [
        (silu, silu_backward, Activation::Silu),
        (relu, relu_backward, Activation::Relu),
        (gelu, gelu_backward, Activation::Gelu),
        (gelu_tanh, gelu_tanh_backward, Activation::GeluTanh),
    ];
    everywhere(|place| {
        let x: Vec<f32> = (-4000..=4001).map(|i| i as f32 / 1000.0 + 0.000_3).collect();
        let dy: Vec<f32> = noise(x.len(), 2);
        let h = 1e-5;
        for (forward, backward, kind) in all {
            let name = format!("{kind:?} {place}");
            let (mut y, mut dx) = (x.clone(), x.clone());
            forward(&x, &mut y);
            close(
                &name,
                &y,
                &wide(&x).iter().map(|x| activation(kind, *x)).collect::<Vec<_>>(),
                1e-6,
            );
            let mut again = dy.clone();
            backward(&mut again, &mut dx);
            assert_eq!(again, y, "{name}: the result once more");
            let want: Vec<f64> = wide(&x)
                .iter()
                .zip(&dy)
                .map(|(x, dy)| {
                    let difference = activation(kind, x + h) - activation(kind, x - h);
                    f64::from(*dy) * difference / (2.0 * h)
                })
                .collect();
            close(&name, &dx, &want, 2e-6);
        }
        let up: Vec<f32> = noise(x.len(), 3);
        let (mut y, mut again, mut dg, mut du) = (x.clone(), dy.clone(), x.clone(), up.clone());
        swiglu(&x, &up, &mut y);
        swiglu_backward(&mut again, &mut dg, &mut du);
        assert_eq!(again, y, "swiglu {place}: the result once more");
        for i in 0..x.len() {
            let [g, u, d] = [x[i], up[i], dy[i]].map(f64::from);
            let slope = (reference::silu(g + h) - reference::silu(g - h)) / (2.0 * h);
            close(place, &[y[i]], &[reference::silu(g) * u], 1e-6);
            close(place, &[dg[i], du[i]], &[d * u * slope, d * reference::silu(g)], 2e-6);
        }
    });
}
