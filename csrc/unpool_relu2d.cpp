// CPU kernels of unpool_relu2d and of its transpose, pool_gather2d. The contracts are in the header.
//
// Least traffic: one value and one byte in for each window, the whole map out: bound by memory. With channels
// contiguous the map is gathered place by place and each place stored once; with rows contiguous a plane is
// cleared and scattered into, one thread a plane, so that the order of the additions is fixed.
#include "unpool_relu2d.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "switches.h"
#include "window.h"

#include <type_traits>

namespace zf {
namespace ZF_ISA {
namespace {

template <class V>
inline V relu_vector(V v) {
  return v < 0 ? V{} : v;  // NaN and -0 pass through
}
template <class T>
inline T relu_one(T v) {
  return v < 0 ? T(0) : v;
}

template <class S>
void unpool_rows_channels_last(const View& y, const View& switches, const View& out, const Window& pool, bool relu,
                               bool last, int64_t begin, int64_t end) {
  typedef typename Compute<S>::type T;
  constexpr int lanes = Vec<T>::lanes;
  auto* list =
      static_cast<CoveringWindow<S>*>(thread_scratch(0, most_covering(pool) * int64_t(sizeof(CoveringWindow<S>))));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / out.h(), place_y = row % out.h();
    for (int64_t place_x = 0; place_x < out.w(); ++place_x) {
      const int count = list_windows<S>(y, switches, pool, n, place_y, place_x, list);
      S* p = at_mut<S>(out, n, 0, place_y, place_x);
      int64_t c = 0;
      for (; c + lanes <= out.c(); c += lanes) {
        const auto v = gather_vector(list, count, c, last);
        store_storage(p + c, relu ? relu_vector(v) : v);
      }
      for (; c < out.c(); ++c) {
        const T v = gather_one(list, count, c, last);
        from_compute(relu ? relu_one(v) : v, p + c);
      }
    }
  }
}

// place + v, but v alone where the place is still 0, so that a lone -0 keeps its sign. Bits, not a branch: whether two
// windows meet is as random as the data, and a misprediction costs ten additions.
template <class T>
inline T added(T place, T v) {
  typedef typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type Bits;
  const T sum = place + v;
  Bits v_bits, sum_bits;
  std::memcpy(&v_bits, &v, sizeof v);
  std::memcpy(&sum_bits, &sum, sizeof sum);
  const Bits empty = Bits(0) - Bits(place == 0), chosen = (v_bits & empty) | (sum_bits & ~empty);
  T result;
  std::memcpy(&result, &chosen, sizeof result);
  return result;
}

// Rows of windows; Edge: some of their bytes may lead out of the plane's memory.
template <bool Edge, class S, class T>
inline __attribute__((always_inline)) void scatter_rows(const View& y, const View& switches, const Window& pool,
                                                        const TapOffsets& offsets, const Range& rows, int64_t n, int64_t c,
                                                        bool last, T* plane) {
  const int64_t width = y.w(), column = y.stride[3], switch_column = switches.stride[3], step = pool.stride[1];
  const auto where = [&](int64_t place) { return Edge ? offsets.within(place) : place; };
  for (int64_t oy = rows.begin; oy < rows.end; ++oy) {
    const S* values = at<S>(y, n, c, oy, 0);
    const uint8_t* taps = at<uint8_t>(switches, n, c, oy, 0);
    int64_t corner = offsets.corner(pool, oy, 0);
    if (last)
      for (int64_t ox = 0; ox < width; ++ox, corner += step)
        plane[where(corner + offsets.tap[taps[ox * switch_column]])] = to_compute(values[ox * column]);
    else
      for (int64_t ox = 0; ox < width; ++ox, corner += step) {
        T& place = plane[where(corner + offsets.tap[taps[ox * switch_column]])];
        place = added(place, T(to_compute(values[ox * column])));
      }
  }
}

template <class S>
void unpool_planes(const View& y, const View& switches, const View& out, const Window& pool, bool relu, bool last,
                   int64_t begin, int64_t end) {
  typedef typename Compute<S>::type T;
  const bool direct = sizeof(S) == sizeof(T) && out.stride[3] == 1 && out.stride[2] == out.w();
  const int64_t places = out.h() * out.w();
  const TapOffsets offsets(pool, out.h(), out.w(), out.w(), 1);
  const Range within = offsets.rows_within(pool, y);
  T* scratch = direct ? nullptr : static_cast<T*>(thread_scratch(0, places * int64_t(sizeof(T))));
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / out.c(), c = index % out.c();
    T* plane = direct ? reinterpret_cast<T*>(at_mut<S>(out, n, c, 0, 0)) : scratch;
    std::memset(plane, 0, size_t(places) * sizeof(T));
    scatter_rows<true, S>(y, switches, pool, offsets, {0, within.begin}, n, c, last, plane);
    scatter_rows<false, S>(y, switches, pool, offsets, within, n, c, last, plane);
    scatter_rows<true, S>(y, switches, pool, offsets, {within.end, y.h()}, n, c, last, plane);
    if (relu)  // after the sum: what overlapping windows add up to is rectified, not each of them
      for (int64_t i = 0; i < places; ++i) plane[i] = relu_one(plane[i]);
    if (!direct)
      for (int64_t place_y = 0; place_y < out.h(); ++place_y) {
        S* p = at_mut<S>(out, n, c, place_y, 0);
        const T* q = plane + place_y * out.w();
        for (int64_t place_x = 0; place_x < out.w(); ++place_x) from_compute(q[place_x], p + place_x * out.stride[3]);
      }
  }
}

// Whether a later window, in raster order, names the same place for this channel.
inline bool overwritten(const View& switches, const Window& pool, int64_t n, int64_t c, int64_t oy, int64_t ox,
                        int64_t s) {
  const int64_t place_y = oy * pool.stride[0] - pool.padding[0] + (s / pool.kernel[1]) * pool.dilation[0];
  const int64_t place_x = ox * pool.stride[1] - pool.padding[1] + (s % pool.kernel[1]) * pool.dilation[1];
  bool found = false;
  windows_at(pool, 0, place_y, switches.h(), [&](int64_t later_y, int64_t ky) {
    if (later_y < oy) return;
    windows_at(pool, 1, place_x, switches.w(), [&](int64_t later_x, int64_t kx) {
      if (later_y == oy && later_x <= ox) return;
      found |= *at<uint8_t>(switches, n, c, later_y, later_x) == ky * pool.kernel[1] + kx;
    });
  });
  return found;
}

// One row of windows at a time along the contiguous axis, channels or columns.
template <class S>
void gather_rows(const View& x, const View& switches, const View& out, const Window& pool, bool last, bool by_channel,
                 int64_t begin, int64_t end) {
  const int64_t outer = by_channel ? out.h() : out.c();
  const TapOffsets offsets(pool, x.h(), x.w(), x.stride[2], x.stride[3]);
  const Range within = offsets.rows_within(pool, out);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t n = index / outer, first = index % outer;
    if (by_channel) {
      const bool free = first >= within.begin && first < within.end;
      for (int64_t ox = 0; ox < out.w(); ++ox) {
        const uint8_t* taps = at<uint8_t>(switches, n, 0, first, ox);
        const S* map = at<S>(x, n, 0, 0, 0);
        const int64_t corner = offsets.corner(pool, first, ox);
        S* p = at_mut<S>(out, n, 0, first, ox);
        if (free)
          for (int64_t c = 0; c < out.c(); ++c) p[c] = map[corner + offsets.tap[taps[c]] + c];
        else
          for (int64_t c = 0; c < out.c(); ++c) p[c] = map[offsets.within(corner + offsets.tap[taps[c]]) + c];
      }
    } else {
      const int64_t column = out.stride[3], switch_column = switches.stride[3], step = pool.stride[1] * x.stride[3];
      for (int64_t oy = 0; oy < out.h(); ++oy) {
        const uint8_t* taps = at<uint8_t>(switches, n, first, oy, 0);
        const S* map = at<S>(x, n, first, 0, 0);
        int64_t corner = offsets.corner(pool, oy, 0);
        S* p = at_mut<S>(out, n, first, oy, 0);
        if (oy >= within.begin && oy < within.end)
          for (int64_t ox = 0; ox < out.w(); ++ox, corner += step)
            p[ox * column] = map[corner + offsets.tap[taps[ox * switch_column]]];
        else
          for (int64_t ox = 0; ox < out.w(); ++ox, corner += step)
            p[ox * column] = map[offsets.within(corner + offsets.tap[taps[ox * switch_column]])];
      }
    }
    if (last) {
      const int64_t c0 = by_channel ? 0 : first, c1 = by_channel ? out.c() : first + 1;
      const int64_t oy0 = by_channel ? first : 0, oy1 = by_channel ? first + 1 : out.h();
      for (int64_t oy = oy0; oy < oy1; ++oy)
        for (int64_t ox = 0; ox < out.w(); ++ox)
          for (int64_t c = c0; c < c1; ++c)
            if (overwritten(switches, pool, n, c, oy, ox, *at<uint8_t>(switches, n, c, oy, ox)))
              *at_mut<S>(out, n, c, oy, ox) = S{};
    }
  }
}

}  // namespace

int64_t unpool_relu2d(const View& y, const View& switches, const View& out, const Window& pool, bool relu,
                      Overlap overlap, int threads) {
  if (out.numel() == 0) return no_bad_switch;
  const int64_t bad = find_bad_switch(switches, pool, out.h(), out.w(), threads);
  if (bad != no_bad_switch) return bad;
  const bool last = overlap == Overlap::last;
  for_float_type(y.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    if (channels_contiguous(y) && channels_contiguous(switches) && channels_contiguous(out)) {
      parallel_for(out.n() * out.h(), 16384 / (out.w() * out.c() + 1), threads, [&](int64_t begin, int64_t end) {
        unpool_rows_channels_last<S>(y, switches, out, pool, relu, last, begin, end);
      });
    } else {
      parallel_for(out.n() * out.c(), 16384 / (out.h() * out.w() + 1), threads, [&](int64_t begin, int64_t end) {
        unpool_planes<S>(y, switches, out, pool, relu, last, begin, end);
      });
    }
  });
  return no_bad_switch;
}

int64_t pool_gather2d(const View& x, const View& switches, const View& out, const Window& pool, Overlap overlap,
                      int threads) {
  if (out.numel() == 0) return no_bad_switch;
  const int64_t bad = find_bad_switch(switches, pool, x.h(), x.w(), threads);
  if (bad != no_bad_switch) return bad;
  const bool by_channel = channels_contiguous(x) && channels_contiguous(switches) && channels_contiguous(out);
  const int64_t outer = by_channel ? out.h() : out.c();
  for_float_type(x.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    parallel_for(out.n() * outer, 16384 / (out.numel() / (out.n() * outer) + 1), threads,
                 [&](int64_t begin, int64_t end) {
                   gather_rows<S>(x, switches, out, pool, overlap == Overlap::last, by_channel, begin, end);
                 });
  });
  return no_bad_switch;
}

}  // namespace ZF_ISA
}  // namespace zf
