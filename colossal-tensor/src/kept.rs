//! What a graph that is being recorded keeps: memory whose addresses are in it.

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

/// Of one stream: what was dropped within the work, for the work's own later needs, and what it
/// looked at.
#[derive(Debug)]
pub(crate) struct Kept<M> {
    place: usize,
    free: HashMap<usize, Vec<M>>,
    seen: HashMap<*const (), Arc<dyn Any + Send + Sync>>,
}

/// Everything, for whoever owns the graph. What was seen is let go first: what was dropped can then
/// serve others.
#[derive(Debug)]
pub(crate) struct Held<B> {
    _seen: Vec<Arc<dyn Any + Send + Sync>>,
    _dropped: Vec<B>,
}

impl<M> Kept<M> {
    /// Of the stream of this place.
    pub(crate) fn new(place: usize) -> Kept<M> {
        Kept { place, free: HashMap::new(), seen: HashMap::new() }
    }

    /// It, if it is of this place.
    pub(crate) fn at(&mut self, place: usize) -> Option<&mut Kept<M>> {
        (self.place == place).then_some(self)
    }

    pub(crate) fn take(&mut self, capacity: usize) -> Option<M> {
        self.free.get_mut(&capacity).and_then(Vec::pop)
    }

    pub(crate) fn put(&mut self, capacity: usize, memory: M) {
        self.free.entry(capacity).or_default().push(memory);
    }

    /// The graph has addresses of `what`.
    pub(crate) fn see<T: Any + Send + Sync>(&mut self, what: &Arc<T>) {
        self.seen.entry(Arc::as_ptr(what).cast()).or_insert_with(|| what.clone());
    }

    pub(crate) fn into_held<B>(self, buffer: impl Fn(M) -> B) -> Held<B> {
        let dropped = self.free.into_values().flatten().map(buffer).collect();
        Held { _seen: self.seen.into_values().collect(), _dropped: dropped }
    }
}
