// Matrix products c = act(alpha a b + bias), or c += ..., of any strides; many at once.
//
// bf16 and f16 on the tensor cores (mma.sync, sm_80 and later), floats by multiply-adds; sums are
// floats. A block makes a tile of TILE x TILE of one product; slabs of both operands come by
// asynchronous copies, STAGES deep. Bound: the tensor cores for large products (an estimated half of
// what wgmma reaches on sm_90), memory where a side is short. The fallback where cuBLASLt is absent.
//
// Operands keep in shared memory the order that they have outside: "k" entries have the depth
// contiguous, "m" entries the rows of a (columns of b). A product of other strides, or that is not
// aligned, is read element by element.

struct Problem {
  const T* a;
  const T* b;
  OUT* c;
  u64 a_row, a_col, b_row, b_col, c_row, c_col;
  u32 m, n, k;
  u32 first;  // its first tile
};
struct Group {
  Problem problem[32];
  const T* bias;
  u64 batch_a, batch_b, batch_c;
  float alpha;
  u32 count, accumulate, activation;
};

INLINE float activate(float x, u32 kind) {
  switch (kind) {
    case 1: return gelu_of(x);
    case 2: return gelu_tanh_of(x);
    case 3: return silu_of(x);
    case 4: return relu_of(x);
    default: return x;
  }
}

// A row of a finished tile in shared memory.
#define PITCH (TILE + 4)

/// A tile on its way out, from shared memory: whole vectors where c allows it.
INLINE void put(const Group& g, const Problem& p, const float* tile, u32 row0, u32 col0) {
  constexpr int V = WIDTH<OUT>;
  OUT* const c = p.c + blockIdx.y * g.batch_c;
  const bool vectors = p.c_col == 1 && p.c_row % V == 0 && aligned(c);
  __syncthreads();
#pragma unroll 1
  for (u32 e = threadIdx.x * V; e < TILE * TILE; e += blockDim.x * V) {
    const u32 i = e / TILE, j = e % TILE, row = row0 + i, col = col0 + j;
    if (row >= p.m || col >= p.n) continue;
    const u32 width = min((u32)V, p.n - col);
    OUT* const to = c + row * p.c_row + col * p.c_col;
    Floats<V> x = load<V>(tile + i * PITCH + j), old;
    if (g.accumulate) {
      if (vectors) old = load_part<V>(to, width, width == V);
      else
#pragma unroll
        for (u32 k = 0; k < V; ++k) old.v[k] = k < width ? widen(to[k * p.c_col]) : 0.0f;
    }
#pragma unroll
    for (u32 k = 0; k < V; ++k) {
      float y = x.v[k] * g.alpha;
      if (g.bias && k < width) y += widen(g.bias[col + k]);
      if (g.activation) y = activate(y, g.activation);
      x.v[k] = g.accumulate ? old.v[k] + y : y;
    }
    if (vectors) store_part<V>(to, x, width, width == V);
    else
#pragma unroll
      for (u32 k = 0; k < V; ++k) if (k < width) narrow(x.v[k], to[k * p.c_col]);
  }
}

/// The product that this block works on, and its tile there: 8 rows of tiles share their columns of b
/// while those are in the cache.
INLINE u32 find(const Group& g, u32& row, u32& col) {
  u32 i = 0;
  while (i + 1 < g.count && g.problem[i + 1].first <= blockIdx.x) ++i;
  const Problem& p = g.problem[i];
  const u32 rows = (p.m + TILE - 1) / TILE, cols = (p.n + TILE - 1) / TILE;
  const u32 t = blockIdx.x - p.first, band = t / (8 * cols), in_band = t % (8 * cols);
  const u32 high = min(rows - 8 * band, 8u);
  row = (8 * band + in_band % high) * TILE;
  col = in_band / high * TILE;
  return i;
}

#if HALF

#define DEPTH 32
#define STAGES 4
#define WARPS_N (TILE / 32)
#define WARP_M (TILE / 2)
#define THREADS (2 * WARPS_N * 32)
// Elements of one operand in one stage.
#define SLAB (TILE * DEPTH)

/// Where element (i, k) lies in a slab; chunks of 8 elements are permuted so that ldmatrix meets no
/// bank twice.
template <bool K> INLINE u32 place(u32 i, u32 k) {
  if (K) return i * DEPTH + ((k / 8 ^ (i / 2 & 3)) * 8) + k % 8;
  return k * TILE + ((i / 8 ^ (k & 7)) * 8) + i % 8;
}

/// Starts to bring a slab: elements (first .. first + TILE, from .. from + DEPTH) of an operand with
/// `size` rows (columns of b) and `depth` steps.
template <bool K>
INLINE void bring(T* to, const T* from, u64 stride, u64 step, u32 first, u32 size, u32 at, u32 depth, bool vectors) {
#pragma unroll
  for (u32 c = threadIdx.x; c < SLAB / 8; c += THREADS) {
    const u32 i = K ? c / (DEPTH / 8) : c % (TILE / 8) * 8, k = K ? c % (DEPTH / 8) * 8 : c / (TILE / 8);
    T* const chunk = to + place<K>(i, k);
    const u32 row = first + i, deep = at + k;
    const bool there = row < size && deep < depth;
    const u32 left = there ? min(8u, K ? depth - deep : size - row) : 0;
    const T* const source = from + (there ? row * stride + deep * step : 0);
    if (vectors) {
      copy16(chunk, source, left * sizeof(T));
    } else {
      Vec<T, 8> v;
#pragma unroll
      for (u32 e = 0; e < 8; ++e) v.v[e] = e < left ? source[e * (K ? step : stride)] : as<T>(0.0f);
      *reinterpret_cast<Vec<T, 8>*>(chunk) = v;
    }
  }
}

template <bool AK, bool BK> INLINE void product(const Group& g) {
  DYN_SMEM(T, slabs);
  u32 row0, col0;
  const Problem& p = g.problem[find(g, row0, col0)];
  const T* const a = p.a + blockIdx.y * g.batch_a;
  const T* const b = p.b + blockIdx.y * g.batch_b;
  const bool fast_a = aligned(a) && (AK ? p.a_col == 1 && p.a_row % 8 == 0 : p.a_row == 1 && p.a_col % 8 == 0);
  const bool fast_b = aligned(b) && (BK ? p.b_row == 1 && p.b_col % 8 == 0 : p.b_col == 1 && p.b_row % 8 == 0);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * 32;
  const u32 steps = (p.k + DEPTH - 1) / DEPTH;
  const auto start = [&](u32 step) {
    if (step < steps) {
      T* const slab = slabs + step % STAGES * 2 * SLAB;
      bring<AK>(slab, a, p.a_row, p.a_col, row0, p.m, step * DEPTH, p.k, fast_a);
      bring<BK>(slab + SLAB, b, p.b_col, p.b_row, col0, p.n, step * DEPTH, p.k, fast_b);
    }
    copies_commit();  // Also of nothing: groups count steps.
  };
  float sums[WARP_M / 16][4][4];
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[i][j][r] = 0.0f;
  for (u32 s = 0; s < STAGES - 1; ++s) start(s);
  for (u32 step = 0; step < steps; ++step) {
    copies_wait<STAGES - 2>();
    __syncthreads();  // The slab is there, and the one before it is done with.
    start(step + STAGES - 1);
    const T* const slab_a = slabs + step % STAGES * 2 * SLAB;
    const T* const slab_b = slab_a + SLAB;
#pragma unroll
    for (u32 k = 0; k < DEPTH; k += 16) {
      u32 fa[WARP_M / 16][4], fb[2][4];
#pragma unroll
      for (u32 i = 0; i < WARP_M / 16; ++i) {
        const u32 m = warp_m + i * 16;
        if (AK) ldmatrix(fa[i], slab_a + place<true>(m + lane % 16, k + lane / 16 * 8));
        else ldmatrix_t(fa[i], slab_a + place<false>(m + lane / 8 % 2 * 8, k + lane % 8 + lane / 16 * 8));
      }
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        const u32 n = warp_n + j * 16;
        if (BK) ldmatrix(fb[j], slab_b + place<true>(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
        else ldmatrix_t(fb[j], slab_b + place<false>(n + lane / 16 * 8, k + lane % 16));
      }
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const u32 pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          mma(sums[i][j], fa[i], pair, T());
        }
    }
  }
  copies_wait<0>();
  __syncthreads();  // All have read the last slab.
  float* const tile = reinterpret_cast<float*>(slabs);
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const u32 row = warp_m + i * 16 + lane / 4 + r * 4, col = warp_n + j * 8 + lane % 4 * 2;
        store(tile + row * PITCH + col, Floats<2>{{sums[i][j][r], sums[i][j][r + 1]}});
      }
  put(g, p, tile, row0, col0);
}

#else

#define DEPTH 16
// A thread makes EACH x EACH elements.
#define EACH (TILE / 16)
#define THREADS 256

/// A thread's elements of a slab [DEPTH][TILE], neighbours in memory beside each other.
template <bool K, class F> INLINE void of_slab(F f) {
#pragma unroll
  for (u32 j = 0; j < TILE * DEPTH / THREADS; ++j) {
    const u32 e = threadIdx.x + j * THREADS;
    f(j, K ? e / DEPTH : e % TILE, K ? e % DEPTH : e / TILE);
  }
}

template <bool AK, bool BK> INLINE void product(const Group& g) {
  struct Slab { float v[DEPTH][PITCH]; };
  DYN_SMEM(Slab, slabs);  // two of a, two of b
  u32 row0, col0;
  const Problem& p = g.problem[find(g, row0, col0)];
  const T* const a = p.a + blockIdx.y * g.batch_a;
  const T* const b = p.b + blockIdx.y * g.batch_b;
  const u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  float next_a[TILE * DEPTH / THREADS], next_b[TILE * DEPTH / THREADS];
  const auto read = [&](u32 at) {
    of_slab<AK>([&](u32 j, u32 i, u32 k) {
      next_a[j] = row0 + i < p.m && at + k < p.k ? a[(row0 + i) * p.a_row + (at + k) * p.a_col] : 0.0f;
    });
    of_slab<BK>([&](u32 j, u32 i, u32 k) {
      next_b[j] = col0 + i < p.n && at + k < p.k ? b[(col0 + i) * p.b_col + (at + k) * p.b_row] : 0.0f;
    });
  };
  const auto write = [&](u32 half) {
    of_slab<AK>([&](u32 j, u32 i, u32 k) { slabs[half].v[k][i] = next_a[j]; });
    of_slab<BK>([&](u32 j, u32 i, u32 k) { slabs[2 + half].v[k][i] = next_b[j]; });
  };
  float sums[EACH][EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int j = 0; j < EACH; ++j) sums[i][j] = 0.0f;
  const u32 steps = (p.k + DEPTH - 1) / DEPTH;
  if (steps) {
    read(0);
    write(0);
  }
  for (u32 step = 0; step < steps; ++step) {
    __syncthreads();  // This slab is there, and the other is done with.
    if (step + 1 < steps) read((step + 1) * DEPTH);
    const auto& sa = slabs[step % 2].v;
    const auto& sb = slabs[2 + step % 2].v;
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
      // Rows in runs of 4 that lie 64 apart: a warp reads whole lines.
      float x[EACH], y[EACH];
#pragma unroll
      for (int v = 0; v < EACH; v += 4) {
        const auto p4 = load<4>(&sa[k][ty * 4 + v * 16]), q4 = load<4>(&sb[k][tx * 4 + v * 16]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[v + e] = p4.v[e];
          y[v + e] = q4.v[e];
        }
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i)
#pragma unroll
        for (int j = 0; j < EACH; ++j) sums[i][j] += x[i] * y[j];
    }
    if (step + 1 < steps) write((step + 1) % 2);
  }
  __syncthreads();  // All have read the last slab.
  float* const tile = reinterpret_cast<float*>(slabs);
#pragma unroll
  for (int i = 0; i < EACH; ++i)
#pragma unroll
    for (int j = 0; j < EACH; j += 4)
      store(tile + (ty * 4 + i / 4 * 64 + i % 4) * PITCH + tx * 4 + j * 16,
            Floats<4>{{sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]}});
  put(g, p, tile, row0, col0);
}

#endif

#define ENTRY(name, a_k, b_k)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Group g) {       \
    product<a_k, b_k>(g);                                                                             \
  }                                                                                                   \
  KERNEL(name)

ENTRY(gemm_kk, true, true)
ENTRY(gemm_km, true, false)
ENTRY(gemm_mk, false, true)
ENTRY(gemm_mm, false, false)
