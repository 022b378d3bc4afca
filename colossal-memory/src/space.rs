//! Places where chunks can be.

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// Where it can be computed with.
    Fast,
    /// Where it is only kept.
    Slow,
}

/// Bytes that each tier may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// In the fast tier.
    pub fast: usize,
    /// In the slow tier.
    pub slow: usize,
}

impl Budget {
    pub(crate) fn of(&self, tier: Tier) -> usize {
        match tier {
            Tier::Fast => self.fast,
            Tier::Slow => self.slow,
        }
    }
}

/// Something that can allocate and copy chunks.
pub trait Space {
    /// A chunk's memory.
    type Payload;
    /// New memory in a tier.
    fn allocate(&mut self, tier: Tier, bytes: usize) -> Self::Payload;
    /// The same contents in another tier.
    fn transfer(&mut self, payload: Self::Payload, to: Tier) -> Self::Payload;
    /// The contents.
    fn bytes<'a>(&self, payload: &'a Self::Payload) -> &'a [u8];
    /// The contents, to be changed.
    fn bytes_mut<'a>(&self, payload: &'a mut Self::Payload) -> &'a mut [u8];
}

/// Host memory for every tier: a transfer copies, as it would between devices.
#[derive(Debug, Clone, Copy, Default)]
pub struct Heap;

impl Space for Heap {
    type Payload = Box<[u8]>;

    fn allocate(&mut self, _: Tier, bytes: usize) -> Box<[u8]> {
        vec![0; bytes].into()
    }

    fn transfer(&mut self, payload: Box<[u8]>, _: Tier) -> Box<[u8]> {
        payload.clone()
    }

    fn bytes<'a>(&self, payload: &'a Box<[u8]>) -> &'a [u8] {
        payload
    }

    fn bytes_mut<'a>(&self, payload: &'a mut Box<[u8]>) -> &'a mut [u8] {
        payload
    }
}
