//! The Zero Redundancy Optimizer (Rajbhandari et al., 2020), stages 1 and 2, and plain data
//! parallelism as stage 0, over one flat vector of parameters.
//!
//! Gradients are accumulated where they will be sent from. The caller says when a parameter's is
//! complete; when all of a bucket's are, its reduction starts in flight, so that it overlaps with
//! the rest of the backward pass. It knows no optimizer: [`Zero::step`] hands out this rank's
//! pieces with their gradients. Buffers are kept, or given back to a memory that keeps them for
//! others too ([`Space::KEEPS`]): after the first step none is allocated.

use std::ops::Range;

use colossal_comm::{Element, Group};

use crate::error::{Error, Result};
use crate::partition::Partition;
use crate::space::{Host, Space};

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

/// Gradients of a flat vector, summed over a group, in some memory.
#[derive(Debug)]
pub struct Zero<S: Space = Host> {
    space: S,
    stage: Stage,
    group: Group,
    len: usize,
    partition: Partition,
    /// Offsets of the parameters, rising; the bucket's buffer holds this one's gradient.
    offsets: Vec<usize>,
    touched: Vec<bool>,
    buckets: Vec<Filling<S::Buffer>>,
    /// Reductions under way, by bucket.
    flying: Vec<(usize, S::Flight)>,
    /// Reduced gradients of this rank's pieces (stage 0: of everything), bucket by bucket.
    grads: Vec<Option<S::Buffer>>,
}

/// A bucket that gradients are accumulated in.
#[derive(Debug)]
struct Filling<B> {
    /// What is sent; taken while it flies.
    buffer: Option<B>,
    /// Room for what comes back, when that is not the buffer itself.
    piece: Option<B>,
    /// Parameters whose gradient is complete.
    complete: usize,
}

impl Zero {
    /// Gradients of `len` elements on the host, of which `segments` are the parameters
    /// `(offset, len)` in flat order, reduced over `group` in buckets of about `bucket` elements.
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
        Zero::within(Host, stage, group, len, bucket, segments)
    }

    /// Adds `grad` to the gradient of the parameter at `offset`, which then is complete.
    ///
    /// # Errors
    /// As [`Zero::gradient`].
    pub fn ready(&mut self, offset: usize, grad: &[f32]) -> Result<()> {
        if grad.is_empty() {
            return Ok(());
        }
        match self.gradient(offset, grad.len())? {
            (to, true) => to.copy_from_slice(grad),
            (to, false) => to.iter_mut().zip(grad).for_each(|(b, g)| *b += g),
        }
        self.complete(offset)
    }
}

impl<S: Space> Zero<S> {
    /// As [`Zero::new`], in another memory.
    ///
    /// # Errors
    /// As [`Zero::new`].
    pub fn within(
        space: S,
        stage: Stage,
        group: Group,
        len: usize,
        bucket: usize,
        segments: &[(usize, usize)],
    ) -> Result<Zero<S>> {
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
        let empty = |_| Filling { buffer: None, piece: None, complete: 0 };
        let buckets = partition.buckets().iter().map(empty).collect();
        let grads = partition.buckets().iter().map(|_| None).collect();
        let offsets: Vec<usize> = segments.iter().filter(|s| s.1 > 0).map(|s| s.0).collect();
        let touched = vec![false; offsets.len()];
        let flying = vec![];
        Ok(Zero { space, stage, group, len, partition, offsets, touched, buckets, flying, grads })
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

    /// Where the gradient of the parameter of `len` elements at `offset` is accumulated until it
    /// is complete, and whether this is the first use: the values are then old, to be overwritten.
    ///
    /// # Errors
    /// [`Error::Gradient`] when there is no such parameter or its bucket is in flight.
    pub fn gradient(&mut self, offset: usize, len: usize) -> Result<(S::Part<'_>, bool)> {
        let refuse = |reason| Error::Gradient { offset, len, reason };
        let Ok(parameter) = self.offsets.binary_search(&offset) else {
            return Err(refuse("is not where a parameter starts"));
        };
        let end = self.offsets.get(parameter + 1).copied().unwrap_or(self.len);
        if offset + len != end {
            return Err(refuse("is not as long as its parameter"));
        }
        let i = self.partition.bucket_of(offset).ok_or_else(|| refuse("lies beyond the end"))?;
        if self.flying.iter().any(|(bucket, _)| *bucket == i) {
            return Err(refuse("comes after its bucket was sent; finish the microbatch first"));
        }
        let bucket = &self.partition.buckets()[i];
        let slot = &mut self.buckets[i].buffer;
        let buffer = match slot.take() {
            Some(buffer) => buffer,
            None => self.space.room(bucket.padded)?,
        };
        let at = offset - bucket.range.start;
        let first = !std::mem::replace(&mut self.touched[parameter], true);
        Ok((self.space.part(slot.insert(buffer), at..at + len), first))
    }

    /// Takes `sum` over as the gradient of the parameter at `offset`, which is not complete yet. Given back
    /// unless the parameter is a bucket of its own that nothing was added to.
    ///
    /// # Errors
    /// As [`Zero::gradient`].
    pub fn adopt(
        &mut self,
        offset: usize,
        len: usize,
        sum: S::Buffer,
    ) -> Result<Option<S::Buffer>> {
        let fits = self.partition.bucket_of(offset).filter(|i| {
            let (bucket, filling) = (&self.partition.buckets()[*i], &self.buckets[*i]);
            bucket.segments == 1 && bucket.padded == len && filling.buffer.is_none()
        });
        let Some(i) = fits else { return Ok(Some(sum)) };
        self.buckets[i].buffer = Some(sum);
        let touched = self.gradient(offset, len).map(|_| None);
        if touched.is_err() {
            self.buckets[i].buffer = None;
        }
        touched
    }

    /// The gradient of the parameter at `offset` is complete on this rank. The last one of a
    /// bucket starts its reduction. Every rank must report its buckets in the same order.
    ///
    /// # Errors
    /// [`Error::Gradient`] when there is no such parameter.
    pub fn complete(&mut self, offset: usize) -> Result<()> {
        let reason = "lies beyond the end";
        let refused = Error::Gradient { offset, len: 0, reason };
        let i = self.partition.bucket_of(offset).ok_or(refused)?;
        self.buckets[i].complete += 1;
        if self.buckets[i].complete == self.partition.buckets()[i].segments {
            self.launch(i)?;
        }
        Ok(())
    }

    fn launch(&mut self, i: usize) -> Result<()> {
        let (bucket, filling) = (&self.partition.buckets()[i], &mut self.buckets[i]);
        filling.complete = 0;
        let mut buffer = match filling.buffer.take() {
            Some(buffer) => buffer,
            None => self.space.room(bucket.padded)?,
        };
        // What nobody touched counts as zero, and so does the padding.
        let parameters = self.offsets.partition_point(|o| *o < bucket.range.start)
            ..self.offsets.partition_point(|o| *o < bucket.range.end);
        for parameter in parameters {
            if !std::mem::take(&mut self.touched[parameter]) {
                let end = self.offsets.get(parameter + 1).copied().unwrap_or(self.len);
                let own = self.offsets[parameter] - bucket.range.start..end - bucket.range.start;
                self.space.clear(&mut buffer, own)?;
            }
        }
        if bucket.range.len() < bucket.padded {
            self.space.clear(&mut buffer, bucket.range.len()..bucket.padded)?;
        }
        let piece = match (self.stage, filling.piece.take()) {
            (Stage::Zero, _) => None,
            (_, Some(piece)) => Some(piece),
            (_, None) => Some(self.space.room(bucket.padded / self.group.world_size())?),
        };
        self.flying.push((i, self.space.reduce_start(&self.group, buffer, piece)?));
        Ok(())
    }

    /// Ends a microbatch (stage 2) or a step: sends what is left, a parameter that was not
    /// reported counting as zero, and waits for everything. Gradients add up until
    /// [`Zero::clear`].
    ///
    /// # Errors
    /// [`Error::Comm`] when a reduction failed.
    pub fn finish(&mut self) -> Result<()> {
        // Ranks agree on the order: all buckets that some rank may not have sent, in flat order.
        for i in 0..self.buckets.len() {
            if !self.flying.iter().any(|(bucket, _)| *bucket == i) {
                self.launch(i)?;
            }
        }
        for (i, flight) in std::mem::take(&mut self.flying) {
            let reduced = match self.space.reduce_wait(flight)? {
                (reduced, None) => reduced,
                (sent, Some(reduced)) => {
                    self.buckets[i].buffer = S::KEEPS.then_some(sent);
                    reduced
                }
            };
            match &mut self.grads[i] {
                Some(grad) => {
                    self.space.add(grad, &reduced)?;
                    if S::KEEPS {
                        self.buckets[i].keep(self.stage, reduced);
                    }
                }
                none => *none = Some(reduced),
            }
        }
        Ok(())
    }

    /// Hands out this rank's pieces of the flat vector with their reduced gradients, in the order
    /// of [`Zero::shard_ranges`].
    ///
    /// # Errors
    /// [`Error::Space`] when there is no room for the zeros of gradients that nobody gave.
    pub fn step(&mut self, mut update: impl FnMut(Range<usize>, S::View<'_>)) -> Result<()> {
        for (range, slot) in self.shard_ranges().into_iter().zip(&mut self.grads) {
            let grad = match slot.take() {
                Some(grad) => grad,
                None => self.space.zeros(range.len())?,
            };
            let own = 0..range.len();
            update(range, self.space.view(slot.insert(grad), own));
        }
        Ok(())
    }

    /// Sets the gradients to zero: a new step begins.
    pub fn clear(&mut self) {
        for (bucket, grad) in self.buckets.iter_mut().zip(&mut self.grads) {
            if let Some(grad) = grad.take().filter(|_| S::KEEPS) {
                bucket.keep(self.stage, grad);
            }
        }
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

impl<B> Filling<B> {
    /// Keeps a buffer that came back for the next time.
    fn keep(&mut self, stage: Stage, buffer: B) {
        match stage {
            Stage::Zero => self.buffer.get_or_insert(buffer),
            _ => self.piece.get_or_insert(buffer),
        };
    }
}

/// The zero of an element type.
fn zero<T: Element>() -> T {
    bytemuck::Zeroable::zeroed()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two parameters, of 3 and 2 elements, in one bucket.
    fn zero(stage: Stage) -> Zero {
        Zero::new(stage, Group::solo(), 5, 8, &[(0, 3), (3, 2)]).expect("segments fit")
    }

    fn grads(zero: &mut Zero) -> Vec<f32> {
        let mut all = vec![f32::NAN; 5];
        zero.step(|range, grad| all[range].copy_from_slice(grad)).expect("there is room");
        all
    }

    #[test]
    fn gradients_add_up_in_place_and_old_values_do_not_come_back() {
        for stage in [Stage::Zero, Stage::One, Stage::Two] {
            let mut zero = zero(stage);
            for step in 1..=3 {
                let x = step as f32;
                for _ in 0..2 {
                    let (grad, first) = zero.gradient(3, 2).expect("there is such a parameter");
                    if first {
                        grad.fill(0.0);
                    }
                    grad.iter_mut().for_each(|g| *g += x);
                }
                zero.complete(3).expect("there is such a parameter");
                // The first parameter is reached in the first step only.
                if step == 1 {
                    zero.ready(0, &[7.0; 3]).expect("there is such a parameter");
                }
                zero.finish().expect("one rank");
                let first = if step == 1 { 7.0 } else { 0.0 };
                assert_eq!(grads(&mut zero), [first, first, first, 2.0 * x, 2.0 * x], "{stage:?}");
                zero.clear();
            }
        }
    }

    #[test]
    fn microbatches_add_up_until_they_are_cleared() {
        let mut zero = zero(Stage::Two);
        for _ in 0..3 {
            zero.ready(3, &[1.0; 2]).expect("there is such a parameter");
            zero.ready(0, &[2.0; 3]).expect("there is such a parameter");
            zero.finish().expect("one rank");
        }
        assert_eq!(grads(&mut zero), [6.0, 6.0, 6.0, 3.0, 3.0]);
    }

    #[test]
    fn a_sum_becomes_the_gradient_of_a_bucket_that_nothing_was_added_to() {
        let segments = [(0, 3), (3, 2)];
        let mut zero = Zero::new(Stage::One, Group::solo(), 5, 1, &segments).expect("they fit");
        assert_eq!(zero.adopt(0, 3, vec![1.0; 3]).expect("a parameter"), None);
        let (sum, first) = zero.gradient(0, 3).expect("a parameter");
        assert!(!first && *sum == [1.0; 3]);
        zero.complete(0).expect("a parameter");
        zero.ready(3, &[2.0; 2]).expect("a parameter");
        zero.finish().expect("one rank");
        assert_eq!(grads(&mut zero), [1.0, 1.0, 1.0, 2.0, 2.0]);
        zero.clear();
        // Something was added, or its bucket has others.
        zero.gradient(3, 2).expect("a parameter").0.fill(5.0);
        assert_eq!(zero.adopt(3, 2, vec![1.0; 2]).expect("a parameter"), Some(vec![1.0; 2]));
        let mut zero = self::zero(Stage::One);
        assert_eq!(zero.adopt(3, 2, vec![1.0; 2]).expect("a parameter"), Some(vec![1.0; 2]));
    }

    #[test]
    fn what_is_no_parameter_is_refused() {
        let mut zero = zero(Stage::One);
        assert!(zero.gradient(1, 2).is_err(), "no parameter starts there");
        assert!(zero.gradient(0, 2).is_err(), "it is longer");
        assert!(zero.gradient(3, 3).is_err(), "beyond the end");
        zero.ready(0, &[1.0; 3]).expect("there is such a parameter");
        zero.ready(3, &[1.0; 2]).expect("there is such a parameter");
        assert!(zero.gradient(0, 3).is_err(), "its bucket is in flight");
        zero.finish().expect("one rank");
        assert!(zero.gradient(0, 3).is_ok());
    }
}
