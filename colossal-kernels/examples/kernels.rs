//! Builds all CUDA kernels beforehand: `cargo run --example kernels -- FOLDER ARCH... [--but TYPE]`.
//!
//! Needs NVRTC and no GPU. Programs find the files through `COLOSSAL_KERNELS=FOLDER`. Prints what
//! the assembler says of each kernel, and fails where one spills registers.

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use colossal_kernels::cuda::{Build, catalog};

/// Kernels that may spill, on which architectures, and how many bytes: a predicate or two around the
/// main loop; on Blackwell some more for heads of 192 and 256 channels.
const MAY_SPILL: [(&str, &str, u32); 4] = [
    ("sm_", "gemm_mm", 8),
    ("sm_", "attention_backward_kv", 16),
    ("sm_", "decode", 8),
    ("sm_1", "attention_backward_q", 72),
];

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    // A type whose kernels are left out.
    let but = args.iter().position(|a| a == "--but").map(|at| args.drain(at..).nth(1));
    let but = but.flatten().unwrap_or_default();
    let Some((folder, archs)) = args.split_first().filter(|(_, archs)| !archs.is_empty()) else {
        eprintln!(
            "usage: kernels FOLDER ARCH...   for example: kernels target/kernels sm_80 sm_90a"
        );
        return ExitCode::FAILURE;
    };
    match build(Path::new(folder), archs, &but) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(spills) => {
            eprintln!("{spills} kernels spill registers");
            ExitCode::FAILURE
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// Builds and reports; how many kernels spill that may not.
fn build(folder: &Path, archs: &[String], but: &str) -> Result<usize, Box<dyn std::error::Error>> {
    std::fs::create_dir_all(folder)?;
    let wanted: Vec<Build> =
        catalog().into_iter().filter(|b| b.defines.iter().all(|(_, v)| *v != but)).collect();
    let all = archs.iter().flat_map(|arch| wanted.iter().map(move |b| (arch, b.clone())));
    let builds: Vec<(&String, Build)> = all.filter(|(arch, build)| build.is_for(arch)).collect();
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Vec<Kernel>, usize)>, String> {
        let mut done = vec![];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some((arch, build)) = builds.get(i) else { return Ok(done) };
            let (image, log) =
                build.source.compile(arch, &build.defines).map_err(|e| e.to_string())?;
            let kernels = report(&log);
            if kernels.is_empty() {
                let Build { source, defines } = build;
                let name = source.name;
                return Err(format!("no kernel in {name} of {defines:?} for {arch}:\n{log}"));
            }
            let path = folder.join(build.source.file(arch, &build.defines));
            std::fs::write(&path, &image).map_err(|e| format!("{}: {e}", path.display()))?;
            done.push((i, kernels, image.len()));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let parts: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        running.into_iter().map(|t| t.join().map_err(|_| "a compiler panicked".into())).collect()
    });
    let mut files = vec![];
    for part in parts {
        let part: Result<_, String> = part.and_then(|part| part);
        files.extend(part?);
    }
    files.sort_by_key(|(i, _, _)| *i);
    let mut table = String::from("arch\tfile\tkernel\tregisters\tshared\tspills\n");
    let (mut count, mut spilling, mut bytes) = (0, 0, 0);
    for (i, kernels, size) in &files {
        let (arch, build) = &builds[*i];
        let defines: Vec<_> = build.defines.iter().map(|(_, v)| *v).collect();
        let label = format!("{} {}", build.source.name, defines.join(" "));
        bytes += size;
        for Kernel { name, registers, shared, spills } in kernels {
            count += 1;
            table += &format!("{arch}\t{label}\t{name}\t{registers}\t{shared}\t{spills}\n");
            let allowed = MAY_SPILL
                .iter()
                .find(|(on, k, _)| arch.starts_with(on) && k == name)
                .map_or(0, |(_, _, n)| *n);
            if *spills > allowed {
                spilling += 1;
                eprintln!("{arch}: {name} of {label} spills {spills} bytes");
            }
        }
    }
    std::fs::write(folder.join("report.tsv"), &table)?;
    println!("{count} kernels in {} files, {} KiB: {}", files.len(), bytes >> 10, folder.display());
    Ok(spilling)
}

struct Kernel {
    name: String,
    registers: u32,
    shared: u32,
    spills: u32,
}

/// What the assembler says, kernel by kernel.
fn report(log: &str) -> Vec<Kernel> {
    let before = |line: &str, unit: &str| -> u32 {
        let number = line.split(unit).next().and_then(|s| s.split_whitespace().last());
        number.and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    let mut kernels: Vec<Kernel> = vec![];
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default().to_string();
            kernels.push(Kernel { name, registers: 0, shared: 0, spills: 0 });
        } else if let Some(kernel) = kernels.last_mut() {
            if line.contains("bytes stack frame") {
                kernel.spills =
                    before(line, " bytes spill stores").max(before(line, " bytes stack"));
            } else if line.contains(" registers") {
                kernel.registers = before(line, " registers");
                if line.contains(" bytes smem") {
                    kernel.shared = before(line, " bytes smem");
                }
            }
        }
    }
    kernels
}
