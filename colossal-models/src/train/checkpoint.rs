//! Checkpoints: a Hugging Face folder plus the optimizer's state. Whole or absent.
//!
//! ```text
//! checkpoint-40/
//!   config.json, model.safetensors     what transformers loads
//!   optimizer.safetensors              m.NAME, v.NAME, master.NAME of each parameter, whole, as far
//!                                      as the optimizer has them; its statistics of rows and columns
//!   trainer_state.json                 step, seed, optimizer, plan
//! ```
//! Nothing in it depends on the plan: it is read under any other, each rank its own parts.
//! Everything is written under a temporary name that becomes the folder's by one rename.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use colossal_tensor::safetensors::{Archive, Owned, save, write_atomic};
use colossal_tensor::storage::Buffer;
use colossal_tensor::{Dtype, Error, Param, Placement, Result, Tensor, no_grad};
use serde::{Deserialize, Serialize};

use super::optimizer::State;
use super::trainer::Slot;
use super::{Plan, Trainer};

/// Shards larger than this are split, as transformers does.
const SHARD_BYTES: usize = 5 << 30;

#[derive(Debug, Serialize, Deserialize)]
struct TrainerState {
    step: u64,
    seed: u64,
    #[serde(default = "adamw")]
    optimizer: String,
    plan: Plan,
}

/// Checkpoints that do not say it are older than the other optimizers.
fn adamw() -> String {
    "adamw".into()
}

/// Writes the model and all state that an exact continuation needs. Every rank calls it.
///
/// # Errors
/// [`Error::File`]; an older checkpoint of that name is then untouched.
pub fn save_checkpoint(trainer: &Trainer, folder: &Path) -> Result<()> {
    let fail = |reason: String| Error::File { path: folder.display().to_string(), reason };
    let name = folder.file_name().and_then(|n| n.to_str()).unwrap_or("checkpoint");
    let draft = folder.with_file_name(format!(".{name}.partial"));
    let (rank, world) = (trainer.rank(), trainer.world());
    if rank == 0 && draft.exists() {
        std::fs::remove_dir_all(&draft).map_err(|e| fail(e.to_string()))?;
    }
    barrier(trainer)?;
    crate::hf::save(&trainer.model, &draft, SHARD_BYTES)?;
    let mut tensors = BTreeMap::new();
    for slot in &trainer.slots {
        for (part, of) in PARTS {
            // Parameters held in f32 are their own masters; rules have no, one or two moments.
            if trainer.states.iter().all(|state| of(state).is_none()) {
                continue;
            }
            let whole = gather(trainer, slot, of)?;
            if rank == 0 {
                let owned = Owned::from_f32(&whole, &slot.param.global_shape(), Dtype::F32)?;
                tensors.insert(format!("{part}.{}", slot.param.name()), owned);
            }
        }
    }
    for (slot, factored) in trainer.slots.iter().zip(&trainer.factored) {
        for (of, factors) in FACTORED.iter().zip(&factored.statistics) {
            for (part, values) in [("rows", &factors.rows), ("cols", &factors.cols)] {
                let owned = Owned::from_f32(values, &[values.len()], Dtype::F32)?;
                tensors.insert(format!("{of}.{part}.{}", slot.param.name()), owned);
            }
        }
    }
    if rank == 0 {
        save(&draft.join("optimizer.safetensors"), &tensors, &BTreeMap::new())?;
    }
    if rank == 0 {
        let state = TrainerState {
            step: trainer.steps(),
            seed: trainer.seed(),
            optimizer: trainer.rule.into(),
            plan: trainer.plan.clone(),
        };
        let text = serde_json::to_vec_pretty(&state).map_err(|e| fail(e.to_string()))?;
        write_atomic(&draft.join("trainer_state.json"), &text)?;
    }
    // Everybody has written: the folder is complete.
    world.barrier().map_err(|e| Error::Comm(e.to_string()))?;
    if rank == 0 {
        if folder.exists() {
            let old = folder.with_file_name(format!(".{name}.old"));
            std::fs::rename(folder, &old).map_err(|e| fail(e.to_string()))?;
            std::fs::rename(&draft, folder).map_err(|e| fail(e.to_string()))?;
            std::fs::remove_dir_all(&old).map_err(|e| fail(e.to_string()))?;
        } else {
            std::fs::rename(&draft, folder).map_err(|e| fail(e.to_string()))?;
        }
    }
    barrier(trainer)
}

/// Which buffer of a piece of state a tensor of the file belongs to.
type Part = fn(&State) -> Option<&Buffer>;

const PARTS: [(&str, Part); 3] =
    [("m", |s| s.m.as_ref()), ("v", |s| s.v.as_ref()), ("master", |s| s.master.as_ref())];

/// The statistics by row and column that Adafactor and CAME keep.
const FACTORED: [&str; 2] = ["second", "disagreement"];

/// A parameter's state, whole: its pieces put together over `dp`, then over the other axes.
fn gather(trainer: &Trainer, slot: &Slot, of: Part) -> Result<Vec<f32>> {
    let mut local = vec![0.0f32; slot.range.len()];
    for state in &trainer.states {
        if let Some((from, to)) = overlap(&state.range, &slot.range)
            && let Some(buffer) = of(state)
        {
            buffer.view::<f32>().range(from).read(&mut local[to])?;
        }
    }
    let (param, mesh) = (&slot.param, trainer.model.scope().mesh());
    if trainer.plan.zero > 0 {
        // Each piece lies on one rank; the others add zeros.
        let group = mesh.group("dp").map_err(|e| Error::Comm(e.to_string()))?;
        let sum = colossal_comm::ReduceOp::Sum;
        group.all_reduce(&mut local, sum).map_err(|e| Error::Comm(e.to_string()))?;
    }
    let mut layout = param.layout();
    let t = Tensor::from_slice(param.scope(), &local, param.shape(), layout)?;
    for axis in 0..mesh.axes().len() {
        if matches!(layout[axis], Placement::Shard(_)) {
            layout[axis] = Placement::Invariant;
        }
    }
    let mut whole = no_grad(|| t.to_layout(layout))?.to_vec()?;
    whole.truncate(param.global_shape().iter().product());
    Ok(whole)
}

/// The common part of two ranges, relative to the start of each.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
    let (start, end) = (a.start.max(b.start), a.end.min(b.end));
    (start < end).then(|| (start - a.start..end - a.start, start - b.start..end - b.start))
}

/// Continues from a checkpoint, written under this plan or any other: parameters, moments, step.
/// Every rank calls it and reads its own parts.
///
/// # Errors
/// [`Error::File`] when a part is missing, of another shape, or of a run with another seed.
pub fn load_checkpoint(trainer: &mut Trainer, folder: &Path) -> Result<()> {
    let path = folder.join("trainer_state.json");
    let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
    let text = std::fs::read_to_string(&path).map_err(|e| fail(e.to_string()))?;
    let state: TrainerState = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    if state.seed != trainer.seed() {
        return Err(fail(format!(
            "is of a run with seed {}, not {}; resume with the same, or load the folder as a model \
             to start new",
            state.seed,
            trainer.seed()
        )));
    }
    if state.optimizer != trainer.rule {
        return Err(fail(format!(
            "is of a run with {}, not {}; resume with the same, or load the folder as a model to \
             start new",
            state.optimizer, trainer.rule
        )));
    }
    let path = folder.join("optimizer.safetensors");
    let archive = Archive::open(std::slice::from_ref(&path))?;
    // This rank's part of a parameter's state.
    let read = |part: &str, param: &Param| -> Result<Option<Vec<f32>>> {
        let name = format!("{part}.{}", param.name());
        let Some(entry) = archive.get(&name) else { return Ok(None) };
        if entry.shape != param.global_shape() {
            return Err(Error::File {
                path: path.display().to_string(),
                reason: format!(
                    "tensor {name} has shape {:?}, the model {:?}",
                    entry.shape,
                    param.global_shape()
                ),
            });
        }
        let (mut out, mut result) = (Vec::with_capacity(param.len()), Ok(()));
        param.for_each_run(|start, len| {
            if result.is_ok() {
                result = entry.to_f32(start, len, &mut out);
            }
        });
        // Behind a vocabulary: zeros.
        out.resize(param.len(), 0.0);
        result.map(|()| Some(out))
    };
    let missing = |name: String| Error::File {
        path: path.display().to_string(),
        reason: format!("tensor {name} is missing, or of another shape"),
    };
    let dtype = trainer.plan.precision.dtype();
    let loaded = crate::hf::load(folder, trainer.model.scope(), Dtype::F32, None)?;
    for slot in &trainer.slots {
        let published = loaded.params.get(slot.param.name())?.to_vec()?;
        let master = read("master", &slot.param)?;
        // Held in f32, the masters are the parameters.
        let values = match &master {
            Some(master) if dtype == Dtype::F32 => master,
            _ => &published,
        };
        slot.param.set(values)?;
        let moment = |part: &str, wanted: bool| match wanted {
            true => read(part, &slot.param)?
                .map(Some)
                .ok_or_else(|| missing(format!("{part}.{}", slot.param.name()))),
            false => Ok(None),
        };
        let rule = trainer.optimizer.rule;
        let m = moment("m", rule.first_moment())?;
        let v = moment("v", rule.second_moment())?;
        let master = Some(master.unwrap_or(published));
        for piece in &mut trainer.states {
            let Some((to, from)) = overlap(&piece.range, &slot.range) else { continue };
            let parts = [(&mut piece.m, &m), (&mut piece.v, &v), (&mut piece.master, &master)];
            for (buffer, values) in parts {
                if let (Some(buffer), Some(values)) = (buffer, values) {
                    buffer.view_mut::<f32>().range(to.clone()).write(&values[from.clone()])?;
                }
            }
        }
    }
    for (slot, factored) in trainer.slots.iter().zip(&mut trainer.factored) {
        for (of, factors) in FACTORED.iter().zip(&mut factored.statistics) {
            for (part, values) in [("rows", &mut factors.rows), ("cols", &mut factors.cols)] {
                let name = format!("{of}.{part}.{}", slot.param.name());
                let entry = archive.get(&name).filter(|e| e.shape == [values.len()]);
                let mut read = Vec::with_capacity(values.len());
                entry.ok_or_else(|| missing(name))?.to_f32(0, values.len(), &mut read)?;
                *values = read;
            }
        }
    }
    for param in trainer.model.params.all().iter().filter(|p| !p.is_trainable()) {
        param.set(&loaded.params.get(param.name())?.to_vec()?)?;
    }
    trainer.step = state.step;
    barrier(trainer)
}

fn barrier(trainer: &Trainer) -> Result<()> {
    trainer.world().barrier().map_err(|e| Error::Comm(e.to_string()))
}
