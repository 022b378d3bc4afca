#![doc = include_str!("../README.md")]

mod autograd;
mod chunked;
pub mod collectives;
mod cube;
mod device;
pub mod dtype;
mod error;
pub mod fake;
mod kept;
pub mod kernels;
pub mod model;
pub mod moe;
pub mod nn;
mod ops;
mod overlap;
mod params;

pub mod placement;
mod propagate;
pub mod random;
mod recompute;
mod recorded;
mod redistribute;
mod ring_attention;
pub mod safetensors;
mod saved;
pub mod storage;
mod summa;
mod tensor;
mod ulysses;
mod view;

pub use autograd::{Accumulator, Deferred, GradSink, Grads, is_grad_enabled, no_grad};
pub use colossal_comm::{Group, Mesh};
pub use device::Device;
pub use dtype::{Dtype, Element};
pub use error::{Error, Result};
pub use model::{Flow, Layer, Model, Stack};
pub use ops::{Added, AttentionMask, Best, Fp8Recipe, IGNORE, KvCache, RopeTable};
pub use params::{Flat, Held, Init, Lease, Param, ParamId, Params, Store};
pub use placement::{Context, Cut, Dim, Layout, Placement, Region, Role, Sharding};
pub use recompute::recompute;
pub use recorded::{Numbers, Recorded};
pub use tensor::{Scope, Tensor, Values};
pub use view::{View, ViewMut};
