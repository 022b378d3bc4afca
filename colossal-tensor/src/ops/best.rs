//! The most likely token of each row of logits, chosen where they are.

use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::placement::Placement;
use crate::storage::Buffer;
use crate::tensor::Tensor;

/// A token and its log-probability for each row, not yet on the host.
#[derive(Debug)]
pub struct Best {
    ids: Buffer,
    logprobs: Buffer,
}

impl Tensor {
    /// The first of the largest in the last dim, and its log-probability. No gradient.
    ///
    /// # Errors
    /// [`Error::Other`] where an axis cuts the last dim or a sum is pending.
    pub fn best(&self) -> Result<Best> {
        let last = self.shape().len().saturating_sub(1);
        let whole = |p: Placement| {
            matches!(p, Placement::Replicate) || matches!(p, Placement::Shard(d) if d < last)
        };
        if !self.scope().wide_axes().all(|axis| whole(self.layout()[axis])) {
            return Err(Error::Other("best: rows must be whole; redistribute first".into()));
        }
        let (device, rows) = (self.scope().device(), self.rows());
        let mut best =
            Best { ids: Buffer::on(device, 4 * rows)?, logprobs: Buffer::on(device, 4 * rows)? };
        float!("best", self.dtype(), T => {
            let x = self.lend::<T>()?;
            let (ids, logprobs) = (best.ids.view_mut(), best.logprobs.view_mut());
            kernels::logits_best(x.view::<T>(), self.last_dim(), ids, logprobs)
        })?;
        Ok(best)
    }
}

impl Best {
    /// Brings them to the host.
    ///
    /// # Errors
    /// What failed on the device.
    pub fn read(&self) -> Result<Vec<(i32, f32)>> {
        let rows = self.ids.bytes() / 4;
        let (mut ids, mut logprobs) = (vec![0i32; rows], vec![0.0f32; rows]);
        self.ids.view::<i32>().read(&mut ids)?;
        self.logprobs.view::<f32>().read(&mut logprobs)?;
        Ok(ids.into_iter().zip(logprobs).collect())
    }
}
