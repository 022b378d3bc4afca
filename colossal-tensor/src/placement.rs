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
pub const MAX_AXES: usize = 8;

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
    /// Entries of the vocabulary. The only dim that a plan may fill up, see [`Sharding::vocabulary`].
    Vocab(usize),
    /// Width of the residual stream.
    Embed(usize),
    /// So many query heads of this size.
    Heads(usize, usize),
    /// So many key/value heads of this size. Fewer than ranks are kept whole on each.
    KvHeads(usize, usize),
    /// Width of the feed-forward layer.
    Mlp(usize),
    /// Experts of a mixture.
    Experts(usize),
    /// Any other dimension; never sharded.
    Other(usize),
}

impl Dim {
    /// Its global size.
    pub fn size(self) -> usize {
        match self {
            Dim::Vocab(n) | Dim::Embed(n) | Dim::Mlp(n) | Dim::Experts(n) | Dim::Other(n) => n,
            Dim::Heads(heads, size) | Dim::KvHeads(heads, size) => heads * size,
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
    /// Where a router reads: the tokens of the residual stream, their width whole.
    Router,
    /// Where experts read: as inside other sub-layers, and gathered where products would gather.
    Experts,
    /// Every token on every rank, used in the same way: where losses and heads read.
    Whole,
}

/// What one mesh axis does: one row of the table that is a parallelism.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// Which dim of a parameter is sharded along this axis.
    pub cut: Cut,
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
    /// Of an axis that cuts tokens everywhere: how attention reaches the others' keys.
    pub context: Option<Context>,
}

/// Which dim of a parameter an axis shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// None.
    Nothing,
    /// The first dim with one of these names (sizes are ignored).
    Named(Vec<Dim>),
    /// The rows of a SUMMA grid: a matrix's input dim, or the vocabulary.
    GridRow,
    /// The columns of a SUMMA grid: a matrix's output dim; where that is the vocabulary, the width.
    GridCol,
    /// The axis of a 3D cube on which heads, feed-forward width and vocabulary lie.
    CubeRow,
    /// The axis of a 3D cube on which the width of the residual stream lies.
    CubeCol,
    /// The third axis of a 3D cube: cuts the output dim once more.
    CubeDepth,
}

impl Cut {
    fn dim(&self, dims: &[Dim]) -> Option<usize> {
        use Dim::{Embed, Experts, Heads, KvHeads, Mlp, Other, Vocab};
        let inner = |d: &Dim| matches!(d, Heads(..) | KvHeads(..) | Mlp(_) | Vocab(_));
        match (self, dims) {
            (Cut::Nothing, _) => None,
            (Cut::Named(names), _) => {
                dims.iter().position(|d| names.iter().any(|name| name.same_name(*d)))
            }
            // Of experts: rows share them out, columns cut the input dim.
            (Cut::GridRow | Cut::CubeRow, [Experts(_), ..]) => Some(0),
            (Cut::GridCol | Cut::CubeCol, [Experts(_), _, _]) => Some(2),
            (Cut::CubeDepth, [Experts(_), ..]) => None,
            (Cut::GridRow, [Vocab(_), _]) => Some(0),
            (Cut::GridRow, [Other(_), _] | [_]) => None,
            (Cut::GridRow, [_, _]) => Some(1),
            (Cut::GridCol, [Vocab(_) | Other(_), _]) => Some(1),
            (Cut::GridCol, [Other(_)]) => None,
            (Cut::GridCol, [_] | [_, _]) => Some(0),
            (Cut::CubeRow, _) => dims.iter().position(inner),
            (Cut::CubeCol, _) => dims.iter().position(|d| matches!(d, Embed(_))),
            (Cut::CubeDepth, [a, b]) => (inner(a) || inner(b)).then_some(0),
            (Cut::GridRow | Cut::GridCol | Cut::CubeDepth, _) => None,
        }
    }
}

/// How attention works along an axis that cuts tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// All-to-alls trade tokens for heads and back (DeepSpeed-Ulysses).
    Ulysses,
    /// Keys and values travel round a ring. With `zigzag` rank r of p holds chunks r and
    /// 2p - 1 - r of each sequence: equal work under a causal mask.
    Ring {
        /// Two chunks a rank instead of one.
        zigzag: bool,
    },
}

impl Role {
    /// Data parallelism: the batch is sharded, parameters are replicated.
    pub fn data() -> Role {
        let batch = Placement::Shard(0);
        Role {
            cut: Cut::Nothing,
            rest: Placement::Replicate,
            batch,
            residual: batch,
            parallel: batch,
            whole: batch,
            context: None,
        }
    }

    /// Expert parallelism: as data parallelism, and experts are sharded.
    pub fn expert() -> Role {
        Role { cut: Cut::Named(vec![Dim::Experts(0)]), ..Role::data() }
    }

    /// Context parallelism: tokens are sharded everywhere, attention communicates.
    pub fn context(kind: Context) -> Role {
        let tokens = Placement::Shard(1);
        Role {
            batch: tokens,
            residual: tokens,
            parallel: tokens,
            whole: tokens,
            context: Some(kind),
            ..Role::data()
        }
    }

    /// Tensor parallelism in one dimension (Megatron): heads, feed-forward width and vocabulary
    /// are sharded; with `sequence_parallel` the tokens of the residual stream are as well.
    pub fn tensor(sequence_parallel: bool) -> Role {
        let (rest, residual) = match sequence_parallel {
            true => (Placement::Replicate, Placement::Shard(1)),
            false => (Placement::Invariant, Placement::Invariant),
        };
        let names = vec![Dim::Vocab(0), Dim::Heads(0, 0), Dim::KvHeads(0, 0), Dim::Mlp(0)];
        Role {
            cut: Cut::Named(names),
            rest,
            batch: Placement::Invariant,
            residual,
            parallel: Placement::Replicate,
            whole: Placement::Invariant,
            context: None,
        }
    }

    /// As `tensor(true)`, but tokens stay cut into the products, which gather and scatter them
    /// in chunks while they compute.
    pub fn tensor_overlapped() -> Role {
        Role { parallel: Placement::Shard(1), ..Role::tensor(true) }
    }

    /// Do products gather and scatter tokens along this axis themselves?
    pub(crate) fn overlaps(&self) -> bool {
        self.context.is_none() && self.parallel == Placement::Shard(1)
    }

    /// Is the width of activations cut along this axis?
    pub(crate) fn cuts_width(&self) -> bool {
        self.residual == Placement::Shard(2)
    }

    /// Tensor parallelism in two dimensions (SUMMA; Optimus, Xu et al., 2021): the roles of the
    /// rows and of the columns of a q×q grid. Activations: batch over rows, width over columns.
    pub fn summa() -> [Role; 2] {
        let row = Role { cut: Cut::GridRow, ..Role::data() };
        [row, Role { cut: Cut::GridCol, ..Role::width() }]
    }

    /// Tensor parallelism in three dimensions (Agarwal et al., 1995; Bian et al., 2021): the
    /// roles of the rows, columns and depth of a q×q×q cube.
    pub fn cube() -> [Role; 3] {
        [
            Role { cut: Cut::CubeRow, ..Role::data() },
            Role { cut: Cut::CubeCol, ..Role::width() },
            Role { cut: Cut::CubeDepth, ..Role::data() },
        ]
    }

    /// The width of activations is cut.
    fn width() -> Role {
        let width = Placement::Shard(2);
        Role {
            batch: Placement::Invariant,
            residual: width,
            parallel: width,
            whole: Placement::Invariant,
            ..Role::data()
        }
    }

    /// An axis along which nothing differs.
    pub fn idle() -> Role {
        let p = Placement::Invariant;
        Role {
            cut: Cut::Nothing,
            rest: p,
            batch: p,
            residual: p,
            parallel: p,
            whole: p,
            context: None,
        }
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

    /// The roles, in the mesh's order.
    pub fn roles(&self) -> &[Role] {
        &self.roles
    }

    /// The layout of a parameter with these dims, and its local shape.
    ///
    /// Key/value heads that are fewer than the ranks are kept whole: each rank reads what its
    /// query heads need.
    ///
    /// # Errors
    /// [`Error::Divide`] when a sharded dim does not divide by its axis.
    pub fn parameter(&self, name: &str, mesh: &Mesh, dims: &[Dim]) -> Result<(Layout, Vec<usize>)> {
        let mut layout = Layout::default();
        let mut shape: Vec<usize> = dims.iter().map(|d| d.size()).collect();
        for (size, dim) in shape.iter_mut().zip(dims) {
            if let Dim::Vocab(entries) = dim {
                *size = self.vocabulary(mesh, *entries);
            }
        }
        for (axis, role) in self.roles.iter().enumerate() {
            let (axis_name, ranks) = axis_of(mesh, axis);
            layout[axis] = match role.cut.dim(dims) {
                Some(dim) if ranks > 1 => {
                    let unit = match dims[dim] {
                        // The depth of a cube cuts what is stored, not what is computed.
                        Dim::Heads(_, size) | Dim::KvHeads(_, size)
                            if role.cut != Cut::CubeDepth =>
                        {
                            size
                        }
                        _ => 1,
                    };
                    let units = shape[dim] / unit;
                    let named = matches!(role.cut, Cut::Named(_)) && !role.overlaps();
                    let few = matches!(dims[dim], Dim::KvHeads(..)) && units < ranks;
                    if few && ranks.is_multiple_of(units) && named {
                        layout[axis] = Placement::Replicate;
                        continue;
                    }
                    if !units.is_multiple_of(ranks) {
                        return Err(Error::Divide {
                            what: match unit {
                                1 => format!("parameter {name}"),
                                _ => format!("parameter {name}, counted in heads"),
                            },
                            dim,
                            size: units,
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

    /// Entries of a vocabulary as this plan holds it: filled up to the next multiple of the ranks
    /// that cut it. Padding is zero, lies behind the last entry, has a logit that no softmax sees
    /// and no gradient, and is left out of files.
    pub fn vocabulary(&self, mesh: &Mesh, entries: usize) -> usize {
        let table = [Dim::Vocab(entries), Dim::Embed(0)];
        let cutting = self.roles.iter().enumerate().filter(|(_, r)| r.cut.dim(&table) == Some(0));
        entries.next_multiple_of(cutting.map(|(axis, _)| axis_of(mesh, axis).1).product())
    }

    /// The layout of activations in a region.
    pub fn region(&self, region: Region) -> Layout {
        self.layout(|role| match region {
            Region::Residual => role.residual,
            Region::TensorParallel => role.parallel,
            Region::Router if role.cuts_width() => Placement::Invariant,
            Region::Router => role.residual,
            Region::Experts if role.overlaps() => Placement::Replicate,
            Region::Experts => role.parallel,
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
