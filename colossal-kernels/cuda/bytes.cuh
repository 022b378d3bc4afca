// Products x w^T of operands of one byte an element, rows along the depth: the tiles that int8 and fp8 share.
//
// A block of 128 threads makes 64 x 64, a warp 32 x 32. Rows are padded with zeros to 16 bytes; in shared
// memory they are 16 bytes longer than a slab is deep, so that ldmatrix meets no bank twice.

#define DEPTH 64
#define TILE 64
#define STAGES 3
#define ROW (DEPTH + 16)

struct Sides { const u8* x; const u8* w; u32 m, n, pitch; };

/// Where a warp's part of its block's tile begins, and its first element in `sums[i][j][e]`: row
/// `+ 16 i + 8 (e / 2)`, column `+ 8 j + e % 2`.
INLINE u32 own_first_row() { return blockIdx.y * TILE + threadIdx.x / 64 * 32 + threadIdx.x % 32 / 4; }
INLINE u32 own_first_column() { return blockIdx.x * TILE + threadIdx.x / 32 % 2 * 32 + threadIdx.x % 4 * 2; }

/// `multiply(as, bs)` for 32 steps of the depth after another, as mma_int8 takes them; `after(depth)` when
/// a slab has been passed, up to that depth.
template <class M, class A> INLINE void over_slabs(const Sides& o, M multiply, A after) {
  __shared__ __align__(16) u8 slabs[STAGES][2][TILE * ROW];
  const u32 row0 = blockIdx.y * TILE, col0 = blockIdx.x * TILE, steps = (o.pitch + DEPTH - 1) / DEPTH;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const auto bring = [&](u32 step) {
#pragma unroll
    for (u32 side = 0; side < 2; ++side)
#pragma unroll
      for (u32 c = threadIdx.x; c < TILE * DEPTH / 16; c += 128) {
        const u32 r = c / (DEPTH / 16), to = c % (DEPTH / 16) * 16, at = step * DEPTH + to;
        const u32 row = (side ? col0 : row0) + r, rows = side ? o.n : o.m;
        const bool there = row < rows && at < o.pitch;
        const u8* const from = (side ? o.w : o.x) + (there ? (u64)row * o.pitch + at : 0);
        copy16(slabs[step % STAGES][side] + r * ROW + to, from, there ? 16 : 0);
      }
  };
  for (u32 s = 0; s < STAGES - 1; ++s) {
    if (s < steps) bring(s);
    copies_commit();
  }
  for (u32 step = 0; step < steps; ++step) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // All have brought this slab, and have read the one that is overwritten next.
    if (step + STAGES - 1 < steps) bring(step + STAGES - 1);
    copies_commit();
    const u8* const a = slabs[step % STAGES][0];
    const u8* const b = slabs[step % STAGES][1];
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
      multiply(as, bs);
    }
    after((step + 1) * DEPTH);
  }
}
