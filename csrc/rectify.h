// A rectifier on numbers and on vectors, for the CPU kernels.
#pragma once
#include "change.h"
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

template <class T>
inline T rectified(const Rectifier& f, T v) {
  const T low = v < 0 ? (f.slope == 0 ? T(0) : v * T(f.slope)) : v;  // 0 and not slope * v, which is NaN at -inf
  return low > T(f.upper) ? T(f.upper) : low;
}

template <class T>
inline typename Vec<T>::type rectified_vector(const Rectifier& f, typename Vec<T>::type v) {
  typedef typename Vec<T>::type V;
  const V negative = f.slope == 0 ? V{} : v * T(f.slope);
  const V low = v < V{} ? negative : v, top = splat(T(f.upper));
  return low > top ? top : low;
}

// out[c] = f(z[c] + d[c]) - f(z[c]) for c in [0, count).
template <class T>
inline void rectify_change(const Rectifier& f, const T* z, const T* d, T* out, int64_t count) {
  typedef typename Vec<T>::type V;
  constexpr int lanes = Vec<T>::lanes;
  int64_t c = 0;
  for (; c + lanes <= count; c += lanes) {
    const V before = load_vector(z + c);
    store_vector(out + c, V(rectified_vector<T>(f, before + load_vector(d + c)) - rectified_vector<T>(f, before)));
  }
  for (; c < count; ++c) out[c] = rectified<T>(f, z[c] + d[c]) - rectified<T>(f, z[c]);
}

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
