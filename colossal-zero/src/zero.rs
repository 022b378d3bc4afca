//! The Zero Redundancy Optimizer (Rajbhandari et al., 2020), stages 1 and 2, and plain data
//! parallelism as stage 0, over one flat vector of parameters.
//!
//! The caller says when a parameter's gradient is ready; when all of a bucket's are, its
//! reduction starts in flight, so that it overlaps with the rest of the backward pass. It knows
//! no optimizer: [`Zero::step`] hands out this rank's pieces with their gradients.

use std::ops::Range;

use colossal_comm::{Element, Group, Pending, ReduceOp};

use crate::error::{Error, Result};
use crate::partition::Partition;

/// What is cut over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Nothing: every rank updates everything (data parallelism).
    Zero,
    /// Optimizer states: gradients are reduce-scattered once a step.
    One,
    /// And gradients: they are reduce-scattered every microbatch and only this rank's kept.
    Two,
}

/// Gradients of a flat vector, summed over a group.
#[derive(Debug)]
pub struct Zero {
    stage: Stage,
    group: Group,
    len: usize,
    partition: Partition,
    /// Buckets being filled: the buffer and how many parameters are in it.
    filling: Vec<Option<(Vec<f32>, usize)>>,
    flying: Vec<Flight>,
    /// Reduced gradients of this rank's pieces (stage 0: of everything), bucket by bucket.
    grads: Vec<Vec<f32>>,
}

#[derive(Debug)]
enum Flight {
    Whole(usize, Pending<Vec<f32>>),
    Scattered(usize, Pending<(Vec<f32>, Vec<f32>)>),
}

impl Zero {
    /// Gradients of `len` elements, of which `segments` are the parameters `(offset, len)` in
    /// flat order, reduced over `group` in buckets of about `bucket` elements.
    ///
    /// # Errors
    /// [`Error::Gradient`] when segments do not cover the vector in order.
    pub fn new(
        stage: Stage,
        group: Group,
        len: usize,
        bucket: usize,
        segments: &[(usize, usize)],
    ) -> Result<Zero> {
        let mut end = 0;
        for (offset, size) in segments {
            if *offset != end {
                let reason = "leaves a gap or overlaps; segments follow one another";
                return Err(Error::Gradient { offset: *offset, len: *size, reason });
            }
            end += size;
        }
        if end != len {
            return Err(Error::Length { expected: len, given: end });
        }
        let partition = Partition::new(segments, bucket, group.world_size());
        let rank = group.rank();
        let grads = (0..partition.buckets().len())
            .map(|i| match stage {
                Stage::Zero => vec![0.0; partition.buckets()[i].range.len()],
                _ => vec![0.0; partition.piece(i, rank).len()],
            })
            .collect();
        let filling = partition.buckets().iter().map(|_| None).collect();
        Ok(Zero { stage, group, len, partition, filling, flying: vec![], grads })
    }

    /// The stage.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The buckets and pieces.
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// The ranges of the flat vector that this rank updates, in the order of [`Zero::step`].
    pub fn shard_ranges(&self) -> Vec<Range<usize>> {
        let rank = self.group.rank();
        (0..self.partition.buckets().len())
            .map(|i| match self.stage {
                Stage::Zero => self.partition.buckets()[i].range.clone(),
                _ => self.partition.piece(i, rank),
            })
            .collect()
    }

    /// The gradient of the parameter at `offset` is complete on this rank. The last one of a
    /// bucket starts its reduction. Every rank must report its buckets in the same order.
    ///
    /// # Errors
    /// [`Error::Gradient`] when it does not lie within one bucket.
    pub fn ready(&mut self, offset: usize, grad: &[f32]) -> Result<()> {
        if grad.is_empty() {
            return Ok(());
        }
        let refuse = |reason| Error::Gradient { offset, len: grad.len(), reason };
        let i = self.partition.bucket_of(offset).ok_or_else(|| refuse("lies beyond the end"))?;
        let bucket = &self.partition.buckets()[i];
        let at = offset - bucket.range.start;
        if at + grad.len() > bucket.range.len() {
            return Err(refuse("crosses the end of its bucket; report parameters one by one"));
        }
        let (buffer, filled) = self.filling[i].get_or_insert_with(|| (vec![0.0; bucket.padded], 0));
        buffer[at..at + grad.len()].iter_mut().zip(grad).for_each(|(b, g)| *b += g);
        *filled += 1;
        if *filled == bucket.segments {
            self.launch(i);
        }
        Ok(())
    }

    fn launch(&mut self, i: usize) {
        let Some((buffer, _)) = self.filling[i].take() else { return };
        let part = buffer.len() / self.group.world_size();
        self.flying.push(match self.stage {
            Stage::Zero => {
                Flight::Whole(i, self.group.all_reduce_start::<f32, _>(buffer, ReduceOp::Sum))
            }
            _ => {
                let output = vec![0.0; part];
                let pending =
                    self.group.reduce_scatter_start::<f32, _, _>(buffer, output, ReduceOp::Sum);
                Flight::Scattered(i, pending)
            }
        });
    }

    /// Ends a microbatch (stage 2) or a step: sends what is left, a parameter that was not
    /// reported counting as zero, and waits for everything. Gradients add up until
    /// [`Zero::clear`].
    pub fn finish(&mut self) -> Result<()> {
        // Ranks agree on the order: all buckets that some rank may not have sent, in flat order.
        for i in 0..self.filling.len() {
            let sent = self.flying.iter().any(|f| f.bucket() == i);
            if !sent {
                let padded = self.partition.buckets()[i].padded;
                self.filling[i].get_or_insert_with(|| (vec![0.0; padded], 0));
                self.launch(i);
            }
        }
        for flight in std::mem::take(&mut self.flying) {
            let (i, reduced) = match flight {
                Flight::Whole(i, pending) => (i, pending.wait()?),
                Flight::Scattered(i, pending) => (i, pending.wait()?.1),
            };
            let grad = &mut self.grads[i];
            grad.iter_mut().zip(&reduced).for_each(|(g, r)| *g += r);
        }
        Ok(())
    }

    /// Hands out this rank's pieces of the flat vector with their reduced gradients, in the order
    /// of [`Zero::shard_ranges`].
    pub fn step(&mut self, mut update: impl FnMut(Range<usize>, &[f32])) {
        for (range, grad) in self.shard_ranges().into_iter().zip(&self.grads) {
            update(range, grad);
        }
    }

    /// Sets the gradients to zero: a new step begins.
    pub fn clear(&mut self) {
        self.grads.iter_mut().for_each(|g| g.fill(0.0));
    }

    /// After every rank has updated its pieces of `flat`: everybody gets all of them.
    ///
    /// # Errors
    /// [`Error::Length`] for a vector of another length.
    pub fn gather_params<T: Element>(&self, flat: &mut [T]) -> Result<()> {
        if flat.len() != self.len {
            return Err(Error::Length { expected: self.len, given: flat.len() });
        }
        if self.stage == Stage::Zero || self.group.world_size() == 1 {
            return Ok(());
        }
        let (n, rank) = (self.group.world_size(), self.group.rank());
        for (i, bucket) in self.partition.buckets().iter().enumerate() {
            let piece = self.partition.piece(i, rank);
            let part = bucket.padded / n;
            let mut mine = flat[piece].to_vec();
            mine.resize(part, zero());
            let mut all = vec![zero(); bucket.padded];
            self.group.all_gather(&mine, &mut all)?;
            flat[bucket.range.clone()].copy_from_slice(&all[..bucket.range.len()]);
        }
        Ok(())
    }
}

/// The zero of an element type.
fn zero<T: Element>() -> T {
    bytemuck::Zeroable::zeroed()
}

impl Flight {
    fn bucket(&self) -> usize {
        match self {
            Flight::Whole(i, _) | Flight::Scattered(i, _) => *i,
        }
    }
}
