//! The ops a model is written in: a layout rule, a kernel, and a backward that consumes.

mod attention;
mod best;
mod block_embedding;
mod cross_entropy;
mod dropout;
mod elementwise;
mod external;
mod fp8;
mod heads;
mod index;
mod kv_cache;
mod matmul;
mod norm;
mod padding;
mod reduce;
mod reshape;
mod rope;
mod wide_norm;

pub use attention::AttentionMask;
pub use best::Best;
pub use cross_entropy::IGNORE;
pub use fp8::Fp8Recipe;
pub use kv_cache::{Added, KvCache};
pub use rope::RopeTable;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::placement::Layout;
use crate::storage::Buffer;
use crate::tensor::{Scope, Tensor};

/// A new tensor filled by `fill`, or a pretended one on a pretended mesh.
pub(crate) fn produce(
    scope: &Scope,
    shape: &[usize],
    dtype: Dtype,
    layout: Layout,
    fill: impl FnOnce(&mut Buffer) -> Result<()>,
) -> Result<Tensor> {
    if scope.is_fake() {
        return Ok(Tensor::pretend(scope, shape, dtype, layout));
    }
    let bytes = shape.iter().product::<usize>() * dtype.bytes();
    let mut buffer = Buffer::on(scope.place_of(dtype), bytes)?;
    fill(&mut buffer)?;
    Ok(Tensor::wrap(scope, buffer, shape, dtype, layout))
}

/// Refuses operands of different dtypes, or on different devices.
pub(crate) fn same_dtype(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    let (left, right) = (a.scope().device(), b.scope().device());
    if a.dtype() != b.dtype() {
        Err(Error::Dtype { op, left: a.dtype(), right: b.dtype() })
    } else if left != right {
        Err(Error::Device { op, left: left.to_string(), right: right.to_string() })
    } else {
        Ok(())
    }
}

/// Refuses operands of different shapes.
pub(crate) fn same_shape(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.shape() == b.shape() {
        Ok(())
    } else {
        Err(Error::shape(op, a.shape(), b.shape(), "shapes must be equal"))
    }
}
