// Blocks of rows copied from and to anywhere, sums of neighbours, dropout. Bound: memory.

#define K WIDTH<T>

// [outer, inner] rows of width; a thread a vector. Bits are copied as they are.
extern "C" __global__ void __launch_bounds__(256)
    copy_block(const T* __restrict__ x, u64 from0, u64 from1, u32 outer, u32 inner, u32 width, T* __restrict__ y,
               u64 to0, u64 to1) {
  const bool vectors = aligned(x, y) && (from0 | from1 | to0 | to1 | width) % K == 0;
  const u32 step = vectors ? K : 1, row = width / step;
  const u64 n = (u64)outer * inner * row;
  for (u64 e = (u64)blockIdx.x * blockDim.x + threadIdx.x; e < n; e += (u64)gridDim.x * blockDim.x) {
    const u64 r = e / row, c = e % row * step, i = r / inner, j = r % inner;
    const T* const source = x + i * from0 + j * from1 + c;
    T* const target = y + i * to0 + j * to1 + c;
    if (vectors) *reinterpret_cast<Vec<T, K>*>(target) = *reinterpret_cast<const Vec<T, K>*>(source);
    else *target = *source;
  }
}
KERNEL(copy_block)

// A block a row of x.
extern "C" __global__ void __launch_bounds__(256)
    scatter_rows(const T* __restrict__ x, const int* __restrict__ index, u32 width, T* __restrict__ y, u64 rows) {
  const int at = index[blockIdx.x];
  if (at < 0 || (u64)at >= rows) return;
  x += (u64)blockIdx.x * width;
  y += (u64)at * width;
  row_wise<K>(width, aligned(x, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(width, [&](u32 i) { store(y + i, load<N>(x + i)); });
  });
}
KERNEL(scatter_rows)

// y[i, c] = sum of x[i, t, c]; a block a group.
extern "C" __global__ void __launch_bounds__(256)
    sum_groups(const T* __restrict__ x, u32 times, u32 width, T* __restrict__ y) {
  x += (u64)blockIdx.x * times * width;
  y += (u64)blockIdx.x * width;
  row_wise<K>(width, aligned(x, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(width, [&](u32 i) {
      auto s = load<N>(x + i);
      for (u32 t = 1; t < times; ++t) {
        const auto p = load<N>(x + t * width + i);
        for (int k = 0; k < N; ++k) s.v[k] += p.v[k];
      }
      store(y + i, s);
    });
  });
}
KERNEL(sum_groups)

// Columns from .. of rows of width; a block a row.
extern "C" __global__ void __launch_bounds__(256) fill_columns(T* __restrict__ y, u32 width, u32 from, float value) {
  T* const row = y + (u64)blockIdx.x * width;
  for (u32 c = from + threadIdx.x; c < width; c += blockDim.x) narrow(value, row[c]);
}
KERNEL(fill_columns)

INLINE u64 mix(u64 x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// A block a row: an element is dropped if its 53 random bits are below `least`.
extern "C" __global__ void __launch_bounds__(256)
    dropout(const T* __restrict__ x, const u64* __restrict__ keys, const u64* __restrict__ first, u32 width, u64 least,
            float keep, T* __restrict__ y) {
  const u64 key = keys[blockIdx.x], at = first[blockIdx.x];
  x += (u64)blockIdx.x * width;
  y += (u64)blockIdx.x * width;
  row_wise<K>(width, aligned(x, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(width, [&](u32 i) {
      auto p = load<N>(x + i);
      for (int k = 0; k < N; ++k)
        p.v[k] = mix(key ^ mix((at + i + k) * 0x9e3779b97f4a7c15ull)) >> 11 >= least ? p.v[k] * keep : 0.0f;
      store(y + i, p);
    });
  });
}
KERNEL(dropout)
