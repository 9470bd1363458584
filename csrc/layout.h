// Copies between a map of any strides and one with contiguous channels, for kernels whose vectors run over channels.
#pragma once
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

constexpr int64_t layout_tile = 16;  // 16 x 16 elements: about a cache line of either side

// packed[h][w][c - c0] = source[n, c, h, w] for c in [c0, c1), converted to D.
template <class S, class D, class Convert>
inline void pack_channels(const View& source, int64_t n, int64_t c0, int64_t c1, D* packed, const Convert& convert) {
  const int64_t channels = c1 - c0, width = source.w(), step = source.stride[3];
  for (int64_t h = 0; h < source.h(); ++h)
    for (int64_t w0 = 0; w0 < width; w0 += layout_tile) {
      const int64_t w1 = w0 + layout_tile < width ? w0 + layout_tile : width;
      for (int64_t c = 0; c < channels; ++c) {
        const S* p = at<S>(source, n, c0 + c, h, 0);
        D* q = packed + h * width * channels + c;
        for (int64_t w = w0; w < w1; ++w) q[w * channels] = convert(p[w * step]);
      }
    }
}

// target[n, c, h, w] = packed[h][w][c - c0] for c in [c0, c1), stored by `store(value, address)`.
template <class S, class D, class Store>
inline void unpack_channels(const D* packed, const View& target, int64_t n, int64_t c0, int64_t c1,
                            const Store& store) {
  const int64_t channels = c1 - c0, width = target.w(), step = target.stride[3];
  for (int64_t h = 0; h < target.h(); ++h)
    for (int64_t w0 = 0; w0 < width; w0 += layout_tile) {
      const int64_t w1 = w0 + layout_tile < width ? w0 + layout_tile : width;
      for (int64_t c = 0; c < channels; ++c) {
        S* p = at_mut<S>(target, n, c0 + c, h, 0);
        const D* q = packed + h * width * channels + c;
        for (int64_t w = w0; w < w1; ++w) store(q[w * channels], p + w * step);
      }
    }
}

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
