// CUDA C++ on a CPU: what a kernel's source sees instead of NVRTC's built-in names.
//
// Every thread of a block is a fiber with a stack of its own; blocks run one after another. A fiber
// runs until it must wait: at a barrier of its block, or in a function that the lanes of a warp
// call together. Which fiber runs next is the launch's choice, so a missing barrier shows as a
// wrong result in one order or another; shared memory starts as NaN. It shows neither speed nor
// what depends on the hardware's memory model.
#pragma once
#if !defined(__x86_64__)
#error "the stand-in switches fibers with x86-64 instructions"
#endif
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <sys/mman.h>

#define __global__
#define __device__ static
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __shared__ static __attribute__((section("cuemu_shared")))
#define __constant__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

namespace cuemu {

struct Dim { unsigned x, y, z; };

/// What the driver hands over.
struct Launch {
  Dim grid, block;
  unsigned shared;
  void** args;
  unsigned order;      // 0 ascending, 1 descending, else the seed of a shuffle
  char message[256];   // what went wrong
};

enum { OK = 0, FAILED = 719 };
constexpr size_t STACK = 128 << 10, SHARED = 227 << 10, CANARY = 256;

/// An asynchronous copy: its place holds NaN until it is waited for.
struct Copy { void* to; const void* from; unsigned bytes; };
constexpr unsigned COPIES = 256, GROUPS = 16;
struct Fiber {
  void* stack_pointer;
  Dim thread;
  unsigned number;
  bool done;
  unsigned copies, groups, group_end[GROUPS];
  Copy copy[COPIES];
};
struct Warp {
  unsigned arrived, turn, gone;
  int site;
  // Two turns: a lane may be late to read the last one while others bring the next.
  alignas(64) unsigned char in[2][32 * 64], out[2][32 * 64];
};

static Fiber fibers[1024];
static Warp warps[32];
static Fiber* current;
static void* scheduler;
static Dim block_index, block_dim, grid_dim;
static unsigned alive, waiting, turn;
static int waiting_site;
static uint64_t progress;
static bool failed;
static Launch* launch;
static void (*body)(void**);
alignas(1024) static unsigned char shared[SHARED + CANARY];

extern "C" void cuemu_switch(void** save, void* to);
__asm__(R"(.text
.local cuemu_switch
.type cuemu_switch, @function
cuemu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size cuemu_switch, . - cuemu_switch)");

static void yield() { cuemu_switch(&current->stack_pointer, scheduler); }

/// Ends the launch with a message: the fiber never goes on.
[[noreturn]] static void fail(const char* format, ...) {
  if (!failed) {
    va_list values;
    va_start(values, format);
    vsnprintf(launch->message, sizeof launch->message, format, values);
    va_end(values);
  }
  failed = true;
  for (;;) yield();
}

static void release_block() { waiting = 0; ++turn; ++progress; }

/// A barrier of the block. All that wait at it must have come to the same line.
static void block_barrier(int site) {
  if (waiting && waiting_site != site)
    fail("divergent barriers: thread %u is at line %d, others at line %d", current->number, site, waiting_site);
  waiting_site = site;
  const unsigned mine = turn;
  if (++waiting == alive) release_block();
  else while (turn == mine) yield();
}

/// What the lanes of a warp do together: the last to come computes all results from all inputs.
template <class In, class Out, class Together>
inline Out together(int site, const In& in, Together all) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "too much for the mailbox");
  Warp& warp = warps[current->number / 32];
  const unsigned lane = current->number % 32, mine = warp.turn, slot = mine & 1;
  if (warp.gone) fail("line %d: lanes of the warp of thread %u have ended", site, current->number);
  if (warp.arrived && warp.site != site)
    fail("a warp diverged: thread %u is at line %d, others at line %d", current->number, site, warp.site);
  warp.site = site;
  In* ins = reinterpret_cast<In*>(warp.in[slot]);
  Out* outs = reinterpret_cast<Out*>(warp.out[slot]);
  ins[lane] = in;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.turn;
    ++progress;
    all(const_cast<const In*>(ins), outs);
  } else {
    while (warp.turn == mine) yield();
  }
  return outs[lane];
}

static void entry() {
  body(launch->args);
  Warp& warp = warps[current->number / 32];
  if (warp.arrived) fail("thread %u ended while its warp waits at line %d", current->number, warp.site);
  ++warp.gone;
  current->done = true;
  ++progress;
  // Threads that have ended are not waited for.
  if (--alive && waiting == alive) release_block();
  for (;;) yield();
}

extern "C" unsigned char __start_cuemu_shared[] __attribute__((weak, visibility("hidden")));
extern "C" unsigned char __stop_cuemu_shared[] __attribute__((weak, visibility("hidden")));

/// In which order warps, and the lanes of each, get their turn. A greedy warp goes on until it waits
/// for others; without greed all go on in step.
struct Order { unsigned warps[32], lanes[32]; bool greedy; };

static void run_block(Launch* l, unsigned char* stacks, const Order& order, unsigned threads) {
  memset(shared, 0xff, l->shared);
  memset(shared + l->shared, 0xa5, CANARY);
  if (__start_cuemu_shared) memset(__start_cuemu_shared, 0xff, __stop_cuemu_shared - __start_cuemu_shared);
  alive = threads;
  waiting = 0;
  for (unsigned w = 0; w < threads / 32; ++w) warps[w].arrived = warps[w].gone = warps[w].turn = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i];
    f.done = false;
    f.copies = f.groups = 0;
    f.number = i;
    f.thread = {i % l->block.x, i / l->block.x % l->block.y, i / (l->block.x * l->block.y)};
    void** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK - 64);
    *--top = nullptr;  // The entry finds its stack as after a call.
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    f.stack_pointer = top;
  }
  while (alive && !failed) {
    const uint64_t before = progress;
    for (unsigned w = 0; w < threads / 32; ++w) {
      uint64_t start;
      do {
        start = progress;
        for (unsigned k = 0; k < 32 && !failed; ++k) {
          current = &fibers[order.warps[w] * 32 + order.lanes[k]];
          if (!current->done) cuemu_switch(&scheduler, current->stack_pointer);
        }
      } while (order.greedy && progress != start && !failed);
    }
    if (progress == before && alive && !failed) {
      failed = true;
      snprintf(l->message, sizeof l->message, "deadlock: %u threads wait at line %d, %u have ended",
               waiting, waiting_site, threads - alive);
    }
  }
  for (unsigned i = 0; i < CANARY && !failed; ++i)
    if (shared[l->shared + i] != 0xa5) {
      failed = true;
      snprintf(l->message, sizeof l->message, "wrote beyond its %u bytes of shared memory", l->shared);
    }
}

static int start(void (*f)(void**), Launch* l) {
  static unsigned char* stacks;
  if (!stacks) {
    void* space = mmap(nullptr, 1024 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return FAILED;
    stacks = static_cast<unsigned char*>(space);
  }
  const unsigned threads = l->block.x * l->block.y * l->block.z;
  if (threads % 32) {
    snprintf(l->message, sizeof l->message, "%u threads are not whole warps", threads);
    return FAILED;
  }
  Order order;
  order.greedy = l->order != 0;
  unsigned seed = l->order;
  const auto fill = [&](unsigned* to, unsigned n) {
    for (unsigned i = 0; i < n; ++i) to[i] = l->order == 1 ? n - 1 - i : i;
    for (unsigned i = n - 1; i > 0 && l->order > 1; --i) {
      seed = seed * 1664525u + 1013904223u;
      std::swap(to[i], to[(seed >> 8) % (i + 1)]);
    }
  };
  fill(order.warps, threads / 32);
  fill(order.lanes, 32);
  body = f;
  launch = l;
  block_dim = l->block;
  grid_dim = l->grid;
  failed = false;
  const uint64_t blocks = uint64_t(l->grid.x) * l->grid.y * l->grid.z;
  for (uint64_t i = 0; i < blocks && !failed; ++i) {
    const uint64_t b = l->order == 1 ? blocks - 1 - i : i;
    block_index = {unsigned(b % l->grid.x), unsigned(b / l->grid.x % l->grid.y), unsigned(b / l->grid.x / l->grid.y)};
    run_block(l, stacks, order, threads);
  }
  return failed ? FAILED : OK;
}

/// Unpacks the driver's array of pointers to arguments.
template <auto kernel> struct Call;
template <class... Args, void (*kernel)(Args...)> struct Call<kernel> {
  template <size_t... I> static void unpack(void** p, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<Args>*>(p[I])...);
  }
  static void run(void** p) { unpack(p, std::index_sequence_for<Args...>{}); }
  /// Bytes of each argument, then 0: a graph keeps copies.
  static constexpr unsigned sizes[] = {sizeof(Args)..., 0};
};

static void copy_later(void* to, const void* from, unsigned bytes) {
  Fiber& f = *current;
  if (f.copies == COPIES) fail("more than %u copies under way", COPIES);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) fail("a copy of 16 bytes that is not aligned");
  if (bytes > 16) fail("a copy of %u bytes", bytes);
  f.copy[f.copies++] = {to, from, bytes};
  memset(to, 0xff, 16);
}
static void copies_commit() {
  Fiber& f = *current;
  if (f.groups == GROUPS) fail("more than %u groups of copies under way", GROUPS);
  f.group_end[f.groups++] = f.copies;
}
static void copies_wait(unsigned most) {
  Fiber& f = *current;
  if (f.groups <= most) return;
  const unsigned ended = f.groups - most, done = f.group_end[ended - 1];
  for (unsigned i = 0; i < done; ++i) {
    const Copy& c = f.copy[i];
    memset(c.to, 0, 16);
    memcpy(c.to, c.from, c.bytes);
  }
  memmove(f.copy, f.copy + done, (f.copies - done) * sizeof(Copy));
  f.copies -= done;
  for (unsigned g = ended; g < f.groups; ++g) f.group_end[g - ended] = f.group_end[g] - done;
  f.groups = most;
}

template <class V> inline V shuffle(int site, V v, unsigned source) {
  struct In { V v; unsigned source; };
  return together<In, V>(site, In{v, source}, [](const In* in, V* out) {
    for (int i = 0; i < 32; ++i) out[i] = in[in[i].source & 31].v;
  });
}
static unsigned lane() { return current->number % 32; }

}  // namespace cuemu

/// Stands behind each kernel: the entry that the driver looks for.
#define KERNEL(name)                                                                     \
  extern "C" __attribute__((visibility("default"))) int cuemu_##name(cuemu::Launch* l) { \
    return cuemu::start(cuemu::Call<name>::run, l);                                      \
  }                                                                                      \
  extern "C" __attribute__((visibility("default"))) const unsigned* sizes_##name() {     \
    return cuemu::Call<name>::sizes;                                                     \
  }
#define DYN_SMEM(type, name) type* const name = reinterpret_cast<type*>(cuemu::shared)

#define threadIdx (cuemu::current->thread)
#define blockIdx (cuemu::block_index)
#define blockDim (cuemu::block_dim)
#define gridDim (cuemu::grid_dim)

#define __syncthreads() cuemu::block_barrier(__LINE__)
#define __syncwarp() cuemu::shuffle(__LINE__, 0, 0u)
#define __shfl_sync(mask, v, source) cuemu::shuffle(__LINE__, v, source)
#define __shfl_xor_sync(mask, v, by) cuemu::shuffle(__LINE__, v, cuemu::lane() ^ (by))
#define __shfl_down_sync(mask, v, by) \
  cuemu::shuffle(__LINE__, v, cuemu::lane() + (by) < 32 ? cuemu::lane() + (by) : cuemu::lane())

template <class V> inline V atomicAdd(V* at, V v) { V old = *at; *at = old + v; return old; }
template <class V> inline V atomicMax(V* at, V v) { V old = *at; *at = old < v ? v : old; return old; }
inline void __threadfence() {}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
template <class V> inline V min(V a, V b) { return b < a ? b : a; }
template <class V> inline V max(V a, V b) { return a < b ? b : a; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
