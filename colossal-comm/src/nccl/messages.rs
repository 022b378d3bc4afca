//! Messages of the host: posts that go together, as one group of NCCL, when one is waited for.

use super::library::datatype;
use super::{Nccl, Turn, inquest};
use crate::engine::{Ticket, Way};
use crate::error::Result;

/// A message of the host.
pub(super) struct Posted {
    pub(super) ticket: Ticket,
    pub(super) address: usize,
    pub(super) kept: Option<Box<dyn Send>>,
}

impl std::fmt::Debug for Posted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.ticket.call)
    }
}

impl Nccl {
    /// Puts all posted messages of the host on their stream, as one group, and waits for them.
    pub(super) fn flush(&self, turn: &mut Turn) -> Result<()> {
        let posted = std::mem::take(&mut turn.posted);
        let Some(first) = posted.first().map(|p| p.ticket.call) else { return Ok(()) };
        let inner = &*self.inner;
        inner.check()?;
        let (device, stream) = (&inner.world.device, turn.side);
        device.enter()?;
        inner.recorder.message(inner.rank, Some(first));
        let mut offsets = Vec::with_capacity(posted.len());
        let mut total = 0;
        for post in &posted {
            offsets.push(total as u64);
            total += post.ticket.call.bytes().next_multiple_of(256);
        }
        let base = turn.input.at_least(device, total)?;
        let at = |i: usize| (base + offsets[i]) as *mut u8;
        let sends = |post: &Posted| post.ticket.way == Way::Send;
        // SAFETY: posters keep their buffers until the ticket is settled; each step on them has
        // ended before this returns.
        unsafe {
            for (i, post) in posted.iter().enumerate().filter(|(_, p)| sends(p)) {
                let from = std::ptr::with_exposed_provenance(post.address);
                device.copy_in(at(i) as u64, from, post.ticket.call.bytes(), stream)?;
            }
            inner.finish(&first, inquest::MESSAGE, stream)?;
            inner.issue(&first, inquest::MESSAGE, &inner.messages, |nccl, comm| {
                inner.to(nccl, comm, stream).together(|to| {
                    posted.iter().enumerate().find_map(|(i, post)| {
                        let Ticket { way, peer, call, .. } = post.ticket;
                        let t = datatype(call.dtype);
                        to.message(way, at(i), call.len, t, peer)
                    })
                })
            })?;
            inner.finish(&first, inquest::MESSAGE, stream)?;
            for (i, post) in posted.iter().enumerate().filter(|(_, p)| !sends(p)) {
                let to = std::ptr::with_exposed_provenance_mut(post.address);
                device.copy_out(to, at(i) as u64, post.ticket.call.bytes(), stream)?;
            }
        }
        let result = inner.finish(&first, inquest::MESSAGE, stream);
        inner.recorder.message(inner.rank, None);
        result
    }
}
