// CPU kernel of lrn_delta: one pass, a pixel's channels at a time. The contract is in the header.
#include "lrn_delta.h"

#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

// s[i]^-beta, in place. The exponents in use are roots, which the processor has; this file is compiled without errno
// for them, so that they run on vectors.
template <class T>
void inverse_power(T* s, int64_t count, double beta) {
  if (beta == 0.75)
    for (int64_t i = 0; i < count; ++i) {
      const T root = std::sqrt(s[i]);
      s[i] = 1 / (root * std::sqrt(root));
    }
  else if (beta == 0.5)
    for (int64_t i = 0; i < count; ++i) s[i] = 1 / std::sqrt(s[i]);
  else if (beta == 1)
    for (int64_t i = 0; i < count; ++i) s[i] = 1 / s[i];
  else
    for (int64_t i = 0; i < count; ++i) s[i] = std::pow(s[i], T(-beta));
}

// The channels that a sum takes before and after its own: a window may be wider than the map has channels.
struct Span {
  int64_t before, after;
  Span(const Lrn& lrn, int64_t channels)
      : before(std::min(lrn.size / 2, channels)), after(std::min((lrn.size - 1) / 2, channels)) {}
};

template <class T>
void normalise_patch(const Change& change, const Lrn& lrn, int64_t b, char* memory) {
  const int64_t channels = change.delta.c();
  const Span span(lrn, channels);
  T* const value = reinterpret_cast<T*>(memory);
  T* const square = value + channels;  // with zeros for the channels before the first and after the last
  T* const scale = square + channels + span.before + span.after;
  std::memset(square, 0, size_t(channels + span.before + span.after) * sizeof(T));
  const int64_t* origin = change.origin + 2 * b;
  for (int64_t py = 0; py < change.out.h(); ++py)
    for (int64_t px = 0; px < change.out.w(); ++px) {
      const int64_t y = origin[0] + py, x = origin[1] + px;
      const T* clean = at<T>(change.before, change.image[b], 0, y, x);
      const T* after = at<T>(change.after, change.image[b], 0, y, x);
      const T* delta = at<T>(change.delta, b, 0, py, px);
      T* out = at_mut<T>(change.out, b, 0, py, px);
      for (int64_t c = 0; c < channels; ++c) {
        value[c] = clean[c] + delta[c];
        square[span.before + c] = value[c] * value[c];
      }
      for (int64_t c = 0; c < channels; ++c) scale[c] = 0;
      for (int64_t i = 0; i < span.before + span.after + 1; ++i)
        for (int64_t c = 0; c < channels; ++c) scale[c] += square[c + i];
      for (int64_t c = 0; c < channels; ++c) scale[c] = T(lrn.k) + T(lrn.alpha / double(lrn.size)) * scale[c];
      inverse_power(scale, channels, lrn.beta);
      for (int64_t c = 0; c < channels; ++c) out[c] = value[c] * scale[c] - after[c];
    }
}

}  // namespace

void lrn_delta(const Change& change, const Lrn& lrn, int threads) {
  change.check();
  const Span span(lrn, change.delta.c());
  const int64_t bytes = (3 * change.delta.c() + span.before + span.after) * 8;
  parallel_for(change.delta.n(), 1, threads, [&](int64_t begin, int64_t end) {
    char* memory = static_cast<char*>(thread_scratch(0, bytes));
    for (int64_t b = begin; b < end; ++b)
      if (change.delta.dtype == DType::f64)
        normalise_patch<double>(change, lrn, b, memory);
      else
        normalise_patch<float>(change, lrn, b, memory);
  });
}

}  // namespace ZF_ISA
}  // namespace zf
