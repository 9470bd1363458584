// CPU kernel of relu_delta: one pass, bound by memory. The contract is in the header.
#include "relu_delta.h"

#include "dispatch.h"
#include "parallel.h"
#include "rectify.h"

namespace zf {
namespace ZF_ISA {
namespace {

template <class T>
void rectify_patch(const Change& change, const Rectifier& rectifier, int64_t b) {
  const int64_t* origin = change.origin + 2 * b;
  for (int64_t y = 0; y < change.out.h(); ++y)
    for (int64_t x = 0; x < change.out.w(); ++x)
      rectify_change(rectifier, at<T>(change.before, change.image[b], 0, origin[0] + y, origin[1] + x),
                     at<T>(change.delta, b, 0, y, x), at_mut<T>(change.out, b, 0, y, x), change.out.c());
}

}  // namespace

void relu_delta(const Change& change, const Rectifier& rectifier, int threads) {
  change.check();
  parallel_for(change.delta.n(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (change.delta.dtype == DType::f64)
        rectify_patch<double>(change, rectifier, b);
      else
        rectify_patch<float>(change, rectifier, b);
  });
}

}  // namespace ZF_ISA
}  // namespace zf
