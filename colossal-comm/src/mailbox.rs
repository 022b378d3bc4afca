//! Messages from one rank to another: the receiver copies out of the sender's buffer.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};

/// Posts from one rank to another, taken in order.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    posts: VecDeque<Post>,
    next: u64,
    /// Posts below this number have been taken.
    taken: u64,
}

/// A sender's buffer, valid until it is taken or withdrawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Post {
    number: u64,
    pub(crate) address: usize,
    pub(crate) len: usize,
    pub(crate) dtype: &'static str,
}

impl Mailbox {
    /// Leaves a buffer for the receiver; its number.
    pub(crate) fn post(&self, address: usize, len: usize, dtype: &'static str) -> u64 {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.posts.push_back(Post { number, address, len, dtype });
        self.changed.notify_all();
        number
    }

    /// Waits until post `number` has been taken. `stop` is asked every so often, without the
    /// lock: it may wake everybody.
    pub(crate) fn until_taken<E>(
        &self,
        number: u64,
        mut stop: impl FnMut() -> Option<E>,
    ) -> Result<(), E> {
        loop {
            let mut state = self.lock();
            if state.taken <= number {
                state = self.wait(state);
            }
            if state.taken > number {
                return Ok(());
            }
            drop(state);
            if let Some(e) = stop() {
                let mut state = self.lock();
                if state.taken > number {
                    return Ok(());
                }
                // Withdrawn: after this nobody reads the buffer.
                state.posts.retain(|p| p.number != number);
                return Err(e);
            }
        }
    }

    /// Waits for a post and copies it with `copy` while the sender waits; `stop` as above.
    pub(crate) fn take<R, E>(
        &self,
        copy: impl FnOnce(Post) -> R,
        mut stop: impl FnMut() -> Option<E>,
    ) -> Result<R, E> {
        loop {
            let mut state = self.lock();
            if state.posts.is_empty() {
                state = self.wait(state);
            }
            // Copying under the lock keeps the sender from withdrawing meanwhile.
            if let Some(post) = state.posts.pop_front() {
                let result = copy(post);
                state.taken = post.number + 1;
                self.changed.notify_all();
                return Ok(result);
            }
            drop(state);
            if let Some(e) = stop() {
                return Err(e);
            }
        }
    }

    pub(crate) fn wake(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, State>,
    ) -> std::sync::MutexGuard<'a, State> {
        let short = std::time::Duration::from_millis(50);
        match self.changed.wait_timeout(state, short) {
            Ok((state, _)) => state,
            Err(e) => e.into_inner().0,
        }
    }
}
