// RMS norm and layer norm of rows. Bound: memory; a row's second reading comes from the cache.
//
// Forward: a block a row, a warp a short one. Backward: each block takes rows by turns and keeps its share of the
// weights' gradients in shared memory; a second kernel adds the shares in order, so a result does
// not change from run to run.

#define K WIDTH<T>

extern "C" __global__ void __launch_bounds__(512)
    rms_norm(const T* __restrict__ x, const T* __restrict__ weight, float eps, T* __restrict__ y,
             float* __restrict__ rstd, u32 rows, u32 dim) {
  const u32 row = own_row();
  if (row >= rows) return;
  x += (u64)row * dim;
  y += (u64)row * dim;
  row_wise<K>(dim, aligned(x, weight, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    float squares = 0.0f;
    along<N>(dim, [&](u32 i) {
      const auto p = load<N>(x + i);
      for (int k = 0; k < N; ++k) squares += p.v[k] * p.v[k];
    });
    const float r = rsqrtf(block_sum(squares) / dim + eps);
    if (threadIdx.x == 0) rstd[row] = r;
    along<N>(dim, [&](u32 i) {
      auto p = load<N>(x + i);
      const auto w = load<N>(weight + i);
      for (int k = 0; k < N; ++k) p.v[k] *= r * w.v[k];
      store(y + i, p);
    });
  });
}
KERNEL(rms_norm)

// partials [gridDim.x, dim]
extern "C" __global__ void __launch_bounds__(512)
    rms_norm_backward(T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight,
                      const float* __restrict__ rstd, u32 add, T* __restrict__ dx,
                      float* __restrict__ partials, u32 rows, u32 dim) {
  DYN_SMEM(float, dw);  // [dim]; a thread touches its own columns only
  row_wise<K>(dim, aligned(dy, x, weight, dx, partials), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(dim, [&](u32 i) { for (int k = 0; k < N; ++k) dw[i + k] = 0.0f; });
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
      const u64 at = (u64)row * dim;
      const float r = rstd[row];
      float dot = 0.0f;
      along<N>(dim, [&](u32 i) {
        const auto d = load<N>(dy + at + i), p = load<N>(x + at + i), w = load<N>(weight + i);
        for (int k = 0; k < N; ++k) dot += d.v[k] * p.v[k] * w.v[k];
      });
      const float c = block_sum(dot) * r * r / dim;
      along<N>(dim, [&](u32 i) {
        auto d = load<N>(dy + at + i);
        const auto p = load<N>(x + at + i), w = load<N>(weight + i);
        auto sum = load<N>(dw + i);
        Floats<N> out = {};
        if (add) out = load<N>(dx + at + i);
        for (int k = 0; k < N; ++k) {
          out.v[k] += r * (d.v[k] * w.v[k] - p.v[k] * c);
          sum.v[k] += d.v[k] * p.v[k] * r;
          d.v[k] = p.v[k] * r * w.v[k];
        }
        store(dy + at + i, d);
        store(dx + at + i, out);
        store(dw + i, sum);
      });
    }
    along<N>(dim, [&](u32 i) { store(partials + (u64)blockIdx.x * dim + i, load<N>(dw + i)); });
  });
}
KERNEL(rms_norm_backward)

extern "C" __global__ void __launch_bounds__(512)
    layer_norm(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, float eps,
               T* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, u32 rows, u32 dim) {
  const u32 row = own_row();
  if (row >= rows) return;
  x += (u64)row * dim;
  y += (u64)row * dim;
  row_wise<K>(dim, aligned(x, weight, bias, y), [&](auto lanes) {
    constexpr int N = lanes.n;
    float sum = 0.0f, squares = 0.0f;
    along<N>(dim, [&](u32 i) {
      const auto p = load<N>(x + i);
      for (int k = 0; k < N; ++k) sum += p.v[k];
    });
    const float m = block_sum(sum) / dim;
    along<N>(dim, [&](u32 i) {
      const auto p = load<N>(x + i);
      for (int k = 0; k < N; ++k) squares += (p.v[k] - m) * (p.v[k] - m);
    });
    const float r = rsqrtf(block_sum(squares) / dim + eps);
    if (threadIdx.x == 0) {
      mean[row] = m;
      rstd[row] = r;
    }
    along<N>(dim, [&](u32 i) {
      auto p = load<N>(x + i);
      const auto w = load<N>(weight + i), b = load<N>(bias + i);
      for (int k = 0; k < N; ++k) p.v[k] = (p.v[k] - m) * r * w.v[k] + b.v[k];
      store(y + i, p);
    });
  });
}
KERNEL(layer_norm)

// partials [gridDim.x, 2, dim]: of the weight, of the bias
extern "C" __global__ void __launch_bounds__(512)
    layer_norm_backward(T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight,
                        const T* __restrict__ bias, const float* __restrict__ mean, const float* __restrict__ rstd, u32 add,
                        T* __restrict__ dx, float* __restrict__ partials, u32 rows, u32 dim) {
  DYN_SMEM(float, dw);  // [2, dim]
  row_wise<K>(dim, aligned(dy, x, weight, bias, dx, partials), [&](auto lanes) {
    constexpr int N = lanes.n;
    float* const db = dw + dim;
    along<N>(dim, [&](u32 i) { for (int k = 0; k < N; ++k) dw[i + k] = db[i + k] = 0.0f; });
    for (u32 row = blockIdx.x; row < rows; row += gridDim.x) {
      const u64 at = (u64)row * dim;
      const float m = mean[row], r = rstd[row];
      float sums[2] = {0.0f, 0.0f};
      along<N>(dim, [&](u32 i) {
        const auto d = load<N>(dy + at + i), p = load<N>(x + at + i), w = load<N>(weight + i);
        for (int k = 0; k < N; ++k) {
          const float g = d.v[k] * w.v[k];
          sums[0] += g;
          sums[1] += g * (p.v[k] - m) * r;
        }
      });
      block_sum(sums);
      const float a = sums[0] / dim, b = sums[1] / dim;
      along<N>(dim, [&](u32 i) {
        auto d = load<N>(dy + at + i);
        const auto p = load<N>(x + at + i), w = load<N>(weight + i), b0 = load<N>(bias + i);
        auto sw = load<N>(dw + i), sb = load<N>(db + i);
        Floats<N> out = {};
        if (add) out = load<N>(dx + at + i);
        for (int k = 0; k < N; ++k) {
          const float xhat = (p.v[k] - m) * r;
          out.v[k] += r * (d.v[k] * w.v[k] - a - xhat * b);
          sw.v[k] += d.v[k] * xhat;
          sb.v[k] += d.v[k];
          d.v[k] = xhat * w.v[k] + b0.v[k];
        }
        store(dy + at + i, d);
        store(dx + at + i, out);
        store(dw + i, sw);
        store(db + i, sb);
      });
    }
    float* const to = partials + (u64)blockIdx.x * 2 * dim;
    along<N>(dim, [&](u32 i) {
      store(to + i, load<N>(dw + i));
      store(to + dim + i, load<N>(db + i));
    });
  });
}
KERNEL(layer_norm_backward)
