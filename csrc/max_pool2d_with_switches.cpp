// CPU kernel of max_pool2d_with_switches. The contract is in the header.
//
// Least work per output of a k x k window: k*k compares and blends; least traffic: the input once, one value and one
// byte out. For ZFNet's pool1 at batch 32 that is 149 + 37 + 9 MB against 84 M compares: bound by memory.
#include "max_pool2d_with_switches.h"

#include <cstdlib>

#include "dispatch.h"
#include "layout.h"
#include "parallel.h"
#include "simd.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

// v replaces the running maximum m: greater, or NaN (so the last NaN of a window stands, as in torch).
template <class V>
inline auto replaces(V v, V m) {
  return (v > m) | (v != v);
}
inline bool replaces(float v, float m) { return v > m || v != v; }
inline bool replaces(double v, double m) { return v > m || v != v; }

template <class T>
inline T minus_infinity() {
  return -T(__builtin_inff());
}

// ---- Channels contiguous: vectors over channels, any window ----------------------------------------------------

struct Tap {
  int64_t offset;  // in elements, from the window's corner
  int32_t id;      // ky*kw + kx
};

template <class M>
inline bool any_lane(M mask) {
#if ZF_VECTOR_BYTES == 64
  return _mm512_movepi8_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif ZF_VECTOR_BYTES == 32
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
  int64_t halves[2];
  std::memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}

// One vector of outputs where no tap is NaN: one compare a tap. The sum of the taps, which runs on units that the
// compares leave idle, is NaN wherever a tap is; then (or where infinities cancelled) the result is void, and false.
// Count is the number of taps where it is known when this is compiled, else 0.
template <int Count, class S, class V, class M>
inline bool pool_numbers(const S* p, const Tap* taps, int count, V& best, M& tap) {
  typedef typename Vec<typename Compute<S>::type>::lane Lane;
  const int taps_here = Count ? Count : count;
  best = load_storage(p + taps[0].offset);
  tap = M{} + Lane(taps[0].id);
  V sum = best;
#pragma GCC unroll 9
  for (int t = 1; t < taps_here; ++t) {
    const V v = load_storage(p + taps[t].offset);
    sum += v;
    const auto take = v > best;
    best = take ? v : best;
    tap = take ? M{} + Lane(taps[t].id) : tap;
  }
  return !any_lane(M(sum != sum));
}

template <class S, class V, class M>
inline void pool_any(const S* p, const Tap* taps, int count, V& best, M& tap) {
  typedef typename Vec<typename Compute<S>::type>::lane Lane;
  best = load_storage(p + taps[0].offset);
  tap = M{} + Lane(taps[0].id);
  for (int t = 1; t < count; ++t) {
    const V v = load_storage(p + taps[t].offset);
    const auto take = replaces(v, best);
    best = take ? v : best;
    tap = take ? M{} + Lane(taps[t].id) : tap;
  }
}

template <int Count, class S>
void pool_pixel(const S* corner, const Tap* taps, int count, int64_t channels, S* y, uint8_t* switches) {
  typedef typename Compute<S>::type T;
  constexpr int lanes = Vec<T>::lanes;
  int64_t c = 0;
  while (c + lanes <= channels) {
    typename Vec<T>::type best;
    typename Vec<T>::mask tap;
    if (!pool_numbers<Count>(corner + c, taps, count, best, tap)) pool_any(corner + c, taps, count, best, tap);
    store_storage(y + c, best);
    store_bytes<T>(switches + c, tap);
    if (c + lanes == channels) return;
    // The last vector overlaps the one before it rather than leaving a scalar tail.
    c = c + 2 * lanes <= channels ? c + lanes : channels - lanes;
  }
  for (; c < channels; ++c) {
    T best = to_compute(corner[taps[0].offset + c]);
    int32_t tap = taps[0].id;
    for (int t = 1; t < count; ++t) {
      const T v = to_compute(corner[taps[t].offset + c]);
      if (replaces(v, best)) best = v, tap = taps[t].id;
    }
    from_compute(best, y + c);
    switches[c] = uint8_t(tap);
  }
}

template <class S>
void pool_rows_channels_last(const View& x, const View& y, const View& switches, const Window& pool, int64_t begin,
                             int64_t end) {
  const Range inside_x = windows_inside(pool, 1, y.w(), x.w());
  Tap taps[256];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / y.h(), oy = row % y.h();
    const Range ky = taps_inside(pool, 0, oy, x.h());
    int count = 0;
    bool whole_row = false;  // taps[] holds every tap of the row's windows that lie inside in x
    for (int64_t ox = 0; ox < y.w(); ++ox) {
      const bool inside = ox >= inside_x.begin && ox < inside_x.end;
      if (!inside || !whole_row) {
        const Range kx = taps_inside(pool, 1, ox, x.w());
        count = 0;
        for (int64_t i = ky.begin; i < ky.end; ++i)
          for (int64_t j = kx.begin; j < kx.end; ++j)
            taps[count++] = {i * pool.dilation[0] * x.stride[2] + j * pool.dilation[1] * x.stride[3],
                             int32_t(i * pool.kernel[1] + j)};
        whole_row = inside;
      }
      S* out = at_mut<S>(y, n, 0, oy, ox);
      uint8_t* out_switches = at_mut<uint8_t>(switches, n, 0, oy, ox);
      if (count == 0) {  // a dilated window may straddle the whole map: nothing to take
        for (int64_t c = 0; c < y.c(); ++c) {
          from_compute(minus_infinity<typename Compute<S>::type>(), out + c);
          out_switches[c] = 0;
        }
        continue;
      }
      const S* corner =
          at<S>(x, n, 0, oy * pool.stride[0] - pool.padding[0], ox * pool.stride[1] - pool.padding[1]);
      if (count == 9)
        pool_pixel<9>(corner, taps, count, y.c(), out, out_switches);
      else if (count == 4)
        pool_pixel<4>(corner, taps, count, y.c(), out, out_switches);
      else
        pool_pixel<0>(corner, taps, count, y.c(), out, out_switches);
    }
  }
}

// ---- Rows contiguous: vectors over output columns, for column strides 1 and 2 -----------------------------------

#if defined(__clang__)
#define ZF_SHUFFLE(M, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ZF_SHUFFLE(M, a, b, ...) __builtin_shuffle(a, b, M{__VA_ARGS__})
#endif

// Every second element of p[0 .. 2*lanes-2], in an order that `in_order` mends: shuffles inside 128-bit lanes are
// cheap, so the taps stay in that order and only the results are put right. b is loaded one element early, so
// that nothing past the last element is read.
inline Vec<float>::type every_second(const float* p) {
  typedef Vec<float>::mask M;
  const auto a = load_vector(p), b = load_vector(p + Vec<float>::lanes - 1);
#if ZF_VECTOR_BYTES == 64
  return ZF_SHUFFLE(M, a, b, 0, 2, 17, 19, 4, 6, 21, 23, 8, 10, 25, 27, 12, 14, 29, 31);
#elif ZF_VECTOR_BYTES == 32
  return ZF_SHUFFLE(M, a, b, 0, 2, 9, 11, 4, 6, 13, 15);
#else
  return ZF_SHUFFLE(M, a, b, 0, 2, 5, 7);
#endif
}
inline Vec<double>::type every_second(const double* p) {
  typedef Vec<double>::mask M;
  const auto a = load_vector(p), b = load_vector(p + Vec<double>::lanes - 1);
#if ZF_VECTOR_BYTES == 64
  return ZF_SHUFFLE(M, a, b, 0, 9, 2, 11, 4, 13, 6, 15);
#elif ZF_VECTOR_BYTES == 32
  return ZF_SHUFFLE(M, a, b, 0, 5, 2, 7);
#else
  return ZF_SHUFFLE(M, a, b, 0, 3);
#endif
}
template <class V>
inline V in_order_32(V v) {
#if ZF_VECTOR_BYTES == 64
  return ZF_SHUFFLE(Vec<float>::mask, v, v, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
#elif ZF_VECTOR_BYTES == 32
  return ZF_SHUFFLE(Vec<float>::mask, v, v, 0, 1, 4, 5, 2, 3, 6, 7);
#else
  return v;
#endif
}
template <class V>
inline V in_order_64(V v) {
#if ZF_VECTOR_BYTES == 64
  return ZF_SHUFFLE(Vec<double>::mask, v, v, 0, 2, 4, 6, 1, 3, 5, 7);
#elif ZF_VECTOR_BYTES == 32
  return ZF_SHUFFLE(Vec<double>::mask, v, v, 0, 2, 1, 3);
#else
  return v;
#endif
}
inline Vec<float>::type in_order(Vec<float>::type v) { return in_order_32(v); }
inline Vec<float>::mask in_order(Vec<float>::mask v) { return in_order_32(v); }
inline Vec<double>::type in_order(Vec<double>::type v) { return in_order_64(v); }
inline Vec<double>::mask in_order(Vec<double>::mask v) { return in_order_64(v); }

// One vector of outputs; rows[ky] points at column 0 of tap row ky, `column` is the first window's corner. Width is the
// window's number of columns where it is known when this is compiled, else 0.
template <int Stride, int Width, class T>
inline void pool_columns(const T* const* rows, Range ky, const Window& pool, int64_t column,
                         typename Vec<T>::type& best, typename Vec<T>::mask& tap) {
  typedef typename Vec<T>::mask M;
  const auto read = [](const T* p) { return Stride == 1 ? load_vector(p) : every_second(p); };
  const int64_t width = Width ? Width : pool.kernel[1], step = pool.dilation[1];
  M id = M{} + typename Vec<T>::lane(ky.begin * width);
  best = read(rows[ky.begin] + column);
  tap = id;
  for (int64_t i = ky.begin; i < ky.end; ++i) {
    const T* p = rows[i] + column;
#pragma GCC unroll 3
    for (int64_t j = 0; j < width; ++j, p += step) {
      const typename Vec<T>::type v = read(p);
      const auto take = replaces(v, best);  // the first tap again replaces nothing but a NaN, by itself
      best = take ? v : best;
      tap = take ? id : tap;
      id += 1;
    }
  }
  if (Stride == 2) {
    best = in_order(best);
    tap = in_order(tap);
  }
}

template <class T>
bool rows_fill_vectors(const View& x, const View& y, const Window& pool) {
  const Range inside_x = windows_inside(pool, 1, y.w(), x.w());
  return (pool.stride[1] == 1 || pool.stride[1] == 2) && inside_x.end - inside_x.begin >= Vec<T>::lanes;
}

template <class S, class T>
void pool_plane(const View& x, const View& y, const View& switches, const Window& pool, int64_t n, int64_t c,
                T* row_scratch) {
  constexpr int lanes = Vec<T>::lanes;
  const bool direct = sizeof(S) == sizeof(T) && x.stride[3] == 1;
  const Range inside_x = windows_inside(pool, 1, y.w(), x.w());
  const bool vectors = rows_fill_vectors<T>(x, y, pool);
  const T* rows[256];
  for (int64_t oy = 0; oy < y.h(); ++oy) {
    const Range ky = taps_inside(pool, 0, oy, x.h());
    for (int64_t i = ky.begin; i < ky.end; ++i) {
      const int64_t row = oy * pool.stride[0] - pool.padding[0] + i * pool.dilation[0];
      const S* source = at<S>(x, n, c, row, 0);
      if (direct) {
        rows[i] = reinterpret_cast<const T*>(source);
      } else {
        T* packed = row_scratch + i * x.w();
        for (int64_t column = 0; column < x.w(); ++column) packed[column] = to_compute(source[column * x.stride[3]]);
        rows[i] = packed;
      }
    }
    S* out = at_mut<S>(y, n, c, oy, 0);
    uint8_t* out_switches = at_mut<uint8_t>(switches, n, c, oy, 0);
    const auto scalar = [&](int64_t begin, int64_t end) {
      for (int64_t ox = begin; ox < end; ++ox) {
        const Range kx = taps_inside(pool, 1, ox, x.w());
        const int64_t column = ox * pool.stride[1] - pool.padding[1];
        T best = minus_infinity<T>();
        int64_t tap = -1;
        for (int64_t i = ky.begin; i < ky.end; ++i)
          for (int64_t j = kx.begin; j < kx.end; ++j) {
            const T v = rows[i][column + j * pool.dilation[1]];
            if (tap < 0 || replaces(v, best)) best = v, tap = i * pool.kernel[1] + j;
          }
        from_compute(best, out + ox * y.stride[3]);
        out_switches[ox * switches.stride[3]] = uint8_t(tap < 0 ? 0 : tap);
      }
    };
    if (!vectors || ky.begin >= ky.end) {
      scalar(0, y.w());
      continue;
    }
    scalar(0, inside_x.begin);
    for (int64_t ox = inside_x.begin;;) {
      typename Vec<T>::type best{};
      typename Vec<T>::mask tap{};
      const int64_t column = ox * pool.stride[1] - pool.padding[1];
      if (pool.stride[1] == 1)
        pool_columns<1, 0>(rows, ky, pool, column, best, tap);
      else if (pool.kernel[1] == 3)
        pool_columns<2, 3>(rows, ky, pool, column, best, tap);
      else if (pool.kernel[1] == 2)
        pool_columns<2, 2>(rows, ky, pool, column, best, tap);
      else
        pool_columns<2, 0>(rows, ky, pool, column, best, tap);
      if (y.stride[3] == 1 && switches.stride[3] == 1) {
        store_storage(out + ox, best);
        store_bytes<T>(out_switches + ox, tap);
      } else {
        for (int lane = 0; lane < lanes; ++lane) {
          from_compute(T(best[lane]), out + (ox + lane) * y.stride[3]);
          out_switches[(ox + lane) * switches.stride[3]] = uint8_t(tap[lane]);
        }
      }
      if (ox + lanes == inside_x.end) break;
      ox = ox + 2 * lanes <= inside_x.end ? ox + lanes : inside_x.end - lanes;
    }
    scalar(inside_x.end, y.w());
  }
}

template <class S>
void pool_planes(const View& x, const View& y, const View& switches, const Window& pool, int64_t begin, int64_t end) {
  typedef typename Compute<S>::type T;
  T* row_scratch = static_cast<T*>(thread_scratch(0, pool.kernel[0] * x.w() * int64_t(sizeof(T))));
  for (int64_t plane = begin; plane < end; ++plane)
    pool_plane<S, T>(x, y, switches, pool, plane / y.c(), plane % y.c(), row_scratch);
}

// ---- Narrow maps: rows too short for vectors, so a block of channels is copied to be contiguous -----------------

constexpr int64_t narrow_channels = 32;
constexpr int64_t narrow_places = 64 * 64;  // the copy of a block stays in the second-level cache

inline View contiguous_channels(void* data, const View& like, int64_t channels) {
  View v = like;
  v.data = data;
  v.size[0] = 1;
  v.size[1] = channels;
  v.stride[0] = 0;
  v.stride[1] = 1;
  v.stride[2] = like.w() * channels;
  v.stride[3] = channels;
  return v;
}

template <class S>
void pool_narrow(const View& x, const View& y, const View& switches, const Window& pool, int64_t begin, int64_t end) {
  typedef typename Compute<S>::type T;
  const int64_t in = x.h() * x.w() * narrow_channels, out = y.h() * y.w() * narrow_channels;
  T* x_block = static_cast<T*>(thread_scratch(0, (in + out) * int64_t(sizeof(T)) + out));
  T* y_block = x_block + in;
  uint8_t* switches_block = reinterpret_cast<uint8_t*>(y_block + out);
  const int64_t blocks = ceil_div(y.c(), narrow_channels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / blocks, c0 = task % blocks * narrow_channels;
    const int64_t c1 = c0 + narrow_channels < y.c() ? c0 + narrow_channels : y.c();
    pack_channels<S>(x, n, c0, c1, x_block, [](S v) { return to_compute(v); });
    pool_rows_channels_last<T>(contiguous_channels(x_block, x, c1 - c0), contiguous_channels(y_block, y, c1 - c0),
                               contiguous_channels(switches_block, switches, c1 - c0), pool, 0, y.h());
    unpack_channels<S>(y_block, y, n, c0, c1, [](T v, S* p) { from_compute(v, p); });
    unpack_channels<uint8_t>(switches_block, switches, n, c0, c1, [](uint8_t v, uint8_t* p) { *p = v; });
  }
}

}  // namespace

void max_pool2d_with_switches(const View& x, const View& y, const View& switches, const Window& pool, int threads) {
  if (y.numel() == 0) return;
#if defined(ZF_SANITIZED)
  // Proves that a sanitizer run sees what happens in here: asked for, one byte past the end is written.
  if (std::getenv("ZFCORE_PLANT_BUG")) static_cast<uint8_t*>(switches.data)[switches.numel()] = 0;
#endif
  for_float_type(x.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    const int64_t work = y.h() * y.w() * pool.taps();
    if (channels_contiguous(x) && channels_contiguous(y) && channels_contiguous(switches)) {
      parallel_for(y.n() * y.h(), 16384 / (y.w() * y.c() * pool.taps() + 1), threads,
                   [&](int64_t begin, int64_t end) {
                     pool_rows_channels_last<S>(x, y, switches, pool, begin, end);
                   });
    } else if (!rows_fill_vectors<typename Compute<S>::type>(x, y, pool) && x.h() * x.w() <= narrow_places &&
               y.c() >= 4) {
      parallel_for(y.n() * ceil_div(y.c(), narrow_channels), 16384 / (work * narrow_channels + 1), threads,
                   [&](int64_t begin, int64_t end) { pool_narrow<S>(x, y, switches, pool, begin, end); });
    } else {
      parallel_for(y.n() * y.c(), 16384 / (work + 1), threads,
                   [&](int64_t begin, int64_t end) { pool_planes<S>(x, y, switches, pool, begin, end); });
    }
  });
}

}  // namespace ZF_ISA
}  // namespace zf
