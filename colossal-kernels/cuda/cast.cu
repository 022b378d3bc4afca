// From one type to another. Bound: memory; as many elements a thread as the narrower type has in 16 bytes.

extern "C" __global__ void __launch_bounds__(256) cast(const FROM* __restrict__ x, TO* __restrict__ y, u64 n) {
  constexpr int K = WIDTH<FROM> > WIDTH<TO> ? WIDTH<FROM> : WIDTH<TO>;
  each<K>(n, aligned(x, y), [&](u64 i, auto lanes) { store(y + i, load<lanes.n>(x + i)); });
}
KERNEL(cast)
