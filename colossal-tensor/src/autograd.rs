//! Reverse-mode differentiation in which backward consumes.
//!
//! A node owns what its op saved inside an `FnOnce`; running it frees those activations as the
//! pass goes by. Nodes are numbered as they are made, so the highest number that has a gradient
//! is always complete: no sort, no counts, no zero-filled sums. The gradient of a parameter is
//! accumulated in place, in f32, where a [`GradSink`] says, and handed on the moment its last use
//! has been passed. Weight gradients can be put off ([`Deferred`]: zero-bubble pipelines), and wait for an
//! operand that backward of the op before makes again on its way ([`crate::saved`]).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::device::Device;
use crate::dtype::{Dtype, float};
use crate::error::{Error, Result};
use crate::kernels;
use crate::params::{Param, ParamId};
use crate::placement::Layout;
use crate::saved::{Recipe, Saved};
use crate::storage::Buffer;
use crate::tensor::{Scope, Tensor};
use crate::view::ViewMut;

/// What a tensor's gradient flows into.
#[derive(Clone)]
pub(crate) enum Edge {
    None,
    Node(Arc<Node>),
    Leaf(Arc<Param>),
}

impl Edge {
    /// The number of the op.
    pub(crate) fn op(&self) -> Option<u64> {
        match self {
            Edge::Node(node) => Some(node.id),
            _ => None,
        }
    }
}

/// One recorded op.
pub(crate) struct Node {
    id: u64,
    op: &'static str,
    inputs: Vec<Edge>,
    backward: Mutex<Option<BackwardFn>>,
}

type BackwardFn = Box<dyn FnOnce(Tensor, &mut Backward<'_>) -> Result<()> + Send>;

impl Node {
    /// Parameters used inside (a leaf edge per use).
    fn leaves(&self) -> impl Iterator<Item = &Arc<Param>> {
        self.inputs.iter().filter_map(|e| match e {
            Edge::Leaf(p) => Some(p),
            _ => None,
        })
    }
}

thread_local! {
    static GRAD: Cell<bool> = const { Cell::new(true) };
    /// While a layer runs to be recomputed later: the parameters it used.
    static USED: RefCell<Option<Vec<Arc<Param>>>> = const { RefCell::new(None) };
}

/// Runs `f` without recording a graph.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    with_grad(false, f)
}

pub(crate) fn with_grad<R>(on: bool, f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            GRAD.set(self.0);
        }
    }
    let _restore = Restore(GRAD.replace(on));
    f()
}

/// Are ops being recorded on this thread?
pub fn is_grad_enabled() -> bool {
    GRAD.get()
}

pub(crate) fn leaf(param: &Arc<Param>) -> Edge {
    USED.with_borrow_mut(|used| {
        if let Some(used) = used
            && !used.iter().any(|p| p.id() == param.id())
        {
            used.push(param.clone());
        }
    });
    if is_grad_enabled() && param.is_trainable() { Edge::Leaf(param.clone()) } else { Edge::None }
}

/// Runs `f` without a graph and returns the trainable parameters that it used.
pub(crate) fn record_used<R>(f: impl FnOnce() -> R) -> (R, Vec<Arc<Param>>) {
    let outer = USED.replace(Some(Vec::new()));
    let result = no_grad(f);
    let mut used = USED.replace(outer).unwrap_or_default();
    used.retain(|p| p.is_trainable());
    (result, used)
}

/// Attaches a node to `output` if any input needs a gradient.
///
/// `backward` receives the gradient of `output` and gives each input its own.
pub(crate) fn record(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    backward: impl FnOnce(Tensor, &mut Backward<'_>) -> Result<()> + Send + 'static,
) -> Tensor {
    if !is_grad_enabled() || !inputs.iter().any(|t| t.requires_grad()) {
        return output;
    }
    let edges = inputs.iter().map(|t| t.edge().clone()).collect();
    record_edges(op, output, edges, backward)
}

pub(crate) fn record_edges(
    op: &'static str,
    output: Tensor,
    inputs: Vec<Edge>,
    backward: impl FnOnce(Tensor, &mut Backward<'_>) -> Result<()> + Send + 'static,
) -> Tensor {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let backward: BackwardFn = Box::new(backward);
    let node = Node { id, op, inputs, backward: Mutex::new(Some(backward)) };
    output.with_edge(Edge::Node(Arc::new(node)))
}

/// On a pretended mesh: `output` of an op that would save these tensors.
pub(crate) fn pretended(
    op: &'static str,
    output: Tensor,
    inputs: &[&Tensor],
    saved: &[&Tensor],
) -> Tensor {
    let saved: Vec<Tensor> = saved.iter().map(|t| t.detach()).collect();
    record(op, output, inputs, move |_, _| {
        drop(saved);
        Err(Error::Fake("backward"))
    })
}

/// Where gradients of parameters go.
pub trait GradSink {
    /// Lends the accumulator of `param` (its local length) to `add`, which adds to it.
    fn accumulate(
        &mut self,
        param: &Arc<Param>,
        add: &mut dyn FnMut(Accumulator<'_>),
    ) -> Result<()>;

    /// Takes `sum`, the first that is added to `param`, over as its accumulator, or gives it back to be
    /// added.
    fn adopt(&mut self, param: &Arc<Param>, sum: Buffer) -> Result<Option<Buffer>> {
        let _ = param;
        Ok(Some(sum))
    }

    /// Every use of `param` in this backward pass has been added: its gradient may be sent.
    fn complete(&mut self, param: &Arc<Param>) -> Result<()> {
        let _ = param;
        Ok(())
    }
}

/// The f32 sum that a gradient is added to.
#[derive(Debug)]
pub struct Accumulator<'a> {
    /// The sum so far, on the device of the parameter.
    pub sum: ViewMut<'a, f32>,
    /// Nothing was added yet: `sum` holds anything and counts as zeros.
    pub fresh: bool,
}

impl<'a> Accumulator<'a> {
    /// The sum, to be added to.
    pub fn zeroed(self) -> Result<ViewMut<'a, f32>> {
        let Accumulator { mut sum, fresh } = self;
        match (&mut sum, fresh) {
            (_, false) => {}
            (ViewMut::Cpu(sum), _) => colossal_kernels::fill(sum, 0.0),
            (sum, _) => sum.reborrow().zero()?,
        }
        Ok(sum)
    }
}

/// Gradients by parameter: the sink that simply keeps them.
#[derive(Debug, Default)]
pub struct Grads {
    by_id: HashMap<ParamId, Buffer>,
    completed: Vec<String>,
}

impl Grads {
    /// The gradient of a parameter in f32, local part; `None` if the loss does not depend on it.
    pub fn get(&self, param: &Param) -> Option<&[f32]> {
        self.by_id.get(&param.id()).map(Buffer::as_slice)
    }

    /// Moves all of them to the host.
    fn into_host(mut self) -> Result<Grads> {
        for grad in self.by_id.values_mut() {
            if grad.device() != Device::Cpu {
                *grad = Buffer::copy_of::<u8>(&Device::Cpu, grad.view())?;
            }
        }
        Ok(self)
    }

    /// Names of parameters in the order in which their gradients became complete.
    pub fn completed(&self) -> &[String] {
        &self.completed
    }
}

impl GradSink for Grads {
    fn accumulate(
        &mut self,
        param: &Arc<Param>,
        add: &mut dyn FnMut(Accumulator<'_>),
    ) -> Result<()> {
        let fresh = !self.by_id.contains_key(&param.id());
        if fresh {
            let buffer = Buffer::on(param.scope().device(), param.len() * size_of::<f32>())?;
            self.by_id.insert(param.id(), buffer);
        }
        if let Some(grad) = self.by_id.get_mut(&param.id()) {
            add(Accumulator { sum: grad.view_mut(), fresh });
        }
        Ok(())
    }

    fn complete(&mut self, param: &Arc<Param>) -> Result<()> {
        self.completed.push(param.name().to_string());
        Ok(())
    }
}

/// Weight gradients that were put off: run them when there is nothing better to do.
#[derive(Default)]
pub struct Deferred(Vec<Job>);

type Accumulate = Box<dyn FnOnce(Accumulator<'_>) -> Result<()> + Send>;

struct Job {
    param: Arc<Param>,
    last: bool,
    add: Accumulate,
}

impl Deferred {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Does none wait?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Computes them all into `sink`.
    pub fn run(&mut self, sink: &mut dyn GradSink) -> Result<()> {
        for job in self.0.drain(..) {
            deposit(sink, &job.param, job.add)?;
            if job.last {
                sink.complete(&job.param)?;
            }
        }
        Ok(())
    }
}

/// Lends the accumulator of `param` to `add`, once.
fn deposit(
    sink: &mut dyn GradSink,
    param: &Arc<Param>,
    add: impl FnOnce(Accumulator<'_>) -> Result<()>,
) -> Result<()> {
    let (mut add, mut result) = (Some(add), Ok(()));
    sink.accumulate(param, &mut |acc| {
        if let Some(add) = add.take() {
            result = add(acc);
        }
    })?;
    result
}

impl std::fmt::Debug for Deferred {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Deferred").field(&self.len()).finish()
    }
}

/// A backward pass under way: what a node's closure gives its gradients to.
pub(crate) struct Backward<'a> {
    sink: &'a mut dyn GradSink,
    deferred: Option<&'a mut Deferred>,
    pending: BTreeMap<u64, (Arc<Node>, Tensor)>,
    uses: HashMap<ParamId, usize>,
    inputs: Vec<Edge>,
    /// Gradients of weights that wait for an operand which backward of an op makes.
    waiting: Vec<(Arc<Recipe>, Job)>,
    /// The operand that the op under way shall make.
    awaited: Option<Arc<Recipe>>,
}

impl Backward<'_> {
    /// Does input `i` want a gradient?
    pub(crate) fn wants(&self, i: usize) -> bool {
        !matches!(self.inputs[i], Edge::None)
    }

    /// Gives input `i` its gradient.
    pub(crate) fn give(&mut self, i: usize, grad: Tensor) -> Result<()> {
        match &self.inputs[i] {
            Edge::None => Ok(()),
            Edge::Node(node) => {
                let node = node.clone();
                let sum = match self.pending.remove(&node.id) {
                    Some((_, old)) => old.add_consuming(grad)?,
                    None => grad,
                };
                self.pending.insert(node.id, (node, sum));
                Ok(())
            }
            Edge::Leaf(param) => {
                let param = param.clone();
                float!("backward", grad.dtype(), T => {
                    let values = grad.lend::<T>()?;
                    deposit(self.sink, &param, |acc| {
                        kernels::add_into(values.view::<T>(), acc.zeroed()?)
                    })
                })
            }
        }
    }

    /// Where an op puts the gradient of input `i`, in the shape of `like`, to [give](Backward::give) it: with
    /// `true` adding it to what the input was given before, if nobody else sees that.
    pub(crate) fn room(&mut self, i: usize, like: &Like) -> Result<(Buffer, bool)> {
        let given = self.inputs[i].op().and_then(|id| Some((id, self.pending.remove(&id)?)));
        if let Some((id, (node, sum))) = given {
            let fits = sum.dtype() == like.dtype && sum.layout() == like.layout.dual();
            let sum = match if fits { sum.into_unique() } else { Err(sum) } {
                Ok(buffer) => return Ok((buffer, true)),
                Err(sum) => sum,
            };
            self.pending.insert(id, (node, sum));
        }
        let bytes = like.shape.iter().product::<usize>() * like.dtype.bytes();
        Ok((Buffer::on(like.scope.place_of(like.dtype), bytes)?, false))
    }

    /// Input `i` is a weight: `add` adds its gradient to an f32 sum, now or later.
    pub(crate) fn weight(
        &mut self,
        i: usize,
        like: &Like,
        add: impl FnOnce(ViewMut<'_, f32>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.weight_fresh(i, like, |acc| add(acc.zeroed()?))
    }

    /// As [`Backward::weight`], for an `add` that can overwrite what is fresh.
    pub(crate) fn weight_fresh(
        &mut self,
        i: usize,
        like: &Like,
        add: impl FnOnce(Accumulator<'_>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        match self.inputs[i].clone() {
            Edge::None => Ok(()),
            Edge::Leaf(param) => match &mut self.deferred {
                Some(queue) => {
                    queue.0.push(Job { param, last: false, add: Box::new(add) });
                    Ok(())
                }
                None => deposit(self.sink, &param, add),
            },
            Edge::Node(_) => {
                let mut grad = like.scope.room::<f32>(like.shape.iter().product())?;
                add(Accumulator { sum: grad.view_mut(), fresh: true })?;
                let grad =
                    Tensor::wrap(&like.scope, grad, &like.shape, Dtype::F32, like.layout.dual());
                self.give(i, crate::no_grad(|| grad.to_dtype(like.dtype))?)
            }
        }
    }

    /// As [`Backward::weight_fresh`], of the operand `x` that the op kept: where backward of the op before,
    /// whose result is input 0, makes it on its way, `add` runs after that.
    pub(crate) fn weight_of(
        &mut self,
        i: usize,
        like: &Like,
        x: Saved,
        add: impl FnOnce(&Tensor, Accumulator<'_>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let before = self.inputs[0].op();
        let recipe = x.recipe().filter(|recipe| Some(recipe.op()) == before).cloned();
        let add = move |acc: Accumulator<'_>| add(&x.get()?, acc);
        match (recipe, &self.inputs[i]) {
            (Some(recipe), Edge::Leaf(param)) => {
                let job = Job { param: param.clone(), last: false, add: Box::new(add) };
                self.waiting.push((recipe, job));
                Ok(())
            }
            _ => self.weight_fresh(i, like, add),
        }
    }

    /// This op's result once more, for those whose weights' gradients wait for it.
    pub(crate) fn remake(&mut self, make: impl FnOnce() -> Tensor) {
        if let Some(recipe) = self.awaited.take() {
            recipe.fill(make());
        }
    }

    /// Takes the jobs that wait for the result of an op, which is about to make it.
    fn await_op(&mut self, id: u64) -> Vec<Job> {
        let waits = |(recipe, _): &mut (Arc<Recipe>, Job)| recipe.op() == id;
        let (recipes, jobs): (Vec<_>, _) = self.waiting.extract_if(.., waits).unzip();
        self.awaited = recipes.into_iter().next();
        if let Some(recipe) = &self.awaited {
            recipe.wait();
        }
        jobs
    }

    /// A weight's gradient, now or later.
    fn start(&mut self, job: Job) -> Result<()> {
        match &mut self.deferred {
            Some(queue) => queue.0.push(job),
            None => {
                deposit(self.sink, &job.param, job.add)?;
                if job.last {
                    self.sink.complete(&job.param)?;
                }
            }
        }
        Ok(())
    }

    /// The job that will be the last to add to the gradient of a parameter: of those that wait for an op, the
    /// one whose op is the oldest.
    fn last_job(&mut self, param: &Param) -> Option<&mut Job> {
        let of = |job: &Job| job.param.id() == param.id();
        let waiting = self.waiting.iter_mut().rev().filter(|(_, job)| of(job));
        match waiting.min_by_key(|(recipe, _)| recipe.op()) {
            Some((_, job)) => Some(job),
            None => self.deferred.as_mut()?.0.iter_mut().rev().find(|job| of(job)),
        }
    }

    /// Input `i` is a parameter: adds `factor * grad` to its gradient.
    pub(crate) fn add_weight(&mut self, i: usize, mut grad: Buffer, factor: f32) -> Result<()> {
        let Edge::Leaf(param) = &self.inputs[i] else { return Ok(()) };
        if factor != 1.0 {
            let mut scaled = Buffer::on(&grad.device(), grad.bytes())?;
            kernels::scale(grad.view::<f32>(), factor, scaled.view_mut())?;
            grad = scaled;
        }
        let param = param.clone();
        let Some(grad) = self.sink.adopt(&param, grad)? else { return Ok(()) };
        deposit(self.sink, &param, |acc| match acc.fresh {
            true => acc.sum.copy(grad.view()),
            false => kernels::add_into(grad.view::<f32>(), acc.sum),
        })
    }

    /// Runs a nested pass (of a recomputed layer) that reports into this one.
    pub(crate) fn nested(&mut self, root: &Tensor, seed: Tensor) -> Result<()> {
        let deferred = self.deferred.as_deref_mut();
        let before = deferred.as_ref().map_or(0, |d| d.len());
        let mut inner = Nested(&mut *self.sink);
        run(root, seed, &mut inner, deferred)?;
        if let Some(queue) = &mut self.deferred {
            queue.0[before..].iter_mut().for_each(|job| job.last = false);
        }
        Ok(())
    }
}

/// Completion inside a recomputed layer is not completion outside of it.
struct Nested<'a>(&'a mut dyn GradSink);

impl GradSink for Nested<'_> {
    fn accumulate(
        &mut self,
        param: &Arc<Param>,
        add: &mut dyn FnMut(Accumulator<'_>),
    ) -> Result<()> {
        self.0.accumulate(param, add)
    }

    fn adopt(&mut self, param: &Arc<Param>, sum: Buffer) -> Result<Option<Buffer>> {
        self.0.adopt(param, sum)
    }
}

/// A tensor without its values: what its gradient will be like.
#[derive(Clone)]
pub(crate) struct Like {
    scope: Scope,
    shape: Vec<usize>,
    dtype: Dtype,
    layout: Layout,
}

impl Like {
    pub(crate) fn of(t: &Tensor) -> Like {
        Like {
            scope: t.scope().clone(),
            shape: t.shape().to_vec(),
            dtype: t.dtype(),
            layout: t.layout(),
        }
    }

    /// Another tensor of this shape and type.
    pub(crate) fn value(&self, buffer: Buffer, layout: Layout) -> Tensor {
        Tensor::wrap(&self.scope, buffer, &self.shape, self.dtype, layout)
    }

    /// The gradient, whose values are in `buffer`.
    pub(crate) fn gradient(&self, buffer: Buffer) -> Tensor {
        Tensor::wrap(&self.scope, buffer, &self.shape, self.dtype, self.layout.dual())
    }
}

impl Tensor {
    /// Gradients of this scalar with respect to every trainable parameter.
    ///
    /// ```
    /// use colossal_tensor::{Params, Scope, placement::Dim, Init, Dtype};
    /// let params = Params::new(&Scope::solo(), 0, Dtype::F32);
    /// let w = params.at("w").tensor("weight", &[Dim::Other(3)], Init::Constant(2.0))?;
    /// let loss = w.tensor().mul(&w.tensor())?.sum()?; // 3 * 2^2
    /// let grads = loss.backward()?;
    /// assert_eq!(grads.get(&w), Some(&[4.0, 4.0, 4.0][..]));
    /// # Ok::<(), colossal_tensor::Error>(())
    /// ```
    pub fn backward(&self) -> Result<Grads> {
        let mut grads = Grads::default();
        self.backward_into(&mut grads, None)?;
        grads.into_host()
    }

    /// As [`Tensor::backward`], handing gradients to `sink` while the pass goes on. With
    /// `deferred`, gradients of weight matrices are queued there instead of computed.
    ///
    /// # Errors
    /// [`Error::Backward`] for a tensor that is not a scalar, has no graph, or whose graph was
    /// consumed by an earlier pass.
    pub fn backward_into(
        &self,
        sink: &mut dyn GradSink,
        deferred: Option<&mut Deferred>,
    ) -> Result<()> {
        if self.scope().is_fake() {
            return Err(Error::Fake("backward"));
        }
        if self.len() != 1 {
            return Err(Error::Backward(format!(
                "starts from a scalar, not from shape {:?}; reduce it with sum()",
                self.shape()
            )));
        }
        if !self.requires_grad() {
            return Err(Error::Backward(
                "the loss depends on no trainable parameter, or was computed under no_grad".into(),
            ));
        }
        let one = Tensor::from_slice(self.scope(), &[1.0f32], self.shape(), self.layout().dual())?;
        let seed = no_grad(|| one.to_dtype(self.dtype()))?;
        run(self, seed, sink, deferred)
    }
}

fn run(
    root: &Tensor,
    seed: Tensor,
    sink: &mut dyn GradSink,
    deferred: Option<&mut Deferred>,
) -> Result<()> {
    let mut pass = Backward {
        sink,
        deferred,
        pending: BTreeMap::new(),
        uses: HashMap::new(),
        inputs: vec![root.edge().clone()],
        waiting: Vec::new(),
        awaited: None,
    };
    count_uses(root.edge(), &mut pass.uses);
    pass.give(0, seed)?;
    no_grad(|| {
        while let Some((_, (node, grad))) = pass.pending.pop_last() {
            let Some(backward) = node.backward.lock().take() else {
                return Err(Error::Backward(format!(
                    "the graph was consumed by an earlier pass (at {})",
                    node.op
                )));
            };
            pass.inputs.clone_from(&node.inputs);
            let jobs = pass.await_op(node.id);
            backward(grad, &mut pass)?;
            for job in jobs {
                pass.start(job)?;
            }
            for param in node.leaves() {
                let Some(left) = pass.uses.get_mut(&param.id()) else { continue };
                *left -= 1;
                if *left > 0 {
                    continue;
                }
                // The last use: complete now, or when the job that waits has run.
                match pass.last_job(param) {
                    Some(job) => job.last = true,
                    None => pass.sink.complete(param)?,
                }
            }
        }
        Ok(())
    })
}

/// Counts, for each parameter, the nodes that use it.
fn count_uses(root: &Edge, uses: &mut HashMap<ParamId, usize>) {
    let mut seen = std::collections::HashSet::new();
    let mut stack = vec![root.clone()];
    while let Some(edge) = stack.pop() {
        match edge {
            Edge::None => {}
            Edge::Leaf(p) => *uses.entry(p.id()).or_default() += 1,
            Edge::Node(node) => {
                if seen.insert(node.id) {
                    stack.extend(node.inputs.iter().cloned());
                }
            }
        }
    }
}
