#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod partition;
mod space;
mod zero;

pub use colossal_comm::Group;
pub use error::{Error, Result};
pub use partition::{Bucket, Partition};
pub use space::{Host, HostFlight, Space};
pub use zero::{Stage, Zero};
