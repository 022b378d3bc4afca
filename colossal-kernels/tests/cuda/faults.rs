//! What the stand-in driver must notice in a kernel that is wrong, and memory over many steps. A device
//! that failed is lost to its process, so each fault has one of its own.

use colossal_kernels::cuda::{self, Block, Error, Grid, Source, Stream, devices};
use colossal_kernels::{AttentionShape, Lamb};

static WRONG: Source = Source {
    name: "wrong",
    text: concat!(
        include_str!("../../cuda/prim.cuh"),
        r#"
        extern "C" __global__ void beyond(float* x, u32 n) { x[n + threadIdx.x] = 1.0f; }
        KERNEL(beyond)
        extern "C" __global__ void divergent(float* x, u32 n) {
          if (threadIdx.x < 32) __syncthreads();
          else
            __syncthreads();
          x[threadIdx.x % n] = 1.0f;
        }
        KERNEL(divergent)
        extern "C" __global__ void half_a_warp(float* x, u32 n) {
          if (threadIdx.x % 32 < 16) x[threadIdx.x % n] = warp_sum(1.0f);
        }
        KERNEL(half_a_warp)
        "#
    ),
};

#[test]
fn a_wrong_kernel_is_named_and_its_device_lost() {
    let found = devices().unwrap_or_default();
    if found.len() < 4 || !found[0].name().starts_with("stand-in") {
        return println!("no stand-in driver: nothing was run");
    }
    for (device, kernel) in [(1, "beyond"), (2, "divergent"), (3, "half_a_warp")] {
        let stream = Stream::new(device).unwrap();
        let mut block = Block::new(stream.device(), 1024).unwrap();
        let f = stream.function(&WRONG, &[], kernel).unwrap();
        let x = block.slice_mut::<f32>(0..256);
        let error = f.launch(Grid::line(1, 64), &[&x, &256u32]).unwrap_err();
        assert!(error.is_lost() && error.to_string().contains(kernel), "{error}");
        let after = stream.synchronize().unwrap_err();
        assert!(after.is_lost(), "{after}");
        assert!(matches!(after, Error::Driver { ordinal, .. } if ordinal == device));
        // Freeing on a lost device is refused quietly.
        drop(block);
    }
}

#[test]
fn a_thousand_steps_hold_what_the_first_ones_held() {
    // A device that no other test uses: what blocks hold is counted by device.
    if devices().map_or(0, |d| d.len()) < 6 {
        return println!("fewer than six devices: nothing was run");
    }
    let _alone = crate::check::LAST_DEVICE.lock().unwrap_or_else(|e| e.into_inner());
    let stream = Stream::new(5).unwrap();
    let lamb = Lamb { lr: 1e-3, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.1 };
    let shape = AttentionShape::new(1, 4, 4, 1, 1, 16);
    let mut held = vec![];
    let mut state = Block::new(stream.device(), 3 * 256).unwrap();
    stream.zero(state.slice_mut::<f32>(0..192)).unwrap();
    let mut moments = Block::new(stream.device(), 4 * 32).unwrap();
    stream.zero(moments.slice_mut::<f32>(0..32)).unwrap();
    let mut tokens = Block::new(stream.device(), 16).unwrap();
    stream.upload(&[1, 3, 1, 2], tokens.slice_mut::<i32>(0..4)).unwrap();
    let ids = tokens.slice::<i32>(0..4);
    for step in 0..1000u32 {
        // Of changing sizes, as activations are.
        let room = 64 + 64 * (step as usize % 3);
        let mut x = Block::new(stream.device(), 4 * room).unwrap();
        let mut y = Block::new(stream.device(), 4 * room + 4 * 64).unwrap();
        stream.zero(x.slice_mut::<f32>(0..room)).unwrap();
        cuda::embedding(&stream, ids, x.slice::<f32>(0..64), 16, y.slice_mut(0..64)).unwrap();
        let (q, out) = (x.slice::<f32>(0..64), y.slice_mut(0..64));
        let mut lse = Block::new(stream.device(), 16).unwrap();
        cuda::flash_attention(&stream, &shape, q, q, q, out, lse.slice_mut(0..4)).unwrap();
        let dy = y.slice::<f32>(0..64);
        let (a, b) = (cuda::Mat::new(q, 4, 16), cuda::Mat::new(dy, 4, 16).t());
        let c = cuda::MatMut::new(state.slice_mut::<f32>(16..32), 4, 4);
        cuda::gemm(&stream, a, b, c, &cuda::Epilogue::default()).unwrap();
        cuda::embedding_backward(&stream, ids, dy, 16, x.slice_mut(0..64)).unwrap();
        let (m, v, p) = (x.slice_mut(0..32), moments.slice_mut(0..32), y.slice_mut(0..32));
        let g = state.slice(64..96);
        cuda::lamb(&stream, &lamb, step + 1, p, g, m, v, 1.0, &mut |_| {}).unwrap();
        drop((x, y, lse));
        held.push(stream.device().reserved());
    }
    assert!(held[9..].iter().all(|h| *h == held[9]), "{:?}", (held[9], held.iter().max()));
}
