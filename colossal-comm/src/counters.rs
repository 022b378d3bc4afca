//! How often each verb was called, and how many bytes this rank sent.
//!
//! Bytes follow the lower bounds of the literature (n bytes in the full buffer, p ranks):
//! all_reduce 2n(p-1)/p; reduce_scatter, all_gather, all_to_all n(p-1)/p; broadcast and scatter
//! n at the root; reduce, gather and send n at the senders.

use std::sync::atomic::{AtomicU64, Ordering};

/// A collective or a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the variants are the verbs of Group")]
pub enum Verb {
    AllReduce,
    ReduceScatter,
    AllGather,
    AllToAll,
    Broadcast,
    Reduce,
    Gather,
    Scatter,
    Send,
    Recv,
    Barrier,
    Split,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Verb; 12] = [
        Verb::AllReduce,
        Verb::ReduceScatter,
        Verb::AllGather,
        Verb::AllToAll,
        Verb::Broadcast,
        Verb::Reduce,
        Verb::Gather,
        Verb::Scatter,
        Verb::Send,
        Verb::Recv,
        Verb::Barrier,
        Verb::Split,
    ];

    /// The name of its method.
    pub fn name(self) -> &'static str {
        match self {
            Verb::AllReduce => "all_reduce",
            Verb::ReduceScatter => "reduce_scatter",
            Verb::AllGather => "all_gather",
            Verb::AllToAll => "all_to_all",
            Verb::Broadcast => "broadcast",
            Verb::Reduce => "reduce",
            Verb::Gather => "gather",
            Verb::Scatter => "scatter",
            Verb::Send => "send",
            Verb::Recv => "recv",
            Verb::Barrier => "barrier",
            Verb::Split => "split",
        }
    }
}

/// A reading of a group's counters, of this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    calls: [u64; 12],
    bytes: [u64; 12],
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
    calls: [AtomicU64; 12],
    bytes: [AtomicU64; 12],
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
