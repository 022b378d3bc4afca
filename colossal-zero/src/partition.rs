//! Who owns what: the flat vector is cut into buckets, each bucket evenly over the ranks.
//!
//! A bucket ends where a parameter ends, so that it is complete as soon as its parameters are.
//! It is padded to a multiple of the number of ranks; the padding exists in messages only.
//! Reduce-scattering a bucket leaves each rank with its piece of it.

use std::ops::Range;

/// A run of whole parameters that is reduced in one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Its elements in the flat vector.
    pub range: Range<usize>,
    /// Its length in messages: a multiple of the number of ranks.
    pub padded: usize,
    /// How many parameters lie in it.
    pub segments: usize,
}

/// The flat vector's buckets and every rank's pieces of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    ranks: usize,
    buckets: Vec<Bucket>,
}

impl Partition {
    /// Parameters `(offset, len)` in flat order, put into buckets of about `bucket` elements.
    pub fn new(segments: &[(usize, usize)], bucket: usize, ranks: usize) -> Partition {
        let mut buckets: Vec<Bucket> = Vec::new();
        for (offset, len) in segments.iter().filter(|(_, len)| *len > 0) {
            match buckets.last_mut() {
                Some(last) if last.range.len() + len <= bucket && last.range.end == *offset => {
                    last.range.end += len;
                    last.segments += 1;
                }
                _ => {
                    let range = *offset..offset + len;
                    buckets.push(Bucket { range, padded: 0, segments: 1 });
                }
            }
        }
        for b in &mut buckets {
            b.padded = b.range.len().next_multiple_of(ranks);
        }
        Partition { ranks, buckets }
    }

    /// All buckets, in flat order.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// The bucket that holds the element at `offset`.
    pub fn bucket_of(&self, offset: usize) -> Option<usize> {
        let i = self.buckets.partition_point(|b| b.range.end <= offset);
        self.buckets.get(i).filter(|b| b.range.contains(&offset)).map(|_| i)
    }

    /// Rank `rank`'s piece of bucket `i` in the flat vector; shorter, or empty, where padding is.
    pub fn piece(&self, i: usize, rank: usize) -> Range<usize> {
        let b = &self.buckets[i];
        let part = b.padded / self.ranks;
        let at = |r: usize| (b.range.start + r * part).min(b.range.end);
        at(rank)..at(rank + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_cover_every_element_once(
            lens in prop::collection::vec(0usize..50, 0..20),
            bucket in 1usize..100,
            ranks in 1usize..6,
        ) {
            let mut end = 0;
            let segments: Vec<_> = lens.iter().map(|len| { end += len; (end - len, *len) }).collect();
            let p = Partition::new(&segments, bucket, ranks);
            let mut seen = vec![0; end];
            for i in 0..p.buckets().len() {
                for rank in 0..ranks {
                    p.piece(i, rank).for_each(|e| seen[e] += 1);
                }
            }
            prop_assert!(seen.iter().all(|n| *n == 1));
            for e in 0..end {
                let b = p.bucket_of(e).expect("every element is in a bucket");
                prop_assert!(p.buckets()[b].range.contains(&e));
            }
            prop_assert_eq!(p.bucket_of(end), None);
            prop_assert_eq!(p.buckets().iter().map(|b| b.segments).sum::<usize>(), lens.iter().filter(|l| **l > 0).count());
        }
    }
}
