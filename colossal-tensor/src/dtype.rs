//! The types of numbers a tensor holds.

use half::{bf16, f16};

/// The element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16: eight bits of exponent, eight of precision.
    Bf16,
    /// IEEE half precision.
    F16,
    /// 32-bit signed integer: token ids, positions, indices.
    I32,
    /// 64-bit signed integer, as checkpoints of other systems hold ids.
    I64,
    /// Unsigned byte: masks.
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::U8 => 1,
        }
    }

    /// Does it have gradients?
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::Bf16 | Dtype::F16)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::I32 => "i32",
            Dtype::I64 => "i64",
            Dtype::U8 => "u8",
        })
    }
}

/// A Rust type that is the element of a tensor.
pub trait Element: bytemuck::Pod + colossal_comm::Element {
    /// Its name at run time.
    const DTYPE: Dtype;
}

macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: Dtype = Dtype::$d; })* };
}
element!(f32 => F32, bf16 => Bf16, f16 => F16, i32 => I32, i64 => I64, u8 => U8);

/// Runs `$body` with `$t` bound to the Rust type of a float dtype; integers are an error of `$op`.
macro_rules! float {
    ($op:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $t = f32;
                $body
            }
            $crate::dtype::Dtype::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $t = half::f16;
                $body
            }
            other => Err($crate::error::Error::Dtype {
                op: $op,
                left: other,
                right: $crate::dtype::Dtype::F32,
            }),
        }
    };
}
pub(crate) use float;

/// Runs `$body` with `$t` bound to the Rust type of any dtype.
macro_rules! any {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $t = f32;
                $body
            }
            $crate::dtype::Dtype::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::dtype::Dtype::I32 => {
                type $t = i32;
                $body
            }
            $crate::dtype::Dtype::I64 => {
                type $t = i64;
                $body
            }
            $crate::dtype::Dtype::U8 => {
                type $t = u8;
                $body
            }
        }
    };
}
pub(crate) use any;
