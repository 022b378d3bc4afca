//! Decoders against transformers, plans against one device.

#[path = "it/checkpoints.rs"]
mod checkpoints;
#[path = "it/gguf.rs"]
mod gguf;
#[path = "it/goldens.rs"]
mod goldens;
#[path = "it/graphs.rs"]
mod graphs;
#[path = "it/int8.rs"]
mod int8;
#[path = "it/memory.rs"]
mod memory;
#[path = "it/optimizers.rs"]
mod optimizers;
#[path = "it/parsers.rs"]
mod parsers;
#[path = "it/plans.rs"]
mod plans;
