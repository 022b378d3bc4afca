//! Where tensors live: the host's memory, or a GPU's behind a stream.

use colossal_kernels::cuda::{self, Stream};

use crate::error::{Error, Result};
use crate::storage::release_orphans;

/// A place for tensors. On a GPU everything of a rank is done in the order of one stream.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Device {
    /// The host.
    #[default]
    Cpu,
    /// A GPU.
    Cuda(Stream),
}

impl Device {
    /// The device of this name for rank `rank` of this machine: `cpu`; `cuda:1`; `cuda`, the GPU
    /// of the rank's number, counted round; `auto`, which is `cuda` where there is a GPU.
    ///
    /// # Errors
    /// [`Error::Other`] for another name, [`Error::Cuda`] when there is no such GPU.
    pub fn named(name: &str, rank: usize) -> Result<Device> {
        let gpu = |number| {
            // A thread that makes one model after the other needs the memory of the last.
            release_orphans();
            Ok(Device::Cuda(Stream::new(number)?))
        };
        match name {
            "cpu" => Ok(Device::Cpu),
            "auto" => match cuda::devices() {
                Ok(gpus) if !gpus.is_empty() => gpu(rank % gpus.len()),
                _ => Ok(Device::Cpu),
            },
            "cuda" => gpu(rank % cuda::devices()?.len().max(1)),
            _ => match name.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => gpu(number),
                _ => Err(Error::Other(format!(
                    "device {name} is unknown; choose auto, cpu, cuda or cuda:NUMBER"
                ))),
            },
        }
    }

    /// Its stream, on a GPU.
    pub fn stream(&self) -> Option<&Stream> {
        match self {
            Device::Cpu => None,
            Device::Cuda(stream) => Some(stream),
        }
    }

    /// Waits until all work on it has ended.
    ///
    /// # Errors
    /// [`Error::Cuda`] when some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            Device::Cuda(stream) => Ok(stream.synchronize()?),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(stream) => write!(f, "cuda:{}", stream.device().ordinal()),
        }
    }
}
