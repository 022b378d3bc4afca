// Adafactor and CAME: sums by row and by column of what is made of gradients, and updates by the
// factors that the host makes of them. Bound: memory; gradients are read three times.
//
// A parameter's piece is a list of runs within rows; up to GROUP of them, of one matrix, make a group. A
// warp takes a group and 128 columns, so it sums columns in registers and a row by one shuffle. Partial
// sums are added in order.

struct Run { u32 at, len, row, col; };
struct Group { u32 from, to, matrix; };
/// Columns of a lane; a warp has 32 times as many.
#define EACH 4

struct Piece {
  const Run* runs;
  const Group* groups;
  u32 count, cols;
};

/// `f(run, at, col, e)` for this lane's elements of its warp's group: `at` in the slice, `col` among the
/// columns of all matrices, its own column number e. `after(run)` when a run has been passed.
template <class F, class A> INLINE void over(const Piece& p, F f, A after) {
  const u32 group = blockIdx.x * blockDim.y + threadIdx.y, first = blockIdx.y * 32 * EACH + threadIdx.x;
  if (group >= p.count) return;
  const Group g = p.groups[group];
  for (u32 r = g.from; r < g.to; ++r) {
    const Run run = p.runs[r];
    const u32 start = run.col - g.matrix * p.cols;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const u32 c = first + 32 * e;
      if (c >= start && c < start + run.len) f(run, (u64)run.at + (c - start), g.matrix * p.cols + c, e);
    }
    after(r);
  }
}

/// Sums of `f(run, at, col)` by run and by column. by_run [runs, gridDim.y], by_column [groups, cols].
template <class F> INLINE void sums_of(const Piece& p, float* by_run, float* by_column, F f) {
  float columns[EACH] = {}, row = 0.0f;
  over(p, [&](const Run& run, u64 at, u32 col, int e) {
    const float x = f(run, at, col);
    columns[e] += x;
    row += x;
  }, [&](u32 r) {
    const float all = warp_sum(row);
    if (threadIdx.x == 0) by_run[(u64)r * gridDim.y + blockIdx.y] = all;
    row = 0.0f;
  });
  const u32 group = blockIdx.x * blockDim.y + threadIdx.y;
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const u32 c = blockIdx.y * 32 * EACH + threadIdx.x + 32 * e;
    if (group < p.count && c < p.cols) by_column[(u64)group * p.cols + c] = columns[e];
  }
}

// Squares of gradients.
extern "C" __global__ void __launch_bounds__(256)
    factored_squares(Piece p, const float* __restrict__ grads, float scale, float eps, float* __restrict__ by_run,
                     float* __restrict__ by_column) {
  sums_of(p, by_run, by_column, [&](const Run&, u64 at, u32) {
    const float g = scale * grads[at];
    return g * g + eps;
  });
}
KERNEL(factored_squares)

// m = beta m + (1 - beta) u of u = rate row g col; squares of u - m.
extern "C" __global__ void __launch_bounds__(256)
    factored_momentum(Piece p, const float* __restrict__ grads, const float* __restrict__ rows,
                      const float* __restrict__ cols, float rate, float beta, float eps, float* __restrict__ ms,
                      float* __restrict__ by_run, float* __restrict__ by_column) {
  sums_of(p, by_run, by_column, [&](const Run& run, u64 at, u32 col) {
    const float u = rate * rows[run.row] * grads[at] * cols[col];
    const float m = beta * ms[at] + (1.0f - beta) * u;
    ms[at] = m;
    return (u - m) * (u - m) + eps;
  });
}
KERNEL(factored_momentum)

// The sums of squares of directions and of parameters. partials [blocks, 2]
extern "C" __global__ void __launch_bounds__(256)
    factored_norms(Piece p, const float* __restrict__ grads, const float* __restrict__ params,
                   const float* __restrict__ rows, const float* __restrict__ cols, float scale,
                   double* __restrict__ partials) {
  float step = 0.0f, size = 0.0f;
  over(p, [&](const Run& run, u64 at, u32 col, int) {
    const float u = scale * rows[run.row] * grads[at] * cols[col];
    step += u * u;
    size += params[at] * params[at];
  }, [](u32) {});
  const double a = warp_sum((double)step), b = warp_sum((double)size);
  const u64 warp = ((u64)blockIdx.y * gridDim.x + blockIdx.x) * blockDim.y + threadIdx.y;
  if (threadIdx.x == 0) partials[2 * warp] = a, partials[2 * warp + 1] = b;
}
KERNEL(factored_norms)

// p = decay p - rate row x col, x the gradient or the momentum.
extern "C" __global__ void __launch_bounds__(256)
    factored_descend(Piece p, float* __restrict__ params, const float* __restrict__ x, const float* __restrict__ rows,
                     const float* __restrict__ cols, float rate, float decay) {
  over(p, [&](const Run& run, u64 at, u32 col, int) {
    params[at] = params[at] * decay - rate * rows[run.row] * x[at] * cols[col];
  }, [](u32) {});
}
KERNEL(factored_descend)

// A thread a run: the sum of its parts. out [runs]
extern "C" __global__ void __launch_bounds__(256)
    factored_runs(const float* __restrict__ by_run, u32 runs, u32 parts, double* __restrict__ out) {
  const u32 r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r >= runs) return;
  double s = 0.0;
  for (u32 i = 0; i < parts; ++i) s += by_run[(u64)r * parts + i];
  out[r] = s;
}
KERNEL(factored_runs)

// A thread a column: the sum of the groups of its matrix, which are first[matrix] .. first[matrix + 1].
extern "C" __global__ void __launch_bounds__(256)
    factored_columns(const float* __restrict__ by_column, const u32* __restrict__ first, u32 cols, u64 all,
                     double* __restrict__ out) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= all) return;
  const u32 matrix = i / cols, c = i % cols;
  double s = 0.0;
  for (u32 g = first[matrix]; g < first[matrix + 1]; ++g) s += by_column[(u64)g * cols + c];
  out[i] = s;
}
KERNEL(factored_columns)
