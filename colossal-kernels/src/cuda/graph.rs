//! Graphs: work of a stream that was recorded once and is launched as one, for work of many short
//! kernels that is done again and again.
//!
//! What is recorded are kernels with the values of their arguments, addresses among them, and copies
//! on the device. So memory that it reads and writes must stay, numbers that change must lie on the
//! device, and nothing may wait for the device or ask it for memory: such a call fails and the
//! recording is void ([`Error::is_capture`]). Do the same work once before: that compiles its
//! kernels, chooses algorithms for its products and makes its scratch.

use cudarc::driver::result;
use cudarc::driver::sys::{CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::error::{Doing, Error, Result};
use super::memory::Block;
use super::stream::Stream;

/// Recorded work of a stream.
///
/// ```no_run
/// use colossal_kernels::cuda::{Block, Error, Graph, Stream, scale};
///
/// # fn main() -> Result<(), Error> {
/// let stream = Stream::new(0)?;
/// let mut x = Block::new(stream.device(), 4 * 4)?;
/// let mut y = Block::new(stream.device(), 4 * 4)?;
/// let mut double = || scale(&stream, x.slice::<f32>(0..4), 2.0, y.slice_mut(0..4));
/// double()?;
/// // SAFETY: x and y outlive the graph.
/// let (graph, ()) = unsafe { Graph::record(&stream, double)? };
/// stream.upload(&[1.0f32, 2.0, 3.0, 4.0], x.slice_mut(0..4))?;
/// graph.launch()?;
/// # Ok(())
/// # }
/// ```
pub struct Graph {
    stream: Stream,
    executable: CUgraphExec,
    /// What its kernels have for scratch: the stream makes itself new.
    _scratch: Vec<Block>,
}

// SAFETY: a handle without affinity to a thread; it is not `Sync`, as the driver asks.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` puts on the stream, none of which is done now.
    ///
    /// # Safety
    /// Until the graph is dropped, the device memory that the work reads and writes stays
    /// allocated, and holds at each launch nothing that the work may not overwrite.
    ///
    /// # Errors
    /// What `work` says; what the driver says of the recording.
    pub unsafe fn record<R, E: From<Error>>(
        stream: &Stream,
        work: impl FnOnce() -> Result<R, E>,
    ) -> Result<(Graph, R), E> {
        let recording = Recording::begin(stream)?;
        let done = work()?;
        let template = recording.end()?;
        let ordinal = stream.device().ordinal();
        // SAFETY: the template is whole, as the driver gave it.
        let executable = unsafe { result::graph::instantiate(template.0, NO_FLAGS) };
        let executable = executable.doing(ordinal, "making a graph of what was recorded")?;
        let (stream, _scratch) = (stream.clone(), stream.take_scratch());
        Ok((Graph { stream, executable, _scratch }, done))
    }

    /// Puts it on its stream, as one.
    ///
    /// # Errors
    /// What failed on the device since the last look.
    pub fn launch(&self) -> Result<()> {
        self.stream.device().bind()?;
        // SAFETY: alive, of this stream's device; `record` asks that its memory stays.
        unsafe { result::graph::launch(self.executable, self.stream.raw().cu_stream()) }
            .doing(self.stream.device().ordinal(), "launching a graph")?;
        self.stream.count_graph();
        Ok(())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.stream.device().bind().is_ok() {
            // SAFETY: made by `record`, destroyed once; a launch under way ends first.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a graph of {:?}", self.stream)
    }
}

const NO_FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags(0);

/// A stream that records; dropped early, it forgets.
struct Recording<'a>(&'a Stream);

impl Recording<'_> {
    /// Only calls of this thread can void it: ranks that are threads go on.
    fn begin(stream: &Stream) -> Result<Recording<'_>> {
        stream.device().bind()?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(stream.raw().cu_stream(), mode) }
            .doing(stream.device().ordinal(), "recording a graph")?;
        Ok(Recording(stream))
    }

    fn end(self) -> Result<Template> {
        let stream = self.0;
        std::mem::forget(self);
        // SAFETY: begun on this thread.
        let template = unsafe { result::stream::end_capture(stream.raw().cu_stream()) };
        Ok(Template(template.doing(stream.device().ordinal(), "recording a graph")?))
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        // SAFETY: as in `end`. That the recording is void is no news.
        let _ = unsafe { result::stream::end_capture(self.0.raw().cu_stream()) }.map(Template);
    }
}

/// What was recorded, not yet made ready for the device.
struct Template(CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: given by the driver, destroyed once.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}
