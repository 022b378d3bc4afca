//! Batches of token sequences, and how a run walks through its data.

use colossal_tensor::random::Stream;
use colossal_tensor::{Error, IGNORE, Result};

/// Sequences padded to one length, with the target of every position.
///
/// The whole (global) batch: the trainer takes each rank's part of it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Batch {
    /// `batch * seq` ids.
    pub ids: Vec<i32>,
    /// The token that should follow each position; -100 has no loss.
    pub targets: Vec<i32>,
    /// Real tokens of each sequence.
    pub lengths: Vec<i32>,
    /// Padded length.
    pub seq: usize,
}

impl Batch {
    /// Sequences of any length. `mask[i][t]` says whether token `t` of sequence `i` is learnt.
    ///
    /// The target of position `t` is token `t + 1`; sequences lose their last token as input.
    ///
    /// # Errors
    /// When a sequence has fewer than two tokens or another length than its mask.
    pub fn new(sequences: &[(&[i32], &[bool])], pad: i32) -> Result<Batch> {
        let seq = sequences.iter().map(|(s, _)| s.len()).max().unwrap_or(0).saturating_sub(1);
        let mut batch = Batch { seq, ..Batch::default() };
        for (i, (tokens, mask)) in sequences.iter().enumerate() {
            if tokens.len() < 2 || tokens.len() != mask.len() {
                return Err(Error::Other(format!(
                    "batch: sequence {i} has {} tokens and {} mask entries; it needs two or more, and as many of both",
                    tokens.len(),
                    mask.len()
                )));
            }
            let len = tokens.len() - 1;
            batch.ids.extend(&tokens[..len]);
            batch.targets.extend((1..=len).map(|t| if mask[t] { tokens[t] } else { IGNORE }));
            batch.ids.resize(batch.ids.len() + seq - len, pad);
            batch.targets.resize(batch.targets.len() + seq - len, IGNORE);
            batch.lengths.push(len as i32);
        }
        Ok(batch)
    }

    /// Equal windows of a token stream: `seq + 1` tokens each, everything learnt.
    pub fn windows(windows: &[&[i32]]) -> Result<Batch> {
        let longest = windows.iter().map(|w| w.len()).max().unwrap_or(0);
        let all = vec![true; longest];
        let rows: Vec<(&[i32], &[bool])> = windows.iter().map(|w| (*w, &all[..w.len()])).collect();
        Batch::new(&rows, 0)
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Has it no sequence?
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Targets that count.
    pub fn learnt(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE).count()
    }

    /// The same sequences, padded to length `seq` (if that is longer) with the last id of each.
    pub fn padded_to(&self, seq: usize) -> std::borrow::Cow<'_, Batch> {
        if seq <= self.seq {
            return std::borrow::Cow::Borrowed(self);
        }
        let fill = |values: &[i32], last: fn(&[i32]) -> i32| -> Vec<i32> {
            let rows = values.chunks(self.seq.max(1));
            rows.flat_map(|r| r.iter().copied().chain(vec![last(r); seq - self.seq])).collect()
        };
        std::borrow::Cow::Owned(Batch {
            ids: fill(&self.ids, |row| row.last().copied().unwrap_or(0)),
            targets: fill(&self.targets, |_| IGNORE),
            lengths: self.lengths.clone(),
            seq,
        })
    }

    /// Part `i` of `n` equal parts.
    ///
    /// # Errors
    /// When the number of sequences does not divide by `n`.
    pub fn part(&self, i: usize, n: usize) -> Result<Batch> {
        if !self.len().is_multiple_of(n) {
            return Err(Error::Other(format!(
                "batch: {} sequences do not divide into {n} parts; make the batch size a multiple of \
                 dp x microbatches",
                self.len()
            )));
        }
        let rows = self.len() / n;
        let range = i * rows * self.seq..(i + 1) * rows * self.seq;
        Ok(Batch {
            ids: self.ids[range.clone()].to_vec(),
            targets: self.targets[range].to_vec(),
            lengths: self.lengths[i * rows..(i + 1) * rows].to_vec(),
            seq: self.seq,
        })
    }
}

/// The order in which a run visits `len` items: a new shuffle each epoch, a function of the seed
/// and the position only, so that a resumed run goes on exactly where it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequences {
    len: usize,
    seed: u64,
}

impl Sequences {
    /// An order of `len` items.
    pub fn new(len: usize, seed: u64) -> Sequences {
        Sequences { len, seed }
    }

    /// Items `at .. at + count` of the endless walk.
    pub fn take(&self, at: u64, count: usize) -> Vec<usize> {
        if self.len == 0 {
            return vec![];
        }
        let mut out = Vec::with_capacity(count);
        let mut epoch = None;
        for position in at..at + count as u64 {
            let (now, i) = (position / self.len as u64, (position % self.len as u64) as usize);
            if epoch.as_ref().is_none_or(|(e, _)| *e != now) {
                epoch = Some((now, self.shuffle(now)));
            }
            out.extend(epoch.as_ref().map(|(_, order)| order[i]));
        }
        out
    }

    fn shuffle(&self, epoch: u64) -> Vec<usize> {
        let stream = Stream::new(self.seed, epoch);
        let mut order: Vec<usize> = (0..self.len).collect();
        for i in (1..self.len).rev() {
            order.swap(i, (stream.bits(i as u64) % (i as u64 + 1)) as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_once_an_epoch_and_the_walk_can_be_entered_anywhere() {
        let order = Sequences::new(7, 3);
        let walk = order.take(0, 21);
        for epoch in walk.chunks(7) {
            let mut sorted = epoch.to_vec();
            sorted.sort();
            assert_eq!(sorted, (0..7).collect::<Vec<_>>());
        }
        assert_ne!(walk[..7], walk[7..14]);
        assert_eq!(order.take(5, 9), walk[5..14]);
    }

    #[test]
    fn targets_are_shifted_once_and_padding_has_none() {
        let rows: [(&[i32], &[bool]); 2] =
            [(&[1, 2, 3, 4], &[false, false, true, true]), (&[5, 6], &[false, true])];
        let batch = Batch::new(&rows, 9).unwrap();
        assert_eq!(batch.ids, [1, 2, 3, 5, 9, 9]);
        assert_eq!(batch.targets, [IGNORE, 3, 4, 6, IGNORE, IGNORE]);
        assert_eq!((batch.learnt(), batch.lengths.clone()), (3, vec![3, 1]));
        assert_eq!(batch.part(1, 2).unwrap().ids, [5, 9, 9]);
        assert!(batch.part(0, 3).unwrap_err().to_string().contains("do not divide"));
    }
}
