//! Rules of optimizers, and sums of squares.

use colossal_kernels::cuda;
use colossal_kernels::{Adafactor, AdamW, Came, Factors, Float, Lamb, Lars, Lion, Piece, Sum};

use super::operand::{Lend, Operand, on_cuda, on_host, stream_of};
use crate::device::Device;
use crate::error::Result;
use crate::storage::Buffer;
use crate::view::{View, ViewMut};

/// [`AdamW::step_grad_scale`]
pub fn adamw(
    rule: &AdamW,
    t: u32,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
    grad_scale: f32,
) -> Result<()> {
    match stream_of!(params, grads, m, v) {
        Some(stream) => on_cuda!(stream, (params, grads, m, v) => {
            cuda::adamw(&stream, rule, t, params, grads, m, v, grad_scale)
        }),
        None => {
            on_host!((params, grads, m, v) => rule.step_grad_scale(t, params, grads, m, v, grad_scale))
        }
    }
    Ok(())
}

/// [`AdamW::step_masters`]
pub fn adamw_masters<T: Float>(
    rule: &AdamW,
    t: u32,
    grad_scale: f32,
    master: ViewMut<'_, f32>,
    params: ViewMut<'_, T>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
) -> Result<()> {
    match stream_of!(master, params, grads, m, v) {
        Some(stream) => on_cuda!(stream, (master, params, grads, m, v) => {
            cuda::adamw_masters(&stream, rule, t, grad_scale, master, params, grads, m, v)
        }),
        None => {
            on_host!((master, params, grads, m, v) => rule.step_masters(t, grad_scale, master, params, grads, m, v))
        }
    }
    Ok(())
}

/// [`Lion::step`]
pub fn lion(
    rule: &Lion,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    grad_scale: f32,
) -> Result<()> {
    match stream_of!(params, grads, m) {
        Some(stream) => {
            on_cuda!(stream, (params, grads, m) => cuda::lion(&stream, rule, params, grads, m, grad_scale))
        }
        None => on_host!((params, grads, m) => rule.step(params, grads, m, grad_scale)),
    }
    Ok(())
}

/// [`Lamb::step`]
pub fn lamb(
    rule: &Lamb,
    t: u32,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    v: ViewMut<'_, f32>,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads, m, v) {
        Some(stream) => on_cuda!(stream, (params, grads, m, v) => {
            cuda::lamb(&stream, rule, t, params, grads, m, v, grad_scale, sum)
        }),
        None => {
            on_host!((params, grads, m, v) => rule.step(t, params, grads, m, v, grad_scale, sum))
        }
    }
    Ok(())
}

/// [`Lars::step`]
pub fn lars(
    rule: &Lars,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads, m) {
        Some(stream) => on_cuda!(stream, (params, grads, m) => {
            cuda::lars(&stream, rule, params, grads, m, grad_scale, sum)
        }),
        None => on_host!((params, grads, m) => rule.step(params, grads, m, grad_scale, sum)),
    }
    Ok(())
}

/// [`Adafactor::step`]
pub fn adafactor(
    rule: &Adafactor,
    t: u32,
    piece: &Piece,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    state: &mut Factors,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads) {
        Some(stream) => on_cuda!(stream, (params, grads) => {
            cuda::adafactor(&stream, rule, t, piece, params, grads, state, grad_scale, sum)
        }),
        None => {
            on_host!((params, grads) => rule.step(t, piece, params, grads, state, grad_scale, sum))
        }
    }
    Ok(())
}

/// [`Came::step`]
pub fn came(
    rule: &Came,
    piece: &Piece,
    params: ViewMut<'_, f32>,
    grads: View<'_, f32>,
    m: ViewMut<'_, f32>,
    states: [&mut Factors; 2],
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    match stream_of!(params, grads, m) {
        Some(stream) => on_cuda!(stream, (params, grads, m) => {
            cuda::came(&stream, rule, piece, params, grads, m, states, grad_scale, sum)
        }),
        None => {
            on_host!((params, grads, m) => rule.step(piece, params, grads, m, states, grad_scale, sum))
        }
    }
    Ok(())
}

/// Sums of squares of numbered vectors, read together at the end: a GPU is waited for once.
#[derive(Debug)]
pub struct SquareSums {
    /// On the host; zero for those that a GPU has put elsewhere.
    sums: Vec<Option<f64>>,
    /// Where a GPU puts them.
    there: Option<Buffer>,
}

impl SquareSums {
    /// Of `count` vectors on `device`.
    pub fn new(device: &Device, count: usize) -> Result<SquareSums> {
        let there = match device {
            Device::Cpu => None,
            Device::Cuda(_) => Some(Buffer::on(device, count * size_of::<f64>())?),
        };
        Ok(SquareSums { sums: vec![None; count], there })
    }

    /// Vector `i` is `x`.
    pub fn put(&mut self, i: usize, x: View<'_, f32>) -> Result<()> {
        let sum = match (x, &mut self.there) {
            (View::Cuda(stream, x), Some(there)) => {
                let slot = there.view_mut::<f64>().range(i..i + 1);
                let mut slot = slot.on_cuda(stream)?;
                cuda::sum_of_squares(stream, x, slot.lend())?;
                0.0
            }
            (x, _) => on_host!((x) => colossal_kernels::sum_of_squares(x)),
        };
        self.sums[i] = Some(sum);
        Ok(())
    }

    /// Is vector `i` there?
    pub fn has(&self, i: usize) -> bool {
        self.sums[i].is_some()
    }

    /// The sum of each vector: zero of those that were not put.
    pub fn finish(self) -> Result<Vec<f64>> {
        let mut there = vec![0.0; self.sums.len()];
        if let Some(buffer) = &self.there {
            buffer.view::<f64>().read(&mut there)?;
        }
        let sum = |(here, there): (Option<f64>, f64)| here.map_or(0.0, |here| here + there);
        Ok(self.sums.into_iter().zip(there).map(sum).collect())
    }
}
