// Rows of a table, and gradients scattered back. Bound: memory.

#define K WIDTH<T>

// A block a row; ids outside of the table give zeros.
extern "C" __global__ void __launch_bounds__(256)
    embedding(const int* __restrict__ ids, const T* __restrict__ table, u64 entries, u32 dim, T* __restrict__ y) {
  const int id = ids[blockIdx.x];
  const bool there = id >= 0 && (u64)id < entries;
  y += (u64)blockIdx.x * dim;
  row_wise<K>(dim, aligned(table, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(dim, [&](u32 i) {
      Floats<N> p;
      for (int k = 0; k < N; ++k) p.v[k] = 0.0f;
      if (there) p = load<N>(table + (u64)id * dim + i);
      store(y + i, p);
    });
  });
}
KERNEL(embedding)

// dtable[ids[i]] += dy[i], deterministic: the block of an id's first occurrence adds all of them in
// order. A block is a token and 256 vectors of columns. The list of ids is read from the cache by
// each block: few thousand tokens cost less than the rows they move.
extern "C" __global__ void __launch_bounds__(256)
    embedding_backward(const int* __restrict__ ids, u32 tokens, const T* __restrict__ dy, u32 dim,
                       float* __restrict__ dtable, u64 entries) {
  __shared__ u32 earlier[8], matches[256], counts[8];
  const u32 self = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int id = ids[self];
  if (id < 0 || (u64)id >= entries) return;
  for (u32 from = 0; from < self; from += blockDim.x) {
    const u32 j = from + threadIdx.x;
    const u32 found = warp_any(j < self && ids[j] == id);
    if (lane == 0) earlier[warp] = found;
    __syncthreads();
    u32 any = 0;
    for (int w = 0; w < 8; ++w) any |= earlier[w];
    __syncthreads();
    if (any) return;
  }
  const u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * K;
  const u32 width = column < dim ? min((u32)K, dim - column) : 0;
  const bool vectors = width == K && dim % K == 0 && aligned(dy, dtable);
  float* const to = dtable + (u64)id * dim + column;
  Floats<K> sums = load_part<K>(to, width, vectors);
  for (u32 from = self; from < tokens; from += blockDim.x) {
    const u32 j = from + threadIdx.x;
    const u32 hits = warp_ballot(j < tokens && ids[j] == id);
    if (lane == 0) counts[warp] = popcount(hits);
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 w = 0; w < 8; ++w) {
      if (w < warp) before += counts[w];
      all += counts[w];
    }
    if (hits >> lane & 1) matches[before + popcount(hits & ((1u << lane) - 1))] = j;
    __syncthreads();
    for (u32 m = 0; m < all; ++m) {
      const auto d = load_part<K>(dy + (u64)matches[m] * dim + column, width, vectors);
      for (int k = 0; k < K; ++k) sums.v[k] += d.v[k];
    }
  }
  store_part<K>(to, sums, width, vectors);
}
KERNEL(embedding_backward)
