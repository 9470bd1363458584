// Checking and reading switches on the CPU: shared by unpooling, its transpose and the fused deconvnet step.
#pragma once
#include "parallel.h"
#include "simd.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

// Whether the byte `s` of window (oy, ox) names a place inside the map; if so, where.
inline bool switch_place(const Window& pool, int64_t oy, int64_t ox, int s, int64_t height, int64_t width, int64_t* y,
                         int64_t* x) {
  if (s >= pool.taps()) return false;
  *y = oy * pool.stride[0] - pool.padding[0] + (s / pool.kernel[1]) * pool.dilation[0];
  *x = ox * pool.stride[1] - pool.padding[1] + (s % pool.kernel[1]) * pool.dilation[1];
  return *y >= 0 && *y < height && *x >= 0 && *x < width;
}

// Where each tap of a window lies, from the window's corner, in a map with the given row and column strides. A byte that
// is no tap is taken for the first one.
//
// Switches are checked before they are used, but whoever holds their memory can change it in between. So rows of windows
// whose every byte leads to a place between the map's first and last, right or wrong, are taken as they are, and in the
// others, at most the first few and the last, a place beyond them is exchanged for the first one: the worst that another
// thread can do is a wrong value.
struct TapOffsets {
  int64_t tap[256] = {};
  int64_t row, column;
  int64_t last, furthest;  // the map's last place, and the furthest tap

  TapOffsets(const Window& pool, int64_t height, int64_t width, int64_t row_stride, int64_t column_stride)
      : row(row_stride), column(column_stride), last((height - 1) * row + (width - 1) * column) {
    for (int64_t t = 0; t < pool.taps(); ++t)
      tap[t] = (t / pool.kernel[1]) * pool.dilation[0] * row + (t % pool.kernel[1]) * pool.dilation[1] * column;
    furthest = tap[pool.taps() - 1];
  }
  int64_t corner(const Window& pool, int64_t oy, int64_t ox) const {
    return (oy * pool.stride[0] - pool.padding[0]) * row + (ox * pool.stride[1] - pool.padding[1]) * column;
  }
  // The rows of windows of which no byte leads beyond the map's first and last place.
  Range rows_within(const Window& pool, const View& windows) const {
    Range rows{0, windows.h()};
    while (rows.begin < rows.end && corner(pool, rows.begin, 0) < 0) ++rows.begin;
    while (rows.begin < rows.end && corner(pool, rows.end - 1, windows.w() - 1) + furthest > last) --rows.end;
    return rows;
  }
  int64_t within(int64_t place) const { return uint64_t(place) <= uint64_t(last) ? place : 0; }
};

// Whether the elements fill one stretch of memory, in whatever order.
inline bool dense(const View& v) {
  int64_t last = 0;
  for (int axis = 0; axis < 4; ++axis) {
    if (v.stride[axis] < 0) return false;
    last += (v.size[axis] - 1) * v.stride[axis];
  }
  return last + 1 == v.numel();
}

// The linear NCHW index of the first switch that names no place inside the height x width map, or no_bad_switch.
// Kernels run it first, so that they need no checks inside. A window inside the map needs its byte under `taps`: where
// the bytes lie in one stretch that is one vectorised pass, and only the windows at the borders are looked at singly.
inline int64_t find_bad_switch(const View& switches, const Window& pool, int64_t height, int64_t width, int threads) {
  Range inside_y = windows_inside(pool, 0, switches.h(), height);
  const Range inside_x = windows_inside(pool, 1, switches.w(), width);
  const int64_t taps = pool.taps();
  int bad = 0;
  int* const bad_flag = &bad;
  if (dense(switches)) {
    const uint8_t* bytes = at<uint8_t>(switches, 0, 0, 0, 0);
    parallel_for(switches.numel(), 1 << 18, threads, [&](int64_t begin, int64_t end) {
      uint8_t largest = 0;
      for (int64_t i = begin; i < end; ++i) largest = bytes[i] > largest ? bytes[i] : largest;
      if (largest >= taps) __atomic_store_n(bad_flag, 1, __ATOMIC_RELAXED);
    });
  } else {
    inside_y = {0, 0};  // no row is exempt from the walk
  }
  const bool whole = inside_y.begin == 0 && inside_y.end == switches.h() && inside_x.begin == 0 &&
                     inside_x.end == switches.w();
  const bool by_channel = channels_contiguous(switches);
  const int64_t outer = by_channel ? switches.h() : switches.c();
  const auto window_is_bad = [&](int64_t n, int64_t c, int64_t oy, int64_t ox) {
    int64_t y, x;
    return !switch_place(pool, oy, ox, *at<uint8_t>(switches, n, c, oy, ox), height, width, &y, &x);
  };
  const auto row_is_bad = [&](int64_t n, int64_t c0, int64_t channels, int64_t oy) {
    const bool exempt = oy >= inside_y.begin && oy < inside_y.end;
    for (int64_t ox = 0; ox < switches.w(); ++ox) {
      if (exempt && ox == inside_x.begin) ox = inside_x.end;
      if (ox == switches.w()) break;
      for (int64_t c = c0; c < c0 + channels; ++c)
        if (window_is_bad(n, c, oy, ox)) return true;
    }
    return false;
  };
  if (!whole && !bad)
    parallel_for(switches.n() * outer, 65536 / (switches.numel() / (switches.n() * outer) + 1), threads,
                 [&](int64_t begin, int64_t end) {
                   bool found = false;
                   for (int64_t i = begin; i < end && !found; ++i) {
                     if (by_channel)
                       found = row_is_bad(i / outer, 0, switches.c(), i % outer);
                     else
                       for (int64_t oy = 0; oy < switches.h() && !found; ++oy)
                         found = row_is_bad(i / outer, i % outer, 1, oy);
                   }
                   if (found) __atomic_store_n(bad_flag, 1, __ATOMIC_RELAXED);
                 });
  if (!bad) return no_bad_switch;
  int64_t index = 0;  // rare: walk again in order, so that the error names the first
  for (int64_t n = 0; n < switches.n(); ++n)
    for (int64_t c = 0; c < switches.c(); ++c)
      for (int64_t oy = 0; oy < switches.h(); ++oy)
        for (int64_t ox = 0; ox < switches.w(); ++ox, ++index)
          if (window_is_bad(n, c, oy, ox)) return index;
  return no_bad_switch;
}

// One place of the unpooled map for all channels: gathers, over the windows that have a tap there, the values whose
// switch names it. Adding -0 changes no number, so the sum of "value or -0" keeps the sign of a lone -0.
//
// Windows: the list that `list_windows` made, each with the address of its values and switches for channel 0.
template <class S>
struct CoveringWindow {
  const S* values;
  const uint8_t* switches;
  int32_t tap;
};

template <class S>
int list_windows(const View& y, const View& switches, const Window& pool, int64_t n, int64_t place_y, int64_t place_x,
                 CoveringWindow<S>* list) {
  int count = 0;
  windows_at(pool, 0, place_y, y.h(), [&](int64_t oy, int64_t ky) {
    windows_at(pool, 1, place_x, y.w(), [&](int64_t ox, int64_t kx) {
      list[count++] = {at<S>(y, n, 0, oy, ox), at<uint8_t>(switches, n, 0, oy, ox),
                       int32_t(ky * pool.kernel[1] + kx)};
    });
  });
  return count;
}

template <class S>
inline typename Vec<typename Compute<S>::type>::type gather_vector(const CoveringWindow<S>* list, int count, int64_t c,
                                                                  bool last) {
  typedef typename Compute<S>::type T;
  typedef typename Vec<T>::type V;
  typedef typename Vec<T>::mask M;
  const V minus_zero = splat(T(-0.0));
  V sum = minus_zero;
  M any{};
  for (int i = 0; i < count; ++i) {
    const M hit = load_bytes<T>(list[i].switches + c) == typename Vec<T>::lane(list[i].tap);
    const V v = load_storage(list[i].values + c);
    if (last)
      sum = hit ? v : sum;
    else
      sum += hit ? v : minus_zero;
    any |= hit;
  }
  return any ? sum : V{};
}

template <class S>
inline typename Compute<S>::type gather_one(const CoveringWindow<S>* list, int count, int64_t c, bool last) {
  typedef typename Compute<S>::type T;
  T sum = T(-0.0);
  bool any = false;
  for (int i = 0; i < count; ++i)
    if (list[i].switches[c] == list[i].tap) {
      const T v = to_compute(list[i].values[c]);
      sum = last ? v : sum + v;
      any = true;
    }
  return any ? sum : T(0);
}

// The most windows that can have a tap at one place.
inline int64_t most_covering(const Window& pool) {
  int64_t most = 1;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = pool.dilation[axis] * (pool.kernel[axis] - 1) / pool.stride[axis] + 1;
    most *= reach < pool.kernel[axis] ? reach : pool.kernel[axis];
  }
  return most;
}

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
