//! Products with int8 weights, for inference: `y = x wᵀ + bias`.
//!
//! Weights are rounded once, symmetrically, with a scale per output channel; a row of activations
//! is rounded as it comes, with a scale of its own (dynamic quantisation, as in LLM.int8 without its
//! outliers; Dettmers et al., 2022). Products and sums are exact in i32. Of the largest value of
//! its row, an element is off by 1/254 at most.
//!
//! The layout is that of `vpdpbusd`: panels of 16 channels, in each of which four consecutive
//! depths of all channels lie together, so that one vector of weights meets four activations. That
//! instruction multiplies unsigned by signed: activations are given to it with 128 added, and what
//! that adds to the sum is known beforehand. AVX2 has `vpmaddubsw`, whose pairs saturate in i16
//! at large unsigned values; it is given `|w|` and `sign(w) x`, whose pairs fit.

use std::sync::{Arc, Mutex};

use crate::cuda::{self, Device, There};
use crate::float::Float;
use crate::gemm::with_workspace;
use crate::isa::simd;
use crate::memory::Block;
use crate::profile::{self, Work};
use crate::threads::{Parts, parallel_for};

/// Channels of a panel.
const PANEL: usize = 16;
/// Depths that lie together.
const DEPTHS: usize = 4;
/// The deepest product whose sums fit an i32.
const DEEPEST: usize = i32::MAX as usize / (255 * 127);
/// Rows and panels of the largest tile.
const ROWS: usize = 6;
const PANELS: usize = 4;

/// A weight matrix `[n, k]` in int8, packed.
#[derive(Debug)]
pub struct Int8Matrix {
    n: usize,
    k: usize,
    panels: Block,
    /// Of each channel, padded to whole panels, as are the next.
    scales: Vec<f32>,
    /// `128 * sum of weights` of each channel.
    offsets: Vec<i32>,
    /// Copies on devices.
    there: Mutex<Vec<Arc<There>>>,
}

impl Int8Matrix {
    /// Rounds the rows of `w [n, k]`, each to 255 levels of its own.
    ///
    /// # Panics
    /// When `w` is not `n x k`, or is deeper than an i32 can sum (66 thousand).
    pub fn quantize<T: Float>(w: &[T], n: usize, k: usize) -> Int8Matrix {
        assert_eq!(w.len(), n * k, "int8: a matrix of {n} x {k}");
        assert!(k <= DEEPEST, "int8: a depth of {k} is beyond {DEEPEST}, what an i32 can sum");
        let padded = n.next_multiple_of(PANEL);
        let steps = k.div_ceil(DEPTHS);
        let size = steps * DEPTHS * PANEL;
        let mut panels = Block::zeroed(padded / PANEL * size);
        let (mut scales, mut offsets) = (vec![0.0f32; padded], vec![0i32; padded]);
        let parts = Parts::new(panels.bytes_mut(padded / PANEL * size));
        let (scale_parts, offset_parts) = (Parts::new(&mut scales), Parts::new(&mut offsets));
        parallel_for(padded / PANEL, 1, |range| {
            for p in range {
                let channels = p * PANEL..(p + 1) * PANEL;
                // SAFETY: each panel, with its channels, belongs to one piece.
                let panel = unsafe { parts.range(p * size..(p + 1) * size) };
                // SAFETY: as above.
                let scales = unsafe { scale_parts.range(channels.clone()) };
                // SAFETY: as above.
                let offsets = unsafe { offset_parts.range(channels.clone()) };
                for (c, row) in channels
                    .take_while(|c| *c < n)
                    .enumerate()
                    .map(|(c, i)| (c, &w[i * k..(i + 1) * k]))
                {
                    let largest = row.iter().fold(0.0f32, |m, x| m.max(x.to_f32().abs()));
                    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                    let mut sum = 0;
                    for (l, x) in row.iter().enumerate() {
                        let q = (x.to_f32() * inverse).round_ties_even() as i8;
                        panel[(l / DEPTHS * PANEL + c) * DEPTHS + l % DEPTHS] = q as u8;
                        sum += i32::from(q);
                    }
                    scales[c] = largest / 127.0;
                    offsets[c] = 128 * sum;
                }
            }
        });
        Int8Matrix { n, k, panels, scales, offsets, there: Mutex::default() }
    }

    /// Output channels.
    pub fn rows(&self) -> usize {
        self.n
    }

    /// Depth.
    pub fn cols(&self) -> usize {
        self.k
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.panels.capacity() + 8 * self.scales.len()
    }

    /// The weight `(row, col)` as it was rounded.
    pub fn get(&self, row: usize, col: usize) -> f32 {
        assert!(row < self.n && col < self.k);
        let (p, c) = (row / PANEL, row % PANEL);
        let at = p * self.panel() + (col / DEPTHS * PANEL + c) * DEPTHS + col % DEPTHS;
        f32::from(self.data()[at] as i8) * self.scales[row]
    }

    /// The scales of its rows.
    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales[..self.n]
    }

    /// A row as it was rounded, to the beginning of `to`.
    pub(crate) fn unpack(&self, row: usize, to: &mut [i8]) {
        let at = row / PANEL * self.panel() + row % PANEL * DEPTHS;
        let panel = &self.data()[at..];
        for (l, x) in to[..self.k].iter_mut().enumerate() {
            *x = panel[l / DEPTHS * PANEL * DEPTHS + l % DEPTHS] as i8;
        }
    }

    /// Its copy on a device, made at first.
    pub(crate) fn there(
        &self,
        device: &Device,
        make: impl FnOnce() -> cuda::Result<There>,
    ) -> cuda::Result<Arc<There>> {
        let mut all = self.there.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(there) = all.iter().find(|t| t.is_on(device)) {
            return Ok(there.clone());
        }
        let there = Arc::new(make()?);
        all.push(there.clone());
        Ok(there)
    }

    /// Bytes of a panel.
    fn panel(&self) -> usize {
        self.steps() * DEPTHS * PANEL
    }

    fn steps(&self) -> usize {
        self.k.div_ceil(DEPTHS)
    }

    fn data(&self) -> &[u8] {
        self.panels.bytes(self.scales.len() / PANEL * self.panel())
    }
}

/// `y [m, n] = x [m, k] wᵀ + bias`, the rows of `x` rounded to int8 as they come.
///
/// ```
/// use colossal_kernels::{Int8Matrix, gemm_int8};
/// let w = Int8Matrix::quantize(&[1.0f32, 0.0, 0.0, 2.0], 2, 2);
/// let mut y = [0.0f32; 2];
/// gemm_int8(&[0.5f32, 0.25], 1, &w, None, &mut y);
/// assert!((y[0] - 0.5).abs() < 0.004 && (y[1] - 0.5).abs() < 0.004);
/// ```
///
/// # Panics
/// When lengths do not fit.
pub fn gemm_int8<T: Float>(x: &[T], m: usize, w: &Int8Matrix, bias: Option<&[T]>, y: &mut [T]) {
    let (n, k, steps) = (w.n, w.k, w.steps());
    assert!(
        x.len() == m * k && y.len() == m * n && bias.is_none_or(|b| b.len() == n),
        "gemm_int8: [{}] x [{n}, {k}] in {m} rows does not give [{}]",
        x.len(),
        y.len()
    );
    let _span = profile::span_in("gemm", "int8", [m, n, k], || Work {
        flops: 2 * (m * n * k) as u64,
        bytes: (n * k + m * (n + k) * size_of::<T>()) as u64,
    });
    let path = Path::of();
    // Rows of whole steps, in bytes; then their scales.
    let row = steps * DEPTHS;
    with_workspace(m * (steps + 1), |space| {
        let (rows, scales) = space.split_at_mut(m * steps);
        let rows: &mut [u8] = bytemuck::cast_slice_mut(rows);
        let (row_parts, scale_parts) = (Parts::new(&mut *rows), Parts::new(&mut *scales));
        parallel_for(m, (1 << 16) / k.max(1) + 1, |range| {
            for i in range {
                // SAFETY: each row belongs to one piece.
                let (to, scale) = unsafe {
                    (row_parts.range(i * row..(i + 1) * row), scale_parts.range(i..i + 1))
                };
                scale[0] = round_row(&x[i * k..(i + 1) * k], to, path.offset());
            }
        });
        let (rows, scales) = (&*rows, &*scales);
        let out = Parts::new(y);
        let panels = w.scales.len() / PANEL;
        let quads = panels.div_ceil(PANELS);
        // Tiles of about as many rows: one of a single row takes nearly as long as one of three.
        let high = m.div_ceil(m.div_ceil(path.rows()).max(1)).max(1);
        let grain = (1 << 18) / (w.panel() * PANELS * m.max(1)).max(1) + 1;
        parallel_for(quads, grain, |range| {
            let mut sums = [[[0i32; PANEL]; PANELS]; ROWS];
            for first in range.map(|quad| quad * PANELS) {
                let count = PANELS.min(panels - first);
                for i in (0..m).step_by(high) {
                    let held = high.min(m - i);
                    path.tile(&rows[i * row..(i + held) * row], held, w, first, count, &mut sums);
                    for (r, sums) in sums.iter().enumerate().take(held) {
                        let columns = first * PANEL..((first + count) * PANEL).min(n);
                        let at = (i + r) * n;
                        // SAFETY: every element of y is written by one piece.
                        let y = unsafe { out.range(at + columns.start..at + columns.end) };
                        let offsets = match path.offset() {
                            0 => None,
                            _ => Some(&w.offsets[columns.clone()]),
                        };
                        finish(
                            &sums.as_flattened()[..columns.len()],
                            offsets,
                            scales[i + r],
                            &w.scales[columns.clone()],
                            bias.map(|b| &b[columns.clone()]),
                            y,
                        );
                    }
                }
            }
        });
    });
}

simd! {
    /// Rounds a row to -127 ..= 127, plus `offset`; its scale.
    fn round_row<T: Float>(x: &[T], out: &mut [u8], offset: i32) -> f32 {
        let mut lanes = [0.0f32; 16];
        let (x16, rest) = x.as_chunks::<16>();
        for x in x16 {
            for l in 0..16 {
                lanes[l] = lanes[l].max(x[l].to_f32().abs());
            }
        }
        let largest = lanes.iter().copied().fold(0.0, f32::max);
        let largest = rest.iter().fold(largest, |m, x| m.max(x.to_f32().abs()));
        // 1.5 * 2^23: adding it rounds to an integer, in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        for (o, x) in out.iter_mut().zip(x) {
            let q = (x.to_f32() * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
            *o = (q + offset) as u8;
        }
        out[x.len()..].fill(offset as u8);
        largest / 127.0
    }
}

simd! {
    /// `y = (sum - offset) * scale * scales + bias`.
    fn finish<T: Float>(sums: &[i32], offsets: Option<&[i32]>, scale: f32, scales: &[f32], bias: Option<&[T]>, y: &mut [T]) {
        let value = |sum: i32, s: f32| sum as f32 * (scale * s);
        match (offsets, bias) {
            (Some(offsets), None) => {
                for (((y, sum), o), s) in y.iter_mut().zip(sums).zip(offsets).zip(scales) {
                    *y = T::from_f32(value(sum - o, *s));
                }
            }
            _ => {
                for (j, y) in y.iter_mut().enumerate() {
                    let sum = sums[j] - offsets.map_or(0, |o| o[j]);
                    *y = T::from_f32(value(sum, scales[j]) + bias.map_or(0.0, |b| b[j].to_f32()));
                }
            }
        }
    }
}

/// The instructions of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Path {
    #[cfg(target_arch = "x86_64")]
    fn of() -> Path {
        use crate::isa::{Isa, isa};
        match isa() {
            Isa::Portable => Path::Portable,
            Isa::Avx512 | Isa::Avx512Bf16 if is_x86_feature_detected!("avx512vnni") => Path::Vnni,
            _ => Path::Avx2,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of() -> Path {
        Path::Portable
    }

    /// What is added to activations.
    fn offset(self) -> i32 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Path::Vnni => 128,
            _ => 0,
        }
    }

    /// Rows of a tile.
    fn rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Path::Vnni => ROWS,
            _ => 4,
        }
    }

    /// Sums of `held` rows with `count` panels from `first` on.
    fn tile(
        self,
        rows: &[u8],
        held: usize,
        w: &Int8Matrix,
        first: usize,
        count: usize,
        sums: &mut [[[i32; PANEL]; PANELS]; ROWS],
    ) {
        let (size, steps) = (w.panel(), w.steps());
        assert_eq!(rows.len(), held * steps * DEPTHS);
        let panels = &w.data()[first * size..(first + count) * size];
        match self {
            Path::Portable => {
                for (row, sums) in rows.chunks(steps * DEPTHS).zip(sums) {
                    for (panel, sums) in panels.chunks(size).zip(sums) {
                        *sums = plain(row, panel);
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => {
                for (p, panel) in panels.chunks(size).enumerate() {
                    // SAFETY: the machine has AVX2; `held` rows and a panel of `steps` steps.
                    unsafe {
                        match held {
                            1 => x86::avx2::<1>(rows.as_ptr(), panel.as_ptr(), steps, p, sums),
                            2 => x86::avx2::<2>(rows.as_ptr(), panel.as_ptr(), steps, p, sums),
                            3 => x86::avx2::<3>(rows.as_ptr(), panel.as_ptr(), steps, p, sums),
                            _ => x86::avx2::<4>(rows.as_ptr(), panel.as_ptr(), steps, p, sums),
                        }
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Path::Vnni => {
                let (x, w) = (rows.as_ptr(), panels.as_ptr());
                macro_rules! call {
                    ($($r:literal $p:literal),*) => {
                        match (held, count) {
                            // SAFETY: the machine has AVX-512 VNNI; so many rows and panels.
                            $(($r, $p) => unsafe { x86::vnni::<$r, $p>(x, w, steps, sums) },)*
                            _ => unreachable!("at most {ROWS} rows and {PANELS} panels"),
                        }
                    };
                }
                call!(
                    1 1, 1 2, 1 3, 1 4, 2 1, 2 2, 2 3, 2 4, 3 1, 3 2, 3 3, 3 4,
                    4 1, 4 2, 4 3, 4 4, 5 1, 5 2, 5 3, 5 4, 6 1, 6 2, 6 3, 6 4
                );
            }
        }
    }
}

simd! {
    fn plain(row: &[u8], panel: &[u8]) -> [i32; PANEL] {
        let mut sums = [0i32; PANEL];
        let (x4, _) = row.as_chunks::<DEPTHS>();
        let (w64, _) = panel.as_chunks::<{ DEPTHS * PANEL }>();
        for (x, w) in x4.iter().zip(w64) {
            for (c, sum) in sums.iter_mut().enumerate() {
                for l in 0..DEPTHS {
                    *sum += i32::from(x[l] as i8) * i32::from(w[c * DEPTHS + l] as i8);
                }
            }
        }
        sums
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{DEPTHS, PANEL, PANELS, ROWS};

    /// Weights come from memory: they are asked for this many bytes ahead.
    const AHEAD: usize = 1024;

    /// # Safety
    /// AVX-512 F and VNNI; `x` leads to `R` rows of `4 steps` bytes, `w` to `P` panels of
    /// `64 steps`.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn vnni<const R: usize, const P: usize>(
        x: *const u8,
        w: *const u8,
        steps: usize,
        sums: &mut [[[i32; PANEL]; PANELS]; ROWS],
    ) {
        let mut acc = [[_mm512_setzero_si512(); P]; R];
        for s in 0..steps {
            let w: [__m512i; P] = std::array::from_fn(|p| {
                let at = w.wrapping_add((p * steps + s) * DEPTHS * PANEL);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                // SAFETY: step `s` of panel `p`.
                unsafe { _mm512_loadu_si512(at.cast()) }
            });
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: step `s` of row `r`.
                let four =
                    unsafe { x.add((r * steps + s) * DEPTHS).cast::<i32>().read_unaligned() };
                let four = _mm512_set1_epi32(four);
                for (acc, w) in acc.iter_mut().zip(w) {
                    *acc = _mm512_dpbusd_epi32(*acc, four, w);
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            for (sums, acc) in sums.iter_mut().zip(acc) {
                // SAFETY: room for sixteen.
                unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), acc) };
            }
        }
    }

    /// # Safety
    /// AVX2; `x` leads to `R` rows of `4 steps` bytes, `w` to a panel of `64 steps`.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2<const R: usize>(
        x: *const u8,
        w: *const u8,
        steps: usize,
        panel: usize,
        sums: &mut [[[i32; PANEL]; PANELS]; ROWS],
    ) {
        let mut acc = [[_mm256_setzero_si256(); 2]; R];
        let ones = _mm256_set1_epi16(1);
        for s in 0..steps {
            let at = w.wrapping_add(s * DEPTHS * PANEL);
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
            // SAFETY: step `s` of the panel, in two halves.
            let w =
                unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] };
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: step `s` of row `r`.
                let four =
                    unsafe { x.add((r * steps + s) * DEPTHS).cast::<i32>().read_unaligned() };
                let four = _mm256_set1_epi32(four);
                for (acc, w) in acc.iter_mut().zip(w) {
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four, w));
                    *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            let to = sums[panel].as_mut_ptr();
            // SAFETY: room for two times eight.
            unsafe {
                _mm256_storeu_si256(to.cast(), acc[0]);
                _mm256_storeu_si256(to.add(8).cast(), acc[1]);
            }
        }
    }
}
