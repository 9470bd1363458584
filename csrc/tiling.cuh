// Which block and thread does what, and where its tensors' elements are: shared by the bodies of all kernels.
//
// A block is a small box of places (n, c, y, x), one place a thread: long along the axis that is contiguous
// in memory, so that accesses coalesce, and about square in the map, so that neighbouring windows meet in the
// first-level cache.
//
// Offsets are 32-bit. A batch whose offsets pass 2^31 is launched in slices of images, and only a single
// image that passes it needs the 64-bit kernels.
#pragma once
#include <initializer_list>

#include "scalar.cuh"

namespace zf {
namespace gpu {

constexpr int log2_threads = 8;
constexpr uint32_t threads_per_block = 1u << log2_threads;

// Division of a number below 2^31 by one that is fixed for a launch: multiplies by the inverse, rounded up.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while (shift_ < 32 && (uint64_t(1) << shift_) < divisor) ++shift_;
    multiplier_ = uint32_t((((uint64_t(1) << shift_) - divisor) << 32) / divisor + 1);
  }
  ZF_HD uint32_t quotient(uint32_t n) const {
    return (uint32_t((uint64_t(n) * multiplier_) >> 32) + n) >> shift_;
  }
  ZF_HD uint32_t remainder(uint32_t n, uint32_t quotient) const { return n - quotient * divisor_; }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

template <class I>
struct Place {
  I n, c, y, x;
};

// The box of a tiling: along the fast, the middle and the slow axis, and over the images.
struct Box {
  int log2[4];

  // The box with the least traffic: places, idle ones included, with half a place of overlap on each axis of
  // the map (the windows that two boxes share). The fast axis takes between a sector (32 bytes) and a line
  // (128 bytes).
  Box(const int64_t size[4], bool channels_fast, int item_bytes) {
    const int whole = log2_ceil(size[0]), line = log2_ceil(128 / item_bytes),
              sector = log2_ceil(32 / item_bytes);
    const int most = line < whole ? line : whole, least = sector < whole ? sector : whole;
    const int overlap[4] = {channels_fast ? 0 : 1, 1, channels_fast ? 1 : 0, 0};
    double best = std::numeric_limits<double>::infinity();
    for (int fast = most; fast >= least; --fast)
      for (int middle = 0; middle <= log2_threads - fast; ++middle)
        for (int slow = 0; slow <= log2_threads - fast - middle; ++slow) {
          const int tried[4] = {fast, middle, slow, log2_threads - fast - middle - slow};
          double cost = 1;
          for (int axis = 0; axis < 4; ++axis)
            cost *= double(tiles(size[axis], tried[axis])) * ((2 << tried[axis]) + overlap[axis]);
          if (cost < best) {
            best = cost;
            for (int axis = 0; axis < 4; ++axis) log2[axis] = tried[axis];
          }
        }
  }

  static int64_t tiles(int64_t size, int log2) { return (size + (int64_t(1) << log2) - 1) >> log2; }

 private:
  static int log2_ceil(int64_t n) {
    int log2 = 0;
    while (log2 < log2_threads && (int64_t(1) << log2) < n) ++log2;
    return log2;
  }
};

// Tiles [N, C, H, W] by boxes of threads_per_block places, each of one or several channels.
template <class I>
class Tiling {
 public:
  // lanes: channels of a place. item_bytes: what a thread moves along the fast axis, channels or columns.
  Tiling(int64_t n, int64_t channels, int lanes, int64_t h, int64_t w, bool channels_fast, int item_bytes)
      : lanes_(lanes), channels_fast_(channels_fast) {
    const int64_t c = channels / lanes;
    const int64_t size[4] = {channels_fast ? c : w, channels_fast ? w : h, channels_fast ? h : c, n};
    const Box box(size, channels_fast, item_bytes);
    for (int axis = 0; axis < 4; ++axis) {
      const int64_t tiles = Box::tiles(size[axis], box.log2[axis]);
      if (blocks_ > max_blocks / tiles)
        throw std::runtime_error("zfcore: a map has more places than the blocks of a grid can hold");
      blocks_ *= tiles;
      tiles_[axis] = Divisor(uint32_t(tiles));
      size_[axis] = I(size[axis]);
      log2_[axis] = box.log2[axis];
    }
  }

  int64_t blocks() const { return blocks_; }

  // The thread's place, or false where the box reaches past the map.
  ZF_HD bool place(uint32_t block, uint32_t thread, Place<I>* p) const {
    I at[4];
    uint32_t shift = 0;
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) {
      const uint32_t rest = axis < 3 ? tiles_[axis].quotient(block) : 0;
      const uint32_t tile = axis < 3 ? tiles_[axis].remainder(block, rest) : block;
      at[axis] = (I(tile) << log2_[axis]) + I(thread >> shift & ((1u << log2_[axis]) - 1));
      shift += log2_[axis];
      block = rest;
    }
    p->n = at[3];
    p->c = (channels_fast_ ? at[0] : at[2]) * I(lanes_);
    p->y = channels_fast_ ? at[2] : at[1];
    p->x = channels_fast_ ? at[1] : at[0];
    return at[0] < size_[0] && at[1] < size_[1] && at[2] < size_[2] && at[3] < size_[3];
  }

 private:
  static constexpr int64_t max_blocks = 0x7fffffff;

  I size_[4];  // along the fast, the middle and the slow axis, and the images
  int log2_[4];
  Divisor tiles_[4];
  int lanes_;
  bool channels_fast_;
  int64_t blocks_ = 1;
};

// A tensor's address and strides, in elements.
template <class T, class I>
struct Strided {
  T* data;
  I n, c, y, x;

  Strided(const View& v, int64_t first_image)
      : data(static_cast<T*>(v.data) + first_image * v.stride[0]),
        n(I(v.stride[0])),
        c(I(v.stride[1])),
        y(I(v.stride[2])),
        x(I(v.stride[3])) {}

  ZF_HD T* at(I in, I ic, I iy, I ix) const { return data + (in * n + ic * c + iy * y + ix * x); }
};

// Geometry of a pooling window that is known when a launch is made.
template <class I>
struct AnyWindow {
  static constexpr int known_kernel = 0;
  I kernel_[2], stride_[2], padding_[2], dilation_[2];
  I taps_per_stride_[2], rest_per_stride_[2];  // the stride, divided by the dilation

  explicit AnyWindow(const Window& w) {
    for (int axis = 0; axis < 2; ++axis) {
      kernel_[axis] = I(w.kernel[axis]), stride_[axis] = I(w.stride[axis]);
      padding_[axis] = I(w.padding[axis]), dilation_[axis] = I(w.dilation[axis]);
      taps_per_stride_[axis] = stride_[axis] / dilation_[axis];
      rest_per_stride_[axis] = stride_[axis] % dilation_[axis];
    }
  }
  ZF_HD I kernel(int axis) const { return kernel_[axis]; }
  ZF_HD I stride(int axis) const { return stride_[axis]; }
  ZF_HD I padding(int axis) const { return padding_[axis]; }
  ZF_HD I dilation(int axis) const { return dilation_[axis]; }
};

// Geometry of a square window that is known to the compiler: loops unroll, divisions vanish.
template <class I, int Kernel, int Stride>
struct FixedWindow {
  static constexpr int known_kernel = Kernel;
  I padding_[2];

  explicit FixedWindow(const Window& w) : padding_{I(w.padding[0]), I(w.padding[1])} {}
  static bool is(const Window& w) {
    bool same = true;
    for (int axis = 0; axis < 2; ++axis)
      same = same && w.kernel[axis] == Kernel && w.stride[axis] == Stride && w.dilation[axis] == 1;
    return same;
  }
  ZF_HD constexpr I kernel(int) const { return Kernel; }
  ZF_HD constexpr I stride(int) const { return Stride; }
  ZF_HD I padding(int axis) const { return padding_[axis]; }
  ZF_HD constexpr I dilation(int) const { return 1; }
};

template <class I>
struct Range {
  I begin, end;
};

// The taps, along one axis, of the window with this corner that lie inside a map of `size`. Windows at the
// map's edge count their way in: that costs less than divisions, whose 64-bit form is a call.
template <class I, class W>
ZF_HD Range<I> taps_inside(const W& window, int axis, I corner, I size) {
  const I k = window.kernel(axis), d = window.dilation(axis);
  Range<I> taps{0, k};
  while (taps.begin < k && corner + taps.begin * d < 0) ++taps.begin;
  while (taps.end > taps.begin && corner + (taps.end - 1) * d >= size) --taps.end;
  return taps;
}

// Walks over the windows out of `count` that reach over a place along one axis, in ascending order:
//   for (Covering<I> w(window, axis, place, count); w.more(); w.next())
//     if (w.has_tap()) ... w.window, w.tap ...
template <class I>
class Covering {
 public:
  I window, tap;

  ZF_HD Covering(const AnyWindow<I>& w, int axis, I place, I count)
      : dilation_(w.dilation(axis)),
        taps_step_(w.taps_per_stride_[axis]),
        rest_step_(w.rest_per_stride_[axis]) {
    const I stride = w.stride(axis);
    const I shifted = place + w.padding(axis);  // = window * stride + tap * dilation
    const I before = shifted - dilation_ * (w.kernel(axis) - 1);
    const I end = shifted / stride + 1;
    end_ = end < count ? end : count;
    window = before > 0 ? (before + stride - 1) / stride : 0;
    const I offset = shifted - window * stride;
    tap = dilation_ == 1 ? offset : offset / dilation_;
    rest_ = offset - tap * dilation_;
  }
  ZF_HD bool more() const { return window < end_; }
  ZF_HD void next() {
    ++window;
    tap -= taps_step_;
    rest_ -= rest_step_;
    if (rest_ < 0) rest_ += dilation_, --tap;
  }
  ZF_HD bool has_tap() const { return rest_ == 0; }  // or the taps step over the place

 private:
  I end_, rest_, dilation_, taps_step_, rest_step_;
};

// ---- Choices that a launcher makes -----------------------------------------------------------------------

// Whether `lanes` channels can be moved by one access at every place.
inline bool vectors_over_channels(const View& v, int lanes, int item_bytes) {
  if (v.stride[1] != 1 || v.size[1] % lanes != 0) return false;
  if (reinterpret_cast<uintptr_t>(v.data) % (lanes * item_bytes) != 0) return false;
  for (int axis : {0, 2, 3})
    if (v.size[axis] > 1 && v.stride[axis] % lanes != 0) return false;
  return true;
}

// Whether neighbouring threads should take neighbouring channels, rather than columns, of a result.
inline bool channels_fastest(const View& v) { return v.stride[1] == 1 && v.stride[3] != 1; }

// How many images a launch with 32-bit arithmetic can take; 0 when one alone needs 64 bits.
inline int64_t images_in_32_bits(const Window& pool, const View& map, const View& pooled,
                                 std::initializer_list<const View*> views) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - int64_t(threads_per_block);
  // Before they are checked, indices may pass the map's ends by a window, and the last box any axis.
  if (map.c() > limit) return 0;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t s = pool.stride[axis], d = pool.dilation[axis], count = pooled.size[axis + 2];
    if (s > limit || d > limit || count > limit || map.size[axis + 2] > limit) return 0;
    if (map.size[axis + 2] + (count + 1) * s + pool.padding[axis] + pool.kernel[axis] * d > limit) return 0;
  }
  int64_t images = pooled.n() < limit ? pooled.n() : limit;
  for (const View* v : views) {
    int64_t room = limit;
    for (int axis = 1; axis < 4; ++axis)
      if (v->size[axis] > 1) room -= (v->size[axis] - 1) * v->stride[axis];
    if (room < 0) return 0;
    if (v->n() > 1 && v->stride[0] > 0 && images > room / v->stride[0] + 1) images = room / v->stride[0] + 1;
  }
  return images;
}

// Calls f(index, first, images) for slices of a batch: `index` is Type<int32_t> where its offsets allow that.
template <class F>
void for_slices(const Window& pool, const View& map, const View& pooled,
                std::initializer_list<const View*> views, const F& f) {
  const int64_t images = images_in_32_bits(pool, map, pooled, views);
  if (images == 0) return f(Type<int64_t>{}, 0, pooled.n());
  for (int64_t first = 0; first < pooled.n(); first += images)
    f(Type<int32_t>{}, first, pooled.n() - first < images ? pooled.n() - first : images);
}

// Calls f(Type<W>, Type<L>) with the window and the channels of a thread: the pools of the networks we know,
// or any; `Vectors` where every access allows it, otherwise several channels, otherwise one. The variants are
// few, so that the kernels build fast: the rare 64-bit kernel and channels that are no multiple of four take
// the plainest.
template <class I, class Vectors, class F>
void for_variant(const Window& pool, bool vectors, int64_t channels, const F& f) {
  if constexpr (sizeof(I) == 4) {
    const auto with_window = [&](auto window) {
      if (vectors) return f(window, Type<Vectors>{});
      f(window, Type<Spread<spread_channels>>{});
    };
    if (vectors || channels % spread_channels == 0) {
      if (FixedWindow<I, 3, 2>::is(pool)) return with_window(Type<FixedWindow<I, 3, 2>>{});
      if (FixedWindow<I, 2, 2>::is(pool)) return with_window(Type<FixedWindow<I, 2, 2>>{});
    }
    if (vectors) return f(Type<AnyWindow<I>>{}, Type<Vectors>{});
  }
  f(Type<AnyWindow<I>>{}, Type<Spread<1>>{});
}

}  // namespace gpu
}  // namespace zf
