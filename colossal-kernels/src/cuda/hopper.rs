//! Attention forward by Hopper's own instructions, where they and the call allow it.

use cudarc::driver::sys::CUresult;

use super::attention::Call;
use super::launch::Plain;
use super::library::driver_function;
use super::{Grid, Result, Slice, SliceMut, Source, args, source};
use crate::attention::AttentionShape;
use crate::float::Float;

pub(super) static HOPPER: Source = source!("attention_hopper", "hopper", "attention_shape");

/// Sizes of a head that it is built for, and their names as definitions.
pub(super) const SIZES: [(usize, &str); 2] = [(64, "64"), (128, "128")];

/// Rows of a tile of queries, and of keys.
const ROWS: u32 = 128;

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
    /// 128 rows of 64 channels of a head, in swizzled lines of 128 bytes. `None` where the driver does
    /// not know it.
    fn new<T: Float>(x: Slice<'_, T>, sizes: [usize; 4], stride: usize) -> Option<TensorMap> {
        let [batch, len, heads, head_dim] = sizes.map(|s| s as u64);
        let dims = [head_dim, heads, len, batch];
        let strides =
            [head_dim, heads * head_dim, stride as u64].map(|s| s * size_of::<T>() as u64);
        let (boxes, steps) = ([64, 1, ROWS, 1], [1u32; 4]);
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
    let known = SIZES.iter().find(|(size, _)| *size == s.head_dim);
    let aligned =
        [q.address(), k.address(), v.address(), out.address()].iter().all(|a| a % 16 == 0);
    let Some(&(size, label)) = known else { return Ok(false) };
    if call.stream.device().capability().0 != 9
        || T::NAME == "f32"
        || s.window.is_some()
        || s.bias.is_some()
        || !aligned
        || !s.kv_stride().is_multiple_of(8)
        || q.is_empty()
        || k.is_empty()
    {
        return Ok(false);
    }
    let queries = [s.batch, s.q_len, s.heads, size];
    let keys = [s.batch, s.kv_len, s.kv_heads, size];
    let (Some(q), Some(k), Some(v)) = (
        TensorMap::new(q, queries, s.q_len * s.heads * size),
        TensorMap::new(k, keys, s.kv_stride()),
        TensorMap::new(v, keys, s.kv_stride()),
    ) else {
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
