//! Steps of the optimizers against their definitions.

use colossal_kernels::*;
use half::bf16;

use crate::check::{close, everywhere, noise};

#[test]
fn adamw_steps() {
    everywhere(|place| {
        let rule = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
        let n = 40_003;
        let (mut p, g): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let mut want: Vec<[f64; 3]> = p.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
        let (mut master, mut low) = (p.clone(), vec![bf16::ZERO; n]);
        let (mut m2, mut v2) = (m.clone(), v.clone());
        for t in 1..=3 {
            rule.step_grad_scale(t, &mut p, &g, &mut m, &mut v, 0.5);
            rule.step_masters(t, 0.5, &mut master, &mut low, &g, &mut m2, &mut v2);
            for (w, g) in want.iter_mut().zip(&g) {
                *w = reference::adamw(&rule, t, w[0], 0.5 * f64::from(*g), w[1], w[2]);
            }
        }
        close(place, &p, &want.iter().map(|w| w[0]).collect::<Vec<_>>(), 1e-6);
        close(place, &m, &want.iter().map(|w| w[1]).collect::<Vec<_>>(), 1e-6);
        close(place, &v, &want.iter().map(|w| w[2]).collect::<Vec<_>>(), 1e-6);
        assert_eq!((&p, &m, &v), (&master, &m2, &v2), "{place}");
        assert!(low.iter().zip(&master).all(|(l, m)| *l == bf16::from_f32(*m)), "{place}");
    });
}

#[test]
fn lion_lamb_and_lars_step() {
    let lion = Lion { lr: 0.01, beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    let lamb = Lamb { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
    let lars = Lars { lr: 0.1, momentum: 0.9, trust: 0.01, eps: 1e-8, weight_decay: 0.1 };
    everywhere(|place| {
        for n in [1, 17, 20_003] {
            let (start, g): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
            let halves: Vec<f64> = g.iter().map(|g| 0.5 * f64::from(*g)).collect();
            let same = |what: &str, got: [&[f32]; 2], want: [Vec<f64>; 2]| {
                for (got, want) in got.into_iter().zip(want) {
                    close(&format!("{what} {n} {place}"), got, &want, 2e-6);
                }
            };
            let (mut p, mut m) = (start.clone(), vec![0.0; n]);
            let mut want: Vec<[f64; 2]> = start.iter().map(|p| [f64::from(*p), 0.0]).collect();
            for _ in 0..3 {
                lion.step(&mut p, &g, &mut m, 0.5);
                for (w, g) in want.iter_mut().zip(&halves) {
                    *w = reference::lion(&lion, w[0], *g, w[1]);
                }
            }
            same("lion", [&p, &m], [0, 1].map(|i| want.iter().map(|w| w[i]).collect()));

            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; n], vec![0.0; n]);
            let mut want: Vec<[f64; 3]> = start.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
            for t in 1..=3 {
                lamb.step(t, &mut p, &g, &mut m, &mut v, 0.5);
                reference::lamb(&lamb, t, &mut want, &halves);
            }
            same("lamb", [&p, &v], [0, 2].map(|i| want.iter().map(|w| w[i]).collect()));

            let (mut p, mut m) = (start.clone(), vec![0.0; n]);
            let mut want: Vec<[f64; 2]> = start.iter().map(|p| [f64::from(*p), 0.0]).collect();
            for _ in 0..3 {
                lars.step(&mut p, &g, &mut m, 0.5);
                reference::lars(&lars, &mut want, &halves);
            }
            same("lars", [&p, &m], [0, 1].map(|i| want.iter().map(|w| w[i]).collect()));
        }
    });
}
