//! Collectives in flight: what is computed meanwhile is computed beside them.
//!
//! On the host they run on the group's own thread. On a GPU they go on a second stream of the rank,
//! which waits for what the first had been given before, and which the first waits for afterwards.

use std::sync::Arc;

use colossal_comm::{Group, Pending};
use colossal_kernels::cuda::{Event, Stream};

use super::{devices, received, sent};
use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Result, comm};
use crate::storage::{Buffer, Lent, Typed};
use crate::view::{View, ViewMut};

/// A buffer that is on its way.
pub(crate) struct InFlight<T: Element>(Way<T>);

enum Way<T: Element> {
    Broadcast(Pending<Typed<T>>),
    Shift(Pending<(Lent<T>, Typed<T>)>),
    Beside { result: Buffer, _from: Option<Arc<Buffer>>, _follow: Follow },
    Come(Buffer),
}

/// Lets a stream wait for an event of the one beside it, at the latest when this is dropped: what
/// the event's stream uses is free only then.
struct Follow(Stream, Event);

impl Follow {
    fn now(&self) -> Result<()> {
        Ok(self.0.wait(&self.1)?)
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        // A stream that cannot wait any more has failed, which its next use says.
        let _ = self.now();
    }
}

impl<T: Element> InFlight<T> {
    /// The buffer, when it has come: in the order of the rank's stream on a GPU.
    pub(crate) fn wait(self) -> Result<Buffer> {
        Ok(match self.0 {
            Way::Broadcast(pending) => pending.wait().map_err(comm)?.0,
            Way::Shift(pending) => pending.wait().map_err(comm)?.1.0,
            Way::Beside { result, _follow, .. } => {
                _follow.now()?;
                result
            }
            Way::Come(result) => result,
        })
    }
}

/// [`Group::broadcast`] of a buffer, whose values are `root`'s afterwards.
pub(crate) fn broadcast_start<T: Element>(
    group: &Group,
    mut buffer: Buffer,
    root: usize,
) -> Result<InFlight<T>> {
    let Device::Cuda(stream) = buffer.device() else {
        return Ok(InFlight(Way::Broadcast(group.broadcast_start(Typed::new(buffer), root))));
    };
    let beside = Beside::begin(&stream)?;
    match (devices::on(group, beside.0)?, buffer.view_mut::<T>()) {
        (Some(on), ViewMut::Cuda(_, x)) => {
            on.broadcast(&mut received(x), root).map_err(comm)?;
            let follow = beside.end(&stream)?;
            Ok(InFlight(Way::Beside { result: buffer, _from: None, _follow: follow }))
        }
        (_, x) => {
            super::broadcast(group, x, root)?;
            Ok(InFlight(Way::Come(buffer)))
        }
    }
}

/// [`Group::shift`] of a buffer, which others may read meanwhile.
pub(crate) fn shift_start<T: Element>(
    group: &Group,
    from: &Arc<Buffer>,
    by: usize,
) -> Result<InFlight<T>> {
    let mut result = Buffer::on(&from.device(), from.bytes())?;
    let Device::Cuda(stream) = from.device() else {
        let pending = group.shift_start(Lent::<T>::new(from), Typed::new(result), by);
        return Ok(InFlight(Way::Shift(pending)));
    };
    let beside = Beside::begin(&stream)?;
    match (devices::on(group, beside.0)?, from.view::<T>(), result.view_mut::<T>()) {
        (Some(on), View::Cuda(_, x), ViewMut::Cuda(_, y)) => {
            on.shift(sent(x), &mut received(y), by).map_err(comm)?;
            let follow = beside.end(&stream)?;
            Ok(InFlight(Way::Beside { result, _from: Some(from.clone()), _follow: follow }))
        }
        (_, x, y) => {
            super::shift(group, x, y, by)?;
            Ok(InFlight(Way::Come(result)))
        }
    }
}

/// The stream beside a rank's own.
struct Beside<'a>(&'a Stream);

impl<'a> Beside<'a> {
    /// It begins after all that the own one was given.
    fn begin(stream: &'a Stream) -> Result<Beside<'a>> {
        let beside = stream.beside()?;
        beside.wait(&stream.record()?)?;
        Ok(Beside(beside))
    }

    fn end(&self, stream: &Stream) -> Result<Follow> {
        Ok(Follow(stream.clone(), self.0.record()?))
    }
}
