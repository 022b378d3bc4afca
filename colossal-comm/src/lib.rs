#![doc = include_str!("../README.md")]

mod barrier;
mod counters;
mod element;
mod error;
mod group;
mod in_flight;
mod mailbox;
mod mesh;

pub use counters::{Counters, Verb};
pub use element::{Element, ReduceOp};
pub use error::{Error, Result};
pub use group::{Config, Group, on_ranks};
pub use in_flight::Pending;
pub use mesh::Mesh;
