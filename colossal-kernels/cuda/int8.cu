// Products with int8 weights: y = x w^T + bias, exact in 32 bits. Bound: memory for a few rows (each
// weight is read once), the tensor cores' integer rate for many.

// A block a row of x: its scale, and its elements as multiples of it.
extern "C" __global__ void __launch_bounds__(256)
    int8_rows(const T* __restrict__ x, u32 k, u32 pitch, i8* __restrict__ q, float* __restrict__ scales) {
  x += (u64)blockIdx.x * k;
  q += (u64)blockIdx.x * pitch;
  float largest = 0.0f;
  for (u32 i = threadIdx.x; i < k; i += blockDim.x) largest = fmaxf(largest, fabsf(widen(x[i])));
  largest = block_max(largest);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (u32 i = threadIdx.x; i < pitch; i += blockDim.x) q[i] = i < k ? (i8)rintf(widen(x[i]) * inverse) : (i8)0;
  if (threadIdx.x == 0) scales[blockIdx.x] = largest / 127.0f;
}
KERNEL(int8_rows)

struct Operands {
  Sides sides;
  const float* x_scales;
  const float* w_scales;
  const T* bias;
  T* y;
};

INLINE void put(const Operands& o, u32 row, u32 col, int sum) {
  if (row >= o.sides.m || col >= o.sides.n) return;
  const float y = (float)sum * (o.x_scales[row] * o.w_scales[col]);
  narrow(o.bias ? y + widen(o.bias[col]) : y, o.y[(u64)row * o.sides.n + col]);
}

// Up to FEW rows of x: a warp reads CHANNELS rows of w, 16 bytes a lane. Grid: channels, chunks of rows.
#define FEW 8
#define CHANNELS 2
extern "C" __global__ void __launch_bounds__(128) int8_few(Operands o) {
  const Sides& s = o.sides;
  const u32 lane = threadIdx.x % 32, first = (blockIdx.x * 4 + threadIdx.x / 32) * CHANNELS, row0 = blockIdx.y * FEW;
  int sums[CHANNELS][FEW] = {};
  for (u32 at = lane * 16; at < s.pitch; at += 32 * 16) {
    Words w[CHANNELS];
#pragma unroll
    for (u32 c = 0; c < CHANNELS; ++c)
      if (first + c < s.n) w[c] = *reinterpret_cast<const Words*>(s.w + (u64)(first + c) * s.pitch + at);
      else w[c] = {};
#pragma unroll
    for (u32 r = 0; r < FEW; ++r) {
      if (row0 + r >= s.m) continue;
      const Words x = *reinterpret_cast<const Words*>(s.x + (u64)(row0 + r) * s.pitch + at);
#pragma unroll
      for (u32 c = 0; c < CHANNELS; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[c][r] = dot4(w[c].v[i], x.v[i], sums[c][r]);
    }
  }
#pragma unroll
  for (u32 c = 0; c < CHANNELS; ++c)
#pragma unroll
    for (u32 r = 0; r < FEW; ++r) {
      if (row0 + r >= s.m) continue;
      int sum = sums[c][r];
#pragma unroll
      for (int l = 16; l; l >>= 1) sum += __shfl_xor_sync(ALL, sum, l);
      if (lane == 0) put(o, row0 + r, first + c, sum);
    }
}
KERNEL(int8_few)

extern "C" __global__ void __launch_bounds__(128) int8_many(Operands o) {
  int sums[2][4][4] = {};
  over_slabs(o.sides, [&](const u32 (&as)[2][4], const u32 (&bs)[4][2]) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
      for (u32 j = 0; j < 4; ++j) mma_int8(sums[i][j], as[i], bs[j]);
  }, [](u32) {});
#pragma unroll
  for (u32 i = 0; i < 2; ++i)
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
#pragma unroll
      for (u32 e = 0; e < 4; ++e)
        put(o, own_first_row() + 16 * i + e / 2 * 8, own_first_column() + 8 * j + e % 2, sums[i][j][e]);
}
KERNEL(int8_many)
