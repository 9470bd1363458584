// Index arithmetic of a pooling window along one axis, shared by every CPU kernel that walks windows.
#pragma once
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

struct Range {
  int64_t begin, end;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0, b > 0

// The taps of window `o` that lie inside a map of `size`.
inline Range taps_inside(const Window& pool, int axis, int64_t o, int64_t size) {
  const int64_t base = o * pool.stride[axis] - pool.padding[axis], d = pool.dilation[axis];
  const int64_t begin = base >= 0 ? 0 : ceil_div(-base, d);
  int64_t end = base < size ? (size - 1 - base) / d + 1 : 0;
  if (end > pool.kernel[axis]) end = pool.kernel[axis];
  return {begin, end};
}

// The windows out of `count` whose every tap lies inside a map of `size`.
inline Range windows_inside(const Window& pool, int axis, int64_t count, int64_t size) {
  const int64_t s = pool.stride[axis], p = pool.padding[axis];
  const int64_t last = size - 1 - pool.dilation[axis] * (pool.kernel[axis] - 1) + p;  // the largest base + p
  Range r{ceil_div(p, s), last < 0 ? 0 : last / s + 1};
  if (r.end > count) r.end = count;
  if (r.begin > r.end) r.begin = r.end;
  return r;
}

// Calls f(o, tap) for every window `o` out of `count` that has a tap at `position`, in ascending order of o.
template <class F>
inline void windows_at(const Window& pool, int axis, int64_t position, int64_t count, const F& f) {
  const int64_t s = pool.stride[axis], d = pool.dilation[axis];
  const int64_t shifted = position + pool.padding[axis];  // = o*s + tap*d
  const int64_t reach = d * (pool.kernel[axis] - 1);
  int64_t o = shifted > reach ? ceil_div(shifted - reach, s) : 0;
  for (; o < count && o * s <= shifted; ++o) {
    const int64_t offset = shifted - o * s;
    if (d == 1)  // nearly always, and a division costs as much as the vector work of a window
      f(o, offset);
    else if (offset % d == 0)
      f(o, offset / d);
  }
}

// Whether the channels are the axis with unit stride, so that vectors run over them.
inline bool channels_contiguous(const View& v) { return v.stride[1] == 1 && v.size[1] > 1; }

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
