//! What `colossal-comm` needs of our runtime so that ranks as threads can use each other's device
//! buffers: streams by their address, and events.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use colossal_comm::{
    DType, DeviceEvent, DeviceRuntime, Group, OnStream, ReduceOp, provide_devices,
};
use colossal_kernels::cuda::{self, Event, RankOp, Stream, WeakStream};

use crate::error::Result;

/// Streams in use, by their address; each is gone with its owner.
static STREAMS: Mutex<Option<HashMap<usize, WeakStream>>> = Mutex::new(None);
/// Events that peers may wait for, by number.
static EVENTS: Mutex<Option<(u64, HashMap<u64, Event>)>> = Mutex::new(None);

/// The group's verbs on device buffers in the order of `stream`; `None` where its ranks have none.
pub(super) fn on<'a>(group: &'a Group, stream: &'a Stream) -> Result<Option<OnStream<'a>>> {
    let raw = stream.raw().cu_stream();
    let mut streams = STREAMS.lock().unwrap_or_else(|e| e.into_inner());
    if streams.is_none() {
        provide_devices(Runtime);
    }
    let streams = streams.get_or_insert_default();
    if streams.get(&(raw as usize)).and_then(WeakStream::upgrade).is_none() {
        // An address may be used again when its stream is gone.
        streams.retain(|_, other| other.upgrade().is_some());
        // Before this rank's first call: who meets it there can be reached.
        for other in streams.values().filter_map(WeakStream::upgrade) {
            stream.device().reach(other.device())?;
            other.device().reach(stream.device())?;
        }
        streams.insert(raw as usize, stream.downgrade());
    }
    // SAFETY: the stream outlives the verbs, and is of the device whose buffers it is given; a call
    // is on it when the verb returns.
    Ok(unsafe { group.on(raw.cast()) }.ok())
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
    let known = streams.as_ref().and_then(|s| s.get(&(raw as usize))?.upgrade());
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
