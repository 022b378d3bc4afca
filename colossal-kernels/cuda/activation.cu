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
      name##_backward(T* __restrict__ dy, T* __restrict__ x, u64 n) {                                 \
    each<K>(n, aligned(dy, x), [&](u64 i, auto lanes) {                                               \
      constexpr int N = lanes.n; \
      auto d = load<N>(dy + i);                                                                 \
      auto r = load<N>(x + i);                                                                  \
      for (int k = 0; k < N; ++k) {                                                                   \
        const float v = r.v[k];                                                                       \
        r.v[k] = d.v[k] * name##_slope(v);                                                            \
        d.v[k] = name##_of(v);                                                                        \
      }                                                                                               \
      store(x + i, r);                                                                                \
      store(dy + i, d);                                                                               \
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

// gate and up become their gradients, dy the result of swiglu once more
extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward(T* __restrict__ dy, T* __restrict__ gate, T* __restrict__ up, u64 n) {
  each<K>(n, aligned(dy, gate, up), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto d = load<N>(dy + i), g = load<N>(gate + i), u = load<N>(up + i);
    for (int k = 0; k < N; ++k) {
      const float dk = d.v[k], gk = g.v[k], uk = u.v[k];
      g.v[k] = dk * uk * silu_slope(gk);
      u.v[k] = dk * silu_of(gk);
      d.v[k] = silu_of(gk) * uk;
    }
    store(gate + i, g);
    store(up + i, u);
    store(dy + i, d);
  });
}
KERNEL(swiglu_backward)
