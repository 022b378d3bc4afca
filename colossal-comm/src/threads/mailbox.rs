//! Messages from one rank to another: both sides post, and whoever comes second copies.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::count::Patience;
use crate::call::Call;
use crate::engine::Way;

/// Posts of a sender and a receiver. The first send meets the first receive, and so on.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    /// Pairs that have met.
    matched: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    sends: Queue,
    recvs: Queue,
}

#[derive(Debug, Default)]
struct Queue {
    posts: VecDeque<Post>,
    next: u64,
}

/// A buffer, valid until it is met or withdrawn.
struct Post {
    number: u64,
    call: Call,
    address: *mut u8,
    /// The buffer itself, when nobody waits for it any more.
    kept: Option<Box<dyn Send>>,
}

// SAFETY: the address is of memory that its poster keeps valid, and leaves alone, until the post
// is met or withdrawn; it is used under the lock only.
unsafe impl Send for Post {}

impl std::fmt::Debug for Post {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.number, self.call)
    }
}

impl State {
    fn queue(&mut self, way: Way) -> &mut Queue {
        match way {
            Way::Send => &mut self.sends,
            Way::Recv => &mut self.recvs,
        }
    }
}

impl Mailbox {
    /// Posts a buffer and meets what is there already; its number. Or, when what it meets has
    /// another type or length: its number and both calls.
    pub(super) fn post(
        &self,
        way: Way,
        call: Call,
        address: *mut u8,
    ) -> Result<u64, (u64, Call, Call)> {
        let mut state = self.lock();
        let queue = state.queue(way);
        let number = queue.next;
        queue.next += 1;
        queue.posts.push_back(Post { number, call, address, kept: None });
        if let (Some(send), Some(recv)) = (state.sends.posts.front(), state.recvs.posts.front()) {
            if (send.call.len, send.call.dtype) != (recv.call.len, recv.call.dtype) {
                return Err((number, send.call, recv.call));
            }
            // SAFETY: both hold as many elements of one type, valid while they are posted, and
            // neither can be withdrawn while we have the lock.
            unsafe {
                std::ptr::copy_nonoverlapping(send.address, recv.address, send.call.bytes());
            }
            let met = (state.sends.posts.pop_front(), state.recvs.posts.pop_front());
            self.matched.fetch_add(1, Release);
            drop(state);
            self.changed.notify_all();
            drop(met);
        }
        Ok(number)
    }

    pub(super) fn is_matched(&self, number: u64) -> bool {
        self.matched.load(Acquire) > number
    }

    /// Looks for a short while whether post `number` has been met.
    pub(super) fn look(&self, number: u64, patience: Patience) -> bool {
        for _ in 0..patience.spins {
            if self.is_matched(number) {
                return true;
            }
            std::hint::spin_loop();
        }
        for _ in 0..patience.yields {
            if self.is_matched(number) {
                return true;
            }
            std::thread::yield_now();
        }
        self.is_matched(number)
    }

    /// Sleeps until post `number` has been met. `stop` is asked every so often, without the lock:
    /// it may wake everybody. After an error the post is withdrawn.
    pub(super) fn wait<E>(
        &self,
        way: Way,
        number: u64,
        nap: Duration,
        mut stop: impl FnMut() -> Option<E>,
    ) -> Result<(), E> {
        loop {
            let state = self.lock();
            if self.is_matched(number) {
                return Ok(());
            }
            drop(match self.changed.wait_timeout(state, nap) {
                Ok((state, _)) => state,
                Err(e) => e.into_inner().0,
            });
            if self.is_matched(number) {
                return Ok(());
            }
            if let Some(e) = stop() {
                return if self.withdraw(way, number) { Err(e) } else { Ok(()) };
            }
        }
    }

    /// Takes a post back, unless it has been met; after this nobody uses its buffer.
    pub(super) fn withdraw(&self, way: Way, number: u64) -> bool {
        let mut state = self.lock();
        if self.is_matched(number) {
            return false;
        }
        state.queue(way).posts.retain(|p| p.number != number);
        true
    }

    /// Keeps a buffer until its post has been met.
    pub(super) fn adopt(&self, way: Way, number: u64, buffer: Box<dyn Send>) {
        let mut state = self.lock();
        if let Some(post) = state.queue(way).posts.iter_mut().find(|p| p.number == number) {
            post.kept = Some(buffer);
        }
    }

    pub(super) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}
