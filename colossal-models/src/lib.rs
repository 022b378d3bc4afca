#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod decode;
pub mod decoder;
pub mod generate;
pub mod gguf;
pub mod gpt2;
pub mod hf;
pub mod llama;
pub mod mixtral;
#[cfg(feature = "train")]
pub mod train;

pub use colossal_tensor::{Device, Dtype, Error, Group, Mesh, Result, Scope, Tensor, no_grad};
pub use decoder::{CausalLm, Decoder, DecoderConfig, Goal, Head, Tokens, Training};
