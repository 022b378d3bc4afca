// Gradients of flash attention by Hopper's own instructions: bulk copies and wgmma (FlashAttention-3; Shah et
// al., 2024). Bound: the tensor cores.
//
// Two kernels of one form, as no sum may go through atomics: seven products where five would do, and a run is
// repeated bit for bit. A block holds 128 rows: of keys and values, or of queries and gradients of outputs. One
// warpgroup brings 64 rows of the other side at a time, two stages ahead; the other two take 64 each of the rows
// that are held. These are the left operand of both scores, so for keys scores are transposed, and in both
// kernels probabilities and their gradients go into the next product out of registers. Shared memory: 128 KiB
// for heads of 128 channels, 64 KiB for 64. delta is made in attention.cu.

constexpr int PANELS = D / 64, STAGES = 2;
/// Rows that are held, and of a step; bytes of 64 channels of them, and of all.
constexpr int HELD = 128, HELD_PANEL = HELD * 128, HELD_TILE = PANELS * HELD_PANEL;
constexpr int STEP = 64, STEP_PANEL = STEP * 128, STEP_TILE = PANELS * STEP_PANEL;
/// A score that is hidden, below all others.
constexpr float HIDDEN = -1e30f;

struct Pipe { u64 held, here[STAGES], free[STAGES]; };

/// Of barriers in which `arrivals` say that a stage is here, and eight warps that it is free again.
INLINE void begin(Pipe& pipe, u32 arrivals) {
  if (threadIdx.x == 0) {
    barrier_init(&pipe.held, 1);
    for (int i = 0; i < STAGES; ++i) barrier_init(&pipe.here[i], arrivals), barrier_init(&pipe.free[i], 8);
    barriers_ready();
  }
  __syncthreads();
}
INLINE void await_free(Pipe& pipe, int t) { barrier_wait(&pipe.free[t % STAGES], (t / STAGES & 1) ^ 1); }

/// Where the two tiles of a step are.
INLINE u8* stage(u8* room, int t) { return room + 2 * HELD_TILE + t % STAGES * 2 * STEP_TILE; }

/// Starts copies of rows from `row` on of a head, out of two tensors.
INLINE void bring(u8* to, int panel, const TensorMap& a, const TensorMap& b, u64* here, int head, int row, int batch) {
  arrive_expecting(here, 2 * PANELS * panel);
  for (int p = 0; p < PANELS; ++p) {
    copy_box(to + p * panel, a, here, p * 64, head, row, batch);
    copy_box(to + (PANELS + p) * panel, b, here, p * 64, head, row, batch);
  }
}

/// Rows that are not real may be anything, and nothing times anything is not nothing.
INLINE void clear(u8* step, int real) {
  for (int i = threadIdx.x - 128; i < 2 * STEP_TILE / 16; i += 256)
    if (i % (STEP_PANEL / 16) / 8 >= real) reinterpret_cast<Words*>(step)[i] = {};
  written_for_products();
  some_barrier<256>();
}

/// x += 64 rows that are held times the rows of the step, along the channels.
INLINE void scores(float (&x)[32], const u8* held, const u8* step) {
#pragma unroll
  for (int c = 0; c < D / 16; ++c) {
    const int panel = c / 4, at = c % 4 * 32;
    wgmma(x, deep_operand(held + panel * HELD_PANEL + at), deep_operand(step + panel * STEP_PANEL + at), T());
  }
}

/// acc += x, of 64 rows by those of the step, times these.
INLINE void sums(float (&acc)[D / 2], const u32 (&x)[16], const u8* step) {
#pragma unroll
  for (int c = 0; c < STEP / 16; ++c) wgmma_own(acc, x + 4 * c, wide_operand(step + c * 16 * 128, STEP_PANEL), T());
}

INLINE void operand_of(const float (&x)[32], u32 (&to)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) to[i] = pair(x[2 * i], x[2 * i + 1], T());
}

/// Row h of the two that a thread has of a sum, times a factor; zeros where it is not real.
INLINE void put(T* to, const float (&acc)[D / 2], int h, float factor, bool real) {
#pragma unroll
  for (int j = 0; j < D / 8; ++j)
    *reinterpret_cast<u32*>(to + 8 * j) = real ? pair(acc[4 * j + 2 * h] * factor, acc[4 * j + 2 * h + 1] * factor, T()) : 0;
}

// Grid: tiles of queries, heads, sequences. Tensors have the dims channel, head, row, sequence.
extern "C" __global__ void __launch_bounds__(384, 1)
    attention_hopper_backward_q(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                                const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout,
                                const float* __restrict__ lse, const float* __restrict__ delta, T* __restrict__ dq,
                                const Shape s) {
  DYN_SMEM(u8, room);
  __shared__ Pipe pipe;
  const int group = threadIdx.x / 128, head = blockIdx.y, batch = blockIdx.z, kv_head = head / (s.heads / s.kv_heads);
  // Of a causal mask the longest first.
  const int first = (gridDim.x - 1 - blockIdx.x) * HELD;
  const Sequence o = sequence(s, batch, head);
  const int last = min(first + HELD, o.queries) - 1;
  const int steps = last < first ? 0 : (visible(s, o, last).to + STEP - 1) / STEP;
  begin(pipe, 1);
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0 && steps) {
      bring(room, HELD_PANEL, q, dout, &pipe.held, head, first, batch);
      for (int t = 0; t < steps; ++t) {
        await_free(pipe, t);
        bring(stage(room, t), STEP_PANEL, k, v, &pipe.here[t % STAGES], kv_head, t * STEP, batch);
      }
    }
    return;
  }
  more_registers<232>();
  const int own = (group - 1) * 64, thread = threadIdx.x % 128, lane = thread % 32;
  const int row = first + own + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const float scale = s.scale * LOG2E;
  const int whole = visible(s, o, first + own).to;  // All real queries of the warpgroup see these.
  const u64 stat = ((u64)batch * s.heads + head) * s.q_len + row;
  int limit[2];
  float log_sum[2], dot[2], acc[D / 2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    limit[h] = visible(s, o, row + 8 * h).to;
    log_sum[h] = limit[h] ? lse[stat + 8 * h] * LOG2E : 0.0f;
    dot[h] = limit[h] ? delta[stat + 8 * h] : 0.0f;
  }
  if (steps) barrier_wait(&pipe.held, 0);
  for (int t = 0; t < steps; ++t) {
    u8* const keys = stage(room, t);
    barrier_wait(&pipe.here[t % STAGES], t / STAGES & 1);
    if ((t + 1) * STEP > o.keys && o.keys < (int)s.kv_len) clear(keys, o.keys - t * STEP);
    float x[32] = {}, y[32] = {};
    settle(x), settle(y);
    products_begin();
    scores(x, room + own * 128, keys);
    products_commit();
    scores(y, room + HELD_TILE + own * 128, keys + STEP_TILE);
    products_commit();
    products_wait<1>();
    settle(x);
    if ((t + 1) * STEP > whole) {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (t * STEP + i / 4 * 8 + column + i % 2 >= limit[i / 2 % 2]) x[i] = HIDDEN;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = exp2_fast(x[i] * scale - log_sum[i / 2 % 2]);
    products_wait<0>();
    settle(y);
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] *= y[i] - dot[i / 2 % 2];
    u32 ds[16];
    operand_of(x, ds);
    products_begin();
    sums(acc, ds, keys);
    products_commit();
    products_wait<0>();
    settle(acc);
    if (lane == 0) arrive(&pipe.free[t % STAGES]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + 8 * h;
    T* const to = dq + (((u64)batch * s.q_len + i) * s.heads + head) * D + column;
    if (i < (int)s.q_len) put(to, acc, h, s.scale, limit[h] > 0);
  }
}
KERNEL(attention_hopper_backward_q)

// Grid: tiles of keys (the first, which most see, first), key heads, sequences.
extern "C" __global__ void __launch_bounds__(384, 1)
    attention_hopper_backward_kv(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                                 const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap dout,
                                 const float* __restrict__ lse, const float* __restrict__ delta, T* __restrict__ dk,
                                 T* __restrict__ dv, const Shape s) {
  DYN_SMEM(u8, room);
  __shared__ Pipe pipe;
  __shared__ float stats[STAGES][2][STEP];  // Of a stage: log-sum-exps, deltas.
  const int group = threadIdx.x / 128, kv_head = blockIdx.y, batch = blockIdx.z, heads = s.heads / s.kv_heads;
  const int first = blockIdx.x * HELD;
  const Sequence o = sequence(s, batch, 0);
  // The queries that see any of these keys; of every head that shares them.
  const int from = s.causal ? max(first + o.queries - o.keys, 0) / STEP * STEP : 0;
  const int a_head = first < o.keys && from < o.queries ? (o.queries - from + STEP - 1) / STEP : 0;
  const int steps = a_head * heads;
  begin(pipe, 1 + 32);
  if (group == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0 && steps) bring(room, HELD_PANEL, k, v, &pipe.held, kv_head, first, batch);
    if (threadIdx.x != 0 && threadIdx.x / 32 != 1) return;
    // One thread brings rows, a warp their numbers.
    for (int t = 0; t < steps; ++t) {
      const int head = kv_head * heads + t / a_head, at = from + t % a_head * STEP;
      u64* const here = &pipe.here[t % STAGES];
      await_free(pipe, t);
      if (threadIdx.x == 0) {
        bring(stage(room, t), STEP_PANEL, q, dout, here, head, at, batch);
        continue;
      }
      const u64 stat = ((u64)batch * s.heads + head) * s.q_len + at;
      for (int i = threadIdx.x - 32; i < STEP; i += 32) {
        const bool any = visible(s, o, at + i).to > 0;
        stats[t % STAGES][0][i] = any ? lse[stat + i] * LOG2E : 0.0f;
        stats[t % STAGES][1][i] = any ? delta[stat + i] : 0.0f;
      }
      arrive(here);
    }
    return;
  }
  more_registers<232>();
  const int own = (group - 1) * 64, thread = threadIdx.x % 128, lane = thread % 32;
  const int row = first + own + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const float scale = s.scale * LOG2E;
  float dk_acc[D / 2] = {}, dv_acc[D / 2] = {};
  if (steps) barrier_wait(&pipe.held, 0);
  for (int t = 0; t < steps; ++t) {
    const int at = from + t % a_head * STEP;
    u8* const queries = stage(room, t);
    u8* const douts = queries + STEP_TILE;
    const float* const log_sum = stats[t % STAGES][0];
    const float* const dot = stats[t % STAGES][1];
    barrier_wait(&pipe.here[t % STAGES], t / STAGES & 1);
    if (at + STEP > o.queries && o.queries < (int)s.q_len) clear(queries, o.queries - at);
    float x[32] = {}, y[32] = {};
    settle(x), settle(y);
    products_begin();
    scores(x, room + own * 128, queries);
    products_commit();
    scores(y, room + HELD_TILE + own * 128, douts);
    products_commit();
    products_wait<1>();
    settle(x);
    // Does every query see every key of the warpgroup?
    if (at + STEP > o.queries || visible(s, o, at).to < first + own + 64) {
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (row + i / 2 % 2 * 8 >= visible(s, o, at + i / 4 * 8 + column + i % 2).to) x[i] = HIDDEN;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] = exp2_fast(x[i] * scale - log_sum[i / 4 * 8 + column + i % 2]);
    u32 p[16], ds[16];
    operand_of(x, p);
    products_wait<0>();
    settle(y);
#pragma unroll
    for (int i = 0; i < 32; ++i) x[i] *= y[i] - dot[i / 4 * 8 + column + i % 2];
    operand_of(x, ds);
    products_begin();
    sums(dv_acc, p, douts);
    sums(dk_acc, ds, queries);
    products_commit();
    products_wait<0>();
    settle(dv_acc);
    settle(dk_acc);
    if (lane == 0) arrive(&pipe.free[t % STAGES]);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = row + 8 * h;
    const u64 to = (((u64)batch * s.kv_len + i) * s.kv_heads + kv_head) * D + column;
    if (i >= (int)s.kv_len) continue;
    put(dk + to, dk_acc, h, s.scale, i < o.keys);
    put(dv + to, dv_acc, h, 1.0f, i < o.keys);
  }
}
KERNEL(attention_hopper_backward_kv)
