//! Work that is recorded once and launched again: the same results, from memory that stays.

use colossal_kernels::AttentionShape;
use colossal_kernels::cuda::{self, Block, Error, Graph, Stream};

use crate::check::{Device, close, noise};

/// A step of decoding in small: rows by ids, a product, attention over as many keys as the device knows.
#[test]
fn a_graph_computes_from_what_the_device_holds_at_its_launch() {
    let Some(stream) = crate::check::stream() else { return };
    let (heads, dim, most) = (2, 16, 200);
    let row = heads * dim;
    let shape = AttentionShape::new(2, 1, most, heads, heads, dim);
    let (table, w) = (noise::<f32>(8 * row, 1), noise::<f32>(row * row, 2));
    let [k, v] = [3, 4].map(|seed| noise::<f32>(2 * most * row, seed));
    let [k2, v2, table2, w2] = [&k, &v, &table, &w].map(|x| Device::new(&stream, x, 0));
    let mut numbers = Device::new(&stream, &[1, 2, 0, 0], 0);
    let mut x = Device::new(&stream, &vec![0.0f32; 2 * row], 0);
    let mut q = Device::new(&stream, &vec![0.0f32; 2 * row], 0);
    let mut out = Device::new(&stream, &vec![-7.0f32; 2 * row], 0);
    let mut lse = Device::new(&stream, &[0.0f32; 2 * 2], 0);

    let ids = numbers.all().range(0..2);
    let lens = numbers.all().range(2..4);
    let (ids, lens) = (ids.address(), lens.address());
    let mut step = || {
        // SAFETY: `numbers` outlives the graph, and is written in the order of the stream.
        let (ids, lens) =
            unsafe { (cuda::Slice::from_raw(ids, 2), cuda::Slice::from_raw(lens, 2)) };
        cuda::embedding(&stream, ids, table2.all(), row, x.all_mut())?;
        let (a, b) = (cuda::Mat::new(x.all(), 2, row), cuda::Mat::new(w2.all(), row, row).t());
        let c = cuda::MatMut::new(q.all_mut(), 2, row);
        cuda::gemm(&stream, a, b, c, &cuda::Epilogue::default())?;
        let (o, l) = (out.all_mut(), lse.all_mut());
        cuda::cached_attention(&stream, &shape, lens, q.all(), k2.all(), v2.all(), o, l)
    };
    step().unwrap();
    // SAFETY: all of its operands are dropped after it.
    let (graph, ()) = unsafe { Graph::record::<_, Error>(&stream, &mut step) }.unwrap();
    // Not recorded: what is put on the stream in between.
    stream.zero(out.all_mut()).unwrap();
    assert!(out.get().iter().all(|x| *x == 0.0));
    let before = stream.graph_launches();
    let cases = [[3, 7, 1, 200], [0, 0, 70, 3], [5, 6, 0, 129]];
    for [a, b, m, n] in cases {
        stream.upload(&[a, b, m, n], numbers.all_mut()).unwrap();
        graph.launch().unwrap();
        let rows = [a, b].map(|id| &table[id as usize * row..][..row]).concat();
        let mut query = vec![0.0f32; 2 * row];
        for (y, x) in query.chunks_mut(row).zip(rows.chunks(row)) {
            for (y, w) in y.iter_mut().zip(w.chunks(row)) {
                *y = x.iter().zip(w).map(|(x, w)| x * w).sum();
            }
        }
        let lens = [m, n];
        let here = AttentionShape { kv_lens: Some(&lens), ..shape };
        let (mut want, mut want_lse) = (vec![0.0f32; 2 * row], [0.0f32; 4]);
        colossal_kernels::flash_attention(&here, &query, &k, &v, &mut want, &mut want_lse);
        close("a graph's attention", &out.get(), &want, 2e-5);
        close("a graph's log-sum-exp", &lse.get(), &want_lse, 2e-5);
    }
    assert_eq!(stream.graph_launches() - before, cases.len() as u64);
}

/// What waits for the device, or asks it for memory, has no place in a graph.
#[test]
fn what_cannot_be_recorded_is_refused_and_the_stream_goes_on() {
    let Some(stream) = crate::check::stream() else { return };
    let x = Device::new(&stream, &[1.0f32, 2.0, 3.0], 0);
    let mut y = Device::new(&stream, &[0.0f32; 3], 0);
    type Forbidden<'a> = &'a mut dyn FnMut() -> Result<(), Error>;
    let mut other = Device::new(&stream, &[0.0f32; 3], 0);
    let forbidden: [(&str, Forbidden<'_>); 4] = [
        ("allocating", &mut || Block::new(stream.device(), 64).map(drop)),
        ("waiting", &mut || stream.synchronize()),
        ("copying from", &mut || stream.download(x.all(), &mut [0.0; 3])),
        ("copying to", &mut || stream.upload(&[9.0; 3], other.all_mut())),
    ];
    for (name, call) in forbidden {
        // SAFETY: the operands outlive what is recorded, which is nothing.
        let error = unsafe { Graph::record::<_, Error>(&stream, call) }.unwrap_err();
        assert!(error.is_capture() && error.to_string().contains(name), "{error}");
    }
    // A call that fails and is not looked at voids the recording too.
    // SAFETY: as above.
    let error = unsafe {
        Graph::record::<_, Error>(&stream, || {
            let _ = stream.synchronize();
            cuda::scale(&stream, x.all(), 2.0, y.all_mut())
        })
    };
    assert!(error.unwrap_err().is_capture());
    // And a panic ends it.
    let panics = std::panic::AssertUnwindSafe(|| {
        // SAFETY: as above.
        let _ = unsafe { Graph::record::<(), Error>(&stream, || panic!("on purpose")) };
    });
    assert!(std::panic::catch_unwind(panics).is_err());
    cuda::scale(&stream, x.all(), 2.0, y.all_mut()).unwrap();
    assert_eq!(y.get(), [2.0, 4.0, 6.0]);
}

#[test]
fn a_graph_gives_its_scratch_back() {
    // What blocks hold is counted by device.
    if cuda::devices().map_or(0, |d| d.len()) < 6 {
        return println!("fewer than six devices: nothing was run");
    }
    let _alone = crate::check::LAST_DEVICE.lock().unwrap_or_else(|e| e.into_inner());
    let stream = Stream::new(5).unwrap();
    let shape = AttentionShape::new(1, 1, 300, 1, 1, 16);
    let keys = Device::new(&stream, &noise::<f32>(300 * 16, 1), 0);
    let mut out = Device::new(&stream, &[0.0f32; 16], 0);
    let mut lse = Device::new(&stream, &[0.0f32], 0);
    let lens = Device::new(&stream, &[299], 0);
    let (ids, dy) = (Device::new(&stream, &[3], 0), Device::new(&stream, &[1.0f32], 0));
    let mut dtable = Device::new(&stream, &vec![0.0f32; 100_000], 0);
    let mut small = Device::new(&stream, &[0.0f32; 8], 0);
    let q = keys.all().range(0..16).address();
    let mut step = || {
        // SAFETY: a part of `keys`, which outlives the graph.
        let q = unsafe { cuda::Slice::from_raw(q, 16) };
        let (k, o, l) = (keys.all(), out.all_mut(), lse.all_mut());
        cuda::cached_attention(&stream, &shape, lens.all(), q, k, k, o, l)?;
        cuda::embedding_backward(&stream, ids.all(), dy.all(), 1, small.all_mut())
    };
    let mut held = vec![];
    for _ in 0..20 {
        step().unwrap();
        // SAFETY: as above.
        let (graph, ()) = unsafe { Graph::record::<_, Error>(&stream, &mut step) }.unwrap();
        // The stream's scratch is the graph's now: this makes another, and a larger one of that.
        step().unwrap();
        cuda::embedding_backward(&stream, ids.all(), dy.all(), 1, dtable.all_mut()).unwrap();
        graph.launch().unwrap();
        drop(graph);
        held.push(stream.device().reserved());
    }
    assert!(held.iter().all(|h| *h == held[0]), "{held:?}");
}
