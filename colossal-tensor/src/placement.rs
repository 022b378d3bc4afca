//! How a tensor lies on a mesh: one placement per mesh axis, and the table that chooses it.
//!
//! | placement | the value on each rank | its gradient |
//! | --- | --- | --- |
//! | `Replicate` | the same; uses differ | `Partial` |
//! | `Invariant` | the same; uses are the same | `Invariant` |
//! | `Shard(dim)` | one slice of `dim` | `Shard(dim)` |
//! | `Partial` | a term of a pending sum | `Replicate` |
//!
//! The duality is that of spmd_types (PyTorch) and JAX: the type of a cotangent is a function of
//! the type of the primal. Every parallelism except the pipeline is a row of [`Sharding`].

use std::ops::{Index, IndexMut};

use colossal_comm::Mesh;

use crate::error::{Error, Result};

/// How a tensor lies along one mesh axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Placement {
    /// The same value on every rank, used differently: its gradient is `Partial`.
    Replicate,
    /// The same value on every rank, used in the same way: its gradient is `Invariant`.
    #[default]
    Invariant,
    /// Each rank holds one equal slice of this dim, in rank order.
    Shard(usize),
    /// Each rank holds a term of the sum that is the value.
    Partial,
}

impl Placement {
    /// The placement of the gradient.
    pub fn dual(self) -> Placement {
        match self {
            Placement::Replicate => Placement::Partial,
            Placement::Partial => Placement::Replicate,
            same => same,
        }
    }
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Placement::Shard(dim) => write!(f, "Shard({dim})"),
            other => write!(f, "{other:?}"),
        }
    }
}

/// The most axes a mesh may have.
pub const MAX_AXES: usize = 6;

/// One placement per mesh axis, in the mesh's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Layout([Placement; MAX_AXES]);

impl Layout {
    /// The placement of the gradient, axis by axis.
    pub fn dual(self) -> Layout {
        Layout(self.0.map(Placement::dual))
    }

    /// This layout with another placement along one axis.
    pub fn with(mut self, axis: usize, placement: Placement) -> Layout {
        self.0[axis] = placement;
        self
    }
}

impl Index<usize> for Layout {
    type Output = Placement;
    fn index(&self, axis: usize) -> &Placement {
        &self.0[axis]
    }
}

impl IndexMut<usize> for Layout {
    fn index_mut(&mut self, axis: usize) -> &mut Placement {
        &mut self.0[axis]
    }
}

/// A named dimension of a parameter, with its global size. The name decides where it is sharded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Entries of the vocabulary.
    Vocab(usize),
    /// Width of the residual stream.
    Embed(usize),
    /// Query heads times head size.
    Heads(usize),
    /// Key/value heads times head size.
    KvHeads(usize),
    /// Width of the feed-forward layer.
    Mlp(usize),
    /// Any other dimension; never sharded.
    Other(usize),
}

impl Dim {
    /// Its global size.
    pub fn size(self) -> usize {
        match self {
            Dim::Vocab(n)
            | Dim::Embed(n)
            | Dim::Heads(n)
            | Dim::KvHeads(n)
            | Dim::Mlp(n)
            | Dim::Other(n) => n,
        }
    }

    fn same_name(self, other: Dim) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&other)
    }
}

/// The places of a model between which activations change their layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Region {
    /// The residual stream, where norms and additions live.
    Residual,
    /// Inside attention, the feed-forward layer and the head.
    TensorParallel,
    /// Every token on every rank, used in the same way: where losses and heads read.
    Whole,
}

/// What one mesh axis does: one row of the table that is a parallelism.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Parameter dims (sizes are ignored) that are sharded along this axis.
    pub shards: Vec<Dim>,
    /// Parameters without such a dim.
    pub rest: Placement,
    /// Inputs and losses: what a batch looks like along this axis.
    pub batch: Placement,
    /// Activations in [`Region::Residual`].
    pub residual: Placement,
    /// Activations in [`Region::TensorParallel`].
    pub parallel: Placement,
    /// Activations in [`Region::Whole`].
    pub whole: Placement,
}

impl Role {
    /// Data parallelism: the batch is sharded, parameters are replicated.
    pub fn data() -> Role {
        let batch = Placement::Shard(0);
        Role {
            shards: vec![],
            rest: Placement::Replicate,
            batch,
            residual: batch,
            parallel: batch,
            whole: batch,
        }
    }

    /// Tensor parallelism in one dimension (Megatron): heads, feed-forward width and vocabulary
    /// are sharded; with `sequence_parallel` the tokens of the residual stream are as well.
    pub fn tensor(sequence_parallel: bool) -> Role {
        let (rest, residual) = match sequence_parallel {
            true => (Placement::Replicate, Placement::Shard(1)),
            false => (Placement::Invariant, Placement::Invariant),
        };
        Role {
            shards: vec![Dim::Vocab(0), Dim::Heads(0), Dim::KvHeads(0), Dim::Mlp(0)],
            rest,
            batch: Placement::Invariant,
            residual,
            parallel: Placement::Replicate,
            whole: Placement::Invariant,
        }
    }

    /// An axis along which nothing differs.
    pub fn idle() -> Role {
        let p = Placement::Invariant;
        Role { shards: vec![], rest: p, batch: p, residual: p, parallel: p, whole: p }
    }
}

/// The map from names to placements: one [`Role`] per mesh axis, in the mesh's order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sharding {
    roles: Vec<Role>,
}

impl Sharding {
    /// One role per axis of the mesh.
    pub fn new(roles: Vec<Role>) -> Sharding {
        Sharding { roles }
    }

    /// The layout of a parameter with these dims, and its local shape.
    ///
    /// # Errors
    /// [`Error::Divide`] when a sharded dim does not divide by its axis.
    pub fn parameter(&self, name: &str, mesh: &Mesh, dims: &[Dim]) -> Result<(Layout, Vec<usize>)> {
        let mut layout = Layout::default();
        let mut shape: Vec<usize> = dims.iter().map(|d| d.size()).collect();
        for (axis, role) in self.roles.iter().enumerate() {
            let (axis_name, ranks) = axis_of(mesh, axis);
            let found =
                dims.iter().position(|d| role.shards.iter().any(|sharded| sharded.same_name(*d)));
            layout[axis] = match found {
                Some(dim) if ranks > 1 => {
                    if !shape[dim].is_multiple_of(ranks) {
                        return Err(Error::Divide {
                            what: format!("parameter {name}"),
                            dim,
                            size: shape[dim],
                            axis: axis_name,
                            ranks,
                        });
                    }
                    shape[dim] /= ranks;
                    Placement::Shard(dim)
                }
                _ => role.rest,
            };
        }
        Ok((layout, shape))
    }

    /// The layout of activations in a region.
    pub fn region(&self, region: Region) -> Layout {
        self.layout(|role| match region {
            Region::Residual => role.residual,
            Region::TensorParallel => role.parallel,
            Region::Whole => role.whole,
        })
    }

    /// The layout of a batch (token ids, targets, masks).
    pub fn batch(&self) -> Layout {
        self.layout(|role| role.batch)
    }

    fn layout(&self, of: impl Fn(&Role) -> Placement) -> Layout {
        let mut layout = Layout::default();
        self.roles.iter().enumerate().for_each(|(axis, role)| layout[axis] = of(role));
        layout
    }
}

/// Name and size of the mesh's axis at an index.
pub(crate) fn axis_of(mesh: &Mesh, index: usize) -> (String, usize) {
    mesh.axes().get(index).map_or_else(|| (format!("#{index}"), 1), |(n, s)| (n.to_string(), *s))
}
