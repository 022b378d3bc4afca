// LAMB and LARS: two sums of squares, then the update by their ratio. Bound: memory; two passes.
//
// Blocks leave partial sums of their spans, which one block adds in order; the host makes a rate of the
// two totals, for other ranks may hold the rest of the parameter.

struct LambFactors { float beta1, beta2, scale, rate, root, eps, decay; };

INLINE float lamb_direction(float p, float m, float v, const LambFactors& f) {
  return f.rate * m / (sqrtf(v) * f.root + f.eps) + f.decay * p;
}

/// `f(i, lanes)` for this thread's vectors of its block's span.
template <class F> INLINE void along_span(u64 n, u64 span, bool vectors, F f) {
  const u64 start = blockIdx.x * span, end = min(start + span, n);
  for (u64 i = start + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
    if (vectors && i + 4 <= end) f(i, Lanes<4>());
    else for (u64 j = i; j < end && j < i + 4; ++j) f(j, Lanes<1>());
  }
}

INLINE void leave(float a, float b, double* partials) {
  double sums[2] = {a, b};
  block_sum(sums);
  if (threadIdx.x == 0) partials[2 * blockIdx.x] = sums[0], partials[2 * blockIdx.x + 1] = sums[1];
}

// The moments, and the sums of squares of parameters and directions. A span is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256)
    lamb_moments(const float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ ms,
                 float* __restrict__ vs, LambFactors f, u64 n, u64 span, double* __restrict__ partials) {
  float size = 0.0f, step = 0.0f;
  along_span(n, span, aligned(params, grads, ms, vs), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto p = load<N>(params + i), g = load<N>(grads + i);
    auto m = load<N>(ms + i), v = load<N>(vs + i);
    for (int k = 0; k < N; ++k) {
      const float x = g.v[k] * f.scale;
      m.v[k] = f.beta1 * m.v[k] + (1.0f - f.beta1) * x;
      v.v[k] = f.beta2 * v.v[k] + (1.0f - f.beta2) * x * x;
      const float d = lamb_direction(p.v[k], m.v[k], v.v[k], f);
      size += p.v[k] * p.v[k];
      step += d * d;
    }
    store(ms + i, m);
    store(vs + i, v);
  });
  leave(size, step, partials);
}
KERNEL(lamb_moments)

extern "C" __global__ void __launch_bounds__(256)
    lamb_update(float* __restrict__ params, const float* __restrict__ ms, const float* __restrict__ vs, LambFactors f,
                float lr, u64 n) {
  each<4>(n, aligned(params, ms, vs), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(params + i);
    const auto m = load<N>(ms + i), v = load<N>(vs + i);
    for (int k = 0; k < N; ++k) p.v[k] -= lr * lamb_direction(p.v[k], m.v[k], v.v[k], f);
    store(params + i, p);
  });
}
KERNEL(lamb_update)

// The sums of squares of parameters and gradients.
extern "C" __global__ void __launch_bounds__(256)
    lars_squares(const float* __restrict__ params, const float* __restrict__ grads, float scale, u64 n, u64 span,
                 double* __restrict__ partials) {
  float size = 0.0f, step = 0.0f;
  along_span(n, span, aligned(params, grads), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto p = load<N>(params + i), g = load<N>(grads + i);
    for (int k = 0; k < N; ++k) {
      const float x = g.v[k] * scale;
      size += p.v[k] * p.v[k];
      step += x * x;
    }
  });
  leave(size, step, partials);
}
KERNEL(lars_squares)

struct LarsFactors { float lr, momentum, ratio, decay, scale; };

extern "C" __global__ void __launch_bounds__(256)
    lars_update(float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ ms, LarsFactors f, u64 n) {
  each<4>(n, aligned(params, grads, ms), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(params + i), m = load<N>(ms + i);
    const auto g = load<N>(grads + i);
    for (int k = 0; k < N; ++k) {
      m.v[k] = f.momentum * m.v[k] + f.ratio * (g.v[k] * f.scale + f.decay * p.v[k]);
      p.v[k] -= f.lr * m.v[k];
    }
    store(params + i, p);
    store(ms + i, m);
  });
}
KERNEL(lars_update)

// Pairs of partial sums, added in order of blocks by one block. out [2]
extern "C" __global__ void __launch_bounds__(256)
    add_pairs(const double* __restrict__ partials, u32 count, double* __restrict__ out) {
  double sums[2] = {0.0, 0.0};
  for (u32 i = threadIdx.x; i < count; i += blockDim.x) sums[0] += partials[2 * i], sums[1] += partials[2 * i + 1];
  block_sum(sums);
  if (threadIdx.x == 0) out[0] = sums[0], out[1] = sums[1];
}
KERNEL(add_pairs)
