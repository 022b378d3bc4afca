//! What can go wrong with a tensor: which op, and both sides of the disagreement.

use crate::dtype::Dtype;
use crate::placement::Layout;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An operation that could not be done, named together with its operands.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No rule of the op covers these placements. Usually a `redistribute` is missing before it.
    #[error(
        "{op} has no rule for [{}] along {axis}; redistribute an operand first",
        operands.iter().map(|p| p.to_string()).collect::<Vec<_>>().join(", ")
    )]
    Layout {
        /// The op that was refused.
        op: &'static str,
        /// The mesh axis along which the placements do not fit.
        axis: String,
        /// The placement of each operand along that axis.
        operands: Vec<crate::placement::Placement>,
    },
    /// A move between two placements that is not a redistribution.
    #[error("redistribute cannot go from {from} to {to} along {axis}: {reason}")]
    Redistribute {
        /// The mesh axis.
        axis: String,
        /// Placement of the tensor.
        from: crate::placement::Placement,
        /// Placement asked for.
        to: crate::placement::Placement,
        /// Why, and what would work.
        reason: &'static str,
    },
    /// Shapes that do not fit together.
    #[error("{op}: shapes {left:?} and {right:?} do not fit: {reason}")]
    Shape {
        /// The op that was refused.
        op: &'static str,
        /// Shape of the first operand.
        left: Vec<usize>,
        /// Shape of the second operand, or the shape wanted.
        right: Vec<usize>,
        /// What would fit.
        reason: &'static str,
    },
    /// Types that do not fit together.
    #[error("{op}: dtypes {left} and {right} do not fit; cast one with to_dtype")]
    Dtype {
        /// The op that was refused.
        op: &'static str,
        /// Dtype of the first operand.
        left: Dtype,
        /// Dtype of the second operand, or the dtype wanted.
        right: Dtype,
    },
    /// A dimension that does not divide by the size of the mesh axis it is sharded along.
    #[error(
        "{what}: dim {dim} of size {size} does not divide by the {ranks} ranks of axis {axis}; \
         choose a degree that divides it"
    )]
    Divide {
        /// The tensor or parameter.
        what: String,
        /// Which dim.
        dim: usize,
        /// Its size.
        size: usize,
        /// The mesh axis.
        axis: String,
        /// Its size.
        ranks: usize,
    },
    /// A tensor of a pretended mesh has no values.
    #[error("{0}: the tensor belongs to a pretended mesh (fake::check) and has no values")]
    Fake(&'static str),
    /// A backward pass that cannot start or was run twice.
    #[error("backward: {0}")]
    Backward(String),
    /// A parameter that is missing, or whose payload is in use.
    #[error("parameter {name}: {reason}")]
    Param {
        /// Its full name.
        name: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A checkpoint file that is missing, truncated or of another shape.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A collective failed: a rank is missing, dead, or called something else.
    #[error("communication: {0}")]
    Comm(String),
    /// A GPU could not do it.
    #[error(transparent)]
    Cuda(#[from] colossal_kernels::cuda::Error),
    /// Operands on different devices.
    #[error("{op}: operands on {left} and {right}; build both under one scope")]
    Device {
        /// The op that was refused.
        op: &'static str,
        /// Device of the first operand.
        left: String,
        /// Device of the second operand.
        right: String,
    },
    /// Anything a caller's own code refuses inside a layer or model.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// Is this a forgotten `redistribute`?
    pub fn is_layout(&self) -> bool {
        matches!(self, Error::Layout { .. } | Error::Redistribute { .. })
    }

    #[cold]
    pub(crate) fn layout(
        op: &'static str,
        axis: &str,
        operands: &[&Layout],
        index: usize,
    ) -> Error {
        let operands = operands.iter().map(|l| l[index]).collect();
        Error::Layout { op, axis: axis.to_string(), operands }
    }

    #[cold]
    pub(crate) fn shape(
        op: &'static str,
        left: &[usize],
        right: &[usize],
        reason: &'static str,
    ) -> Error {
        Error::Shape { op, left: left.to_vec(), right: right.to_vec(), reason }
    }
}

pub(crate) fn comm(error: colossal_comm::Error) -> Error {
    Error::Comm(error.to_string())
}
