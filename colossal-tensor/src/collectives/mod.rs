//! Collectives on views: on the host, or on a GPU's stream.
//!
//! Where the ranks of a group have no way to each other's devices (processes without NCCL), buffers
//! travel through the host.

mod devices;
mod in_flight;

use colossal_comm::{DeviceSlice, DeviceSliceMut, Group, OnStream, ReduceOp};
use colossal_kernels::cuda;

use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Result, comm};
use crate::storage::Buffer;
use crate::view::{View, ViewMut};

use devices::on;
pub(crate) use in_flight::{InFlight, broadcast_start, shift_start};

/// [`Group::all_reduce`]
pub fn all_reduce<T: Element>(group: &Group, x: ViewMut<'_, T>, op: ReduceOp) -> Result<()> {
    in_place((group, x), |x| group.all_reduce(x, op), |on, x| on.all_reduce(x, op))
}

/// [`Group::reduce`]
pub fn reduce<T: Element>(
    group: &Group,
    x: ViewMut<'_, T>,
    op: ReduceOp,
    root: usize,
) -> Result<()> {
    in_place((group, x), |x| group.reduce(x, op, root), |on, x| on.reduce(x, op, root))
}

/// [`Group::broadcast`]
pub fn broadcast<T: Element>(group: &Group, x: ViewMut<'_, T>, root: usize) -> Result<()> {
    in_place((group, x), |x| group.broadcast(x, root), |on, x| on.broadcast(x, root))
}

/// [`Group::reduce_scatter`]
pub fn reduce_scatter<T: Element>(
    group: &Group,
    x: View<'_, T>,
    y: ViewMut<'_, T>,
    op: ReduceOp,
) -> Result<()> {
    both(
        (group, x, y),
        |x, y| group.reduce_scatter(x, y, op),
        |on, x, y| on.reduce_scatter(x, y, op),
    )
}

/// [`Group::all_gather`]
pub fn all_gather<T: Element>(group: &Group, x: View<'_, T>, y: ViewMut<'_, T>) -> Result<()> {
    both((group, x, y), |x, y| group.all_gather(x, y), |on, x, y| on.all_gather(x, y))
}

/// [`Group::all_to_all`]
pub fn all_to_all<T: Element>(group: &Group, x: View<'_, T>, y: ViewMut<'_, T>) -> Result<()> {
    both((group, x, y), |x, y| group.all_to_all(x, y), |on, x, y| on.all_to_all(x, y))
}

/// [`Group::shift`]
pub fn shift<T: Element>(
    group: &Group,
    x: View<'_, T>,
    y: ViewMut<'_, T>,
    by: usize,
) -> Result<()> {
    both((group, x, y), |x, y| group.shift(x, y, by), |on, x, y| on.shift(x, y, by))
}

/// [`Group::all_to_all_v_into`]
pub fn all_to_all_v<T: Element>(
    group: &Group,
    x: View<'_, T>,
    send: &[usize],
    y: ViewMut<'_, T>,
    recv: &[usize],
) -> Result<()> {
    both(
        (group, x, y),
        |x, y| group.all_to_all_v_into(x, send, y, recv),
        |on, x, y| on.all_to_all_v(x, send, y, recv),
    )
}

/// A verb that works in place.
fn in_place<T: Element>(
    (group, x): (&Group, ViewMut<'_, T>),
    on_host: impl FnOnce(&mut [T]) -> colossal_comm::Result<()>,
    on_device: impl FnOnce(&OnStream<'_>, &mut DeviceSliceMut<'_, T>) -> colossal_comm::Result<()>,
) -> Result<()> {
    match x {
        ViewMut::Cpu(x) => on_host(x).map_err(comm),
        ViewMut::Cuda(stream, x) => match on(group, stream)? {
            Some(on) => on_device(&on, &mut received(x)).map_err(comm),
            None => {
                let x = ViewMut::Cuda(stream, x);
                let mut copy = Buffer::copy_of(&Device::Cpu, x.as_view())?;
                on_host(copy.as_mut_slice::<T>()).map_err(comm)?;
                x.copy(copy.view())
            }
        },
    }
}

/// A verb with an input and an output.
fn both<T: Element>(
    (group, x, y): (&Group, View<'_, T>, ViewMut<'_, T>),
    on_host: impl FnOnce(&[T], &mut [T]) -> colossal_comm::Result<()>,
    on_device: impl FnOnce(
        &OnStream<'_>,
        DeviceSlice<'_, T>,
        &mut DeviceSliceMut<'_, T>,
    ) -> colossal_comm::Result<()>,
) -> Result<()> {
    match (x, y) {
        (View::Cpu(x), ViewMut::Cpu(y)) => on_host(x, y).map_err(comm),
        (View::Cuda(stream, x), ViewMut::Cuda(_, y)) if let Some(on) = on(group, stream)? => {
            on_device(&on, sent(x), &mut received(y)).map_err(comm)
        }
        (x, y) => {
            let x = Buffer::copy_of(&Device::Cpu, x)?;
            let mut copy = Buffer::new::<T>(y.len());
            on_host(x.as_slice(), copy.as_mut_slice()).map_err(comm)?;
            y.copy(copy.view())
        }
    }
}

/// Elements to send.
fn sent<'a, T: Element>(x: cuda::Slice<'a, T>) -> DeviceSlice<'a, T> {
    // SAFETY: buffers are used and freed in the order of the rank's one stream.
    unsafe { DeviceSlice::from_raw(x.address(), x.len()) }
}

/// Room to receive.
fn received<'a, T: Element>(x: cuda::SliceMut<'a, T>) -> DeviceSliceMut<'a, T> {
    // SAFETY: as above.
    unsafe { DeviceSliceMut::from_raw(x.address(), x.len()) }
}
