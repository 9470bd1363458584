// CPU kernel of strongest: one pass over each map, bound by memory; a second, short one finds the value again.
#include "strongest.h"

#include <limits>

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

// The largest of `count` values, NaN passed over; minus infinity where there is none.
template <class S>
typename Compute<S>::type largest(const S* p, int64_t count, int64_t stride) {
  typedef typename Compute<S>::type T;
  typedef typename Vec<T>::type V;
  constexpr int lanes = Vec<T>::lanes, chains = 4;  // as many maxima at once as hide the latency of one
  T most = -std::numeric_limits<T>::infinity();
  int64_t i = 0;
  if (stride == 1) {
    V best[chains];
    for (V& b : best) b = splat(most);
    for (; i + chains * lanes <= count; i += chains * lanes)
      for (int k = 0; k < chains; ++k) {
        const V v = load_storage(p + i + k * lanes);
        best[k] = v > best[k] ? v : best[k];
      }
    for (const V& b : best)
      for (int lane = 0; lane < lanes; ++lane) most = b[lane] > most ? b[lane] : most;
  }
  for (; i < count; ++i) {
    const T v = to_compute(p[i * stride]);
    most = v > most ? v : most;
  }
  return most;
}

template <class S>
int64_t find(const View& maps, int64_t n, int64_t c) {
  typedef typename Compute<S>::type T;
  const bool flat = maps.stride[2] == maps.w() * maps.stride[3];
  const int64_t rows = flat ? 1 : maps.h(), columns = flat ? maps.h() * maps.w() : maps.w();
  T most = -std::numeric_limits<T>::infinity();
  int64_t row = 0;  // the first that holds it
  for (int64_t y = 0; y < rows; ++y) {
    const T v = largest(at<S>(maps, n, c, y, 0), columns, maps.stride[3]);
    if (v > most) most = v, row = y;
  }
  for (int64_t y = row; y < rows; ++y) {  // of nothing but NaN and minus infinity the first of the latter
    const S* p = at<S>(maps, n, c, y, 0);
    for (int64_t x = 0; x < columns; ++x)
      if (to_compute(p[x * maps.stride[3]]) == most) return y * columns + x;
  }
  return 0;
}

}  // namespace

void strongest(const View& maps, const int64_t* units, int64_t count, int64_t* index, int threads) {
  for_float_type(maps.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    parallel_for(maps.n() * count, 32768 / (maps.h() * maps.w() + 1), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) index[i] = find<S>(maps, i / count, units[i % count]);
    });
  });
}

}  // namespace ZF_ISA
}  // namespace zf
