//! Layers: each is a struct of parameter handles and a `forward`.

mod embedding;
mod linear;
mod moe;
mod norm;
mod rope;

pub use embedding::Embedding;
pub use linear::Linear;
pub use moe::Moe;
pub use norm::{LayerNorm, RmsNorm};
pub use rope::{Rope, RopeScaling};
