//! AdamW and Lion; norm and scale of many tensors at once: gradient clipping.

use super::launch::{Plain, resident, vectors};
use super::{Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::float::Float;
use crate::{AdamW, Lion};

pub(super) static OPTIMIZER: Source = source!("optimizer");

/// Step `t` (from 1) of [`AdamW`] with every gradient multiplied by `grad_scale`: the twin of
/// [`AdamW::step_grad_scale`].
pub fn adamw(
    stream: &Stream,
    rule: &AdamW,
    t: u32,
    params: SliceMut<'_, f32>,
    grads: Slice<'_, f32>,
    m: SliceMut<'_, f32>,
    v: SliceMut<'_, f32>,
    grad_scale: f32,
) -> Result<()> {
    for len in [grads.len(), m.len(), v.len()] {
        check("adamw", params.len(), len);
    }
    let f = stream.function(&OPTIMIZER, &[("TYPE", f32::CUDA)], "adamw")?;
    let factors = Plain(rule.factors(t, grad_scale));
    f.launch(vectors::<f32>(grads.len()), args![params, grads, m, v, factors, grads.len() as u64])
}

/// As [`adamw`] on f32 masters, writing the parameters in the same pass: the twin of
/// [`AdamW::step_masters`].
pub fn adamw_masters<T: Float>(
    stream: &Stream,
    rule: &AdamW,
    t: u32,
    grad_scale: f32,
    master: SliceMut<'_, f32>,
    params: SliceMut<'_, T>,
    grads: Slice<'_, f32>,
    m: SliceMut<'_, f32>,
    v: SliceMut<'_, f32>,
) -> Result<()> {
    for len in [params.len(), grads.len(), m.len(), v.len()] {
        check("adamw", master.len(), len);
    }
    let f = stream.function(&OPTIMIZER, &[("TYPE", T::CUDA)], "adamw_masters")?;
    let factors = Plain(rule.factors(t, grad_scale));
    let n = grads.len();
    f.launch(vectors::<f32>(n), args![master, params, grads, m, v, factors, n as u64])
}

/// One step of [`Lion`]: the twin of [`Lion::step`].
pub fn lion(
    stream: &Stream,
    rule: &Lion,
    params: SliceMut<'_, f32>,
    grads: Slice<'_, f32>,
    m: SliceMut<'_, f32>,
    grad_scale: f32,
) -> Result<()> {
    check("lion", params.len(), grads.len());
    check("lion", params.len(), m.len());
    let f = stream.function(&OPTIMIZER, &[("TYPE", f32::CUDA)], "lion")?;
    let decay = 1.0 - rule.lr * rule.weight_decay;
    let factors = Plain([decay, rule.lr, rule.beta1, rule.beta2, grad_scale]);
    f.launch(vectors::<f32>(grads.len()), args![params, grads, m, factors, grads.len() as u64])
}

/// Tensors of one launch; each has blocks of its own.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Many {
    address: [u64; 32],
    len: [u64; 32],
    first: [u32; 32],
    count: u32,
    span: u32,
}

/// `launch(tensors, blocks, blocks of the launches before)` for groups of tensors; the number of
/// all blocks.
fn grouped(
    stream: &Stream,
    tensors: impl Iterator<Item = (u64, usize)> + Clone,
    mut launch: impl FnMut(Many, usize, usize) -> Result<()>,
) -> Result<usize> {
    let total: usize = tensors.clone().map(|(_, len)| len).sum();
    let span = total.div_ceil(resident(stream)).next_multiple_of(4096).clamp(4096, 1 << 30);
    let mut many: Many = bytemuck::Zeroable::zeroed();
    let (mut blocks, mut before) = (0, 0);
    let mut rest = tensors.filter(|(_, len)| *len > 0).peekable();
    while let Some((address, len)) = rest.next() {
        let at = many.count as usize;
        many.address[at] = address;
        many.len[at] = len as u64;
        many.first[at] = blocks as u32;
        many.count += 1;
        many.span = span as u32;
        blocks += len.div_ceil(span);
        if many.count == 32 || rest.peek().is_none() {
            launch(many, blocks, before)?;
            before += blocks;
            blocks = 0;
            many.count = 0;
        }
    }
    Ok(before)
}

/// The sum of squares of one tensor, as [`sum_of_squares_many`].
pub fn sum_of_squares(stream: &Stream, x: Slice<'_, f32>, out: SliceMut<'_, f64>) -> Result<()> {
    sum_of_squares_many(stream, &[x], out)
}

/// The sum of squares of all tensors together, to a slice of one element: blocks in f32, their
/// sums in f64, in an order that depends on the lengths alone.
pub fn sum_of_squares_many(
    stream: &Stream,
    tensors: &[Slice<'_, f32>],
    out: SliceMut<'_, f64>,
) -> Result<()> {
    assert_eq!(out.len(), 1, "sum_of_squares: out is one element");
    let types = [("TYPE", f32::CUDA)];
    let partial = stream.function(&OPTIMIZER, &types, "sum_of_squares")?;
    let finish = stream.function(&OPTIMIZER, &types, "sum_of_squares_finish")?;
    let list = tensors.iter().map(|t| (t.address(), t.len()));
    let blocks = grouped(stream, list.clone(), |_, _, _| Ok(()))?;
    stream.with_scratch(blocks, |mut partials: SliceMut<'_, f64>| {
        grouped(stream, list, |many, blocks, before| {
            let partials = partials.reborrow().range(before..before + blocks);
            partial.launch(Grid::line(blocks, 256), args![Plain(many), partials])
        })?;
        finish.launch(Grid::line(1, 256), args![partials, blocks as u32, out])
    })
}

/// Multiplies every tensor by `s`.
pub fn scale_many(stream: &Stream, tensors: &mut [SliceMut<'_, f32>], s: f32) -> Result<()> {
    let f = stream.function(&OPTIMIZER, &[("TYPE", f32::CUDA)], "scale_many")?;
    let list = tensors.iter().map(|t| (t.address(), t.len()));
    grouped(stream, list, |many, blocks, _| {
        f.launch(Grid::line(blocks, 256), args![Plain(many), s])
    })?;
    Ok(())
}
