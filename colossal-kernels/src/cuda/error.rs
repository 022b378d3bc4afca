//! What can go wrong on a device.

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// The result of a call on a device.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of CUDA, with what was being done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no driver on this machine.
    #[error(
        "CUDA: the driver's library libcuda.so.1 was not found; install NVIDIA's driver, or run \
         on the CPU (--device cpu)"
    )]
    NoDriver,

    /// The driver shows no such device.
    #[error(
        "CUDA: there is no device {ordinal}: the driver shows {count}; look at CUDA_VISIBLE_DEVICES \
         and nvidia-smi"
    )]
    NoDevice {
        /// The device that was asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },

    /// A device has no room.
    #[error(
        "CUDA: device {ordinal} has no room for {asked} bytes: {free} of {total} are free; use \
         smaller batches, recomputation, offload or more devices"
    )]
    OutOfMemory {
        /// The device.
        ordinal: usize,
        /// Bytes that were asked for.
        asked: usize,
        /// Bytes that the device has free.
        free: usize,
        /// Bytes that it has.
        total: usize,
    },

    /// No kernel was built beforehand, and there is no compiler.
    #[error(
        "CUDA: kernel {kernel} was not built for {arch}, and the compiler libnvrtc.so was not found; \
         install it (pip install nvidia-cuda-nvrtc, or the CUDA toolkit) and name its folder in \
         COLOSSAL_CUDA_PATH, or name a folder of built kernels (cargo xtask kernels) in \
         COLOSSAL_KERNELS"
    )]
    NoCompiler {
        /// The file of kernels.
        kernel: &'static str,
        /// The architecture of the device.
        arch: String,
    },

    /// A kernel did not compile.
    #[error("CUDA: kernel {kernel} does not compile for {arch}:\n{log}")]
    Compile {
        /// The file of kernels.
        kernel: &'static str,
        /// The architecture of the device.
        arch: String,
        /// What the compiler says.
        log: String,
    },

    /// No kernel was written for it.
    #[error("CUDA: {kernel}: {reason}; run it on the CPU (--device cpu)")]
    Unsupported {
        /// The kernel.
        kernel: &'static str,
        /// What it was asked for, and what it is built for.
        reason: String,
    },

    /// A library of CUDA refuses a call.
    #[error("CUDA: {library} refuses {what} on device {ordinal}: {reason}")]
    Library {
        /// The library.
        library: &'static str,
        /// The call.
        what: String,
        /// The device.
        ordinal: usize,
        /// Its own words.
        reason: String,
    },

    /// The driver refuses a call, or reports what failed before it.
    #[error("CUDA: {what} on device {ordinal}: {reason} ({code:?})")]
    Driver {
        /// The call, or the kernel with its grid.
        what: String,
        /// The device.
        ordinal: usize,
        /// The driver's own words.
        reason: String,
        /// The driver's code.
        code: CUresult,
    },
}

impl Error {
    /// Is the device lost to this process? Its memory then is too: only a new process can go on.
    pub fn is_lost(&self) -> bool {
        use CUresult::{
            CUDA_ERROR_ASSERT, CUDA_ERROR_CONTEXT_IS_DESTROYED, CUDA_ERROR_DEVICE_UNAVAILABLE,
            CUDA_ERROR_ECC_UNCORRECTABLE, CUDA_ERROR_HARDWARE_STACK_ERROR,
            CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_ILLEGAL_INSTRUCTION, CUDA_ERROR_LAUNCH_FAILED,
            CUDA_ERROR_LAUNCH_TIMEOUT, CUDA_ERROR_MISALIGNED_ADDRESS, CUDA_ERROR_SYSTEM_NOT_READY,
            CUDA_ERROR_UNKNOWN,
        };
        matches!(
            self,
            Error::Driver {
                code: CUDA_ERROR_ASSERT
                    | CUDA_ERROR_CONTEXT_IS_DESTROYED
                    | CUDA_ERROR_DEVICE_UNAVAILABLE
                    | CUDA_ERROR_ECC_UNCORRECTABLE
                    | CUDA_ERROR_HARDWARE_STACK_ERROR
                    | CUDA_ERROR_ILLEGAL_ADDRESS
                    | CUDA_ERROR_ILLEGAL_INSTRUCTION
                    | CUDA_ERROR_LAUNCH_FAILED
                    | CUDA_ERROR_LAUNCH_TIMEOUT
                    | CUDA_ERROR_MISALIGNED_ADDRESS
                    | CUDA_ERROR_SYSTEM_NOT_READY
                    | CUDA_ERROR_UNKNOWN,
                ..
            }
        )
    }

    /// Did a call meet a stream that records a [`Graph`](super::Graph), for which it is not allowed?
    pub fn is_capture(&self) -> bool {
        use CUresult::{
            CUDA_ERROR_CAPTURED_EVENT, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
            CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
            CUDA_ERROR_STREAM_CAPTURE_MERGE, CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
            CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        };
        matches!(
            self,
            Error::Driver {
                code: CUDA_ERROR_CAPTURED_EVENT
                    | CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
                    | CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                    | CUDA_ERROR_STREAM_CAPTURE_ISOLATION
                    | CUDA_ERROR_STREAM_CAPTURE_MERGE
                    | CUDA_ERROR_STREAM_CAPTURE_UNJOINED
                    | CUDA_ERROR_STREAM_CAPTURE_UNMATCHED
                    | CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                ..
            }
        )
    }

    /// A driver's error with what was being done.
    pub(super) fn driver(ordinal: usize, what: impl Into<String>, error: DriverError) -> Error {
        let text = error.error_string().map(|s| s.to_string_lossy().into_owned());
        let reason = text.unwrap_or_else(|_| "no description".into());
        Error::Driver { what: what.into(), ordinal, reason, code: error.0 }
    }
}

/// Adds what was being done to a driver's result.
pub(super) trait Doing<T> {
    fn doing(self, ordinal: usize, what: &str) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, DriverError> {
    fn doing(self, ordinal: usize, what: &str) -> Result<T> {
        self.map_err(|error| Error::driver(ordinal, what, error))
    }
}
