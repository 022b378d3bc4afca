//! Rotary position embedding, half-split: channel `i` turns with channel `i + head_dim / 2`.

use crate::float::Float;
use crate::isa::simd;
use crate::profile;
use crate::threads::rows;

/// Rotates `x [tokens, heads, head_dim]`; `cos` and `sin` are `[positions, head_dim / 2]`.
pub fn rope<T: Float>(
    x: &[T],
    positions: &[i32],
    cos: &[f32],
    sin: &[f32],
    heads: usize,
    head_dim: usize,
    y: &mut [T],
) {
    let _span = profile::moves::<T>("rope", x.len(), 2);
    rotate(x, positions, cos, sin, heads, head_dim, 1.0, y);
}

/// The inverse rotation: the gradient of [`rope`].
pub fn rope_backward<T: Float>(
    dy: &[T],
    positions: &[i32],
    cos: &[f32],
    sin: &[f32],
    heads: usize,
    head_dim: usize,
    dx: &mut [T],
) {
    let _span = profile::moves::<T>("rope_backward", dy.len(), 2);
    rotate(dy, positions, cos, sin, heads, head_dim, -1.0, dx);
}

fn rotate<T: Float>(
    x: &[T],
    positions: &[i32],
    cos: &[f32],
    sin: &[f32],
    heads: usize,
    head_dim: usize,
    sign: f32,
    y: &mut [T],
) {
    let row = heads * head_dim;
    let half = head_dim / 2;
    assert_eq!(x.len(), positions.len() * row, "rope: x must be [tokens, heads, head_dim]");
    assert_eq!(x.len(), y.len(), "rope: y must be as long as x");
    simd! { fn head<T: Float>(x: &[T], c: &[f32], s: &[f32], sign: f32, y: &mut [T]) {
        let half = c.len();
        let (x1, x2) = x.split_at(half);
        let (y1, y2) = y.split_at_mut(half);
        for i in 0..half.min(s.len()).min(x1.len()).min(x2.len()).min(y1.len()).min(y2.len()) {
            let (a, b, c, s) = (x1[i].to_f32(), x2[i].to_f32(), c[i], sign * s[i]);
            y1[i] = T::from_f32(a * c - b * s);
            y2[i] = T::from_f32(b * c + a * s);
        }
    } }
    rows(x, row, y, row, |first, x, y| {
        for (t, (x, y)) in x.chunks_exact(row).zip(y.chunks_exact_mut(row)).enumerate() {
            let at = positions[first + t] as usize * half;
            let (c, s) = (&cos[at..at + half], &sin[at..at + half]);
            for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
                head(x, c, s, sign, y);
            }
        }
    });
}
