//! What a rank called: the verb and everything that must agree on all ranks, and where.

use std::panic::Location;

use crate::element::{DType, ReduceOp};

/// A collective or a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the variants are the verbs of Group")]
#[repr(u8)]
pub enum Verb {
    AllReduce,
    ReduceScatter,
    AllGather,
    AllToAll,
    Broadcast,
    Reduce,
    Gather,
    Scatter,
    Shift,
    Send,
    Recv,
    Barrier,
    Split,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Verb; 13] = [
        Verb::AllReduce,
        Verb::ReduceScatter,
        Verb::AllGather,
        Verb::AllToAll,
        Verb::Broadcast,
        Verb::Reduce,
        Verb::Gather,
        Verb::Scatter,
        Verb::Shift,
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
            Verb::Shift => "shift",
            Verb::Send => "send",
            Verb::Recv => "recv",
            Verb::Barrier => "barrier",
            Verb::Split => "split",
        }
    }
}

/// A signature: all but `site` must agree on all ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) verb: Verb,
    pub(crate) dtype: DType,
    /// Elements, of the longer of the two buffers where they differ.
    pub(crate) len: usize,
    pub(crate) op: Option<ReduceOp>,
    /// The root of a rooted collective, the peer of a message, the places of a shift.
    pub(crate) root: Option<usize>,
    /// A hash of the parts' lengths in the ragged forms, 0 in the even ones.
    pub(crate) ragged: u64,
    pub(crate) site: &'static Location<'static>,
}

impl Call {
    pub(crate) fn new(
        verb: Verb,
        dtype: DType,
        len: usize,
        site: &'static Location<'static>,
    ) -> Call {
        Call { verb, dtype, len, op: None, root: None, ragged: 0, site }
    }

    pub(crate) fn op(self, op: ReduceOp) -> Call {
        Call { op: Some(op), ..self }
    }

    pub(crate) fn root(self, root: usize) -> Call {
        Call { root: Some(root), ..self }
    }

    pub(crate) fn ragged(self, counts: &[usize]) -> Call {
        // FNV-1a over the words; never 0, which means even parts.
        let step = |h: u64, c: &usize| (h ^ *c as u64).wrapping_mul(0x0000_0100_0000_01b3);
        Call { ragged: counts.iter().fold(0xcbf2_9ce4_8422_2325, step) | 1, ..self }
    }

    /// Bytes of `len` elements.
    pub(crate) fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// Verb, type, op and root in one word.
    pub(crate) fn code(&self) -> u64 {
        let op = self.op.map_or(0, |op| op as u64 + 1);
        let root = self.root.map_or(0, |r| r as u64 + 1);
        self.verb as u64 | (self.dtype as u64) << 8 | op << 16 | root << 24
    }

    /// The inverse of [`Call::code`].
    pub(crate) fn decode(
        code: u64,
        len: usize,
        ragged: u64,
        site: &'static Location<'static>,
    ) -> Option<Call> {
        let op = match (code >> 16 & 0xff) as usize {
            0 => None,
            op => Some(*ReduceOp::ALL.get(op - 1)?),
        };
        let root = (code >> 24).checked_sub(1).map(|r| r as usize);
        let verb = *Verb::ALL.get((code & 0xff) as usize)?;
        let dtype = *DType::ALL.get((code >> 8 & 0xff) as usize)?;
        Some(Call { verb, dtype, len, op, root, ragged, site })
    }
}

impl PartialEq for Call {
    fn eq(&self, other: &Call) -> bool {
        (self.code(), self.len, self.ragged) == (other.code(), other.len, other.ragged)
    }
}

/// `all_reduce(4 x f32, Sum) at src/main.rs:12`
impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}(", self.verb.name())?;
        if !matches!(self.verb, Verb::Barrier | Verb::Split) {
            write!(f, "{} x {}", self.len, self.dtype.name())?;
        }
        if self.ragged != 0 {
            f.write_str(" in ragged parts")?;
        }
        if let Some(op) = self.op {
            write!(f, ", {op:?}")?;
        }
        match (self.verb, self.root) {
            (Verb::Send, Some(r)) => write!(f, ", to {r}")?,
            (Verb::Recv, Some(r)) => write!(f, ", from {r}")?,
            (Verb::Shift, Some(by)) => write!(f, ", by {by}")?,
            (_, Some(r)) => write!(f, ", root {r}")?,
            (_, None) => {}
        }
        write!(f, ") at {}:{}", self.site.file(), self.site.line())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_comes_back_as_its_call() {
        let site = Location::caller();
        for verb in Verb::ALL {
            for dtype in DType::ALL {
                let call = Call::new(verb, dtype, 7, site);
                for call in [
                    call,
                    call.op(ReduceOp::Min),
                    call.root(0),
                    call.op(ReduceOp::Sum).root(70_000),
                ] {
                    assert_eq!(Call::decode(call.code(), 7, 0, site), Some(call));
                }
            }
        }
    }
}
