// Attention without the matrix of scores (FlashAttention-2; Dao, 2023), forward and backward.
// Bound: tensor cores for long sequences, memory for short ones.
//
// A block owns 64 rows, a warp 16 of them: rows of queries forward and for dq, rows of keys for dk
// and dv. The other side passes by in steps, the next one copied while this one is multiplied.
// Scores never leave the registers; products of two 16-bit types run on tensor cores, f32 on plain
// multiply-adds in the same arrangement. Gradients of queries and of keys have a kernel each and
// compute the scores anew: so nothing is added by atomics and the result is the same in every run.
//
// Compiled for D columns, of which a head may have less.

constexpr int ROWS = 64, BYTES = D * (int)sizeof(T);
/// Rows of the other side in a step, forward and backward.
constexpr int STEP = BYTES <= 256 ? 64 : BYTES <= 512 ? 32 : 16;
constexpr int BACK = BYTES <= 128 ? 64 : BYTES <= 512 ? 32 : 16;
/// Elements from row to row in shared memory: a vector more than a row, against bank conflicts.
constexpr int LD = D + WIDTH<T>;
/// Steps that are in shared memory at once in backward: as many as a small GPU has room for.
constexpr int STAGES = (2 * ROWS + 4 * BACK) * LD * (int)sizeof(T) <= 98304 ? 2 : 1;
/// Warps that share rows of keys, each with its part of the columns of dk and dv.
constexpr int SPLIT = D > 128 ? 2 : 1;
static_assert(D % (16 * SPLIT) == 0, "columns of a warp are whole pairs of tiles");

/// Starts copying N rows to shared memory; rows and columns that are not there become zero.
template <int N> INLINE void fetch(T* to, const T* from, int rows, u64 stride, u32 dim, bool vectors) {
  constexpr int PER = D / WIDTH<T>;
  if (vectors) {
    for (int i = threadIdx.x; i < N * PER; i += blockDim.x) {
      const int r = i / PER, c = i % PER * WIDTH<T>;
      const bool there = r < rows && c < (int)dim;
      copy16(to + r * LD + c, there ? from + r * stride + c : from, there ? 16 : 0);
    }
  } else {
    for (int i = threadIdx.x; i < N * D; i += blockDim.x) {
      const int r = i / D, c = i % D;
      to[r * LD + c] = r < rows && c < (int)dim ? from[r * stride + c] : as<T>(0.0f);
    }
  }
}

/// Writes 16 rows that a warp holds as sums, times `factor` of each of a lane's two rows, through
/// its own part of shared memory.
template <int N> INLINE void put(T* to, const float (&acc)[N][4], float low, float high, T* through, int rows,
                                 u64 stride, int columns, bool vectors) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      narrow(acc[n][e] * low, through[g * LD + n * 8 + 2 * t + e]);
      narrow(acc[n][2 + e] * high, through[(g + 8) * LD + n * 8 + 2 * t + e]);
    }
  __syncwarp();
  if (vectors) {
    constexpr int PER = N * 8 / WIDTH<T>;
    for (int i = lane; i < 16 * PER; i += 32) {
      const int r = i / PER, c = i % PER * WIDTH<T>;
      if (r < rows && c < columns) store(to + r * stride + c, load<WIDTH<T>>(through + r * LD + c));
    }
  } else {
    for (int i = lane; i < 16 * N * 8; i += 32) {
      const int r = i / (N * 8), c = i % (N * 8);
      if (r < rows && c < columns) to[r * stride + c] = through[r * LD + c];
    }
  }
}

/// acc [16, 8 N] += a bᵀ over D columns: a has 16 rows, b 8 N, both in shared memory.
template <class E, int N> INLINE void rows_by_rows(float (&acc)[N][4], const E* a, const E* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < D; k += 16) {
      u32 x[4];
      ldmatrix(x, a + lane % 16 * LD + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        u32 y[4];
        ldmatrix(y, b + (n * 8 + lane % 8 + lane / 16 * 8) * LD + k + lane / 8 % 2 * 8);
        const u32 first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
        mma(acc[n], x, first, E());
        mma(acc[n + 1], x, second, E());
      }
    }
  } else {
    const E* const top = a + lane / 4 * LD;
    const E* const low = top + 8 * LD;
    const E* const own = b + 2 * (lane % 4) * LD;
#pragma unroll 4
    for (int k = 0; k < D; ++k) {
      const float p = widen(top[k]), q = widen(low[k]);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float x = widen(own[n * 8 * LD + k]), y = widen(own[(n * 8 + 1) * LD + k]);
        acc[n][0] += p * x;
        acc[n][1] += p * y;
        acc[n][2] += q * x;
        acc[n][3] += q * y;
      }
    }
  }
}

/// acc [16, 8 N] += p b: p [16, 8 M] is held as products leave it, b has 8 M rows in shared memory.
template <class E, int M, int N> INLINE void sums_by_columns(float (&acc)[N][4], const float (&p)[M][4], const E* b) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int m = 0; m < M; m += 2) {
      const u32 x[4] = {pair(p[m][0], p[m][1], E()), pair(p[m][2], p[m][3], E()),
                        pair(p[m + 1][0], p[m + 1][1], E()), pair(p[m + 1][2], p[m + 1][3], E())};
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        u32 y[4];
        ldmatrix_t(y, b + (m * 8 + lane % 8 + lane / 8 % 2 * 8) * LD + n * 8 + lane / 16 * 8);
        const u32 first[2] = {y[0], y[1]}, second[2] = {y[2], y[3]};
        mma(acc[n], x, first, E());
        mma(acc[n + 1], x, second, E());
      }
    }
  } else {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int from = (lane & ~3) + k / 2;
        const float x = __shfl_sync(ALL, p[m][k % 2], from), y = __shfl_sync(ALL, p[m][2 + k % 2], from);
        const E* const row = b + (m * 8 + k) * LD + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          acc[n][0] += x * widen(row[n * 8]);
          acc[n][1] += x * widen(row[n * 8 + 1]);
          acc[n][2] += y * widen(row[n * 8]);
          acc[n][3] += y * widen(row[n * 8 + 1]);
        }
      }
  }
}

INLINE float quad_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}
INLINE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// Grid: blocks of queries (the last, which sees most, first), heads, sequences.
extern "C" __global__ void __launch_bounds__(128)
    attention(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ out,
              float* __restrict__ lse, const Shape s) {
  DYN_SMEM(T, tiles);
  T* const queries = tiles;
  T* const steps = tiles + ROWS * LD;  // keys, values, keys, values
  const u32 h = blockIdx.y, batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Sequence o = sequence(s, batch, h);
  const u64 row = (u64)s.heads * s.head_dim, kv_row = (u64)s.kv_heads * s.head_dim;
  const u64 kv_at = batch * s.kv_stride + h / (s.heads / s.kv_heads) * s.head_dim;
  q += (batch * (u64)s.q_len + first) * row + h * s.head_dim;
  out += (batch * (u64)s.q_len + first) * row + h * s.head_dim;
  lse += ((u64)batch * s.heads + h) * s.q_len + first;
  k += kv_at, v += kv_at;
  const bool vectors = whole_vectors(s) && aligned(q, k, v, out);

  const int last = first + ROWS < o.queries ? first + ROWS : o.queries;
  const int from = visible(s, o, first).from / STEP * STEP, to = last > first ? visible(s, o, last - 1).to : 0;
  const auto bring = [&](int at) {
    T* const room = steps + at / STEP % 2 * 2 * STEP * LD;
    fetch<STEP>(room, k + at * kv_row, o.keys - at, kv_row, s.head_dim, vectors);
    fetch<STEP>(room + STEP * LD, v + at * kv_row, o.keys - at, kv_row, s.head_dim, vectors);
  };
  if (from < to) {
    fetch<ROWS>(queries, q, o.queries - first, row, s.head_dim, vectors);
    bring(from);
  }
  copies_commit();

  float acc[D / 8][4] = {}, max[2] = {-INFINITE, -INFINITE}, sum[2] = {};
  Range seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) seen[r] = visible(s, o, first + warp * 16 + g + 8 * r);
  for (int at = from; at < to; at += STEP) {
    if (at + STEP < to) bring(at + STEP);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    const T* const keys = steps + at / STEP % 2 * 2 * STEP * LD;
    float p[STEP / 8][4] = {};
    rows_by_rows(p, queries + warp * 16 * LD, keys);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const bias = o.bias ? o.bias + (first + warp * 16 + g + 8 * r) * (u64)s.kv_len : nullptr;
      float top = max[r];
#pragma unroll
      for (int n = 0; n < STEP / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = at + n * 8 + 2 * t + e;
          float& x = p[n][2 * r + e];
          const bool sees = key >= seen[r].from && key < seen[r].to;
          x = sees ? x * (s.scale * LOG2E) + (bias ? bias[key] * LOG2E : 0.0f) : -INFINITE;
          top = fmaxf(top, x);
        }
      top = quad_max(top);
      // Nothing seen yet: all stays zero.
      const float base = top == -INFINITE ? 0.0f : top;
      const float keep = exp2_fast(max[r] - base);
      max[r] = top;
      float here = 0.0f;
#pragma unroll
      for (int n = 0; n < STEP / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) here += p[n][2 * r + e] = exp2_fast(p[n][2 * r + e] - base);
      sum[r] = sum[r] * keep + here;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) acc[n][2 * r] *= keep, acc[n][2 * r + 1] *= keep;
    }
    sums_by_columns(acc, p, keys + STEP * LD);
    __syncthreads();
  }
  copies_wait<0>();
  __syncthreads();

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float all = quad_sum(sum[r]);
    factor[r] = all > 0.0f ? 1.0f / all : 0.0f;
    const int i = warp * 16 + g + 8 * r;
    if (t == 0 && first + i < (int)s.q_len) lse[i] = all > 0.0f ? max[r] * LN2 + logf(all) : -INFINITE;
  }
  put(out + warp * 16 * row, acc, factor[0], factor[1], queries + warp * 16 * LD,
      (int)s.q_len - first - warp * 16, row, s.head_dim, vectors);
}
KERNEL(attention)

// delta [batch, heads, q_len] = sum(out dout). A warp a row. Bound: memory.
extern "C" __global__ void __launch_bounds__(128)
    attention_delta(const T* __restrict__ out, const T* __restrict__ dout, float* __restrict__ delta, u64 rows,
                    const Shape s) {
  const u64 i = (u64)blockIdx.x * 4 + threadIdx.x / 32;
  if (i >= rows) return;
  const u64 h = i % s.heads, token = i / s.heads, batch = token / s.q_len;
  float sum = 0.0f;
  for (u32 c = threadIdx.x % 32; c < s.head_dim; c += 32) sum += widen(out[i * s.head_dim + c]) * widen(dout[i * s.head_dim + c]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[(batch * s.heads + h) * s.q_len + token % s.q_len] = sum;
}
KERNEL(attention_delta)

// Grid as forward.
extern "C" __global__ void __launch_bounds__(128)
    attention_backward_q(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                         const float* __restrict__ lse, const T* __restrict__ dout, const float* __restrict__ delta,
                         T* __restrict__ dq, const Shape s) {
  DYN_SMEM(T, tiles);
  T* const queries = tiles;
  T* const douts = tiles + ROWS * LD;
  T* const steps = tiles + 2 * ROWS * LD;
  const u32 h = blockIdx.y, batch = blockIdx.z;
  const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Sequence o = sequence(s, batch, h);
  const u64 row = (u64)s.heads * s.head_dim, kv_row = (u64)s.kv_heads * s.head_dim;
  const u64 kv_at = batch * s.kv_stride + h / (s.heads / s.kv_heads) * s.head_dim;
  const u64 q_at = (batch * (u64)s.q_len + first) * row + h * s.head_dim;
  const u64 stat_at = ((u64)batch * s.heads + h) * s.q_len + first;
  q += q_at, dout += q_at, dq += q_at, lse += stat_at, delta += stat_at;
  k += kv_at, v += kv_at;
  const bool vectors = whole_vectors(s) && aligned(q, k, v, dout, dq);

  const int last = first + ROWS < o.queries ? first + ROWS : o.queries;
  const int from = visible(s, o, first).from / BACK * BACK, to = last > first ? visible(s, o, last - 1).to : 0;
  const auto bring = [&](int at) {
    T* const room = steps + at / BACK % STAGES * 2 * BACK * LD;
    fetch<BACK>(room, k + at * kv_row, o.keys - at, kv_row, s.head_dim, vectors);
    fetch<BACK>(room + BACK * LD, v + at * kv_row, o.keys - at, kv_row, s.head_dim, vectors);
  };
  if (from < to) {
    fetch<ROWS>(queries, q, o.queries - first, row, s.head_dim, vectors);
    fetch<ROWS>(douts, dout, o.queries - first, row, s.head_dim, vectors);
    bring(from);
  }
  copies_commit();

  float acc[D / 8][4] = {};
  float log_sum[2], dot[2];
  Range seen[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = warp * 16 + g + 8 * r;
    seen[r] = visible(s, o, first + i);
    const bool any = seen[r].from < seen[r].to;
    log_sum[r] = any ? lse[i] * LOG2E : INFINITE;
    dot[r] = any ? delta[i] : 0.0f;
  }
  for (int at = from; at < to; at += BACK) {
    if (STAGES == 2 && at + BACK < to) bring(at + BACK);
    copies_commit();
    copies_wait<STAGES - 1>();
    __syncthreads();
    const T* const keys = steps + at / BACK % STAGES * 2 * BACK * LD;
    float p[BACK / 8][4] = {}, dp[BACK / 8][4] = {};
    rows_by_rows(p, queries + warp * 16 * LD, keys);
    rows_by_rows(dp, douts + warp * 16 * LD, keys + BACK * LD);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float* const bias = o.bias ? o.bias + (first + warp * 16 + g + 8 * r) * (u64)s.kv_len : nullptr;
#pragma unroll
      for (int n = 0; n < BACK / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = at + n * 8 + 2 * t + e;
          float& x = p[n][2 * r + e];
          const bool sees = key >= seen[r].from && key < seen[r].to;
          const float score = x * (s.scale * LOG2E) + (bias && sees ? bias[key] * LOG2E : 0.0f);
          x = sees ? exp2_fast(score - log_sum[r]) * (dp[n][2 * r + e] - dot[r]) : 0.0f;
        }
    }
    sums_by_columns(acc, p, keys);
    __syncthreads();
    if (STAGES == 1 && at + BACK < to) bring(at + BACK);
  }
  copies_wait<0>();
  __syncthreads();
  put(dq + warp * 16 * row, acc, s.scale, s.scale, queries + warp * 16 * LD, (int)s.q_len - first - warp * 16, row,
      s.head_dim, vectors);
}
KERNEL(attention_backward_q)

// Grid: blocks of keys (the first, which most see, first), key heads, sequences.
extern "C" __global__ void __launch_bounds__(128 * SPLIT)
    attention_backward_kv(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                          const float* __restrict__ lse, const T* __restrict__ dout, const float* __restrict__ delta,
                          T* __restrict__ dk, T* __restrict__ dv, const Shape s) {
  DYN_SMEM(T, tiles);
  __shared__ float stats[2][2][BACK];  // of a stage: log-sum-exps, deltas
  T* const keys = tiles;
  T* const values = tiles + ROWS * LD;
  T* const steps = tiles + 2 * ROWS * LD;
  const u32 kv_head = blockIdx.y, batch = blockIdx.z, group = s.heads / s.kv_heads;
  const int first = blockIdx.x * ROWS, warp = threadIdx.x / 32 % 4, part = threadIdx.x / 128;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u64 row = (u64)s.heads * s.head_dim, kv_row = (u64)s.kv_heads * s.head_dim;
  const u64 kv_at = batch * s.kv_stride + first * kv_row + kv_head * s.head_dim;
  k += kv_at, v += kv_at, dk += kv_at, dv += kv_at;
  q += batch * (u64)s.q_len * row, dout += batch * (u64)s.q_len * row;
  const bool vectors = whole_vectors(s) && aligned(q, k, v, dout, dk, dv);

  const Sequence all = sequence(s, batch, 0);
  // Which queries see any of these keys.
  int from = 0, to = all.queries;
  if (s.causal) {
    const int shift = all.queries - all.keys;
    from = first + shift < 0 ? 0 : first + shift;
    const int end = s.window ? first + ROWS - 1 + (int)s.window + shift : to;
    to = end < to ? end : to;
  }
  if (first >= all.keys) to = from;
  from = from / BACK * BACK;
  const int steps_a_head = to > from ? (to - from + BACK - 1) / BACK : 0, count = steps_a_head * (int)group;
  const auto bring = [&](int step) {
    const u32 h = kv_head * group + step / steps_a_head;
    const int at = from + step % steps_a_head * BACK;
    T* const room = steps + step % STAGES * 2 * BACK * LD;
    const u64 q_at = at * row + h * s.head_dim, stat_at = ((u64)batch * s.heads + h) * s.q_len + at;
    fetch<BACK>(room, q + q_at, all.queries - at, row, s.head_dim, vectors);
    fetch<BACK>(room + BACK * LD, dout + q_at, all.queries - at, row, s.head_dim, vectors);
    for (int i = threadIdx.x; i < BACK; i += blockDim.x) {
      const Range seen = visible(s, all, at + i);
      const bool any = seen.from < seen.to;
      stats[step % STAGES][0][i] = any ? lse[stat_at + i] * LOG2E : INFINITE;
      stats[step % STAGES][1][i] = any ? delta[stat_at + i] : 0.0f;
    }
  };
  if (count) {
    fetch<ROWS>(keys, k, all.keys - first, kv_row, s.head_dim, vectors);
    fetch<ROWS>(values, v, all.keys - first, kv_row, s.head_dim, vectors);
    bring(0);
  }
  copies_commit();

  float dk_acc[D / 8 / SPLIT][4] = {}, dv_acc[D / 8 / SPLIT][4] = {};
  for (int step = 0; step < count; ++step) {
    if (STAGES == 2 && step + 1 < count) bring(step + 1);
    copies_commit();
    copies_wait<STAGES - 1>();
    __syncthreads();
    const T* const queries = steps + step % STAGES * 2 * BACK * LD;
    const T* const douts = queries + BACK * LD;
    const int at = from + step % steps_a_head * BACK;
    const Sequence o = sequence(s, batch, kv_head * group + step / steps_a_head);
    float p[BACK / 8][4] = {}, dp[BACK / 8][4] = {};  // transposed: keys by queries
    rows_by_rows(p, keys + warp * 16 * LD, queries);
    rows_by_rows(dp, values + warp * 16 * LD, douts);
#pragma unroll
    for (int n = 0; n < BACK / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = n * 8 + 2 * t + e;
        const Range seen = visible(s, o, at + i);
        const float log_sum = stats[step % STAGES][0][i], dot = stats[step % STAGES][1][i];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = first + warp * 16 + g + 8 * r;
          const bool sees = key >= seen.from && key < seen.to;
          const float bias = o.bias && sees ? o.bias[(at + i) * (u64)s.kv_len + key] * LOG2E : 0.0f;
          float& x = p[n][2 * r + e];
          x = sees ? exp2_fast(x * (s.scale * LOG2E) + bias - log_sum) : 0.0f;
          dp[n][2 * r + e] = sees ? x * (dp[n][2 * r + e] - dot) : 0.0f;
        }
      }
    sums_by_columns(dv_acc, p, douts + part * (D / SPLIT));
    sums_by_columns(dk_acc, dp, queries + part * (D / SPLIT));
    __syncthreads();
    if (STAGES == 1 && step + 1 < count) bring(step + 1);
  }
  copies_wait<0>();
  __syncthreads();
  const int rows = (int)s.kv_len - first - warp * 16, columns = (int)s.head_dim - part * (D / SPLIT);
  const u64 own = warp * 16 * kv_row + part * (D / SPLIT);
  const int room = warp * 16 * LD + part * (D / SPLIT);
  put(dk + own, dk_acc, s.scale, s.scale, keys + room, rows, kv_row, columns, vectors);
  put(dv + own, dv_acc, 1.0f, 1.0f, values + room, rows, kv_row, columns, vectors);
}
KERNEL(attention_backward_kv)
