//! Collectives on views: on the host, or on a GPU's stream; and what `colossal-comm` needs of our
//! runtime so that ranks as threads can use each other's buffers.
//!
//! Where the ranks of a group have no way to each other's devices (processes without NCCL), buffers
//! travel through the host.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use colossal_comm::{
    DType, DeviceEvent, DeviceRuntime, DeviceSlice, DeviceSliceMut, Group, OnStream, ReduceOp,
    provide_devices,
};
use colossal_kernels::cuda::{self, Event, RankOp, Stream};

use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Result, comm};
use crate::storage::Buffer;
use crate::view::{View, ViewMut};

/// [`Group::all_reduce`]
pub fn all_reduce<T: Element>(group: &Group, x: ViewMut<'_, T>, op: ReduceOp) -> Result<()> {
    match x {
        ViewMut::Cpu(x) => group.all_reduce(x, op).map_err(comm),
        ViewMut::Cuda(stream, x) => match on(group, stream)? {
            Some(on) => on.all_reduce(&mut received(x), op).map_err(comm),
            None => {
                let x = ViewMut::Cuda(stream, x);
                let mut copy = Buffer::copy_of(&Device::Cpu, x.as_view())?;
                group.all_reduce(copy.as_mut_slice::<T>(), op).map_err(comm)?;
                x.copy(copy.view())
            }
        },
    }
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

/// Streams that are in use, by their address.
static STREAMS: Mutex<Option<HashMap<usize, Stream>>> = Mutex::new(None);
/// Events that peers may wait for, by number.
static EVENTS: Mutex<Option<(u64, HashMap<u64, Event>)>> = Mutex::new(None);

/// The group's verbs on device buffers in the order of `stream`; `None` where its ranks have none.
fn on<'a>(group: &'a Group, stream: &'a Stream) -> Result<Option<OnStream<'a>>> {
    let raw = stream.raw().cu_stream();
    let mut streams = STREAMS.lock().unwrap_or_else(|e| e.into_inner());
    if streams.is_none() {
        provide_devices(Runtime);
    }
    let streams = streams.get_or_insert_default();
    if !streams.contains_key(&(raw as usize)) {
        // Before this rank's first call: who meets it there can be reached.
        for other in streams.values() {
            stream.device().reach(other.device())?;
            other.device().reach(stream.device())?;
        }
        streams.insert(raw as usize, stream.clone());
    }
    // SAFETY: the stream is kept for good, above, and of the device whose buffers it is given.
    Ok(unsafe { group.on(raw.cast()) }.ok())
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

#[derive(Debug)]
struct Runtime;

/// Forgets its event when nobody needs it.
#[derive(Debug)]
struct Kept(u64);

impl Drop for Kept {
    fn drop(&mut self) {
        let mut events = EVENTS.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, events)) = events.as_mut() {
            events.remove(&self.0);
        }
    }
}

fn stream(raw: *mut c_void) -> Result<Stream, String> {
    let streams = STREAMS.lock().unwrap_or_else(|e| e.into_inner());
    let known = streams.as_ref().and_then(|s| s.get(&(raw as usize)).cloned());
    known.ok_or_else(|| "a stream that no tensor uses".into())
}

fn text(error: cuda::Error) -> String {
    error.to_string()
}

impl DeviceRuntime for Runtime {
    fn record(&self, raw: *mut c_void) -> Result<DeviceEvent, String> {
        let event = stream(raw)?.record().map_err(text)?;
        let mut events = EVENTS.lock().unwrap_or_else(|e| e.into_inner());
        let (next, events) = events.get_or_insert_default();
        *next += 1;
        events.insert(*next, event);
        Ok(DeviceEvent { id: *next, keep: Box::new(Kept(*next)) })
    }

    unsafe fn wait_for(&self, raw: *mut c_void, event: u64) -> Result<(), String> {
        let stream = stream(raw)?;
        let events = EVENTS.lock().unwrap_or_else(|e| e.into_inner());
        let event = events.as_ref().and_then(|(_, events)| events.get(&event));
        stream.wait(event.ok_or("an event that is gone")?).map_err(text)
    }

    unsafe fn copy(
        &self,
        raw: *mut c_void,
        from: u64,
        to: u64,
        bytes: usize,
    ) -> Result<(), String> {
        // SAFETY: the caller's contract.
        let (from, to) = unsafe {
            (cuda::Slice::<u8>::from_raw(from, bytes), cuda::SliceMut::<u8>::from_raw(to, bytes))
        };
        stream(raw)?.copy(from, to).map_err(text)
    }

    unsafe fn reduce(
        &self,
        raw: *mut c_void,
        (dtype, op): (DType, ReduceOp),
        sources: &[u64],
        targets: &[u64],
        len: usize,
    ) -> Result<(), String> {
        let ty = match dtype {
            DType::F32 => "float",
            DType::F64 => "double",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I32 => "int",
            DType::U32 => "u32",
            DType::I64 => "i64",
            DType::U64 => "u64",
        };
        let op = match op {
            ReduceOp::Sum => RankOp::Sum,
            ReduceOp::Avg => RankOp::Mean,
            ReduceOp::Max => RankOp::Max,
            ReduceOp::Min => RankOp::Min,
        };
        // SAFETY: the caller's contract.
        unsafe { cuda::reduce_ranks(&stream(raw)?, ty, op, sources, targets, len) }.map_err(text)
    }

    fn synchronize(&self, raw: *mut c_void) -> Result<(), String> {
        stream(raw)?.synchronize().map_err(text)
    }
}
