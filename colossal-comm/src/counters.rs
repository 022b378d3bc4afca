//! How often each verb was called, and how many bytes this rank sent.
//!
//! Bytes follow the lower bounds of the literature (n bytes in the full buffer, p ranks):
//! all_reduce 2n(p-1)/p; reduce_scatter, all_gather, all_to_all n(p-1)/p; scatter n(p-1)/p and
//! broadcast n at the root; reduce, gather, shift and send n at the senders. Compressed forms count
//! the bytes of what is sent.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::call::Verb;

/// A reading of a group's counters, of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    calls: [u64; 13],
    bytes: [u64; 13],
}

impl Counters {
    /// How often a verb was called.
    pub fn calls_of(&self, verb: Verb) -> u64 {
        self.calls[verb as usize]
    }

    /// Bytes this rank sent by a verb.
    pub fn bytes_of(&self, verb: Verb) -> u64 {
        self.bytes[verb as usize]
    }

    /// Bytes this rank sent.
    pub fn bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// Calls of all verbs.
    pub fn calls(&self) -> u64 {
        self.calls.iter().sum()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counting {
    calls: [AtomicU64; 13],
    bytes: [AtomicU64; 13],
}

impl Counting {
    pub(crate) fn count(&self, verb: Verb, bytes: usize) {
        self.calls[verb as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes[verb as usize].fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Counters {
        let load = |a: &AtomicU64| a.load(Ordering::Relaxed);
        Counters { calls: self.calls.each_ref().map(load), bytes: self.bytes.each_ref().map(load) }
    }

    pub(crate) fn reset(&self) {
        self.calls.iter().chain(&self.bytes).for_each(|a| a.store(0, Ordering::Relaxed));
    }
}
