//! The tensor: a shape, a dtype, a placement on the mesh, and where its values are.
//!
//! Invariant: a tensor's elements are contiguous in row-major order. A view is a reshape, or a
//! range of the outermost dim, so no kernel ever asks about strides.

use std::ops::Range;
use std::sync::Arc;

use colossal_comm::Mesh;

use crate::autograd::Edge;
use crate::device::Device;
use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};
use crate::fake::{Account, Pretended};
use crate::params::{Lease, Param};
use crate::placement::{Context, Layout, Placement, Role, Sharding, axis_of};
use crate::saved::Recipe;
use crate::storage::Buffer;
use crate::view::View;

/// Where tensors of one rank live: its mesh, and the map from names to placements.
#[derive(Debug, Clone)]
pub struct Scope(Arc<ScopeInner>);

#[derive(Debug)]
struct ScopeInner {
    mesh: Mesh,
    sharding: Sharding,
    device: Device,
    /// On a pretended mesh: what would be held and sent.
    account: Option<Arc<Account>>,
}

impl Scope {
    /// Tensors on this mesh under this map, on the host.
    pub fn new(mesh: Mesh, sharding: Sharding) -> Scope {
        Scope(Arc::new(ScopeInner { mesh, sharding, device: Device::Cpu, account: None }))
    }

    /// The same with tensors on this device.
    pub fn on(&self, device: &Device) -> Scope {
        let ScopeInner { mesh, sharding, account, .. } = &*self.0;
        let (mesh, sharding) = (mesh.clone(), sharding.clone());
        Scope(Arc::new(ScopeInner {
            mesh,
            sharding,
            device: device.clone(),
            account: account.clone(),
        }))
    }

    /// One device, no parallelism.
    pub fn solo() -> Scope {
        Scope::new(Mesh::solo(), Sharding::default())
    }

    /// A pretended mesh: shapes and layouts are checked, no values exist and nothing is sent.
    pub fn fake(axes: &[(&'static str, usize)], sharding: Sharding) -> Scope {
        let account = Some(Arc::default());
        let (mesh, device) = (Mesh::fake(axes), Device::Cpu);
        Scope(Arc::new(ScopeInner { mesh, sharding, device, account }))
    }

    /// Where its tensors live.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Where its tensors of this type live. Integers stay on the host: they are few, they are
    /// looked at there, and kernels take them from there.
    pub(crate) fn place_of(&self, dtype: Dtype) -> &Device {
        match dtype.is_float() {
            true => &self.0.device,
            false => &Device::Cpu,
        }
    }

    /// Room for so many elements on its device; none on a pretended mesh.
    pub(crate) fn room<T: Element>(&self, len: usize) -> Result<Buffer> {
        Buffer::on(self.device(), if self.is_fake() { 0 } else { len * size_of::<T>() })
    }

    /// The mesh.
    pub fn mesh(&self) -> &Mesh {
        &self.0.mesh
    }

    /// The map from names to placements.
    pub fn sharding(&self) -> &Sharding {
        &self.0.sharding
    }

    /// Is the mesh pretended?
    pub fn is_fake(&self) -> bool {
        self.0.account.is_some()
    }

    /// What a pretended mesh has seen.
    pub(crate) fn account(&self) -> Option<&Arc<Account>> {
        self.0.account.as_ref()
    }

    /// On a pretended mesh: `op` would send so many bytes along `axis` now, and in backward.
    pub(crate) fn sends(&self, op: &'static str, axis: usize, forward: usize, backward: usize) {
        if let Some(account) = &self.0.account {
            account.sends(op, axis, forward, backward);
        }
    }

    /// A batch of which `data` holds this rank's part, laid out as [`Sharding::batch`] says.
    pub fn batch<T: Element>(&self, data: &[T], shape: &[usize]) -> Result<Tensor> {
        Tensor::from_slice(self, data, shape, self.sharding().batch())
    }

    /// A batch `[batch, seq]` of which `data` holds this rank's sequences whole: of their tokens
    /// the part that context parallelism leaves here, as [`Scope::tokens`] says.
    pub fn sequences<T: Element>(&self, data: &[T], batch: usize, seq: usize) -> Result<Tensor> {
        let own = self.tokens(seq)?;
        if own.len() == seq {
            return self.batch(data, &[batch, seq]);
        }
        if data.len() != batch * seq {
            let reason = "one value per token";
            return Err(Error::shape("sequences", &[data.len()], &[batch, seq], reason));
        }
        let part: Vec<T> =
            data.chunks(seq.max(1)).flat_map(|row| own.iter().map(|t| row[*t])).collect();
        self.batch(&part, &[batch, own.len()])
    }

    /// Which tokens of a sequence of this length lie on this rank, in the order they lie in.
    ///
    /// # Errors
    /// [`Error::Divide`] unless the length is a multiple of [`Scope::sequence_multiple`].
    pub fn tokens(&self, seq: usize) -> Result<Vec<usize>> {
        let mut own = self.token_order(seq)?;
        for axis in self.wide_axes() {
            if self.role(axis).is_some_and(|r| r.batch == Placement::Shard(1)) {
                let (coord, (axis, ranks)) = (self.coord(axis), self.axis(axis));
                if !own.len().is_multiple_of(ranks) {
                    let what = "tokens of a sequence".into();
                    return Err(Error::Divide { what, dim: 1, size: seq, axis, ranks });
                }
                let part = own.len() / ranks;
                own = own[coord * part..][..part].to_vec();
            }
        }
        Ok(own)
    }

    /// The tokens of a whole sequence in the order in which its slices hold them: zigzag gives
    /// rank r of p the chunks r and 2p - 1 - r.
    pub(crate) fn token_order(&self, seq: usize) -> Result<Vec<usize>> {
        let (mut ring, mut zigzags) = (1, false);
        for axis in self.wide_axes() {
            if let Some(Context::Ring { zigzag }) = self.role(axis).and_then(|r| r.context) {
                ring *= self.axis(axis).1;
                zigzags |= zigzag;
            }
        }
        if !zigzags {
            return Ok((0..seq).collect());
        }
        if !seq.is_multiple_of(2 * ring) {
            return Err(Error::Divide {
                what: "zigzag chunks of a sequence".into(),
                dim: 1,
                size: seq,
                axis: "ring".into(),
                ranks: 2 * ring,
            });
        }
        let chunk = seq / (2 * ring);
        let order = (0..ring).flat_map(|r| [r, 2 * ring - 1 - r]);
        Ok(order.flat_map(|c| c * chunk..(c + 1) * chunk).collect())
    }

    /// What the length of a sequence must be a multiple of: pad to it.
    pub fn sequence_multiple(&self) -> usize {
        let mut multiple = 1;
        let mut zigzags = false;
        for axis in self.wide_axes() {
            let Some(role) = self.role(axis) else { continue };
            if role.batch == Placement::Shard(1) || role.residual == Placement::Shard(1) {
                multiple *= self.axis(axis).1;
            }
            zigzags |= matches!(role.context, Some(Context::Ring { zigzag: true }));
        }
        if zigzags { 2 * multiple } else { multiple }
    }

    /// Which part of how many equal parts of a global batch is this rank's: one for every way in
    /// which axes cut the batch.
    pub fn batch_part(&self) -> (usize, usize) {
        let (mut part, mut parts) = (0, 1);
        for axis in self.wide_axes() {
            if self.role(axis).is_some_and(|r| r.batch == Placement::Shard(0)) {
                let ranks = self.axis(axis).1;
                (part, parts) = (part * ranks + self.coord(axis), parts * ranks);
            }
        }
        (part, parts)
    }

    pub(crate) fn role(&self, axis: usize) -> Option<&Role> {
        self.sharding().roles().get(axis)
    }

    /// Number of axes of the mesh.
    pub(crate) fn axes(&self) -> usize {
        self.mesh().axes().len()
    }

    /// Name and size of an axis.
    pub(crate) fn axis(&self, index: usize) -> (String, usize) {
        axis_of(self.mesh(), index)
    }

    /// Indices of axes that have more than one rank: on the others all placements are the same.
    pub(crate) fn wide_axes(&self) -> impl Iterator<Item = usize> + '_ {
        self.mesh().axes().iter().enumerate().filter(|(_, (_, n))| *n > 1).map(|(i, _)| i)
    }

    /// This rank's coordinate along an axis; 0 on a pretended mesh.
    pub(crate) fn coord(&self, axis: usize) -> usize {
        if self.is_fake() { 0 } else { self.mesh().coord_at(axis) }
    }
}

/// A sharded, differentiable array. Cloning copies a pointer.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    scope: Scope,
    shape: Vec<usize>,
    dtype: Dtype,
    layout: Layout,
    data: Data,
    edge: Edge,
    /// How backward may compute the values again.
    recipe: Option<Arc<Recipe>>,
}

#[derive(Clone)]
enum Data {
    /// Elements `offset..offset + len` of a buffer.
    Owned(Arc<Buffer>, usize),
    /// Integers on a GPU, below a bound: as `Owned`, but written anew from step to step.
    Numbers(Arc<Buffer>, usize, usize),
    /// Elements from an offset on behind a parameter's handle: reached through a guard, never kept.
    Param(Arc<Param>, usize),
    /// On a pretended mesh: the bytes that views of one tensor share.
    Fake(Arc<Pretended>),
}

/// The values of a tensor for as long as this lives. For a parameter it is the guard.
#[derive(Debug)]
pub struct Values(ValuesInner);

#[derive(Debug)]
enum ValuesInner {
    Owned(Arc<Buffer>, Range<usize>),
    Leased(Lease),
}

impl Values {
    /// The elements, wherever they are. Panics if `T` is not the tensor's type;
    /// [`Tensor::read`] and `Tensor::lend` have checked it.
    pub fn view<T: Element>(&self) -> View<'_, T> {
        match &self.0 {
            ValuesInner::Owned(buffer, bytes) => buffer.view::<u8>().range(bytes.clone()),
            ValuesInner::Leased(lease) => lease.view(),
        }
        .cast()
    }

    /// The elements, on the host: [`Tensor::read`] has copied them there.
    pub fn as_slice<T: Element>(&self) -> &[T] {
        match self.view() {
            View::Cpu(x) => x,
            View::Cuda(stream, _) => panic!("values on {:?} are no slice", stream.device()),
        }
    }
}

impl Tensor {
    /// A tensor whose local part is `data`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `data` has another length than `shape`.
    pub fn from_slice<T: Element>(
        scope: &Scope,
        data: &[T],
        shape: &[usize],
        layout: Layout,
    ) -> Result<Tensor> {
        if scope.is_fake() {
            return Ok(Tensor::pretend(scope, shape, T::DTYPE, layout));
        }
        if data.len() != shape.iter().product::<usize>() {
            return Err(Error::shape("from_slice", &[data.len()], shape, "one value per element"));
        }
        let buffer = Buffer::copy_of(scope.place_of(T::DTYPE), data.into())?;
        Ok(Tensor::wrap(scope, buffer, shape, T::DTYPE, layout))
    }

    /// A tensor on one device.
    ///
    /// ```
    /// use colossal_tensor::Tensor;
    /// let x = Tensor::of(&[1.0f32, 2.0, 3.0, 4.0], &[2, 2])?;
    /// assert_eq!(x.sum()?.item()?, 10.0);
    /// # Ok::<(), colossal_tensor::Error>(())
    /// ```
    pub fn of<T: Element>(data: &[T], shape: &[usize]) -> Result<Tensor> {
        Tensor::from_slice(&Scope::solo(), data, shape, Layout::default())
    }

    pub(crate) fn wrap(
        scope: &Scope,
        buffer: Buffer,
        shape: &[usize],
        dtype: Dtype,
        layout: Layout,
    ) -> Tensor {
        debug_assert_eq!(buffer.bytes(), shape.iter().product::<usize>() * dtype.bytes());
        debug_assert_eq!(buffer.device(), *scope.place_of(dtype));
        Tensor(Arc::new(Inner {
            scope: scope.clone(),
            shape: shape.to_vec(),
            dtype,
            layout,
            data: Data::Owned(Arc::new(buffer), 0),
            edge: Edge::None,
            recipe: None,
        }))
    }

    /// The same of a buffer that may have to move to the scope's device.
    pub(crate) fn place(
        scope: &Scope,
        buffer: Buffer,
        shape: &[usize],
        dtype: Dtype,
        layout: Layout,
    ) -> Result<Tensor> {
        Ok(Tensor::wrap(scope, buffer.to(scope.place_of(dtype))?, shape, dtype, layout))
    }

    /// Integers of `0..below` on the scope's GPU, from `offset` on: see [`crate::Numbers`].
    pub(crate) fn numbers(
        scope: &Scope,
        buffer: &Arc<Buffer>,
        offset: usize,
        shape: &[usize],
        below: usize,
    ) -> Tensor {
        Tensor(Arc::new(Inner {
            scope: scope.clone(),
            shape: shape.to_vec(),
            dtype: Dtype::I32,
            layout: Layout::default(),
            data: Data::Numbers(buffer.clone(), offset, below),
            edge: Edge::None,
            recipe: None,
        }))
    }

    /// The bound of integers that ops must read on the GPU.
    pub(crate) fn below(&self) -> Option<usize> {
        match self.0.data {
            Data::Numbers(_, _, below) => Some(below),
            _ => None,
        }
    }

    /// A tensor of a pretended mesh.
    pub(crate) fn pretend(scope: &Scope, shape: &[usize], dtype: Dtype, layout: Layout) -> Tensor {
        Tensor(Arc::new(Inner {
            scope: scope.clone(),
            shape: shape.to_vec(),
            dtype,
            layout,
            data: Data::Fake(Pretended::new(
                scope,
                shape.iter().product::<usize>() * dtype.bytes(),
            )),
            edge: Edge::None,
            recipe: None,
        }))
    }

    pub(crate) fn of_param(param: &Arc<Param>) -> Tensor {
        let data = match param.scope().is_fake() {
            // Parameters are counted by themselves.
            true => Data::Fake(Pretended::new(param.scope(), 0)),
            false => Data::Param(param.clone(), 0),
        };
        let edge = crate::autograd::leaf(param);
        Tensor(Arc::new(Inner {
            scope: param.scope().clone(),
            shape: param.shape().to_vec(),
            dtype: param.dtype(),
            layout: param.layout(),
            data,
            edge,
            recipe: None,
        }))
    }

    /// The same values under another edge, shape or layout: how ops attach their node.
    pub(crate) fn rewrap(
        &self,
        shape: &[usize],
        layout: Layout,
        offset: usize,
        edge: Edge,
    ) -> Tensor {
        let data = match &self.0.data {
            Data::Owned(buffer, old) => Data::Owned(buffer.clone(), old + offset),
            Data::Numbers(buffer, old, below) => {
                Data::Numbers(buffer.clone(), old + offset, *below)
            }
            Data::Param(param, old) => Data::Param(param.clone(), old + offset),
            Data::Fake(bytes) => Data::Fake(bytes.clone()),
        };
        Tensor(Arc::new(Inner {
            scope: self.0.scope.clone(),
            shape: shape.to_vec(),
            dtype: self.0.dtype,
            layout,
            data,
            edge,
            recipe: None,
        }))
    }

    pub(crate) fn with_edge(self, edge: Edge) -> Tensor {
        match Arc::try_unwrap(self.0) {
            Ok(inner) => Tensor(Arc::new(Inner { edge, ..inner })),
            Err(shared) => {
                let t = Tensor(shared);
                t.rewrap(t.shape(), t.layout(), 0, edge)
            }
        }
    }

    pub(crate) fn recipe(&self) -> Option<&Arc<Recipe>> {
        self.0.recipe.as_ref()
    }

    /// The same tensor, which its only owner says how to compute again.
    pub(crate) fn with_recipe(mut self, recipe: Arc<Recipe>) -> Tensor {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.recipe = Some(recipe);
        }
        self
    }

    /// Other integers laid out as this tensor is, positions beside ids: one per local element, or
    /// one per token of whole sequences, of which context parallelism leaves this rank its part.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of them.
    pub fn same_place(&self, values: &[i32]) -> Result<Tensor> {
        if self.scope().is_fake() {
            return Ok(self.clone());
        }
        if let [batch, _] = *self.shape()
            && values.len() != self.len()
            && batch > 0
            && values.len().is_multiple_of(batch)
        {
            return self.scope().sequences(values, batch, values.len() / batch);
        }
        Tensor::from_slice(self.scope(), values, self.shape(), self.layout())
    }

    /// The shape of this rank's part.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// The shape of the whole tensor.
    pub fn global_shape(&self) -> Vec<usize> {
        let mut shape = self.0.shape.clone();
        for axis in self.scope().wide_axes() {
            if let Placement::Shard(dim) = self.layout()[axis] {
                shape[dim] *= self.scope().axis(axis).1;
            }
        }
        shape
    }

    /// Rows of the whole tensor, those that pad a parameter's vocabulary left out.
    pub(crate) fn real_rows(&self) -> usize {
        match &self.0.data {
            Data::Param(param, _) => param.dims()[0].size(),
            _ => self.global_shape()[0],
        }
    }

    /// Where this rank's part begins in the whole tensor, per dim. Where several axes cut a dim,
    /// the mesh's first is the outermost.
    pub(crate) fn origin(&self) -> Vec<usize> {
        self.origin_under(self.layout())
    }

    /// As `origin`, of a tensor of this local shape under another layout.
    pub(crate) fn origin_under(&self, layout: Layout) -> Vec<usize> {
        let mut part = vec![0; self.0.shape.len()];
        for axis in self.scope().wide_axes() {
            if let Placement::Shard(dim) = layout[axis] {
                part[dim] = part[dim] * self.scope().axis(axis).1 + self.scope().coord(axis);
            }
        }
        part.iter().zip(self.shape()).map(|(part, size)| part * size).collect()
    }

    /// The number of local elements.
    pub fn len(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// Is there no local element?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The size of the last dim; 1 for a scalar.
    pub fn last_dim(&self) -> usize {
        self.0.shape.last().copied().unwrap_or(1)
    }

    /// The number of rows: the product of all dims but the last.
    pub fn rows(&self) -> usize {
        self.len() / self.last_dim().max(1)
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.0.dtype
    }

    /// The placement along each axis of the mesh.
    pub fn layout(&self) -> Layout {
        self.0.layout
    }

    /// The mesh and map it lives under.
    pub fn scope(&self) -> &Scope {
        &self.0.scope
    }

    pub(crate) fn edge(&self) -> &Edge {
        &self.0.edge
    }

    /// Will a backward pass reach this tensor?
    pub fn requires_grad(&self) -> bool {
        !matches!(self.0.edge, Edge::None)
    }

    /// The parameter that this is, whole.
    pub(crate) fn param(&self) -> Option<&Arc<Param>> {
        match &self.0.data {
            Data::Param(param, 0) if param.len() == self.len() => Some(param),
            _ => None,
        }
    }

    /// The same values, cut off from the graph.
    pub fn detach(&self) -> Tensor {
        if self.requires_grad() {
            self.rewrap(self.shape(), self.layout(), 0, Edge::None)
        } else {
            self.clone()
        }
    }

    /// The local values on the host, checked to be of type `T`: copied if they are on a GPU.
    ///
    /// # Errors
    /// [`Error::Dtype`] for another type, [`Error::Fake`] on a pretended mesh.
    pub fn read<T: Element>(&self) -> Result<Values> {
        let values = self.lend::<T>()?;
        match values.view::<T>() {
            View::Cpu(_) => Ok(values),
            elsewhere => {
                let copy = Arc::new(Buffer::copy_of(&Device::Cpu, elsewhere)?);
                let bytes = 0..copy.bytes();
                Ok(Values(ValuesInner::Owned(copy, bytes)))
            }
        }
    }

    /// The local values where they are, checked to be of type `T`.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub(crate) fn lend<T: Element>(&self) -> Result<Values> {
        if T::DTYPE != self.dtype() {
            return Err(Error::Dtype { op: "read", left: self.dtype(), right: T::DTYPE });
        }
        Ok(Values(match &self.0.data {
            Data::Owned(buffer, offset) | Data::Numbers(buffer, offset, _) => {
                let size = self.dtype().bytes();
                let range = offset * size..(offset + self.len()) * size;
                ValuesInner::Owned(buffer.clone(), range)
            }
            Data::Param(param, offset) => {
                let size = self.dtype().bytes();
                let range = offset * size..(offset + self.len()) * size;
                ValuesInner::Leased(param.lease()?.narrow(range))
            }
            Data::Fake(_) => return Err(Error::Fake("read")),
        }))
    }

    /// The local values as a vector of `f32`, whatever the float type.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.len()];
        crate::dtype::float!("to_vec", self.dtype(), T => {
            colossal_kernels::cast(self.read::<T>()?.as_slice::<T>(), &mut out);
            Ok(out)
        })
    }

    /// The local values as a vector of their own type.
    pub fn to_vec_of<T: Element>(&self) -> Result<Vec<T>> {
        Ok(self.read::<T>()?.as_slice().to_vec())
    }

    /// The value of a tensor of one element.
    pub fn item(&self) -> Result<f32> {
        match self.to_vec()?[..] {
            [x] => Ok(x),
            _ => Err(Error::shape("item", self.shape(), &[], "exactly one element")),
        }
    }

    /// This tensor's buffer for writing in place, if nothing else can see it.
    pub(crate) fn into_unique(self) -> std::result::Result<Buffer, Tensor> {
        let whole = match &self.0.data {
            Data::Owned(buffer, 0) => buffer.bytes() == self.len() * self.dtype().bytes(),
            _ => false,
        };
        if !whole {
            return Err(self);
        }
        match Arc::try_unwrap(self.0) {
            Ok(inner) => {
                let Data::Owned(buffer, _) = &inner.data else { unreachable!("checked above") };
                if Arc::strong_count(buffer) > 1 {
                    return Err(Tensor(Arc::new(inner)));
                }
                let Inner { data: Data::Owned(buffer, _), .. } = inner else {
                    unreachable!("checked above")
                };
                Arc::try_unwrap(buffer).map_err(|_| unreachable!("the only owner was just counted"))
            }
            Err(shared) => Err(Tensor(shared)),
        }
    }

    /// A copy of the values in a buffer of its own, or the buffer itself if nothing else sees it.
    pub(crate) fn into_buffer(self) -> Result<Buffer> {
        let dtype = self.dtype();
        match self.into_unique() {
            Ok(buffer) => Ok(buffer),
            Err(shared) => crate::dtype::any!(dtype, T => {
                Buffer::copy_of(shared.scope().place_of(dtype), shared.lend::<T>()?.view::<T>())
            }),
        }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({} {:?}", self.dtype(), self.shape())?;
        for axis in 0..self.scope().axes() {
            write!(f, " {}:{}", self.scope().axis(axis).0, self.layout()[axis])?;
        }
        write!(f, ")")
    }
}
