// Products with int8 weights: y = x w^T + bias, exact in 32 bits. Bound: memory for a few rows (each
// weight is read once), the tensor cores' integer rate for many.
//
// Rows of both operands are padded with zeros to whole DEPTHs of bytes.

#define DEPTH 64

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
  const i8* x;
  const float* x_scales;
  const i8* w;
  const float* w_scales;
  const T* bias;
  T* y;
  u32 m, n, pitch;
};

INLINE void put(const Operands& o, u32 row, u32 col, int sum) {
  if (row >= o.m || col >= o.n) return;
  const float y = (float)sum * (o.x_scales[row] * o.w_scales[col]);
  narrow(o.bias ? y + widen(o.bias[col]) : y, o.y[(u64)row * o.n + col]);
}

// Up to FEW rows of x: a warp reads CHANNELS rows of w, 16 bytes a lane. Grid: channels, chunks of rows.
#define FEW 8
#define CHANNELS 2
extern "C" __global__ void __launch_bounds__(128) int8_few(Operands o) {
  const u32 lane = threadIdx.x % 32, first = (blockIdx.x * 4 + threadIdx.x / 32) * CHANNELS, row0 = blockIdx.y * FEW;
  int sums[CHANNELS][FEW] = {};
  for (u32 at = lane * 16; at < o.pitch; at += 32 * 16) {
    Words w[CHANNELS];
#pragma unroll
    for (u32 c = 0; c < CHANNELS; ++c)
      if (first + c < o.n) w[c] = *reinterpret_cast<const Words*>(o.w + (u64)(first + c) * o.pitch + at);
      else w[c] = {};
#pragma unroll
    for (u32 r = 0; r < FEW; ++r) {
      if (row0 + r >= o.m) continue;
      const Words x = *reinterpret_cast<const Words*>(o.x + (u64)(row0 + r) * o.pitch + at);
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
      if (row0 + r >= o.m) continue;
      int s = sums[c][r];
#pragma unroll
      for (int l = 16; l; l >>= 1) s += __shfl_xor_sync(ALL, s, l);
      if (lane == 0) put(o, row0 + r, first + c, s);
    }
}
KERNEL(int8_few)

// Many rows: a block makes 64 x 64 of y, a warp 32 x 32. Rows in shared memory are 16 bytes longer than a
// slab is deep, so that ldmatrix meets no bank twice.
#define TILE 64
#define STAGES 3
#define ROW (DEPTH + 16)
extern "C" __global__ void __launch_bounds__(128) int8_many(Operands o) {
  __shared__ __align__(16) i8 slabs[STAGES][2][TILE * ROW];
  const u32 row0 = blockIdx.y * TILE, col0 = blockIdx.x * TILE, steps = o.pitch / DEPTH;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const auto bring = [&](u32 step) {
#pragma unroll
    for (u32 side = 0; side < 2; ++side)
#pragma unroll
      for (u32 c = threadIdx.x; c < TILE * DEPTH / 16; c += 128) {
        const u32 r = c / (DEPTH / 16), at = c % (DEPTH / 16) * 16;
        const u32 row = (side ? col0 : row0) + r, rows = side ? o.n : o.m;
        const i8* const from = (side ? o.w : o.x) + (u64)min(row, rows - 1) * o.pitch + step * DEPTH + at;
        copy16(slabs[step % STAGES][side] + r * ROW + at, from, row < rows ? 16 : 0);
      }
  };
  for (u32 s = 0; s < STAGES - 1; ++s) {
    if (s < steps) bring(s);
    copies_commit();
  }
  int sums[2][4][4] = {};
  for (u32 step = 0; step < steps; ++step) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // All have brought this slab, and have read the one that is overwritten next.
    if (step + STAGES - 1 < steps) bring(step + STAGES - 1);
    copies_commit();
    const i8* const a = slabs[step % STAGES][0];
    const i8* const b = slabs[step % STAGES][1];
#pragma unroll
    for (u32 k = 0; k < DEPTH; k += 32) {
      u32 as[2][4], bs[4][2];
#pragma unroll
      for (u32 i = 0; i < 2; ++i) ldmatrix(as[i], a + (wm + i * 16 + lane % 16) * ROW + k + lane / 16 * 16);
#pragma unroll
      for (u32 j = 0; j < 4; j += 2) {
        u32 x[4];
        ldmatrix(x, b + (wn + j * 8 + lane / 16 * 8 + lane % 8) * ROW + k + lane / 8 % 2 * 16);
        bs[j][0] = x[0], bs[j][1] = x[1], bs[j + 1][0] = x[2], bs[j + 1][1] = x[3];
      }
#pragma unroll
      for (u32 i = 0; i < 2; ++i)
#pragma unroll
        for (u32 j = 0; j < 4; ++j) mma_int8(sums[i][j], as[i], bs[j]);
    }
  }
#pragma unroll
  for (u32 i = 0; i < 2; ++i)
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
#pragma unroll
      for (u32 e = 0; e < 4; ++e)
        put(o, row0 + wm + i * 16 + lane / 4 + e / 2 * 8, col0 + wn + j * 8 + 2 * (lane % 4) + e % 2, sums[i][j][e]);
}
KERNEL(int8_many)
