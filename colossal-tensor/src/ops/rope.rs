//! Rotary position embedding (Su et al., 2021) in Hugging Face's half-split layout.

use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use super::produce;
use crate::autograd::record;
use crate::device::Device;
use crate::dtype::float;
use crate::error::{Error, Result};
use crate::kernels;
use crate::propagate::{self, propagate};
use crate::storage::Buffer;
use crate::tensor::Tensor;
use crate::view::View;

/// Cosines and sines of every position and frequency, computed as far as positions are met and
/// shared by all tables of the same frequencies: the layers of a model, and its copies.
#[derive(Debug, Clone)]
pub struct RopeTable {
    shared: Arc<Shared>,
    positions: usize,
}

#[derive(Debug)]
struct Shared {
    inverse: Vec<f32>,
    tables: RwLock<Arc<Tables>>,
}

/// `[positions, head_dim / 2]` each.
#[derive(Debug, Default)]
struct Tables {
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The same on GPUs that use them.
    copies: Mutex<Vec<(Device, Arc<[Buffer; 2]>)>>,
}

impl Tables {
    fn lend<T>(
        &self,
        device: &Device,
        work: impl FnOnce(View<'_, f32>, View<'_, f32>) -> Result<T>,
    ) -> Result<T> {
        match device {
            Device::Cpu => work(View::Cpu(&self.cos), View::Cpu(&self.sin)),
            Device::Cuda(_) => {
                let copy = self.copy(device)?;
                work(copy[0].view(), copy[1].view())
            }
        }
    }

    fn copy(&self, device: &Device) -> Result<Arc<[Buffer; 2]>> {
        let mut copies = self.copies.lock();
        if let Some((_, copy)) = copies.iter().find(|(place, _)| place == device) {
            return Ok(copy.clone());
        }
        let copy = |x: &Vec<f32>| Buffer::copy_of(device, View::Cpu(x));
        let copy = Arc::new([copy(&self.cos)?, copy(&self.sin)?]);
        copies.push((device.clone(), copy.clone()));
        Ok(copy)
    }
}

impl RopeTable {
    /// The table of these inverse frequencies (one per pair of channels) up to `positions`.
    pub fn new(inverse_frequencies: &[f64], positions: usize) -> RopeTable {
        static ALL: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
        let inverse: Vec<f32> = inverse_frequencies.iter().map(|f| *f as f32).collect();
        let mut all = ALL.lock();
        all.retain(|shared| shared.strong_count() > 0);
        let known = all.iter().filter_map(Weak::upgrade).find(|shared| shared.inverse == inverse);
        let shared = known.unwrap_or_else(|| {
            let new = Arc::new(Shared { inverse, tables: RwLock::default() });
            all.push(Arc::downgrade(&new));
            new
        });
        RopeTable { shared, positions }
    }

    /// Positions it covers.
    pub fn positions(&self) -> usize {
        self.positions
    }

    fn half(&self) -> usize {
        self.shared.inverse.len()
    }

    /// Tables that reach to position `last`.
    fn upto(&self, last: usize) -> Arc<Tables> {
        let half = self.half();
        let reaches = |tables: &Tables| tables.cos.len() > last * half;
        let now = self.shared.tables.read().clone();
        if reaches(&now) || half == 0 {
            return now;
        }
        let mut tables = self.shared.tables.write();
        if !reaches(&tables) {
            let positions = (last + 1).next_power_of_two().max(256);
            let mut new = Tables::default();
            new.cos.reserve(positions * half);
            new.sin.reserve(positions * half);
            for position in 0..positions {
                for f in &self.shared.inverse {
                    // The angle is rounded to f32: so do the published implementations.
                    let angle = position as f32 * f;
                    new.cos.push(angle.cos());
                    new.sin.push(angle.sin());
                }
            }
            *tables = Arc::new(new);
        }
        tables.clone()
    }
}

impl Tensor {
    /// Rotates `[batch, seq, heads, head_dim]` by `positions` (integers, one per token).
    ///
    /// # Errors
    /// [`Error::Shape`] when sizes do not fit or a position lies beyond the table.
    pub fn rope(&self, positions: &Tensor, table: &RopeTable) -> Result<Tensor> {
        let &[batch, seq, heads, head_dim] = self.shape() else {
            return Err(Error::shape(
                "rope",
                self.shape(),
                &[],
                "x is [batch, seq, heads, head_dim]",
            ));
        };
        if positions.len() != batch * seq || head_dim != 2 * table.half() {
            let right = [positions.len(), 2 * table.half()];
            let reason = "one position per token, and the table's head size";
            return Err(Error::shape("rope", self.shape(), &right, reason));
        }
        let last = last_position(positions, table.positions())?;
        let layout = propagate("rope", &[self], propagate::rope)?;
        let table = table.upto(last);
        let rotate = move |x: &Tensor, positions: &Tensor, t: &Tables, layout, back: bool| {
            produce(x.scope(), x.shape(), x.dtype(), layout, |y| {
                float!("rope", x.dtype(), T => {
                    let v = x.lend::<T>()?;
                    let (v, y) = (v.view::<T>(), y.view_mut::<T>());
                    let p = positions.lend::<i32>()?;
                    let p = p.view();
                    t.lend(x.scope().device(), |cos, sin| match back {
                        false => kernels::rope(v, p, cos, sin, heads, head_dim, y),
                        true => kernels::rope_backward(v, p, cos, sin, heads, head_dim, y),
                    })
                })
            })
        };
        let y = rotate(self, positions, &table, layout, false)?;
        let positions = positions.clone();
        Ok(record("rope", y, &[self], move |dy, back| {
            back.give(0, rotate(&dy, &positions, &table, dy.layout(), true)?)
        }))
    }
}

/// The largest of these, or one less than their bound; an error unless all are below `limit`.
fn last_position(positions: &Tensor, limit: usize) -> Result<usize> {
    if positions.scope().is_fake() {
        return Ok(0);
    }
    let outside = |position: i64| {
        Error::Other(format!(
            "rope: position {position} is outside the {limit} positions of this model; \
             shorten the sequence or raise max_position_embeddings"
        ))
    };
    if let Some(below) = positions.below() {
        return if below > limit { Err(outside(below as i64 - 1)) } else { Ok(below.max(1) - 1) };
    }
    let values = positions.read::<i32>()?;
    match values.as_slice::<i32>().iter().find(|p| **p < 0 || **p as usize >= limit) {
        Some(bad) => Err(outside((*bad).into())),
        None => Ok(values.as_slice::<i32>().iter().copied().max().unwrap_or(0) as usize),
    }
}
