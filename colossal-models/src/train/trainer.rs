//! The trainer: forward, backward with gradients reduced on the way, clip, update, gather.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use colossal_kernels as kernels;
use colossal_tensor::kernels::SquareSums;
use colossal_tensor::moe::Balance;
use colossal_tensor::random::Stream;
use colossal_tensor::storage::{Buffer, memory_stats_of};
use colossal_tensor::{
    Accumulator, Device, Dtype, Error, Flat, GradSink, Group, Param, ParamId, Placement, Result,
    Tensor, View, collectives,
};
use colossal_zero::{Stage, Zero};
use half::bf16;

use super::data::Batch;
use super::gradients::Gradients;
use super::optimizer::{Factored, Held, State, Update};
use super::report::{StepReport, peak};
use super::{Optimizer, Plan};
use crate::decoder::{CausalLm, DecoderConfig, Tokens, Training};

/// A model in training under a plan.
#[derive(Debug)]
pub struct Trainer {
    /// The model.
    pub model: CausalLm,
    /// The plan.
    pub plan: Plan,
    /// The optimizer; all but the kind of its rule may be changed between steps.
    pub optimizer: Optimizer,
    pub(super) flat: Arc<Flat>,
    pub(super) slots: Vec<Slot>,
    by_id: HashMap<ParamId, usize>,
    zero: Zero<Gradients>,
    pub(super) states: Vec<State>,
    /// Of each slot, if the rule has any.
    pub(super) factored: Vec<Factored>,
    pub(super) step: u64,
    /// The rule whose state this is.
    pub(super) rule: &'static str,
    world: Group,
    seed: u64,
    /// An update began and did not end.
    torn: bool,
}

/// Where a parameter lies in the flat vector of all parameters.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) param: Arc<Param>,
    pub(super) range: Range<usize>,
    decay: bool,
    /// Ranks outside `dp` that hold the same values.
    copies: f64,
    /// Axes other than `dp` along which the gradient is a pending sum.
    pending: Vec<String>,
    /// Axes whose ranks update different parts of it.
    cut: Vec<String>,
}

impl Trainer {
    /// A trainer of a model with fresh weights.
    ///
    /// # Errors
    /// When the plan does not fit the ranks, or a degree does not divide a dimension.
    pub fn new(
        world: &Group,
        plan: &Plan,
        config: &DecoderConfig,
        optimizer: impl Into<Optimizer>,
        seed: u64,
    ) -> Result<Trainer> {
        let scope = plan.scope(world)?;
        let model = CausalLm::new(&scope, config, seed, plan.precision.dtype())?;
        Trainer::of(world, plan, model, optimizer, seed)
    }

    /// A trainer of a published model (a folder), with its own head or another.
    pub fn from_pretrained(
        world: &Group,
        plan: &Plan,
        path: &Path,
        head: Option<crate::Head>,
        optimizer: impl Into<Optimizer>,
        seed: u64,
    ) -> Result<Trainer> {
        let scope = plan.scope(world)?;
        let model = crate::hf::load(path, &scope, plan.precision.dtype(), head)?;
        Trainer::of(world, plan, model, optimizer, seed)
    }

    /// A trainer of this model, whose scope must be the plan's.
    pub fn of(
        world: &Group,
        plan: &Plan,
        mut model: CausalLm,
        optimizer: impl Into<Optimizer>,
        seed: u64,
    ) -> Result<Trainer> {
        model.stack = model.stack.recompute(plan.recompute);
        let dtype = plan.precision.dtype();
        let optimizer = optimizer.into();
        // Gradients become complete from the last layer to the first: so they lie in memory.
        let mut slots = Vec::new();
        let mut end = 0;
        for param in model.params.all().into_iter().rev() {
            // Refuses values that cannot be read, as those held in int8.
            drop(param.lease()?);
            param.set_fp8(plan.fp8.recipe());
            // What never learns by gradients keeps its own memory.
            if !param.is_trainable() {
                continue;
            }
            let range = end..end + param.len();
            end = range.end;
            slots.push(Slot::new(param, range));
        }
        let device = model.scope().device().clone();
        let mut buffer = Buffer::on(&device, end * dtype.bytes())?;
        let mut masters = Vec::with_capacity(if dtype == Dtype::F32 { 0 } else { end });
        for slot in &slots {
            let bytes = slot.range.start * dtype.bytes()..slot.range.end * dtype.bytes();
            buffer.view_mut::<u8>().range(bytes).copy(slot.param.lease()?.view())?;
            if dtype != Dtype::F32 {
                masters.extend(slot.param.to_vec()?);
            }
        }
        let flat = Flat::new(buffer);
        for slot in &slots {
            let bytes = slot.range.start * dtype.bytes()..slot.range.end * dtype.bytes();
            slot.param.rebind(flat.clone(), bytes);
        }
        let dp = model.scope().mesh().group("dp").map_err(comm)?.clone();
        let segments: Vec<(usize, usize)> =
            slots.iter().map(|s| (s.range.start, s.range.len())).collect();
        let bucket = plan.bucket_mib * (1 << 20) / size_of::<f32>();
        let zero =
            Zero::within(Gradients(device.clone()), plan.stage(), dp, end, bucket, &segments);
        let zero = zero.map_err(zero_error)?;
        let rule = optimizer.rule;
        let zeros =
            |wanted: bool, len| wanted.then(|| Buffer::zeros_on::<f32>(&device, len)).transpose();
        let master = |range: &Range<usize>| {
            let own =
                |masters: &Vec<f32>| Buffer::copy_of(&device, View::Cpu(&masters[range.clone()]));
            Some(&masters).filter(|m| !m.is_empty()).map(own).transpose()
        };
        let mut states = Vec::new();
        for range in zero.shard_ranges() {
            states.push(State {
                m: zeros(rule.first_moment(), range.len())?,
                v: zeros(rule.second_moment(), range.len())?,
                master: master(&range)?,
                range,
            });
        }
        let factored = match rule.factored() {
            0 => vec![],
            _ => slots.iter().map(|slot| Factored::new(&rule, slot.piece(&states))).collect(),
        };
        if plan.stage() != Stage::Zero && plan.dp > 1 {
            slots.iter_mut().for_each(|slot| slot.cut.push("dp".into()));
        }
        let by_id = slots.iter().enumerate().map(|(i, s)| (s.param.id(), i)).collect();
        let (plan, world) = (plan.clone(), world.clone());
        Ok(Trainer {
            model,
            plan,
            optimizer,
            flat,
            slots,
            by_id,
            zero,
            states,
            factored,
            step: 0,
            rule: rule.name(),
            world,
            seed,
            torn: false,
        })
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Is every parameter that of one step? Not after an update that failed on the way: then only
    /// a checkpoint can be gone on from.
    pub fn is_whole(&self) -> bool {
        !self.torn
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// All ranks.
    pub fn world(&self) -> &Group {
        &self.world
    }

    /// The seed of the run.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The model alone: gradients and moments are freed.
    pub fn into_model(self) -> CausalLm {
        self.model
    }

    /// Which part of how many parts of a batch is this rank's own.
    pub fn data_part(&self) -> (usize, usize) {
        self.model.scope().batch_part()
    }

    /// One step of language modelling on a *global* batch: the mean loss over its targets.
    ///
    /// # Errors
    /// A batch that does not divide; a loss that is not finite (the parameters are untouched).
    pub fn step(&mut self, batch: &Batch) -> Result<StepReport> {
        let (part, parts) = self.data_part();
        let micro = self.plan.microbatches;
        let count = batch.learnt();
        if count == 0 {
            return Err(Error::Other(
                "step: no token of the batch has a target; is the answer cut off by the maximum length?".into(),
            ));
        }
        let seed = self.seed;
        let number = self.step;
        let mut balances = vec![];
        let mut report = self.train(batch.ids.len(), batch.seq, |model, i| {
            let own = batch.part(i * parts + part, micro * parts)?;
            let training = Training {
                dropout: dropout_stream(seed, number),
                first_row: i * parts * own.len(),
                balance: Balance::new(1.0 / micro as f32),
            };
            balances.push(training.balance.clone());
            lm_loss(model, &own, Some(training), 1.0 / count as f32)
        })?;
        report.auxiliary_loss = balances.iter().map(|b| b.loss()).sum();
        Ok(report)
    }

    /// One step on any loss: `loss(model, microbatch)` returns this rank's term of the loss as a
    /// scalar that already is divided by the global count. `tokens` and `seq` are for the report.
    pub fn train(
        &mut self,
        tokens: usize,
        seq: usize,
        mut loss: impl FnMut(&CausalLm, usize) -> Result<Tensor>,
    ) -> Result<StepReport> {
        let start = Instant::now();
        let sent = self.world_bytes();
        let mut total = 0.0;
        let mut waiting = BTreeSet::new();
        let mut squares = SquareSums::new(self.model.scope().device(), self.slots.len())?;
        // A gradient that is complete is whole: it is squared while it is near.
        let whole =
            self.plan.dp == 1 && (self.plan.stage() != Stage::Two || self.plan.microbatches == 1);
        for i in 0..self.plan.microbatches {
            let forward = kernels::profile::phase("forward");
            let term = loss(&self.model, i)?;
            drop(forward);
            let _backward = kernels::profile::phase("backward");
            total += self.global_value(&term)?;
            let mut sink = Sink {
                trainer_slots: &self.slots,
                by_id: &self.by_id,
                zero: &mut self.zero,
                stage: self.plan.stage(),
                last: i + 1 == self.plan.microbatches,
                waiting: &mut waiting,
                squares: whole.then_some(&mut squares),
            };
            term.backward_into(&mut sink, None)?;
            if self.plan.stage() == Stage::Two && i + 1 < self.plan.microbatches {
                self.zero.finish().map_err(zero_error)?;
            }
        }
        // What no loss reached in the last microbatch but in an earlier one is sent now.
        for i in waiting {
            send(&self.slots[i], &mut self.zero, None)?;
        }
        self.zero.finish().map_err(zero_error)?;
        let (norm, lr) = self.update(total, squares)?;
        let seconds = start.elapsed().as_secs_f64();
        let matrices: usize = self
            .slots
            .iter()
            .filter(|s| s.decay)
            .map(|s| s.param.global_shape().iter().product::<usize>())
            .sum();
        let flops = self.model.config.flops_per_token(matrices, seq) * tokens as f64;
        let peak = peak(self.model.scope().device(), self.plan.precision.dtype());
        Ok(StepReport {
            step: self.step,
            loss: total,
            auxiliary_loss: 0.0,
            grad_norm: norm,
            lr,
            tokens,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
            mfu: flops / seconds / (peak * self.world.world_size() as f64),
            peak_bytes: memory_stats_of(self.model.scope().device()).peak,
            sent_bytes: self.world_bytes() - sent,
        })
    }

    /// Clips, updates this rank's pieces, gathers everybody's.
    fn update(&mut self, loss: f32, squares: SquareSums) -> Result<(f32, f32)> {
        let _update = kernels::profile::phase("update");
        let norm = self.grad_norm(squares)?;
        if !loss.is_finite() || !norm.is_finite() {
            self.zero.clear();
            return Err(Error::Other(format!(
                "step {}: loss {loss}, gradient norm {norm}: not finite. The parameters are those of \
                 the step before; lower the learning rate, or look at the data of this batch",
                self.step + 1
            )));
        }
        let o = self.optimizer;
        let scale = if o.clip > 0.0 && norm > o.clip { o.clip / norm } else { 1.0 };
        let lr = o.lr.at(self.step);
        if o.rule.name() != self.rule {
            return Err(Error::Other(format!(
                "step: the optimizer became {}, and the trainer holds the state of {}; start a new \
                 trainer",
                o.rule.name(),
                self.rule
            )));
        }
        self.step += 1;
        self.torn = true;
        let update = Update { rule: o.rule, step: self.step as u32, lr, weight_decay: 0.0, scale };
        let buckets: Vec<_> =
            self.zero.partition().buckets().iter().map(|b| b.range.clone()).collect();
        let mut pieces = buckets.iter().zip(&mut self.states);
        let (slots, factored, zero) = (&self.slots, &mut self.factored, &mut self.zero);
        let (dtype, plan_dp) = (self.plan.precision.dtype(), self.plan.dp);
        self.flat.write(|flat| -> Result<()> {
            let (mut summed, mut updated) = (Ok(()), Ok(()));
            let stepped = zero.step(|range, grads| {
                let Some((bucket, state)) = pieces.next() else { return };
                debug_assert_eq!(state.range, range);
                let first = first_overlapping(slots, bucket);
                for (i, slot) in overlapping(slots, bucket).enumerate() {
                    let all = slot.within(&range);
                    if all.is_empty() && !o.rule.sums() {
                        continue;
                    }
                    let own = all.start - range.start..all.end - range.start;
                    let decay = if slot.decay { o.weight_decay } else { 0.0 };
                    let update = Update { weight_decay: decay, ..update };
                    let state = state.of(&own);
                    let (grads, factored) = (grads.range(own), factored.get_mut(first + i));
                    let mut sum = |x: &mut [f64]| {
                        for axis in &slot.cut {
                            if summed.is_ok() {
                                summed = slot.sum(axis, x);
                            }
                        }
                    };
                    match dtype {
                        Dtype::F32 => {
                            let params = flat.view_mut::<f32>().range(all);
                            let held = Held { params, grads, state, factored };
                            updated = std::mem::replace(&mut updated, Ok(()))
                                .and_then(|()| update.piece(held, &mut sum));
                        }
                        _ => {
                            let params = flat.view_mut::<bf16>().range(all);
                            let held = Held { params, grads, state, factored };
                            updated = std::mem::replace(&mut updated, Ok(()))
                                .and_then(|()| update.piece(held, &mut sum));
                        }
                    }
                }
            });
            stepped.map_err(zero_error)?;
            summed.and(updated)?;
            zero.clear();
            let gathers = zero.stage() != Stage::Zero && plan_dp > 1;
            match (dtype, flat.device()) {
                (_, Device::Cuda(_)) if !gathers => Ok(()),
                (Dtype::F32, Device::Cpu) => zero.gather_params(flat.as_mut_slice::<f32>()),
                (_, Device::Cpu) => zero.gather_params(flat.as_mut_slice::<bf16>()),
                (dtype, _) => {
                    let mut copy = Buffer::copy_of::<u8>(&Device::Cpu, flat.view())?;
                    match dtype {
                        Dtype::F32 => zero.gather_params(copy.as_mut_slice::<f32>()),
                        _ => zero.gather_params(copy.as_mut_slice::<bf16>()),
                    }
                    .map_err(zero_error)?;
                    return flat.view_mut::<u8>().copy(copy.view());
                }
            }
            .map_err(zero_error)
        })??;
        self.torn = false;
        self.model.stack.after_step()?;
        Ok((norm, lr))
    }

    /// The norm of the whole gradient: each element counted once over all ranks. `squares` has the sums
    /// of some slots.
    fn grad_norm(&mut self, mut squares: SquareSums) -> Result<f32> {
        let (slots, mut put) = (&self.slots, Ok(()));
        let looked = self.zero.step(|range, grad| {
            let first = first_overlapping(slots, &range);
            for (i, slot) in overlapping(slots, &range).enumerate() {
                let from = slot.range.start.max(range.start) - range.start;
                let to = slot.range.end.min(range.end) - range.start;
                if put.is_ok() && !squares.has(first + i) {
                    put = squares.put(first + i, grad.range(from..to));
                }
            }
        });
        looked.map_err(zero_error)?;
        put?;
        let mut sum: f64 = squares.finish()?.iter().zip(slots).map(|(x, s)| x / s.copies).sum();
        // With stage 0 every dp rank holds the whole gradient.
        if self.plan.stage() == Stage::Zero {
            sum /= self.plan.dp as f64;
        }
        let mut all = [sum];
        self.world.all_reduce(&mut all, colossal_comm::ReduceOp::Sum).map_err(comm)?;
        Ok(all[0].sqrt() as f32)
    }

    /// The value of a scalar over all ranks: pending sums are summed.
    pub fn global_value(&self, scalar: &Tensor) -> Result<f32> {
        let mut layout = scalar.layout();
        for axis in 0..self.model.scope().mesh().axes().len() {
            if layout[axis] == Placement::Partial {
                layout[axis] = Placement::Invariant;
            }
        }
        colossal_tensor::no_grad(|| scalar.detach().to_layout(layout)?.item())
    }

    fn world_bytes(&self) -> u64 {
        let mesh = self.model.scope().mesh();
        let groups = mesh.axes().iter().filter_map(|(axis, _)| mesh.group(axis).ok());
        groups.map(|g| g.counters().bytes()).sum()
    }
}

/// The summed loss of this rank's sequences times `factor`; what a plan cuts them into is filled up with
/// padding.
/// `training` is as in [`Tokens::training`]; auxiliary losses add to gradients, not to the value,
/// and have their own: [`Balance::loss`].
pub fn lm_loss(
    model: &CausalLm,
    batch: &Batch,
    training: Option<Training>,
    factor: f32,
) -> Result<Tensor> {
    let multiple = model.scope().sequence_multiple();
    let batch = &batch.padded_to(batch.seq.next_multiple_of(multiple));
    let mut tokens = Tokens::padded(model.scope(), &batch.ids, batch.seq, batch.lengths.clone())?;
    tokens.training = training;
    model.loss(tokens, &batch.targets, factor, None)
}

fn dropout_stream(seed: u64, step: u64) -> Stream {
    Stream::named(seed, "dropout").child(step)
}

impl Slot {
    fn new(param: Arc<Param>, range: Range<usize>) -> Slot {
        let mut copies = 1.0;
        let (mut pending, mut cut) = (vec![], vec![]);
        for (axis, (name, size)) in param.scope().mesh().axes().iter().enumerate() {
            if *name == "dp" || *size == 1 {
                continue;
            }
            match param.layout()[axis] {
                Placement::Shard(_) => cut.push(name.to_string()),
                _ => copies *= *size as f64,
            }
            if param.layout()[axis] == Placement::Replicate {
                pending.push(name.to_string());
            }
        }
        let decay = param.dims().len() > 1;
        Slot { param, range, decay, copies, pending, cut }
    }

    /// What of it lies in `range`, without what pads a vocabulary: that is never updated. May be empty.
    fn within(&self, range: &Range<usize>) -> Range<usize> {
        let start = self.range.start.clamp(range.start, range.end);
        start..(self.range.start + self.param.real_len()).clamp(start, range.end)
    }

    /// Which elements of the whole parameter this rank updates.
    fn piece(&self, states: &[State]) -> kernels::Piece {
        let own = states.iter().map(|s| self.within(&s.range)).find(|own| !own.is_empty());
        let own = own.unwrap_or(self.range.start..self.range.start);
        let (mut at, mut held) = (self.range.start, vec![]);
        self.param.for_each_run(|start, len| {
            let from = own.start.clamp(at, at + len);
            let to = own.end.clamp(from, at + len);
            if from < to {
                held.push((start + from - at, to - from));
            }
            at += len;
        });
        kernels::Piece::new(&self.param.global_shape(), held)
    }

    fn sum(&self, axis: &str, x: &mut [f64]) -> Result<()> {
        let group = self.param.scope().mesh().group(axis).map_err(comm)?;
        group.all_reduce(x, colossal_comm::ReduceOp::Sum).map_err(comm)
    }
}

/// Slots that overlap `range`; slots are sorted by range.
fn overlapping<'a>(slots: &'a [Slot], range: &Range<usize>) -> impl Iterator<Item = &'a Slot> {
    let end = range.end;
    slots[first_overlapping(slots, range)..].iter().take_while(move |s| s.range.start < end)
}

fn first_overlapping(slots: &[Slot], range: &Range<usize>) -> usize {
    slots.partition_point(|s| s.range.end <= range.start)
}

/// Accumulates gradients where ZeRO sends them from, the moment they are complete.
struct Sink<'a> {
    trainer_slots: &'a [Slot],
    by_id: &'a HashMap<ParamId, usize>,
    zero: &'a mut Zero<Gradients>,
    stage: Stage,
    last: bool,
    /// Slots whose gradient is not complete yet.
    waiting: &'a mut BTreeSet<usize>,
    /// The sums of squares of complete gradients, if nothing is added to them elsewhere or later.
    squares: Option<&'a mut SquareSums>,
}

impl GradSink for Sink<'_> {
    fn accumulate(
        &mut self,
        param: &Arc<Param>,
        add: &mut dyn FnMut(Accumulator<'_>),
    ) -> Result<()> {
        let slot = self.by_id[&param.id()];
        if param.is_empty() {
            return Ok(());
        }
        self.waiting.insert(slot);
        let (sum, fresh) = self
            .zero
            .gradient(self.trainer_slots[slot].range.start, param.len())
            .map_err(zero_error)?;
        add(Accumulator { sum, fresh });
        Ok(())
    }

    fn adopt(&mut self, param: &Arc<Param>, sum: Buffer) -> Result<Option<Buffer>> {
        let slot = self.by_id[&param.id()];
        let at = self.trainer_slots[slot].range.start;
        let left = self.zero.adopt(at, param.len(), sum).map_err(zero_error)?;
        if left.is_none() {
            self.waiting.insert(slot);
        }
        Ok(left)
    }

    fn complete(&mut self, param: &Arc<Param>) -> Result<()> {
        // Stages 0 and 1 accumulate locally and reduce once; stage 2 keeps only its shard.
        if !self.last && self.stage != Stage::Two {
            return Ok(());
        }
        let slot = self.by_id[&param.id()];
        match self.waiting.remove(&slot) {
            true => {
                let squares = self.squares.as_deref_mut().map(|squares| (squares, slot));
                send(&self.trainer_slots[slot], self.zero, squares)
            }
            false => Ok(()),
        }
    }
}

/// The one gradient rule: what is partial is reduced. `dp` is ZeRO's, other axes are done here.
fn send(
    slot: &Slot,
    zero: &mut Zero<Gradients>,
    squares: Option<(&mut SquareSums, usize)>,
) -> Result<()> {
    let (at, len) = (slot.range.start, slot.range.len());
    for axis in &slot.pending {
        let group = slot.param.scope().mesh().group(axis).map_err(comm)?;
        let (grad, _) = zero.gradient(at, len).map_err(zero_error)?;
        collectives::all_reduce(group, grad, colossal_comm::ReduceOp::Sum)?;
    }
    if let Some((squares, i)) = squares {
        squares.put(i, zero.gradient(at, len).map_err(zero_error)?.0.as_view())?;
    }
    zero.complete(at).map_err(zero_error)
}

fn comm(error: colossal_comm::Error) -> Error {
    Error::Comm(error.to_string())
}

fn zero_error(error: colossal_zero::Error) -> Error {
    Error::Comm(error.to_string())
}
