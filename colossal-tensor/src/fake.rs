//! A model's shapes and layouts checked on a pretended mesh of any size: no memory, no messages.

use crate::dtype::Dtype;
use crate::error::Result;
use crate::params::Params;
use crate::placement::Sharding;
use crate::tensor::{Scope, Tensor};

/// What one rank of the pretended mesh would hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Each parameter, in order of construction.
    pub params: Vec<Held>,
    /// Parameter elements on one rank.
    pub local_elements: usize,
    /// Parameter elements of the whole model.
    pub global_elements: usize,
}

/// One rank's part of a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its name.
    pub name: String,
    /// The shape of the whole.
    pub global_shape: Vec<usize>,
    /// The shape of the part.
    pub shape: Vec<usize>,
    /// Its placement along each axis, as `tp:Shard(0)`.
    pub layout: Vec<String>,
}

/// Runs `forward` once on a pretended mesh with these axes: every rule is applied, every shape
/// checked, nothing computed.
///
/// # Errors
/// What the run would have met: a forgotten `redistribute`, a dim that does not divide.
pub fn check(
    axes: &[(&'static str, usize)],
    sharding: Sharding,
    dtype: Dtype,
    forward: impl FnOnce(&Params) -> Result<Tensor>,
) -> Result<Report> {
    let scope = Scope::fake(axes, sharding);
    let params = Params::new(&scope, 0, dtype);
    forward(&params)?;
    let all = params.all();
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    Ok(Report {
        local_elements: all.iter().map(|p| count(p.shape())).sum(),
        global_elements: all.iter().map(|p| count(&p.global_shape())).sum(),
        params: all
            .iter()
            .map(|p| Held {
                name: p.name().to_string(),
                global_shape: p.global_shape(),
                shape: p.shape().to_vec(),
                layout: (0..axes.len())
                    .map(|a| format!("{}:{}", axes[a].0, p.layout()[a]))
                    .collect(),
            })
            .collect(),
    })
}
