//! CUDA without a GPU: a driver, a compiler that makes kernels run on the CPU, libraries of products,
//! convolutions and collectives, and the suites on them.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::ci::{Suite, suites};
use crate::{exists, run};

const SOURCES: &str = "colossal-kernels/cuda/stand_in";

/// Orders in which the threads of a block run: one that hides a missing barrier seldom hides it in
/// the others.
const ORDERS: [&str; 3] = ["0", "1", "77"];

/// Tests of models that take seconds on the stand-in: references, resumption, plans, memory.
const MODELS: [&str; 9] = [
    "goldens",
    "a_resumed_run",
    "a_later_step",
    "many_steps",
    "bf16_follows",
    "fp8_follows",
    "every_sequence_mode",
    "grids_of_nine",
    "graphs",
];

/// Builds the libraries and runs the CUDA suites on them.
pub(crate) fn stand_in() -> Result<()> {
    let folder = build()?;
    let path = folder.to_str().context("a path in UTF-8")?;
    let cache = folder.join(format!("cache-{:016x}", fingerprint()?));
    let cache = cache.to_str().context("a path in UTF-8")?;
    let kernels: Suite<'_> = ("colossal-kernels", "cuda", &[]);
    let mut env = vec![
        ("LD_LIBRARY_PATH", path),
        ("COLOSSAL_CUDA_PATH", path),
        ("XDG_CACHE_HOME", cache),
        ("COLOSSAL_CUDA", "required"),
    ];
    // Products by the stand-in for cuBLASLt, convolutions by that for cuDNN.
    let all = [
        kernels,
        ("colossal-tensor", "cuda", &[]),
        ("colossal-tensor", "it", &["fp8"]),
        ("colossal-models", "it", &MODELS),
        ("colossal-apps", "cuda", &[]),
    ];
    suites(&all, &env)?;
    // And by our own kernels.
    env.extend([("COLOSSAL_NO_CUBLASLT", "1"), ("COLOSSAL_NO_CUDNN", "1")]);
    for order in ORDERS {
        suites(&[kernels], &[&env[..], &[("STAND_IN_ORDER", order)]].concat())?;
    }
    Ok(())
}

/// Builds the libraries into target/stand-in.
fn build() -> Result<PathBuf> {
    if !exists("g++", "--version") {
        bail!("the stand-in for CUDA needs g++: apt-get install g++");
    }
    let folder = std::env::current_dir()?.join("target/stand-in");
    std::fs::create_dir_all(&folder)?;
    std::fs::copy(Path::new(SOURCES).join("cuemu.h"), folder.join("cuemu.h"))?;
    let libraries = [
        ("cuda.cpp", "libcuda.so.1"),
        ("nvrtc.cpp", "libnvrtc.so.13"),
        ("cublaslt.cpp", "libcublasLt.so.13"),
        ("cudnn.cpp", "libcudnn.so.9"),
        ("nccl.cpp", "libnccl.so.2"),
    ];
    for (source, library) in libraries {
        let (from, to) = (Path::new(SOURCES).join(source), folder.join(library));
        let (from, to) = (from.to_string_lossy(), to.to_string_lossy());
        let flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unused", "-fPIC", "-shared"];
        run("g++", &[&flags[..], &["-o", &to, &from, "-ldl"]].concat(), &[])?;
    }
    // NVRTC is looked for by both of its names.
    let builtins = folder.join("libnvrtc-builtins.so.13");
    std::fs::copy(folder.join("libnvrtc.so.13"), builtins)?;
    Ok(folder)
}

/// Of the emulation: kernels that were built under another one are not used again.
fn fingerprint() -> Result<u64> {
    let mut hash = DefaultHasher::new();
    let mut files: Vec<_> =
        std::fs::read_dir(SOURCES)?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    files.sort();
    for file in files {
        std::fs::read(&file)?.hash(&mut hash);
    }
    Ok(hash.finish())
}
