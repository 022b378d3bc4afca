#![doc = include_str!("../README.md")]

mod activation;
mod adamw;
mod attention;
mod blocks;
mod cast;
mod conv;
mod cross_entropy;
pub mod cuda;
mod elementwise;
mod embedding;
mod factored;
mod float;
mod floor;
mod fp8;
mod gemm;
mod int8;
mod isa;
mod layerwise;
mod lion;
mod math;
pub mod memory;
mod multi;
mod norm;
mod partial_softmax;
pub mod profile;
mod reduce;
pub mod reference;
mod rope;
mod rows;
mod softmax;
pub mod threads;
mod wide_norm;

pub use activation::{
    gelu, gelu_backward, gelu_tanh, gelu_tanh_backward, relu, relu_backward, silu, silu_backward,
    swiglu, swiglu_backward,
};
pub use adamw::AdamW;
pub use attention::{AttentionBias, AttentionShape, flash_attention, flash_attention_backward};
pub use attention::{PagedShape, paged_attention};
pub use blocks::{copy_block, dropout, fill_columns, random_bits, scatter_rows, sum_groups};
pub use cast::cast;
pub use conv::{ConvShape, conv, conv_backward_input, conv_backward_weight};
pub use cross_entropy::{
    ELSEWHERE, cross_entropy, cross_entropy_backward, logits_best, logits_stats,
};
pub use elementwise::{add, add_assign, add_bias, add_into, axpy, fill, mul, scale, sub};
pub use embedding::{embedding, embedding_backward};
pub use factored::{Adafactor, Came, Factors, Piece, Sum};
pub use float::Float;
pub use floor::Floor;
pub use fp8::{Fp8, Fp8Mat, Fp8Scaling, dequantize_fp8, fp8_pitch, gemm_fp8, quantize_fp8};
pub use gemm::{Activation, Epilogue, Mat, MatMut, Product, gemm, gemm_batched, gemm_grouped};
pub use int8::{Int8Matrix, gemm_int8};
pub use isa::{Isa, force_isa, isa};
pub use layerwise::{Lamb, Lars};
pub use lion::Lion;
pub use multi::{scale_many, sum_of_squares, sum_of_squares_many};
pub use norm::{layer_norm, layer_norm_backward, rms_norm, rms_norm_backward};
pub use partial_softmax::{merge_attention, vocabulary_loss, vocabulary_terms};
pub use reduce::{max, sum, sum_last, sum_rows};
pub use rope::{rope, rope_backward};
pub use rows::{combine_rows, combine_rows_backward};
pub use softmax::{log_softmax, log_softmax_backward, softmax, softmax_backward};
pub use threads::Threads;
pub use wide_norm::{row_moment, wide_norm, wide_norm_backward, wide_norm_sums};
