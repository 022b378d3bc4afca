
// What all kernels of attention share: sizes, lengths and mask.

/// Sizes and mask, as AttentionShape.
struct Shape {
  u32 q_len, kv_len, heads, kv_heads, head_dim, causal;
  u32 window;  // 0: none
  float scale;
  u64 kv_stride, bias_batch, bias_head;
  const int* q_lens;
  const int* kv_lens;
  const float* bias;
};

/// One sequence's part of it.
struct Sequence {
  int queries, keys;
  const float* bias;
};

INLINE Sequence sequence(const Shape& s, u32 batch, u32 head) {
  const auto real = [&](const int* lens, u32 all) {
    if (!lens) return (int)all;
    const int n = lens[batch];
    return n < 0 ? 0 : n < (int)all ? n : (int)all;
  };
  return {real(s.q_lens, s.q_len), real(s.kv_lens, s.kv_len),
          s.bias ? s.bias + batch * s.bias_batch + head * s.bias_head : nullptr};
}

/// The keys from, to that query i sees.
struct Range { int from, to; };
INLINE Range visible(const Shape& s, const Sequence& o, int i) {
  if (i >= o.queries) return {0, 0};
  if (!s.causal) return {0, o.keys};
  const int end = o.keys + i + 1 - o.queries;
  const int to = end < 0 ? 0 : end < o.keys ? end : o.keys;
  return {s.window && to > (int)s.window ? to - (int)s.window : 0, to};
}

INLINE bool whole_vectors(const Shape& s) { return s.head_dim % WIDTH<T> == 0 && s.kv_stride % WIDTH<T> == 0; }

