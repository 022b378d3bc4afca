//! Blocks of rows copied from and to anywhere, sums of neighbours, dropout: what is between the
//! large kernels of a model.

use bytemuck::Pod;

use crate::elementwise::check;
use crate::float::Float;
use crate::profile;
use crate::threads::{Parts, parallel_for};

/// Copies `[outer, inner]` rows of `width` elements: row `(i, j)` lies `i * strides[0] + j *
/// strides[1]` elements into `x` (`from`) and into `y` (`to`). A stride of 0 in `from` repeats.
///
/// ```
/// # use colossal_kernels::copy_block;
/// let mut y = [0; 4];
/// // The second of two columns of pairs, each pair of it twice, would be `[2, 1]` rows of stride 4.
/// copy_block(&[1, 2, 3, 4, 5, 6, 7, 8][2..], [4, 0], [2, 1, 2], &mut y, [2, 0]);
/// assert_eq!(y, [3, 4, 7, 8]);
/// ```
///
/// # Panics
/// When a row reaches beyond its slice.
pub fn copy_block<T: Pod + Send + Sync>(
    x: &[T],
    from: [usize; 2],
    sizes: [usize; 3],
    y: &mut [T],
    to: [usize; 2],
) {
    check_block(x.len(), from, sizes, y.len(), to);
    let [outer, inner, width] = sizes;
    for i in 0..outer {
        for j in 0..inner {
            let (source, target) = (i * from[0] + j * from[1], i * to[0] + j * to[1]);
            y[target..target + width].copy_from_slice(&x[source..source + width]);
        }
    }
}

/// Do the rows of [`copy_block`] lie within their slices?
pub(crate) fn check_block(
    x: usize,
    from: [usize; 2],
    [outer, inner, width]: [usize; 3],
    y: usize,
    to: [usize; 2],
) {
    if outer * inner * width > 0 {
        let end = |s: [usize; 2]| (outer - 1) * s[0] + (inner - 1) * s[1] + width;
        assert!(end(from) <= x, "copy_block: rows end at {} of {x}", end(from));
        assert!(end(to) <= y, "copy_block: rows end at {} of {y}", end(to));
    }
}

/// `y[i] = x[i]` to row `index[i]` of `y`, rows of `width`; others keep what they hold. No index
/// occurs twice.
pub fn scatter_rows<T: Float>(x: &[T], index: &[i32], width: usize, y: &mut [T]) {
    assert_eq!(x.len(), index.len() * width, "scatter_rows: x must have one row per index");
    for (x, at) in x.chunks_exact(width.max(1)).zip(index) {
        let at = usize::try_from(*at).unwrap_or(usize::MAX).saturating_mul(width);
        y[at..at + width].copy_from_slice(x);
    }
}

/// `y[i, c] = ` the sum over `t` of `x[i, t, c]`, `x [.., times, width]`.
pub fn sum_groups<T: Float>(x: &[T], times: usize, width: usize, y: &mut [T]) {
    let _span = profile::moves::<T>("sum_groups", x.len(), 2);
    check("sum_groups", x.len(), y.len() * times);
    let groups = x.chunks_exact((times * width).max(1));
    for (x, y) in groups.zip(y.chunks_exact_mut(width.max(1))) {
        for (c, y) in y.iter_mut().enumerate() {
            *y = T::from_f32((0..times).map(|t| x[t * width + c].to_f32()).sum());
        }
    }
}

/// Columns `from ..` of rows of `width` become `value`.
pub fn fill_columns<T: Float>(y: &mut [T], width: usize, from: usize, value: T) {
    for row in y.chunks_exact_mut(width.max(1)) {
        row[from.min(width)..].fill(value);
    }
}

/// 64 random bits at position `index` of the stream `key`: two rounds of SplitMix64's finaliser.
pub fn random_bits(key: u64, index: u64) -> u64 {
    mix(key ^ mix(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Zeroes each element with probability `p` and scales the others by `1 / (1 - p)`. Element `c` of
/// row `r` is dropped if [`random_bits`]`(keys[r], first[r] + c)` say so: the mask is a function of
/// the place, and drawn again for the gradient.
pub fn dropout<T: Float>(x: &[T], keys: &[u64], first: &[u64], width: usize, p: f32, y: &mut [T]) {
    let _span = profile::moves::<T>("dropout", x.len(), 2);
    check_dropout(x.len(), keys.len(), first.len(), width, y.len());
    let (least, keep) = (threshold(p), 1.0 / (1.0 - p));
    let parts = Parts::new(y);
    parallel_for(keys.len(), (8192 / width.max(1)).max(1), |rows| {
        for r in rows {
            // SAFETY: each row belongs to one piece.
            let y = unsafe { parts.range(r * width..(r + 1) * width) };
            for (c, (y, x)) in y.iter_mut().zip(&x[r * width..]).enumerate() {
                let kept = random_bits(keys[r], first[r] + c as u64) >> 11 >= least;
                *y = T::from_f32(if kept { x.to_f32() * keep } else { 0.0 });
            }
        }
    });
}

/// The 53 bits below which an element is dropped.
pub(crate) fn threshold(p: f32) -> u64 {
    (f64::from(p) * (1u64 << 53) as f64).ceil() as u64
}

pub(crate) fn check_dropout(x: usize, keys: usize, first: usize, width: usize, y: usize) {
    check("dropout", x, y);
    check("dropout", keys, first);
    assert_eq!(x, keys * width, "dropout: x must have one row of {width} per key");
}
