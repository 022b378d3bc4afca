// A stand-in for libcudnn.so.9 on the host: convolutions by loops, for tests of what Colossal asks of the
// library. It refuses what the library refuses, and names algorithms that must not be taken: one that gives
// other bits each time, one with too much scratch, one that rounds f32, and one that is not supported after all.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

enum Status { SUCCESS = 0, BAD_PARAM = 2000, MISALIGNED = 2003, NOT_SUPPORTED = 3000, EXECUTION_FAILED = 5000 };
enum Type { FLOAT = 0, HALF = 2, BFLOAT16 = 9 };
enum Math { TENSOR_OP = 1, FMA = 3 };
enum Algorithm { OTHER_BITS = 5, LARGE, ROUNDING, REFUSED, GOOD };

struct Tensor { int type, n, dims[5], strides[5]; };
struct Filter { int type, n, dims[5]; };
struct Convolution { int n, padding[3], stride[3], dilation[3], mode, compute, groups = 1, math = 0; };
struct Perf { int algorithm, status; float time; size_t memory; int determinism, math, reserved[3]; };

float load(int type, const void* at, size_t i) {
  if (type == HALF) return static_cast<const _Float16*>(at)[i];
  if (type == FLOAT) return static_cast<const float*>(at)[i];
  uint32_t bits = uint32_t(static_cast<const uint16_t*>(at)[i]) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void store(int type, void* at, size_t i, float x) {
  if (type == HALF) static_cast<_Float16*>(at)[i] = _Float16(x);
  if (type == FLOAT) static_cast<float*>(at)[i] = x;
  if (type != BFLOAT16) return;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  static_cast<uint16_t*>(at)[i] = x != x ? 0x7FFF : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

size_t volume(const int* dims, int n) {
  size_t all = 1;
  for (int i = 0; i < n; ++i) all *= dims[i];
  return all;
}

bool fits(const Tensor& x, const Filter& w, const Convolution& c, const Tensor& y) {
  bool good = x.n == c.n + 2 && w.n == x.n && y.n == x.n && x.type == w.type && x.type == y.type;
  good = good && c.mode == 1 && c.compute == FLOAT && x.dims[0] == y.dims[0] && w.dims[0] == y.dims[1];
  good = good && x.dims[1] == w.dims[1] * c.groups && w.dims[0] % c.groups == 0;
  for (int i = 0; good && i < c.n; ++i) {
    int reach = c.dilation[i] * (w.dims[i + 2] - 1) + 1;
    good = y.dims[i + 2] == (x.dims[i + 2] + 2 * c.padding[i] - reach) / c.stride[i] + 1;
  }
  for (const Tensor* t : {&x, &y})
    for (int i = 0; good && i < t->n; ++i) good = t->strides[i] == int(volume(t->dims + i + 1, t->n - i - 1));
  return good;
}

// f(element of x, of w, of y) for all that meet.
template <class F> void each(const Tensor& x, const Filter& w, const Convolution& c, const Tensor& y, F f) {
  const size_t under = volume(w.dims + 2, c.n), places = volume(y.dims + 2, c.n), own = w.dims[0] / c.groups;
  for (size_t image = 0; image < size_t(x.dims[0]); ++image)
    for (size_t out = 0; out < size_t(w.dims[0]); ++out)
      for (size_t place = 0; place < places; ++place)
        for (size_t in = 0; in < size_t(w.dims[1]); ++in)
          for (size_t k = 0; k < under; ++k) {
            size_t channel = out / own * w.dims[1] + in, p = place, q = k, step = 1, at = 0;
            bool there = true;
            for (int i = c.n - 1; i >= 0; --i) {
              int o = p % y.dims[i + 2] * c.stride[i] + q % w.dims[i + 2] * c.dilation[i] - c.padding[i];
              p /= y.dims[i + 2], q /= w.dims[i + 2];
              there = there && o >= 0 && o < x.dims[i + 2];
              at += o * step, step *= x.dims[i + 2];
            }
            if (!there) continue;
            f((image * x.dims[1] + channel) * step + at, (out * w.dims[1] + in) * under + k,
              (image * y.dims[1] + out) * places + place);
          }
}

int name(bool fit, int type, int dims, int room, int* count, Perf* found) {
  *count = 0;
  if (!fit) return BAD_PARAM;
  if (type == HALF && dims == 3) return NOT_SUPPORTED;
  const Perf all[] = {{OTHER_BITS, SUCCESS, 1, 0, 0, type == FLOAT ? FMA : TENSOR_OP, {}},
                      {LARGE, SUCCESS, 2, size_t(1) << 50, 1, type == FLOAT ? FMA : TENSOR_OP, {}},
                      {ROUNDING, type == FLOAT ? SUCCESS : NOT_SUPPORTED, 3, 0, 1, TENSOR_OP, {}},
                      {REFUSED, SUCCESS, 4, 512, 1, type == FLOAT ? FMA : TENSOR_OP, {}},
                      {GOOD, SUCCESS, 5, 1024, 1, type == FLOAT ? FMA : TENSOR_OP, {}}};
  for (const Perf& p : all)
    if (*count < room) found[(*count)++] = p;
  return SUCCESS;
}

unsigned done = 0;

// The sum of products of a and b where `at` says, over `c`.
template <class E> int run(bool fit, int type, const Convolution& conv, const void* a, const void* b, void* c, size_t len,
                           int algorithm, void* scratch, size_t bytes, const float* alpha, const float* beta, E each) {
  if (!fit) return BAD_PARAM;
  if ((uintptr_t(a) | uintptr_t(b) | uintptr_t(c)) % 16) return MISALIGNED;
  if (algorithm == REFUSED) return NOT_SUPPORTED;
  if (algorithm != GOOD || !scratch || bytes < 1024 || conv.math != (type == FLOAT ? FMA : TENSOR_OP)) return EXECUTION_FAILED;
  std::vector<float> sums(len);
  each([&](size_t i, size_t j, size_t to) { sums[to] += load(type, a, i) * load(type, b, j); });
  for (size_t i = 0; i < len; ++i) store(type, c, i, *alpha * sums[i] + (*beta != 0 ? *beta * load(type, c, i) : 0));
  ++done;
  return SUCCESS;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

/// How many have run: a test sees that it was asked.
extern "C" __attribute__((visibility("default"))) unsigned stand_in_convolutions() { return done; }

extern "C" __attribute__((visibility("default"))) const char* cudnnGetErrorString(int status) {
  return status == BAD_PARAM ? "BAD_PARAM" : status == MISALIGNED ? "MISALIGNED_POINTER" : "EXECUTION_FAILED";
}

API cudnnCreate(void** handle) {
  *handle = new char;
  return SUCCESS;
}
API cudnnDestroy(void* handle) {
  delete static_cast<char*>(handle);
  return SUCCESS;
}
API cudnnSetStream(void*, void* stream) { return stream ? SUCCESS : BAD_PARAM; }

API cudnnCreateTensorDescriptor(Tensor** t) { return *t = new Tensor{}, SUCCESS; }
API cudnnDestroyTensorDescriptor(Tensor* t) { return delete t, SUCCESS; }
API cudnnSetTensorNdDescriptor(Tensor* t, int type, int n, const int* dims, const int* strides) {
  if (n < 4 || n > 5) return BAD_PARAM;
  *t = Tensor{type, n, {}, {}};
  memcpy(t->dims, dims, n * sizeof(int)), memcpy(t->strides, strides, n * sizeof(int));
  return SUCCESS;
}

API cudnnCreateFilterDescriptor(Filter** f) { return *f = new Filter{}, SUCCESS; }
API cudnnDestroyFilterDescriptor(Filter* f) { return delete f, SUCCESS; }
API cudnnSetFilterNdDescriptor(Filter* f, int type, int format, int n, const int* dims) {
  if (n < 4 || n > 5 || format != 0) return BAD_PARAM;
  *f = Filter{type, n, {}};
  memcpy(f->dims, dims, n * sizeof(int));
  return SUCCESS;
}

API cudnnCreateConvolutionDescriptor(Convolution** c) { return *c = new Convolution{}, SUCCESS; }
API cudnnDestroyConvolutionDescriptor(Convolution* c) { return delete c, SUCCESS; }
API cudnnSetConvolutionNdDescriptor(Convolution* c, int n, const int* padding, const int* stride, const int* dilation,
                                    int mode, int compute) {
  if (n < 2 || n > 3) return BAD_PARAM;
  *c = Convolution{n, {}, {}, {}, mode, compute};
  for (int i = 0; i < n; ++i) c->padding[i] = padding[i], c->stride[i] = stride[i], c->dilation[i] = dilation[i];
  return SUCCESS;
}
API cudnnSetConvolutionGroupCount(Convolution* c, int groups) { return c->groups = groups, SUCCESS; }
API cudnnSetConvolutionMathType(Convolution* c, int math) { return c->math = math, SUCCESS; }

API cudnnGetConvolutionForwardAlgorithm_v7(void*, Tensor* x, Filter* w, Convolution* c, Tensor* y, int room, int* count, Perf* found) {
  return name(fits(*x, *w, *c, *y), x->type, c->n, room, count, found);
}
API cudnnGetConvolutionBackwardDataAlgorithm_v7(void*, Filter* w, Tensor* y, Convolution* c, Tensor* x, int room, int* count, Perf* found) {
  return name(fits(*x, *w, *c, *y), x->type, c->n, room, count, found);
}
API cudnnGetConvolutionBackwardFilterAlgorithm_v7(void*, Tensor* x, Tensor* y, Convolution* c, Filter* w, int room, int* count, Perf* found) {
  return name(fits(*x, *w, *c, *y), x->type, c->n, room, count, found);
}

API cudnnConvolutionForward(void*, const float* alpha, Tensor* x, const void* px, Filter* w, const void* pw, Convolution* c, int algorithm,
                            void* scratch, size_t bytes, const float* beta, Tensor* y, void* py) {
  return run(fits(*x, *w, *c, *y), x->type, *c, px, pw, py, volume(y->dims, y->n), algorithm, scratch, bytes, alpha, beta, [&](auto f) {
    each(*x, *w, *c, *y, [&](size_t i, size_t j, size_t o) { f(i, j, o); });
  });
}
API cudnnConvolutionBackwardData(void*, const float* alpha, Filter* w, const void* pw, Tensor* y, const void* py, Convolution* c,
                                 int algorithm, void* scratch, size_t bytes, const float* beta, Tensor* x, void* px) {
  return run(fits(*x, *w, *c, *y), x->type, *c, pw, py, px, volume(x->dims, x->n), algorithm, scratch, bytes, alpha, beta, [&](auto f) {
    each(*x, *w, *c, *y, [&](size_t i, size_t j, size_t o) { f(j, o, i); });
  });
}
API cudnnConvolutionBackwardFilter(void*, const float* alpha, Tensor* x, const void* px, Tensor* y, const void* py, Convolution* c,
                                   int algorithm, void* scratch, size_t bytes, const float* beta, Filter* w, void* pw) {
  return run(fits(*x, *w, *c, *y), x->type, *c, px, py, pw, volume(w->dims, w->n), algorithm, scratch, bytes, alpha, beta, [&](auto f) {
    each(*x, *w, *c, *y, [&](size_t i, size_t j, size_t o) { f(i, o, j); });
  });
}
