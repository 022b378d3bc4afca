//! The chunk manager: packs payloads into chunks and keeps tiers within their budgets.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;

use crate::chunk::{Chunk, ChunkId};
use crate::error::{Error, Result};
use crate::eviction::least_recently_used;
use crate::space::{Budget, Space, Tier};
use crate::state::State;

/// Payloads by key, in chunks, in tiers.
#[derive(Debug)]
pub struct ChunkManager<K, S: Space> {
    space: S,
    chunk_bytes: usize,
    budget: Budget,
    chunks: Vec<Chunk<S::Payload>>,
    owners: HashMap<K, Owner>,
    clock: u64,
    stats: Stats,
}

#[derive(Debug, Clone, Copy)]
struct Owner {
    chunk: ChunkId,
    offset: usize,
    bytes: usize,
    state: State,
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Chunks moved from the fast to the slow tier.
    pub evictions: u64,
    /// Bytes moved between tiers.
    pub moved_bytes: u64,
    /// Bytes in the fast tier now.
    pub fast_bytes: usize,
    /// Bytes in the slow tier now.
    pub slow_bytes: usize,
    /// Most bytes that were ever in the fast tier.
    pub peak_fast_bytes: usize,
}

impl<K: Eq + Hash + Clone + Debug, S: Space> ChunkManager<K, S> {
    /// An empty manager of chunks of this size, each tier within its budget of bytes.
    pub fn new(space: S, chunk_bytes: usize, budget: Budget) -> ChunkManager<K, S> {
        ChunkManager {
            space,
            chunk_bytes,
            budget,
            chunks: Vec::new(),
            owners: HashMap::new(),
            clock: 0,
            stats: Stats::default(),
        }
    }

    /// Gives `key` a place of `bytes` bytes, in the last chunk if it has room. No memory is
    /// taken before its first use. It starts as `Free`.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::Twice`].
    pub fn insert(&mut self, key: K, bytes: usize) -> Result<ChunkId> {
        if bytes > self.chunk_bytes {
            return Err(Error::TooLarge { key: name(&key), bytes, chunk: self.chunk_bytes });
        }
        if self.owners.contains_key(&key) {
            return Err(Error::Twice(name(&key)));
        }
        if self.chunks.last().is_none_or(|c| c.used + bytes > self.chunk_bytes) {
            let chunk = Chunk { memory: None, used: 0, computing: 0, holding: 0, touched: 0 };
            self.chunks.push(chunk);
        }
        let id = ChunkId(self.chunks.len() - 1);
        let chunk = &mut self.chunks[id.0];
        let offset = chunk.used;
        chunk.used += bytes;
        self.owners.insert(key, Owner { chunk: id, offset, bytes, state: State::Free });
        Ok(id)
    }

    /// Takes a payload into use: its chunk comes to the fast tier, others leave if they must. A
    /// payload that was free begins with unspecified values. It stays until it is released.
    ///
    /// # Errors
    /// [`Error::Full`] when what is in use leaves no room; [`Error::State`] if it is in use.
    pub fn access(&mut self, key: &K) -> Result<InUse<'_, S>> {
        let owner = self.owner(key)?;
        if !owner.state.may_become(State::Compute) {
            return Err(Error::State { key: name(key), from: owner.state, to: State::Compute });
        }
        self.bring(owner.chunk)?;
        self.clock += 1;
        let chunk = &mut self.chunks[owner.chunk.0];
        chunk.touched = self.clock;
        chunk.computing += 1;
        if owner.state == State::Free {
            chunk.holding += 1;
        }
        if let Some(o) = self.owners.get_mut(key) {
            o.state = State::Compute;
        }
        let Some((_, payload)) = &mut chunk.memory else { unreachable!("bring has placed it") };
        Ok(InUse { space: &self.space, payload, range: owner.offset..owner.offset + owner.bytes })
    }

    /// Ends the use of a payload, or gives up its values.
    ///
    /// # Errors
    /// [`Error::State`] for a move that does not exist.
    pub fn release(&mut self, key: &K, to: State) -> Result<()> {
        let owner = self.owner(key)?;
        if to == State::Compute {
            return Err(Error::State { key: name(key), from: owner.state, to });
        }
        let chunk = &mut self.chunks[owner.chunk.0];
        if owner.state == State::Compute {
            chunk.computing -= 1;
        }
        match (owner.state == State::Free, to == State::Free) {
            (false, true) => chunk.holding -= 1,
            (true, false) => chunk.holding += 1,
            _ => {}
        }
        if chunk.holding == 0
            && let Some((tier, _)) = chunk.memory.take()
        {
            *self.bytes_in(tier) -= self.chunk_bytes;
        }
        if let Some(o) = self.owners.get_mut(key) {
            o.state = to;
        }
        Ok(())
    }

    /// Where a payload is; nowhere before its first use and after its chunk was dropped.
    pub fn tier(&self, key: &K) -> Option<Tier> {
        let owner = self.owners.get(key)?;
        self.chunks[owner.chunk.0].memory.as_ref().map(|(tier, _)| *tier)
    }

    /// The state of a payload.
    pub fn state(&self, key: &K) -> Option<State> {
        self.owners.get(key).map(|o| o.state)
    }

    /// What has happened so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    fn owner(&self, key: &K) -> Result<Owner> {
        self.owners.get(key).copied().ok_or_else(|| Error::Unknown(name(key)))
    }

    /// Makes a chunk be in the fast tier.
    fn bring(&mut self, id: ChunkId) -> Result<()> {
        if matches!(self.chunks[id.0].memory, Some((Tier::Fast, _))) {
            return Ok(());
        }
        self.make_room(id)?;
        let bytes = self.chunk_bytes;
        let payload = match self.chunks[id.0].memory.take() {
            Some((_, payload)) => {
                self.stats.slow_bytes -= bytes;
                self.stats.moved_bytes += bytes as u64;
                self.space.transfer(payload, Tier::Fast)
            }
            None => self.space.allocate(Tier::Fast, bytes),
        };
        self.chunks[id.0].memory = Some((Tier::Fast, payload));
        self.stats.fast_bytes += bytes;
        self.stats.peak_fast_bytes = self.stats.peak_fast_bytes.max(self.stats.fast_bytes);
        Ok(())
    }

    /// Moves chunks out of the fast tier until one more fits.
    fn make_room(&mut self, for_chunk: ChunkId) -> Result<()> {
        let bytes = self.chunk_bytes;
        while self.stats.fast_bytes + bytes > self.budget.of(Tier::Fast) {
            let movable = self.chunks.iter().enumerate().filter(|(i, c)| {
                *i != for_chunk.0 && c.computing == 0 && matches!(c.memory, Some((Tier::Fast, _)))
            });
            let victim = least_recently_used(movable.map(|(i, c)| (ChunkId(i), c.touched)));
            // A chunk that changes places with the one coming in needs no extra slow room.
            let leaving = matches!(self.chunks[for_chunk.0].memory, Some((Tier::Slow, _)));
            let slow_after = self.stats.slow_bytes + bytes - if leaving { bytes } else { 0 };
            let full =
                |tier, in_use| Error::Full { tier, bytes, budget: self.budget.of(tier), in_use };
            let Some(victim) = victim else {
                return Err(full(Tier::Fast, self.stats.fast_bytes));
            };
            if slow_after > self.budget.of(Tier::Slow) {
                return Err(full(Tier::Slow, self.stats.slow_bytes));
            }
            let chunk = &mut self.chunks[victim.0];
            if let Some((_, payload)) = chunk.memory.take() {
                chunk.memory = Some((Tier::Slow, self.space.transfer(payload, Tier::Slow)));
                self.stats.fast_bytes -= bytes;
                self.stats.slow_bytes += bytes;
                self.stats.evictions += 1;
                self.stats.moved_bytes += bytes as u64;
            }
        }
        Ok(())
    }

    fn bytes_in(&mut self, tier: Tier) -> &mut usize {
        match tier {
            Tier::Fast => &mut self.stats.fast_bytes,
            Tier::Slow => &mut self.stats.slow_bytes,
        }
    }
}

fn name<K: Debug>(key: &K) -> String {
    format!("{key:?}")
}

/// A payload that is in use: it stays where it is until its key is released.
#[derive(Debug)]
pub struct InUse<'a, S: Space> {
    space: &'a S,
    payload: &'a mut S::Payload,
    range: std::ops::Range<usize>,
}

impl<S: Space> InUse<'_, S> {
    /// Its contents.
    pub fn bytes(&self) -> &[u8] {
        &self.space.bytes(self.payload)[self.range.clone()]
    }

    /// Its contents, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.space.bytes_mut(self.payload)[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Heap;

    #[test]
    fn what_is_in_use_does_not_move_and_the_error_says_so() {
        let budget = Budget { fast: 20, slow: 100 };
        let mut m = ChunkManager::new(Heap, 10, budget);
        for key in 0..3 {
            m.insert(key, 10).unwrap();
        }
        m.access(&0).unwrap();
        m.access(&1).unwrap();
        let full = m.access(&2).unwrap_err();
        assert_eq!(full, Error::Full { tier: Tier::Fast, bytes: 10, budget: 20, in_use: 20 });
        m.release(&1, State::Hold).unwrap();
        m.access(&2).unwrap();
        assert_eq!((m.tier(&0), m.tier(&1)), (Some(Tier::Fast), Some(Tier::Slow)));
        assert!(matches!(m.access(&2), Err(Error::State { .. })));
        assert!(matches!(m.insert(2, 1), Err(Error::Twice(_))));
        assert!(matches!(m.insert(9, 11), Err(Error::TooLarge { .. })));
        assert!(matches!(m.release(&7, State::Hold), Err(Error::Unknown(_))));
    }

    proptest! {
        /// Against a map of plain vectors: values survive every move, budgets hold.
        #[test]
        fn contents_equal_a_plain_map(ops in prop::collection::vec((0usize..12, 0u8..4, any::<u8>()), 1..200)) {
            let budget = Budget { fast: 48, slow: 96 };
            let mut m = ChunkManager::new(Heap, 16, budget);
            let mut plain: HashMap<usize, Vec<u8>> = HashMap::new();
            for key in 0..12 {
                m.insert(key, 5).unwrap();
            }
            for (key, op, value) in ops {
                match op {
                    0 | 1 => match m.access(&key) {
                        Ok(mut data) => {
                            if let Some(old) = plain.get(&key) {
                                prop_assert_eq!(data.bytes(), &old[..]);
                            }
                            data.bytes_mut().fill(value);
                            plain.insert(key, vec![value; 5]);
                            if op == 0 {
                                m.release(&key, State::Hold).unwrap();
                            }
                        }
                        Err(Error::Full { .. } | Error::State { .. }) => {}
                        Err(e) => return Err(TestCaseError::fail(e.to_string())),
                    },
                    2 if m.state(&key) != Some(State::Free) => m.release(&key, State::Hold).unwrap(),
                    2 => {}
                    _ => {
                        m.release(&key, State::Free).unwrap();
                        plain.remove(&key);
                    }
                }
                let s = m.stats();
                prop_assert!(s.fast_bytes <= budget.fast && s.slow_bytes <= budget.slow);
            }
        }
    }
}
