//! Builds all CUDA kernels beforehand: `cargo run --example kernels -- FOLDER ARCH...`.
//!
//! Needs NVRTC and no GPU. Programs find the files through `COLOSSAL_KERNELS=FOLDER`. Prints what
//! the assembler says of each kernel, and fails where one spills registers.

use std::path::Path;
use std::process::ExitCode;

use colossal_kernels::cuda::catalog;

/// Kernels that may spill, and how many bytes.
const MAY_SPILL: [(&str, u32); 0] = [];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((folder, archs)) = args.split_first().filter(|(_, archs)| !archs.is_empty()) else {
        eprintln!(
            "usage: kernels FOLDER ARCH...   for example: kernels target/kernels sm_80 sm_90a"
        );
        return ExitCode::FAILURE;
    };
    match build(Path::new(folder), archs) {
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
fn build(folder: &Path, archs: &[String]) -> Result<usize, Box<dyn std::error::Error>> {
    std::fs::create_dir_all(folder)?;
    let mut table = String::from("arch\tfile\tkernel\tregisters\tshared\tspills\n");
    let (mut files, mut kernels, mut spilling, mut bytes) = (0, 0, 0, 0);
    for arch in archs {
        for build in catalog() {
            let (image, log) = build.source.compile(arch, &build.defines)?;
            let file = build.source.file(arch, &build.defines);
            std::fs::write(folder.join(&file), &image)?;
            (files, bytes) = (files + 1, bytes + image.len());
            let defines: Vec<_> = build.defines.iter().map(|(_, v)| *v).collect();
            let label = format!("{} {}", build.source.name, defines.join(" "));
            let found = report(&log);
            if found.is_empty() {
                return Err(format!("no kernel in the log of {label} for {arch}:\n{log}").into());
            }
            for Kernel { name, registers, shared, spills } in found {
                kernels += 1;
                table += &format!("{arch}\t{label}\t{name}\t{registers}\t{shared}\t{spills}\n");
                let allowed = MAY_SPILL.iter().find(|(k, _)| *k == name).map_or(0, |(_, n)| *n);
                if spills > allowed {
                    spilling += 1;
                    eprintln!("{arch}: {name} of {label} spills {spills} bytes");
                }
            }
        }
    }
    std::fs::write(folder.join("report.tsv"), &table)?;
    println!("{kernels} kernels in {files} files, {} KiB: {}", bytes >> 10, folder.display());
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
