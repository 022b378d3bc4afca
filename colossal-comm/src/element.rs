//! Types that travel, and how they are reduced.

use half::slice::HalfFloatSliceExt;
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

impl ReduceOp {
    /// All of them.
    pub const ALL: [ReduceOp; 4] = [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min];
}

/// The type of an element, as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the variants are the names of the types")]
#[repr(u8)]
pub enum DType {
    F32,
    F64,
    Bf16,
    F16,
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
}

/// What every engine knows of a type: its name, its size, and how to reduce it.
struct Row {
    name: &'static str,
    size: usize,
    reduce: Reduce,
}

/// Reduces `len` elements of all sources, in their order, into every target.
type Reduce = unsafe fn(ReduceOp, &[*const u8], &[*mut u8], usize);

impl DType {
    /// All of them.
    pub const ALL: [DType; 10] = [
        DType::F32,
        DType::F64,
        DType::Bf16,
        DType::F16,
        DType::I8,
        DType::U8,
        DType::I32,
        DType::U32,
        DType::I64,
        DType::U64,
    ];

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        self.row().size
    }

    /// Reduces `len` elements of all `sources`, in their order, and writes the result to every
    /// target.
    ///
    /// # Safety
    /// Sources and targets are addresses of `len` elements of this type, aligned; nobody else
    /// touches the targets or writes the sources meanwhile. A target may be a source; otherwise
    /// they do not overlap.
    pub(crate) unsafe fn reduce(
        self,
        op: ReduceOp,
        sources: &[*const u8],
        targets: &[*mut u8],
        len: usize,
    ) {
        // SAFETY: the caller's contract is that of the function in the table.
        unsafe { (self.row().reduce)(op, sources, targets, len) }
    }
}

/// A number that can be sent and reduced. Half-precision types are reduced in f32 and rounded
/// once; integers wrap.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// The type as a value.
    const TYPE: DType;
    /// The name in messages.
    const NAME: &'static str;
}

/// Arithmetic of a type: what it is accumulated in, and how it gets there and back.
trait Number: Element {
    type Acc: Copy;
    fn widen(from: &[Self], to: &mut [Self::Acc]);
    fn narrow(from: &[Self::Acc], to: &mut [Self]);
    fn plus(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn larger(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn smaller(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    fn divide(a: Self::Acc, ranks: usize) -> Self::Acc;
    const ZERO: Self::Acc;
}

macro_rules! numbers {
    ($($t:ty, $variant:ident, $acc:ty, $zero:expr, $widen:expr, $narrow:expr, $plus:expr, $divide:expr;)*) => {
        $(
        impl Element for $t {
            const TYPE: DType = DType::$variant;
            const NAME: &'static str = stringify!($t);
        }
        impl Number for $t {
            type Acc = $acc;
            const ZERO: $acc = $zero;
            #[inline(always)]
            fn widen(from: &[$t], to: &mut [$acc]) { $widen(from, to) }
            #[inline(always)]
            fn narrow(from: &[$acc], to: &mut [$t]) { $narrow(from, to) }
            #[inline(always)]
            fn plus(a: $acc, b: $acc) -> $acc { $plus(a, b) }
            #[inline(always)]
            fn larger(a: $acc, b: $acc) -> $acc { if b > a { b } else { a } }
            #[inline(always)]
            fn smaller(a: $acc, b: $acc) -> $acc { if b < a { b } else { a } }
            #[inline(always)]
            fn divide(a: $acc, ranks: usize) -> $acc { $divide(a, ranks) }
        }
        )*
        const TABLE: [Row; 10] = [
            $(Row { name: stringify!($t), size: size_of::<$t>(), reduce: reduce::<$t> },)*
        ];
    };
}

// In the order of `DType`.
numbers! {
    f32, F32, f32, 0.0, copy, copy, |a: f32, b| a + b, |x: f32, n| x / n as f32;
    f64, F64, f64, 0.0, copy, copy, |a: f64, b| a + b, |x: f64, n| x / n as f64;
    bf16, Bf16, f32, 0.0, widen_bf16, narrow_bf16, |a: f32, b| a + b, |x: f32, n| x / n as f32;
    f16, F16, f32, 0.0, |a: &[f16], b: &mut [f32]| a.convert_to_f32_slice(b),
        |a: &[f32], b: &mut [f16]| b.convert_from_f32_slice(a), |a: f32, b| a + b,
        |x: f32, n| x / n as f32;
    i8, I8, i8, 0, copy, copy, i8::wrapping_add, |x: i8, n| (i64::from(x) / n as i64) as i8;
    u8, U8, u8, 0, copy, copy, u8::wrapping_add, |x: u8, n| (u64::from(x) / n as u64) as u8;
    i32, I32, i32, 0, copy, copy, i32::wrapping_add, |x: i32, n| (i64::from(x) / n as i64) as i32;
    u32, U32, u32, 0, copy, copy, u32::wrapping_add, |x: u32, n| (u64::from(x) / n as u64) as u32;
    i64, I64, i64, 0, copy, copy, i64::wrapping_add, |x: i64, n| x / n as i64;
    u64, U64, u64, 0, copy, copy, u64::wrapping_add, |x: u64, n| x / n as u64;
}

#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    to.copy_from_slice(from);
}

#[inline(always)]
fn widen_bf16(from: &[bf16], to: &mut [f32]) {
    for (x, y) in from.iter().zip(to) {
        *y = f32::from_bits(u32::from(x.to_bits()) << 16);
    }
}

/// To the nearest, ties to even, without a branch: compilers turn it into vectors.
#[inline(always)]
fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
    for (x, y) in from.iter().zip(to) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x0040_0000;
        *y = bf16::from_bits(((if x.is_nan() { quiet } else { rounded }) >> 16) as u16);
    }
}

/// Elements that are reduced at a time: their accumulators stay in registers.
const TILE: usize = 64;

/// As [`DType::reduce`], with the widest vectors that the machine has.
unsafe fn reduce<T: Number>(op: ReduceOp, sources: &[*const u8], targets: &[*mut u8], len: usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has AVX2; the rest is the caller's contract.
        return unsafe { reduce_avx2::<T>(op, sources, targets, len) };
    }
    // SAFETY: the caller's contract.
    unsafe { reduce_by::<T>(op, sources, targets, len) }
}

/// # Safety
/// The machine has AVX2, and [`DType::reduce`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn reduce_avx2<T: Number>(
    op: ReduceOp,
    sources: &[*const u8],
    targets: &[*mut u8],
    len: usize,
) {
    // SAFETY: the caller's contract.
    unsafe { reduce_by::<T>(op, sources, targets, len) }
}

/// # Safety
/// [`DType::reduce`].
#[inline(always)]
unsafe fn reduce_by<T: Number>(
    op: ReduceOp,
    sources: &[*const u8],
    targets: &[*mut u8],
    len: usize,
) {
    let ranks = sources.len();
    // SAFETY: the caller's contract, four times.
    unsafe {
        match op {
            ReduceOp::Sum => reduce_tiles::<T>(sources, targets, len, T::plus, |a| a),
            ReduceOp::Avg => {
                reduce_tiles::<T>(sources, targets, len, T::plus, |a| T::divide(a, ranks));
            }
            ReduceOp::Max => reduce_tiles::<T>(sources, targets, len, T::larger, |a| a),
            ReduceOp::Min => reduce_tiles::<T>(sources, targets, len, T::smaller, |a| a),
        }
    }
}

/// # Safety
/// [`DType::reduce`].
#[inline(always)]
unsafe fn reduce_tiles<T: Number>(
    sources: &[*const u8],
    targets: &[*mut u8],
    len: usize,
    fold: impl Fn(T::Acc, T::Acc) -> T::Acc,
    last: impl Fn(T::Acc) -> T::Acc,
) {
    let tile = |at: usize, n: usize| {
        let (mut acc, mut wide) = ([T::ZERO; TILE], [T::ZERO; TILE]);
        let (acc, wide) = (&mut acc[..n], &mut wide[..n]);
        // SAFETY: by contract every source holds `len` elements that nobody writes now.
        let read = |s: *const u8| unsafe { std::slice::from_raw_parts(s.cast::<T>().add(at), n) };
        T::widen(read(sources[0]), acc);
        for source in &sources[1..] {
            T::widen(read(*source), wide);
            acc.iter_mut().zip(wide.iter()).for_each(|(a, x)| *a = fold(*a, *x));
        }
        acc.iter_mut().for_each(|a| *a = last(*a));
        for target in targets {
            // SAFETY: by contract the target holds `len` elements that are ours; no slice of a
            // source is alive.
            let to = unsafe { std::slice::from_raw_parts_mut(target.cast::<T>().add(at), n) };
            T::narrow(acc, to);
        }
    };
    let whole = len - len % TILE;
    for at in (0..whole).step_by(TILE) {
        tile(at, TILE);
    }
    if whole < len {
        tile(whole, len - whole);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_types() {
        for (i, dtype) in DType::ALL.iter().enumerate() {
            assert_eq!(*dtype as usize, i);
            assert_eq!(format!("{dtype:?}").to_lowercase(), dtype.name());
        }
    }

    #[test]
    fn bf16_rounds_as_the_library_does() {
        let mut x = 0x3f80_0001u32;
        for _ in 0..100_000 {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(x);
            let (mut narrow, mut wide) = ([bf16::ZERO], [0.0f32]);
            narrow_bf16(&[value], &mut narrow);
            assert_eq!(narrow[0].to_bits(), bf16::from_f32(value).to_bits(), "{value}");
            widen_bf16(&narrow, &mut wide);
            assert!(wide[0] == narrow[0].to_f32() || value.is_nan());
        }
    }
}
