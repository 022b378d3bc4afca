//! Checkpoints: a Hugging Face folder plus the optimizer's shards. Whole or absent.
//!
//! ```text
//! checkpoint-40/
//!   config.json, model.safetensors     what transformers loads
//!   optimizer/rank-00000.safetensors   moments (and masters) of that rank's pieces
//!   trainer_state.json                 step, seed, plan
//! ```
//! Everything is written under a temporary name that becomes the folder's by one rename.

use std::collections::BTreeMap;
use std::path::Path;

use colossal_tensor::safetensors::{Archive, Owned, save, write_atomic};
use colossal_tensor::{Dtype, Error, Result};
use serde::{Deserialize, Serialize};

use super::{Plan, Trainer};

/// Shards larger than this are split, as transformers does.
const SHARD_BYTES: usize = 5 << 30;

#[derive(Debug, Serialize, Deserialize)]
struct TrainerState {
    step: u64,
    seed: u64,
    plan: Plan,
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
    for (i, state) in trainer.states.iter().enumerate() {
        let len = [state.range.len()];
        let parts =
            [("m", Some(&state.m)), ("v", Some(&state.v)), ("master", state.master.as_ref())];
        for (part, buffer) in parts {
            if let Some(buffer) = buffer {
                let owned = Owned::from_f32(buffer.as_slice(), &len, Dtype::F32)?;
                tensors.insert(format!("{i}.{part}"), owned);
            }
        }
    }
    let path = draft.join("optimizer").join(format!("rank-{rank:05}.safetensors"));
    save(&path, &tensors, &BTreeMap::new())?;
    if rank == 0 {
        let state = TrainerState {
            step: trainer.steps(),
            seed: trainer.seed(),
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

/// Continues from a checkpoint of the same plan: parameters, moments, step. Every rank calls it.
///
/// # Errors
/// [`Error::File`] when a part is missing or belongs to another plan.
pub fn load_checkpoint(trainer: &mut Trainer, folder: &Path) -> Result<()> {
    let path = folder.join("trainer_state.json");
    let fail = |reason: String| Error::File { path: path.display().to_string(), reason };
    let text = std::fs::read_to_string(&path).map_err(|e| fail(e.to_string()))?;
    let state: TrainerState = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    if state.plan != trainer.plan || state.seed != trainer.seed() {
        return Err(fail(format!(
            "was written under another plan or seed ({:?}, seed {}); resume with the same, or load \
             the folder as a model to start new",
            state.plan, state.seed
        )));
    }
    let loaded =
        crate::hf::load(folder, trainer.model.scope(), trainer.plan.precision.dtype(), None)?;
    for (to, from) in trainer.model.params.all().iter().zip(loaded.params.all()) {
        to.set(&from.to_vec()?)?;
    }
    let path = folder.join("optimizer").join(format!("rank-{:05}.safetensors", trainer.rank()));
    let archive = Archive::open(std::slice::from_ref(&path))?;
    for (i, piece) in trainer.states.iter_mut().enumerate() {
        let parts = [
            ("m", Some(&mut piece.m)),
            ("v", Some(&mut piece.v)),
            ("master", piece.master.as_mut()),
        ];
        for (part, buffer) in parts {
            let Some(buffer) = buffer else { continue };
            let name = format!("{i}.{part}");
            let values = archive.get(&name).map(|e| e.to_vec()).transpose()?;
            match values {
                Some(values) if values.len() == piece.range.len() => {
                    buffer.as_mut_slice::<f32>().copy_from_slice(&values);
                }
                _ => {
                    return Err(Error::File {
                        path: path.display().to_string(),
                        reason: format!("tensor {name} is missing or of another length"),
                    });
                }
            }
        }
    }
    trainer.step = state.step;
    barrier(trainer)
}

fn barrier(trainer: &Trainer) -> Result<()> {
    trainer.world().barrier().map_err(|e| Error::Comm(e.to_string()))
}
