//! Flash attention and its gradient: every kind of mask, heads of every padding.

use colossal_kernels::cuda::{self, Stream};
use colossal_kernels::{
    AttentionBias, AttentionShape, Float, PagedShape, flash_attention, flash_attention_backward,
    paged_attention,
};

use crate::check::{Device, close, noise, rounding};

fn shapes(f: impl Fn(&AttentionShape<'_>)) {
    let plain = AttentionShape::new;
    f(&plain(1, 1, 1, 1, 1, 1));
    f(&plain(2, 1, 150, 4, 2, 16));
    f(&plain(1, 150, 150, 2, 2, 16));
    // Few queries: keys in splits.
    f(&plain(1, 3, 700, 2, 1, 64));
    f(&plain(1, 1, 300, 10, 2, 40));
    f(&plain(1, 1, 100, 1, 1, 128));
    f(&plain(1, 2, 90, 2, 2, 250));
    f(&AttentionShape { window: Some(100), ..plain(1, 4, 600, 2, 2, 32) });
    f(&AttentionShape { causal: false, ..plain(2, 2, 131, 6, 2, 7) });
    f(&plain(1, 70, 200, 4, 2, 24));
    f(&plain(1, 75, 130, 2, 1, 40));
    f(&plain(1, 70, 70, 2, 1, 64));
    f(&plain(1, 40, 40, 1, 1, 128));
    f(&plain(1, 20, 40, 1, 1, 200));
    f(&AttentionShape { causal: false, ..plain(2, 66, 131, 2, 1, 8) });
    f(&AttentionShape { window: Some(20), ..plain(1, 140, 140, 2, 2, 12) });
    let (q_lens, kv_lens) = ([40, 0, 70], [60, 5, 33]);
    let packed = AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        ..plain(3, 70, 80, 2, 1, 16)
    };
    f(&packed);
    f(&AttentionShape { causal: false, ..packed });
    let data: Vec<f32> = noise(2 * 30 * 50, 3);
    let bias = AttentionBias { data: &data, batch_stride: 0, head_stride: 30 * 50 };
    f(&AttentionShape { bias: Some(bias), ..plain(2, 30, 50, 2, 2, 16) });
    f(&AttentionShape { bias: Some(bias), causal: false, ..plain(1, 30, 50, 2, 2, 16) });
    f(&AttentionShape { bias: Some(bias), ..plain(1, 3, 50, 2, 2, 16) });
}

/// Errors are measured by the largest element: a gradient is a sum of terms that cancel.
fn near<T: Float>(what: &str, s: &AttentionShape<'_>, got: &[T], want: &[T], tolerance: f32) {
    let largest = want.iter().map(|x| x.to_f32().abs()).fold(1e-3, f32::max);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let off = (g.to_f32() - w.to_f32()).abs();
        let text = || format!("{what} of {} at {i}: {g:?}, not {w:?}; {s:?}", T::NAME);
        // A NaN is off too.
        assert!(off <= (tolerance + rounding::<T>()) * largest, "{}", text());
    }
}

fn attentions<T: Float>(stream: &Stream) {
    shapes(|s| {
        let n = s.batch * s.q_len * s.heads * s.head_dim;
        let kv = s.batch * s.kv_len * s.kv_heads * s.head_dim;
        let rows = s.batch * s.heads * s.q_len;
        let [q, k, v, dout] = [(n, 1), (kv, 2), (kv, 3), (n, 4)].map(|(n, i)| noise::<T>(n, i));
        let (mut out, mut lse) = (noise::<T>(n, 5), vec![0.0f32; rows]);
        let (mut dq, mut dk, mut dv) = (noise::<T>(n, 6), noise::<T>(kv, 7), noise::<T>(kv, 8));
        let [mut out2, mut dq2] = [&out, &dq].map(|x| Device::new(stream, x, 0));
        let [mut dk2, mut dv2] = [&dk, &dv].map(|x| Device::new(stream, x, 0));
        let mut lse2 = Device::new(stream, &lse, 0);
        flash_attention(s, &q, &k, &v, &mut out, &mut lse);
        flash_attention_backward(s, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv);
        // One operand that no vector can be read from.
        for skip in [0, 1] {
            let q2 = Device::new(stream, &q, skip);
            let [k2, v2, dout2] = [&k, &v, &dout].map(|x| Device::new(stream, x, 0));
            let (q2, k2, v2, dout2) = (q2.all(), k2.all(), v2.all(), dout2.all());
            let (o, l) = (out2.all_mut(), lse2.all_mut());
            cuda::flash_attention(stream, s, q2, k2, v2, o, l).unwrap();
            near("attention", s, &out2.get(), &out, 1e-5);
            for (got, want) in lse2.get().iter().zip(&lse) {
                let close = got == want || (got - want).abs() < 1e-5 + rounding::<T>();
                assert!(close, "log-sum-exp {got}, not {want}; {s:?}");
            }
            let (o, l) = (out2.all(), lse2.all());
            let (gq, gk, gv) = (dq2.all_mut(), dk2.all_mut(), dv2.all_mut());
            cuda::flash_attention_backward(stream, s, q2, k2, v2, o, l, dout2, gq, gk, gv).unwrap();
            near("dq", s, &dq2.get(), &dq, 2e-5);
            near("dk", s, &dk2.get(), &dk, 2e-5);
            near("dv", s, &dv2.get(), &dv, 2e-5);
        }
    });
}

/// A cache with room beyond the keys.
fn caches<T: Float>(stream: &Stream) {
    let (q_lens, kv_lens) = ([2, 1, 0], [70, 9, 3]);
    let row = 2 * 32;
    let s = AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        kv_batch_stride: 90 * row,
        ..AttentionShape::new(3, 2, 70, 4, 2, 32)
    };
    let (n, kv, rows) = (3 * 2 * 4 * 32, 3 * 90 * row, 3 * 4 * 2);
    let [q, k, v] = [(n, 1), (kv, 2), (kv, 3)].map(|(n, i)| noise::<T>(n, i));
    let (mut out, mut lse) = (noise::<T>(n, 5), vec![0.0f32; rows]);
    let [q2, k2, v2] = [&q, &k, &v].map(|x| Device::new(stream, x, 0));
    let (mut out2, mut lse2) = (Device::new(stream, &out, 0), Device::new(stream, &lse, 0));
    flash_attention(&s, &q, &k, &v, &mut out, &mut lse);
    let (o, l) = (out2.all_mut(), lse2.all_mut());
    cuda::flash_attention(stream, &s, q2.all(), k2.all(), v2.all(), o, l).unwrap();
    near("attention to a cache", &s, &out2.get(), &out, 1e-5);
}

/// By Hopper's own instructions: tiles that end anywhere, every mask that they take.
fn hopper<T: Float>(stream: &Stream, most: usize) {
    let plain = AttentionShape::new;
    let (q_lens, kv_lens) = ([150, 0, 40], [290, 5, 33]);
    let lengths = AttentionShape {
        q_lens: Some(&q_lens),
        kv_lens: Some(&kv_lens),
        ..plain(3, 150, 300, 2, 1, 64)
    };
    for s in [
        plain(1, 128, 128, 1, 1, 128),
        plain(2, 130, 130, 4, 2, 64),
        plain(1, 33, 700, 2, 1, 128),
        plain(1, 140, 60, 1, 1, 64),
        AttentionShape { causal: false, ..plain(1, 70, 520, 2, 2, 128) },
        AttentionShape { causal: false, ..lengths },
        AttentionShape { kv_batch_stride: 310 * 64, ..lengths },
        lengths,
    ]
    .into_iter()
    .take(most)
    {
        let room = s.batch * (s.kv_batch_stride / (s.kv_heads * s.head_dim)).max(s.kv_len);
        let (n, kv) = (s.batch * s.q_len * s.heads * s.head_dim, room * s.kv_heads * s.head_dim);
        let [mut q, mut k, mut v, mut dout] =
            [(n, 1), (kv, 2), (kv, 3), (n, 4)].map(|(n, i)| noise::<T>(n, i));
        // Rows that are not real may be anything.
        if s.kv_batch_stride == 0 {
            let (heads, kv_heads) = (s.heads, s.kv_heads);
            for (lens, rows, heads, mut x) in [
                (s.kv_lens, s.kv_len, kv_heads, [&mut k, &mut v]),
                (s.q_lens, s.q_len, heads, [&mut q, &mut dout]),
            ] {
                for (b, len) in lens.into_iter().flatten().enumerate() {
                    let row = heads * s.head_dim;
                    let own = (b * rows + *len as usize) * row..(b + 1) * rows * row;
                    x.iter_mut().for_each(|x| x[own.clone()].fill(T::from_f32(f32::NAN)));
                }
            }
        }
        let (mut out, mut lse) = (noise::<T>(n, 5), vec![0.0f32; s.batch * s.heads * s.q_len]);
        let [q2, k2, v2] = [&q, &k, &v].map(|x| Device::new(stream, x, 0));
        let (mut out2, mut lse2) = (Device::new(stream, &out, 0), Device::new(stream, &lse, 0));
        flash_attention(&s, &q, &k, &v, &mut out, &mut lse);
        let (o, l) = (out2.all_mut(), lse2.all_mut());
        cuda::flash_attention(stream, &s, q2.all(), k2.all(), v2.all(), o, l).unwrap();
        near("attention on Hopper", &s, &out2.get(), &out, 1e-5);
        for (got, want) in lse2.get().iter().zip(&lse) {
            let close = got == want || (got - want).abs() < 1e-5 + rounding::<T>();
            assert!(close, "log-sum-exp {got}, not {want}; {s:?}");
        }
        if s.kv_batch_stride > 0 {
            continue;
        }
        let [mut dq, mut dk, mut dv] = [n, kv, kv].map(|n| noise::<T>(n, 6));
        let [mut dq2, mut dk2, mut dv2] = [&dq, &dk, &dv].map(|x| Device::new(stream, x, 0));
        flash_attention_backward(&s, &q, &k, &v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv);
        let (o, l, dout2) = (out2.all(), lse2.all(), Device::new(stream, &dout, 0));
        let (q2, k2, v2, dout2) = (q2.all(), k2.all(), v2.all(), dout2.all());
        let (gq, gk, gv) = (dq2.all_mut(), dk2.all_mut(), dv2.all_mut());
        cuda::flash_attention_backward(stream, &s, q2, k2, v2, o, l, dout2, gq, gk, gv).unwrap();
        near("dq on Hopper", &s, &dq2.get(), &dq, 2e-5);
        near("dk on Hopper", &s, &dk2.get(), &dk, 2e-5);
        near("dv on Hopper", &s, &dv2.get(), &dv, 2e-5);
    }
}

#[test]
fn on_hopper() {
    if let Some(stream) = crate::check::hopper() {
        hopper::<half::bf16>(&stream, 8);
        // But for conversions the same.
        hopper::<half::f16>(&stream, 1);
    }
}

/// A cache in pages, out of order, some shared; one sequence is empty, one ends within a page.
fn pages<T: Float>(stream: &Stream) {
    for (heads, kv_heads, head_dim, page) in [(4, 2, 32, 16), (5, 1, 20, 4), (2, 2, 96, 64)] {
        let s = PagedShape { batch: 4, heads, kv_heads, head_dim, page, scale: 0.3 };
        let lens = [page as i32 * 5, 0, page as i32 * 3 + 1, 1];
        // -1 where nothing is read.
        let table = [7, 2, 9, 0, 4, -1, -1, -1, -1, -1, 3, 2, 1, 5, -1, 8, -1, -1, -1, -1];
        let (n, kv) = (4 * heads * head_dim, 10 * page * kv_heads * head_dim);
        let [q, k, v] = [(n, 1), (kv, 2), (kv, 3)].map(|(n, i)| noise::<T>(n, i));
        let (mut out, mut lse) = (noise::<T>(n, 5), vec![0.0f32; 4 * heads]);
        let [q2, k2, v2] = [&q, &k, &v].map(|x| Device::new(stream, x, 0));
        let (mut out2, mut lse2) = (Device::new(stream, &out, 0), Device::new(stream, &lse, 0));
        paged_attention(&s, &q, &k, &v, &table, &lens, &mut out, &mut lse);
        let mut run = |table: &[i32]| {
            let (table, lens) = (Device::new(stream, table, 0), Device::new(stream, &lens, 0));
            let (k, v, o, l) = (k2.all(), v2.all(), out2.all_mut(), lse2.all_mut());
            cuda::paged_attention(stream, &s, q2.all(), k, v, table.all(), lens.all(), o, l)
                .unwrap();
            (out2.get(), lse2.get())
        };
        let (got, got_lse) = run(&table);
        close("paged_attention", &got, &out, 1e-5);
        close("paged_attention, log-sum-exp", &got_lse, &lse, 1e-5 + rounding::<T>());
        // A page that does not exist is no page of zeros.
        let mut wrong = table;
        wrong[2] = 10;
        let row = heads * head_dim;
        assert!(run(&wrong).0[..row].iter().all(|x| x.to_f32().is_nan()));
    }
}

mod each {
    crate::check::each_type! { attentions caches pages }
}

#[test]
fn heads_that_are_too_large_are_refused() {
    let Some(stream) = crate::check::stream() else { return };
    let s = AttentionShape::new(1, 1, 1, 1, 1, 300);
    let x = Device::new(&stream, &noise::<f32>(300, 1), 0);
    let (mut out, mut lse) =
        (Device::new(&stream, &[0.0f32; 300], 0), Device::new(&stream, &[0.0f32], 0));
    let (o, l) = (out.all_mut(), lse.all_mut());
    let error = cuda::flash_attention(&stream, &s, x.all(), x.all(), x.all(), o, l).unwrap_err();
    assert!(error.to_string().contains("256"), "{error}");
}
