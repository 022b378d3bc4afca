// Sums and maxima in two stages: blocks leave partial results, a second kernel takes them in order.
// Bound: memory.

#define K WIDTH<T>

// Each block reduces its span of the elements. partials [gridDim.x]
extern "C" __global__ void __launch_bounds__(256) sum(const T* __restrict__ x, u64 n, u64 span, double* __restrict__ partials) {
  const u64 start = blockIdx.x * span, end = min(start + span, n);
  float s = 0.0f;
  row_wise<K>(0, aligned(x + start), [&](auto lanes) {
    constexpr int N = lanes.n;
    for (u64 i = start + threadIdx.x * N; i < end; i += blockDim.x * N) {
      if (i + N <= end) {
        const auto p = load<N>(x + i);
        for (int k = 0; k < N; ++k) s += p.v[k];
      } else {
        for (u64 j = i; j < end; ++j) s += widen(x[j]);
      }
    }
  });
  const double all = block_sum((double)s);
  if (threadIdx.x == 0) partials[blockIdx.x] = all;
}
KERNEL(sum)

// One block.
extern "C" __global__ void __launch_bounds__(256) sum_finish(const double* __restrict__ partials, u32 n, float* __restrict__ out) {
  double s = 0.0;
  for (u32 i = threadIdx.x; i < n; i += blockDim.x) s += partials[i];
  s = block_sum(s);
  if (threadIdx.x == 0) *out = (float)s;
}
KERNEL(sum_finish)

extern "C" __global__ void __launch_bounds__(256) max_of(const T* __restrict__ x, u64 n, u64 span, float* __restrict__ partials) {
  const u64 start = blockIdx.x * span, end = min(start + span, n);
  float m = -INFINITE;
  row_wise<K>(0, aligned(x + start), [&](auto lanes) {
    constexpr int N = lanes.n;
    for (u64 i = start + threadIdx.x * N; i < end; i += blockDim.x * N) {
      if (i + N <= end) {
        const auto p = load<N>(x + i);
        for (int k = 0; k < N; ++k) m = fmaxf(m, p.v[k]);
      } else {
        for (u64 j = i; j < end; ++j) m = fmaxf(m, widen(x[j]));
      }
    }
  });
  m = block_max(m);
  if (threadIdx.x == 0) partials[blockIdx.x] = m;
}
KERNEL(max_of)

extern "C" __global__ void __launch_bounds__(256) max_finish(const float* __restrict__ partials, u32 n, float* __restrict__ out) {
  float m = -INFINITE;
  for (u32 i = threadIdx.x; i < n; i += blockDim.x) m = fmaxf(m, partials[i]);
  m = block_max(m);
  if (threadIdx.x == 0) *out = m;
}
KERNEL(max_finish)

// Sums over rows. A block: 32 vectors of columns, 8 rows at a time, `span` rows. partials [gridDim.y, dim]
extern "C" __global__ void __launch_bounds__(256)
    sum_rows(const T* __restrict__ x, u32 rows, u32 dim, u32 span, float* __restrict__ partials) {
  __shared__ float part[8][32][K];
  const u32 tx = threadIdx.x % 32, ty = threadIdx.x / 32, column = (blockIdx.x * 32 + tx) * K;
  const u32 start = blockIdx.y * span, end = min(start + span, rows);
  row_wise<K>(dim, aligned(x), [&](auto lanes) {
    constexpr int N = lanes.n;
    float s[K];
    for (int k = 0; k < K; ++k) s[k] = 0.0f;
    for (u32 row = start + ty; row < end; row += 8)
#pragma unroll
      for (int v = 0; v < K; v += lanes.n)
        if (column + v < dim) {
          const auto p = load<N>(x + (u64)row * dim + column + v);
          for (int k = 0; k < N; ++k) s[v + k] += p.v[k];
        }
    for (int k = 0; k < K; ++k) part[ty][tx][k] = s[k];
  });
  __syncthreads();
  if (ty == 0)
    for (int k = 0; k < K; ++k) {
      float s = 0.0f;
      for (int r = 0; r < 8; ++r) s += part[r][tx][k];
      if (column + k < dim) partials[(u64)blockIdx.y * dim + column + k] = s;
    }
}
KERNEL(sum_rows)

// out[i] += the sum of partials[p, i] in order; a thread a column.
extern "C" __global__ void __launch_bounds__(256)
    add_partials(const float* __restrict__ partials, u32 count, u64 stride, u32 dim, float* __restrict__ out) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= dim) return;
  float s = out[i];
  for (u32 p = 0; p < count; ++p) s += partials[p * stride + i];
  out[i] = s;
}
KERNEL(add_partials)

// A block a row, a warp a short one.
extern "C" __global__ void __launch_bounds__(512)
    sum_last(const T* __restrict__ x, u32 rows, u32 dim, float* __restrict__ out) {
  const u32 row = own_row();
  if (row >= rows) return;
  x += (u64)row * dim;
  float s = 0.0f;
  row_wise<K>(dim, aligned(x), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(dim, [&](u32 i) {
      const auto p = load<N>(x + i);
      for (int k = 0; k < N; ++k) s += p.v[k];
    });
  });
  s = block_sum(s);
  if (threadIdx.x == 0) out[row] = s;
}
KERNEL(sum_last)
