// Reductions over ranks: one vector of each into all. Bound: memory; each source is read once, each
// target written once. Sums run in the order of the ranks: the same bits on all and in every run.

struct Many { u64 p[32]; };

/// What a type is accumulated in.
template <class E> struct Sum { typedef E A; };
template <> struct Sum<bf16> { typedef float A; };
template <> struct Sum<f16> { typedef float A; };
typedef Sum<T>::A A;

INLINE A up(bf16 x) { return (A)widen(x); }
INLINE A up(f16 x) { return (A)widen(x); }
template <class E> INLINE A up(E x) { return (A)x; }
INLINE void down(A x, bf16& y) { narrow((float)x, y); }
INLINE void down(A x, f16& y) { narrow((float)x, y); }
template <class E> INLINE void down(A x, E& y) { y = (E)x; }

// op: 0 sum, 1 mean, 2 maximum, 3 minimum
extern "C" __global__ void __launch_bounds__(256)
    reduce_ranks(const Many sources, const Many targets, u32 n, u32 m, u32 op, u64 len) {
  constexpr int K = WIDTH<T>;
  u64 all = 0;
  for (u32 i = 0; i < n; ++i) all |= sources.p[i];
  for (u32 i = 0; i < m; ++i) all |= targets.p[i];
  each<K>(len, (all & 15) == 0, [&](u64 i, auto lanes) {
    constexpr int N = lanes.n;
    typedef Vec<T, N> V;
    A sum[N];
    for (u32 r = 0; r < n; ++r) {
      const V x = *reinterpret_cast<const V*>(reinterpret_cast<const T*>(sources.p[r]) + i);
      for (int k = 0; k < N; ++k) {
        const A y = up(x.v[k]);
        sum[k] = r == 0 ? y : op < 2 ? sum[k] + y : op == 2 ? (y > sum[k] ? y : sum[k]) : y < sum[k] ? y : sum[k];
      }
    }
    V y;
    for (int k = 0; k < N; ++k) down(op == 1 ? (A)(sum[k] / (A)n) : sum[k], y.v[k]);
    for (u32 r = 0; r < m; ++r) *reinterpret_cast<V*>(reinterpret_cast<T*>(targets.p[r]) + i) = y;
  });
}
KERNEL(reduce_ranks)
