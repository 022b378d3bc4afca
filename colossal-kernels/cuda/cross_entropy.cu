// Softmax cross-entropy without a copy of the logits. Bound: memory; forward reads the logits once,
// backward reads and writes them once.

#define K WIDTH<T>

// A block a row, a warp a short one.
extern "C" __global__ void __launch_bounds__(512)
    cross_entropy(const T* __restrict__ logits, const int* __restrict__ targets, u32 rows, u32 vocab, int ignore,
                  float* __restrict__ loss, float* __restrict__ lse) {
  const u32 row = own_row();
  if (row >= rows) return;
  logits += (u64)row * vocab;
  const RowStats s = row_stats<K>(logits, vocab);
  if (threadIdx.x == 0) {
    const int t = targets[row];
    const float z = s.max + logf(s.sum);
    lse[row] = z;
    loss[row] = t != ignore && (u32)t < vocab ? z - widen(logits[t]) : 0.0f;
  }
}
KERNEL(cross_entropy)

// In place: logits = dloss (softmax(logits) - onehot). A grid of (columns, rows), rows by turns.
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_backward(const float* __restrict__ dloss, const int* __restrict__ targets, u32 rows, u32 vocab,
                           int ignore, const float* __restrict__ lse, T* __restrict__ logits) {
  for (u32 row = blockIdx.y; row < rows; row += gridDim.y) {
    T* const x = logits + (u64)row * vocab;
    const int t = targets[row];
    const float d = dloss[row], z = lse[row];
    const bool none = t == ignore || d == 0.0f;
    const auto finish = [&](u32 i, auto lanes) {
      constexpr int N = lanes.n;
      Floats<N> p;
      if (none) {
        for (int k = 0; k < N; ++k) p.v[k] = 0.0f;
      } else {
        p = load<N>(x + i);
        for (int k = 0; k < N; ++k) p.v[k] = d * (expf(p.v[k] - z) - (i + k == (u32)t ? 1.0f : 0.0f));
      }
      store(x + i, p);
    };
    // A vector of a row that begins anywhere; the first threads take what is before.
    const u32 skip = before_vectors(x, vocab), thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread < skip) finish(thread, Lanes<1>());
    const u32 i = skip + thread * K;
    if (i + K <= vocab) finish(i, Lanes<K>());
    else for (u32 j = i; j < vocab; ++j) finish(j, Lanes<1>());
  }
}
KERNEL(cross_entropy_backward)

extern "C" __global__ void __launch_bounds__(512)
    logits_stats(const T* __restrict__ logits, u32 rows, u32 vocab, float* __restrict__ max, float* __restrict__ sum) {
  const u32 row = own_row();
  if (row >= rows) return;
  logits += (u64)row * vocab;
  const RowStats s = row_stats<K>(logits, vocab);
  if (threadIdx.x == 0) {
    max[row] = s.max;
    sum[row] = s.sum;
  }
}
KERNEL(logits_stats)

// Of each row the first of the largest, and its log-probability.
extern "C" __global__ void __launch_bounds__(512)
    logits_best(const T* __restrict__ logits, u32 rows, u32 vocab, int* __restrict__ best, float* __restrict__ logprob) {
  const u32 row = own_row();
  if (row >= rows) return;
  logits += (u64)row * vocab;
  const RowStats s = row_stats<K>(logits, vocab);
  // A float holds it: no vocabulary has 2^24 entries.
  float place = -(float)vocab;
  for (u32 i = threadIdx.x; i < vocab; i += blockDim.x)
    if (widen(logits[i]) == s.max) {
      place = -(float)i;
      break;
    }
  place = -block_max(place);
  if (threadIdx.x == 0) {
    best[row] = place < (float)vocab ? (int)place : 0;
    logprob[row] = -logf(s.sum);
  }
}
KERNEL(logits_best)
