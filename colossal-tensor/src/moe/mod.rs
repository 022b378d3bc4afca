//! Mixture of experts: tokens go to the experts their router chose, and come back: calls `comm`.
//!
//! ```text
//! route      logits [.., E]            -> weights [.., k], choice [.., k]
//! dispatch   x [.., h]                 -> rows sorted by expert, at the rank that has the expert
//! grouped    rows x W[expert]ᵀ         -> rows            (one product an expert, ragged groups)
//! combine    rows, weights             -> sum over k of weight * row, where the token came from
//! ```
//!
//! Dropless (MegaBlocks; Gale et al., 2022) unless a capacity says otherwise. Along the axis that
//! cuts the experts, dispatch and combine are all-to-alls of rows; each sends, in each direction
//! and pass, the rows whose expert is elsewhere: `tokens * k * h * (p - 1) / p` when balanced.

mod balance;
mod dispatch;
mod experts;
mod router;

pub use balance::{Balance, Watch};
pub use dispatch::Journey;
pub use router::{Routing, Score};
