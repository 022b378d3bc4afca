// What kernels for Hopper stand on: its inline assembly, and how a CPU does the same.
// ---- Hopper's own (sm_90a): bulk copies that report to barriers in shared memory, and products that a
// warpgroup of 128 threads starts together.

/// How a tensor of four dims lies, as the driver has encoded it (cuTensorMapEncodeTiled).
struct __align__(64) TensorMap { u64 words[16]; };

/// Rows of 128 bytes, 1024-byte aligned, swizzled as bulk copies leave them: the operand whose rows lie
/// along the depth. 32 bytes further begin the next 16 steps.
INLINE u64 deep_operand(const void* p);
/// The operand whose rows of 64 elements lie across the depth, `apart` bytes from 64 columns to the next.
INLINE u64 wide_operand(const void* p, u32 apart);

#ifndef CUEMU
INLINE u64 operand(const void* p, u32 apart) {
  return (u64)((shared_address(p) & 0x3FFFF) >> 4) | (u64)(apart >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

INLINE void barrier_init(u64* b, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(b)), "r"(arrivals)); }
/// Makes them known to copies; a barrier of the block besides, before others use them.
INLINE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(b)) : "memory"); }
/// Arrives, and promises so many bytes of copies.
INLINE void arrive_expecting(u64* b, u32 bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(b)), "r"(bytes) : "memory"); }
/// Waits for the end of the phase of this parity: phases are counted from 0.
INLINE void barrier_wait(u64* b, u32 parity) {
  asm volatile("{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
      :: "r"(shared_address(b)), "r"(parity) : "memory");
}
/// Starts to copy the box at (x, y, z, w); zeros beyond the tensor.
INLINE void copy_box(void* to, const TensorMap& m, u64* b, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      :: "r"(shared_address(to)), "l"(&m), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
/// What this thread wrote to shared memory is seen by products that start after a barrier.
INLINE void written_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// A barrier of the first N threads that come to it, apart from the block's own.
template <int N> INLINE void some_barrier() { asm volatile("bar.sync 1, %0;" :: "n"(N) : "memory"); }
/// Registers a thread of this warpgroup has from here on.
template <int N> INLINE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> INLINE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }

/// Between other uses of registers and products on them.
INLINE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
/// Those that were started since the last such call are a group.
INLINE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits for all groups of this warpgroup but the last N.
template <int N> INLINE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
/// Sums of products that have been waited for: nothing that reads them is moved before this.
template <int N> INLINE void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}

#define REGISTERS32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#define REGISTERS64 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define SUMS32 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define SUMS64 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
      "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
      "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
/// d += a b of 64 x 16 and 16 x N: rows 16 to a warp, in it as mma has them, d[4 j ..] the columns 8 j.
/// `wgmma` has both operands in shared memory along the depth; `wgmma_own` has a in registers, as mma, and b
/// across the depth.
#define WGMMA(E, NAME)                                                                                             \
  INLINE void wgmma(float (&d)[64], u64 a, u64 b, E) {                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " REGISTERS64 ", %64, %65, 1, 1, 1, 0, 0;" \
        : SUMS64 : "l"(a), "l"(b));                                                                                \
  }                                                                                                                \
  INLINE void wgmma(float (&d)[32], u64 a, u64 b, E) {                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " REGISTERS32 ", %32, %33, 1, 1, 1, 0, 0;" \
        : SUMS32 : "l"(a), "l"(b));                                                                                \
  }                                                                                                                \
  INLINE void wgmma_own(float (&d)[64], const u32* a, u64 b, E) {                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " REGISTERS64 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;" \
        : SUMS64 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }                                                                                                                \
  INLINE void wgmma_own(float (&d)[32], const u32* a, u64 b, E) {                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " REGISTERS32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;" \
        : SUMS32 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                            \
  }
WGMMA(bf16, "bf16")
WGMMA(f16, "f16")
#else
// Addresses of operands count from the beginning of dynamic shared memory.
INLINE u64 operand(const void* p, u32 apart) {
  const u64 at = (const unsigned char*)p - cuemu::shared;
  return (at & 0x3FFFF) >> 4 | (u64)(apart >> 4) << 16 | 64ull << 32 | 1ull << 62;
}
static u32 swizzled(u32 at) { return at ^ (at >> 7 & 7) << 4; }

struct Barrier { int bytes; u32 arrivals : 12, missing : 12, phase : 8; };
static_assert(sizeof(Barrier) == 8, "as the hardware's");
static void barrier_init(u64* b, u32 arrivals) { *(Barrier*)b = {0, arrivals, arrivals, 0}; }
static void barriers_ready() {}
static void barrier_turn(Barrier& b) {
  if (b.missing || b.bytes) return;
  b.missing = b.arrivals;
  b.phase ^= 1;
  ++cuemu::progress;
}
static void arrive_expecting(u64* p, u32 bytes) {
  Barrier& b = *(Barrier*)p;
  if (!b.missing) cuemu::fail("thread %u arrives at a barrier that waits for nobody", cuemu::current->number);
  b.bytes += bytes, --b.missing;
  barrier_turn(b);
}
static void arrive(u64* p) { arrive_expecting(p, 0); }

/// A box under way: its place holds NaN until somebody waits for its barrier.
struct Box { unsigned char* to; const TensorMap* map; u64* barrier; int at[4]; };
static Box boxes[64];
static u32 box_count;
template <class F> static void over_box(const Box& b, F f) {
  const u64* const dims = b.map->words + 1;
  const u64* const strides = dims + 4;
  const u32* const sizes = (const u32*)(strides + 3);
  const u32 start = b.to - cuemu::shared;
  for (u32 y = 0; y < sizes[2]; ++y)
    for (u32 x = 0; x < sizes[0]; ++x) {
      const u64 at[4] = {(u64)(b.at[0] + (int)x), (u64)b.at[1], (u64)(b.at[2] + (int)y), (u64)b.at[3]};
      bool there = true;
      for (int i = 0; i < 4; ++i) there &= at[i] < dims[i];
      const u64 from = b.map->words[0] + 2 * at[0] + at[1] * strides[0] + at[2] * strides[1] + at[3] * strides[2];
      f((u16*)(cuemu::shared + swizzled(start + y * 128 + 2 * x)), there ? (const u16*)from : nullptr);
    }
}
static u32 box_bytes(const TensorMap& m) { const u32* sizes = (const u32*)(m.words + 8); return sizes[0] * sizes[2] * 2; }
static void copy_box(void* to, const TensorMap& m, u64* b, int x, int y, int z, int w) {
  if (box_count == 64) cuemu::fail("64 boxes are under way that nobody waits for");
  if ((((unsigned char*)to - cuemu::shared) & 1023) != 0) cuemu::fail("a box that does not begin at 1024 bytes");
  boxes[box_count] = {(unsigned char*)to, &m, b, {x, y, z, w}};
  over_box(boxes[box_count++], [](u16* to, const u16*) { *to = 0xffff; });
}
static void barrier_wait(u64* p, u32 parity) {
  Barrier& b = *(Barrier*)p;
  while ((b.phase & 1u) == parity) {
    u32 left = 0;
    for (u32 i = 0; i < box_count; ++i) {
      if (boxes[i].barrier != p) { boxes[left++] = boxes[i]; continue; }
      over_box(boxes[i], [](u16* to, const u16* from) { *to = from ? *from : 0; });
      b.bytes -= box_bytes(*boxes[i].map);
    }
    if (left < box_count) {
      box_count = left;
      barrier_turn(b);
    } else {
      cuemu::yield();
    }
  }
}
static void written_for_products() {}
template <int N> static void some_barrier() {
  static u32 waiting, turn;
  const u32 mine = turn;
  if (++waiting == N) waiting = 0, ++turn, ++cuemu::progress;
  else while (turn == mine) cuemu::yield();
}
template <int N> static void fewer_registers() {}
template <int N> static void more_registers() {}
static void products_begin() {}
static void products_commit() {}
template <int N> static void products_wait() { __syncwarp(); }
template <int N> static void settle(float (&)[N]) {}

template <class E> static float at_operand(u32 at) { E e; e.bits = *(const u16*)(cuemu::shared + swizzled(at)); return widen(e); }
static u32 start_of(u64 operand) { return (u32)(operand & 0x3FFF) << 4; }
template <class E> static float deep_at(u64 operand, u32 row, u32 k) {
  return at_operand<E>(start_of(operand) + row / 8 * 1024 + row % 8 * 128 + 2 * k);
}
template <class E> static float wide_at(u64 operand, u32 k, u32 column) {
  const u32 apart = (u32)(operand >> 16 & 0x3FFF) << 4;
  return at_operand<E>(start_of(operand) + column / 64 * apart + k / 8 * 1024 + k % 8 * 128 + column % 64 * 2);
}
template <class E, int N> static void wgmma(float (&d)[N], u64 a, u64 b, E) {
  const u32 t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4;
  for (u32 h = 0; h < 2; ++h) {
    float x[16];
    for (u32 k = 0; k < 16; ++k) x[k] = deep_at<E>(a, row + 8 * h, k);
    for (u32 j = 0; j < N / 4; ++j)
      for (u32 e = 0; e < 2; ++e)
        for (u32 k = 0; k < 16; ++k) d[4 * j + 2 * h + e] += x[k] * deep_at<E>(b, 8 * j + t % 4 * 2 + e, k);
  }
}
struct OwnRows { u32 v[4][4]; };
template <class E, int N> static void wgmma_own(float (&d)[N], const u32* a, u64 b, E) {
  const OwnRows rows = cuemu::together<Words, OwnRows>(__LINE__, {{a[0], a[1], a[2], a[3]}}, [](const Words* in, OwnRows* out) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) memcpy(out[l].v[i], in[l / 4 * 4 + i].v, 16);
  });
  for (u32 h = 0; h < 2; ++h)
    for (u32 j = 0; j < N / 4; ++j)
      for (u32 e = 0; e < 2; ++e)
        for (u32 k = 0; k < 16; ++k) {
          E x;
          x.bits = (u16)(rows.v[k % 8 / 2][h + k / 8 * 2] >> k % 2 * 16);
          d[4 * j + 2 * h + e] += widen(x) * wide_at<E>(b, k, 8 * j + threadIdx.x % 4 * 2 + e);
        }
}
#endif
INLINE u64 deep_operand(const void* p) { return operand(p, 16); }
INLINE u64 wide_operand(const void* p, u32 apart) { return operand(p, apart); }
