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

// The gradient: where each id occurs is listed once. Atomics count and hand out places, in any order; a
// list is put in order before rows are added, so a run is repeated bit for bit.

/// What is known of an id; zero at first.
struct Occurrences { u32 count, from_last, end; };

INLINE bool in_table(int id, u64 entries) { return id >= 0 && (u64)id < entries; }

// How often each id occurs, and (counted from the end) its first occurrence.
extern "C" __global__ void __launch_bounds__(256)
    embedding_count(const int* __restrict__ ids, u32 tokens, u64 entries, Occurrences* __restrict__ of) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens || !in_table(ids[i], entries)) return;
  atomicAdd(&of[ids[i]].count, 1u);
  atomicMax(&of[ids[i]].from_last, tokens - i);
}
KERNEL(embedding_count)

// A room for each id's list, by its first occurrence; `taken` is zero at first.
extern "C" __global__ void __launch_bounds__(256)
    embedding_room(const int* __restrict__ ids, u32 tokens, u64 entries, Occurrences* __restrict__ of, u32* __restrict__ taken) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens || !in_table(ids[i], entries)) return;
  Occurrences& o = of[ids[i]];
  if (o.from_last == tokens - i) o.end = atomicAdd(taken, o.count);
}
KERNEL(embedding_room)

// The lists; then `end` is behind each.
extern "C" __global__ void __launch_bounds__(256)
    embedding_list(const int* __restrict__ ids, u32 tokens, u64 entries, Occurrences* __restrict__ of, u32* __restrict__ list) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens || !in_table(ids[i], entries)) return;
  list[atomicAdd(&of[ids[i]].end, 1u)] = i;
}
KERNEL(embedding_list)

// dtable[ids[i]] += dy[i]: the block of an id's first occurrence adds all of them in order. A block is a
// token and 256 vectors of columns. A list of more than 256 is found again by reading all ids: there are
// few such ids.
extern "C" __global__ void __launch_bounds__(256)
    embedding_backward(const int* __restrict__ ids, u32 tokens, const T* __restrict__ dy, u32 dim,
                       float* __restrict__ dtable, u64 entries, const Occurrences* __restrict__ of,
                       const u32* __restrict__ list) {
  __shared__ u32 unsorted[256], matches[256], counts[8];
  const u32 self = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int id = ids[self];
  if (!in_table(id, entries)) return;
  const Occurrences o = of[id];
  if (o.from_last != tokens - self) return;
  const u32 column = (blockIdx.y * blockDim.x + threadIdx.x) * K;
  const u32 width = column < dim ? min((u32)K, dim - column) : 0;
  const bool vectors = width == K && dim % K == 0 && aligned(dy, dtable);
  float* const to = dtable + (u64)id * dim + column;
  Floats<K> sums = load_part<K>(to, width, vectors);
  const auto add = [&](u32 all) {
    for (u32 m = 0; m < all; ++m) {
      const auto d = load_part<K>(dy + (u64)matches[m] * dim + column, width, vectors);
      for (int k = 0; k < K; ++k) sums.v[k] += d.v[k];
    }
  };
  if (o.count <= 256) {
    const u32 own = threadIdx.x < o.count ? list[o.end - o.count + threadIdx.x] : 0;
    unsorted[threadIdx.x] = own;
    __syncthreads();
    u32 before = 0;
    for (u32 i = 0; i < o.count; ++i) before += unsorted[i] < own;
    if (threadIdx.x < o.count) matches[before] = own;
    __syncthreads();
    add(o.count);
  } else {
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
      add(all);
    }
  }
  store_part<K>(to, sums, width, vectors);
}
KERNEL(embedding_backward)
