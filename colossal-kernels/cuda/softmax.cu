// Softmax over rows. Bound: memory; a row's second reading comes from the cache.

#define K WIDTH<T>

extern "C" __global__ void __launch_bounds__(512) softmax(const T* __restrict__ x, u32 rows, u32 dim, T* __restrict__ y) {
  if (own_row() >= rows) return;
  x += (u64)own_row() * dim;
  y += (u64)own_row() * dim;
  const RowStats s = row_stats<K>(x, dim);
  const float scale = 1.0f / s.sum;
  across<K>(x, dim, alike(x, y), [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(x + i);
    for (int k = 0; k < N; ++k) p.v[k] = expf(p.v[k] - s.max) * scale;
    store(y + i, p);
  });
}
KERNEL(softmax)

// dx = y (dy - sum(dy y))
extern "C" __global__ void __launch_bounds__(512)
    softmax_backward(const T* __restrict__ dy, const T* __restrict__ y, u32 rows, u32 dim, T* __restrict__ dx) {
  if (own_row() >= rows) return;
  const u64 at = (u64)own_row() * dim;
  dy += at, y += at, dx += at;
  float dot = 0.0f;
  across<K>(dy, dim, alike(dy, y), [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto d = load<N>(dy + i), p = load<N>(y + i);
    for (int k = 0; k < N; ++k) dot += d.v[k] * p.v[k];
  });
  dot = block_sum(dot);
  across<K>(dy, dim, alike(dy, y) && alike(dy, dx), [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto d = load<N>(dy + i), p = load<N>(y + i);
    Floats<N> r;
    for (int k = 0; k < N; ++k) r.v[k] = p.v[k] * (d.v[k] - dot);
    store(dx + i, r);
  });
}
KERNEL(softmax_backward)

extern "C" __global__ void __launch_bounds__(512) log_softmax(const T* __restrict__ x, u32 rows, u32 dim, T* __restrict__ y) {
  if (own_row() >= rows) return;
  x += (u64)own_row() * dim;
  y += (u64)own_row() * dim;
  const RowStats s = row_stats<K>(x, dim);
  const float lse = s.max + logf(s.sum);
  across<K>(x, dim, alike(x, y), [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(x + i);
    for (int k = 0; k < N; ++k) p.v[k] -= lse;
    store(y + i, p);
  });
}
KERNEL(log_softmax)

// dx = dy - exp(y) sum(dy)
extern "C" __global__ void __launch_bounds__(512)
    log_softmax_backward(const T* __restrict__ dy, const T* __restrict__ y, u32 rows, u32 dim, T* __restrict__ dx) {
  if (own_row() >= rows) return;
  const u64 at = (u64)own_row() * dim;
  dy += at, y += at, dx += at;
  float sum = 0.0f;
  across<K>(dy, dim, true, [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto d = load<N>(dy + i);
    for (int k = 0; k < N; ++k) sum += d.v[k];
  });
  sum = block_sum(sum);
  across<K>(dy, dim, alike(dy, y) && alike(dy, dx), [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto d = load<N>(dy + i), p = load<N>(y + i);
    Floats<N> r;
    for (int k = 0; k < N; ++k) r.v[k] = d.v[k] - expf(p.v[k]) * sum;
    store(dx + i, r);
  });
}
KERNEL(log_softmax_backward)
