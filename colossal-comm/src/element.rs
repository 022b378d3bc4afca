//! Types that travel, and how they are reduced.

use half::{bf16, f16};

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum, added up in rank order: the same bits on every rank and in every run.
    Sum,
    /// The sum divided by the number of ranks.
    Avg,
    /// The largest.
    Max,
    /// The smallest.
    Min,
}

/// A number that can be sent and reduced. Half-precision types are reduced in f32.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// What values are accumulated in.
    type Acc: Copy + Send;
    /// The name in messages.
    const NAME: &'static str;

    /// To the accumulator.
    fn widen(self) -> Self::Acc;
    /// From the accumulator, rounded.
    fn narrow(acc: Self::Acc) -> Self;
    /// Adds `src` to `acc`, element by element, under `op`.
    fn fold(op: ReduceOp, acc: &mut [Self::Acc], src: &[Self]);
    /// Divides by the number of ranks.
    fn divide(acc: Self::Acc, ranks: usize) -> Self::Acc;
}

macro_rules! element {
    ($($t:ty, $acc:ty, $widen:expr, $narrow:expr, $divide:expr;)*) => { $(
        impl Element for $t {
            type Acc = $acc;
            const NAME: &'static str = stringify!($t);

            #[inline]
            fn widen(self) -> $acc {
                $widen(self)
            }

            #[inline]
            fn narrow(acc: $acc) -> $t {
                $narrow(acc)
            }

            fn fold(op: ReduceOp, acc: &mut [$acc], src: &[$t]) {
                let pairs = acc.iter_mut().zip(src);
                match op {
                    ReduceOp::Sum | ReduceOp::Avg => pairs.for_each(|(a, x)| add(a, $widen(*x))),
                    ReduceOp::Max => pairs.for_each(|(a, x)| {
                        let x = $widen(*x);
                        *a = if x > *a { x } else { *a };
                    }),
                    ReduceOp::Min => pairs.for_each(|(a, x)| {
                        let x = $widen(*x);
                        *a = if x < *a { x } else { *a };
                    }),
                }
            }

            #[inline]
            fn divide(acc: $acc, ranks: usize) -> $acc {
                $divide(acc, ranks)
            }
        }
    )* };
}

/// Integers wrap, as in MPI implementations; floats round.
trait Plus {
    fn plus(self, other: Self) -> Self;
}
macro_rules! plus {
    ($($t:ty: $f:expr),*) => { $(impl Plus for $t {
        #[inline]
        fn plus(self, other: $t) -> $t { $f(self, other) }
    })* };
}
plus!(f32: |a: f32, b| a + b, f64: |a: f64, b| a + b, i8: i8::wrapping_add, u8: u8::wrapping_add,
    i32: i32::wrapping_add, u32: u32::wrapping_add, i64: i64::wrapping_add, u64: u64::wrapping_add);

#[inline]
fn add<T: Plus + Copy>(a: &mut T, x: T) {
    *a = a.plus(x);
}

element! {
    f32, f32, |x| x, |x| x, |x: f32, n| x / n as f32;
    f64, f64, |x| x, |x| x, |x: f64, n| x / n as f64;
    bf16, f32, bf16::to_f32, bf16::from_f32, |x: f32, n| x / n as f32;
    f16, f32, f16::to_f32, f16::from_f32, |x: f32, n| x / n as f32;
    i8, i8, |x| x, |x| x, |x: i8, n| (i64::from(x) / n as i64) as i8;
    u8, u8, |x| x, |x| x, |x: u8, n| (u64::from(x) / n as u64) as u8;
    i32, i32, |x| x, |x| x, |x: i32, n| (i64::from(x) / n as i64) as i32;
    u32, u32, |x| x, |x| x, |x: u32, n| (u64::from(x) / n as u64) as u32;
    i64, i64, |x| x, |x| x, |x: i64, n| x / n as i64;
    u64, u64, |x| x, |x| x, |x: u64, n| x / n as u64;
}
