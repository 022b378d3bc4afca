//! A device: its context, what it is, and the kernels that were built for it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

use super::error::{Doing, Error, Result};
use super::library::found;
use super::module::Loaded;

/// A GPU. Cloning copies a pointer; all of a process share its context.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    context: Arc<CudaContext>,
    name: String,
    capability: (i32, i32),
    memory: usize,
    multiprocessors: usize,
    /// Functions by what they were built from.
    functions: Mutex<HashMap<u128, Loaded>>,
    /// Bytes in blocks of this process, and how many there may be.
    reserved: AtomicUsize,
    budget: AtomicUsize,
}

/// The devices of this machine: none, if it has a driver but no GPU.
///
/// # Errors
/// [`Error::NoDriver`] without a driver, and what the driver says.
pub fn devices() -> Result<Vec<Device>> {
    (0..count()?).map(Device::new).collect()
}

fn count() -> Result<usize> {
    if !found().driver {
        return Err(Error::NoDriver);
    }
    match CudaContext::device_count() {
        Ok(count) => Ok(count as usize),
        Err(e) if e.0 == cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(e) => Err(Error::driver(0, "looking for devices", e)),
    }
}

impl Device {
    /// The device of this number.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoDevice`], and what the driver says.
    pub fn new(ordinal: usize) -> Result<Device> {
        static OPEN: OnceLock<Mutex<HashMap<usize, Device>>> = OnceLock::new();
        let count = count()?;
        if ordinal >= count {
            return Err(Error::NoDevice { ordinal, count });
        }
        let mut open = OPEN.get_or_init(Mutex::default).lock().unwrap_or_else(|e| e.into_inner());
        if let Some(device) = open.get(&ordinal) {
            return Ok(device.clone());
        }
        let context = CudaContext::new(ordinal).doing(ordinal, "opening")?;
        // SAFETY: streams are ordered by events of ours, so cudarc's own are not needed.
        unsafe { context.disable_event_tracking() };
        let name = context.name().doing(ordinal, "asking for its name")?;
        let capability = context.compute_capability().doing(ordinal, "asking what it can")?;
        let memory = context.total_mem().doing(ordinal, "asking for its memory")?;
        let processors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        let multiprocessors = processors.doing(ordinal, "asking for its processors")? as usize;
        let functions = Mutex::default();
        let (reserved, budget) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        let inner = Inner {
            context,
            name,
            capability,
            memory,
            multiprocessors,
            functions,
            reserved,
            budget,
        };
        let device = Device(Arc::new(inner));
        open.insert(ordinal, device.clone());
        Ok(device)
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.0.context.ordinal()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> (i32, i32) {
        self.0.capability
    }

    /// What kernels are built for: `sm_80`, and with all that is special to it `sm_90a`.
    pub fn arch(&self) -> String {
        let (major, minor) = self.0.capability;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }

    /// Bytes of memory.
    pub fn memory(&self) -> usize {
        self.0.memory
    }

    /// Bytes of memory that nobody holds, and all.
    pub fn free_memory(&self) -> Result<(usize, usize)> {
        self.0.context.mem_get_info().doing(self.ordinal(), "asking for free memory")
    }

    /// Bytes that blocks of this process hold on it.
    pub fn reserved(&self) -> usize {
        self.0.reserved.load(Ordering::Relaxed)
    }

    /// Lets blocks of this process hold at most so many bytes: beyond it there is no room, as if
    /// the device were smaller.
    pub fn set_budget(&self, bytes: usize) {
        self.0.budget.store(bytes, Ordering::Relaxed);
    }

    /// Counts bytes that are about to be allocated; what is left of the budget if they do not fit.
    pub(super) fn reserve(&self, bytes: usize) -> std::result::Result<(), usize> {
        let budget = self.0.budget.load(Ordering::Relaxed);
        let fits = |held: usize| held.checked_add(bytes).filter(|all| *all <= budget);
        let done = self.0.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        done.map(|_| ()).map_err(|held| budget.saturating_sub(held))
    }

    pub(super) fn give_back(&self, bytes: usize) {
        self.0.reserved.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.0.multiprocessors
    }

    /// The driver's context, as cudarc's safe interface and other libraries want it.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    /// Lets kernels and copies on this device reach the other's memory.
    ///
    /// # Errors
    /// What the driver says: devices without a link between them.
    pub fn reach(&self, other: &Device) -> Result<()> {
        use cudarc::driver::sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as ALREADY;
        if self == other {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: both contexts are kept by their devices.
        let code =
            unsafe { cudarc::driver::sys::cuCtxEnablePeerAccess(other.context().cu_ctx(), 0) };
        match code {
            ALREADY => Ok(()),
            code => code.result().doing(self.ordinal(), "reaching another device's memory"),
        }
    }

    /// Makes the device current on this thread.
    pub(super) fn bind(&self) -> Result<()> {
        self.0.context.bind_to_thread().doing(self.ordinal(), "binding a thread")
    }

    pub(super) fn functions(&self) -> std::sync::MutexGuard<'_, HashMap<u128, Loaded>> {
        self.0.functions.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Device) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} ({}, {})", self.ordinal(), self.name(), self.arch())
    }
}
