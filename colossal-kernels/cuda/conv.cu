// Patches of images as columns of a matrix, and their sum back: what makes a convolution of products.
// Bound: memory, kernel volume times the image.

struct Conv { u32 channels, size[3], kernel[3], stride[3], padding[3], dilation[3], out[3]; };

INLINE u32 volume(const u32 (&x)[3]) { return x[0] * x[1] * x[2]; }

// columns [images, channels * kernel, places]: a thread an element, neighbours along a line of the image.
extern "C" __global__ void __launch_bounds__(256)
    conv_columns(const T* __restrict__ x, const Conv s, u64 n, T* __restrict__ columns) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const u32 places = volume(s.out), kernel = volume(s.kernel);
  const u64 row = i / places, channel = row / kernel;
  const u32 o = i % places, k = row % kernel;
  const u32 place[3] = {o / (s.out[1] * s.out[2]), o / s.out[2] % s.out[1], o % s.out[2]};
  const u32 under[3] = {k / (s.kernel[1] * s.kernel[2]), k / s.kernel[2] % s.kernel[1], k % s.kernel[2]};
  u64 at = channel;
  bool there = true;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    // Before the image it is a large number.
    const u32 p = place[d] * s.stride[d] + under[d] * s.dilation[d] - s.padding[d];
    there &= p < s.size[d];
    at = at * s.size[d] + p;
  }
  columns[i] = there ? x[at] : as<T>(0.0f);
}
KERNEL(conv_columns)

// A thread an element of dx: the sum, in order, of the columns that it is in.
extern "C" __global__ void __launch_bounds__(256)
    conv_image(const float* __restrict__ columns, const Conv s, u64 n, T* __restrict__ dx) {
  const u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const u32 places = volume(s.out), at = i % volume(s.size);
  const u64 channel = i / volume(s.size);
  const u32 p[3] = {at / (s.size[1] * s.size[2]), at / s.size[2] % s.size[1], at % s.size[2]};
  const float* const own = columns + channel * volume(s.kernel) * places;
  // The place of the kernel whose element k lies over p, along a dim; the count of places where there is none.
  const auto over = [&](int d, u32 k) {
    const u32 from = p[d] + s.padding[d] - k * s.dilation[d];  // Below 0 a large number.
    return p[d] + s.padding[d] >= k * s.dilation[d] && from % s.stride[d] == 0 ? from / s.stride[d] : s.out[d];
  };
  float sum = 0.0f;
  u32 k = 0;
  for (u32 z = 0; z < s.kernel[0]; ++z)
    for (u32 y = 0; y < s.kernel[1]; ++y)
      for (u32 x = 0; x < s.kernel[2]; ++x, ++k) {
        const u32 a = over(0, z), b = over(1, y), c = over(2, x);
        if (a < s.out[0] && b < s.out[1] && c < s.out[2])
          sum += own[(u64)k * places + (a * s.out[1] + b) * s.out[2] + c];
      }
  narrow(sum, dx[i]);
}
KERNEL(conv_image)
