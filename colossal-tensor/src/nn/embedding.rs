//! Rows of a table by id.

use std::sync::Arc;

use crate::error::Result;
use crate::params::{Init, Param, Params};
use crate::placement::Dim;
use crate::tensor::Tensor;

/// A table `[entries, width]`; with its entries sharded the output is a pending sum.
#[derive(Debug)]
pub struct Embedding {
    weight: Arc<Param>,
}

impl Embedding {
    /// A table drawn with deviation 0.02.
    pub fn new(p: &Params, entries: Dim, width: Dim) -> Result<Embedding> {
        Ok(Embedding { weight: p.tensor("weight", &[entries, width], Init::Normal(0.02))? })
    }

    /// `ids [..]` of `i32` to `[.., width]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Tensor::embedding(&self.weight.tensor(), ids)
    }

    /// The table, to tie a head to.
    pub fn weight(&self) -> &Arc<Param> {
        &self.weight
    }
}
