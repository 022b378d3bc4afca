//! Products against f64, all layouts, epilogues, strides and types.

use colossal_kernels::*;
use half::{bf16, f16};
use proptest::prelude::*;

use crate::check::{activation, at_its_best, close, everywhere, noise, rounding, transposed, wide};

const SHAPES: [[usize; 3]; 18] = [
    [17, 40, 0],
    [1, 1, 1],
    [1, 37, 65],
    [1, 200, 1500],
    [3, 5, 7],
    [7, 130, 64],
    [8, 37, 1700],
    [19, 50, 801],
    [3, 20, 2100],
    [12, 250, 1100],
    [14, 32, 64],
    [15, 33, 17],
    [49, 70, 33],
    [65, 100, 2],
    [100, 65, 1],
    [60, 65, 1030],
    [113, 259, 130],
    // Two and three threads each take their columns.
    [300, 700, 19],
];

fn products<T: Float, O: Float>(place: &str) {
    for (seed, [m, n, k]) in SHAPES.into_iter().enumerate() {
        let (a, b): (Vec<T>, Vec<T>) =
            (noise(m * k, seed as u64 + 1), noise(k * n, seed as u64 + 50));
        let (bias, before): (Vec<T>, Vec<O>) = (noise(n, 7), noise(m * n, 8));
        let biases = wide(&bias);
        let (gate, rest): (Vec<T>, Vec<T>) = (noise(m * n, 9), noise(m * (n + 3), 10));
        let residual = Mat::new(&rest, m, n);
        let silu = |x: f32| f64::from(x) / (1.0 + (-f64::from(x)).exp());
        let product = reference::gemm(m, n, k, &wide(&a), &wide(&b));
        let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
        for layout in if m < 300 { 0..4 } else { 1..3 } {
            let kinds = [
                Activation::None,
                Activation::Relu,
                Activation::Silu,
                Activation::Gelu,
                Activation::GeluTanh,
            ];
            let kind = kinds[(seed + layout) % 5];
            let a = if layout & 1 == 0 { Mat::new(&a, m, k) } else { Mat::new(&at, k, m).t() };
            let b = if layout & 2 == 0 { Mat::new(&b, k, n) } else { Mat::new(&bt, n, k).t() };
            let name = format!(
                "gemm {} {} {m}x{n}x{k}, layout {layout}, {kind:?}, {place}",
                T::NAME,
                O::NAME
            );
            let tolerance = 1e-6 * (k as f64).sqrt() + 2e-6 + rounding::<O>();
            let mut c = before.clone();
            gemm(a, b, MatMut::new(&mut c, m, n), &Epilogue::default());
            close(&name, &c, &product, tolerance);
            let mut c = before.clone();
            let add = Epilogue { accumulate: true, ..Epilogue::default() };
            gemm(a, b, MatMut::new(&mut c, m, n), &add);
            let sum: Vec<f64> = product.iter().zip(wide(&before)).map(|(x, y)| x + y).collect();
            close(&format!("{name}, added"), &c, &sum, 2.0 * tolerance);
            // Sums alone go another way than sums before an activation.
            let sums = (1.0, false, Activation::None, false);
            for (alpha, accumulate, kind, gated) in [(0.5, true, kind, seed % 2 == 0), sums] {
                let e = Epilogue {
                    alpha,
                    accumulate,
                    bias: (accumulate || layout > 0).then_some(&bias),
                    activation: kind,
                    gate: gated.then_some(Mat::new(&gate, m, n)),
                    residual: (layout != 1).then_some(Mat { row_stride: n + 3, ..residual }),
                };
                let mut c = before.clone();
                gemm(a, b, MatMut::new(&mut c, m, n), &e);
                let want = |(i, x): (usize, &f64)| {
                    let x = f64::from(alpha) * x + e.bias.map_or(0.0, |_| biases[i % n]);
                    let x = activation(kind, x) * if gated { silu(gate[i].to_f32()) } else { 1.0 };
                    let before = if accumulate { f64::from(before[i].to_f32()) } else { 0.0 };
                    let at = i / n * (n + 3) + i % n;
                    before + x + e.residual.map_or(0.0, |r| f64::from(r.data[at].to_f32()))
                };
                let want: Vec<f64> = product.iter().enumerate().map(want).collect();
                close(&name, &c, &want, 3.0 * tolerance);
            }
        }
    }
}

#[test]
fn products_of_all_layouts_and_epilogues() {
    everywhere(|place| {
        products::<f32, f32>(place);
        products::<bf16, f32>(place);
        products::<bf16, bf16>(place);
        products::<f16, f32>(place);
    });
}

/// Rows are cut into tiles, whose last one has what is left: every number of rows has its kernel.
fn any_number_of_rows<T: Float>(place: &str) {
    let (n, k) = (26, 70);
    let (a, b): (Vec<T>, Vec<T>) = (noise(64 * k, 1), noise(n * k, 2));
    let bt = transposed(&wide(&b), n, k);
    for m in 1..=64 {
        let a = &a[..m * k];
        let want = reference::gemm(m, n, k, &wide(a), &bt);
        let mut c = vec![0.0f32; m * n];
        let (a, b) = (Mat::new(a, m, k), Mat::new(&b, n, k).t());
        gemm(a, b, MatMut::new(&mut c, m, n), &Epilogue::default());
        close(&format!("{m} rows of {}, {place}", T::NAME), &c, &want, 2e-5);
    }
}

#[test]
fn any_number_of_rows_has_its_kernel() {
    everywhere(|place| {
        any_number_of_rows::<f32>(place);
        any_number_of_rows::<bf16>(place);
    });
}

/// Rows so few that weights are not packed: columns in groups or blocks, which threads take in pieces, depth in
/// parts or steps, each with a rest; rows of both operands further apart than they are long. And columns so few,
/// which are taken for rows.
fn few_rows_in_groups_and_parts<T: Float>(place: &str) {
    for (n, k) in [(523, 2083), (130, 67), (4, 12_301)] {
        let (apart_a, apart_b, apart_t) = (k + 3, k + 5, n + 9);
        let (a, b): (Vec<T>, Vec<T>) = (noise(48 * apart_a, 1), noise(n * apart_b, 2));
        let dense = |x: &[T], apart: usize| -> Vec<T> {
            x.chunks(apart).flat_map(|row| &row[..k]).copied().collect()
        };
        let bt = transposed(&dense(&b, apart_b), n, k);
        let product = reference::gemm(48, n, k, &wide(&dense(&a, apart_a)), &wide(&bt));
        // The same weights with rows along the result.
        let rows = bt.chunks(n).flat_map(|row| {
            let rest: Vec<T> = noise(apart_t - n, 3);
            row.iter().copied().chain(rest)
        });
        let rows: Vec<T> = rows.collect();
        let columns = Mat { row_stride: apart_b, ..Mat::new(&b, n, k) }.t();
        let rows = Mat { row_stride: apart_t, ..Mat::new(&rows, k, n) };
        for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 31, 48] {
            let a = Mat { row_stride: apart_a, ..Mat::new(&a, m, k) };
            let steps = transposed(&dense(&a.data[..m * apart_a], apart_a), m, k);
            let steps = Mat::new(&steps, k, m).t();
            let want = &product[..m * n];
            let flipped = transposed(want, m, n);
            let tolerance = 1e-6 * (k as f64).sqrt();
            for (layout, b) in [("columns", columns), ("rows", rows)] {
                for (depth, a) in [("rows", a), ("steps", steps)] {
                    let name = format!("{m}x{n}x{k} of {}, {depth} {layout}, {place}", T::NAME);
                    let mut c = vec![f32::NAN; m * n];
                    gemm(a, b, MatMut::new(&mut c, m, n), &Epilogue::default());
                    close(&name, &c, want, tolerance);
                    c.fill(f32::NAN);
                    gemm(b.t(), a.t(), MatMut::new(&mut c, n, m), &Epilogue::default());
                    close(&format!("{name}, transposed"), &c, &flipped, tolerance);
                }
            }
        }
    }
}

#[test]
fn few_rows_or_columns_of_any_layout_and_size() {
    everywhere(|place| {
        few_rows_in_groups_and_parts::<f32>(place);
        few_rows_in_groups_and_parts::<bf16>(place);
    });
}

/// More packed columns than stay near come in parts, each with its own of bias and residual; an odd depth of
/// more than one pass.
#[test]
fn columns_that_do_not_stay_near_come_in_parts() {
    let (m, n, k) = (60, 2100, 517);
    let (a, b): (Vec<f32>, Vec<f32>) = (noise(m * k, 1), noise(k * n, 2));
    let (bias, residual): (Vec<f32>, Vec<f32>) = (noise(n, 3), noise(m * n, 4));
    let mut want = reference::gemm(m, n, k, &wide(&a), &wide(&b));
    for (i, x) in want.iter_mut().enumerate() {
        *x += f64::from(bias[i % n]) + f64::from(residual[i]);
    }
    everywhere(|place| {
        let residual = Some(Mat::new(&residual, m, n));
        let e = Epilogue { bias: Some(&bias), residual, ..Epilogue::default() };
        let mut c = vec![f32::NAN; m * n];
        gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), &e);
        close(place, &c, &want, 3e-5);
    });
}

/// Operands may repeat one row or one column: a stride of zero.
#[test]
fn operands_with_a_stride_of_zero() {
    let (m, n, k) = (60, 40, 30);
    let (row, ones) = (noise::<f32>(k, 1), vec![1.0f32; k * n]);
    let sum: f64 = wide(&row).iter().sum();
    everywhere(|place| {
        let a = Mat { row_stride: 0, ..Mat::new(&row, m, k) };
        let mut c = vec![f32::NAN; m * n];
        gemm(a, Mat::new(&ones, k, n), MatMut::new(&mut c, m, n), &Epilogue::default());
        close(place, &c, &vec![sum; m * n], 1e-5);
        let mut c = vec![f32::NAN; n * m];
        gemm(Mat::new(&ones, n, k), a.t(), MatMut::new(&mut c, n, m), &Epilogue::default());
        close(place, &c, &vec![sum; m * n], 1e-5);
    });
}

#[test]
fn four_threads_cut_rows_and_columns() {
    let (m, n, k) = (600, 520, 9);
    let (a, b): (Vec<f32>, Vec<f32>) = (noise(m * k, 1), noise(k * n, 2));
    let want = reference::gemm(m, n, k, &wide(&a), &wide(&b));
    threads::set(Threads::new(4));
    let mut c = vec![0.0f32; m * n];
    gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), MatMut::new(&mut c, m, n), &Epilogue::default());
    close("600 x 520 on four threads", &c, &want, 1e-5);
}

/// Who is done takes work from others: whoever computes a tile, it is the same.
#[test]
fn work_taken_from_another_thread_gives_the_same_bits() {
    at_its_best(|| {
        for [m, n, k] in [[600, 520, 300], [1000, 300, 129], [300, 1100, 65]] {
            let (a, b): (Vec<f32>, Vec<f32>) = (noise(m * k, 1), noise(k * n, 2));
            let nt = (Mat::new(&a, m, k), Mat::new(&b, n, k).t());
            let tn = (Mat::new(&a, k, m).t(), Mat::new(&b, k, n));
            for (a, b) in [nt, tn] {
                let on = |threads: usize| {
                    threads::set(Threads::new(threads));
                    let mut c = vec![f32::NAN; m * n];
                    gemm(a, b, MatMut::new(&mut c, m, n), &Epilogue::default());
                    c
                };
                let want = on(1);
                for round in 0..12 {
                    let threads = 2 + round % 3;
                    assert!(on(threads) == want, "{m}x{n}x{k}, {threads} threads, round {round}");
                }
            }
        }
    });
}

#[test]
fn columns_read_where_they_lie_give_the_bits_of_packed_ones() {
    at_its_best(|| {
        // Rows of whole lines, so many floats apart; in one pass, in parts of the depth, by cells; of 70
        // columns, no whole panels, which are packed after all.
        for (m, n, k, apart) in [
            (49, 32, 3, 48),
            (61, 96, 200, 112),
            (57, 64, 700, 64),
            (63, 70, 100, 80),
            (70, 96, 2100, 176),
            (300, 672, 37, 688),
            (300, 544, 300, 592),
        ] {
            let a: Vec<f32> = noise(m * k, 1);
            let from: Vec<f32> = noise(k * apart, 2);
            let mut lines = memory::Block::zeroed(4 * (from.len() + 1));
            let mut product = |shift: usize, threads: usize| {
                threads::set(Threads::new(threads));
                let lines =
                    bytemuck::cast_slice_mut::<u8, f32>(lines.bytes_mut(4 * (from.len() + 1)));
                lines[shift..shift + from.len()].copy_from_slice(&from);
                // The last row ends where the columns do.
                let data = &lines[shift..shift + (k - 1) * apart + n];
                let b = Mat { data, rows: k, cols: n, row_stride: apart, col_stride: 1 };
                let mut c = vec![0.0f32; m * n];
                gemm(Mat::new(&a, m, k), b, MatMut::new(&mut c, m, n), &Epilogue::default());
                c
            };
            let packed = product(1, 2);
            for threads in 1..4 {
                assert_eq!(product(0, threads), packed, "{m}x{n}x{k}, {threads} threads");
            }
            let dense: Vec<f32> = from.chunks(apart).flat_map(|row| &row[..n]).copied().collect();
            let want = reference::gemm(m, n, k, &wide(&a), &wide(&dense));
            close(&format!("{m}x{n}x{k}"), &packed, &want, 1e-6 * (k as f64).sqrt() + 2e-6);
        }
    });
}

#[test]
fn batched_products_take_strides() {
    everywhere(|place| {
        let (batch, m, n, k) = (5, 6, 9, 20);
        let (a, b): (Vec<f32>, Vec<f32>) = (noise(batch * m * k, 1), noise(k * n, 2));
        let mut c = vec![0.0f32; batch * (m * n + 3)];
        let out = MatMut::new(&mut c, m, n);
        let (a_mat, b_mat) = (Mat::new(&a, m, k), Mat::new(&b, k, n));
        gemm_batched(batch, a_mat, m * k, b_mat, 0, out, m * n + 3, &Epilogue::default());
        for i in 0..batch {
            let want = reference::gemm(m, n, k, &wide(&a[i * m * k..(i + 1) * m * k]), &wide(&b));
            let at = i * (m * n + 3);
            close(place, &c[at..at + m * n], &want, 1e-5);
            assert_eq!(c[at + m * n..at + m * n + 3], [0.0; 3]);
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_of_any_strides(
        m in 1usize..70, n in 1usize..80, k in 0usize..90, gap in 0usize..3, step in 1usize..3, layout in 0usize..8,
    ) {
        // A matrix with gaps between rows and between elements, maybe stored by columns.
        let strides = |rows: usize, cols: usize, flip: bool| match flip {
            false => (cols * step + gap, step),
            true => (step, rows * step + gap),
        };
        let size = |rows: usize, cols: usize| (rows * step + gap + 1) * (cols * step + gap + 1);
        let (a, b): (Vec<f32>, Vec<f32>) = (noise(size(m, k), 1), noise(size(k, n), 2));
        let (ra, ca) = strides(m, k, layout & 1 != 0);
        let (rb, cb) = strides(k, n, layout & 2 != 0);
        let (rc, cc) = strides(m, n, layout & 4 != 0);
        let mut c = vec![9.0f32; size(m, n)];
        gemm(
            Mat { data: &a, rows: m, cols: k, row_stride: ra, col_stride: ca },
            Mat { data: &b, rows: k, cols: n, row_stride: rb, col_stride: cb },
            MatMut { data: &mut c, rows: m, cols: n, row_stride: rc, col_stride: cc },
            &Epilogue::default(),
        );
        let mut want = vec![9.0f64; size(m, n)];
        for i in 0..m {
            for j in 0..n {
                want[i * rc + j * cc] = (0..k)
                    .map(|l| f64::from(a[i * ra + l * ca]) * f64::from(b[l * rb + j * cb]))
                    .sum();
            }
        }
        close("gemm of any strides", &c, &want, 1e-5);
    }
}

#[test]
#[should_panic(expected = "elements of c overlap")]
fn a_product_into_overlapping_rows_is_refused() {
    let x = [1.0f32; 4];
    let mut c = [0.0f32; 4];
    let c = MatMut { data: &mut c, rows: 2, cols: 2, row_stride: 1, col_stride: 1 };
    gemm(Mat::new(&x, 2, 2), Mat::new(&x, 2, 2), c, &Epilogue::default());
}

#[test]
fn grouped_products_equal_single_ones() {
    everywhere(|place| {
        let (n, k) = (70, 33);
        // A product without rows, few rows, many; the last is deep.
        let rows = [0, 3, 100, 61, 1];
        let (x, w) = (noise::<f32>(200 * 1100, 1), noise::<f32>(6 * n * 1100, 2));
        for accumulate in [false, true] {
            let e = Epilogue { accumulate, ..Epilogue::default() };
            let mut products = Vec::new();
            let (mut at, mut end) = (0, 0);
            for (i, m) in rows.into_iter().enumerate() {
                let b = Mat::new(&w[i * n * k..][..n * k], n, k).t();
                products.push(Product { a: Mat::new(&x[at * k..][..m * k], m, k), b, at: end });
                (at, end) = (at + m, end + m * n);
            }
            let deep = Mat::new(&x[..1100 * 20], 1100, 20).t();
            products.push(Product { a: deep, b: Mat::new(&w[..1100 * n], 1100, n), at: end + 5 });
            let mut y: Vec<f32> = noise(end + 5 + 20 * n, 3);
            let mut expected = y.clone();
            for Product { a, b, at } in &products {
                let c = &mut expected[*at..at + a.rows * b.cols];
                gemm(*a, *b, MatMut::new(c, a.rows, b.cols), &e);
            }
            gemm_grouped(&products, &mut y, &e);
            let expected = wide(&expected);
            close(place, &y[..end], &expected[..end], 1e-6);
            // A single product may add up its depth in passes: the order of 1100 terms.
            close(place, &y[end..], &expected[end..], 2e-5);
        }
    });
}
