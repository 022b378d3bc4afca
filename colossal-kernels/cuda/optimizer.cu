// AdamW, Lion, and norm and scale of many tensors. Bound: memory; one pass.

struct AdamWFactors { float decay, rate, root, beta1, beta2, eps, scale; };

INLINE float adamw_update(float p, float g, float& m, float& v, const AdamWFactors& f) {
  g *= f.scale;
  m = f.beta1 * m + (1.0f - f.beta1) * g;
  v = f.beta2 * v + (1.0f - f.beta2) * g * g;
  return p * f.decay - f.rate * m / (sqrtf(v) * f.root + f.eps);
}

extern "C" __global__ void __launch_bounds__(256)
    adamw(float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ ms, float* __restrict__ vs,
          AdamWFactors f, u64 n) {
  each<4>(n, aligned(params, grads, ms, vs), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(params + i), m = load<N>(ms + i), v = load<N>(vs + i);
    const auto g = load<N>(grads + i);
    for (int k = 0; k < N; ++k) p.v[k] = adamw_update(p.v[k], g.v[k], m.v[k], v.v[k], f);
    store(params + i, p);
    store(ms + i, m);
    store(vs + i, v);
  });
}
KERNEL(adamw)

// The parameters of type T are written in the same pass as their masters.
extern "C" __global__ void __launch_bounds__(256)
    adamw_masters(float* __restrict__ masters, T* __restrict__ params, const float* __restrict__ grads,
                  float* __restrict__ ms, float* __restrict__ vs, AdamWFactors f, u64 n) {
  each<4>(n, aligned(masters, params, grads, ms, vs), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(masters + i), m = load<N>(ms + i), v = load<N>(vs + i);
    const auto g = load<N>(grads + i);
    for (int k = 0; k < N; ++k) p.v[k] = adamw_update(p.v[k], g.v[k], m.v[k], v.v[k], f);
    store(masters + i, p);
    store(params + i, p);
    store(ms + i, m);
    store(vs + i, v);
  });
}
KERNEL(adamw_masters)

struct LionFactors { float decay, lr, beta1, beta2, scale; };

extern "C" __global__ void __launch_bounds__(256)
    lion(float* __restrict__ params, const float* __restrict__ grads, float* __restrict__ ms, LionFactors f, u64 n) {
  each<4>(n, aligned(params, grads, ms), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto p = load<N>(params + i), m = load<N>(ms + i);
    auto g = load<N>(grads + i);
    for (int k = 0; k < N; ++k) {
      const float d = g.v[k] * f.scale, c = f.beta1 * m.v[k] + (1.0f - f.beta1) * d;
      p.v[k] = p.v[k] * f.decay - (c > 0.0f ? f.lr : c < 0.0f ? -f.lr : 0.0f);
      m.v[k] = f.beta2 * m.v[k] + (1.0f - f.beta2) * d;
    }
    store(params + i, p);
    store(ms + i, m);
  });
}
KERNEL(lion)

// Up to 32 tensors of a launch; block b works on the last one whose first block is not after it.
struct Many { u64 address[32], len[32]; u32 first[32], count, span; };

INLINE u32 tensor_of(const Many& many) {
  u32 t = 0;
  while (t + 1 < many.count && many.first[t + 1] <= blockIdx.x) ++t;
  return t;
}

// Each block sums the squares of its span of a tensor. partials [all blocks of all launches]
extern "C" __global__ void __launch_bounds__(256) sum_of_squares(Many many, double* __restrict__ partials) {
  const u32 t = tensor_of(many);
  const float* const x = reinterpret_cast<const float*>(many.address[t]);
  const u64 start = (u64)(blockIdx.x - many.first[t]) * many.span, end = min(start + many.span, many.len[t]);
  float s = 0.0f;
  const bool vectors = aligned(x + start);
  for (u64 i = start + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
    if (vectors && i + 4 <= end) {
      const auto p = load<4>(x + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) s += p.v[k] * p.v[k];
    } else {
      for (u64 j = i; j < end && j < i + 4; ++j) s += x[j] * x[j];
    }
  }
  const double all = block_sum((double)s);
  if (threadIdx.x == 0) partials[blockIdx.x] = all;
}
KERNEL(sum_of_squares)

// One block.
extern "C" __global__ void __launch_bounds__(256)
    sum_of_squares_finish(const double* __restrict__ partials, u32 n, double* __restrict__ out) {
  double s = 0.0;
  for (u32 i = threadIdx.x; i < n; i += blockDim.x) s += partials[i];
  s = block_sum(s);
  if (threadIdx.x == 0) *out = s;
}
KERNEL(sum_of_squares_finish)

extern "C" __global__ void __launch_bounds__(256) scale_many(Many many, float s) {
  const u32 t = tensor_of(many);
  float* const x = reinterpret_cast<float*>(many.address[t]);
  const u64 start = (u64)(blockIdx.x - many.first[t]) * many.span, end = min(start + many.span, many.len[t]);
  const bool vectors = aligned(x + start);
  for (u64 i = start + threadIdx.x * 4; i < end; i += blockDim.x * 4) {
    if (vectors && i + 4 <= end) {
      auto p = load<4>(x + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) p.v[k] *= s;
      store(x + i, p);
    } else {
      for (u64 j = i; j < end && j < i + 4; ++j) x[j] *= s;
    }
  }
}
KERNEL(scale_many)
