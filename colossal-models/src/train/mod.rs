//! Training: a plan, a trainer, and what they need.

pub mod checkpoint;
pub mod data;
mod gradients;
mod lr_schedule;
mod optimizer;
mod plan;
mod report;
mod trainer;

pub use checkpoint::{load_checkpoint, save_checkpoint};
pub use data::{Batch, Sequences};
pub use lr_schedule::{Decay, LrSchedule};
pub use optimizer::{AdamW, Optimizer, Rule};
pub use plan::{Fp8, Plan, Precision, SequenceMode, TensorMode};
pub use report::StepReport;
pub use trainer::{Trainer, lm_loss};
