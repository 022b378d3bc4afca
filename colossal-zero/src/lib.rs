#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod partition;
mod zero;

pub use colossal_comm::Group;
pub use error::{Error, Result};
pub use partition::{Bucket, Partition};
pub use zero::{Stage, Zero};
