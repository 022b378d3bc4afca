//! LAMB and LARS. Norms come to the host, 16 bytes a parameter: other ranks may hold the rest of it.

use super::launch::{Plain, resident, vectors};
use super::{Function, Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use crate::elementwise::check;
use crate::factored::Sum;
use crate::float::Float;
use crate::{Lamb, Lars};

pub(super) static LAYERWISE: Source = source!("layerwise");

pub(super) fn function(stream: &Stream, name: &'static str) -> Result<Function> {
    stream.function(&LAYERWISE, &[("TYPE", f32::CUDA)], name)
}

/// The totals of `count` pairs of partial sums, over all ranks.
pub(super) fn totals(
    stream: &Stream,
    count: usize,
    sum: Sum<'_>,
    leave: impl FnOnce(SliceMut<'_, f64>) -> Result<()>,
) -> Result<[f64; 2]> {
    let mut totals = [0.0; 2];
    stream.with_scratch(2 * count + 2, |mut scratch: SliceMut<'_, f64>| {
        leave(scratch.reborrow().range(0..2 * count))?;
        let (partials, out) = (scratch.address(), scratch.address() + 16 * count as u64);
        function(stream, "add_pairs")?
            .launch(Grid::line(1, 256), args![partials, count as u32, out])?;
        stream.download(scratch.as_slice().range(2 * count..2 * count + 2), &mut totals)
    })?;
    sum(&mut totals);
    Ok(totals)
}

/// Elements of a block, and blocks.
fn spans(stream: &Stream, n: usize) -> (usize, usize) {
    let span = n.div_ceil(resident(stream)).next_multiple_of(1024).max(1024);
    (span, n.div_ceil(span))
}

/// Step `t` (from 1) of [`Lamb`]: the twin of [`Lamb::step`].
pub fn lamb(
    stream: &Stream,
    rule: &Lamb,
    t: u32,
    params: SliceMut<'_, f32>,
    grads: Slice<'_, f32>,
    mut m: SliceMut<'_, f32>,
    mut v: SliceMut<'_, f32>,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    for len in [grads.len(), m.len(), v.len()] {
        check("lamb", params.len(), len);
    }
    let n = grads.len();
    let f = rule.factors(t, grad_scale);
    let (span, blocks) = spans(stream, n);
    let norms = totals(stream, blocks, sum, |partials| {
        let (p, m, v) = (params.as_slice(), m.reborrow(), v.reborrow());
        function(stream, "lamb_moments")?.launch(
            Grid::line(blocks, 256),
            args![p, grads, m, v, Plain(f), n as u64, span as u64, partials],
        )
    })?;
    let lr = rule.rate(norms);
    function(stream, "lamb_update")?
        .launch(vectors::<f32>(n), args![params, m, v, Plain(f), lr, n as u64])
}

/// One step of [`Lars`]: the twin of [`Lars::step`].
pub fn lars(
    stream: &Stream,
    rule: &Lars,
    params: SliceMut<'_, f32>,
    grads: Slice<'_, f32>,
    m: SliceMut<'_, f32>,
    grad_scale: f32,
    sum: Sum<'_>,
) -> Result<()> {
    check("lars", params.len(), grads.len());
    check("lars", params.len(), m.len());
    let n = grads.len();
    let (span, blocks) = spans(stream, n);
    let norms = totals(stream, blocks, sum, |partials| {
        function(stream, "lars_squares")?.launch(
            Grid::line(blocks, 256),
            args![params.as_slice(), grads, grad_scale, n as u64, span as u64, partials],
        )
    })?;
    let f = Plain(rule.factors(norms, grad_scale));
    function(stream, "lars_update")?.launch(vectors::<f32>(n), args![params, grads, m, f, n as u64])
}
