//! Every CUDA kernel against its CPU twin, which `it.rs` holds to the plain forms: on a GPU where
//! there is one, else on the stand-in driver (`cargo xtask stand-in`).
//!
//! Without a driver there is nothing to run on; `COLOSSAL_CUDA=required` makes that a failure.

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/blocks.rs"]
mod blocks;
#[path = "cuda/check.rs"]
mod check;
#[path = "cuda/conv.rs"]
mod conv;
#[path = "cuda/elementwise.rs"]
mod elementwise;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "cuda/fp8.rs"]
mod fp8;
#[path = "cuda/gemm.rs"]
mod gemm;
#[path = "cuda/graph.rs"]
mod graph;
#[path = "cuda/int8.rs"]
mod int8;
#[path = "cuda/optimizer.rs"]
mod optimizer;
#[path = "cuda/parts.rs"]
mod parts;
#[path = "cuda/rows.rs"]
mod rows;
