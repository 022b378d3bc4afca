//! Which of CUDA's libraries are on this machine, asked before the first call into any.
//!
//! Beside the linker's own places they are looked for where wheels and toolkits put them: a
//! library that is loaded by its path is found by its name afterwards.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The driver, `libcuda.so.1`.
    pub driver: bool,
    /// The compiler of kernels, and its version.
    pub nvrtc: Option<(i32, i32)>,
    /// cuBLASLt: products.
    pub cublaslt: bool,
    /// cuDNN 9: convolutions.
    pub cudnn: bool,
    /// Folders beside the linker's own in which a library was found.
    pub folders: Vec<PathBuf>,
}

/// Looks for the libraries, once.
pub fn found() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(|| {
        // SAFETY: loading NVIDIA's libraries runs their initialisers and nothing else.
        let driver = unsafe { cudarc::driver::sys::is_culib_present() };
        let mut found =
            Found { driver, nvrtc: None, cublaslt: false, cudnn: false, folders: vec![] };
        if driver || std::env::var_os("COLOSSAL_CUDA_PATH").is_some() {
            // The builtins first: NVRTC asks for them by name.
            for names in [
                ["libnvrtc-builtins.so.", "libnvrtc.so."],
                ["libcublasLt.so.", ""],
                ["libcudnn.so.9", ""],
            ] {
                for folder in folders() {
                    if names.iter().filter(|n| !n.is_empty()).all(|n| load(&folder, n)) {
                        found.folders.push(folder);
                        break;
                    }
                }
            }
            // SAFETY: as above.
            if unsafe { cudarc::nvrtc::sys::is_culib_present() } {
                let mut version = (0, 0);
                // SAFETY: the library is there; both pointers are valid.
                let code =
                    unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut version.0, &mut version.1) };
                found.nvrtc = code.result().is_ok().then_some(version);
            }
            // SAFETY: as above.
            found.cublaslt = unsafe { cudarc::cublaslt::sys::is_culib_present() };
            found.cudnn = super::dnn::is_there();
        }
        found
    })
}

/// A function of the driver that cudarc's bindings know by a newer name only.
pub(super) fn driver_function<F: Copy>(name: &std::ffi::CStr) -> Option<F> {
    if !found().driver {
        return None;
    }
    // SAFETY: the library is there and stays; the caller names the signature.
    unsafe { cudarc::driver::sys::culib().get::<F>(name.to_bytes_with_nul()).ok().map(|f| *f) }
}

/// Loads the library whose file name starts so from a folder, for good.
fn load(folder: &Path, prefix: &str) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    let starts = |name: &OsStr| name.to_string_lossy().starts_with(prefix);
    entries.filter_map(|e| e.ok()).filter(|e| starts(&e.file_name())).any(|e| {
        // SAFETY: as in `found`.
        let library = unsafe { libloading::Library::new(e.path()) };
        library.map(std::mem::forget).is_ok()
    })
}

/// Where CUDA's libraries may be, most wanted first. A folder that is named comes before the
/// linker's own places; toolkits and environments of Python come in their usual layout.
fn folders() -> Vec<PathBuf> {
    let mut folders = vec![];
    if let Some(named) = std::env::var_os("COLOSSAL_CUDA_PATH") {
        folders.extend(std::env::split_paths(&named));
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(toolkit) = std::env::var_os(variable) {
            folders.push(Path::new(&toolkit).join("lib64"));
        }
    }
    folders.push("/usr/local/cuda/lib64".into());
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        let pythons = children(&Path::new(&environment).join("lib"));
        for python in pythons {
            let wheels = children(&python.join("site-packages/nvidia"));
            folders.extend(wheels.into_iter().map(|wheel| wheel.join("lib")));
        }
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut children: Vec<_> = entries.filter_map(|e| e.ok()).map(|e| e.path()).collect();
    children.sort();
    children
}
