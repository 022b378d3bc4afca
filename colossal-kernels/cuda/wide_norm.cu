// Norms of rows of which only a part of the width is here: the steps between which ranks sum. Bound: memory. A
// block a row, a warp a short one.

#define K WIDTH<T>

// The sum of a row, or of (x - mean)²; mean may be null.
extern "C" __global__ void __launch_bounds__(512)
    row_moment(const T* __restrict__ x, const float* __restrict__ mean, float scale, u32 rows, u32 dim,
               float* __restrict__ out) {
  const u32 row = own_row();
  if (row >= rows) return;
  x += (u64)row * dim;
  row_wise<K>(dim, aligned(x), [&](auto lanes) {
    constexpr int N = lanes.n;
    const float m = mean ? mean[row] : 0.0f;
    float sum = 0.0f;
    along<N>(dim, [&](u32 i) {
      const auto p = load<N>(x + i);
      for (int k = 0; k < N; ++k) sum += mean ? (p.v[k] - m) * (p.v[k] - m) : p.v[k];
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[row] = scale * sum;
  });
}
KERNEL(row_moment)

// bias may be null.
extern "C" __global__ void __launch_bounds__(512)
    wide_norm(const T* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ variance, float eps,
              const T* __restrict__ weight, const T* __restrict__ bias, u32 rows, u32 dim, T* __restrict__ y) {
  const u32 row = own_row();
  if (row >= rows) return;
  x += (u64)row * dim;
  y += (u64)row * dim;
  const float m = mean[row], r = rsqrtf(variance[row] + eps);
  row_wise<K>(dim, aligned(x, weight, bias, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(dim, [&](u32 i) {
      auto p = load<N>(x + i);
      const auto w = load<N>(weight + i);
      for (int k = 0; k < N; ++k) p.v[k] = (p.v[k] - m) * r * w.v[k];
      if (bias) {
        const auto b = load<N>(bias + i);
        for (int k = 0; k < N; ++k) p.v[k] += b.v[k];
      }
      store(y + i, p);
    });
  });
}
KERNEL(wide_norm)

// sums [2, rows]: of dy w, and of dy w x̂.
extern "C" __global__ void __launch_bounds__(512)
    wide_norm_sums(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ mean,
                   const float* __restrict__ variance, float eps, const T* __restrict__ weight, float scale, u32 rows,
                   u32 dim, float* __restrict__ sums) {
  const u32 row = own_row();
  if (row >= rows) return;
  x += (u64)row * dim;
  dy += (u64)row * dim;
  const float m = mean[row], r = rsqrtf(variance[row] + eps);
  row_wise<K>(dim, aligned(dy, x, weight), [&](auto lanes) {
    constexpr int N = lanes.n;
    float s[2] = {0.0f, 0.0f};
    along<N>(dim, [&](u32 i) {
      const auto d = load<N>(dy + i), p = load<N>(x + i), w = load<N>(weight + i);
      for (int k = 0; k < N; ++k) {
        s[0] += d.v[k] * w.v[k];
        s[1] += d.v[k] * w.v[k] * ((p.v[k] - m) * r);
      }
    });
    block_sum(s);
    if (threadIdx.x == 0) {
      sums[row] = scale * s[0];
      sums[rows + row] = scale * s[1];
    }
  });
}
KERNEL(wide_norm_sums)

// dw [rows, dim] = dy x̂
extern "C" __global__ void __launch_bounds__(512)
    wide_norm_backward(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ mean,
                       const float* __restrict__ variance, float eps, const T* __restrict__ weight,
                       const float* __restrict__ sums, u32 rows, u32 dim, T* __restrict__ dx, float* __restrict__ dw) {
  const u32 row = own_row();
  if (row >= rows) return;
  const u64 at = (u64)row * dim;
  const float m = mean[row], r = rsqrtf(variance[row] + eps), s0 = sums[row], s1 = sums[rows + row];
  row_wise<K>(dim, aligned(dy, x, weight, dx, dw), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(dim, [&](u32 i) {
      const auto d = load<N>(dy + at + i), p = load<N>(x + at + i), w = load<N>(weight + i);
      Floats<N> own, all;
      for (int k = 0; k < N; ++k) {
        const float normed = (p.v[k] - m) * r;
        own.v[k] = d.v[k] * normed;
        all.v[k] = r * (d.v[k] * w.v[k] - s0 - normed * s1);
      }
      store(dw + at + i, own);
      store(dx + at + i, all);
    });
  });
}
KERNEL(wide_norm_backward)
