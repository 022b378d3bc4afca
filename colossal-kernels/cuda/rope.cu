// Rotary position embedding, half-split. Bound: memory; tables come from the cache after a token's
// first head.

#define K WIDTH<T>

// A block a token. sign is -1 for the inverse rotation.
extern "C" __global__ void __launch_bounds__(256)
    rope(const T* __restrict__ x, const int* __restrict__ positions, const float* __restrict__ cos,
         const float* __restrict__ sin, u32 heads, u32 head_dim, float sign, T* __restrict__ y) {
  const u32 half = head_dim / 2;
  const u64 at = (u64)blockIdx.x * heads * head_dim, table = (u64)positions[blockIdx.x] * half;
  row_wise<K>(half, aligned(x, y, cos, sin), [&](auto lanes) {
    constexpr int N = lanes.n;
    for (u32 j = threadIdx.x * N; j < heads * half; j += blockDim.x * N) {
      const u32 head = j / half, i = j % half;
      const u64 first = at + (u64)head * head_dim + i;
      const auto a = load<N>(x + first), b = load<N>(x + first + half);
      const auto c = load<N>(cos + table + i), s = load<N>(sin + table + i);
      Floats<N> p, q;
      for (int k = 0; k < N; ++k) {
        p.v[k] = a.v[k] * c.v[k] - b.v[k] * (sign * s.v[k]);
        q.v[k] = b.v[k] * c.v[k] + a.v[k] * (sign * s.v[k]);
      }
      store(y + first, p);
      store(y + first + half, q);
    }
    // An odd head's last channel belongs to no pair.
    if (head_dim % 2) for (u32 h = threadIdx.x; h < heads; h += blockDim.x) {
      const u64 last = at + (u64)(h + 1) * head_dim - 1;
      y[last] = x[last];
    }
  });
}
KERNEL(rope)
