//! ColossalChat: supervised fine-tuning, reward models, PPO, and the pipeline of all three.
//!
//! The arithmetic is in small files of pure functions (`advantage`, `kl`, `policy_loss`,
//! `reward_loss`); the loops read from top to bottom.

pub mod advantage;
pub mod corpus;
pub mod kl;
pub mod policy_loss;
pub mod ppo;
mod progress;
pub mod reward;
pub mod reward_loss;
pub mod rlhf;
pub mod rule_score;
pub mod sft;
pub mod talk;

pub use progress::{Point, Progress};
