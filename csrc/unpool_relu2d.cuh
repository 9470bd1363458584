// The bodies of the CUDA kernels of unpool_relu2d and pool_gather2d, and the choice of their variants. The
// contracts are in the header.
//
// Least traffic of unpooling: one value and one byte in for each window, the whole map out. For ZFNet's pool1
// (3x3/2 to 96 maps of 110x110) at batch 32 in fp32 that is 37 + 9 + 149 MB. Scattering would need a cleared
// map (149 MB more) and atomics where windows overlap, so the map is gathered: every place asks the windows
// over it, in raster order, which of them name it. No place is written twice, no sum depends on timing, and a
// bad switch matches no place.
//
// Least traffic of the transpose: one byte in and one value out for each window, and the sectors of the map
// that the switches name: with three taps a side and stride two nearly all of it.
#pragma once
#include "tiling.cuh"

namespace zf {
namespace gpu {

// The sum of the values that were put at one place, or the last of them.
template <class T>
class Placed {
 public:
  // Adding to -0 keeps the sign of a lone zero.
  ZF_HD void add(bool hit, T v, bool last) {
    const T before = last ? T(-0.0) : sum_;
    sum_ = hit ? before + v : sum_;
    any_ = any_ || hit;
  }
  // floor: 0 rectifies, -inf does not; NaN and -0 pass both.
  ZF_HD T value(T floor) const {
    const T v = any_ ? sum_ : T(0);
    return v < floor ? T(0) : v;
  }

 private:
  T sum_ = T(-0.0);
  bool any_ = false;
};

// What unpooling reads and writes, whatever the window.
template <class S, class I>
struct UnpoolMaps {
  Strided<const S, I> y;
  Strided<const uint8_t, I> switches;
  Strided<S, I> out;
  I pooled_height, pooled_width, height, width;
  typename Compute<S>::type floor;
  bool last;

  UnpoolMaps(const View& y_, const View& switches_, const View& out_, bool relu, Overlap overlap,
             int64_t first)
      : y(y_, first),
        switches(switches_, first),
        out(out_, first),
        pooled_height(I(y_.h())),
        pooled_width(I(y_.w())),
        height(I(out_.h())),
        width(I(out_.w())),
        floor(relu ? 0 : -HUGE_VALF),
        last(overlap == Overlap::last) {}
};

// Any window: a thread makes one place of the map.
template <class S, class I, class W, class L, int Phase = 0>
class Unpool {
  static_assert(W::known_kernel == 0, "a known window has its own body");

 public:
  Unpool(const View& y, const View& switches, const View& out, const Window& pool, bool relu, Overlap overlap,
         int64_t first, int64_t images)
      : maps_(y, switches, out, relu, overlap, first),
        window_(pool),
        tiling_(images, out.c(), V, out.h(), out.w(), channels_fastest(out),
                (L::packed ? V : 1) * int(sizeof(S))) {}

  int64_t blocks() const { return tiling_.blocks(); }

  ZF_HD void operator()(uint32_t block, uint32_t thread) const {
    Place<I> p;
    if (!tiling_.place(block, thread, &p)) return;
    const Covering<I> columns(window_, 1, p.x, maps_.pooled_width);
    Placed<T> placed[V];
#pragma unroll 1
    for (Covering<I> row(window_, 0, p.y, maps_.pooled_height); row.more(); row.next()) {
      if (!row.has_tap()) continue;
#pragma unroll 1
      for (Covering<I> column = columns; column.more(); column.next()) {
        if (!column.has_tap()) continue;
        const int tap = int(row.tap * window_.kernel(1) + column.tap);
        const Vec<uint8_t, V> named =
            L::load(maps_.switches.at(p.n, p.c, row.window, column.window), maps_.switches.c);
        const Vec<S, V> values = L::load(maps_.y.at(p.n, p.c, row.window, column.window), maps_.y.c);
#pragma unroll
        for (int i = 0; i < V; ++i) placed[i].add(named.lane[i] == tap, widen(values.lane[i]), maps_.last);
      }
    }
    Vec<S, V> result;
#pragma unroll
    for (int i = 0; i < V; ++i) result.lane[i] = narrow<S>(placed[i].value(maps_.floor));
    L::store(maps_.out.at(p.n, p.c, p.y, p.x), maps_.out.c, result);
  }

 private:
  using T = typename Compute<S>::type;
  static constexpr int V = L::count;

  UnpoolMaps<S, I> maps_;
  W window_;
  Tiling<I> tiling_;
};

// How the windows of a known size lie over a cell of `Stride` places along one axis. Cell q starts `Phase`
// places after the corner of window q.
template <int Kernel, int Stride, int Phase>
struct Cell {
  static constexpr int first = -((Kernel - 1 - Phase) / Stride);  // the first window over cell q, less q
  static constexpr int last = (Phase + Stride - 1) / Stride;
  static constexpr int windows = last - first + 1;

  // The tap by which the i-th window over a cell reads its j-th place: one of the window's, or there is none.
  static ZF_HD constexpr int tap(int i, int j) { return Phase + j - (first + i) * Stride; }
  static ZF_HD constexpr bool has_tap(int i, int j) { return tap(i, j) >= 0 && tap(i, j) < Kernel; }
};

// A window that the compiler knows: a thread makes a cell of stride x stride places, and reads the few
// windows over it once. Phase: where a row's cells start. With a padding of one, as in ZFNet, cells of phase
// 0 would lie across the pairs of columns that can be stored together.
template <class S, class I, int Kernel, int Stride, class L, int Phase>
class Unpool<S, I, FixedWindow<I, Kernel, Stride>, L, Phase> {
 public:
  Unpool(const View& y, const View& switches, const View& out, const Window& pool, bool relu, Overlap overlap,
         int64_t first, int64_t images)
      : maps_(y, switches, out, relu, overlap, first),
        window_(pool),
        tiling_(images, out.c(), V, cells(out.h(), pool.padding[0]), cells(out.w(), pool.padding[1] - Phase),
                channels_fastest(out), (L::packed ? V : Stride) * int(sizeof(S))) {}

  int64_t blocks() const { return tiling_.blocks(); }

  ZF_HD void operator()(uint32_t block, uint32_t thread) const {
    Place<I> p;  // (p.y, p.x) is the cell
    if (!tiling_.place(block, thread, &p)) return;
    Vec<S, V> values[Rows::windows][Columns::windows];
    Vec<uint8_t, V> named[Rows::windows][Columns::windows];
#pragma unroll
    for (int j = 0; j < Rows::windows; ++j)
#pragma unroll
      for (int i = 0; i < Columns::windows; ++i)
        read(p, p.y + Rows::first + j, p.x + Columns::first + i, &values[j][i], &named[j][i]);
    const I top = p.y * Stride - window_.padding(0), left = p.x * Stride - window_.padding(1) + Phase;
#pragma unroll
    for (int row = 0; row < Stride; ++row) {
      Vec<S, V> places[Stride];
#pragma unroll
      for (int column = 0; column < Stride; ++column)
#pragma unroll
        for (int lane = 0; lane < V; ++lane) {
          Placed<T> placed;
#pragma unroll
          for (int j = 0; j < Rows::windows; ++j)
#pragma unroll
            for (int i = 0; i < Columns::windows; ++i)
              if (Rows::has_tap(j, row) && Columns::has_tap(i, column)) {
                const int tap = Rows::tap(j, row) * Kernel + Columns::tap(i, column);
                placed.add(named[j][i].lane[lane] == tap, widen(values[j][i].lane[lane]), maps_.last);
              }
          places[column].lane[lane] = narrow<S>(placed.value(maps_.floor));
        }
      if (top + row >= 0 && top + row < maps_.height) write(p, top + row, left, places);
    }
  }

 private:
  using T = typename Compute<S>::type;
  using Rows = Cell<Kernel, Stride, 0>;
  using Columns = Cell<Kernel, Stride, Phase>;
  static constexpr int V = L::count;
  static constexpr uint8_t no_tap = 255;

  static int64_t cells(int64_t size, int64_t before) { return (size + before + Stride - 1) / Stride; }

  // A window beyond the pooled map names nothing; its neighbour in the map is read in its stead, so that all
  // loads are under way together.
  ZF_HD void read(const Place<I>& p, I oy, I ox, Vec<S, V>* values, Vec<uint8_t, V>* named) const {
    const I near_y = clamp(oy, maps_.pooled_height - 1), near_x = clamp(ox, maps_.pooled_width - 1);
    const bool inside = near_y == oy && near_x == ox;
    *values = L::load(maps_.y.at(p.n, p.c, near_y, near_x), maps_.y.c);
    *named = L::load(maps_.switches.at(p.n, p.c, near_y, near_x), maps_.switches.c);
#pragma unroll
    for (int i = 0; i < V; ++i) named->lane[i] = inside ? named->lane[i] : no_tap;
  }
  static ZF_HD I clamp(I o, I most) { return o < 0 ? 0 : o > most ? most : o; }

  ZF_HD void write(const Place<I>& p, I y, I left, const Vec<S, V> (&places)[Stride]) const {
    const I first = left < 0 ? -left : 0, left_over = maps_.width - left;
    S* const start = maps_.out.at(p.n, p.c, y, left);
    if constexpr (!L::packed) {
      // Neighbours in a row go out together where every channel's address allows it.
      const bool aligned = reinterpret_cast<uintptr_t>(start) % sizeof(Vec<S, Stride>) == 0 &&
                           maps_.out.c % Stride == 0;
      if (aligned && maps_.out.x == 1 && first == 0 && left_over >= Stride) {
#pragma unroll
        for (int lane = 0; lane < V; ++lane) {
          Vec<S, Stride> row;
#pragma unroll
          for (int column = 0; column < Stride; ++column) row.lane[column] = places[column].lane[lane];
          store_vector(start + lane * maps_.out.c, row);
        }
        return;
      }
    }
#pragma unroll
    for (int column = 0; column < Stride; ++column)
      if (column >= first && column < left_over)
        L::store(start + column * maps_.out.x, maps_.out.c, places[column]);
  }

  UnpoolMaps<S, I> maps_;
  FixedWindow<I, Kernel, Stride> window_;
  Tiling<I> tiling_;
};

// The place of a map that a switch names.
template <class I>
class Named {
 public:
  Named(const Window& pool, const View& map)
      : height(I(map.h())),
        width(I(map.w())),
        window_(pool),
        kernel_width_(uint32_t(pool.kernel[1])),
        taps_(pool.taps()) {}

  // Whether the switch of window (oy, ox) names a place of the map.
  ZF_HD bool place(I oy, I ox, uint8_t tap, I* y, I* x) const {
    const uint32_t ky = kernel_width_.quotient(tap);
    *y = oy * window_.stride(0) - window_.padding(0) + I(ky) * window_.dilation(0);
    *x = ox * window_.stride(1) - window_.padding(1) +
         I(kernel_width_.remainder(tap, ky)) * window_.dilation(1);
    return tap < taps_ && *y >= 0 && *y < height && *x >= 0 && *x < width;
  }

  // Whether a window after (oy, ox), in raster order, names (y, x) too.
  ZF_HD bool again(const uint8_t* switches, I row_stride, I column_stride, I pooled_height, I pooled_width,
                   I oy, I ox, I y, I x) const {
    const Covering<I> columns(window_, 1, x, pooled_width);
#pragma unroll 1
    for (Covering<I> row(window_, 0, y, pooled_height); row.more(); row.next()) {
      if (!row.has_tap() || row.window < oy) continue;
#pragma unroll 1
      for (Covering<I> column = columns; column.more(); column.next()) {
        if (!column.has_tap() || (row.window == oy && column.window <= ox)) continue;
        if (switches[row.window * row_stride + column.window * column_stride] ==
            row.tap * window_.kernel(1) + column.tap)
          return true;
      }
    }
    return false;
  }

  I height, width;  // of the map

 private:
  AnyWindow<I> window_;
  Divisor kernel_width_;
  int taps_;
};

// The transpose: a thread reads a switch of each of its channels, and the values that they name.
// Last: the transpose of unpooling with Overlap::last, which gives 0 to the windows that it did not keep.
template <class S, class I, class L, bool Last>
class PoolGather {
 public:
  PoolGather(const View& x, const View& switches, const View& out, const Window& pool, int32_t* bad,
             int64_t first, int64_t images)
      : x_(x, first),
        switches_(switches, first),
        out_(out, first),
        named_(pool, x),
        pooled_height_(I(out.h())),
        pooled_width_(I(out.w())),
        bad_(bad),
        tiling_(images, out.c(), V, out.h(), out.w(), channels_fastest(out),
                (L::packed ? V : 1) * int(sizeof(S))) {}

  int64_t blocks() const { return tiling_.blocks(); }

  ZF_HD void operator()(uint32_t block, uint32_t thread) const {
    Place<I> p;
    if (!tiling_.place(block, thread, &p)) return;
    const Vec<uint8_t, V> taps = L::load(switches_.at(p.n, p.c, p.y, p.x), switches_.c);
    Vec<S, V> result;
    bool bad = false;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      I y, x;
      const bool named = named_.place(p.y, p.x, taps.lane[i], &y, &x);
      bad = bad || !named;
      bool kept = named;
      if constexpr (Last)
        kept = named && !named_.again(switches_.at(p.n, p.c + i, 0, 0), switches_.y, switches_.x,
                                      pooled_height_, pooled_width_, p.y, p.x, y, x);
      result.lane[i] = kept ? *x_.at(p.n, p.c + i, y, x) : S(0);  // all bits 0: the zero of every float type
    }
    L::store(out_.at(p.n, p.c, p.y, p.x), out_.c, result);
    if (bad && bad_ != nullptr) *bad_ = 1;
  }

 private:
  static constexpr int V = L::count;

  Strided<const S, I> x_;
  Strided<const uint8_t, I> switches_;
  Strided<S, I> out_;
  Named<I> named_;
  I pooled_height_, pooled_width_;
  int32_t* bad_;
  Tiling<I> tiling_;
};

// Sets *bad when a switch names no place. Unpooling itself passes such a switch by. One byte in a window.
template <class I>
class FindBadSwitch {
 public:
  FindBadSwitch(const View& switches, const View& map, const Window& pool, int32_t* bad, int64_t first,
                int64_t images)
      : switches_(switches, first),
        named_(pool, map),
        bad_(bad),
        tiling_(images, switches.c(), 1, switches.h(), switches.w(), channels_fastest(switches), 1) {}

  int64_t blocks() const { return tiling_.blocks(); }

  ZF_HD void operator()(uint32_t block, uint32_t thread) const {
    Place<I> p;
    I y, x;
    if (tiling_.place(block, thread, &p) &&
        !named_.place(p.y, p.x, *switches_.at(p.n, p.c, p.y, p.x), &y, &x))
      *bad_ = 1;
  }

 private:
  Strided<const uint8_t, I> switches_;
  Named<I> named_;
  int32_t* bad_;
  Tiling<I> tiling_;
};

// Call launch(body) for each launch that the op takes; a launch runs the body at every block and thread.
template <class Launch>
void find_bad_switch(const View& switches, const View& map, const Window& pool, int32_t* bad,
                     const Launch& launch) {
  if (switches.numel() == 0) return;
  for_slices(pool, map, switches, {&switches}, [&](auto index, int64_t first, int64_t images) {
    launch(FindBadSwitch<TypeIn<decltype(index)>>(switches, map, pool, bad, first, images));
  });
}

template <class Launch>
void unpool_relu2d(const View& y, const View& switches, const View& out, const Window& pool, bool relu,
                   Overlap overlap, const Launch& launch) {
  if (out.numel() == 0) return;
  if (y.numel() == 0) throw std::invalid_argument("zfcore: a pooled map must have at least one window");
  for_float_storage(y.dtype, [&](auto storage) {
    using S = TypeIn<decltype(storage)>;
    constexpr int lanes = vector_bytes / int(sizeof(S));
    const bool vectors = vectors_over_channels(y, lanes, sizeof(S)) &&
                         vectors_over_channels(out, lanes, sizeof(S)) &&
                         vectors_over_channels(switches, lanes, 1);
    for_slices(pool, out, y, {&y, &switches, &out}, [&](auto index, int64_t first, int64_t images) {
      using I = TypeIn<decltype(index)>;
      for_variant<I, Packed<lanes>>(pool, vectors, out.c(), [&](auto window, auto channels) {
        using W = TypeIn<decltype(window)>;
        using L = TypeIn<decltype(channels)>;
        if constexpr (W::known_kernel == 3 && !L::packed) {
          if (pool.padding[1] == 1)
            return launch(Unpool<S, I, W, L, 1>(y, switches, out, pool, relu, overlap, first, images));
        }
        launch(Unpool<S, I, W, L>(y, switches, out, pool, relu, overlap, first, images));
      });
    });
  });
}

template <class Launch>
void pool_gather2d(const View& x, const View& switches, const View& out, const Window& pool, Overlap overlap,
                   int32_t* bad, const Launch& launch) {
  if (out.numel() == 0) return;
  for_storage_size(x.dtype, [&](auto storage) {
    using S = TypeIn<decltype(storage)>;
    constexpr int lanes = vector_bytes / int(sizeof(S));
    const bool vectors =
        vectors_over_channels(switches, lanes, 1) && vectors_over_channels(out, lanes, sizeof(S));
    for_slices(pool, x, out, {&x, &switches, &out}, [&](auto index, int64_t first, int64_t images) {
      using I = TypeIn<decltype(index)>;
      const auto gather = [&](auto channels, auto last) {
        using L = TypeIn<decltype(channels)>;
        launch(PoolGather<S, I, L, decltype(last)::value>(x, switches, out, pool, bad, first, images));
      };
      if (overlap == Overlap::last) return gather(Type<Spread<1>>{}, std::true_type{});
      if constexpr (sizeof(I) == 4) {
        if (vectors) return gather(Type<Packed<lanes>>{}, std::false_type{});
        if (out.c() % spread_channels == 0) return gather(Type<Spread<spread_channels>>{}, std::false_type{});
      }
      gather(Type<Spread<1>>{}, std::false_type{});
    });
  });
}

}  // namespace gpu
}  // namespace zf
