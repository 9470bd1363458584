// CPU kernel of pool_delta. The contract is in the header.
//
// Least traffic: the clean inputs under the windows, which the patches of a picture share and the caches keep, the
// change in and the change out. Vectors run over channels; each window's maximum stays in registers.
#include "pool_delta.h"

#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

template <class T>
struct Pool {
  typedef typename Vec<T>::type V;
  static constexpr int lanes = Vec<T>::lanes;
  static constexpr int64_t most_taps = 256;

  const Change& change;
  const Window& pool;

  void operator()(int64_t b) const {
    const int64_t image = change.image[b];
    const int64_t *origin = change.origin + 2 * b, *corner = change.out_origin + 2 * b;
    const int64_t channels = change.delta.c();
    const T *x[most_taps], *d[most_taps];  // of each tap; d null outside the patch
    for (int64_t py = 0; py < change.out.h(); ++py)
      for (int64_t px = 0; px < change.out.w(); ++px) {
        const int64_t oy = corner[0] + py, ox = corner[1] + px;
        const Range rows = taps_inside(pool, 0, oy, change.before.h()), columns = taps_inside(pool, 1, ox, change.before.w());
        int64_t taps = 0;
        for (int64_t i = rows.begin; i < rows.end; ++i)
          for (int64_t j = columns.begin; j < columns.end; ++j) {
            const int64_t iy = oy * pool.stride[0] - pool.padding[0] + i * pool.dilation[0];
            const int64_t ix = ox * pool.stride[1] - pool.padding[1] + j * pool.dilation[1];
            const int64_t dy = iy - origin[0], dx = ix - origin[1];
            const bool inside = dy >= 0 && dy < change.delta.h() && dx >= 0 && dx < change.delta.w();
            x[taps] = at<T>(change.before, image, 0, iy, ix);
            d[taps++] = inside ? at<T>(change.delta, b, 0, dy, dx) : nullptr;
          }
        const T* y = at<T>(change.after, image, 0, oy, ox);
        T* out = at_mut<T>(change.out, b, 0, py, px);
        int64_t c = 0;
        for (; c + lanes <= channels; c += lanes) {
          V most = splat(-std::numeric_limits<T>::infinity());
          for (int64_t t = 0; t < taps; ++t) {
            V v = load_vector(x[t] + c);
            if (d[t]) v += load_vector(d[t] + c);
            most = v > most || v != v ? v : most;
          }
          store_vector(out + c, V(most - load_vector(y + c)));
        }
        for (; c < channels; ++c) {
          T most = -std::numeric_limits<T>::infinity();
          for (int64_t t = 0; t < taps; ++t) {
            const T v = d[t] ? x[t][c] + d[t][c] : x[t][c];
            most = v > most || v != v ? v : most;
          }
          out[c] = most - y[c];
        }
      }
  }
};

}  // namespace

void pool_delta(const Change& change, const Window& pool, int threads) {
  change.check();
  parallel_for(change.delta.n(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (change.delta.dtype == DType::f64)
        Pool<double>{change, pool}(b);
      else
        Pool<float>{change, pool}(b);
  });
}

}  // namespace ZF_ISA
}  // namespace zf
