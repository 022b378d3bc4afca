// Attention of few queries to many keys: decoding against a cache. Bound: memory; each key and value
// is read once for every 4 rows of queries that share it.
//
// Keys are split among blocks, so that one sequence keeps a whole device busy; each block leaves its
// share of the softmax, and a second kernel adds the shares in order. In a warp a group of lanes
// takes a key, 16 bytes a lane, several keys in flight.

constexpr int K = WIDTH<T>;
constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
/// Lanes that share a key, and vectors of each.
constexpr int LANES = power_of_two(D / K) < 32 ? power_of_two(D / K) : 32;
constexpr int EACH = (D / K + LANES - 1) / LANES;
/// Rows of queries of a block, keys that a group of lanes has in flight, and its warps.
constexpr int ROWS = 4, FLIGHT = EACH > 1 ? 2 : 4, WARPS = 4;
constexpr int GROUPS = 32 / LANES;

/// Where keys are, if a cache is cut into pages of 1 << shift keys [page, kv_heads, head_dim]: page `i` of
/// a sequence is table[sequence * row + i] of `count`.
struct Pages { const int* table; u32 row, shift, count; };
constexpr u64 NOWHERE = ~0ull;

/// The place of a key of a sequence, as a number of keys; NOWHERE if its page is none.
INLINE u64 place_of(const Pages& p, u32 batch, int key) {
  if (!p.table) return key;
  const int page = p.table[batch * (u64)p.row + (key >> p.shift)];
  return (u32)page < p.count ? ((u64)page << p.shift) + (key & ((1 << p.shift) - 1)) : NOWHERE;
}

// Grid: splits of `span` keys, key heads times chunks of rows, sequences. A row is a query of one of
// the heads that share the key head. shares [batch, heads, q_len, splits, D + 2]: sums, then the
// maximum and the sum of exponentials, base 2.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    decode(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, float* __restrict__ shares,
           u32 span, const Shape s, const Pages pages) {
  __shared__ float part[WARPS][ROWS][D + 2];
  const u32 group = s.heads / s.kv_heads, rows = group * s.q_len, chunks = (rows + ROWS - 1) / ROWS;
  const u32 kv_head = blockIdx.y / chunks, row0 = blockIdx.y % chunks * ROWS, batch = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = lane % LANES, set = lane / LANES;
  const u64 kv_row = (u64)s.kv_heads * s.head_dim, kv_at = (pages.table ? 0 : batch * s.kv_stride) + kv_head * s.head_dim;
  k += kv_at, v += kv_at;
  const bool vectors = whole_vectors(s) && aligned(q, k, v);
  const int split_from = blockIdx.x * span, split_to = split_from + span;

  float query[ROWS][EACH][K], acc[ROWS][EACH][K], top[ROWS], sum[ROWS];
  Range seen[ROWS];
  const float* bias[ROWS];
  int from = split_to, to = split_from;
  u32 width[EACH];
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const u32 c = (own + e * LANES) * K;
    width[e] = c < s.head_dim ? min((u32)K, s.head_dim - c) : 0;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const u32 row = row0 + r, head = kv_head * group + row / s.q_len, i = row % s.q_len;
    top[r] = -INFINITE, sum[r] = 0.0f;
    seen[r] = {0, 0};
    bias[r] = nullptr;
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
      for (int c = 0; c < K; ++c) query[r][e][c] = acc[r][e][c] = 0.0f;
    if (row >= rows) continue;
    const Sequence o = sequence(s, batch, head);
    seen[r] = visible(s, o, i);
    if (o.bias) bias[r] = o.bias + i * (u64)s.kv_len;
    if (seen[r].from < seen[r].to) {
      from = min(from, seen[r].from);
      to = max(to, seen[r].to);
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const u64 at = ((batch * (u64)s.q_len + i) * s.heads + head) * s.head_dim + (own + e * LANES) * K;
      const auto x = load_part<K>(q + at, width[e], vectors && width[e] == K);
#pragma unroll
      for (int c = 0; c < K; ++c) query[r][e][c] = x.v[c] * (s.scale * LOG2E);
    }
  }
  from = max(from, split_from);
  to = min(to, split_to);

  for (int at = from + (warp * GROUPS + set) * FLIGHT; at - (warp * GROUPS + set) * FLIGHT < to; at += WARPS * GROUPS * FLIGHT) {
    Floats<K> keys[FLIGHT][EACH], values[FLIGHT][EACH];
    u64 key_at[FLIGHT];
#pragma unroll
    for (int f = 0; f < FLIGHT; ++f) key_at[f] = at + f < to ? place_of(pages, batch, at + f) : 0;
#pragma unroll
    for (int f = 0; f < FLIGHT; ++f)
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const u32 there = at + f < to && key_at[f] != NOWHERE ? width[e] : 0;
        const u64 place = key_at[f] * kv_row + (own + e * LANES) * K;
        keys[f][e] = load_part<K>(k + place, there, vectors && there == K);
        values[f][e] = load_part<K>(v + place, there, vectors && there == K);
      }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (row0 + r >= rows) continue;
      float score[FLIGHT], high = top[r];
#pragma unroll
      for (int f = 0; f < FLIGHT; ++f) {
        float x = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
          for (int c = 0; c < K; ++c) x += query[r][e][c] * keys[f][e].v[c];
#pragma unroll
        for (int o = LANES / 2; o; o >>= 1) x += __shfl_xor_sync(ALL, x, o);
        const int key = at + f;
        const bool sees = key >= seen[r].from && key < seen[r].to && key < to;
        // A page that does not exist must not pass for one of zeros.
        if (key_at[f] == NOWHERE) x = __uint_as_float(0x7fc00000u);
        score[f] = sees ? x + (bias[r] ? bias[r][key] * LOG2E : 0.0f) : -INFINITE;
        high = fmaxf(high, score[f]);
      }
      const float base = high == -INFINITE ? 0.0f : high, keep = exp2_fast(top[r] - base);
      top[r] = high;
      sum[r] *= keep;
#pragma unroll
      for (int e = 0; e < EACH; ++e)
#pragma unroll
        for (int c = 0; c < K; ++c) acc[r][e][c] *= keep;
#pragma unroll
      for (int f = 0; f < FLIGHT; ++f) {
        const float p = exp2_fast(score[f] - base);
        sum[r] += p;
#pragma unroll
        for (int e = 0; e < EACH; ++e)
#pragma unroll
          for (int c = 0; c < K; ++c) acc[r][e][c] += p * values[f][e].v[c];
      }
    }
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (row0 + r >= rows) continue;
    float high = top[r];
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) high = fmaxf(high, __shfl_xor_sync(ALL, high, o));
    const float keep = exp2_fast(top[r] - (high == -INFINITE ? 0.0f : high));
    float all = sum[r] * keep;
#pragma unroll
    for (int o = LANES; o < 32; o <<= 1) all += __shfl_xor_sync(ALL, all, o);
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
      for (int c = 0; c < K; ++c) {
        float x = acc[r][e][c] * keep;
#pragma unroll
        for (int o = LANES; o < 32; o <<= 1) x += __shfl_xor_sync(ALL, x, o);
        const int column = (own + e * LANES) * K + c;
        if (set == 0 && column < D) part[warp][r][column] = x;
      }
    if (lane == 0) {
      part[warp][r][D] = high;
      part[warp][r][D + 1] = all;
    }
  }
  __syncthreads();
  for (int r = 0; r < ROWS && row0 + r < rows; ++r) {
    const u32 row = row0 + r, head = kv_head * group + row / s.q_len, i = row % s.q_len;
    float* const share = shares + ((((u64)batch * s.heads + head) * s.q_len + i) * gridDim.x + blockIdx.x) * (D + 2);
    float high = -INFINITE, scale[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) high = fmaxf(high, part[w][r][D]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) scale[w] = exp2_fast(part[w][r][D] - (high == -INFINITE ? 0.0f : high));
    for (int c = threadIdx.x; c < D + 2; c += blockDim.x) {
      float x = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) x += scale[w] * (c == D ? 0.0f : part[w][r][c]);
      share[c] = c == D ? high : x;
    }
  }
}
KERNEL(decode)

// A warp a query of a head: `rows` of them, in the order of the log-sum-exps.
extern "C" __global__ void __launch_bounds__(128)
    decode_combine(const float* __restrict__ shares, u32 splits, T* __restrict__ out, float* __restrict__ lse, u32 rows,
                   const Shape s) {
  const u32 row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const u32 i = row % s.q_len, head = row / s.q_len % s.heads, batch = row / s.q_len / s.heads;
  const float* const share = shares + (u64)row * splits * (D + 2);
  float high = -INFINITE, sum = 0.0f;
  for (u32 p = lane; p < splits; p += 32) high = fmaxf(high, share[p * (D + 2) + D]);
  high = warp_max(high);
  const float base = high == -INFINITE ? 0.0f : high;
  float acc[(D + 31) / 32] = {};
  for (u32 p = 0; p < splits; ++p) {
    const float scale = exp2_fast(share[p * (D + 2) + D] - base);
    sum += scale * share[p * (D + 2) + D + 1];
#pragma unroll
    for (u32 c = 0; c < (D + 31) / 32; ++c)
      if (c * 32 + lane < D) acc[c] += scale * share[p * (D + 2) + c * 32 + lane];
  }
  const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
  T* const to = out + ((batch * (u64)s.q_len + i) * s.heads + head) * s.head_dim;
#pragma unroll
  for (u32 c = 0; c < (D + 31) / 32; ++c)
    if (c * 32 + lane < s.head_dim) narrow(acc[c] * factor, to[c * 32 + lane]);
  if (lane == 0) lse[row] = sum > 0.0f ? high * LN2 + logf(sum) : -INFINITE;
}
KERNEL(decode_combine)
