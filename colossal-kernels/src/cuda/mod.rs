//! The kernels' CUDA twins, and the runtime beneath them.
//!
//! Nothing of CUDA is needed to build, and a machine without it sees no difference: the driver
//! and the compiler are looked for at run time, before their first call ([`devices`]). Kernels are
//! CUDA C++ without headers, compiled for the device that is there straight to machine code and
//! kept on disk ([`module`](Source)).
//!
//! A twin has the name and the arguments of its CPU kernel, the [`Stream`] first and device slices
//! for slices: it is put on the stream and returns. What follows on the same stream sees its
//! result, so work of one stream needs no synchronisation; between streams stand [`Event`]s.
//!
//! ```no_run
//! use colossal_kernels::cuda::{Block, Stream};
//!
//! # fn main() -> colossal_kernels::cuda::Result<()> {
//! let stream = Stream::new(0)?;
//! let mut x = Block::new(stream.device(), 4 * 4)?;
//! stream.upload(&[1.0f32, 2.0, 3.0, 4.0], x.slice_mut(0..4))?;
//! let mut back = [0.0f32; 4];
//! stream.download(x.slice(0..4), &mut back)?;
//! # Ok(())
//! # }
//! ```

mod activation;
mod attention;
mod blas;
mod blocks;
mod cast;
mod catalog;
mod conv;
mod cross_entropy;
mod decode;
mod device;
mod dnn;
mod elementwise;
mod embedding;
mod error;
mod factored;
mod fp8;
mod gemm;
mod graph;
mod hopper;
mod int8;
mod launch;
mod layerwise;
mod library;
mod memory;
mod module;
mod norm;
mod optimizer;
mod partial_softmax;
mod ranks;
mod reduce;
mod rope;
mod rows;
mod slice;
mod softmax;
mod stream;
mod wide_norm;

pub use activation::{
    gelu, gelu_backward, gelu_tanh, gelu_tanh_backward, relu, relu_backward, silu, silu_backward,
    swiglu, swiglu_backward,
};
pub use attention::{flash_attention, flash_attention_backward};
pub use blocks::{copy_block, dropout, fill_columns, scatter_rows, sum_groups};
pub use cast::cast;
pub use catalog::{Build, catalog};
pub use conv::{conv, conv_backward_input, conv_backward_weight};
pub use cross_entropy::{cross_entropy, cross_entropy_backward, logits_best, logits_stats};
pub use decode::{cached_attention, paged_attention};
pub use device::{Device, devices};
pub use elementwise::{add, add_assign, add_bias, add_into, axpy, fill, mul, scale, sub};
pub use embedding::{embedding, embedding_backward};
pub use error::{Error, Result};
pub use factored::{adafactor, came};
pub use fp8::{Fp8Mat, dequantize_fp8, gemm_fp8, quantize_fp8};
pub use gemm::{Epilogue, Mat, MatMut, Product, gemm, gemm_batched, gemm_grouped};
pub use graph::Graph;
pub(crate) use int8::There;
pub use int8::gemm_int8;
pub use layerwise::{lamb, lars};
pub use library::{Found, found};
pub use memory::{Block, Pinned};
pub use module::{Function, Grid, Source};
pub(crate) use module::{args, source};
pub use norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
pub use optimizer::{adamw, adamw_masters, lion, scale_many, sum_of_squares, sum_of_squares_many};
pub use partial_softmax::{merge_attention, vocabulary_loss, vocabulary_terms};
pub use ranks::{RankOp, reduce_ranks};
pub use reduce::{max, sum, sum_last, sum_rows};
pub use rope::{rope, rope_backward};
pub use rows::{combine_rows, combine_rows_backward};
pub use slice::{Arg, Slice, SliceMut};
pub use softmax::{log_softmax, log_softmax_backward, softmax, softmax_backward};
pub use stream::{Event, Stream, Transfer, WeakStream};
pub use wide_norm::{row_moment, wide_norm, wide_norm_backward, wide_norm_sums};
