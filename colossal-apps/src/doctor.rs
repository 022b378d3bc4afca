//! What this machine offers.

use std::fmt::Write;

use colossal_kernels::{Isa, cuda, isa};

/// Cores, vector instructions and memory, each with advice where something is missing.
pub fn report() -> String {
    let mut text = String::new();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let vectors = match isa() {
        Isa::Avx512Bf16 => "AVX-512 with vdpbf16ps: bf16 products run at twice the f32 rate",
        Isa::Avx512 => "AVX-512: bf16 products run in f32",
        Isa::Avx2 => "AVX2 and FMA: bf16 products run in f32",
        Isa::Portable => "none that kernels are written for: expect a tenth of the speed",
    };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "cores     {cores}");
    let _ = writeln!(text, "vectors   {vectors}");
    if std::env::var_os("COLOSSAL_ISA").is_some() {
        let _ = writeln!(text, "          COLOSSAL_ISA is set; unset it to use all there is");
    }
    match memory_kib() {
        Some(kib) => {
            let _ =
                writeln!(text, "memory    {:.1} GiB available", kib as f64 / f64::from(1 << 20));
        }
        None => {
            let _ = writeln!(text, "memory    unknown on this system");
        }
    }
    text.push_str(&gpus());
    text
}

/// GPUs and what they are used by, or why there is none.
fn gpus() -> String {
    let found = cuda::found();
    let mut text = String::new();
    match cuda::devices() {
        Ok(devices) if devices.is_empty() => {
            let _ = writeln!(text, "GPU       none: the driver is there and shows no device");
        }
        Ok(devices) => {
            for device in devices {
                let (free, all) = device.free_memory().unwrap_or((0, device.memory()));
                let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
                let (free, all) = (gib(free), gib(all));
                let _ = writeln!(text, "GPU       {device:?}: {free:.1} of {all:.1} GiB free");
            }
        }
        Err(_) if !found.driver => {
            let _ =
                writeln!(text, "GPU       none: no driver (libcuda.so.1); everything runs on CPU");
            return text;
        }
        Err(error) => {
            let _ = writeln!(text, "GPU       {error}");
        }
    }
    let _ = match found.nvrtc {
        Some((major, minor)) => writeln!(text, "NVRTC     {major}.{minor}: compiles kernels"),
        None => writeln!(
            text,
            "NVRTC     not found: pip install nvidia-cuda-nvrtc and name its folder in \
             COLOSSAL_CUDA_PATH, or name a folder of built kernels in COLOSSAL_KERNELS"
        ),
    };
    let _ = match found.cublaslt {
        true => writeln!(text, "cuBLASLt  found: multiplies"),
        false => writeln!(
            text,
            "cuBLASLt  not found: products run on kernels of our own, which are slower; pip install \
             nvidia-cublas and name its folder in COLOSSAL_CUDA_PATH"
        ),
    };
    let _ = match found.cudnn {
        true => writeln!(text, "cuDNN     found: convolutions"),
        false => writeln!(
            text,
            "cuDNN     not found (9): convolutions run as products of patches; pip install \
             nvidia-cudnn-cu13 and name its folder in COLOSSAL_CUDA_PATH"
        ),
    };
    for folder in &found.folders {
        let _ = writeln!(text, "          from {}", folder.display());
    }
    text
}

fn memory_kib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    text.lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_names_cores_vectors_and_memory() {
        let text = super::report();
        assert!(["cores", "vectors", "memory", "GPU"].iter().all(|w| text.contains(w)), "{text}");
    }
}
