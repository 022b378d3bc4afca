//! Parameters: named, seeded, built already sharded, and reached only through a guard.
//!
//! A [`Param`] is a handle. Its payload lives in a [`Store`], which may gather it, move it or
//! refuse it; [`Param::lease`] borrows it, and while the [`Lease`] lives the payload stays put
//! (PatrickStar's `Compute`; dropping it is `Hold`). No op keeps a payload: backward closures
//! keep the handle and borrow again.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use colossal_kernels::Int8Matrix;
use parking_lot::{Mutex, RwLock};

use crate::dtype::{Dtype, Element, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::ops::Fp8Recipe;
use crate::placement::{Dim, Layout, Placement};
use crate::random;
use crate::storage::Buffer;
use crate::tensor::{Scope, Tensor};
use crate::view::{View, ViewMut};

/// Identity of a parameter within the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(u64);

/// A named parameter of a model: this rank's part of it.
#[derive(Debug)]
pub struct Param {
    id: ParamId,
    name: String,
    scope: Scope,
    dims: Vec<Dim>,
    shape: Vec<usize>,
    layout: Layout,
    dtype: Dtype,
    init: Init,
    trainable: AtomicBool,
    payload: RwLock<(Arc<dyn Store>, Range<usize>)>,
    /// Does a linear layer multiply by it?
    factor: AtomicBool,
    /// Is it read otherwise too, as a tied table is?
    shared: AtomicBool,
    int8: OnceLock<Int8Matrix>,
    fp8: RwLock<Option<Fp8Recipe>>,
}

impl Param {
    /// Its identity.
    pub fn id(&self) -> ParamId {
        self.id
    }

    /// Its full name, as `model.layers.0.mlp.up_proj.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape of this rank's part.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The shape of the whole parameter.
    pub fn global_shape(&self) -> Vec<usize> {
        self.dims.iter().map(|d| d.size()).collect()
    }

    /// Number of local elements that do not pad a vocabulary: the first ones.
    pub fn real_len(&self) -> usize {
        self.local_ranges().iter().map(Range::len).product()
    }

    /// Its named dims.
    pub fn dims(&self) -> &[Dim] {
        &self.dims
    }

    /// Number of local elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Has it no local element?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its placement.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The mesh it lives on.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Does it get gradients?
    pub fn is_trainable(&self) -> bool {
        self.trainable.load(Ordering::Relaxed)
    }

    /// Freezes or thaws it.
    pub fn set_trainable(&self, on: bool) {
        self.trainable.store(on, Ordering::Relaxed);
    }

    /// The parameter as a tensor: a leaf of the graph that holds this handle, not the payload.
    pub fn tensor(self: &Arc<Self>) -> Tensor {
        Tensor::of_param(self)
    }

    /// Borrows the payload.
    pub fn lease(&self) -> Result<Lease> {
        let (store, bytes) = self.payload.read().clone();
        store.lease(bytes).map_err(|reason| Error::Param { name: self.name.clone(), reason })
    }

    /// Moves the payload to bytes `at` of another store, which must hold the same values.
    pub fn rebind(&self, store: Arc<dyn Store>, at: Range<usize>) {
        debug_assert_eq!(at.len(), self.len() * self.dtype.bytes());
        *self.payload.write() = (store, at);
    }

    /// Draws the local part anew, as the parameter starts in a model of this seed.
    pub fn draw(&self, seed: u64) -> Result<()> {
        self.set(&initial(self, seed, self.init))
    }

    /// Overwrites the local part with `values`, converted to the parameter's dtype. What pads a
    /// vocabulary may be left out and is zero.
    pub fn set(&self, values: &[f32]) -> Result<()> {
        if values.len() < self.len() && values.len() == self.real_len() {
            let mut padded = values.to_vec();
            padded.resize(self.len(), 0.0);
            return self.set(&padded);
        }
        if values.len() != self.len() {
            return Err(Error::shape("set", &[values.len()], &self.shape, "one value per element"));
        }
        let (store, bytes) = self.payload.read().clone();
        let mut written = Ok(());
        let mut write = |out: ViewMut<'_, u8>| {
            written = float!("set", self.dtype, T => kernels::cast(values.into(), out.cast::<T>()));
        };
        store
            .update(bytes, &mut write)
            .map_err(|reason| Error::Param { name: self.name.clone(), reason })?;
        written
    }

    /// Says that a layer multiplies by it; `alone`: that nothing else reads its values.
    pub(crate) fn used_as_factor(&self, alone: bool) {
        self.factor.store(true, Ordering::Relaxed);
        if !alone {
            self.shared.store(true, Ordering::Relaxed);
        }
    }

    /// Rounds the matrix of a linear layer to int8 and frees its values; those of a tied table
    /// stay. Does nothing to other parameters (routers and scores, whose output is
    /// [`Dim::Other`], among them), nor a second time. Only inference can follow.
    ///
    /// # Errors
    /// [`Error::Param`] when the values cannot be read.
    pub fn quantize_int8(&self) -> Result<()> {
        let [n, k] = self.shape[..] else { return Ok(()) };
        let small = matches!(self.dims[0], Dim::Other(_));
        if small || !self.factor.load(Ordering::Relaxed) || self.int8.get().is_some() {
            return Ok(());
        }
        let matrix = float!("quantize_int8", self.dtype, T => {
            Ok(Int8Matrix::quantize(&self.values::<T>()?, n, k))
        })?;
        self.set_trainable(false);
        // Two who come at once have rounded the same.
        let _ = self.int8.set(matrix);
        if !self.shared.load(Ordering::Relaxed) {
            self.rebind(Arc::new(Rounded), 0..self.len() * self.dtype.bytes());
        }
        Ok(())
    }

    /// The matrix in int8, if it was rounded.
    pub fn int8(&self) -> Option<&Int8Matrix> {
        self.int8.get()
    }

    /// Has the matrix of a linear layer, or those of experts, multiplied in fp8 from here on, forward and backward, or no
    /// longer. Its values stay as they are. Does nothing to other parameters: tables and heads
    /// ([`Dim::Vocab`]), routers and scores ([`Dim::Other`]) are not rounded.
    pub fn set_fp8(&self, recipe: Option<Fp8Recipe>) {
        let inner = |d: &Dim| !matches!(d, Dim::Vocab(_) | Dim::Other(_));
        if self.factor.load(Ordering::Relaxed) && self.dims.iter().all(inner) {
            *self.fp8.write() = recipe;
        }
    }

    /// How it is rounded for products in fp8, if it is.
    pub fn fp8(&self) -> Option<Fp8Recipe> {
        *self.fp8.read()
    }

    /// The local part in f32.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let lease = self.lease()?;
        let mut out = vec![0.0; self.len()];
        match lease.view() {
            View::Cpu(bytes) => float!("to_vec", self.dtype, T => {
                colossal_kernels::cast(bytemuck::cast_slice::<u8, T>(bytes), &mut out);
                Ok(out)
            }),
            View::Cuda(..) => float!("to_vec", self.dtype, T => {
                colossal_kernels::cast(&self.values::<T>()?, &mut out);
                Ok(out)
            }),
        }
    }

    /// The local part as it is held, copied to the host.
    pub fn values<T: Element>(&self) -> Result<Vec<T>> {
        let lease = self.lease()?;
        let mut out = vec![T::zeroed(); self.len()];
        lease.view().cast().read(&mut out)?;
        Ok(out)
    }

    /// Cuts this rank's part out of the whole parameter (row-major, global shape); padding is zero.
    pub fn shard_of<T: Element>(&self, whole: &[T]) -> Vec<T> {
        let mut out = Vec::with_capacity(self.len());
        self.for_each_run(|start, len| out.extend_from_slice(&whole[start..start + len]));
        out.resize(self.len(), T::zeroed());
        out
    }

    /// Calls `f(global_start, len)` for each contiguous run of the local part, in local order,
    /// without padding, which is at its end.
    pub fn for_each_run(&self, mut f: impl FnMut(usize, usize)) {
        let ranges = self.local_ranges();
        let global = self.global_shape();
        let Some((last, outer)) = ranges.split_last() else {
            return f(0, 1);
        };
        let run = last.len();
        let mut index: Vec<usize> = outer.iter().map(|r| r.start).collect();
        if ranges.iter().any(|r| r.is_empty()) {
            return;
        }
        loop {
            let row = index.iter().zip(&global).fold(0, |acc, (i, n)| acc * n + i);
            f(row * global[global.len() - 1] + last.start, run);
            let mut dim = index.len();
            loop {
                if dim == 0 {
                    return;
                }
                dim -= 1;
                index[dim] += 1;
                if index[dim] < outer[dim].end {
                    break;
                }
                index[dim] = outer[dim].start;
            }
        }
    }

    /// This rank's range of every global dim, without padding.
    pub fn local_ranges(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = self.shape.iter().map(|n| 0..*n).collect();
        for axis in self.scope.wide_axes() {
            if let Placement::Shard(dim) = self.layout[axis] {
                ranges[dim].end *= self.scope.axis(axis).1;
            }
        }
        for axis in self.scope.wide_axes() {
            if let Placement::Shard(dim) = self.layout[axis] {
                let part = ranges[dim].len() / self.scope.axis(axis).1;
                let start = ranges[dim].start + part * self.scope.coord(axis);
                ranges[dim] = start..start + part;
            }
        }
        for (range, dim) in ranges.iter_mut().zip(&self.dims) {
            *range = range.start.min(dim.size())..range.end.min(dim.size());
        }
        ranges
    }
}

/// Where parameters' payloads live.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// Borrows these bytes. They stay where they are until the lease is dropped.
    fn lease(self: Arc<Self>, bytes: Range<usize>) -> Result<Lease, String>;

    /// Lends these bytes for writing. Fails while any of them is leased.
    fn update(
        &self,
        bytes: Range<usize>,
        write: &mut dyn FnMut(ViewMut<'_, u8>),
    ) -> Result<(), String>;
}

/// A borrowed payload.
pub struct Lease {
    hold: Box<dyn Held>,
    bytes: Range<usize>,
}

/// What keeps a payload in place.
pub trait Held: Send {
    /// The bytes that are held, of which a lease shows a range.
    fn held(&self) -> View<'_, u8>;
}

impl Lease {
    /// A lease on `bytes` of what `hold` keeps in place.
    pub fn new(hold: impl Held + 'static, bytes: Range<usize>) -> Lease {
        Lease { hold: Box::new(hold), bytes }
    }

    /// A part of the payload, relative to its start.
    pub(crate) fn narrow(self, range: Range<usize>) -> Lease {
        let start = self.bytes.start + range.start;
        Lease { bytes: start..start + range.len(), hold: self.hold }
    }

    /// The payload, where it is.
    pub fn view(&self) -> View<'_, u8> {
        self.hold.held().range(self.bytes.clone())
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").field("bytes", &self.bytes).finish()
    }
}

/// The plain store: one resident buffer, often of all parameters of a model.
#[derive(Debug)]
pub struct Flat(Arc<RwLock<Buffer>>);

type ReadGuard = parking_lot::ArcRwLockReadGuard<parking_lot::RawRwLock, Buffer>;

struct HeldFlat(ReadGuard);

// SAFETY: parking_lot's guard is only `!Send` because of deadlock-detection builds; the lock is
// released by value and may be released on any thread. We do not enable deadlock detection.
unsafe impl Send for HeldFlat {}

impl Held for HeldFlat {
    fn held(&self) -> View<'_, u8> {
        self.0.view()
    }
}

impl Flat {
    /// Keeps `buffer` resident.
    pub fn new(buffer: Buffer) -> Arc<Flat> {
        Arc::new(Flat(Arc::new(RwLock::new(buffer))))
    }

    /// Lends the whole buffer for writing: how an optimizer updates all parameters at once.
    ///
    /// # Errors
    /// When a parameter is still leased, for instance by a tensor of a graph in use.
    pub fn write<R>(&self, f: impl FnOnce(&mut Buffer) -> R) -> Result<R> {
        let mut guard = self.0.try_write().ok_or_else(|| Error::Param {
            name: "(flat)".into(),
            reason: "its payload is in use; drop the values read from it first".into(),
        })?;
        Ok(f(&mut guard))
    }

    /// Lends the whole buffer for reading.
    pub fn read<R>(&self, f: impl FnOnce(&Buffer) -> R) -> R {
        f(&self.0.read())
    }
}

impl Store for Flat {
    fn lease(self: Arc<Self>, bytes: Range<usize>) -> Result<Lease, String> {
        Ok(Lease::new(HeldFlat(RwLock::read_arc(&self.0)), bytes))
    }

    fn update(
        &self,
        bytes: Range<usize>,
        write: &mut dyn FnMut(ViewMut<'_, u8>),
    ) -> Result<(), String> {
        let mut guard = self
            .0
            .try_write()
            .ok_or("its payload is in use; drop the values read from it first")?;
        write(guard.view_mut().range(bytes));
        Ok(())
    }
}

/// Where a matrix was that is now held in int8.
#[derive(Debug)]
struct Rounded;

const ROUNDED: &str = "is held in int8, for products in inference only; load the model without \
                       rounding it to train, save or shard it";

impl Store for Rounded {
    fn lease(self: Arc<Self>, _: Range<usize>) -> Result<Lease, String> {
        Err(ROUNDED.into())
    }

    fn update(&self, _: Range<usize>, _: &mut dyn FnMut(ViewMut<'_, u8>)) -> Result<(), String> {
        Err(ROUNDED.into())
    }
}

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// The same value everywhere.
    Constant(f32),
}

/// Builds the parameters of a model: a name prefix, a seed, a dtype, and the list of all made.
///
/// Values depend on the seed, the name and the position in the *whole* parameter, so a model
/// starts from the same weights under every plan.
#[derive(Debug, Clone)]
pub struct Params {
    scope: Scope,
    seed: u64,
    dtype: Dtype,
    drawn: bool,
    prefix: String,
    made: Arc<Mutex<Vec<Arc<Param>>>>,
}

impl Params {
    /// Parameters on this scope, drawn from this seed, held in this dtype.
    pub fn new(scope: &Scope, seed: u64, dtype: Dtype) -> Params {
        let (scope, prefix, made) = (scope.clone(), String::new(), Arc::default());
        Params { scope, seed, dtype, drawn: true, prefix, made }
    }

    /// The same without values, for weights that are read from elsewhere: [`Param::set`] each.
    pub fn blank(scope: &Scope, seed: u64, dtype: Dtype) -> Params {
        Params { drawn: false, ..Params::new(scope, seed, dtype) }
    }

    /// The same builder for parameters held in another dtype.
    pub fn held_in(&self, dtype: Dtype) -> Params {
        Params { dtype, ..self.clone() }
    }

    /// The same builder below a name: `at("layers").at(3)` names `layers.3.…`.
    pub fn at(&self, name: impl std::fmt::Display) -> Params {
        let prefix = match self.prefix.as_str() {
            "" => name.to_string(),
            prefix => format!("{prefix}.{name}"),
        };
        Params { prefix, ..self.clone() }
    }

    /// The scope parameters are built on.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The dtype parameters are held in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// All parameters made so far, in order.
    pub fn all(&self) -> Vec<Arc<Param>> {
        self.made.lock().clone()
    }

    /// The parameter that was made under this full name: how a head is tied to an embedding.
    ///
    /// # Errors
    /// [`Error::Param`] when there is none, for instance because another stage holds it.
    pub fn get(&self, full_name: &str) -> Result<Arc<Param>> {
        self.made.lock().iter().find(|p| p.name == full_name).cloned().ok_or_else(|| Error::Param {
            name: full_name.into(),
            reason: "is tied to but was not built; build the layer that owns it first".into(),
        })
    }

    /// Makes the parameter `name` with these dims: only this rank's part of it exists.
    ///
    /// # Errors
    /// [`Error::Divide`] if a sharded dim does not divide; [`Error::Param`] if the name is taken.
    pub fn tensor(&self, name: &str, dims: &[Dim], init: Init) -> Result<Arc<Param>> {
        let name = self.at(name).prefix;
        let (layout, shape) = self.scope.sharding().parameter(&name, self.scope.mesh(), dims)?;
        if self.made.lock().iter().any(|p| p.name == name) {
            return Err(Error::Param { name, reason: "made twice; give each its own name".into() });
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let len: usize = if self.scope.is_fake() { 0 } else { shape.iter().product() };
        let flat = Flat::new(Buffer::on(self.scope.device(), len * self.dtype.bytes())?);
        let param = Arc::new(Param {
            id: ParamId(NEXT.fetch_add(1, Ordering::Relaxed)),
            name,
            scope: self.scope.clone(),
            dims: dims.to_vec(),
            shape,
            layout,
            dtype: self.dtype,
            init,
            trainable: AtomicBool::new(true),
            payload: RwLock::new((flat, 0..len * self.dtype.bytes())),
            factor: AtomicBool::new(false),
            shared: AtomicBool::new(false),
            int8: OnceLock::new(),
            fp8: RwLock::new(None),
        });
        if self.drawn && !self.scope.is_fake() {
            param.draw(self.seed)?;
        }
        self.made.lock().push(param.clone());
        Ok(param)
    }
}

fn initial(param: &Param, seed: u64, init: Init) -> Vec<f32> {
    match init {
        Init::Constant(x) => vec![x; param.real_len()],
        Init::Normal(std) => {
            let stream = random::Stream::named(seed, param.name());
            let mut values = Vec::with_capacity(param.len());
            param.for_each_run(|start, len| {
                values.extend((start..start + len).map(|i| std * stream.normal(i as u64)));
            });
            values
        }
    }
}
