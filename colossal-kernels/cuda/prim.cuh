// What all kernels stand on: types, vectors of 16 bytes, reductions, and the only inline assembly.
//
// A file of kernels is compiled behind this one, once for each TYPE (float, bf16, f16), which they call T; no header of
// CUDA is needed. Under CUEMU the same text runs on a CPU (see stand_in/).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef long long i64;

#ifndef CUEMU
// The emulation wants an entry beside each kernel.
#define KERNEL(name)
#define DYN_SMEM(type, name)                                     \
  extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define INLINE __device__ __forceinline__
#else
#define INLINE static __attribute__((always_inline)) inline
#endif

#define ALL 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// ---- Numbers that are stored. All arithmetic is in float.

struct __align__(2) bf16 { u16 bits; };
struct __align__(2) f16 { u16 bits; };
#ifdef TYPE
typedef TYPE T;
#endif

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
INLINE void narrow(float x, float& y) { y = x; }
#ifndef CUEMU
INLINE float widen(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
INLINE void narrow(float x, f16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
INLINE void narrow(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
// Two numbers as the two halves of a register, the first in the lower one.
INLINE u32 pair(float a, float b, bf16) { u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a)); return y; }
INLINE u32 pair(float a, float b, f16) { u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a)); return y; }
#else
INLINE float widen(f16 x) { _Float16 y; memcpy(&y, &x, 2); return y; }
INLINE void narrow(float x, f16& y) { _Float16 h = (_Float16)x; memcpy(&y, &h, 2); }
INLINE void narrow(float x, bf16& y) {
  const u32 u = __float_as_uint(x);
  y.bits = x != x ? 0x7fff : (u16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
template <class E> INLINE u32 pair(float a, float b, E) {
  E x, y;
  narrow(a, x);
  narrow(b, y);
  return x.bits | (u32)y.bits << 16;
}
#endif
template <class E> INLINE E as(float x) { E y; narrow(x, y); return y; }

// ---- Numbers of 8 bits: e4m3 (largest 448, no infinity) or e5m2 (largest 57344).

INLINE float widen8(u8 x, bool e5m2) {
  // Shifted into the place of an f16: an e4m3 is then 2^-8 of its value, subnormals too.
  const u32 size = x & 0x7f, bits = e5m2 ? size << 8 : size << 7;
  f16 h = {(u16)((x & 0x80) << 8 | bits)};
  const float y = widen(h);
  return e5m2 ? y : size == 0x7f ? __uint_as_float(0x7fc00000u) : y * 256.0f;
}
/// Rounded to nearest even; beyond the largest, the largest.
INLINE u8 narrow8(float x, bool e5m2) {
#if !defined(CUEMU) && __CUDA_ARCH__ >= 890
  u16 y;
  if (e5m2) asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
  else asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
  return (u8)y;
#else
  if (x != x) return 0x7f;
  const u32 sign = __float_as_uint(x) >> 24 & 0x80, digits = e5m2 ? 2 : 3, bias = e5m2 ? 15 : 7;
  const float size = fminf(fabsf(x), e5m2 ? 57344.0f : 448.0f);
  // Below the least normal number, steps of the least number: they lead on to it.
  const float step = __uint_as_float((127 + bias - 1 + digits) << 23);
  if (size * step < (float)(1u << digits)) return sign | (u32)rintf(size * step);
  const u32 bits = __float_as_uint(size), drop = 23 - digits;
  return sign | (((bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop) - ((127 - bias) << digits));
#endif
}

// ---- Vectors: memory is read and written 16 bytes a thread.

template <class E, int K> struct __align__(sizeof(E) * K < 16 ? sizeof(E) * K : 16) Vec { E v[K]; };
template <int K> struct Floats { float v[K]; };
/// 16 bytes as four registers.
struct __align__(16) Words { u32 v[4]; };
/// How many elements a thread takes at once, as a type.
template <int K> struct Lanes { static constexpr int n = K; };
/// Elements of E in 16 bytes.
template <class E> constexpr int WIDTH = 16 / (int)sizeof(E);

template <int K, class E> INLINE Floats<K> load(const E* p) {
  const Vec<E, K> x = *reinterpret_cast<const Vec<E, K>*>(p);
  Floats<K> y;
#pragma unroll
  for (int k = 0; k < K; ++k) y.v[k] = widen(x.v[k]);
  return y;
}
template <int K, class E> INLINE void store(E* p, const Floats<K>& x) {
  Vec<E, K> y;
#pragma unroll
  for (int k = 0; k < K; ++k) narrow(x.v[k], y.v[k]);
  *reinterpret_cast<Vec<E, K>*>(p) = y;
}

/// The first `width` of K elements, zeros beyond: as one vector, or one by one.
template <int K, class E> INLINE Floats<K> load_part(const E* p, u32 width, bool vector) {
  if (vector) return load<K>(p);
  Floats<K> y;
#pragma unroll
  for (u32 k = 0; k < K; ++k) y.v[k] = k < width ? widen(p[k]) : 0.0f;
  return y;
}
template <int K, class E> INLINE void store_part(E* p, const Floats<K>& x, u32 width, bool vector) {
  if (vector) return store(p, x);
#pragma unroll
  for (u32 k = 0; k < K; ++k) if (k < width) narrow(x.v[k], p[k]);
}

template <class... P> INLINE bool aligned(P... p) { return ((reinterpret_cast<u64>(p) | ...) & 15) == 0; }

/// `f(i, lanes)` for elements i .. i + lanes of n: whole vectors where all operands allow it. One
/// vector a thread; K elements in it.
template <int K, class F> INLINE void each(u64 n, bool vectors, F f) {
  const u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * K;
  if (vectors && i + K <= n) f(i, Lanes<K>());
  else for (u64 j = i; j < i + K && j < n; ++j) f(j, Lanes<1>());
}

/// `f(lanes)` with whole vectors where rows of dim and all operands allow it.
template <int K, class F> INLINE void row_wise(u32 dim, bool vectors, F f) {
  if (vectors && dim % K == 0) f(Lanes<K>());
  else f(Lanes<1>());
}

/// The row that this thread's part of a block works on: a block a row, or a warp each of several short
/// rows (blocks of 32 x 8), which then know no barrier.
INLINE u32 own_row() { return blockIdx.x * blockDim.y + threadIdx.y; }

/// `f(i)` for this thread's vectors of a row.
template <int K, class F> INLINE void along(u32 dim, F f) {
  for (u32 i = threadIdx.x * K; i < dim; i += blockDim.x * K) f(i);
}

/// Elements before the first that lies on 16 bytes: rows of an odd length begin anywhere.
template <class E> INLINE u32 before_vectors(const E* x, u32 dim) {
  return min(dim, (u32)((16 - (reinterpret_cast<u64>(x) & 15)) & 15) / (u32)sizeof(E));
}
/// Do operands lie alike towards 16 bytes?
template <class A, class B> INLINE bool alike(const A* a, const B* b) {
  return ((reinterpret_cast<u64>(a) ^ reinterpret_cast<u64>(b)) & 15) == 0;
}
/// `f(i, lanes)` for this thread's part of a row that begins at x: whole vectors within, single
/// elements at its ends, or everywhere if `vectors` is false.
template <int K, class E, class F> INLINE void across(const E* x, u32 dim, bool vectors, F f) {
  const u32 skip = vectors ? before_vectors(x, dim) : dim, end = skip + (dim - skip) / K * K;
  for (u32 i = threadIdx.x; i < skip; i += blockDim.x) f(i, Lanes<1>());
  for (u32 i = skip + threadIdx.x * K; i < end; i += blockDim.x * K) f(i, Lanes<K>());
  for (u32 i = end + threadIdx.x; i < dim; i += blockDim.x) f(i, Lanes<1>());
}

// ---- Reductions: every thread gets the result, the same in every run.

INLINE float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(ALL, x, o);
  return x;
}
INLINE double warp_sum(double x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(ALL, x, o);
  return x;
}
INLINE float warp_max(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL, x, o));
  return x;
}

/// The lanes for which it holds, a bit each.
#ifndef CUEMU
INLINE u32 warp_ballot(bool is) { return __ballot_sync(ALL, is); }
INLINE u32 popcount(u32 x) { return __popc(x); }
#else
static u32 warp_ballot(bool is) {
  return cuemu::together<bool, u32>(__LINE__, is, [](const bool* in, u32* out) {
    u32 bits = 0;
    for (int l = 0; l < 32; ++l) bits |= (u32)in[l] << l;
    for (int l = 0; l < 32; ++l) out[l] = bits;
  });
}
static u32 popcount(u32 x) { return __builtin_popcount(x); }
#endif
INLINE bool warp_any(bool is) { return warp_ballot(is) != 0; }

/// Sums over a block of whole warps, of K numbers at once.
template <int K, class E> INLINE void block_sum(E (&x)[K]) {
  __shared__ E part[K][32];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(x[k]);
  if (warps == 1) return;
  __syncthreads();  // What was there has been read.
#pragma unroll
  for (int k = 0; k < K; ++k) if (lane == 0) part[k][warp] = x[k];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = warp_sum(lane < warps ? part[k][lane] : (E)0);
}
INLINE float block_sum(float x) { float y[1] = {x}; block_sum(y); return y[0]; }
INLINE double block_sum(double x) { double y[1] = {x}; block_sum(y); return y[0]; }
INLINE float block_max(float x) {
  __shared__ float part[32];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  x = warp_max(x);
  if (warps == 1) return x;
  __syncthreads();
  if (lane == 0) part[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? part[lane] : -INFINITE);
}

/// Maximum and sum of exp(x - max) of a row, in one pass: a thread rescales its sum when it meets a
/// larger number.
struct RowStats { float max, sum; };
template <int K, class E> INLINE RowStats row_stats(const E* x, u32 dim) {
  float top = -INFINITE, sum = 0.0f;
  across<K>(x, dim, true, [&](u32 i, auto lanes) {
    constexpr int N = lanes.n;
    const auto p = load<N>(x + i);
    float here = p.v[0];
#pragma unroll
    for (int k = 1; k < N; ++k) here = fmaxf(here, p.v[k]);
    if (here > top) {
      sum *= expf(top - here);  // Zero the first time.
      top = here;
    }
#pragma unroll
    for (int k = 0; k < N; ++k) sum += p.v[k] == -INFINITE ? 0.0f : expf(p.v[k] - top);
  });
  const float max = block_max(top);
  return {max, block_sum(sum == 0.0f ? 0.0f : sum * expf(top - max))};
}

// ---- Elementary functions.

#define SQRT_2_OVER_PI 0.7978845608f
#define CUBIC 0.044715f

INLINE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
/// The normal distribution up to x.
INLINE float phi(float x) { return 0.5f * (1.0f + erff(x * 0.70710678f)); }
/// tanh of GELU's argument, through one exponential.
INLINE float inner(float x) {
  const float u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x);
  return 1.0f - __fdividef(2.0f, 1.0f + expf(fminf(2.0f * u, 80.0f)));
}
INLINE float silu_of(float x) { return x * sigmoid(x); }
INLINE float relu_of(float x) { return x > 0.0f ? x : 0.0f; }
INLINE float gelu_of(float x) { return x * phi(x); }
INLINE float gelu_tanh_of(float x) { return 0.5f * x * (1.0f + inner(x)); }

// ---- Tensor cores and asynchronous copies (sm_80 and later).

#ifndef CUEMU
INLINE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

/// d += a b: a is 16 x 16, b 16 x 8, d 16 x 8. With g = lane / 4 and t = lane % 4: a[0] holds
/// (g, 2t), (g, 2t + 1), a[1] row g + 8, a[2] and a[3] the same 8 columns on; b[0] holds (2t, g),
/// (2t + 1, g), b[1] 8 rows on; d[0], d[1] are (g, 2t), (g, 2t + 1), d[2], d[3] row g + 8.
INLINE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
INLINE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// The same of bytes with sign: 16 x 32 by 32 x 8, four consecutive steps of the depth in a register
/// where mma has two.
INLINE void mma_int8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// c + the products of four bytes with sign.
INLINE int dot4(u32 a, u32 b, int c) { int d; asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }

/// Four 8 x 8 matrices from shared memory: lane 8 i + r names row r of matrix i, 16 bytes. Register
/// i then holds elements 2 (lane % 4), + 1 of row lane / 4 of matrix i.
INLINE void ldmatrix(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}
/// The same, each matrix transposed.
INLINE void ldmatrix_t(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}

/// Starts a copy to 16 bytes of shared memory: `bytes` of them, zeros behind.
INLINE void copy16(void* to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
/// Ends a group of copies.
INLINE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most K groups of this thread are under way; others' need a barrier besides.
template <int K> INLINE void copies_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(K) : "memory"); }
#else
INLINE float exp2_fast(float x) { return exp2f(x); }

struct MmaIn { u32 a[4], b[2]; };
template <class E> static void mma_together(const MmaIn* in, Floats<4>* out) {
  float a[16][16], b[16][8];
  const auto half = [](u32 x, int i) { E e; e.bits = (u16)(x >> 16 * i); return widen(e); };
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 2; ++i) {
      const int g = l / 4, t = 2 * (l % 4) + i;
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 8] = half(in[l].a[r], i);
      for (int r = 0; r < 2; ++r) b[t + r * 8][g] = half(in[l].b[r], i);
    }
  float d[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) out[l].v[r] = d[l / 4 + r / 2 * 8][2 * (l % 4) + r % 2];
}
template <class E> static void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], E) {
  const MmaIn in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Floats<4> out = cuemu::together<MmaIn, Floats<4>>(__LINE__, in, mma_together<E>);
  for (int r = 0; r < 4; ++r) d[r] += out.v[r];
}

static int dot4(u32 a, u32 b, int c) {
  for (int i = 0; i < 4; ++i) c += (i8)(a >> 8 * i) * (i8)(b >> 8 * i);
  return c;
}
struct Ints { int v[4]; };
static void mma_int8(int (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const MmaIn in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Ints out = cuemu::together<MmaIn, Ints>(__LINE__, in, [](const MmaIn* in, Ints* out) {
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r) {
        const int row = l / 4 + r / 2 * 8, column = 2 * (l % 4) + r % 2;
        int sum = 0;
        for (int h = 0; h < 2; ++h)
          for (int t = 0; t < 4; ++t)
            sum = dot4(in[row % 8 * 4 + t].a[row / 8 + 2 * h], in[column * 4 + t].b[h], sum);
        out[l].v[r] = sum;
      }
  });
  for (int r = 0; r < 4; ++r) d[r] += out.v[r];
}

template <bool transposed> static void ldmatrix_any(u32 (&x)[4], const void* row) {
  const Words w = cuemu::together<const u16*, Words>(__LINE__, (const u16*)row, [](const u16* const* rows, Words* out) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const u16* const* m = rows + 8 * i;
        const int a = l / 4, b = 2 * (l % 4);
        out[l].v[i] = transposed ? m[b][a] | (u32)m[b + 1][a] << 16 : m[a][b] | (u32)m[a][b + 1] << 16;
      }
  });
  for (int i = 0; i < 4; ++i) x[i] = w.v[i];
}
static void ldmatrix(u32 (&x)[4], const void* row) { ldmatrix_any<false>(x, row); }
static void ldmatrix_t(u32 (&x)[4], const void* row) { ldmatrix_any<true>(x, row); }

static void copy16(void* to, const void* from, u32 bytes) { cuemu::copy_later(to, from, bytes); }
static void copies_commit() { cuemu::copies_commit(); }
template <int K> static void copies_wait() { cuemu::copies_wait(K); }
#endif
