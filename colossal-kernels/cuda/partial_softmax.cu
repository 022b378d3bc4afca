// A softmax whose parts are computed apart: how parts are put together. Bound: memory.

#define K WIDTH<T>

// A warp a row of part and sum [batch, tokens, heads, d]; lse [batch, heads, tokens].
extern "C" __global__ void __launch_bounds__(256)
    merge_attention(const T* __restrict__ part, const float* __restrict__ part_lse, u32 rows, u32 heads, u32 tokens,
                    u32 d, float* __restrict__ sum, float* __restrict__ lse) {
  const u32 row = own_row();
  if (row >= rows) return;
  const u32 h = row % heads, t = row / heads % tokens;
  const u64 at = ((u64)(row / heads / tokens) * heads + h) * tokens + t;
  const float older = lse[at], newer = part_lse[at];
  if (newer == -INFINITE) return;
  const float top = fmaxf(older, newer), both = top + logf(expf(older - top) + expf(newer - top));
  const float keep = expf(older - both), add = expf(newer - both);
  part += (u64)row * d;
  sum += (u64)row * d;
  row_wise<K>(d, aligned(part, sum), [&](auto lanes) {
    constexpr int N = lanes.n;
    along<N>(d, [&](u32 i) {
      const auto p = load<N>(part + i);
      auto s = load<N>(sum + i);
      for (int k = 0; k < N; ++k) s.v[k] = s.v[k] * keep + p.v[k] * add;
      store(sum + i, s);
    });
  });
  __syncwarp();  // All have read the older one.
  if (threadIdx.x == 0) lse[at] = both;
}
KERNEL(merge_attention)

// terms [2, rows]: sums below the rank's own maxima become sums below the maxima of all; then targets' logits.
extern "C" __global__ void __launch_bounds__(256)
    vocabulary_terms(const T* __restrict__ logits, const int* __restrict__ targets, u32 rows, u32 vocab,
                     const float* __restrict__ own, const float* __restrict__ max, float* __restrict__ terms) {
  const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const u32 t = (u32)targets[row];
  terms[row] *= expf(own[row] - max[row]);
  terms[rows + row] = t < vocab ? widen(logits[(u64)row * vocab + t]) : 0.0f;
}
KERNEL(vocabulary_terms)

extern "C" __global__ void __launch_bounds__(256)
    vocabulary_loss(const float* __restrict__ max, const float* __restrict__ terms, const int* __restrict__ targets,
                    u32 rows, int ignore, float* __restrict__ loss, float* __restrict__ lse) {
  const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const float z = max[row] + logf(terms[row]);
  lse[row] = z;
  loss[row] = targets[row] == ignore ? 0.0f : z - terms[rows + row];
}
KERNEL(vocabulary_loss)
