//! Flash attention and its gradient.
//!
//! Kernels are compiled for some sizes of a head, of which a call takes the next that is enough.

use std::ffi::c_void;

use super::{Arg, Error, Function, Grid, Result, Slice, SliceMut, Source, Stream, args, source};
use super::{decode, hopper};
use crate::attention::AttentionShape;
use crate::float::Float;

pub(super) static ATTENTION: Source = source!("attention", "attention_shape");

/// The sizes, and their names as definitions.
pub(super) const SIZES: [(usize, &str); 7] =
    [(16, "16"), (32, "32"), (64, "64"), (96, "96"), (128, "128"), (192, "192"), (256, "256")];

/// Rows of a block.
const ROWS: usize = 64;

/// `Shape` of the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    q_len: u32,
    kv_len: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    causal: u32,
    window: u32,
    scale: f32,
    kv_stride: u64,
    bias_batch: u64,
    bias_head: u64,
    q_lens: u64,
    kv_lens: u64,
    bias: u64,
}

// SAFETY: laid out as the kernels' struct of the same fields.
unsafe impl Arg for Shape {
    fn pointer(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Where the numbers of real keys are.
pub(super) enum Lengths<'a> {
    /// In the shape, to be copied.
    OfShape,
    There(Slice<'a, i32>),
}

/// The kernels for one size of a head, and a call's shape.
pub(super) struct Call<'a> {
    pub(super) stream: &'a Stream,
    pub(super) shape: Shape,
    /// The size of a head in shared memory.
    pub(super) room: usize,
    pub(super) label: &'static str,
    pub(super) ty: &'static str,
    element: usize,
}

impl<'a> Call<'a> {
    /// Lends `f` the call, with lengths and bias on the device.
    pub(super) fn with<T: Float>(
        stream: &'a Stream,
        s: &AttentionShape<'_>,
        lengths: Lengths<'_>,
        f: impl FnOnce(&Call<'a>) -> Result<()>,
    ) -> Result<()> {
        let known = SIZES.iter().find(|(size, _)| *size >= s.head_dim);
        let Some(&(room, label)) = known else {
            return Err(Error::Unsupported {
                kernel: "attention",
                reason: format!("heads of {} channels; it is built for up to 256", s.head_dim),
            });
        };
        let parts: [Option<&[u8]>; 3] = [
            s.q_lens.map(bytemuck::cast_slice),
            s.kv_lens.map(bytemuck::cast_slice),
            s.bias.map(|b| bytemuck::cast_slice(b.data)),
        ];
        let sizes = parts.map(|part| part.map_or(0, |p| p.len().next_multiple_of(16)));
        stream.with_scratch::<u8, _>(sizes.iter().sum(), |mut scratch| {
            let (mut at, mut addresses) = (0, [0u64; 3]);
            for ((part, size), address) in parts.into_iter().zip(sizes).zip(&mut addresses) {
                let Some(part) = part else { continue };
                let room = scratch.reborrow().range(at..at + part.len());
                *address = room.address();
                stream.upload(part, room)?;
                at += size;
            }
            if let Lengths::There(lens) = lengths {
                addresses[1] = lens.address();
            }
            f(&Call::of::<T>(stream, s, (room, label), addresses))
        })
    }

    fn of<T: Float>(
        stream: &'a Stream,
        s: &AttentionShape<'_>,
        (room, label): (usize, &'static str),
        [q_lens, kv_lens, bias]: [u64; 3],
    ) -> Call<'a> {
        let shape = Shape {
            q_len: s.q_len as u32,
            kv_len: s.kv_len as u32,
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            head_dim: s.head_dim as u32,
            causal: u32::from(s.causal),
            window: s.window.filter(|_| s.causal).unwrap_or(0) as u32,
            scale: s.scale,
            kv_stride: s.kv_stride() as u64,
            bias_batch: s.bias.map_or(0, |b| b.batch_stride as u64),
            bias_head: s.bias.map_or(0, |b| b.head_stride as u64),
            q_lens,
            kv_lens,
            bias,
        };
        let (ty, element) = (T::CUDA, size_of::<T>());
        Call { stream, shape, room, label, ty, element }
    }

    fn function(&self, name: &'static str) -> Result<Function> {
        let defines = [("TYPE", self.ty), ("D", self.label)];
        self.stream.function(&ATTENTION, &defines, name)
    }

    /// Bytes of so many rows in shared memory.
    fn rows(&self, rows: usize) -> u32 {
        (rows * (self.room * self.element + 16)) as u32
    }

    /// Rows of a step, forward: `STEP` of the kernels.
    fn step(&self) -> usize {
        match self.room * self.element {
            ..=256 => 64,
            257..=512 => 32,
            _ => 16,
        }
    }

    /// Shared memory of backward: `BACK` and `STAGES` of the kernels.
    fn backward(&self) -> u32 {
        let step = match self.room * self.element {
            ..=128 => 64,
            129..=512 => 32,
            _ => 16,
        };
        match self.rows(2 * ROWS + 4 * step) {
            two @ ..=98304 => two,
            _ => self.rows(2 * ROWS + 2 * step),
        }
    }
}

/// `out = softmax(scale q kᵀ + mask) v`; `lse [batch, heads, q_len]` keeps the log-sum-exp.
///
/// Lengths and bias are on the host and copied.
///
/// # Errors
/// [`Error::Unsupported`] for heads of more than 256 channels.
pub fn flash_attention<T: Float>(
    stream: &Stream,
    s: &AttentionShape<'_>,
    q: Slice<'_, T>,
    k: Slice<'_, T>,
    v: Slice<'_, T>,
    mut out: SliceMut<'_, T>,
    mut lse: SliceMut<'_, f32>,
) -> Result<()> {
    s.check(q.len(), k.len(), v.len(), out.len(), lse.len());
    Call::with::<T>(stream, s, Lengths::OfShape, |call| {
        if decode::fits(s) {
            return decode::decode(call, s, q, k, v, out, lse, decode::Pages::default());
        }
        if hopper::attention(call, s, q, k, v, &mut out, &mut lse)? {
            return Ok(());
        }
        let grid = Grid {
            blocks: [s.q_len.div_ceil(ROWS) as u32, s.heads as u32, s.batch as u32],
            threads: [128, 1, 1],
            shared: call.rows(ROWS + 4 * call.step()),
        };
        call.function("attention")?.launch(grid, args![q, k, v, out, lse, call.shape])
    })
}

/// Gradients of [`flash_attention`]: `dq`, `dk`, `dv` are overwritten. Keys must be dense.
///
/// # Errors
/// As [`flash_attention`].
pub fn flash_attention_backward<T: Float>(
    stream: &Stream,
    s: &AttentionShape<'_>,
    q: Slice<'_, T>,
    k: Slice<'_, T>,
    v: Slice<'_, T>,
    out: Slice<'_, T>,
    lse: Slice<'_, f32>,
    dout: Slice<'_, T>,
    mut dq: SliceMut<'_, T>,
    mut dk: SliceMut<'_, T>,
    mut dv: SliceMut<'_, T>,
) -> Result<()> {
    s.check(q.len(), k.len(), v.len(), out.len(), lse.len());
    assert!(
        dout.len() == q.len() && dq.len() == q.len() && dk.len() == k.len() && dv.len() == v.len(),
        "attention_backward: gradients are as long as what they belong to"
    );
    assert_eq!(s.kv_batch_stride, 0, "attention_backward: keys must be dense");
    let mut gradients = |call: &Call<'_>, mut delta: SliceMut<'_, f32>| {
        let rows = lse.len();
        let grid = Grid::line(rows.div_ceil(4), 128);
        let delta_of = call.function("attention_delta")?;
        delta_of.launch(grid, args![out, dout, delta.reborrow(), rows as u64, call.shape])?;
        let delta = delta.as_slice();
        let (read, to) = ([q, k, v, dout], [dq.reborrow(), dk.reborrow(), dv.reborrow()]);
        if hopper::gradients(call, s, read, [lse, delta], to)? {
            return Ok(());
        }
        let mut grid = Grid {
            blocks: [s.q_len.div_ceil(ROWS) as u32, s.heads as u32, s.batch as u32],
            threads: [128, 1, 1],
            shared: call.backward(),
        };
        let queries = call.function("attention_backward_q")?;
        queries.launch(grid, args![q, k, v, lse, dout, delta, dq.reborrow(), call.shape])?;
        grid.blocks = [s.kv_len.div_ceil(ROWS) as u32, s.kv_heads as u32, s.batch as u32];
        grid.threads[0] = if call.room > 128 { 256 } else { 128 };
        let keys = call.function("attention_backward_kv")?;
        keys.launch(
            grid,
            args![q, k, v, lse, dout, delta, dk.reborrow(), dv.reborrow(), call.shape],
        )
    };
    Call::with::<T>(stream, s, Lengths::OfShape, |call| {
        stream.with_scratch::<f32, _>(lse.len(), |delta| gradients(call, delta))
    })
}
