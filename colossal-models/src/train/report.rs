//! What a training step tells.

use std::sync::OnceLock;
use std::time::Instant;

use colossal_kernels::{Epilogue, Mat, MatMut};
use colossal_tensor::storage::Buffer;
use colossal_tensor::{Device, Dtype, Result, kernels};
use serde::Serialize;

/// The numbers of one step, of all ranks together unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// The loss of the global batch: the mean over its targets, auxiliary losses left out.
    pub loss: f32,
    /// The weighted load-balancing and z-losses of a mixture of experts, whose gradients are in
    /// the step's; 0 for other models. transformers reports the sum of the two.
    pub auxiliary_loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    /// The learning rate.
    pub lr: f32,
    /// Tokens of the global batch.
    pub tokens: usize,
    /// Wall seconds.
    pub seconds: f64,
    /// Tokens per second.
    pub tokens_per_second: f64,
    /// Model flops over the measured matrix-multiply peak of the cores in use; 0 if unknown.
    pub mfu: f64,
    /// Most bytes of tensors that were live at once on this rank since the trainer was made.
    pub peak_bytes: usize,
    /// Bytes this rank sent in this step.
    pub sent_bytes: u64,
}

/// Matrix-multiply flops per second of where this model runs, in what it holds.
pub(crate) fn peak(device: &Device, dtype: Dtype) -> f64 {
    match device {
        Device::Cpu => gemm_peak(),
        Device::Cuda(_) => {
            static PEAKS: [OnceLock<f64>; 2] = [OnceLock::new(), OnceLock::new()];
            let peak = &PEAKS[usize::from(dtype == Dtype::F32)];
            // A device that cannot multiply says so in the step itself.
            *peak.get_or_init(|| match dtype {
                Dtype::F32 => device_peak::<f32>(device).unwrap_or(f64::NAN),
                _ => device_peak::<half::bf16>(device).unwrap_or(f64::NAN),
            })
        }
    }
}

/// The best of some cubic products, doubled in size while they take under a millisecond.
fn device_peak<T: colossal_kernels::Float>(device: &Device) -> Result<f64> {
    let (mut n, mut best) = (64, 0.0f64);
    loop {
        let room = || Buffer::zeros_on::<T>(device, n * n);
        let (a, b, mut c) = (room()?, room()?, room()?);
        let mut least = f64::INFINITY;
        for _ in 0..4 {
            device.synchronize()?;
            let start = Instant::now();
            let (a, b) =
                (kernels::Mat::new(a.view::<T>(), n, n), kernels::Mat::new(b.view::<T>(), n, n));
            kernels::gemm(a, b.t(), c.view_mut::<T>(), None, false)?;
            device.synchronize()?;
            least = least.min(start.elapsed().as_secs_f64());
        }
        best = best.max(2.0 * (n * n * n) as f64 / least);
        if least > 1e-3 || n >= 8192 {
            return Ok(best);
        }
        n *= 2;
    }
}

/// Matrix-multiply flops per second of this rank's threads, measured once: best of three 768³
/// products in f32.
fn gemm_peak() -> f64 {
    static PEAK: OnceLock<f64> = OnceLock::new();
    *PEAK.get_or_init(|| {
        const N: usize = 768;
        let (a, b) = (vec![0.5f32; N * N], vec![0.25f32; N * N]);
        let mut c = vec![0.0f32; N * N];
        let best = (0..3)
            .map(|_| {
                let start = Instant::now();
                colossal_kernels::gemm(
                    Mat::new(&a, N, N),
                    Mat::new(&b, N, N),
                    MatMut::new(&mut c, N, N),
                    &Epilogue::default(),
                );
                start.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        2.0 * (N * N * N) as f64 / best
    })
}
