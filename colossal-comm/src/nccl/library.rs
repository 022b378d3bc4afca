//! NCCL and the CUDA driver, loaded when they are first wanted: nothing is needed to build, and a
//! machine without them gets an error that says what was looked for.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use libloading::Library;

use crate::element::{DType, ReduceOp};
use crate::error::{Error, Result};

/// Oldest NCCL that is used: it has `ncclCommSplit` and communicators that do not block.
const OLDEST: c_int = 2_18_00;

/// Names that wheels, distributions and the CUDA toolkit give it.
const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
const CUDA: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// A function table and the library that it points into.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident: $($symbol:ident($($t:ty),*);)*) => {
        $(#[$doc])*
        #[allow(non_snake_case, reason = "fields are the symbols")]
        #[derive(Debug)]
        pub(super) struct $table {
            $(pub(super) $symbol: unsafe extern "C" fn($($t),*) -> c_int,)*
            _library: Library,
        }

        impl $table {
            fn of(library: Library) -> Result<$table, libloading::Error> {
                // SAFETY: the types are those of the library's header, which are stable.
                unsafe {
                    Ok($table {
                        $($symbol: *library.get(concat!(stringify!($symbol), "\0").as_bytes())?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}

/// `ncclUniqueId`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` as of 2.18. Later versions read as many bytes as `size` says and take their
/// defaults for the rest.
#[derive(Debug)]
#[repr(C)]
pub(super) struct CommConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl CommConfig {
    /// Calls return at once, and are asked for by `ncclCommGetAsyncError`.
    pub(super) fn not_blocking() -> CommConfig {
        let unset = c_int::MIN;
        CommConfig {
            size: size_of::<CommConfig>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            cga_cluster_size: unset,
            min_ctas: unset,
            max_ctas: unset,
            net_name: std::ptr::null(),
            split_share: unset,
        }
    }
}

/// A `ncclComm_t`.
pub(super) type RawComm = *mut c_void;
/// A `CUstream`, which the runtime calls `cudaStream_t`.
pub(super) type RawStream = *mut c_void;
/// A `CUevent`.
pub(super) type RawEvent = *mut c_void;

type Comm = RawComm;
type Stream = RawStream;
type Source = *const c_void;
type Target = *mut c_void;

table! {
    /// What is used of NCCL.
    Nccl:
    ncclGetVersion(*mut c_int);
    ncclGetUniqueId(*mut UniqueId);
    ncclCommInitRankConfig(*mut Comm, c_int, UniqueId, c_int, *mut CommConfig);
    ncclCommSplit(Comm, c_int, c_int, *mut Comm, *mut CommConfig);
    ncclCommGetAsyncError(Comm, *mut c_int);
    ncclCommFinalize(Comm);
    ncclCommDestroy(Comm);
    ncclCommAbort(Comm);
    ncclGroupStart();
    ncclGroupEnd();
    ncclAllReduce(Source, Target, usize, c_int, c_int, Comm, Stream);
    ncclReduceScatter(Source, Target, usize, c_int, c_int, Comm, Stream);
    ncclReduce(Source, Target, usize, c_int, c_int, c_int, Comm, Stream);
    ncclAllGather(Source, Target, usize, c_int, Comm, Stream);
    ncclBroadcast(Source, Target, usize, c_int, c_int, Comm, Stream);
    ncclSend(Source, usize, c_int, c_int, Comm, Stream);
    ncclRecv(Target, usize, c_int, c_int, Comm, Stream);
}

table! {
    /// What is used of the CUDA driver.
    Cuda:
    cuInit(c_uint);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
    cuCtxSetCurrent(*mut c_void);
    cuStreamCreate(*mut Stream, c_uint);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemcpyHtoDAsync_v2(u64, Source, usize, Stream);
    cuMemcpyDtoHAsync_v2(Target, u64, usize, Stream);
    cuEventCreate(*mut RawEvent, c_uint);
    cuEventRecord(RawEvent, Stream);
    cuEventQuery(RawEvent);
    cuEventDestroy_v2(RawEvent);
}

pub(super) const IN_PROGRESS: c_int = 7;

/// NCCL's word for a result.
pub(super) fn nccl_says(code: c_int) -> &'static str {
    match code {
        0 => "success",
        1 => "a call of CUDA failed; NCCL_DEBUG=WARN says which",
        2 => "a call of the system failed; NCCL_DEBUG=WARN says which",
        3 => "an internal check failed; NCCL_DEBUG=WARN says which",
        4 => "an argument is wrong",
        5 => "it was used wrongly; NCCL_DEBUG=WARN says how",
        6 => "a remote process ended or the network failed",
        IN_PROGRESS => "still in progress",
        8 => "timed out",
        _ => "an error that this program does not know",
    }
}

/// An error of the driver, by its number.
pub(super) fn cuda_checked(op: &str, code: c_int) -> Result<()> {
    let what = match code {
        0 => return Ok(()),
        2 => "out of memory",
        3 => "not initialised",
        100 => "no device",
        101 => "no such device",
        201 => "no context",
        400 => "an invalid handle",
        700 => "a kernel touched memory that is not its own",
        719 => "a kernel failed",
        _ => "see CUresult",
    };
    Err(Error::Engine { op: op.into(), reason: format!("CUDA error {code}: {what}") })
}

/// The number that NCCL gives a type.
pub(super) fn datatype(dtype: DType) -> c_int {
    match dtype {
        DType::I8 => 0,
        DType::U8 => 1,
        DType::I32 => 2,
        DType::U32 => 3,
        DType::I64 => 4,
        DType::U64 => 5,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
    }
}

/// The number that NCCL gives an operation.
pub(super) fn operation(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Avg => 4,
    }
}

/// NCCL, once in a process.
pub(super) fn nccl() -> Result<&'static Nccl> {
    static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
    let load = || {
        let advice = "install the wheel nvidia-nccl-cu12 or the package libnccl2, and put its folder in LD_LIBRARY_PATH, or name the file in COLOSSAL_NCCL";
        let nccl = Nccl::of(open("NCCL", "COLOSSAL_NCCL", &NCCL, advice)?)
            .map_err(|e| format!("this NCCL lacks a function, it is older than 2.18: {e}"))?;
        let mut version = 0;
        // SAFETY: the pointer is valid.
        let code = unsafe { (nccl.ncclGetVersion)(&raw mut version) };
        if code != 0 || version < OLDEST {
            let show = |v: c_int| match v {
                // The encoding before 2.9.
                ..10_000 => format!("{}.{}.{}", v / 1000, v / 100 % 10, v % 100),
                _ => format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100),
            };
            return Err(format!(
                "NCCL here is {}; {} or newer is needed: {advice}",
                show(version),
                show(OLDEST)
            ));
        }
        Ok(nccl)
    };
    found("nccl", LOADED.get_or_init(load))
}

/// The CUDA driver, initialised, once in a process.
pub(super) fn cuda() -> Result<&'static Cuda> {
    static LOADED: OnceLock<Result<Cuda, String>> = OnceLock::new();
    let load = || {
        let advice = "it comes with the NVIDIA driver; without a GPU use ranks as threads or MPI";
        let cuda = Cuda::of(open("the CUDA driver", "COLOSSAL_DRIVER", &CUDA, advice)?)
            .map_err(|e| format!("this CUDA driver lacks a function: {e}"))?;
        // SAFETY: a call without pointers.
        cuda_checked("cuInit", unsafe { (cuda.cuInit)(0) }).map_err(|e| e.to_string())?;
        Ok(cuda)
    };
    found("cuda", LOADED.get_or_init(load))
}

fn found<T>(op: &str, loaded: &'static Result<T, String>) -> Result<&'static T> {
    loaded.as_ref().map_err(|reason| Error::Engine { op: op.into(), reason: reason.clone() })
}

fn open(what: &str, variable: &str, names: &[&str], advice: &str) -> Result<Library, String> {
    let given = std::env::var(variable).ok();
    let names: Vec<&str> = given.as_deref().map_or_else(|| names.to_vec(), |name| vec![name]);
    let mut last = String::new();
    for name in &names {
        // SAFETY: it is the library of that name, whose initialisers may run anywhere.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(e) => last = e.to_string(),
        }
    }
    Err(format!("{what} is not here (looked for {}: {last}); {advice}", names.join(", ")))
}
