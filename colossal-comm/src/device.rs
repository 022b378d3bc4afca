//! Verbs on buffers of a device, in the order of a stream.
//!
//! A runtime for GPUs wraps its memory in [`DeviceSlice`] and [`DeviceSliceMut`] and its stream in
//! [`Group::on`]. A call is put on the stream and returns; what follows on the stream sees its
//! result. A group that fails says so at the next call, or in [`OnStream::wait`].

use std::ffi::c_void;
use std::marker::PhantomData;
use std::panic::Location;
use std::sync::OnceLock;

use crate::call::Call;
use crate::element::{DType, Element, ReduceOp};
use crate::engine::{Io, OnDevice, Parts, Way};
use crate::error::{Error, Result};
use crate::group::Group;

/// What ranks that are threads need of a runtime for GPUs, to use each other's device buffers: all
/// ranks of the process are on devices that can read each other's memory, or on one.
///
/// A program that has such a runtime hands it over once, by [`provide_devices`]; then
/// [`Group::on`] works for ranks as threads too. A call there waits on the host until all ranks
/// have called, and never on the device for a rank that has not.
pub trait DeviceRuntime: Send + Sync + std::fmt::Debug {
    /// Marks the point that a stream has come to.
    fn record(&self, stream: *mut c_void) -> Result<DeviceEvent, String>;

    /// What is put on a stream from now on begins after that point.
    ///
    /// # Safety
    /// `event` is the id of an event that is kept meanwhile.
    unsafe fn wait_for(&self, stream: *mut c_void, event: u64) -> Result<(), String>;

    /// Puts a copy on a stream, from any device of the process to any.
    ///
    /// # Safety
    /// Both addresses hold as many bytes, as [`DeviceSlice::from_raw`] says.
    unsafe fn copy(
        &self,
        stream: *mut c_void,
        from: u64,
        to: u64,
        bytes: usize,
    ) -> Result<(), String>;

    /// Puts a reduction of the sources on a stream, in their order, into every target. A target
    /// may be a source. Half-precision types are reduced in f32 and rounded once.
    ///
    /// # Safety
    /// As [`DeviceRuntime::copy`], of `len` elements each.
    unsafe fn reduce(
        &self,
        stream: *mut c_void,
        kind: (DType, ReduceOp),
        sources: &[u64],
        targets: &[u64],
        len: usize,
    ) -> Result<(), String>;

    /// Waits on the host until all that is on a stream has ended.
    fn synchronize(&self, stream: *mut c_void) -> Result<(), String>;
}

/// A point of a stream that others can wait for while it is kept.
#[derive(Debug)]
pub struct DeviceEvent {
    /// What [`DeviceRuntime::wait_for`] knows it by.
    pub id: u64,
    /// What holds it.
    pub keep: Box<dyn KeepEvent>,
}

/// Anything that can be kept by another thread.
pub trait KeepEvent: Send + std::fmt::Debug {}

impl<T: Send + std::fmt::Debug> KeepEvent for T {}

static RUNTIME: OnceLock<Box<dyn DeviceRuntime>> = OnceLock::new();

/// Hands over the process' runtime for GPUs. The first is kept.
pub fn provide_devices(runtime: impl DeviceRuntime + 'static) {
    let _ = RUNTIME.set(Box::new(runtime));
}

pub(crate) fn runtime() -> Option<&'static dyn DeviceRuntime> {
    RUNTIME.get().map(AsRef::as_ref)
}

/// Elements in the memory of a device, to be read.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a [T]>,
}

/// Elements in the memory of a device, to be written.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    address: u64,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

impl<T: Element> DeviceSlice<'_, T> {
    /// `len` elements at a device address (a `CUdeviceptr`).
    ///
    /// # Safety
    /// The memory is of the device of the group that it is given to, aligned for `T`, and stays
    /// allocated and unwritten until the stream of each call that it is given to has passed that
    /// call; memory that is freed in the order of the stream is.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSlice { address, len, memory: PhantomData }
    }
}

impl<T: Element> DeviceSliceMut<'_, T> {
    /// `len` elements at a device address (a `CUdeviceptr`).
    ///
    /// # Safety
    /// As for [`DeviceSlice::from_raw`], and nobody else touches it meanwhile.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSliceMut { address, len, memory: PhantomData }
    }
}

/// A message of [`OnStream::batch`].
#[derive(Debug)]
pub enum DeviceMessage<'a, T> {
    /// Send these elements to this rank.
    Send(DeviceSlice<'a, T>, usize),
    /// Receive as many elements from this rank.
    Recv(DeviceSliceMut<'a, T>, usize),
}

/// A group's verbs on device buffers, in the order of one stream.
#[derive(Clone, Copy)]
pub struct OnStream<'a> {
    group: &'a Group,
    engine: &'a dyn OnDevice,
    stream: *mut c_void,
}

impl std::fmt::Debug for OnStream<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on stream {:?}", self.group.name(), self.stream)
    }
}

impl Group {
    /// The verbs on device buffers, put on `stream`: a `CUstream`, which is a `cudaStream_t`.
    ///
    /// # Safety
    /// `stream` is a stream of this rank's device, alive until the group's calls on it have ended.
    ///
    /// # Errors
    /// [`Error::Engine`] for a group whose ranks have no devices.
    pub unsafe fn on(&self, stream: *mut c_void) -> Result<OnStream<'_>> {
        match self.0.engine.on_device() {
            Some(engine) => Ok(OnStream { group: self, engine, stream }),
            None => {
                let name = self.name();
                let reason = format!(
                    "the ranks of group {name} have no devices: see Group::nccl, or provide_devices \
                     for ranks that are threads"
                );
                Err(Error::Engine { op: "on".into(), reason })
            }
        }
    }
}

impl OnStream<'_> {
    fn put<T>(
        &self,
        call: &Call,
        input: u64,
        output: &mut DeviceSliceMut<'_, T>,
        [send, recv]: [Parts<'_>; 2],
    ) -> Result<()> {
        let io = Io { input: input as *const u8, output: output.address as *mut u8, send, recv };
        // SAFETY: whoever made the slices vouched for the memory until the stream has passed the
        // call, whoever made `self` for the stream; the call's lengths are the slices'.
        unsafe { self.engine.enqueue(call, io, self.stream) }
    }

    fn put_in_place<T>(&self, call: &Call, buf: &mut DeviceSliceMut<'_, T>) -> Result<()> {
        self.put(call, buf.address, buf, [Parts::Even(0); 2])
    }

    /// [`Group::all_reduce`].
    #[track_caller]
    pub fn all_reduce<T: Element>(
        &self,
        buf: &mut DeviceSliceMut<'_, T>,
        op: ReduceOp,
    ) -> Result<()> {
        self.put_in_place(&self.group.all_reduce_call::<T>(buf.len, op), buf)
    }

    /// [`Group::reduce_scatter`].
    #[track_caller]
    pub fn reduce_scatter<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
        op: ReduceOp,
    ) -> Result<()> {
        let call = self.group.reduce_scatter_call::<T>(input.len, output.len, op)?;
        let parts = Parts::Even(output.len);
        self.put(&call, input.address, output, [parts; 2])
    }

    /// [`Group::reduce_scatter_v`].
    #[track_caller]
    pub fn reduce_scatter_v<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<()> {
        let call = self.group.reduce_scatter_v_call::<T>(input.len, output.len, counts, op)?;
        self.put(&call, input.address, output, [Parts::Ragged(counts); 2])
    }

    /// [`Group::all_gather`].
    #[track_caller]
    pub fn all_gather<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
    ) -> Result<()> {
        let call = self.group.all_gather_call::<T>(input.len, output.len)?;
        self.put(&call, input.address, output, [Parts::Even(input.len); 2])
    }

    /// [`Group::all_gather_v`].
    #[track_caller]
    pub fn all_gather_v<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
        counts: &[usize],
    ) -> Result<()> {
        let call = self.group.all_gather_v_call::<T>(input.len, output.len, counts)?;
        self.put(&call, input.address, output, [Parts::Ragged(counts); 2])
    }

    /// [`Group::all_to_all`].
    #[track_caller]
    pub fn all_to_all<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
    ) -> Result<()> {
        let call = self.group.all_to_all_call::<T>(input.len, output.len)?;
        let parts = Parts::Even(input.len / self.group.world_size());
        self.put(&call, input.address, output, [parts; 2])
    }

    /// [`Group::all_to_all_v_into`]. That every rank sends what its peer expects is the caller's
    /// promise here: the lengths are on no other rank.
    #[track_caller]
    pub fn all_to_all_v<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        send: &[usize],
        output: &mut DeviceSliceMut<'_, T>,
        recv: &[usize],
    ) -> Result<()> {
        let call = self.group.all_to_all_v_call::<T>(input.len, send, output.len, recv)?;
        self.put(&call, input.address, output, [Parts::Ragged(send), Parts::Ragged(recv)])
    }

    /// [`Group::broadcast`].
    #[track_caller]
    pub fn broadcast<T: Element>(
        &self,
        buf: &mut DeviceSliceMut<'_, T>,
        root: usize,
    ) -> Result<()> {
        self.put_in_place(&self.group.broadcast_call::<T>(buf.len, root)?, buf)
    }

    /// [`Group::reduce`].
    #[track_caller]
    pub fn reduce<T: Element>(
        &self,
        buf: &mut DeviceSliceMut<'_, T>,
        op: ReduceOp,
        root: usize,
    ) -> Result<()> {
        self.put_in_place(&self.group.reduce_call::<T>(buf.len, op, root)?, buf)
    }

    /// [`Group::gather`].
    #[track_caller]
    pub fn gather<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
        root: usize,
    ) -> Result<()> {
        let call = self.group.gather_call::<T>(input.len, output.len, root)?;
        self.put(&call, input.address, output, [Parts::Even(input.len); 2])
    }

    /// [`Group::scatter`].
    #[track_caller]
    pub fn scatter<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
        root: usize,
    ) -> Result<()> {
        let call = self.group.scatter_call::<T>(input.len, output.len, root)?;
        self.put(&call, input.address, output, [Parts::Even(output.len); 2])
    }

    /// [`Group::shift`].
    #[track_caller]
    pub fn shift<T: Element>(
        &self,
        input: DeviceSlice<'_, T>,
        output: &mut DeviceSliceMut<'_, T>,
        by: usize,
    ) -> Result<()> {
        let call = self.group.shift_call::<T>(input.len, output.len, by)?;
        self.put(&call, input.address, output, [Parts::Even(0); 2])
    }

    /// [`Group::batch`]: one launch. Messages of one batch never wait for each other; two batches
    /// do, in the order of the stream.
    #[track_caller]
    pub fn batch<T: Element>(&self, messages: &mut [DeviceMessage<'_, T>]) -> Result<()> {
        let site = Location::caller();
        let all = messages.iter().map(|message| {
            let (way, address, len, peer) = match message {
                DeviceMessage::Send(buf, to) => (Way::Send, buf.address, buf.len, *to),
                DeviceMessage::Recv(buf, from) => (Way::Recv, buf.address, buf.len, *from),
            };
            let call = self.group.message_call::<T>(way, len, peer, site)?;
            Ok((way, call, peer, address as *mut u8))
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        // SAFETY: as in `put`.
        unsafe { self.engine.exchange(&all, self.stream) }
    }

    /// Waits on the host until all that is on the stream has ended.
    ///
    /// # Errors
    /// The group's failure, if one of its calls could not be completed.
    #[track_caller]
    pub fn wait(&self) -> Result<()> {
        self.engine.wait(self.stream, Location::caller())
    }
}
