//! Logits of entries that only fill up a vocabulary: they take no part in any softmax.

use colossal_kernels::Float;

use crate::autograd::{is_grad_enabled, record_edges};
use crate::dtype::float;
use crate::error::Result;
use crate::kernels;
use crate::storage::Buffer;
use crate::tensor::Tensor;

/// The logit of padding: its exponential is zero beside that of any real one. Finite, so that a
/// rank of padding alone has a maximum.
const LOWEST: f32 = -1e30;

/// The largest magnitude of f16.
const LOWEST_F16: f32 = -65504.0;

impl Tensor {
    /// Logits `[.., vocab]` of which only the first `entries` of the whole dim exist.
    pub(crate) fn mask_padding(self, entries: usize) -> Result<Tensor> {
        let Some(last) = self.shape().len().checked_sub(1) else { return Ok(self) };
        let width = self.last_dim();
        let real = entries.saturating_sub(self.origin()[last]).min(width);
        if real == width || self.scope().is_fake() {
            return Ok(self);
        }
        let (scope, shape, dtype) = (self.scope().clone(), self.shape().to_vec(), self.dtype());
        let (layout, edge, graph) = (self.layout(), self.edge().clone(), self.requires_grad());
        let fill = move |buffer: &mut Buffer, value: f32| {
            float!("mask_padding", dtype, T => {
                let value = <T as Float>::from_f32(value);
                kernels::fill_columns(buffer.view_mut::<T>(), width, real, value)
            })
        };
        let lowest = if dtype == crate::Dtype::F16 { LOWEST_F16 } else { LOWEST };
        let mut logits = self.into_buffer()?;
        fill(&mut logits, lowest)?;
        let y = Tensor::place(&scope, logits, &shape, dtype, layout)?;
        if !graph || !is_grad_enabled() {
            return Ok(y);
        }
        Ok(record_edges("mask_padding", y, vec![edge], move |dy, back| {
            let layout = dy.layout();
            let mut grad = dy.into_buffer()?;
            fill(&mut grad, 0.0)?;
            back.give(0, Tensor::place(&scope, grad, &shape, dtype, layout)?)
        }))
    }
}
