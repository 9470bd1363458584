// A tensor as the kernels see it: a pointer, a dtype, four sizes and four element strides (N, C, H, W).
// Nothing here knows torch or Python; the binding fills views in and keeps the memory alive for the call.
#pragma once
#include <cstdint>

namespace zf {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, u8 = 4 };

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  int64_t n() const { return size[0]; }
  int64_t c() const { return size[1]; }
  int64_t h() const { return size[2]; }
  int64_t w() const { return size[3]; }
  int64_t numel() const { return size[0] * size[1] * size[2] * size[3]; }
};

// Geometry of a pooling window or of a convolution, one entry for rows and one for columns.
struct Window {
  int64_t kernel[2];
  int64_t stride[2];
  int64_t padding[2];
  int64_t dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
};

enum class Overlap : int { sum = 0, last = 1 };

// What the kernels return: no_bad_switch, or the linear index (NCHW order) of a switch that names no
// tap of its window or a tap outside the map. Nothing outside the output is ever written.
constexpr int64_t no_bad_switch = -1;

}  // namespace zf
