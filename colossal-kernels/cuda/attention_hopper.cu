// Flash attention forward by Hopper's own instructions: bulk copies and wgmma (FlashAttention-3; Shah et
// al., 2024). Bound: the tensor cores.
//
// A block takes 128 queries of a head: one warpgroup brings keys and values, two stages ahead; the other
// two take 64 queries each. A warpgroup multiplies and takes exponentials in turns: that the two do so
// against each other is left to chance. Kernels of other architectures are in attention.cu.

/// Panels of 64 channels, in which a tile of 128 rows lies; bytes of a panel and of a tile.
constexpr int PANELS = D / 64, PANEL = 128 * 128, TILE = PANELS * PANEL;
constexpr int STEP = 128, STAGES = 2;
/// A score that is hidden, below all others.
constexpr float HIDDEN = -1e30f;

// Grid: tiles of queries, heads, sequences. Tensors have the dims channel, head, row, sequence.
extern "C" __global__ void __launch_bounds__(384, 1)
    attention_hopper(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                     const __grid_constant__ TensorMap v, T* __restrict__ out, float* __restrict__ lse, const Shape s) {
  DYN_SMEM(u8, room);
  __shared__ u64 queries_here, here[STAGES], free[STAGES];
  const int group = threadIdx.x / 128, head = blockIdx.y, batch = blockIdx.z, kv_head = head / (s.heads / s.kv_heads);
  // Of a causal mask the longest first.
  const int first = (gridDim.x - 1 - blockIdx.x) * 128;
  const Sequence o = sequence(s, batch, head);
  const int last = min(first + 128, o.queries) - 1;
  const int steps = last < first ? 0 : (visible(s, o, last).to + STEP - 1) / STEP;
  if (threadIdx.x == 0) {
    barrier_init(&queries_here, 1);
    for (int i = 0; i < STAGES; ++i) barrier_init(&here[i], 1), barrier_init(&free[i], 8);
    barriers_ready();
  }
  __syncthreads();
  u8* const stages = room + TILE;
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0 && steps) {
      arrive_expecting(&queries_here, TILE);
      for (int p = 0; p < PANELS; ++p) copy_box(room + p * PANEL, q, &queries_here, p * 64, head, first, batch);
      for (int t = 0; t < steps; ++t) {
        const int stage = t % STAGES;
        u8* const keys = stages + stage * 2 * TILE;
        barrier_wait(&free[stage], (t / STAGES & 1) ^ 1);
        arrive_expecting(&here[stage], 2 * TILE);
        for (int p = 0; p < PANELS; ++p) {
          copy_box(keys + p * PANEL, k, &here[stage], p * 64, kv_head, t * STEP, batch);
          copy_box(keys + TILE + p * PANEL, v, &here[stage], p * 64, kv_head, t * STEP, batch);
        }
      }
    }
    return;
  }
  more_registers<232>();
  const int own = group - 1, thread = threadIdx.x % 128, lane = thread % 32;
  const int row = first + own * 64 + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const float scale = s.scale * LOG2E;
  const int limit[2] = {visible(s, o, row).to, visible(s, o, row + 8).to};
  const int whole = visible(s, o, first + own * 64).to;  // All real queries of the warpgroup see these.
  float acc[D / 2], top[2] = {HIDDEN, HIDDEN}, sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < D / 2; ++i) acc[i] = 0.0f;
  if (steps) barrier_wait(&queries_here, 0);
  for (int t = 0; t < steps; ++t) {
    const int stage = t % STAGES;
    u8* const keys = stages + stage * 2 * TILE;
    u8* const values = keys + TILE;
    barrier_wait(&here[stage], t / STAGES & 1);
    // Values that are not real may be anything, and nothing times anything is not nothing.
    if ((t + 1) * STEP > o.keys && o.keys < (int)s.kv_len) {
      for (int i = threadIdx.x - 128; i < TILE / 16; i += 256)
        if (t * STEP + i % (PANEL / 16) / 8 >= o.keys) reinterpret_cast<Words*>(values)[i] = {};
      written_for_products();
      some_barrier<256>();
    }
    float x[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = 0.0f;
    products_begin();
#pragma unroll
    for (int c = 0; c < D / 16; ++c) {
      const int at = c / 4 * PANEL + c % 4 * 32;
      wgmma(x, deep_operand(room + own * 64 * 128 + at), deep_operand(keys + at), T());
    }
    products_commit();
    products_wait<0>();
    settle(x);
    if ((t + 1) * STEP > whole) {
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (t * STEP + i / 4 * 8 + column + i % 2 >= limit[i / 2 % 2]) x[i] = HIDDEN;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float high = top[h];
#pragma unroll
      for (int j = 0; j < 16; ++j) high = fmaxf(high, fmaxf(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]));
      high = fmaxf(high, __shfl_xor_sync(ALL, high, 1));
      high = fmaxf(high, __shfl_xor_sync(ALL, high, 2));
      const float keep = exp2_fast((top[h] - high) * scale), base = high * scale;
      top[h] = high;
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = exp2_fast(x[4 * j + 2 * h + e] * scale - base);
          x[4 * j + 2 * h + e] = p;
          part += p;
        }
#pragma unroll
      for (int j = 0; j < D / 8; ++j) acc[4 * j + 2 * h] *= keep, acc[4 * j + 2 * h + 1] *= keep;
      sum[h] = sum[h] * keep + part;
    }
    u32 p[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pair(x[2 * i], x[2 * i + 1], T());
    products_begin();
#pragma unroll
    for (int c = 0; c < STEP / 16; ++c) wgmma_own(acc, p + 4 * c, wide_operand(values + c * 16 * 128, PANEL), T());
    products_commit();
    products_wait<0>();
    settle(acc);
    if (lane == 0) arrive(&free[stage]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(ALL, sum[h], 1);
    sum[h] += __shfl_xor_sync(ALL, sum[h], 2);
    const int i = row + 8 * h;
    if (i >= (int)s.q_len) continue;
    const bool any = limit[h] > 0;
    const float factor = any ? 1.0f / sum[h] : 0.0f;
    if (column == 0) lse[((u64)batch * s.heads + head) * s.q_len + i] = any ? top[h] * s.scale + logf(sum[h]) : -INFINITE;
    T* const to = out + (((u64)batch * s.q_len + i) * s.heads + head) * D + column;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      *reinterpret_cast<u32*>(to + 8 * j) = any ? pair(acc[4 * j + 2 * h] * factor, acc[4 * j + 2 * h + 1] * factor, T()) : 0;
  }
}
KERNEL(attention_hopper)
