//! Every kernel against its plain form or finite differences, on every instruction set that the
//! machine has and on one, two and three threads.

#[path = "it/accuracy.rs"]
mod accuracy;
#[path = "it/activation.rs"]
mod activation;
#[path = "it/attention.rs"]
mod attention;
#[path = "it/check.rs"]
mod check;
#[path = "it/conv.rs"]
mod conv;
#[path = "it/elementwise.rs"]
mod elementwise;
#[path = "it/embedding.rs"]
mod embedding;
#[path = "it/fp8.rs"]
mod fp8;
#[path = "it/gemm.rs"]
mod gemm;
#[path = "it/int8.rs"]
mod int8;
#[path = "it/norm.rs"]
mod norm;
#[path = "it/optimizers.rs"]
mod optimizers;
#[path = "it/rope.rs"]
mod rope;
#[path = "it/rows.rs"]
mod rows;
#[path = "it/softmax.rs"]
mod softmax;
