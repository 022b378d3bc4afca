//! CUDA kernels built beforehand, with what the assembler says of them. Needs no GPU.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args as Arguments;

use crate::{cargo, run};

/// What to build for.
#[derive(Debug, Arguments)]
pub(crate) struct Args {
    /// Architectures, as NVRTC names them.
    #[arg(long, value_delimiter = ',', default_value = "sm_80,sm_86,sm_89,sm_90a,sm_100a,sm_120a")]
    arch: Vec<String>,
    /// Get NVRTC from Python's package index (NVIDIA's licence) into target/nvrtc, if it is not
    /// there.
    #[arg(long)]
    fetch: bool,
    /// Leave out the kernels of a type, as kernels name it: float, bf16, f16.
    #[arg(long)]
    but: Option<String>,
}

impl Args {
    /// What CI builds: the oldest architecture and the one with instructions of its own, without f16,
    /// whose kernels are those of bf16 but for conversions.
    pub(crate) fn ci() -> Args {
        Args {
            arch: ["sm_80", "sm_90a"].map(String::from).into(),
            fetch: true,
            but: Some("f16".into()),
        }
    }
}

/// Builds all kernels into target/kernels; fails on spills that are not expected.
pub(crate) fn kernels(args: &Args) -> Result<()> {
    let wheel = Path::new("target/nvrtc");
    let mut library = nvrtc(wheel);
    if library.is_none() && args.fetch {
        fetch(wheel)?;
        library = nvrtc(wheel);
    }
    let mut path = std::env::var("COLOSSAL_CUDA_PATH").ok();
    if let Some(folder) = library {
        path = Some(std::fs::canonicalize(folder)?.to_str().context("a path in UTF-8")?.into());
    }
    let Some(path) = path else {
        bail!(
            "NVRTC is not here: run cargo xtask kernels --fetch, or name its folder in COLOSSAL_CUDA_PATH"
        );
    };
    let program = ["run", "-p", "colossal-kernels", "--example", "kernels", "--", "target/kernels"];
    let mut archs: Vec<&str> = args.arch.iter().map(String::as_str).collect();
    if let Some(but) = &args.but {
        archs.extend(["--but", but]);
    }
    run(&cargo(), &[&program[..], &archs].concat(), &[("COLOSSAL_CUDA_PATH", &path)])
}

fn fetch(to: &Path) -> Result<()> {
    const PACKAGE: &str = "nvidia-cuda-nvrtc==13.0.88";
    let to = to.to_str().context("a path in UTF-8")?;
    let install =
        ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", to, PACKAGE];
    run("python3", &install, &[]).context("NVRTC comes by pip: apt-get install python3-pip")
}

/// The folder of the wheel that holds the library.
fn nvrtc(wheel: &Path) -> Option<PathBuf> {
    let packages = std::fs::read_dir(wheel.join("nvidia")).ok()?;
    let mut folders = packages.filter_map(|e| Some(e.ok()?.path().join("lib")));
    folders.find(|folder| folder.join("libnvrtc.so.13").exists())
}
