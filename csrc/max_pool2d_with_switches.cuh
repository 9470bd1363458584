// The body of the CUDA kernel of max_pool2d_with_switches, and the choice of its variant.
// The contract is in the header.
//
// Least traffic: the map in, one value and one byte out for each window. For ZFNet's pool1 (3x3/2 on 96 maps
// of 110x110) at batch 32 in fp32 that is 149 + 37 + 9 MB; against it 84 M compares, so the kernel is bound
// by memory.
//
// A thread makes one output of several channels, in accesses of 16 bytes where they are neighbours in memory.
// A whole window of known size loads all of its taps before it compares the first. The taps that windows
// share are met in the caches.
#pragma once
#include "tiling.cuh"

namespace zf {
namespace gpu {

// S: the values' storage type; I: the index type; W: the window; L: the channels of a thread.
template <class S, class I, class W, class L>
class MaxPool {
 public:
  MaxPool(const View& x, const View& y, const View& switches, const Window& pool, int64_t first,
          int64_t images)
      : x_(x, first),
        y_(y, first),
        switches_(switches, first),
        height_(I(x.h())),
        width_(I(x.w())),
        window_(pool),
        tiling_(images, y.c(), V, y.h(), y.w(), channels_fastest(y), (L::packed ? V : 1) * int(sizeof(S))) {}

  int64_t blocks() const { return tiling_.blocks(); }

  ZF_HD void operator()(uint32_t block, uint32_t thread) const {
    Place<I> p;
    if (!tiling_.place(block, thread, &p)) return;
    const I top = p.y * window_.stride(0) - window_.padding(0),
            left = p.x * window_.stride(1) - window_.padding(1);
    T best[V];
    int tap[V];
    constexpr int kernel = W::known_kernel;
    const bool whole = top >= 0 && left >= 0 && top + kernel <= height_ && left + kernel <= width_;
    if (kernel > 0 && whole)
      pool_whole(p.n, p.c, top, left, best, tap);
    else
      pool_clipped(p.n, p.c, top, left, best, tap);
    Vec<S, V> values;
    Vec<uint8_t, V> bytes;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values.lane[i] = narrow<S>(best[i]);
      bytes.lane[i] = uint8_t(tap[i]);
    }
    L::store(y_.at(p.n, p.c, p.y, p.x), y_.c, values);
    L::store(switches_.at(p.n, p.c, p.y, p.x), switches_.c, bytes);
  }

 private:
  using T = typename Compute<S>::type;
  static constexpr int V = L::count;

  // The first of equal numbers stands, and the last NaN.
  static ZF_HD bool replaces(T v, T best) { return v > best || v != v; }

  // A window of a size that the compiler knows, every tap in the map.
  ZF_HD void pool_whole(I n, I c, I top, I left, T* best, int* tap) const {
    constexpr int kernel = W::known_kernel, count = kernel > 0 ? kernel * kernel : 1;
    Vec<S, V> taps[count];
#pragma unroll
    for (int t = 0; t < count; ++t)
      if constexpr (kernel > 0) taps[t] = L::load(x_.at(n, c, top + t / kernel, left + t % kernel), x_.c);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      best[i] = widen(taps[0].lane[i]);
      tap[i] = 0;
#pragma unroll
      for (int t = 1; t < count; ++t) {
        const T v = widen(taps[t].lane[i]);
        if (replaces(v, best[i])) best[i] = v, tap[i] = t;
      }
    }
  }

  // Any window, clipped at the map's edge.
  ZF_HD void pool_clipped(I n, I c, I top, I left, T* best, int* tap) const {
    const Range<I> rows = taps_inside(window_, 0, top, height_),
                   columns = taps_inside(window_, 1, left, width_);
    const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
    const int first = empty ? 0 : int(rows.begin * window_.kernel(1) + columns.begin);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      best[i] = T(-HUGE_VALF);
      tap[i] = first;
    }
    for (I ky = rows.begin; ky < rows.end; ++ky)
      for (I kx = columns.begin; kx < columns.end; ++kx) {
        const I row = top + ky * window_.dilation(0), column = left + kx * window_.dilation(1);
        const Vec<S, V> values = L::load(x_.at(n, c, row, column), x_.c);
        const int id = int(ky * window_.kernel(1) + kx);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const T v = widen(values.lane[i]);
          if (replaces(v, best[i])) best[i] = v, tap[i] = id;
        }
      }
  }

  Strided<const S, I> x_;
  Strided<S, I> y_;
  Strided<uint8_t, I> switches_;
  I height_, width_;  // of x
  W window_;
  Tiling<I> tiling_;
};

// Calls launch(body) for each launch that the op takes; a launch runs the body at every block and thread.
template <class Launch>
void max_pool2d_with_switches(const View& x, const View& y, const View& switches, const Window& pool,
                              const Launch& launch) {
  if (y.numel() == 0) return;
  for_float_storage(x.dtype, [&](auto storage) {
    using S = TypeIn<decltype(storage)>;
    constexpr int lanes = vector_bytes / int(sizeof(S));
    const bool vectors = vectors_over_channels(x, lanes, sizeof(S)) &&
                         vectors_over_channels(y, lanes, sizeof(S)) &&
                         vectors_over_channels(switches, lanes, 1);
    for_slices(pool, x, y, {&x, &y, &switches}, [&](auto index, int64_t first, int64_t images) {
      using I = TypeIn<decltype(index)>;
      for_variant<I, Packed<lanes>>(pool, vectors, y.c(), [&](auto window, auto channels) {
        using W = TypeIn<decltype(window)>;
        using L = TypeIn<decltype(channels)>;
        launch(MaxPool<S, I, W, L>(x, y, switches, pool, first, images));
      });
    });
  });
}

}  // namespace gpu
}  // namespace zf
