//! Convolution against seven loops; its gradients by what they are: the adjoint of a linear map.

use colossal_kernels::*;

use crate::check::{close, everywhere, noise};

/// `y` by its definition.
fn by_loops(s: &ConvShape, x: &[f32], w: &[f32]) -> Vec<f32> {
    let [od, oh, ow] = s.out_size();
    let [d, h, width] = s.size;
    let (own, per) = (s.channels / s.groups, s.out_channels / s.groups);
    let mut y = vec![];
    for b in 0..s.batch {
        for c in 0..s.out_channels {
            for o in 0..od * oh * ow {
                let place = [o / (oh * ow), o / ow % oh, o % ow];
                let mut sum = 0.0f64;
                for i in 0..own {
                    for k in 0..s.kernel.iter().product::<usize>() {
                        let [_, kh, kw] = s.kernel;
                        let k3 = [k / (kh * kw), k / kw % kh, k % kw];
                        let at: [usize; 3] = std::array::from_fn(|j| {
                            (place[j] * s.stride[j] + k3[j] * s.dilation[j])
                                .wrapping_sub(s.padding[j])
                        });
                        if at[0] < d && at[1] < h && at[2] < width {
                            let channel = b * s.channels + c / per * own + i;
                            let x = x[((channel * d + at[0]) * h + at[1]) * width + at[2]];
                            let w = w[(c * own + i) * s.kernel.iter().product::<usize>() + k];
                            sum += f64::from(x) * f64::from(w);
                        }
                    }
                }
                y.push(sum as f32);
            }
        }
    }
    y
}

#[test]
fn convolutions_are_sums_over_patches() {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    for s in [
        ConvShape::conv2d(2, 3, 5, [7, 9], [3, 2]),
        ConvShape {
            padding: [1, 2, 3],
            stride: [2, 1, 3],
            dilation: [1, 2, 1],
            groups: 2,
            ..ConvShape::conv3d(2, 4, 6, [5, 6, 7], [2, 3, 3])
        },
    ] {
        let n = s.batch * s.channels * s.size.iter().product::<usize>();
        let k = s.out_channels * s.channels / s.groups * s.kernel.iter().product::<usize>();
        let (x, w): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(k, 2));
        let want = by_loops(&s, &x, &w);
        let dy: Vec<f32> = noise(want.len(), 3);
        everywhere(|place| {
            let mut y = vec![9.0; want.len()];
            conv(&s, &x, &w, &mut y);
            let wide: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
            close(place, &y, &wide, 1e-5);
            let (mut dx, mut dw) = (vec![9.0; n], vec![0.0; k]);
            conv_backward_input(&s, &dy, &w, &mut dx);
            conv_backward_weight(&s, &dy, &x, &mut dw);
            let whole = dot(&dy, &want);
            let off = [dot(&dx, &x), dot(&dw, &w)].map(|x| (x - whole).abs());
            assert!(off.iter().all(|off| *off < 1e-3), "{place}: {off:?} of {whole}");
        });
    }
}
