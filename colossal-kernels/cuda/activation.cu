// Activations and their gradients. Bound: memory, with up to some 50 instructions an element (erf).

#define K WIDTH<T>
INLINE float silu_slope(float x) { const float s = sigmoid(x); return s * (1.0f + x * (1.0f - s)); }
INLINE float relu_slope(float x) { return x > 0.0f ? 1.0f : 0.0f; }
INLINE float gelu_slope(float x) { return phi(x) + x * 0.39894228f * expf(-0.5f * x * x); }
INLINE float gelu_tanh_slope(float x) {
  const float t = inner(x), du = SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * x * x);
  return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * du;
}

#define ACTIVATION(name)                                                                              \
  extern "C" __global__ void __launch_bounds__(256) name(const T* __restrict__ x, T* __restrict__ y, u64 n) { \
    each<K>(n, aligned(x, y), [&](u64 i, auto lanes) {                                                \
      constexpr int N = lanes.n; \
      auto r = load<N>(x + i);                                                                  \
      for (int k = 0; k < N; ++k) r.v[k] = name##_of(r.v[k]);                                   \
      store(y + i, r);                                                                                \
    });                                                                                               \
  }                                                                                                   \
  KERNEL(name)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                   \
      name##_backward(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx, u64 n) { \
    each<K>(n, aligned(dy, x, dx), [&](u64 i, auto lanes) {                                           \
      constexpr int N = lanes.n; \
      const auto d = load<N>(dy + i);                                                           \
      auto r = load<N>(x + i);                                                                  \
      for (int k = 0; k < N; ++k) r.v[k] = d.v[k] * name##_slope(r.v[k]);                       \
      store(dx + i, r);                                                                               \
    });                                                                                               \
  }                                                                                                   \
  KERNEL(name##_backward)

ACTIVATION(silu)
ACTIVATION(relu)
ACTIVATION(gelu)
ACTIVATION(gelu_tanh)

// y = silu(gate) up
extern "C" __global__ void __launch_bounds__(256)
    swiglu(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y, u64 n) {
  each<K>(n, aligned(gate, up, y), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto g = load<N>(gate + i), u = load<N>(up + i);
    Floats<N> r;
    for (int k = 0; k < N; ++k) r.v[k] = silu_of(g.v[k]) * u.v[k];
    store(y + i, r);
  });
}
KERNEL(swiglu)

extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward(const T* __restrict__ dy, const T* __restrict__ gate, const T* __restrict__ up,
                    T* __restrict__ dgate, T* __restrict__ dup, u64 n) {
  each<K>(n, aligned(dy, gate, up, dgate, dup), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto d = load<N>(dy + i), g = load<N>(gate + i), u = load<N>(up + i);
    Floats<N> dg, du;
    for (int k = 0; k < N; ++k) {
      dg.v[k] = d.v[k] * u.v[k] * silu_slope(g.v[k]);
      du.v[k] = d.v[k] * silu_of(g.v[k]);
    }
    store(dgate + i, dg);
    store(dup + i, du);
  });
}
KERNEL(swiglu_backward)
