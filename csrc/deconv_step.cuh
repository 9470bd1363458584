// The bodies of the CUDA kernels of deconv_step for results of one to four channels, and the choice of their variants.
// The contract is in the header.
//
// Work, of ZFNet's conv1 (7x7/2, 96 filters, 3 channels) under its pool1: a signal patch of 33x33 is unpooled to 67x67
// places, and each of their 96 channels multiplies 49 * 3 weights: 63 M multiply-adds a patch, counting zeros, or
// 1.9 us of an H200's 67 TFLOP/s. It has to move 33 * 33 * 96 values and as many switches in and 139 * 139 * 3 pixels
// out: 418 + 105 + 232 KB in fp32, 0.16 us at 4.8 TB/s. So arithmetic bounds it, if shared memory can feed that: a
// cycle takes four multiply-adds a lane and delivers one word.
//
// How: outputs whose places are equal modulo the stride, a class, take the same weights, from places next to each
// other. A block takes a tile of outputs of one patch and a chunk of channels at a time. All its threads unpool and
// rectify the places under the tile into shared memory, beside the chunk's filters; then each adds to 2 x 8 outputs of
// one class, every channel of them, in registers. For each row of places it reads 12 values, of which 11 are used, and
// one row of weights, which it keeps for the row below. With 7x7/2 that is 27 vectors of 4 words for 768 multiply-adds
// in the class of most taps, and 1 word for 6.5 of them over all. Filling takes some 27 instructions for each place and
// channel under a tile, beside 49 * 3 multiply-adds; and 10, beside 9 * 3, where there is no pool above a 3x3 one.
//
// Zeros are multiplied, too. At most one place in four holds a value, but a list of those shares no weight between
// outputs, and a word for each multiply-add takes shared memory as long as four multiply-adds take. Where a filter is
// not finite, no product with a zero may count: a block then takes the careful loop, which other geometries take anyway.
//
// The order of a sum is fixed: channels, then taps. Every output is written once.
#pragma once
#include "deconv_step.h"
#include "unpool_relu2d.cuh"

namespace zf {
namespace gpu {

// What a block works on; its threads all have the same. Rows, then columns. A patch's places and the outputs that they
// reach are counted from its own first.
struct StepTile {
  int64_t signal, switches, passes;  // where the patch and the maps of its image begin, in elements
  int64_t out;                       // where its result does
  int32_t origin[2];                 // its first window, in the pooled map
  int32_t first[2];                  // its first place, in the map
  int32_t begin[2], end[2];          // its places inside the map
  int32_t shift[2];                  // where the result begins
  int32_t out_begin[2], out_end[2];  // the outputs inside the map below
  int32_t q[2];                      // the tile's first outputs, divided by the stride
  uint32_t first_class;
  bool empty;                        // nothing comes down to the tile
};

// Numbers [0, items) as (channel, column, row).
struct StepWalk {
  Divisor channels, columns;
  uint32_t items;

  StepWalk(int64_t channels_, int64_t columns_, int64_t rows)
      : channels(uint32_t(channels_ > 0 ? channels_ : 1)),
        columns(uint32_t(columns_ > 0 ? columns_ : 1)),
        items(uint32_t(channels_ * columns_ * rows)) {}
  ZF_HD void at(uint32_t item, int32_t* channel, int32_t* column, int32_t* row) const {
    const uint32_t place = channels.quotient(item), line = columns.quotient(place);
    *channel = int32_t(channels.remainder(item, place));
    *column = int32_t(columns.remainder(place, line));
    *row = int32_t(line);
  }
};

// Where the places under a tile lie in shared memory: a plane for each channel. With Vectors, a row is of whole vectors
// of four, the even ones and then the odd ones: neighbouring threads read every second vector, and so neighbours. And
// pairs of rows lie so far apart that this goes on from one row of threads, of two rows of outputs each, to the next.
template <bool Vectors>
struct StepLayout {
  static constexpr bool vectors = Vectors;
  static constexpr int word = 4;                   // values of a vector
  int32_t height = 0, width = 0;                   // places
  int32_t row = 0, pair = 0, odd = 0, plane = 0;  // from a row to the next, a pair of rows, the odd vectors, a channel

  StepLayout() = default;
  // Under tiles of `columns` threads a row.
  StepLayout(int32_t height_, int32_t width_, int32_t columns) : height(height_), width(width_), row(width_) {
    pair = 2 * row, plane = height * row;
    if (!Vectors) return;
    const int32_t of_row = 2 * columns + 1, skipped = ((columns - 2 * of_row) % 8 + 8) % 8;  // of a cycle's eight
    row = of_row * word, pair = (2 * of_row + skipped) * word, odd = (columns + 1) * word;
    plane = (height + 1) / 2 * pair;
  }
  ZF_HD int32_t row_at(int32_t i) const { return Vectors ? (i >> 1) * pair + (i & 1) * row : i * row; }
  ZF_HD int32_t column_at(int32_t j) const {
    static_assert(word == 4, "which is two bits of a column");
    return Vectors ? (j >> 3) * word + (j >> 2 & 1) * odd + (j & 3) : j;
  }
};

// The signal patches, unpooled and rectified.
template <class S>
class StepPatches {
 public:
  using T = typename Compute<S>::type;
  // Channels of an access, where these are next to each other in all operands.
  static constexpr int V = sizeof(S) == 8 ? 2 : 4;

  // How places are filled: one by one; or in vectors, straight from the signal or in cells under 3x3/2 windows.
  enum class Way : int { any, straight, cells };
  const Way way;

  explicit StepPatches(const DeconvStep& op)
      : way(way_of(op)),
        signal_(op.signal, 0),
        switches_(op.switches, 0),
        passes_(op.passes, 0),
        window_(op.pool),
        floor_(op.rectify ? 0 : -HUGE_VALF),
        last_(op.last),
        maps_(std::numeric_limits<int64_t>::max()) {
    if (op.switches.data) maps_ = op.switches.n();
    if (op.passes.data && op.passes.n() < maps_) maps_ = op.passes.n();
    for (int axis = 0; axis < 2; ++axis) {
      size_[axis] = int32_t(op.signal.size[axis + 2]);
      map_[axis] = int32_t(op.map[axis]);
      windows_[axis] = op.switches.data ? int32_t(op.switches.size[axis + 2]) : map_[axis];
      places_[axis] = int32_t((op.signal.size[axis + 2] - 1) * op.pool.stride[axis] +
                              (op.pool.kernel[axis] - 1) * op.pool.dilation[axis] + 1);
      value_step_[axis] = int32_t(op.signal.stride[axis + 2] * int64_t(sizeof(S)));
      switch_step_[axis] = int32_t(op.switches.stride[axis + 2]);
    }
  }

  StepWalk walk(int64_t channels, int64_t columns, int64_t rows) const {
    if (way == Way::any) return StepWalk(channels, columns, rows);
    // An area that begins in the middle of a cell meets one more.
    if (way == Way::cells) columns = columns / 2 + 1, rows = rows / 2 + 1;
    if (way == Way::straight) columns = (columns + columns_at_once - 1) / columns_at_once;
    return StepWalk(channels / V, columns, rows);
  }

  // Patch b, whose windows begin at `origin` in the maps of image n.
  ZF_HD void open(int64_t b, int64_t n, const int64_t* origin, StepTile* tile) const {
    const bool reads_maps = switches_.data || passes_.data;
    tile->empty = reads_maps && (n < 0 || n >= maps_);
    if (!reads_maps || tile->empty) n = 0;
    tile->signal = b * signal_.n;
    tile->switches = n * switches_.n;
    tile->passes = n * passes_.n;
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t corner = origin ? origin[axis] : 0;
      const bool meets = corner > -int64_t(size_[axis]) && corner < windows_[axis];
      tile->empty = tile->empty || !meets;
      tile->origin[axis] = meets ? int32_t(corner) : 0;
      const int32_t first = tile->origin[axis] * window_.stride(axis) - window_.padding(axis);
      tile->first[axis] = first;
      tile->begin[axis] = first < 0 ? -first : 0;
      tile->end[axis] = places_[axis] < map_[axis] - first ? places_[axis] : map_[axis] - first;
    }
  }

  // What channel c has at place (y, x).
  ZF_HD T value(const StepTile& tile, int32_t c, int32_t y, int32_t x) const {
    if (!in_map(tile, y, x)) return T(0);
    const int32_t map_y = tile.first[0] + y, map_x = tile.first[1] + x;
    Placed<T> placed;
    if (!switches_.data) {
      placed.add(true, widen(*signal(tile, c, y, x)), false);
    } else {
      const Covering<int32_t> columns(window_, 1, map_x, windows_[1]);
#pragma unroll 1
      for (Covering<int32_t> row(window_, 0, map_y, windows_[0]); row.more(); row.next()) {
        if (!row.has_tap()) continue;
#pragma unroll 1
        for (Covering<int32_t> column = columns; column.more(); column.next()) {
          if (!column.has_tap()) continue;
          const int32_t oy = row.window - tile.origin[0], ox = column.window - tile.origin[1];
          const bool ours = in_patch(oy, ox);
          if (!ours && !last_) continue;  // but a window beside the patch may be the last that names the place
          const int tap = int(row.tap * window_.kernel(1) + column.tap);
          if (*switches(tile, c, oy, ox) != tap) continue;
          placed.add(true, ours ? widen(*signal(tile, c, oy, ox)) : T(0), last_);
        }
      }
    }
    return passes_.data && !*passes(tile, c, y, x) ? T(0) : placed.value(floor_);
  }

  // Puts the `count` channels from c on, at the places from (y, x) on, where `layout` has them in shared memory: the
  // threads of a block together, each value once.
  template <class L>
  ZF_HD void fill(const StepTile& tile, const StepWalk& walk, uint32_t thread, uint32_t threads, int32_t c,
                  int32_t count, int32_t y, int32_t x, const L& layout, T* shared) const {
    const auto each = [&](int32_t lanes, const auto& put_item) {
#pragma unroll 1
      for (uint32_t item = thread; item < walk.items; item += threads) {
        int32_t channel, j, i;
        walk.at(item, &channel, &j, &i);
        channel *= lanes;
        if (channel < count) put_item(c + channel, i, j, shared + channel * layout.plane);
      }
    };
    if (way == Way::any) {
      each(1, [&](int32_t channel, int32_t i, int32_t j, T* to) {
        to[layout.row_at(i) + layout.column_at(j)] = value(tile, channel, y + i, x + j);
      });
    } else if (way == Way::straight) {
      each(V, [&](int32_t channel, int32_t i, int32_t j, T* to) {
        fill_straight(tile, channel, y + i, x, j * columns_at_once, layout, to + layout.row_at(i));
      });
    } else {
      // Cell i holds places 2i and 2i + 1. (>> rounds down, also what is negative.)
      const int32_t cell_y = y >> 1, cell_x = x >> 1;
      const auto with = [&](auto last) {
        each(V, [&](int32_t channel, int32_t i, int32_t j, T* to) {
          fill_cell<decltype(last)::value>(tile, channel, cell_y + i, cell_x + j, y, x, layout, to);
        });
      };
      if (last_) return with(std::true_type{});
      with(std::false_type{});
    }
  }

 private:
  static constexpr int64_t most_step = 0x7fffffff;
  static constexpr int columns_at_once = 4;  // straight from the signal

  static Way way_of(const DeconvStep& op) {
    if (!vectors_over_channels(op.signal, V, sizeof(S))) return Way::any;
    if (op.passes.data && !vectors_over_channels(op.passes, V, 1)) return Way::any;
    for (int axis : {2, 3})  // whose steps are taken in 32 bits
      if (op.signal.stride[axis] > most_step / int64_t(sizeof(S)) || op.switches.stride[axis] > most_step)
        return Way::any;
    if (!op.switches.data) return Way::straight;
    const bool cells = vectors_over_channels(op.switches, V, 1) && FixedWindow<int32_t, 3, 2>::is(op.pool);
    return cells ? Way::cells : Way::any;
  }

  ZF_HD bool in_map(const StepTile& tile, int32_t y, int32_t x) const {
    return y >= tile.begin[0] && y < tile.end[0] && x >= tile.begin[1] && x < tile.end[1];
  }
  ZF_HD bool in_patch(int32_t oy, int32_t ox) const { return oy >= 0 && oy < size_[0] && ox >= 0 && ox < size_[1]; }
  ZF_HD const S* signal(const StepTile& tile, int64_t c, int64_t oy, int64_t ox) const {
    return signal_.data + (tile.signal + c * signal_.c + oy * signal_.y + ox * signal_.x);
  }
  ZF_HD const uint8_t* switches(const StepTile& tile, int64_t c, int64_t oy, int64_t ox) const {
    return switches_.data + (tile.switches + c * switches_.c + (oy + tile.origin[0]) * switches_.y +
                             (ox + tile.origin[1]) * switches_.x);
  }
  ZF_HD const uint8_t* passes(const StepTile& tile, int64_t c, int64_t y, int64_t x) const {
    return passes_.data +
           (tile.passes + c * passes_.c + (y + tile.first[0]) * passes_.y + (x + tile.first[1]) * passes_.x);
  }

  static ZF_HD void put(const Vec<T, V>& v, int32_t plane, T* to) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i * plane] = v.lane[i];
  }

  // Drops from a place in the map what does not pass there.
  ZF_HD void pass(const StepTile& tile, int32_t c, int32_t y, int32_t x, Vec<T, V>* v) const {
    if (!passes_.data) return;
    const Vec<uint8_t, V> open = Packed<V>::load(passes(tile, c, y, x), int64_t(1));
#pragma unroll
    for (int i = 0; i < V; ++i) v->lane[i] = open.lane[i] ? v->lane[i] : T(0);
  }

  // Places (y, x + column) and the next, straight from the signal into columns of a row at `to`.
  template <class L>
  ZF_HD void fill_straight(const StepTile& tile, int32_t c, int32_t y, int32_t x, int32_t column, const L& layout,
                           T* to) const {
    constexpr int N = columns_at_once;
    const S* const values_of = signal_.data + (tile.signal + c);
    Vec<S, V> values[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[j] = {};
      if (in_map(tile, y, x + column + j))
        values[j] = Packed<V>::load(stepped(values_of, y, x + column + j, value_step_), int64_t(1));
    }
    Vec<T, V> places[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const T wide = widen(values[j].lane[i]);
        places[j].lane[i] = wide < floor_ ? T(0) : wide;
      }
      if (passes_.data && in_map(tile, y, x + column + j)) pass(tile, c, y, x + column + j, &places[j]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      T* const channel = to + i * layout.plane;
      if constexpr (L::vectors) {
        static_assert(N == L::word, "a vector of the layout");
        Vec<T, N> vector;
#pragma unroll
        for (int j = 0; j < N; ++j) vector.lane[j] = places[j].lane[i];
        store_shared(channel + layout.column_at(column), vector);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (column + j < layout.width) channel[layout.column_at(column + j)] = places[j].lane[i];
      }
    }
  }

  // The 2x2 places of a cell, from the up to four windows over them. A window that brings nothing names nothing; its
  // neighbour is read in its stead, so that all loads are under way together.
  template <bool Last, class L>
  ZF_HD void fill_cell(const StepTile& tile, int32_t c, int32_t cell_y, int32_t cell_x, int32_t y, int32_t x,
                       const L& layout, T* to) const {
    using Windows = Cell<3, 2, 0>;
    constexpr int N = Windows::windows;
    constexpr uint8_t no_tap = 255;
    const int32_t cell[2] = {cell_y, cell_x};
    int32_t value_at[2][N], switch_at[2][N];  // in the patch and in the map
    bool ours[2][N], known[2][N];
#pragma unroll
    for (int axis = 0; axis < 2; ++axis)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int32_t o = cell[axis] + Windows::first + i, map_o = o + tile.origin[axis];
        value_at[axis][i] = clamp(o, size_[axis] - 1), switch_at[axis][i] = clamp(map_o, windows_[axis] - 1);
        known[axis][i] = switch_at[axis][i] == map_o, ours[axis][i] = known[axis][i] && value_at[axis][i] == o;
      }
    const S* const values_of = signal_.data + (tile.signal + c);
    const uint8_t* const switches_of = switches_.data + (tile.switches + c);
    Vec<S, V> values[N][N];
    Vec<uint8_t, V> named[N][N];
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[j][i] = Packed<V>::load(stepped(values_of, value_at[0][j], value_at[1][i], value_step_), int64_t(1));
        named[j][i] = Packed<V>::load(stepped(switches_of, switch_at[0][j], switch_at[1][i], switch_step_), int64_t(1));
      }
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool mine = ours[0][j] && ours[1][i];
        // With `last`, a window beside the patch may be the last that names a place, and brings it zero.
        const bool asked = Last ? known[0][j] && known[1][i] : mine;
        if (Last && !mine) values[j][i] = {};
        if (!asked) std::memset(&named[j][i], no_tap, V);
      }
    int32_t row_at[2], column_at[2];
    bool row_inside[2], column_inside[2], row_put[2], column_put[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t place_y = 2 * cell_y + i, place_x = 2 * cell_x + i;
      row_inside[i] = place_y >= tile.begin[0] && place_y < tile.end[0];
      column_inside[i] = place_x >= tile.begin[1] && place_x < tile.end[1];
      row_put[i] = place_y >= y && place_y < y + layout.height;
      column_put[i] = place_x >= x && place_x < x + layout.width;
      row_at[i] = layout.row_at(place_y - y), column_at[i] = layout.column_at(place_x - x);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const bool inside = row_inside[row] && column_inside[column];
        Vec<T, V> place;
#pragma unroll
        for (int lane = 0; lane < V; ++lane) {
          T sum = 0;
          bool first = true;
#pragma unroll
          for (int j = 0; j < N; ++j)
#pragma unroll
            for (int i = 0; i < N; ++i)
              if (Windows::has_tap(j, row) && Windows::has_tap(i, column)) {
                const int tap = Windows::tap(j, row) * 3 + Windows::tap(i, column);
                const T v = widen(values[j][i].lane[lane]);
                sum = named[j][i].lane[lane] == tap ? (first || Last ? v : sum + v) : sum;
                first = false;
              }
          place.lane[lane] = !inside || sum < floor_ ? T(0) : sum;
        }
        if (inside) pass(tile, c, 2 * cell_y + row, 2 * cell_x + column, &place);
        if (row_put[row] && column_put[column]) put(place, layout.plane, to + row_at[row] + column_at[column]);
      }
  }
  // `i` rows and `j` columns further, with steps in bytes: an instruction each.
  template <class E>
  static ZF_HD const E* stepped(const E* p, int32_t i, int32_t j, const int32_t (&step)[2]) {
    const char* const row = reinterpret_cast<const char*>(p) + int64_t(i) * step[0];
    return reinterpret_cast<const E*>(row + int64_t(j) * step[1]);
  }
  static ZF_HD int32_t clamp(int32_t o, int32_t most) { return o < 0 ? 0 : o > most ? most : o; }

  Strided<const S, int64_t> signal_;
  Strided<const uint8_t, int64_t> switches_, passes_;
  AnyWindow<int32_t> window_;
  T floor_;
  bool last_;
  int64_t maps_;
  int32_t size_[2], map_[2], windows_[2], places_[2];
  int32_t value_step_[2], switch_step_[2];  // of rows and columns, in bytes, where vectors are taken
};

// The taps of a convolution by which the outputs of one class are reached, along one axis:
//   for (ClassTaps t(...); t.more(); t.next()) ... output s * q + r takes tap t.tap of place q - t.back
class ClassTaps {
 public:
  int32_t tap = 0, back = 0;

  ZF_HD ClassTaps(int32_t kernel, int32_t stride, int32_t back_step, int32_t rest_step, int32_t r)
      : kernel_(kernel), stride_(stride), back_step_(back_step), rest_step_(rest_step), r_(r) {
    while (tap < kernel_ && rest_ != r_) step();
  }
  ZF_HD bool more() const { return tap < kernel_; }
  ZF_HD void next() {
    do step();
    while (tap < kernel_ && rest_ != r_);
  }

 private:
  ZF_HD void step() {
    ++tap, back += back_step_, rest_ += rest_step_;
    if (rest_ >= stride_) rest_ -= stride_, ++back;
  }

  int32_t kernel_, stride_, back_step_, rest_step_, r_, rest_ = 0;
};

// A convolution that is known when a launch is made.
struct AnyConv {
  static constexpr int known_kernel = 0;
  static constexpr bool known = false, in_shared = true;
  static constexpr int32_t rows = 2, words = 4;  // of outputs a thread: rows, and columns of 4 bytes
  int32_t kernel_[2], stride_[2], back_step_[2], rest_step_[2];

  explicit AnyConv(const Window& conv) {
    for (int axis = 0; axis < 2; ++axis) {
      kernel_[axis] = int32_t(conv.kernel[axis]), stride_[axis] = int32_t(conv.stride[axis]);
      back_step_[axis] = int32_t(conv.dilation[axis] / conv.stride[axis]);
      rest_step_[axis] = int32_t(conv.dilation[axis] % conv.stride[axis]);
    }
  }
  ZF_HD int32_t kernel(int axis) const { return kernel_[axis]; }
  ZF_HD int32_t stride(int axis) const { return stride_[axis]; }
  ZF_HD ClassTaps taps(int axis, int32_t r) const {
    return ClassTaps(kernel_[axis], stride_[axis], back_step_[axis], rest_step_[axis], r);
  }
};

// The same where the places under even a small tile exceed shared memory: each is read where it is needed.
struct FarConv : AnyConv {
  using AnyConv::AnyConv;
  static constexpr bool in_shared = false;
  static constexpr int32_t rows = 1, words = 2;
};

// A square convolution that is known to the compiler.
template <int Kernel, int Stride>
struct FixedConv {
  static constexpr int known_kernel = Kernel;
  static constexpr bool known = true, in_shared = true;
  static constexpr int32_t rows = 2, words = 8;
  static constexpr int32_t k = Kernel, s = Stride, most_taps = (Kernel + Stride - 1) / Stride;

  explicit FixedConv(const Window&) {}
  static bool is(const Window& w) { return FixedWindow<int32_t, Kernel, Stride>::is(w); }
  ZF_HD constexpr int32_t kernel(int) const { return Kernel; }
  ZF_HD constexpr int32_t stride(int) const { return Stride; }
  ZF_HD ClassTaps taps(int, int32_t r) const { return ClassTaps(Kernel, Stride, 1 / Stride, 1 % Stride, r); }
};

// How a launch cuts its results into tiles, and what a block holds in shared memory.
template <class L>
struct StepPlan {
  L layout;                  // of the places under a tile
  int32_t lanes[2];          // threads of a class, rows and columns of them
  uint32_t slots;            // threads that a class has room for, lanes[0] * lanes[1] of them in use
  uint32_t classes;          // of a block
  int32_t filter;            // words of a channel's filters
  int32_t chunk;             // channels at once
  int64_t tiles[2], groups;  // of a patch; and groups of classes
  double cost;               // of a launch, in multiply-adds of a thread; infinite where nothing fits
};

// The kernel's body, in phases that a block's threads pass together: fill, add, fill, add, ..., write.
template <class S, int C, class G>
class DeconvTile {
 public:
  using T = typename Compute<S>::type;
  // Rows and columns of outputs of a thread.
  static constexpr int32_t Q = G::rows, P = G::words * 4 / int32_t(sizeof(T));

  struct Sums {
    T of[Q][P][C];
  };

  DeconvTile(const DeconvStep& op, int64_t shared_limit)
      : conv_(op.conv),
        patches_(op),
        out_(op.out, 0),
        image_(op.image),
        origin_(op.origin),
        frame_(op.frame),
        filters_(static_cast<const T*>(op.filters)),
        not_finite_(op.not_finite),
        channels_(int32_t(op.signal.c())),
        out_channels_(int32_t(op.out.c())),
        whole_(op.whole),
        plan_(best_plan(op, shared_limit)),
        walk_(patches_.walk(plan_.chunk, plan_.layout.width, plan_.layout.height)) {
    for (int axis = 0; axis < 2; ++axis) {
      size_[axis] = int32_t(op.out.size[axis + 2]);
      below_[axis] = int32_t(op.below[axis]);
      padding_[axis] = int32_t(op.conv.padding[axis]);
      reach_[axis] = int32_t(reach(op.conv, axis));
      by_stride_[axis] = Divisor(uint32_t(op.conv.stride[axis]));
    }
    if (plan_.cost == std::numeric_limits<double>::infinity()) return;  // fits() says so
    constexpr int64_t most_blocks = 0x7fffffff;
    const int64_t of_patch[3] = {plan_.groups, plan_.tiles[1], plan_.tiles[0]};
    blocks_ = op.out.n();
    for (int i = 0; i < 3; ++i) {
      if (of_patch[i] > most_blocks / blocks_)
        throw std::runtime_error("zfcore: the results have more tiles than the blocks of a grid can hold");
      blocks_ *= of_patch[i];
      by_tiles_[i] = Divisor(uint32_t(of_patch[i]));
    }
    by_slots_ = Divisor(plan_.slots), by_lanes_ = Divisor(uint32_t(plan_.lanes[1]));
    total_classes_ = uint32_t(op.conv.stride[0] * op.conv.stride[1]);
    by_columns_ = Divisor(uint32_t(conv_.kernel(1)));
  }

  static constexpr int channels_of_results = C, known_kernel = G::known_kernel;
  static constexpr bool in_shared = G::in_shared;
  typename StepPatches<S>::Way way() const { return patches_.way; }

  bool fits() const { return plan_.cost < std::numeric_limits<double>::infinity(); }
  int64_t blocks() const { return blocks_; }
  ZF_HD uint32_t threads() const { return plan_.slots * plan_.classes; }
  int64_t shared_bytes() const {
    return G::in_shared ? int64_t(plan_.chunk) * (plan_.layout.plane + plan_.filter) * int64_t(sizeof(T)) : 0;
  }
  // The channels of a turn of fill and add; the first of the next turn is that many further.
  ZF_HD int32_t chunk() const { return plan_.chunk; }
  ZF_HD int32_t channels() const { return channels_; }

  ZF_HD StepTile tile(uint32_t block) const {
    uint32_t at[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const uint32_t rest = by_tiles_[i].quotient(block);
      at[i] = by_tiles_[i].remainder(block, rest);
      block = rest;
    }
    const int64_t b = block;
    StepTile tile;
    patches_.open(b, image_ ? image_[b] : b, origin_ ? origin_ + 2 * b : nullptr, &tile);
    tile.out = b * out_.n;
    tile.first_class = at[0] * plan_.classes;
#pragma unroll
    for (int axis = 0; axis < 2; ++axis) {
      const int32_t stride = conv_.stride(axis);
      const int32_t base = tile.first[axis] * stride - padding_[axis];  // the first output, in the map below
      const int64_t corner = !whole_ ? base : frame_ ? frame_[2 * b + axis] : 0;
      const bool meets = corner > -int64_t(size_[axis]) && corner < below_[axis];
      tile.empty = tile.empty || !meets;
      tile.shift[axis] = meets ? int32_t(corner) - base : 0;
      tile.out_begin[axis] = -base, tile.out_end[axis] = below_[axis] - base;
      const int32_t rows = plan_.lanes[axis] * (axis == 0 ? Q : P);
      tile.q[axis] = floor_by_stride(axis, tile.shift[axis]) + int32_t(at[2 - axis]) * rows;
      tile.empty = tile.empty || tile.q[axis] - reach_[axis] >= tile.end[axis] ||
                   tile.q[axis] + rows <= tile.begin[axis];
    }
    return tile;
  }

  static ZF_HD void clear(Sums* sums) {
#pragma unroll
    for (int a = 0; a < Q; ++a)
#pragma unroll
      for (int b = 0; b < P; ++b)
#pragma unroll
        for (int i = 0; i < C; ++i) sums->of[a][b][i] = T(0);
  }

  // Places and filters of the channels from c on, into shared memory.
  ZF_HD void fill(const StepTile& tile, uint32_t thread, int32_t c, T* shared) const {
    if constexpr (G::in_shared) {
      const int32_t count = count_from(c);
      T* const filters = shared + plan_.chunk * plan_.layout.plane;
      const int32_t weights = conv_.kernel(0) * conv_.kernel(1) * C;
#pragma unroll 1
      for (uint32_t i = thread; i < uint32_t(count * weights); i += threads()) {
        const uint32_t tap = i / C, channel = i - tap * C;
        const uint32_t row = by_columns_.quotient(tap);  // rows of all channels
        T w = T(0);
        if (int32_t(channel) < out_channels_)
          w = filters_[(int64_t(c) * conv_.kernel(0) * conv_.kernel(1) + tap) * out_channels_ + channel];
        filters[weight_at(int32_t(row), int32_t(by_columns_.remainder(tap, row))) + channel] = w;
      }
      patches_.fill(tile, walk_, thread, threads(), c, count, tile.q[0] - reach_[0], tile.q[1] - reach_[1],
                    plan_.layout, shared);
    }
  }

  // Adds what the channels from c on bring to the thread's outputs.
  ZF_HD void add(const StepTile& tile, uint32_t thread, int32_t c, const T* shared, Sums* sums) const {
    const Lane lane = lane_of(tile, thread);
    if (!lane.busy) return;
    const int32_t count = count_from(c);
    if constexpr (G::known) {
      if (!*not_finite_) {
        if constexpr (G::s == 1) {
          add_known<0, 0>(lane, count, shared, sums);
        } else {
          if (lane.r[0] == 0 && lane.r[1] == 0) add_known<0, 0>(lane, count, shared, sums);
          if (lane.r[0] == 0 && lane.r[1] == 1) add_known<0, 1>(lane, count, shared, sums);
          if (lane.r[0] == 1 && lane.r[1] == 0) add_known<1, 0>(lane, count, shared, sums);
          if (lane.r[0] == 1 && lane.r[1] == 1) add_known<1, 1>(lane, count, shared, sums);
        }
        return;
      }
    }
    add_carefully(tile, lane, c, count, shared, sums);
  }

  ZF_HD void write(const StepTile& tile, uint32_t thread, const Sums& sums) const {
    const Lane lane = lane_of(tile, thread);
    if (!lane.busy) return;
#pragma unroll
    for (int a = 0; a < Q; ++a) {
      const int32_t y = (tile.q[0] + row_of(lane, a)) * conv_.stride(0) + lane.r[0], i = y - tile.shift[0];
      if (i < 0 || i >= size_[0]) continue;
      const bool row_inside = y >= tile.out_begin[0] && y < tile.out_end[0];
#pragma unroll
      for (int b = 0; b < P; ++b) {
        const int32_t x = (tile.q[1] + column_of(lane, b)) * conv_.stride(1) + lane.r[1], j = x - tile.shift[1];
        if (j < 0 || j >= size_[1]) continue;
        const bool inside = row_inside && x >= tile.out_begin[1] && x < tile.out_end[1];
        S* const to = out_.data + (tile.out + i * out_.y + j * out_.x);
#pragma unroll
        for (int k = 0; k < C; ++k)
          if (k < out_channels_) to[k * out_.c] = narrow<S>(inside ? sums.of[a][b][k] : T(0));
      }
    }
  }

 private:
  using Layout = StepLayout<G::known>;
  using Plan = StepPlan<Layout>;
  static constexpr int word = Layout::word;

  struct Lane {
    int32_t y, x;  // among the threads of its class
    int32_t r[2];  // the class
    bool busy;
  };

  // The classes follow each other so that a multiprocessor's four parts, which warps take in turn, share them evenly:
  // with two warps a class of 7x7/2, parts get 16 + 9 and 12 + 12 taps.
  ZF_HD Lane lane_of(const StepTile& tile, uint32_t thread) const {
    const uint32_t slot = by_slots_.quotient(thread), rest = by_slots_.remainder(thread, slot);
    const uint32_t known = G::known ? slot ^ (slot >> 1) : tile.first_class + slot;
    Lane lane;
    lane.r[0] = int32_t(by_stride_[1].quotient(known));
    lane.r[1] = int32_t(by_stride_[1].remainder(known, uint32_t(lane.r[0])));
    lane.y = int32_t(by_lanes_.quotient(rest));
    lane.x = int32_t(by_lanes_.remainder(rest, uint32_t(lane.y)));
    lane.busy = lane.y < plan_.lanes[0] && known < total_classes_;
    return lane;
  }

  // Outputs of a thread, counted in its class from the tile's first. Those of a known geometry are neighbours, to read
  // their places in vectors; of others, neighbouring threads have neighbouring columns.
  ZF_HD int32_t row_of(const Lane& lane, int a) const { return lane.y * Q + a; }
  ZF_HD int32_t column_of(const Lane& lane, int b) const {
    return G::known ? lane.x * P + b : lane.x + b * plan_.lanes[1];
  }

  // Where the weights of a tap begin, for `row` counted over all channels of a chunk. For a known geometry the taps of a
  // class follow each other, each row of them in whole vectors.
  ZF_HD int32_t weight_at(int32_t row, int32_t column) const {
    if constexpr (G::known) return (row * G::s + column % G::s) * row_weights + column / G::s * C;
    return (row * conv_.kernel(1) + column) * C;
  }
  static constexpr int32_t weights_of_taps(int32_t taps) { return (taps * C + word - 1) / word * word; }
  static constexpr int32_t most_taps() {
    if constexpr (G::known) return G::most_taps;
    return 1;
  }
  static constexpr int32_t row_weights = weights_of_taps(most_taps());

  ZF_HD int32_t count_from(int32_t c) const { return channels_ - c < plan_.chunk ? channels_ - c : plan_.chunk; }
  ZF_HD int32_t floor_by_stride(int axis, int32_t n) const {
    if (n >= 0) return int32_t(by_stride_[axis].quotient(uint32_t(n)));
    return -1 - int32_t(by_stride_[axis].quotient(uint32_t(-1 - n)));
  }

  template <int Words>
  static ZF_HD void load_words(const T* from, T (&to)[Words]) {
    static_assert(Words % word == 0, "whole vectors");
#pragma unroll
    for (int i = 0; i < Words; i += word) {
      const Vec<T, word> v = *reinterpret_cast<const Vec<T, word>*>(from + i);
#pragma unroll
      for (int j = 0; j < word; ++j) to[i + j] = v.lane[j];
    }
  }

  // All filters are finite. Row t of the places under the thread reaches row a of its outputs by tap row Ty - 1 - t + a.
  template <int Ry, int Rx>
  ZF_HD void add_known(const Lane& lane, int32_t count, const T* shared, Sums* sums) const {
    constexpr int32_t Ty = (G::k - Ry + G::s - 1) / G::s, Tx = (G::k - Rx + G::s - 1) / G::s;
    constexpr int32_t R = G::most_taps - 1;
    static_assert(R + P <= P + word, "the places under a row of outputs lie in three vectors");
    const T* filters = shared + plan_.chunk * plan_.layout.plane + Rx * row_weights;
    const T* places = shared + lane.y * plan_.layout.pair + lane.x * word;
#pragma unroll 1
    for (int32_t c = 0; c < count; ++c) {
      T weights[Q][row_weights];  // of this row of places, and of the one before, for the outputs one row down
#pragma unroll
      for (int t = 0; t < Q + Ty - 1; ++t) {
        const int row = t + R - (Ty - 1);
        const T* const from = places + (row >> 1) * plan_.layout.pair + (row & 1) * plan_.layout.row;
        T u[P + word];
        T even[word], odd[word], next[word];
        load_words(from, even);
        load_words(from + plan_.layout.odd, odd);
        load_words(from + word, next);
#pragma unroll
        for (int i = 0; i < word; ++i) u[i] = even[i], u[word + i] = odd[i], u[2 * word + i] = next[i];
#pragma unroll
        for (int i = 0; i < row_weights; ++i) weights[1][i] = weights[0][i];
        if (t < Ty) load_words(filters + ((Ty - 1 - t) * G::s + Ry) * G::s * row_weights, weights[0]);
#pragma unroll
        for (int a = 0; a < Q; ++a) {
          const int tap_row = Ty - 1 - t + a;
          if (tap_row < 0 || tap_row >= Ty) continue;
#pragma unroll
          for (int i = 0; i < Tx; ++i)
#pragma unroll
            for (int b = 0; b < P; ++b)
#pragma unroll
              for (int k = 0; k < C; ++k) sums->of[a][b][k] += u[b + R - i] * weights[a][i * C + k];
        }
      }
      places += plan_.layout.plane, filters += plan_.filter;
    }
  }

  // Any geometry, and filters that are not finite: what is exactly zero is not multiplied.
  ZF_HD void add_carefully(const StepTile& tile, const Lane& lane, int32_t first, int32_t count, const T* shared,
                           Sums* sums) const {
#pragma unroll 1
    for (int32_t c = 0; c < count; ++c) {
#pragma unroll 1
      for (ClassTaps row = conv_.taps(0, lane.r[0]); row.more(); row.next()) {
#pragma unroll 1
        for (ClassTaps column = conv_.taps(1, lane.r[1]); column.more(); column.next()) {
          T weights[C];
#pragma unroll
          for (int k = 0; k < C; ++k) weights[k] = weight(shared, first, c, row.tap, column.tap, k);
#pragma unroll
          for (int a = 0; a < Q; ++a)
#pragma unroll
            for (int b = 0; b < P; ++b) {
              const int32_t y = row_of(lane, a) - row.back, x = column_of(lane, b) - column.back;
              const T u = place(tile, shared, first, c, y, x);
#pragma unroll
              for (int k = 0; k < C; ++k)
                sums->of[a][b][k] = u != T(0) ? sums->of[a][b][k] + u * weights[k] : sums->of[a][b][k];
            }
        }
      }
    }
  }

  ZF_HD T weight(const T* shared, int32_t first, int32_t c, int32_t tap_row, int32_t tap_column, int k) const {
    const int32_t row = c * conv_.kernel(0) + tap_row;
    if constexpr (G::in_shared) return shared[plan_.chunk * plan_.layout.plane + weight_at(row, tap_column) + k];
    if (k >= out_channels_) return T(0);
    const int64_t tap = (int64_t(first) * conv_.kernel(0) + row) * conv_.kernel(1) + tap_column;
    return filters_[tap * out_channels_ + k];
  }
  // The place (y, x), counted from the tile's first outputs.
  ZF_HD T place(const StepTile& tile, const T* shared, int32_t first, int32_t c, int32_t y, int32_t x) const {
    if constexpr (G::in_shared) {
      const Layout& layout = plan_.layout;
      return shared[c * layout.plane + layout.row_at(y + reach_[0]) + layout.column_at(x + reach_[1])];
    }
    return patches_.value(tile, first + c, tile.q[0] + y, tile.q[1] + x);
  }

  // ---- The plan

  static int64_t reach(const Window& conv, int axis) {
    return (conv.kernel[axis] - 1) * conv.dilation[axis] / conv.stride[axis];
  }
  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  // A tile of `rows` x `columns` threads a class.
  Plan plan_of(const DeconvStep& op, int64_t slots, int64_t rows, int64_t columns, int64_t shared_limit) const {
    const int64_t all_classes = op.conv.stride[0] * op.conv.stride[1];
    Plan plan{};
    plan.lanes[0] = int32_t(rows), plan.lanes[1] = int32_t(columns);
    plan.slots = uint32_t(slots);
    plan.classes = uint32_t(all_classes < threads_per_block / slots ? all_classes : threads_per_block / slots);
    plan.groups = ceil_div(all_classes, plan.classes);
    plan.cost = std::numeric_limits<double>::infinity();
    const int64_t outputs[2] = {rows * Q, columns * P};
    int64_t area[2], filter = op.conv.taps() * C, chunk = op.signal.c();
    for (int axis = 0; axis < 2; ++axis) {
      area[axis] = outputs[axis] + reach(op.conv, axis);
      plan.tiles[axis] = ceil_div(quotients(op, axis), outputs[axis]);
    }
    if (G::known) filter = op.conv.kernel[0] * op.conv.stride[1] * row_weights;
    if (G::in_shared) {
      constexpr int64_t lanes = StepPatches<S>::V, most = 32;
      if (area[0] > shared_limit || area[1] > shared_limit / area[0] || filter > shared_limit) return plan;
      plan.layout = Layout(int32_t(area[0]), int32_t(area[1]), int32_t(columns));
      plan.filter = int32_t(filter);
      const int64_t channel_bytes = (plan.layout.plane + filter) * int64_t(sizeof(T));
      if (lanes * channel_bytes > shared_limit) return plan;
      // Two large blocks to a multiprocessor, or three small ones: the limit is for two.
      const bool small = plan.slots * plan.classes <= threads_per_block / 2;
      const int64_t room = (small ? shared_limit * 2 / 3 - 512 : shared_limit) / channel_bytes;
      const int64_t wanted = ceil_div(op.signal.c() < most ? op.signal.c() : most, lanes) * lanes;
      chunk = room < lanes ? lanes : room < wanted ? room / lanes * lanes : wanted;
    }
    plan.chunk = int32_t(chunk);
    // A place costs about as many instructions to fill as 40 multiply-adds; more where a chunk is less than a sector of
    // memory (32 bytes), which then is read again for the next.
    const double place = plan.chunk < op.signal.c() && plan.chunk * int64_t(sizeof(S)) < 32 ? 120 : 40;
    const double taps = double(op.conv.taps()) / double(all_classes);
    const double threads = double(plan.slots * plan.classes) * double(plan.groups);
    plan.cost = double(plan.tiles[0]) * double(plan.tiles[1]) *
                (threads * (Q * P * C * taps + 8) + (G::in_shared ? place * double(area[0] * area[1]) : 0.0));
    return plan;
  }

  // Outputs of a class along an axis, the one more included that a result which begins between two of them meets.
  static int64_t quotients(const DeconvStep& op, int axis) {
    const int64_t s = op.conv.stride[axis], n = op.out.size[axis + 2];
    return op.whole ? (n + s - 2) / s + 1 : ceil_div(n, s);
  }

  // The tiling that costs least, idle threads and places shared between tiles included.
  Plan best_plan(const DeconvStep& op, int64_t shared_limit) const {
    const int64_t all_classes = op.conv.stride[0] * op.conv.stride[1];
    const int64_t classes = all_classes < threads_per_block ? all_classes : threads_per_block;
    Plan best{};
    best.cost = std::numeric_limits<double>::infinity();
    const int64_t most = threads_per_block / classes;
    const int64_t needed[2] = {ceil_div(quotients(op, 0), Q), ceil_div(quotients(op, 1), P)};
    for (int64_t slots = most;; slots /= 2) {
      for (int64_t columns = 1; columns <= slots && columns <= needed[1]; ++columns) {
        const int64_t rows = slots / columns < needed[0] ? slots / columns : needed[0];
        const Plan plan = plan_of(op, slots, rows, columns, shared_limit);
        if (plan.cost < best.cost) best = plan;
      }
      // Smaller blocks would leave a multiprocessor's threads idle. And known classes keep to whole warps, in which all
      // threads take the same taps.
      if (slots * classes < threads_per_block || slots < (G::known ? 64 : 2)) return best;
    }
  }

  G conv_;
  StepPatches<S> patches_;
  Strided<S, int64_t> out_;
  const int64_t *image_, *origin_, *frame_;
  const T* filters_;
  const uint8_t* not_finite_;
  int32_t channels_, out_channels_;
  bool whole_;
  Plan plan_;
  StepWalk walk_;
  int32_t size_[2], below_[2], padding_[2], reach_[2];
  Divisor by_stride_[2], by_tiles_[3], by_slots_, by_lanes_, by_columns_;
  uint32_t total_classes_ = 0;
  int64_t blocks_ = 0;
};

// Places and outputs are counted in 32 bits, and so is every product on the way from one to the other.
inline bool counts_in_32_bits(const DeconvStep& op) {
  constexpr double limit = 1 << 30;
  for (int axis = 0; axis < 2; ++axis) {
    const double size = double(op.signal.size[axis + 2]), map = double(op.map[axis]), below = double(op.below[axis]);
    const double windows = op.switches.data ? double(op.switches.size[axis + 2]) : map;
    const double corner = size > windows ? size : windows;
    const double pool = double(op.pool.kernel[axis]) * double(op.pool.dilation[axis]) + double(op.pool.padding[axis]) +
                        double(op.pool.stride[axis]);
    const double conv = double(op.conv.kernel[axis]) * double(op.conv.dilation[axis]) + double(op.conv.padding[axis]);
    const double places = (corner + size) * double(op.pool.stride[axis]) + pool + map;
    const double tile = threads_per_block * 8, out = double(op.out.size[axis + 2]);
    if ((places + tile) * double(op.conv.stride[axis]) + conv + below + out > limit) return false;
  }
  return double(op.signal.c()) * double(op.conv.taps()) * most_cuda_channels < limit &&
         double(op.conv.stride[0]) * double(op.conv.stride[1]) < limit;
}

// Calls launch(body) for the launch that the op takes; it runs the body's phases on every block. shared_limit: the bytes
// of shared memory that a block may take.
template <class Launch>
void deconv_step(const DeconvStep& op, int64_t shared_limit, const Launch& launch) {
  if (op.out.numel() == 0) return;
  if (op.groups != 1 || op.out.c() > most_cuda_channels)
    throw std::invalid_argument("zfcore: the CUDA kernel of deconv_step takes one group and at most 4 channels out");
  if (!counts_in_32_bits(op)) throw std::runtime_error("zfcore: a patch or map is longer than 32 bits can count");
  for_float_storage(op.signal.dtype, [&](auto storage) {
    using S = TypeIn<decltype(storage)>;
    const auto with = [&](auto channels, auto geometry) {
      const DeconvTile<S, decltype(channels)::value, TypeIn<decltype(geometry)>> body(op, shared_limit);
      if (!body.fits()) return false;
      launch(body);
      return true;
    };
    const auto with_channels = [&](auto channels) {
      if constexpr (decltype(channels)::value == 3 && sizeof(S) <= 4) {
        if (FixedConv<7, 2>::is(op.conv) && with(channels, Type<FixedConv<7, 2>>{})) return;
        if (FixedConv<3, 1>::is(op.conv) && with(channels, Type<FixedConv<3, 1>>{})) return;
      }
      if (with(channels, Type<AnyConv>{})) return;
      with(std::integral_constant<int, most_cuda_channels>{}, Type<FarConv>{});
    };
    if (op.out.c() == 1) return with_channels(std::integral_constant<int, 1>{});
    if (op.out.c() <= 3) return with_channels(std::integral_constant<int, 3>{});
    with_channels(std::integral_constant<int, most_cuda_channels>{});
  });
}

}  // namespace gpu
}  // namespace zf
