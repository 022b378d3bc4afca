#![doc = include_str!("../README.md")]

mod bucket;
mod call;
mod compress;
mod cost;
mod counters;
mod device;
mod element;
mod engine;
mod error;
mod group;
mod header;
mod in_flight;
mod launch;
mod layout;
mod mesh;
mod message;
#[cfg(feature = "mpi")]
mod mpi;
mod nccl;
mod ragged;
mod recorder;
mod start;
mod store;
mod threads;

pub use call::Verb;
pub use compress::Codec;
pub use cost::Cost;
pub use counters::Counters;
pub use device::{
    DeviceEvent, DeviceMessage, DeviceRuntime, DeviceSlice, DeviceSliceMut, KeepEvent, OnStream,
    provide_devices,
};
pub use element::{DType, Element, ReduceOp};
pub use error::{Error, Result};
pub use group::{Config, Group, on_ranks};
pub use in_flight::Pending;
pub use launch::{Launch, Launcher, launched, launched_by};
pub use mesh::Mesh;
pub use message::Message;
