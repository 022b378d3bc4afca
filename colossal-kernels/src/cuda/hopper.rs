//! Attention and its gradients by Hopper's own instructions, where they and the call allow it.

use cudarc::driver::sys::CUresult;

use super::attention::Call;
use super::launch::Plain;
use super::library::driver_function;
use super::{Grid, Result, Slice, SliceMut, Source, args, source};
use crate::attention::AttentionShape;
use crate::float::Float;

pub(super) static HOPPER: Source = source!("attention_hopper", "hopper", "attention_shape");
pub(super) static HOPPER_BACKWARD: Source =
    source!("attention_hopper_backward", "hopper", "attention_shape");

/// Sizes of a head that it is built for, and their names as definitions.
pub(super) const SIZES: [(usize, &str); 2] = [(64, "64"), (128, "128")];

/// Rows of a tile, but of those that backward goes over.
const ROWS: u32 = 128;
/// Rows of a step of backward.
const STEP: u32 = 64;

type Encode = unsafe extern "C" fn(
    *mut TensorMap,
    u32,
    u32,
    u64,
    *const u64,
    *const u64,
    *const u32,
    *const u32,
    u32,
    u32,
    u32,
    u32,
) -> CUresult;

/// `CUtensorMap`: what bulk copies know of a tensor.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct TensorMap([u64; 16]);

impl TensorMap {
    /// Of `[batch, len, heads, head_dim]` with `stride` elements from one sequence to the next; boxes are
    /// `rows` of 64 channels of a head, in swizzled lines of 128 bytes. `None` where the driver does not
    /// know it.
    fn new<T: Float>(
        x: Slice<'_, T>,
        sizes: [usize; 4],
        stride: usize,
        rows: u32,
    ) -> Option<TensorMap> {
        let [batch, len, heads, head_dim] = sizes.map(|s| s as u64);
        let dims = [head_dim, heads, len, batch];
        let strides =
            [head_dim, heads * head_dim, stride as u64].map(|s| s * size_of::<T>() as u64);
        let (boxes, steps) = ([64, 1, rows, 1], [1u32; 4]);
        // CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16.
        let ty = if T::NAME == "f16" { 6 } else { 9 };
        let encode = driver_function::<Encode>(c"cuTensorMapEncodeTiled")?;
        let mut map = TensorMap([0; 16]);
        // Not interleaved; 128-byte swizzle; 256-byte lines in L2; zeros outside.
        // SAFETY: of this signature in all versions; arrays have four elements, as it is told.
        let code = unsafe {
            encode(
                &mut map,
                ty,
                4,
                x.address(),
                dims.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                0,
                3,
                3,
                0,
            )
        };
        (code == CUresult::CUDA_SUCCESS).then_some(map)
    }
}

/// The size of a head by its definition, if the device and the call are for these kernels.
fn known<T: Float>(call: &Call<'_>, s: &AttentionShape<'_>, addresses: &[u64]) -> Option<Size> {
    let known = SIZES.iter().find(|(size, _)| *size == s.head_dim)?;
    let fits = call.stream.device().capability().0 == 9
        && T::NAME != "f32"
        && s.window.is_none()
        && s.bias.is_none()
        && addresses.iter().all(|a| a % 16 == 0)
        && s.kv_stride().is_multiple_of(8)
        && s.batch * s.heads * s.q_len > 0
        && s.kv_len > 0;
    fits.then_some(*known)
}

type Size = (usize, &'static str);

/// Of queries and what is as long, or of keys and what is as long: boxes of so many rows.
fn map<T: Float>(
    s: &AttentionShape<'_>,
    x: Slice<'_, T>,
    of_keys: bool,
    rows: u32,
) -> Option<TensorMap> {
    let (sizes, stride) = match of_keys {
        true => ([s.batch, s.kv_len, s.kv_heads, s.head_dim], s.kv_stride()),
        false => ([s.batch, s.q_len, s.heads, s.head_dim], s.q_len * s.heads * s.head_dim),
    };
    TensorMap::new(x, sizes, stride, rows)
}

/// Puts it on the stream, unless the device or the call is none of its: then `false`.
pub(super) fn attention<T: Float>(
    call: &Call<'_>,
    s: &AttentionShape<'_>,
    q: Slice<'_, T>,
    k: Slice<'_, T>,
    v: Slice<'_, T>,
    out: &mut SliceMut<'_, T>,
    lse: &mut SliceMut<'_, f32>,
) -> Result<bool> {
    let addresses = [q.address(), k.address(), v.address(), out.address()];
    let Some((size, label)) = known::<T>(call, s, &addresses) else { return Ok(false) };
    let (Some(q), Some(k), Some(v)) =
        (map(s, q, false, ROWS), map(s, k, true, ROWS), map(s, v, true, ROWS))
    else {
        return Ok(false);
    };
    let f =
        call.stream.function(&HOPPER, &[("TYPE", T::CUDA), ("D", label)], "attention_hopper")?;
    let grid = Grid {
        blocks: [(s.q_len as u32).div_ceil(ROWS), s.heads as u32, s.batch as u32],
        threads: [384, 1, 1],
        // A tile of queries, two of keys, two of values.
        shared: 5 * ROWS * size as u32 * 2,
    };
    let (q, k, v) = (Plain(q), Plain(k), Plain(v));
    f.launch(grid, args![q, k, v, out.reborrow(), lse.reborrow(), call.shape])?;
    Ok(true)
}

/// Puts the gradients on the stream, or returns `false` as above.
pub(super) fn gradients<T: Float>(
    call: &Call<'_>,
    s: &AttentionShape<'_>,
    [q, k, v, dout]: [Slice<'_, T>; 4],
    [lse, delta]: [Slice<'_, f32>; 2],
    [dq, dk, dv]: [SliceMut<'_, T>; 3],
) -> Result<bool> {
    let read = [q, k, v, dout].map(|x| x.address());
    let written = [dq.address(), dk.address(), dv.address()];
    let Some((size, label)) = known::<T>(call, s, &[&read[..], &written].concat()) else {
        return Ok(false);
    };
    let maps = |of_queries, of_keys| {
        let map = |x, keys| map(s, x, keys, if keys { of_keys } else { of_queries }).map(Plain);
        Some((map(q, false)?, map(k, true)?, map(v, true)?, map(dout, false)?))
    };
    let (Some(of_q), Some(of_kv)) = (maps(ROWS, STEP), maps(STEP, ROWS)) else { return Ok(false) };
    let defines = [("TYPE", T::CUDA), ("D", label)];
    let f = |name| call.stream.function(&HOPPER_BACKWARD, &defines, name);
    let mut grid = Grid {
        blocks: [(s.q_len as u32).div_ceil(ROWS), s.heads as u32, s.batch as u32],
        threads: [384, 1, 1],
        // Two tiles that are held, two stages of two.
        shared: (2 * ROWS + 4 * STEP) * size as u32 * 2,
    };
    let (q, k, v, dout) = of_q;
    f("attention_hopper_backward_q")?
        .launch(grid, args![q, k, v, dout, lse, delta, dq, call.shape])?;
    grid.blocks = [(s.kv_len as u32).div_ceil(ROWS), s.kv_heads as u32, s.batch as u32];
    let (q, k, v, dout) = of_kv;
    f("attention_hopper_backward_kv")?
        .launch(grid, args![q, k, v, dout, lse, delta, dk, dv, call.shape])?;
    Ok(true)
}
