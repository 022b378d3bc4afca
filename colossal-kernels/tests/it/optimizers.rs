//! Steps of the optimizers against their definitions.

use colossal_kernels::*;
use half::{bf16, f16};

use crate::check::{close, everywhere, noise, wide};

#[test]
fn adamw_steps() {
    everywhere(|place| {
        let rule = AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
        let n = 40_003;
        let (mut p, g): (Vec<f32>, Vec<f32>) = (noise(n, 1), noise(n, 2));
        let start = p.clone();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let mut want: Vec<[f64; 3]> = p.iter().map(|p| [f64::from(*p), 0.0, 0.0]).collect();
        for t in 1..=3 {
            rule.step_grad_scale(t, &mut p, &g, &mut m, &mut v, 0.5);
            for (w, g) in want.iter_mut().zip(&g) {
                *w = reference::adamw(&rule, t, w[0], 0.5 * f64::from(*g), w[1], w[2]);
            }
        }
        close(place, &p, &want.iter().map(|w| w[0]).collect::<Vec<_>>(), 1e-6);
        close(place, &m, &want.iter().map(|w| w[1]).collect::<Vec<_>>(), 1e-6);
        close(place, &v, &want.iter().map(|w| w[2]).collect::<Vec<_>>(), 1e-6);
        masters::<bf16>(place, &rule, &start, &g, [&p, &m, &v]);
        masters::<f16>(place, &rule, &start, &g, [&p, &m, &v]);
    });
}

/// Masters take the f32 steps, bit for bit; parameters are the masters rounded.
fn masters<T: Float + PartialEq>(
    place: &str,
    rule: &AdamW,
    start: &[f32],
    g: &[f32],
    want: [&Vec<f32>; 3],
) {
    let mut master = start.to_vec();
    let (mut m, mut v) = (vec![0.0; g.len()], vec![0.0; g.len()]);
    let mut low = vec![T::zeroed(); g.len()];
    for t in 1..=3 {
        rule.step_masters(t, 0.5, &mut master, &mut low, g, &mut m, &mut v);
    }
    assert_eq!([&master, &m, &v], want, "{} {place}", T::NAME);
    assert!(low.iter().zip(&master).all(|(l, m)| *l == T::from_f32(*m)), "{} {place}", T::NAME);
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
                lamb.step(t, &mut p, &g, &mut m, &mut v, 0.5, &mut |_| {});
                reference::lamb(&lamb, t, &mut want, &halves);
            }
            same("lamb", [&p, &v], [0, 2].map(|i| want.iter().map(|w| w[i]).collect()));

            let (mut p, mut m) = (start.clone(), vec![0.0; n]);
            let mut want: Vec<[f64; 2]> = start.iter().map(|p| [f64::from(*p), 0.0]).collect();
            for _ in 0..3 {
                lars.step(&mut p, &g, &mut m, 0.5, &mut |_| {});
                reference::lars(&lars, &mut want, &halves);
            }
            same("lars", [&p, &m], [0, 1].map(|i| want.iter().map(|w| w[i]).collect()));
        }
    });
}

/// Steps of transformers' Adafactor and of came_pytorch, by `xtask/goldens/optimizers.py`.
#[test]
fn adafactor_and_came_step_as_their_references() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/optimizers.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> (Vec<usize>, Vec<f32>) {
        let t = golden.tensor(name).unwrap();
        let values = t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        (t.shape().to_vec(), values)
    };
    let adafactor = |lr, weight_decay, scale_parameter| Adafactor {
        lr,
        decay_rate: 0.8,
        eps: (1e-30, 1e-3),
        clip: 1.0,
        weight_decay,
        scale_parameter,
    };
    let came = Came {
        lr: 1e-2,
        betas: (0.9, 0.999, 0.9999),
        eps: (1e-30, 1e-16),
        clip: 1.0,
        weight_decay: 0.1,
    };
    everywhere(|place| {
        for case in ["adafactor", "adafactor_scaled", "came"] {
            for shape in ["matrix", "vector", "stack"] {
                let (dims, mut p) = floats(&format!("{case}.start.{shape}"));
                let piece = Piece::whole(&dims);
                let (mut first, mut second) = (piece.factors(), piece.factors());
                let mut m = vec![0.0; p.len()];
                for step in 0..4 {
                    let (_, g) = floats(&format!("{case}.grad.{step}.{shape}"));
                    let (t, alone) = (step + 1, &mut |_: &mut [f64]| {});
                    match case {
                        "adafactor" => adafactor(1e-2, 0.1, false)
                            .step(t, &piece, &mut p, &g, &mut first, 1.0, alone),
                        "adafactor_scaled" => adafactor(1e-1, 0.0, true)
                            .step(t, &piece, &mut p, &g, &mut first, 1.0, alone),
                        _ => {
                            let state = [&mut first, &mut second];
                            came.step(&piece, &mut p, &g, &mut m, state, 1.0, alone);
                        }
                    }
                }
                let want = wide(&floats(&format!("{case}.{shape}")).1);
                close(&format!("{case} {shape} {place}"), &p, &want, 2e-5);
            }
        }
    });
}

/// A parameter in two parts, whose holders sum their statistics, steps as the whole one does; on
/// any number of threads it does so bit for bit.
#[test]
fn adafactor_and_came_step_in_parts() {
    let (rows, cols) = (300, 150);
    // Columns 0..70 of all rows, and the rest: what tensor parallelism cuts.
    let cuts = [0..70, 70..cols];
    let (start, g): (Vec<f32>, Vec<f32>) = (noise(rows * cols, 1), noise(rows * cols, 2));
    let adafactor = Adafactor {
        lr: 1e-2,
        decay_rate: 0.8,
        eps: (1e-30, 1e-3),
        clip: 1.0,
        weight_decay: 0.1,
        scale_parameter: true,
    };
    let came = Came {
        lr: 1e-2,
        betas: (0.9, 0.999, 0.9999),
        eps: (1e-30, 1e-16),
        clip: 1.0,
        weight_decay: 0.1,
    };
    let steps = |piece: &Piece, start: &[f32], g: &[f32], sum: &mut dyn FnMut(&mut [f64])| {
        let (mut p, mut q, mut m) = (start.to_vec(), start.to_vec(), vec![0.0; start.len()]);
        let [mut a, mut b, mut c] = [0; 3].map(|_| piece.factors());
        for t in 1..=3 {
            adafactor.step(t, piece, &mut p, g, &mut a, 0.5, sum);
            came.step(piece, &mut q, g, &mut m, [&mut b, &mut c], 0.5, sum);
        }
        [p, q]
    };
    let first = std::cell::RefCell::new(None::<(Isa, [Vec<f32>; 2])>);
    everywhere(|place| {
        let whole = steps(&Piece::whole(&[rows, cols]), &start, &g, &mut |_| {});
        let before = first.replace(Some((isa(), whole.clone())));
        if let Some((on, before)) = before {
            assert!(on != isa() || before == whole, "{place}");
        }
        // The sums of each rank's n-th call, added up once both have come.
        let calls = std::sync::Mutex::new(vec![]);
        let barrier = std::sync::Barrier::new(2);
        let parts = std::thread::scope(|scope| {
            let ranks = cuts.clone().map(|cut| {
                let (calls, barrier, start, g, steps) = (&calls, &barrier, &start, &g, &steps);
                scope.spawn(move || {
                    let held = (0..rows).map(|r| (r * cols + cut.start, cut.len()));
                    let of = |x: &[f32]| -> Vec<f32> {
                        x.chunks(cols).flat_map(|r| r[cut.clone()].to_vec()).collect()
                    };
                    let mut sum = |x: &mut [f64]| {
                        let mut shared = calls.lock().unwrap();
                        shared.resize(x.len(), 0.0);
                        shared.iter_mut().zip(&*x).for_each(|(s, x)| *s += x);
                        drop(shared);
                        barrier.wait();
                        x.copy_from_slice(&calls.lock().unwrap());
                        barrier.wait();
                        calls.lock().unwrap().clear();
                        barrier.wait();
                    };
                    steps(&Piece::new(&[rows, cols], held), &of(start), &of(g), &mut sum)
                })
            });
            ranks.map(|r| r.join().unwrap())
        });
        for (cut, parts) in cuts.clone().into_iter().zip(parts) {
            for (part, whole) in parts.iter().zip(&whole) {
                let want: Vec<f64> =
                    whole.chunks(cols).flat_map(|r| wide(&r[cut.clone()])).collect();
                close(place, part, &want, 2e-6);
            }
        }
    });
}
