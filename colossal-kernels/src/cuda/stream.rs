//! Streams: queues of work in order; and events, which order one after another.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use bytemuck::Pod;
use cudarc::driver::sys::{CUevent, CUevent_flags, CUresult};
use cudarc::driver::{CudaEvent, CudaStream, result};

use super::blas::{Blas, Product};
use super::device::Device;
use super::dnn::{Convolution, Dnn};
use super::error::{Doing, Error, Result};
use super::memory::{Block, Pinned};
use super::slice::{Slice, SliceMut};

/// A queue of work on a device, done in the order in which it was put there.
#[derive(Clone)]
pub struct Stream {
    device: Device,
    stream: Arc<CudaStream>,
    /// Made when the first product asks for it.
    blas: Arc<OnceLock<Option<Blas>>>,
    /// The same for convolutions.
    dnn: Arc<OnceLock<Option<Dnn>>>,
    /// Scratch of kernels, grown to the largest need.
    scratch: Arc<Mutex<Vec<Block>>>,
    /// Made when it is first asked for.
    beside: Arc<OnceLock<Stream>>,
    graphs: Arc<AtomicU64>,
}

/// A stream that others own.
#[derive(Debug, Clone)]
pub struct WeakStream {
    device: Device,
    stream: Weak<CudaStream>,
}

impl WeakStream {
    /// The stream, while an owner is left. Its scratch and its library of products are its own.
    pub fn upgrade(&self) -> Option<Stream> {
        Some(Stream::of(&self.device, self.stream.upgrade()?))
    }
}

type Elapsed = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    device: Device,
    event: CudaEvent,
}

impl Stream {
    /// A queue of its own on the device of this number.
    ///
    /// # Errors
    /// As [`Device::new`].
    pub fn new(ordinal: usize) -> Result<Stream> {
        Stream::on(&Device::new(ordinal)?)
    }

    /// A queue of its own on `device`: for copies and messages beside the work of another.
    pub fn on(device: &Device) -> Result<Stream> {
        device.bind()?;
        let stream = device.context().new_stream().doing(device.ordinal(), "making a stream")?;
        Ok(Stream::of(device, stream))
    }

    fn of(device: &Device, stream: Arc<CudaStream>) -> Stream {
        Stream {
            device: device.clone(),
            stream,
            blas: Arc::default(),
            dnn: Arc::default(),
            scratch: Arc::default(),
            beside: Arc::default(),
            graphs: Arc::default(),
        }
    }

    /// A second queue beside it, which it owns: for messages that its work does not wait for.
    ///
    /// # Errors
    /// What the driver says.
    pub fn beside(&self) -> Result<&Stream> {
        if let Some(stream) = self.beside.get() {
            return Ok(stream);
        }
        let made = Stream::on(&self.device)?;
        // Of two threads that come at once the first's is kept.
        Ok(self.beside.get_or_init(|| made))
    }

    /// How many clones of it there are, this one included.
    pub fn owners(&self) -> usize {
        Arc::strong_count(&self.stream)
    }

    /// It without owning it.
    pub fn downgrade(&self) -> WeakStream {
        WeakStream { device: self.device.clone(), stream: Arc::downgrade(&self.stream) }
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Lends `len` elements of scratch (unspecified values) to what `f` puts on the stream, in
    /// whose order they are used again. May be nested.
    pub(super) fn with_scratch<T: Pod, R>(
        &self,
        len: usize,
        f: impl FnOnce(SliceMut<'_, T>) -> Result<R>,
    ) -> Result<R> {
        let kept = || self.scratch.lock().unwrap_or_else(|e| e.into_inner());
        let bytes = len * size_of::<T>();
        let known = kept().pop();
        let mut block = match known {
            Some(block) if block.capacity() >= bytes => block,
            small => match Block::new(&self.device, bytes.next_multiple_of(1 << 20)) {
                Ok(block) => block,
                Err(error) => {
                    kept().extend(small);
                    return Err(error);
                }
            },
        };
        let result = f(block.slice_mut(0..len));
        kept().push(block);
        result
    }

    /// All scratch, for a graph whose kernels use it: the stream makes itself new.
    pub(super) fn take_scratch(&self) -> Vec<Block> {
        std::mem::take(&mut self.scratch.lock().unwrap_or_else(|e| e.into_inner()))
    }

    pub(super) fn count_graph(&self) {
        self.graphs.fetch_add(1, Ordering::Relaxed);
    }

    /// How many graphs were launched on it so far.
    pub fn graph_launches(&self) -> u64 {
        self.graphs.load(Ordering::Relaxed)
    }

    /// Puts a product on it, if cuBLASLt is there and has an algorithm for it.
    pub(super) fn product(&self, product: &Product) -> Result<bool> {
        if self.blas.get().is_none() {
            let blas = Blas::new(&self.device)?;
            // Of two threads that come at once the first's is kept.
            let _ = self.blas.set(blas);
        }
        match self.blas.get() {
            Some(Some(blas)) => blas.run(self, product),
            _ => Ok(false),
        }
    }

    /// Puts a convolution on it, if cuDNN is there and has an algorithm for it.
    pub(super) fn convolution(&self, convolution: &Convolution<'_>) -> Result<bool> {
        if self.dnn.get().is_none() {
            let dnn = Dnn::new(self)?;
            // As above.
            let _ = self.dnn.set(dnn);
        }
        match self.dnn.get() {
            Some(Some(dnn)) => dnn.run(self, convolution),
            _ => Ok(false),
        }
    }

    /// cudarc's stream, for other libraries.
    pub fn raw(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Waits until all that was put on it has ended.
    ///
    /// # Errors
    /// What failed on the device since the last look.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        self.stream.synchronize().doing(self.device.ordinal(), "waiting for a stream")
    }

    /// Marks the point that it has come to.
    pub fn record(&self) -> Result<Event> {
        self.mark(CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// The same with the time at which it comes there: for [`Event::until`].
    pub fn record_timed(&self) -> Result<Event> {
        self.mark(CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn mark(&self, flags: CUevent_flags) -> Result<Event> {
        self.device.bind()?;
        let event = self.stream.record_event(Some(flags));
        let event = event.doing(self.device.ordinal(), "recording an event")?;
        Ok(Event { device: self.device.clone(), event })
    }

    /// What is put on it from now on begins after that point of another stream.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device.bind()?;
        self.stream.wait(&event.event).doing(self.device.ordinal(), "waiting for an event")
    }

    /// Copies to the device. The values may change as soon as this returns.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn upload<T: Pod>(&self, from: &[T], to: SliceMut<'_, T>) -> Result<()> {
        assert_eq!(from.len(), to.len(), "upload: as many elements there as here");
        if from.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: `to` is as long. The driver has read pageable memory when this returns; pinned
        // memory is only lent to copies by `upload_pinned`.
        unsafe { result::memcpy_htod_async(to.address(), from, self.stream.cu_stream()) }
            .doing(self.device.ordinal(), "copying to it")
    }

    /// Copies to the host and waits for it: for all that was put on the stream before, too.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn download<T: Pod>(&self, from: Slice<'_, T>, to: &mut [T]) -> Result<()> {
        assert_eq!(from.len(), to.len(), "download: as many elements there as here");
        if to.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: `from` is as long, and the copy ends before `to` is given back.
        unsafe { result::memcpy_dtoh_async(to, from.address(), self.stream.cu_stream()) }
            .doing(self.device.ordinal(), "copying from it")?;
        self.synchronize()
    }

    /// Starts a copy to the device from the first bytes of pinned memory, which is given back
    /// when the event has come.
    pub fn upload_pinned<T: Pod>(&self, from: Pinned, to: SliceMut<'_, T>) -> Result<Transfer> {
        self.device.bind()?;
        let elements = &from.as_slice::<T>()[..to.len()];
        // SAFETY: `to` is as long; `Transfer` holds the memory until the copy has ended.
        unsafe { result::memcpy_htod_async(to.address(), elements, self.stream.cu_stream()) }
            .doing(self.device.ordinal(), "copying to it")?;
        Ok(Transfer { done: self.record()?, memory: Some(from) })
    }

    /// Starts a copy to the first bytes of pinned memory, which is given back when it has ended.
    pub fn download_pinned<T: Pod>(&self, from: Slice<'_, T>, mut to: Pinned) -> Result<Transfer> {
        self.device.bind()?;
        let elements = &mut to.as_mut_slice::<T>()[..from.len()];
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_async(elements, from.address(), self.stream.cu_stream()) }
            .doing(self.device.ordinal(), "copying from it")?;
        Ok(Transfer { done: self.record()?, memory: Some(to) })
    }

    /// Copies on the device.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn copy<T: Pod>(&self, from: Slice<'_, T>, to: SliceMut<'_, T>) -> Result<()> {
        assert_eq!(from.len(), to.len(), "copy: as many elements there as here");
        if from.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let (to, from, bytes) = (to.address(), from.address(), from.len() * size_of::<T>());
        // SAFETY: both are as long.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) }
            .doing(self.device.ordinal(), "copying on it")
    }

    /// Sets all bytes to zero.
    pub fn zero<T: Pod>(&self, to: SliceMut<'_, T>) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let bytes = to.len() * size_of::<T>();
        // SAFETY: in bounds; all types here have a zero.
        unsafe { result::memset_d8_async(to.address(), 0, bytes, self.stream.cu_stream()) }
            .doing(self.device.ordinal(), "zeroing")
    }
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a stream of {:?}", self.device)
    }
}

impl PartialEq for Stream {
    fn eq(&self, other: &Stream) -> bool {
        self.stream.cu_stream() == other.stream.cu_stream()
    }
}

impl Event {
    /// Has the stream passed it?
    pub fn has_come(&self) -> Result<bool> {
        self.device.bind()?;
        self.event.try_is_complete().doing(self.device.ordinal(), "asking for an event")
    }

    /// Milliseconds from here to a later point; both recorded with their time. Waits for it.
    pub fn until(&self, end: &Event) -> Result<f32> {
        end.synchronize()?;
        // Of two names of one function old drivers know the first alone.
        let name = c"cuEventElapsedTime";
        let elapsed = super::library::driver_function::<Elapsed>(name);
        let mut milliseconds = 0.0;
        // SAFETY: of this signature in all versions; both events have come.
        let code = elapsed
            .map(|f| unsafe { f(&mut milliseconds, self.event.cu_event(), end.event.cu_event()) });
        let code = code.unwrap_or(CUresult::CUDA_ERROR_NOT_FOUND).result();
        code.doing(self.device.ordinal(), "timing")?;
        Ok(milliseconds)
    }

    /// Waits on the host until the stream has passed it.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        self.event.synchronize().doing(self.device.ordinal(), "waiting for an event")
    }
}

/// A copy under way, which holds the host's side of it.
#[derive(Debug)]
pub struct Transfer {
    done: Event,
    memory: Option<Pinned>,
}

impl Transfer {
    /// Waits for it and gives the memory back.
    ///
    /// # Errors
    /// What failed on the device. The memory is then not given back.
    pub fn finish(mut self) -> Result<Pinned> {
        self.done.synchronize()?;
        let gone = Error::NoDevice { ordinal: self.done.device.ordinal(), count: 0 };
        self.memory.take().ok_or(gone)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take()
            && self.done.synchronize().is_err()
        {
            // The device may still write there: it is nobody's any more.
            std::mem::forget(memory);
        }
    }
}
