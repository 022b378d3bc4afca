//! What the stand-in driver must notice in a kernel that is wrong. A device that failed is lost to
//! its process, so each fault has one of its own.

use colossal_kernels::cuda::{Error, Grid, Source, Stream, devices};

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
        let mut block = colossal_kernels::cuda::Block::new(stream.device(), 1024).unwrap();
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
