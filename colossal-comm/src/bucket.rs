//! Many buffers in few collectives: small ones travel together, large ones alone.
//!
//! A collective costs a latency and a time per byte; buffers below [`SMALL`] bytes are mostly
//! latency, so they are copied into buckets of at most [`BUCKET`] bytes. The lists must have the
//! same lengths on all ranks.

use std::ops::Range;

use crate::element::{Element, ReduceOp};
use crate::error::{Error, Result};
use crate::group::Group;

/// Buffers of at least this many bytes go alone: a copy would cost more than it saves.
const SMALL: usize = 64 << 10;

/// What a bucket holds at most.
const BUCKET: usize = 1 << 20;

/// Which neighbours in a list of lengths travel together.
fn buckets<T>(lens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    let mut room = 0;
    for (i, len) in lens.enumerate() {
        let bytes = len * size_of::<T>();
        match all.last_mut() {
            Some(last) if bytes < SMALL && bytes <= room => {
                last.end = i + 1;
                room -= bytes;
            }
            _ => {
                all.push(i..i + 1);
                room = if bytes < SMALL { BUCKET - bytes } else { 0 };
            }
        }
    }
    all
}

impl Group {
    /// [`Group::all_reduce`] of many buffers.
    ///
    /// ```
    /// use colossal_comm::{ReduceOp, Verb, on_ranks};
    /// on_ranks(2, |g| {
    ///     let (mut weight, mut bias) = (vec![1.0f32; 64], vec![2.0f32; 8]);
    ///     g.all_reduce_coalesced(&mut [&mut weight, &mut bias], ReduceOp::Sum).unwrap();
    ///     assert_eq!((weight[63], bias[7]), (2.0, 4.0));
    ///     assert_eq!(g.counters().calls_of(Verb::AllReduce), 1);
    /// });
    /// ```
    #[track_caller]
    pub fn all_reduce_coalesced<T: Element>(
        &self,
        bufs: &mut [&mut [T]],
        op: ReduceOp,
    ) -> Result<()> {
        let mut together = Vec::new();
        for bucket in buckets::<T>(bufs.iter().map(|b| b.len())) {
            if let [alone] = &mut bufs[bucket.clone()] {
                self.all_reduce(alone, op)?;
                continue;
            }
            together.clear();
            bufs[bucket.clone()].iter().for_each(|b| together.extend_from_slice(b));
            self.all_reduce(&mut together, op)?;
            let mut rest = &together[..];
            for buf in &mut bufs[bucket] {
                let (here, after) = rest.split_at(buf.len());
                buf.copy_from_slice(here);
                rest = after;
            }
        }
        Ok(())
    }

    /// [`Group::all_gather`] of many buffers.
    ///
    /// # Errors
    /// [`Error::Argument`] unless each output is `world_size` times its input.
    #[track_caller]
    pub fn all_gather_coalesced<T: Element>(
        &self,
        inputs: &[&[T]],
        outputs: &mut [&mut [T]],
    ) -> Result<()> {
        let n = self.world_size();
        self.pairs("all_gather_coalesced", inputs.len(), outputs.len())?;
        for (input, output) in inputs.iter().zip(outputs.iter()) {
            self.times("all_gather", ("output", output.len()), ("input", input.len()))?;
        }
        for bucket in buckets::<T>(inputs.iter().map(|b| b.len())) {
            if let ([input], [output]) = (&inputs[bucket.clone()], &mut outputs[bucket.clone()]) {
                self.all_gather(input, output)?;
                continue;
            }
            let part = inputs[bucket.clone()].concat();
            let mut all = vec![T::zeroed(); n * part.len()];
            self.all_gather(&part, &mut all)?;
            for (rank, from) in all.chunks(part.len().max(1)).enumerate() {
                let mut rest = from;
                for output in &mut outputs[bucket.clone()] {
                    let len = output.len() / n;
                    let (here, after) = rest.split_at(len);
                    output[rank * len..(rank + 1) * len].copy_from_slice(here);
                    rest = after;
                }
            }
        }
        Ok(())
    }

    /// [`Group::reduce_scatter`] of many buffers.
    ///
    /// # Errors
    /// [`Error::Argument`] unless each input is `world_size` times its output.
    #[track_caller]
    pub fn reduce_scatter_coalesced<T: Element>(
        &self,
        inputs: &[&[T]],
        outputs: &mut [&mut [T]],
        op: ReduceOp,
    ) -> Result<()> {
        let n = self.world_size();
        self.pairs("reduce_scatter_coalesced", inputs.len(), outputs.len())?;
        for (input, output) in inputs.iter().zip(outputs.iter()) {
            self.times("reduce_scatter", ("input", input.len()), ("output", output.len()))?;
        }
        for bucket in buckets::<T>(outputs.iter().map(|b| b.len())) {
            if let ([input], [output]) = (&inputs[bucket.clone()], &mut outputs[bucket.clone()]) {
                self.reduce_scatter(input, output, op)?;
                continue;
            }
            let mut all = Vec::new();
            for rank in 0..n {
                for input in &inputs[bucket.clone()] {
                    let len = input.len() / n;
                    all.extend_from_slice(&input[rank * len..(rank + 1) * len]);
                }
            }
            let mut part = vec![T::zeroed(); all.len() / n];
            self.reduce_scatter(&all, &mut part, op)?;
            let mut rest = &part[..];
            for output in &mut outputs[bucket] {
                let (here, after) = rest.split_at(output.len());
                output.copy_from_slice(here);
                rest = after;
            }
        }
        Ok(())
    }

    fn pairs(&self, op: &'static str, inputs: usize, outputs: usize) -> Result<()> {
        if inputs == outputs {
            return Ok(());
        }
        let reason = format!("{inputs} inputs and {outputs} outputs; there must be as many");
        Err(Error::Argument { op, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ones_travel_together_and_large_ones_alone() {
        let lens = [10, 20, 1 << 20, 5, 5, 16_000, 0];
        assert_eq!(buckets::<f32>(lens.into_iter()), [0..2, 2..3, 3..7]);
        // A bucket has an end.
        assert_eq!(buckets::<u8>([60_000; 20].into_iter()), [0..17, 17..20]);
    }
}
