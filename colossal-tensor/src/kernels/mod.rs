//! Every kernel, wherever its operands lie.
//!
//! The names and arguments are those of [`colossal_kernels`], with views for slices. If any operand
//! is on a GPU the CUDA twin is put on its stream, and operands on the host are copied there first;
//! a kernel without a twin runs on the host, between copies.

mod operand;
mod optimizer;
mod product;

use colossal_kernels::{AttentionShape, Float, cuda};
use operand::{Lend, Operand, on_cuda, on_host, stream_of};

pub use optimizer::{SquareSums, adafactor, adamw, adamw_masters, came, lamb, lars, lion};
pub use product::{
    Fp8Mat, Mat, Part, gemm, gemm_fp8, gemm_grouped, gemm_int8, gemm_onto, quantize_fp8,
};

use crate::error::Result;
use crate::view::{View, ViewMut};

/// Kernels with a CUDA twin.
macro_rules! twins {
    ($($(#[$doc:meta])* $name:ident($($x:ident: $t:ty),* $(,)?);)*) => { $(
        $(#[$doc])*
        #[doc = concat!("[`colossal_kernels::", stringify!($name), "`]")]
        pub fn $name<T: Float>($($x: $t),*) -> Result<()> {
            match stream_of!($($x),*) {
                Some(stream) => on_cuda!(stream, ($($x),*) => cuda::$name(&stream, $($x),*)),
                None => on_host!(($($x),*) => colossal_kernels::$name($($x),*)),
            }
            Ok(())
        }
    )* };
}

twins! {
    add(a: View<'_, T>, b: View<'_, T>, y: ViewMut<'_, T>);
    mul(a: View<'_, T>, b: View<'_, T>, y: ViewMut<'_, T>);
    scale(x: View<'_, T>, s: f32, y: ViewMut<'_, T>);
    add_assign(x: View<'_, T>, y: ViewMut<'_, T>);
    add_into(x: View<'_, T>, y: ViewMut<'_, f32>);
    add_bias(x: View<'_, T>, bias: View<'_, T>, y: ViewMut<'_, T>);
    silu(x: View<'_, T>, y: ViewMut<'_, T>);
    silu_backward(dy: ViewMut<'_, T>, x: ViewMut<'_, T>);
    gelu(x: View<'_, T>, y: ViewMut<'_, T>);
    gelu_backward(dy: ViewMut<'_, T>, x: ViewMut<'_, T>);
    gelu_tanh(x: View<'_, T>, y: ViewMut<'_, T>);
    gelu_tanh_backward(dy: ViewMut<'_, T>, x: ViewMut<'_, T>);
    relu(x: View<'_, T>, y: ViewMut<'_, T>);
    relu_backward(dy: ViewMut<'_, T>, x: ViewMut<'_, T>);
    swiglu(gate: View<'_, T>, up: View<'_, T>, y: ViewMut<'_, T>);
    swiglu_backward(dy: ViewMut<'_, T>, gate: ViewMut<'_, T>, up: ViewMut<'_, T>);
    rms_norm(
        x: View<'_, T>, weight: View<'_, T>, eps: f32, y: ViewMut<'_, T>, rstd: ViewMut<'_, f32>,
    );
    rms_norm_backward(
        dy: ViewMut<'_, T>, x: View<'_, T>, weight: View<'_, T>, rstd: View<'_, f32>, accumulate: bool,
        dx: ViewMut<'_, T>, dweight: ViewMut<'_, f32>,
    );
    layer_norm(
        x: View<'_, T>, weight: View<'_, T>, bias: View<'_, T>, eps: f32,
        y: ViewMut<'_, T>, mean: ViewMut<'_, f32>, rstd: ViewMut<'_, f32>,
    );
    layer_norm_backward(
        dy: ViewMut<'_, T>, x: View<'_, T>, weight: View<'_, T>, bias: View<'_, T>,
        mean: View<'_, f32>, rstd: View<'_, f32>, accumulate: bool,
        dx: ViewMut<'_, T>, dweight: ViewMut<'_, f32>, dbias: ViewMut<'_, f32>,
    );
    softmax(x: View<'_, T>, dim: usize, y: ViewMut<'_, T>);
    softmax_backward(dy: View<'_, T>, y: View<'_, T>, dim: usize, dx: ViewMut<'_, T>);
    sum_rows(x: View<'_, T>, dim: usize, out: ViewMut<'_, f32>);
    embedding(ids: View<'_, i32>, table: View<'_, T>, dim: usize, y: ViewMut<'_, T>);
    embedding_backward(
        ids: View<'_, i32>, dy: View<'_, T>, dim: usize, dtable: ViewMut<'_, f32>,
    );
    rope(
        x: View<'_, T>, positions: View<'_, i32>, cos: View<'_, f32>, sin: View<'_, f32>,
        heads: usize, head_dim: usize, y: ViewMut<'_, T>,
    );
    rope_backward(
        dy: View<'_, T>, positions: View<'_, i32>, cos: View<'_, f32>, sin: View<'_, f32>,
        heads: usize, head_dim: usize, dx: ViewMut<'_, T>,
    );
    cross_entropy(
        logits: View<'_, T>, targets: View<'_, i32>, vocab: usize, ignore: i32,
        loss: ViewMut<'_, f32>, lse: ViewMut<'_, f32>,
    );
    cross_entropy_backward(
        dloss: View<'_, f32>, targets: View<'_, i32>, vocab: usize, ignore: i32,
        lse: View<'_, f32>, logits_to_grad: ViewMut<'_, T>,
    );
    combine_rows(
        at: View<'_, i32>, weights: View<'_, f32>, k: usize, rows: View<'_, T>, width: usize,
        y: ViewMut<'_, T>,
    );
    combine_rows_backward(
        at: View<'_, i32>, weights: View<'_, f32>, k: usize, rows: View<'_, T>, width: usize,
        dy: View<'_, T>, drows: ViewMut<'_, T>, dweights: ViewMut<'_, f32>,
    );
    scatter_rows(x: View<'_, T>, index: View<'_, i32>, width: usize, y: ViewMut<'_, T>);
    sum_groups(x: View<'_, T>, times: usize, width: usize, y: ViewMut<'_, T>);
    dropout(
        x: View<'_, T>, keys: View<'_, u64>, first: View<'_, u64>, width: usize, p: f32,
        y: ViewMut<'_, T>,
    );
    logits_best(
        logits: View<'_, T>, vocab: usize, best: ViewMut<'_, i32>, logprobs: ViewMut<'_, f32>,
    );
    logits_stats(
        logits: View<'_, T>, vocab: usize, max: ViewMut<'_, f32>, sum: ViewMut<'_, f32>,
    );
    vocabulary_terms(
        logits: View<'_, T>, targets: View<'_, i32>, vocab: usize, own: View<'_, f32>,
        max: View<'_, f32>, terms: ViewMut<'_, f32>,
    );
    merge_attention(
        part: View<'_, T>, part_lse: View<'_, f32>, heads: usize, tokens: usize,
        sum: ViewMut<'_, f32>, lse: ViewMut<'_, f32>,
    );
    row_moment(
        x: View<'_, T>, mean: Option<View<'_, f32>>, scale: f32, out: ViewMut<'_, f32>,
    );
    wide_norm(
        x: View<'_, T>, mean: View<'_, f32>, variance: View<'_, f32>, eps: f32,
        weight: View<'_, T>, bias: Option<View<'_, T>>, y: ViewMut<'_, T>,
    );
    wide_norm_sums(
        dy: View<'_, T>, x: View<'_, T>, mean: View<'_, f32>, variance: View<'_, f32>, eps: f32,
        weight: View<'_, T>, scale: f32, sums: ViewMut<'_, f32>,
    );
    wide_norm_backward(
        dy: View<'_, T>, x: View<'_, T>, mean: View<'_, f32>, variance: View<'_, f32>, eps: f32,
        weight: View<'_, T>, sums: View<'_, f32>, dx: ViewMut<'_, T>, dw: ViewMut<'_, f32>,
    );
}

/// [`colossal_kernels::vocabulary_loss`]
pub fn vocabulary_loss(
    max: View<'_, f32>,
    terms: View<'_, f32>,
    targets: View<'_, i32>,
    ignore: i32,
    loss: ViewMut<'_, f32>,
    lse: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(max, terms, targets, loss, lse) {
        Some(stream) => on_cuda!(stream, (max, terms, targets, loss, lse) => {
            cuda::vocabulary_loss(&stream, max, terms, targets, ignore, loss, lse)
        }),
        None => on_host!((max, terms, targets, loss, lse) => {
            colossal_kernels::vocabulary_loss(max, terms, targets, ignore, loss, lse);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::copy_block`]
pub fn copy_block<T: bytemuck::Pod + Send + Sync>(
    x: View<'_, T>,
    from: [usize; 2],
    sizes: [usize; 3],
    y: ViewMut<'_, T>,
    to: [usize; 2],
) -> Result<()> {
    match stream_of!(x, y) {
        Some(stream) => {
            on_cuda!(stream, (x, y) => cuda::copy_block(&stream, x, from, sizes, y, to))
        }
        None => on_host!((x, y) => colossal_kernels::copy_block(x, from, sizes, y, to)),
    }
    Ok(())
}

/// [`colossal_kernels::flash_attention`]
pub fn flash_attention<T: Float>(
    shape: &AttentionShape<'_>,
    q: View<'_, T>,
    k: View<'_, T>,
    v: View<'_, T>,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(q, k, v, out, lse) {
        Some(stream) => on_cuda!(stream, (q, k, v, out, lse) => {
            cuda::flash_attention(&stream, shape, q, k, v, out, lse)
        }),
        None => on_host!((q, k, v, out, lse) => {
            colossal_kernels::flash_attention(shape, q, k, v, out, lse);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::cuda::cached_attention`]; on the host
/// [`flash_attention`](colossal_kernels::flash_attention) of so many keys.
pub fn cached_attention<T: Float>(
    shape: &AttentionShape<'_>,
    lens: View<'_, i32>,
    q: View<'_, T>,
    k: View<'_, T>,
    v: View<'_, T>,
    out: ViewMut<'_, T>,
    lse: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(lens, q, k, v, out, lse) {
        Some(stream) => on_cuda!(stream, (lens, q, k, v, out, lse) => {
            cuda::cached_attention(&stream, shape, lens, q, k, v, out, lse)
        }),
        None => on_host!((lens, q, k, v, out, lse) => {
            let shape = AttentionShape { kv_lens: Some(lens), ..*shape };
            colossal_kernels::flash_attention(&shape, q, k, v, out, lse);
        }),
    }
    Ok(())
}

/// [`colossal_kernels::flash_attention_backward`]
pub fn flash_attention_backward<T: Float>(
    shape: &AttentionShape<'_>,
    q: View<'_, T>,
    k: View<'_, T>,
    v: View<'_, T>,
    out: View<'_, T>,
    lse: View<'_, f32>,
    dout: View<'_, T>,
    dq: ViewMut<'_, T>,
    dk: ViewMut<'_, T>,
    dv: ViewMut<'_, T>,
) -> Result<()> {
    match stream_of!(q, k, v, out, lse, dout, dq, dk, dv) {
        Some(stream) => on_cuda!(stream, (q, k, v, out, lse, dout, dq, dk, dv) => {
            cuda::flash_attention_backward(
                &stream, shape, q, k, v, out, lse, dout, dq, dk, dv,
            )
        }),
        None => on_host!((q, k, v, out, lse, dout, dq, dk, dv) => {
            colossal_kernels::flash_attention_backward(
                shape, q, k, v, out, lse, dout, dq, dk, dv,
            );
        }),
    }
    Ok(())
}

/// [`colossal_kernels::cast`]
pub fn cast<A: Float, B: Float>(x: View<'_, A>, y: ViewMut<'_, B>) -> Result<()> {
    match stream_of!(x, y) {
        Some(stream) => on_cuda!(stream, (x, y) => cuda::cast(&stream, x, y)),
        None => on_host!((x, y) => colossal_kernels::cast(x, y)),
    }
    Ok(())
}

/// [`colossal_kernels::sum`], into one element.
pub fn sum<T: Float>(x: View<'_, T>, y: ViewMut<'_, f32>) -> Result<()> {
    match stream_of!(x, y) {
        Some(stream) => on_cuda!(stream, (x, y) => cuda::sum(&stream, x, y)),
        None => on_host!((x, y) => y[0] = colossal_kernels::sum(x)),
    }
    Ok(())
}

/// [`colossal_kernels::fill`]
pub fn fill<T: Float>(y: ViewMut<'_, T>, value: T) -> Result<()> {
    match stream_of!(y) {
        Some(stream) => on_cuda!(stream, (y) => cuda::fill(&stream, y, value)),
        None => on_host!((y) => colossal_kernels::fill(y, value)),
    }
    Ok(())
}

/// [`colossal_kernels::fill_columns`]
pub fn fill_columns<T: Float>(
    y: ViewMut<'_, T>,
    width: usize,
    from: usize,
    value: T,
) -> Result<()> {
    match stream_of!(y) {
        Some(stream) => on_cuda!(stream, (y) => cuda::fill_columns(&stream, y, width, from, value)),
        None => on_host!((y) => colossal_kernels::fill_columns(y, width, from, value)),
    }
    Ok(())
}
