#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod chat;
pub mod config;
pub mod dataset;
pub mod doctor;
pub mod flight;
mod gguf_tokenizer;
pub mod launch;
pub mod model;
pub mod plan;
pub mod report;
pub mod tokenizer;
pub mod train;
