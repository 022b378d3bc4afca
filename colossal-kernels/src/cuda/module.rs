//! Kernels from source to function: embedded, compiled for the device once, kept on disk.
//!
//! A file of kernels is looked for, built, in the folder `COLOSSAL_KERNELS`; then in the cache
//! (`XDG_CACHE_HOME`, else `~/.cache`, under `colossal/kernels`); then NVRTC compiles it, straight
//! to machine code: no driver has to understand the compiler's intermediate language. Cached files
//! are written aside and renamed, so ranks that race do no harm; a cache that cannot be written is
//! no error.

use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::driver::{result, sys};
use cudarc::nvrtc;

use super::device::Device;
use super::error::{Doing, Error, Result};
use super::library::found;
use super::slice::Arg;
use super::stream::Stream;

/// A file of kernels, in CUDA C++ without headers.
#[derive(Debug)]
pub struct Source {
    /// The file's name without its extension.
    pub name: &'static str,
    /// What it stands on, and it.
    pub text: &'static str,
}

/// The file `cuda/<name>.cu` behind what all kernels stand on, and what several files share.
macro_rules! source {
    ($name:literal $(, $shared:literal)*) => {
        $crate::cuda::Source {
            name: $name,
            text: concat!(
                include_str!("../../cuda/prim.cuh"),
                $(include_str!(concat!("../../cuda/", $shared, ".cuh")),)*
                include_str!(concat!("../../cuda/", $name, ".cu"))
            ),
        }
    };
}
pub(crate) use source;

/// Arguments of a launch.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$(&$arg as &dyn $crate::cuda::Arg),*] };
}
pub(crate) use args;

/// A kernel, built for a device.
#[derive(Debug, Clone)]
pub struct Function {
    loaded: Loaded,
    stream: Stream,
    name: &'static str,
}

/// A function of a module that is never unloaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded(sys::CUfunction);

// SAFETY: a handle that the driver lets any thread use.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Grid {
    /// A line of blocks of so many threads, without dynamic shared memory.
    pub fn line(blocks: usize, threads: u32) -> Grid {
        Grid { blocks: [blocks as u32, 1, 1], threads: [threads, 1, 1], shared: 0 }
    }
}

impl Stream {
    /// The kernel of this name in `source`, compiled under these definitions.
    ///
    /// # Errors
    /// [`Error::NoCompiler`], [`Error::Compile`], and what the driver says.
    pub fn function(
        &self,
        source: &'static Source,
        defines: &[(&str, &str)],
        name: &'static str,
    ) -> Result<Function> {
        let mut key = Hash::default();
        key.add(&(source.text.as_ptr() as usize).to_ne_bytes());
        for (k, v) in defines {
            key.add(k.as_bytes());
            key.add(v.as_bytes());
        }
        key.add(name.as_bytes());
        let known = self.device().functions().get(&key.0).copied();
        let loaded = match known {
            Some(loaded) => loaded,
            None => {
                let loaded = load(self.device(), source, defines, name)?;
                self.device().functions().insert(key.0, loaded);
                loaded
            }
        };
        Ok(Function { loaded, stream: self.clone(), name })
    }
}

impl Function {
    /// Puts the kernel on its stream. A grid without blocks is nothing to do.
    ///
    /// # Errors
    /// What the driver says of the grid, with it; what failed before.
    pub fn launch(&self, grid: Grid, args: &[&dyn Arg]) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let device = self.stream.device();
        device.bind()?;
        // The driver allows 4 KiB of parameters; no kernel of ours has this many.
        let mut pointers: [*mut c_void; 48] = [std::ptr::null_mut(); 48];
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = arg.pointer();
        }
        assert!(args.len() <= pointers.len(), "{}: {} arguments", self.name, args.len());
        let [threads, blocks] = [grid.threads, grid.blocks].map(|[x, y, z]| (x, y, z));
        let stream = self.stream.raw().cu_stream();
        // SAFETY: the function is of a module that is never unloaded; arguments are laid out as the
        // kernel's parameters (each launcher is tested against the reference); slices hold their
        // memory until the stream has passed.
        unsafe {
            if grid.shared > 48 << 10 {
                let what =
                    sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let set = sys::cuFuncSetAttribute(self.loaded.0, what, grid.shared as i32).result();
                set.doing(device.ordinal(), self.name)?;
            }
            let args = &mut pointers[..args.len()];
            result::launch_kernel(self.loaded.0, blocks, threads, grid.shared, stream, args)
        }
        .map_err(|e| {
            Error::driver(device.ordinal(), format!("kernel {} on {grid:?}", self.name), e)
        })
    }
}

fn load(
    device: &Device,
    source: &'static Source,
    defines: &[(&str, &str)],
    name: &str,
) -> Result<Loaded> {
    debug_assert!(
        super::catalog::lists(source, defines),
        "{} under {defines:?} is missing in the catalog of kernels",
        source.name
    );
    let image = source.image(&device.arch(), defines)?;
    let ordinal = device.ordinal();
    let name = CString::new(name).unwrap_or_default();
    device.bind()?;
    // SAFETY: the image is a whole file of machine code; the module is never unloaded.
    unsafe {
        let module = result::module::load_data(image.as_ptr().cast());
        let module = module.doing(ordinal, &format!("loading kernels {}", source.name))?;
        let function = result::module::get_function(module, name.clone());
        Ok(Loaded(function.doing(ordinal, &format!("finding kernel {name:?}"))?))
    }
}

impl Source {
    /// The file that holds it, built: named by what it was built from.
    pub fn file(&self, arch: &str, defines: &[(&str, &str)]) -> String {
        let mut hash = Hash::default();
        hash.add(self.text.as_bytes());
        let mut label = String::new();
        for (k, v) in defines {
            hash.add(k.as_bytes());
            hash.add(v.as_bytes());
            label.push_str(&format!("-{k}_{v}"));
        }
        format!("{}{label}-{arch}-{:032x}.cubin", self.name, hash.0)
    }

    /// The machine code for `arch` (`sm_90a`) under these definitions: from the folder of built
    /// kernels, the cache, or the compiler.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] and [`Error::Compile`].
    pub fn image(&'static self, arch: &str, defines: &[(&str, &str)]) -> Result<Arc<[u8]>> {
        let file = self.file(arch, defines);
        let built = std::env::var_os("COLOSSAL_KERNELS").map(PathBuf::from);
        if let Some(image) = built.and_then(|folder| read(&folder.join(&file))) {
            return Ok(image.into());
        }
        let cached = found().nvrtc.and_then(cache).map(|folder| folder.join(&file));
        if let Some(image) = cached.as_deref().and_then(read) {
            return Ok(image.into());
        }
        let (image, _) = self.compile(arch, defines)?;
        if let Some(path) = cached {
            let _ = write(&path, &image);
        }
        Ok(image.into())
    }

    /// Compiles it, and what the assembler reports: registers, shared memory, spills.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] and [`Error::Compile`].
    pub fn compile(
        &'static self,
        arch: &str,
        defines: &[(&str, &str)],
    ) -> Result<(Vec<u8>, String)> {
        let kernel = self.name;
        if found().nvrtc.is_none() {
            return Err(Error::NoCompiler { kernel, arch: arch.into() });
        }
        let mut options: Vec<String> =
            ["--std=c++17", "--ptxas-options=-v", "--fmad=true"].map(String::from).into();
        // Lambdas of kernels carry no mark of their own.
        options.push("--device-as-default-execution-space".into());
        options.push(format!("--gpu-architecture={arch}"));
        options.extend(defines.iter().map(|(k, v)| format!("-D{k}={v}")));
        let failed = |log: String| Error::Compile { kernel, arch: arch.into(), log };
        let text = CString::new(self.text).map_err(|e| failed(e.to_string()))?;
        let label = CString::new(format!("{kernel}.cu")).map_err(|e| failed(e.to_string()))?;
        let program = nvrtc::result::create_program(&text, Some(&label));
        let program = Program(program.map_err(|e| failed(format!("{e:?}")))?);
        // SAFETY: the program is alive; its log and image are read once it has been compiled.
        unsafe {
            let compiled = nvrtc::result::compile_program(program.0, &options);
            let log = nvrtc::result::get_program_log(program.0).unwrap_or_else(|_| vec![0]);
            let log = CStr::from_ptr(log.as_ptr()).to_string_lossy().trim().to_string();
            compiled.map_err(|e| failed(format!("{e:?}\n{log}")))?;
            let mut bytes = 0;
            let sized = nvrtc::sys::nvrtcGetCUBINSize(program.0, &mut bytes).result();
            sized.map_err(|e| failed(format!("{e:?}")))?;
            let mut image = vec![0u8; bytes];
            let got = nvrtc::sys::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()).result();
            got.map_err(|e| failed(format!("{e:?}")))?;
            Ok((image, log))
        }
    }
}

struct Program(nvrtc::sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program`, destroyed once.
        let _ = unsafe { nvrtc::result::destroy_program(self.0) };
    }
}

/// Where this compiler's kernels are kept.
pub(super) fn cache((major, minor): (i32, i32)) -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let caches = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)?;
    Some(caches.join("colossal/kernels").join(format!("nvrtc-{major}.{minor}")))
}

/// A built file, if it is whole: it is an ELF file, and was renamed when it was complete.
fn read(path: &Path) -> Option<Vec<u8>> {
    std::fs::read(path).ok().filter(|image| image.starts_with(b"\x7fELF"))
}

pub(super) fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let aside = path.with_extension(format!("{}-{number}.part", std::process::id()));
    std::fs::write(&aside, image)?;
    std::fs::rename(&aside, path)
}

/// FNV-1a of 128 bits: the same in every release of Rust.
struct Hash(u128);

impl Default for Hash {
    fn default() -> Hash {
        Hash(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Hash {
    /// Adds bytes and where they end.
    fn add(&mut self, bytes: &[u8]) {
        for b in bytes.iter().chain(&[0]) {
            self.0 =
                (self.0 ^ u128::from(*b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}
