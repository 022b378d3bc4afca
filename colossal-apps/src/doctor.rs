//! What this machine offers.

use std::fmt::Write;

use colossal_kernels::{Isa, isa};

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
        assert!(["cores", "vectors", "memory"].iter().all(|w| text.contains(w)), "{text}");
    }
}
