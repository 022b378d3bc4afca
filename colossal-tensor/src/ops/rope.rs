//! Rotary position embedding (Su et al., 2021) in Hugging Face's half-split layout.

use std::sync::Arc;

use colossal_kernels as kernels;

use super::produce;
use crate::autograd::record;
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::propagate::{self, propagate};
use crate::tensor::Tensor;

/// Cosines and sines of every position and frequency: `[positions, head_dim / 2]` each.
#[derive(Debug, Clone)]
pub struct RopeTable(Arc<Tables>);

#[derive(Debug)]
struct Tables {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// The table of these inverse frequencies (one per pair of channels) up to `positions`.
    pub fn new(inverse_frequencies: &[f64], positions: usize) -> RopeTable {
        let half = inverse_frequencies.len();
        let mut cos = Vec::with_capacity(positions * half);
        let mut sin = Vec::with_capacity(positions * half);
        for position in 0..positions {
            for f in inverse_frequencies {
                // The angle is rounded to f32 first: so do the published implementations.
                let angle = position as f32 * *f as f32;
                cos.push(angle.cos());
                sin.push(angle.sin());
            }
        }
        RopeTable(Arc::new(Tables { cos, sin, half }))
    }

    /// Positions it covers.
    pub fn positions(&self) -> usize {
        self.0.cos.len() / self.0.half.max(1)
    }
}

impl Tensor {
    /// Rotates `[batch, seq, heads, head_dim]` by `positions` (one per token, `batch * seq`).
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not fit or a position lies beyond the table.
    pub fn rope(&self, positions: &Arc<Vec<i32>>, table: &RopeTable) -> Result<Tensor> {
        let &[batch, seq, heads, head_dim] = self.shape() else {
            return Err(Error::shape(
                "rope",
                self.shape(),
                &[],
                "x is [batch, seq, heads, head_dim]",
            ));
        };
        if positions.len() != batch * seq || head_dim != 2 * table.0.half {
            let right = [positions.len(), 2 * table.0.half];
            let reason = "one position per token, and the table's head size";
            return Err(Error::shape("rope", self.shape(), &right, reason));
        }
        let limit = table.positions() as i32;
        if let Some(bad) = positions.iter().find(|p| **p < 0 || **p >= limit) {
            return Err(Error::Other(format!(
                "rope: position {bad} is outside the {limit} positions of this model; \
                 shorten the sequence or raise max_position_embeddings"
            )));
        }
        let layout = propagate("rope", &[self], propagate::rope)?;
        let rotate = move |x: &Tensor,
                           positions: &[i32],
                           table: &RopeTable,
                           layout,
                           back: bool|
              -> Result<Tensor> {
            produce(x.scope(), x.shape(), x.dtype(), layout, |y| {
                float!("rope", x.dtype(), T => {
                    let (v, t) = (x.read::<T>()?, &table.0);
                    let (v, y) = (v.as_slice::<T>(), y.as_mut_slice::<T>());
                    match back {
                        false => kernels::rope(v, positions, &t.cos, &t.sin, heads, head_dim, y),
                        true => kernels::rope_backward(v, positions, &t.cos, &t.sin, heads, head_dim, y),
                    }
                    Ok(())
                })
            })
        };
        let y = rotate(self, positions, table, layout, false)?;
        let (positions, table) = (positions.clone(), table.clone());
        Ok(record("rope", y, &[self], move |dy, back| {
            back.give(0, rotate(&dy, &positions, &table, dy.layout(), true)?)
        }))
    }
}
