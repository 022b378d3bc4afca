// Sums and products, element by element. Bound: memory; each operand is read or written once.

#define K WIDTH<T>

#define BINARY(name, f)                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                \
      name(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y, u64 n) {           \
    each<K>(n, aligned(a, b, y), [&](u64 i, auto lanes) {                                          \
      constexpr int N = lanes.n; \
      const auto p = load<N>(a + i), q = load<N>(b + i);                               \
      Floats<N> r;                                                                           \
      for (int k = 0; k < N; ++k) r.v[k] = p.v[k] f q.v[k];                                  \
      store(y + i, r);                                                                             \
    });                                                                                            \
  }                                                                                                \
  KERNEL(name)

BINARY(add, +)
BINARY(sub, -)
BINARY(mul, *)

extern "C" __global__ void __launch_bounds__(256) scale(const T* __restrict__ x, float s, T* __restrict__ y, u64 n) {
  each<K>(n, aligned(x, y), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    auto r = load<N>(x + i);
    for (int k = 0; k < N; ++k) r.v[k] *= s;
    store(y + i, r);
  });
}
KERNEL(scale)

extern "C" __global__ void __launch_bounds__(256) fill(T* __restrict__ y, float value, u64 n) {
  each<K>(n, aligned(y), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    Floats<N> r;
    for (int k = 0; k < N; ++k) r.v[k] = value;
    store(y + i, r);
  });
}
KERNEL(fill)

// y += a x
extern "C" __global__ void __launch_bounds__(256) axpy(float a, const T* __restrict__ x, T* __restrict__ y, u64 n) {
  each<K>(n, aligned(x, y), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto p = load<N>(x + i);
    auto r = load<N>(y + i);
    for (int k = 0; k < N; ++k) r.v[k] += a * p.v[k];
    store(y + i, r);
  });
}
KERNEL(axpy)

// y += x into an accumulator of floats
extern "C" __global__ void __launch_bounds__(256) add_into(const T* __restrict__ x, float* __restrict__ y, u64 n) {
  each<K>(n, aligned(x, y), [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto p = load<N>(x + i);
    auto r = load<N>(y + i);
    for (int k = 0; k < N; ++k) r.v[k] += p.v[k];
    store(y + i, r);
  });
}
KERNEL(add_into)

// y = x + bias for rows of dim
extern "C" __global__ void __launch_bounds__(256)
    add_bias(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, u32 dim, u64 n) {
  each<K>(n, aligned(x, bias, y) && dim % K == 0, [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto p = load<N>(x + i), q = load<N>(bias + i % dim);
    Floats<N> r;
    for (int k = 0; k < N; ++k) r.v[k] = p.v[k] + q.v[k];
    store(y + i, r);
  });
}
KERNEL(add_bias)
