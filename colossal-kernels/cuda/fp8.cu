// Numbers of 8 bits: absolute maximum, rounding with scales, and products y = x w^T with any scales.
//
// Scales are one for all, one for 1 x 128 (128 along the depth), or one for 128 x 128. The product widens
// to f16 in registers (both formats fit: an e4m3 shifted into place is 2^-8 of its value, which goes into
// the scale) and multiplies on tensor cores from sm_80 on; sums of 128 steps are scaled and added as
// floats. Bound: half the rate of the tensor cores' own fp8, which per-tensor scales get from cuBLASLt.

#define LEAST 1e-30f

/// Bits of |x|, whose order as integers is that of values, NaN above all.
INLINE u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }
INLINE u32 warp_most(u32 x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = max(x, __shfl_xor_sync(ALL, x, o));
  return x;
}
INLINE float largest_of(u32 bits) { const float x = __uint_as_float(bits); return x < LEAST ? LEAST : x; }

// Each block takes the largest of its span.
extern "C" __global__ void __launch_bounds__(256)
    fp8_largest(const T* __restrict__ x, u64 n, u64 span, u32* __restrict__ partials) {
  __shared__ u32 part[8];
  const u64 start = blockIdx.x * span, end = min(start + span, n);
  u32 most = 0;
  for (u64 i = start + threadIdx.x; i < end; i += blockDim.x) most = max(most, magnitude(widen(x[i])));
  most = warp_most(most);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < 8; ++w) most = max(most, part[w]);
    partials[blockIdx.x] = most;
  }
}
KERNEL(fp8_largest)

// One warp.
extern "C" __global__ void __launch_bounds__(32)
    fp8_scale(const u32* __restrict__ partials, u32 count, float top, float* __restrict__ scale) {
  u32 most = 0;
  for (u32 i = threadIdx.x; i < count; i += 32) most = max(most, partials[i]);
  most = warp_most(most);
  if (threadIdx.x == 0) *scale = largest_of(most) / top;
}
KERNEL(fp8_scale)

// x [rows, cols], or its transpose, to rows of `pitch` bytes. A block: 128 x 128 of the result; a thread half
// a row of it. Scaling: 0 by the scale that is there, 1 a scale a row, 2 one for all. `count`: blocks of a row.
extern "C" __global__ void __launch_bounds__(256)
    fp8_quantize(const T* __restrict__ x, u32 rows, u32 cols, u32 transposed, u32 e5m2, u32 scaling, u8* __restrict__ q,
                 u32 pitch, float* __restrict__ scales) {
  DYN_SMEM(T, tile);  // [128][129]: read by rows and by columns
  __shared__ u32 part[256];
  const u32 row0 = blockIdx.y * 128, col0 = blockIdx.x * 128, out_rows = transposed ? cols : rows;
  const u32 from_row = transposed ? col0 : row0, from_col = transposed ? row0 : col0;
  for (u32 i = threadIdx.x; i < 128 * 128; i += 256) {
    const u32 r = from_row + i / 128, c = from_col + i % 128;
    tile[i / 128 * 129 + i % 128] = r < rows && c < cols ? x[(u64)r * cols + c] : as<T>(0.0f);
  }
  __syncthreads();
  // Threads of a warp take rows one after another: neither order of the tile meets a bank twice.
  const u32 own = threadIdx.x % 128, half = threadIdx.x / 128 * 64;
  const auto at = [&](u32 i) { return widen(transposed ? tile[(half + i) * 129 + own] : tile[own * 129 + half + i]); };
  const float top = e5m2 ? 57344.0f : 448.0f;
  float scale, inverse;
  if (scaling) {
    u32 most = 0;
    for (u32 i = 0; i < 64; ++i) most = max(most, magnitude(at(i)));
    part[threadIdx.x] = most;
    __syncthreads();
    if (scaling == 1) most = max(part[own], part[own + 128]);
    else for (u32 i = 0; i < 256; ++i) most = max(most, part[i]);
    const float largest = largest_of(most);
    scale = largest / top, inverse = top / largest;
    const u32 row = scaling == 1 ? row0 + own : blockIdx.y;
    if (half == 0 && (scaling == 1 ? row < out_rows : own == 0)) scales[(u64)row * gridDim.x + blockIdx.x] = scale;
  } else {
    scale = *scales, inverse = 1.0f / scale;
  }
  if (row0 + own >= out_rows) return;
  u8* const to = q + (u64)(row0 + own) * pitch + col0 + half;
  for (u32 i = 0; i < 64 && col0 + half + i < pitch; i += 16) {
    Vec<u8, 16> v;
    for (u32 k = 0; k < 16; ++k) v.v[k] = narrow8(at(i + k) * inverse, e5m2);
    *reinterpret_cast<Vec<u8, 16>*>(to + i) = v;
  }
}
KERNEL(fp8_quantize)

/// Which scale belongs to a row and a block of 128 steps.
struct Scales { const float* at; u32 shift, row_stride, step; };
INLINE float scale_of(const Scales& s, u32 row, u32 block) {
  return s.at[(u64)(s.shift < 32 ? row >> s.shift : 0) * s.row_stride + block * s.step];
}

extern "C" __global__ void __launch_bounds__(256)
    fp8_dequantize(const u8* __restrict__ q, u32 rows, u32 cols, u32 pitch, u32 e5m2, Scales s, T* __restrict__ y) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u64)rows * cols) return;
  const u32 r = i / cols, c = i % cols;
  narrow(widen8(q[(u64)r * pitch + c], e5m2) * scale_of(s, r, c / 128), y[i]);
}
KERNEL(fp8_dequantize)

struct Operands { Sides sides; Scales x, w; const T* bias; T* y; u32 x_e5m2, w_e5m2; u64 accumulate; };

/// Four numbers as two pairs of f16: the first two, the others. e4m3 come out 2^-8 of their value.
INLINE void widen_pairs(u32 bytes, u32 shift, u32& first, u32& second) {
  const u32 a = (bytes & 0xff) << 8 | (bytes & 0xff00) << 16, b = (bytes >> 16 & 0xff) << 8 | (bytes & 0xff000000u);
  first = (a & 0x80008000u) | (a & 0x7f007f00u) >> shift;
  second = (b & 0x80008000u) | (b & 0x7f007f00u) >> shift;
}

extern "C" __global__ void __launch_bounds__(128) fp8_product(Operands o) {
  float sums[2][4][4] = {}, part[2][4][4] = {};
  const u32 row0 = own_first_row(), col0 = own_first_column();
  const u32 x_shift = !o.x_e5m2, w_shift = !o.w_e5m2;
  const float factor = (o.x_e5m2 ? 1.0f : 256.0f) * (o.w_e5m2 ? 1.0f : 256.0f);
  over_slabs(o.sides, [&](const u32 (&as)[2][4], const u32 (&bs)[4][2]) {
    // The order of the depth is free, if it is the same in both: a register's four are steps 2t, 2t + 1
    // and 2t + 8, 2t + 9 of mma.
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      u32 a[2][4], b[4][2];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        widen_pairs(as[i][2 * h], x_shift, a[i][0], a[i][2]);
        widen_pairs(as[i][2 * h + 1], x_shift, a[i][1], a[i][3]);
      }
#pragma unroll
      for (u32 j = 0; j < 4; ++j) widen_pairs(bs[j][h], w_shift, b[j][0], b[j][1]);
#pragma unroll
      for (u32 i = 0; i < 2; ++i)
#pragma unroll
        for (u32 j = 0; j < 4; ++j) mma(part[i][j], a[i], b[j], f16());
    }
  }, [&](u32 depth) {
    if (depth % 128 && depth < o.sides.pitch) return;
    const u32 block = (depth - 1) / 128;
    float x[2][2], w[4][2];
#pragma unroll
    for (u32 e = 0; e < 4; ++e) x[e / 2][e % 2] = scale_of(o.x, min(row0 + e / 2 * 16 + e % 2 * 8, o.sides.m - 1), block) * factor;
#pragma unroll
    for (u32 e = 0; e < 8; ++e) w[e / 2][e % 2] = scale_of(o.w, min(col0 + e / 2 * 8 + e % 2, o.sides.n - 1), block);
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
      for (u32 j = 0; j < 4; ++j)
#pragma unroll
        for (u32 e = 0; e < 4; ++e) {
          sums[i][j][e] += part[i][j][e] * (x[i][e / 2] * w[j][e % 2]);
          part[i][j][e] = 0.0f;
        }
  });
#pragma unroll
  for (u32 i = 0; i < 2; ++i)
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        const u32 row = row0 + 16 * i + e / 2 * 8, col = col0 + 8 * j + e % 2;
        if (row >= o.sides.m || col >= o.sides.n) continue;
        T& y = o.y[(u64)row * o.sides.n + col];
        narrow(sums[i][j][e] + (o.bias ? widen(o.bias[col]) : 0.0f) + (o.accumulate ? widen(y) : 0.0f), y);
      }
}
KERNEL(fp8_product)
