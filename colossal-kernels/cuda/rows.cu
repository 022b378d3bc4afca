// Rows that several tokens share: weighted sums over them, as experts' answers are combined. Bound:
// memory. A block a token.

#define K WIDTH<T>

extern "C" __global__ void __launch_bounds__(256)
    combine_rows(const int* __restrict__ at, const float* __restrict__ weights, u32 places, const T* __restrict__ rows,
                 u32 width, T* __restrict__ y) {
  at += (u64)blockIdx.x * places;
  weights += (u64)blockIdx.x * places;
  y += (u64)blockIdx.x * width;
  row_wise<K>(width, aligned(rows, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(width, [&](u32 i) {
      Floats<N> s;
      for (int k = 0; k < N; ++k) s.v[k] = 0.0f;
      for (u32 j = 0; j < places; ++j) {
        if (at[j] < 0) continue;
        const auto p = load<N>(rows + (u64)at[j] * width + i);
        const float w = weights[j];
        for (int k = 0; k < N; ++k) s.v[k] += w * p.v[k];
      }
      store(y + i, s);
    });
  });
}
KERNEL(combine_rows)

extern "C" __global__ void __launch_bounds__(256)
    combine_rows_backward(const int* __restrict__ at, const float* __restrict__ weights, u32 places,
                          const T* __restrict__ rows, u32 width, const T* __restrict__ dy, T* __restrict__ drows,
                          float* __restrict__ dweights) {
  at += (u64)blockIdx.x * places;
  weights += (u64)blockIdx.x * places;
  dweights += (u64)blockIdx.x * places;
  dy += (u64)blockIdx.x * width;
  row_wise<K>(width, aligned(rows, dy, drows), [&](auto lanes) {
    constexpr int N = lanes.n;
    for (u32 j = 0; j < places; ++j) {
      float dot = 0.0f;
      if (at[j] >= 0) {
        const float w = weights[j];
        const u64 row = (u64)at[j] * width;
        along<N>(width, [&](u32 i) {
          const auto d = load<N>(dy + i), p = load<N>(rows + row + i);
          Floats<N> r;
          for (int k = 0; k < N; ++k) {
            r.v[k] = w * d.v[k];
            dot += d.v[k] * p.v[k];
          }
          store(drows + row + i, r);
        });
      }
      dot = block_sum(dot);
      if (threadIdx.x == 0) dweights[j] = dot;
    }
  });
}
KERNEL(combine_rows_backward)
