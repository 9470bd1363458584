// CPU kernel of conv_delta. The contract is in the header.
//
// Work: of a patch's h*w*C values those that changed, times the taps that reach an output, times K/groups multiply-adds.
// After a ReLU about half of the values did not change, since what is inactive with the box mostly is without it.
// Least traffic: the patches in, the filters once for a group of patches, the clean outputs and the results.
//
// How: a matrix product whose rows are patches. Rows of a tile are patches that hold the same pixel of the map, so they
// see it through the same taps, and mostly the same channels of it changed: a tile lists the channels in which any of
// its rows did, and its values are packed once, channel after channel. The product of a tile with one tap's filters, a
// block of outputs wide, stays in registers while the list is walked, then adds to the rows' outputs at that tap.
// Filters of a tap and a block of outputs stay in the first-level cache while all tiles of a group of patches pass by;
// the group's values and its sums for the block of outputs stay in the second level where they fit.
//
// Where a window has few values (the picture's three channels), a pixel is a whole window: its channels are all values
// under it, and there is one tap.
//
// The sum of an output runs over taps, blocks of channels and channels, in that order and whatever the groups, the
// tiles and the threads (what the others of a tile add is a product with zero), so the bits are always the same.
#include "conv_delta.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "rectify.h"
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

constexpr int most_rows = ZF_VECTOR_BYTES == 64 ? 12 : 6;  // of a tile: two vectors each, and two of filters, in registers
constexpr int64_t near_bytes = 28 << 10;                   // filters that stay in the first-level cache
constexpr int64_t values_bytes = 512 << 10;                // values of a group of patches, in the second-level cache
constexpr int64_t window_values = 512;                     // of a window that is taken as one pixel, at most
constexpr int64_t most_patches = 384;                      // of a group

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a filter, and a value that it is multiplied with, is kept as: a number of type T; or, narrow, two channels' bf16
// in one word, the first in the lower half.
template <class T, bool Narrow>
struct Unit {
  typedef T type;
};
template <class T>
struct Unit<T, true> {
  typedef uint32_t type;
};

inline uint32_t narrow_pair(float first, float second) {
  bf16 low, high;
  from_compute(first, &low);
  from_compute(second, &high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// Filters [group][block of outputs][tap][unit][width].
template <class T, bool Narrow>
struct Filters {
  typedef typename Unit<T, Narrow>::type U;
  static constexpr int64_t width = 2 * Vec<T>::lanes;
  int64_t groups, outputs, inputs, window;  // outputs and channels of a group, and taps, as the weight has them

  // Few values under a window: the window is a pixel, its values are channels, and there is one tap.
  bool by_window = inputs < 16 && inputs * window <= window_values;
  int64_t channels = by_window ? inputs * window : inputs, taps = by_window ? 1 : window;
  int64_t units = Narrow ? up(channels, 2) : channels;
  int64_t blocks = up(outputs, width);

  Filters(const View& weight, int64_t groups)
      : groups(groups), outputs(weight.size[0] / groups), inputs(weight.size[1]), window(weight.size[2] * weight.size[3]) {}
  Filters(int64_t groups, int64_t outputs, int64_t inputs, int64_t window)
      : groups(groups), outputs(outputs), inputs(inputs), window(window) {}

  int64_t block_elements() const { return taps * units * width; }
  int64_t bytes() const { return groups * blocks * block_elements() * int64_t(sizeof(U)); }

  bool pack(const View& weight, const T* scale, U* filters, int threads) const {
    std::vector<char> finite(size_t(groups * blocks), 1);
    parallel_for(groups * blocks, 65536 / block_elements() + 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block / blocks * outputs + block % blocks * width;
        const int64_t some = std::min(width, outputs - block % blocks * width);
        U* p = filters + block * block_elements();
        T poison = 0;  // NaN once anything is not finite
        for (int64_t unit = 0; unit < units; ++unit)
          for (int64_t i = 0; i < width; ++i) {
            const T* source = static_cast<const T*>(weight.data) + (first + i) * inputs * window;
            const T factor = i < some && scale ? scale[first + i] : T(1);
            const auto at = [&](int64_t channel, int64_t tap) {
              if (i >= some || channel >= channels) return T(0);
              const int64_t e = by_window ? channel % inputs * window + channel / inputs : channel * window + tap;
              const T value = source[e] * factor;
              poison += value * 0;
              return value;
            };
            U* q = p + unit * width + i;
            for (int64_t t = 0; t < taps; ++t)
              if constexpr (Narrow)
                q[t * units * width] = narrow_pair(at(2 * unit, t), at(2 * unit + 1, t));
              else
                q[t * units * width] = at(unit, t);
          }
        finite[size_t(block)] = poison == 0;
      }
    });
    return std::all_of(finite.begin(), finite.end(), [](char f) { return f != 0; });
  }
};

// sum + v * f, of one number or of the two that a word holds.
template <class T>
inline typename Vec<T>::type add_product(typename Vec<T>::type sum, T v, typename Vec<T>::type f) {
  return sum + splat(v) * f;
}
typedef uint32_t Words __attribute__((vector_size(ZF_VECTOR_BYTES)));
inline Vec<float>::type add_product(Vec<float>::type sum, uint32_t v, Words f) {
  typedef Vec<float>::type V;
  sum += splat(bits_to_float(v << 16)) * reinterpret_cast<V>(f << 16);
  return sum + splat(bits_to_float(v & 0xffff0000u)) * reinterpret_cast<V>(f & 0xffff0000u);
}
template <class T>
inline typename Vec<T>::type load_units(const T* p) {
  return load_vector(p);
}
inline Words load_units(const uint32_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// The body of the two functions below: one is compiled for instructions that the rest of this file may not have, and what
// it calls would not be inlined into a function without them.
#define ZF_MULTIPLY(add)                                                                            \
  typedef typename Vec<T>::type V;                                                                  \
  constexpr int lanes = Vec<T>::lanes;                                                              \
  V sum[Rows][2];                                                                                   \
  _Pragma("GCC unroll 16") for (int r = 0; r < Rows; ++r)                                           \
    for (int j = 0; j < 2; ++j) sum[r][j] = load_vector(sums[r] + j * lanes);                       \
  int64_t k = 0;                                                                                    \
  do { /* of no empty list, for which the sums would have to be kept twice */                       \
    const U* f = filters + offset[k];                                                               \
    const auto f0 = load_units(f), f1 = load_units(f + lanes);                                      \
    _Pragma("GCC unroll 16") for (int r = 0; r < Rows; ++r) {                                       \
      const U v = value[k * Rows + r];                                                              \
      sum[r][0] = add(sum[r][0], v, f0);                                                            \
      sum[r][1] = add(sum[r][1], v, f1);                                                            \
    }                                                                                               \
  } while (++k < count);                                                                            \
  _Pragma("GCC unroll 16") for (int r = 0; r < Rows; ++r)                                           \
    for (int j = 0; j < 2; ++j) store_vector(sums[r] + j * lanes, sum[r][j]);

// Adds to each row's two vectors of sums the products of its values with the listed filters, at least one.
template <class T, class U, int Rows>
void multiply(const U* filters, const U* value, const int32_t* offset, int64_t count, T* const* sums) {
  ZF_MULTIPLY(add_product)
}

#if ZF_VECTOR_BYTES == 64 && defined(__GNUC__) && (__GNUC__ >= 10 || defined(__clang__))
#define ZF_DOT_BF16 1
#define ZF_WITH_BF16 __attribute__((target("avx512bf16")))
// The same by the instruction for it, on CPUs that have it.
ZF_WITH_BF16 inline Vec<float>::type add_dot(Vec<float>::type sum, uint32_t v, Words f) {
  return reinterpret_cast<Vec<float>::type>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)_mm512_set1_epi32(int32_t(v)), (__m512bh)f));
}
template <class T, class U, int Rows>
ZF_WITH_BF16 void multiply_bf16(const U* filters, const U* value, const int32_t* offset, int64_t count, T* const* sums) {
  ZF_MULTIPLY(add_dot)
}
#endif

template <class T, class U>
using MultiplyFn = void (*)(const U*, const U*, const int32_t*, int64_t, T* const*);

template <class T, class U, int Rows>
void fill_multiply(MultiplyFn<T, U>* by_rows) {
  if constexpr (Rows > 0) {
    by_rows[Rows] = &multiply<T, U, Rows>;
#if defined(ZF_DOT_BF16)
    if constexpr (std::is_same<U, uint32_t>::value)
      if (cpu_features().avx512_bf16) by_rows[Rows] = &multiply_bf16<T, U, Rows>;
#endif
    fill_multiply<T, U, Rows - 1>(by_rows);
  }
}

// Whether v changes anything: zero and minus zero do not, NaN does.
template <class T>
inline bool counts(T v) {
  return v != T(0);
}

// Throws where a patch is not inside its map, or reaches outputs outside of the result.
inline void check(const ConvDelta& op) {
  const Window& conv = op.conv;
  const int64_t size[2] = {op.delta.h(), op.delta.w()}, out[2] = {op.out.h(), op.out.w()};
  for (int64_t b = 0; b < op.delta.n(); ++b)
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t i = op.origin[2 * b + axis], o = op.out_origin[2 * b + axis];
      bool fits = i >= 0 && i <= op.map[axis] - size[axis] && o >= 0 && o <= op.above[axis] - out[axis];
      if (fits) {
        const int64_t s = conv.stride[axis], reach = conv.dilation[axis] * (conv.kernel[axis] - 1);
        const int64_t low = i + conv.padding[axis] - reach, high = i + size[axis] - 1 + conv.padding[axis];
        const int64_t first = low > 0 ? up(low, s) : 0;
        const int64_t last = high < 0 ? -1 : std::min(high / s, op.above[axis] - 1);
        fits = first > last || (first >= o && last < o + out[axis]);
      }
      if (!fits)
        throw std::invalid_argument("conv_delta: patch " + std::to_string(b) +
                                    " is not inside its map, or reaches outputs outside of its result");
    }
}

template <class T, bool Narrow>
struct Engine {
  typedef typename Vec<T>::type V;
  typedef typename Vec<T>::mask M;
  typedef typename Unit<T, Narrow>::type U;
  static constexpr int lanes = Vec<T>::lanes;
  static constexpr int64_t width = Filters<T, Narrow>::width, each = Narrow ? 2 : 1;  // channels of a unit

  const ConvDelta& op;
  const Window& conv = op.conv;
  const int64_t group_in = op.delta.c() / op.groups, group_out = op.out.c() / op.groups;
  const Filters<T, Narrow> filters{op.groups, group_out, group_in, conv.taps()};
  const bool by_window = filters.by_window;
  const int64_t channels = filters.channels, units = filters.units, taps = filters.taps;  // of a group of a pixel
  const int64_t pixels_h = by_window ? op.out.h() : op.delta.h(), pixels_w = by_window ? op.out.w() : op.delta.w();
  const int64_t* const corner = by_window ? op.out_origin : op.origin;
  const int64_t cuts = up(units, std::max(int64_t(1), near_bytes / (width * int64_t(sizeof(U)))));
  const int64_t cut = up(units, cuts);  // units whose filters are near at once
  const int64_t parts = op.groups * cuts;
  const int64_t places = op.out.h() * op.out.w();
  std::vector<int32_t> reached[2];  // [pixel of the map][tap of the axis]: the output, or -1
  MultiplyFn<T, U> by_rows[most_rows + 1] = {};

  struct Tile {
    int32_t y, x, rows;
    int32_t patch[most_rows];
    int64_t place[most_rows];  // where the sums of the map's output (0, 0) would lie, in widths
    int64_t first, values;     // in the lists of channels, and of values
  };

  // A tile that reaches outputs by a tap.
  struct Hit {
    int32_t tile, shift;  // from the tile's places to the outputs
  };

  // A thread's memory.
  struct Memory {
    U* value;
    int32_t* offset;  // of a listed unit's filter, from the part's first
    int64_t* end;     // [tile][part]: where its list ends
    Tile* tile;
    Hit* hit;         // of tap after tap
    int64_t* hits;    // [taps + 1]: where those of a tap begin
    T* sum;           // [patch][place][width]
    T* row;           // [row][channels of all groups], windows
  };

  explicit Engine(const ConvDelta& op) : op(op) {
    fill_multiply<T, U, most_rows>(by_rows);
    for (int axis = 0; axis < 2; ++axis) {
      if (by_window) {
        for (int64_t o = 0; o < op.above[axis]; ++o) reached[axis].push_back(int32_t(o));
        continue;
      }
      for (int64_t i = 0; i < op.map[axis]; ++i)
        for (int64_t t = 0; t < conv.kernel[axis]; ++t) {
          const int64_t at = i + conv.padding[axis] - t * conv.dilation[axis];
          const bool hits = at >= 0 && at % conv.stride[axis] == 0 && at / conv.stride[axis] < op.above[axis];
          reached[axis].push_back(hits ? int32_t(at / conv.stride[axis]) : -1);
        }
    }
  }

  int64_t group_size(int threads) const {
    const int64_t count = op.delta.n();
    const int64_t bytes = pixels_h * pixels_w * units * op.groups * int64_t(sizeof(U));
    // As many patches as keep their values near; and no fewer than pay for bringing the filters in, which are then
    // read once for the group.
    int64_t size = std::max(values_bytes / bytes, filters.bytes() / values_bytes);
    size = std::min(up(std::max(size, int64_t(1)), most_rows) * most_rows, most_patches);
    const int64_t tasks = up(up(count, size), threads) * threads;  // all threads finish together
    return std::max(int64_t(1), std::min(size, up(count, tasks)));
  }

  // The most taps by which a pixel reaches outputs.
  int64_t hits_of_pixel() const {
    int64_t product = 1;
    for (int axis = 0; axis < 2 && !by_window; ++axis) {
      int64_t most = 0;
      for (int64_t i = 0; i < op.map[axis]; ++i) {
        const auto begin = reached[axis].begin() + i * conv.kernel[axis], end = begin + conv.kernel[axis];
        most = std::max(most, int64_t(std::count_if(begin, end, [](int32_t o) { return o >= 0; })));
      }
      product *= most;
    }
    return product;
  }

  static int64_t rounded(int64_t bytes) { return up(bytes, 64) * 64; }

  void operator()(int threads) const {
    const int64_t count = op.delta.n(), size = group_size(threads);
    const int64_t pixels = size * pixels_h * pixels_w, all = units * op.groups;
    const int64_t bytes[8] = {rounded((pixels * all + lanes) * int64_t(sizeof(U))), rounded((pixels * all + 16) * 4),
                              rounded(pixels * parts * 8), rounded(pixels * int64_t(sizeof(Tile))),
                              rounded(pixels * hits_of_pixel() * int64_t(sizeof(Hit))), rounded((taps + 1) * 8),
                              rounded(size * places * width * int64_t(sizeof(T))),
                              rounded(by_window ? most_rows * channels * op.groups * int64_t(sizeof(T)) : 0)};
    int64_t total = 0;
    for (int64_t part : bytes) total += part;
    parallel_for(up(count, size), 1, threads, [&](int64_t begin, int64_t end) {
      char* p = static_cast<char*>(thread_scratch(0, total));
      char* at[8];
      for (int i = 0; i < 8; ++i) at[i] = p, p += bytes[i];
      const Memory memory{reinterpret_cast<U*>(at[0]),       reinterpret_cast<int32_t*>(at[1]),
                          reinterpret_cast<int64_t*>(at[2]), reinterpret_cast<Tile*>(at[3]),
                          reinterpret_cast<Hit*>(at[4]),     reinterpret_cast<int64_t*>(at[5]),
                          reinterpret_cast<T*>(at[6]),       reinterpret_cast<T*>(at[7])};
      for (int64_t task = begin; task < end; ++task) run(task * size, std::min(size, count - task * size), memory);
    });
  }

  void run(int64_t first, int64_t some, const Memory& memory) const {
    find_hits(tile_up(first, some, memory), memory);
    for (int64_t group = 0; group < op.groups; ++group)
      for (int64_t block = 0; block < filters.blocks; ++block) {
        std::memset(memory.sum, 0, size_t(some * places * width) * sizeof(T));
        accumulate(group, block, memory);
        finish(first, some, group, block, memory);
      }
  }

  // The patches out of `among` that hold pixel `at` of an axis, and where the next pixel that any of them holds is: what
  // lies between patches that are far from each other is not walked through.
  struct Holding {
    int32_t patch[most_patches];
    int64_t count = 0, next = 0;
  };
  template <class Among>
  void hold(int64_t first, int axis, int64_t at, int64_t pixels, int64_t among, const Among& patch, Holding& held) const {
    held.count = 0;
    held.next = std::numeric_limits<int64_t>::max();
    for (int64_t i = 0; i < among; ++i) {
      const int64_t away = at - corner[2 * (first + patch(i)) + axis];
      if (away >= 0 && away < pixels) held.patch[held.count++] = int32_t(patch(i));
      if (away < pixels - 1) held.next = std::min(held.next, std::max(at + 1, at - away));
    }
  }

  // The tiles of patches [first, first + some), their values packed. Returns how many.
  int64_t tile_up(int64_t first, int64_t some, const Memory& memory) const {
    constexpr int64_t none = std::numeric_limits<int64_t>::max();
    int64_t tiles = 0, listed = 0, packed = 0, top = none;
    for (int64_t b = first; b < first + some; ++b) top = std::min(top, corner[2 * b]);
    Holding row, holding;
    for (int64_t y = top; y != none; y = row.next) {
      hold(first, 0, y, pixels_h, some, [](int64_t i) { return i; }, row);
      int64_t left = none;
      for (int64_t i = 0; i < row.count; ++i) left = std::min(left, corner[2 * (first + row.patch[i]) + 1]);
      for (int64_t x = left; x != none; x = holding.next) {
        hold(first, 1, x, pixels_w, row.count, [&](int64_t i) { return int64_t(row.patch[i]); }, holding);
        const int64_t held = holding.count;
        const int64_t split = up(held, most_rows);  // into tiles of near-equal heights
        for (int64_t s = 0, done = 0; s < split; ++s) {
          const int64_t rows = (held - done + split - s - 1) / (split - s);
          Tile& tile = memory.tile[tiles];
          tile.y = int32_t(y), tile.x = int32_t(x), tile.rows = int32_t(rows);
          tile.first = listed, tile.values = packed;
          std::copy_n(holding.patch + done, rows, tile.patch);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t* origin = op.out_origin + 2 * (first + tile.patch[r]);
            tile.place[r] = tile.patch[r] * places - origin[0] * op.out.w() - origin[1];
          }
          pack_tile(first, tile, memory, memory.end + tiles * parts, &listed, &packed);
          done += rows;
          ++tiles;
        }
      }
    }
    return tiles;
  }

  const T* pixel(int64_t b, int64_t y, int64_t x) const {
    return at<T>(op.delta, b, 0, y - op.origin[2 * b], x - op.origin[2 * b + 1]);
  }

  // All values under the window of an output, [group][tap][channel]; zero where the patch does not lie under it.
  void gather_window(int64_t b, int64_t y, int64_t x, T* row) const {
    const int64_t* origin = op.origin + 2 * b;
    const int64_t left = x * conv.stride[1] - conv.padding[1] - origin[1];
    std::memset(row, 0, size_t(channels * op.groups) * sizeof(T));
    for (int64_t i = 0; i < conv.kernel[0]; ++i) {
      const int64_t dy = y * conv.stride[0] - conv.padding[0] + i * conv.dilation[0] - origin[0];
      if (dy < 0 || dy >= op.delta.h()) continue;
      T* q = row + i * conv.kernel[1] * group_in;
      if (conv.dilation[1] == 1 && op.groups == 1 && op.delta.stride[3] == group_in) {  // the taps of a row are a run
        const int64_t begin = std::max(int64_t(0), -left), end = std::min(conv.kernel[1], op.delta.w() - left);
        if (begin < end)
          std::copy_n(at<T>(op.delta, b, 0, dy, left + begin), (end - begin) * group_in, q + begin * group_in);
        continue;
      }
      for (int64_t j = 0; j < conv.kernel[1]; ++j) {
        const int64_t dx = left + j * conv.dilation[1];
        if (dx < 0 || dx >= op.delta.w()) continue;
        const T* p = at<T>(op.delta, b, 0, dy, dx);
        for (int64_t group = 0; group < op.groups; ++group)
          std::copy_n(p + group * group_in, group_in, q + group * channels + j * group_in);
      }
    }
  }

  void pack_tile(int64_t first, const Tile& tile, const Memory& memory, int64_t* end, int64_t* listed,
                 int64_t* packed) const {
    const T* row[most_rows];
    for (int r = 0; r < tile.rows; ++r) {
      if (by_window) {
        T* gathered = memory.row + r * channels * op.groups;
        gather_window(first + tile.patch[r], tile.y, tile.x, gathered);
        row[r] = gathered;
      } else {
        row[r] = pixel(first + tile.patch[r], tile.y, tile.x);
      }
    }
    for (int64_t group = 0; group < op.groups; ++group)
      for (int64_t piece = 0; piece < cuts; ++piece) {
        const int64_t begin = group * channels + piece * cut * each;
        const int64_t stop = group * channels + std::min((piece + 1) * cut * each, channels);
        int32_t* const list = memory.offset + *listed;
        int64_t found = 0, c = begin;
        for (; c + lanes <= stop; c += lanes) {
          M changed{};
          for (int r = 0; r < tile.rows; ++r) changed |= load_vector(row[r] + c) != V{};
          for (int64_t i = 0; i < lanes; i += each) {
            list[found] = int32_t(c + i);
            found += (changed[i] | changed[i + each - 1]) != 0;
          }
        }
        for (; c < stop; c += each) {
          bool changed = false;
          for (int r = 0; r < tile.rows; ++r)
            for (int64_t i = c; i < std::min(c + each, stop); ++i) changed |= counts(row[r][i]);
          list[found] = int32_t(c);
          found += changed;
        }
        U* value = memory.value + *packed;
        for (int64_t k = 0; k < found; ++k) {
          const int64_t channel = list[k];
          for (int r = 0; r < tile.rows; ++r)
            if constexpr (Narrow)
              value[k * tile.rows + r] =
                  narrow_pair(row[r][channel], channel + 1 < stop ? row[r][channel + 1] : T(0));
            else
              value[k * tile.rows + r] = row[r][channel];
          list[k] = int32_t((channel - begin) / each * width);
        }
        *listed += found;
        *packed += found * tile.rows;
        *end++ = *listed;
      }
  }

  void find_hits(int64_t tiles, const Memory& memory) const {
    const int64_t taps_h = by_window ? 1 : conv.kernel[0], taps_w = by_window ? 1 : conv.kernel[1];
    int64_t found = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      memory.hits[tap] = found;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t y = reached[0][size_t(memory.tile[i].y * taps_h + tap / taps_w)];
        const int64_t x = reached[1][size_t(memory.tile[i].x * taps_w + tap % taps_w)];
        if (y >= 0 && x >= 0) memory.hit[found++] = {int32_t(i), int32_t(y * op.out.w() + x)};
      }
    }
    memory.hits[taps] = found;
  }

  void accumulate(int64_t group, int64_t block, const Memory& memory) const {
    const U* const near = static_cast<const U*>(op.filters) + (group * filters.blocks + block) * filters.block_elements();
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t piece = 0; piece < cuts; ++piece) {
        const int64_t p = group * cuts + piece, count = memory.hits[tap + 1] - memory.hits[tap];
        const U* const part = near + (tap * units + piece * cut) * width;
        const char* next = reinterpret_cast<const char*>(part + cut * width);  // what is needed after this part
        const int64_t slice = up(cut * width * int64_t(sizeof(U)), std::max(count, int64_t(1)) * 64) * 64;
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t byte = 0; byte < slice; byte += 64, next += 64) __builtin_prefetch(next, 0, 2);
          const Hit& hit = memory.hit[memory.hits[tap] + i];
          const Tile& tile = memory.tile[hit.tile];
          const int64_t* end = memory.end + hit.tile * parts + p;
          const int64_t begin = p ? end[-1] : tile.first;
          T* sums[most_rows];
          for (int r = 0; r < tile.rows; ++r) sums[r] = memory.sum + (tile.place[r] + hit.shift) * width;
          if (*end > begin)
            by_rows[tile.rows](part, memory.value + tile.values + (begin - tile.first) * tile.rows,
                               memory.offset + begin, *end - begin, sums);
        }
      }
  }

  // The sums of a block of outputs, rectified about the clean ones, into the result.
  void finish(int64_t first, int64_t some, int64_t group, int64_t block, const Memory& memory) const {
    const int64_t channel = group * group_out + block * width, wide = std::min(width, group_out - block * width);
    const bool rectify = op.clean.data != nullptr;
    for (int64_t b = 0; b < some; ++b)
      for (int64_t y = 0; y < op.out.h(); ++y)
        for (int64_t x = 0; x < op.out.w(); ++x) {
          const T* sum = memory.sum + (b * places + y * op.out.w() + x) * width;
          T* out = at_mut<T>(op.out, first + b, channel, y, x);
          const int64_t* origin = op.out_origin + 2 * (first + b);
          const T* z = rectify ? at<T>(op.clean, op.image[first + b], channel, y + origin[0], x + origin[1]) : nullptr;
          if (rectify)
            rectify_change(op.rectifier, z, sum, out, wide);
          else
            std::copy_n(sum, wide, out);
        }
  }
};

// A filter of its own for each channel: no product of matrices, but one of vectors over channels.
// Filters [tap][channel], channels filled up with zeros to whole vectors.
//
// Work: 2 * taps operations a value of the result, at one load of a change each. Least traffic: the patches in, the results
// out, and the clean outputs where there is a rectifier.
//
// How: the rows of a patch that a row of outputs reads are kept in a ring, each with zeros left and right for what lies
// outside of the patch, so that nothing is asked where it is multiplied. A tap's filters, loaded once, serve up to eight
// neighbouring outputs, whose sums stay in registers from the first tap to the rectifier. Channels are taken in chunks of
// which the whole ring stays in the first-level cache. Sums run over taps in order, so the bits are always the same.
bool is_depthwise(int64_t outputs, int64_t inputs, int64_t groups) {
  return groups > 1 && inputs == 1 && outputs == groups;
}

template <class T>
struct Depthwise {
  typedef typename Vec<T>::type V;
  static constexpr int64_t lanes = Vec<T>::lanes, line = 64 / int64_t(sizeof(T));
  static constexpr int most_outputs = 8;
  static constexpr int64_t ring_bytes = 24 << 10;  // of a chunk of channels

  const ConvDelta& op;
  const Window& conv = op.conv;
  const int64_t channels = op.out.c(), filled = up(channels, lanes) * lanes;
  const int64_t pitch = (up(channels, line) | 1) * line;  // of pixels in the ring: neighbours in other sets of a cache
  const int64_t columns = (op.out.w() - 1) * conv.stride[1] + conv.dilation[1] * (conv.kernel[1] - 1) + 1;
  const int64_t rows = conv.dilation[0] * (conv.kernel[0] - 1) + 1;
  const int64_t step = conv.stride[1] * pitch, tap_step = conv.dilation[1] * pitch;
  const int64_t vector_ring = conv.kernel[0] * columns * lanes * int64_t(sizeof(T));
  const int64_t chunk = std::max(int64_t(1), ring_bytes / vector_ring) * lanes;

  // A row of the patch under a row of filters.
  struct Row {
    const T *value, *filter;
  };

  // The row of the patch that comes next, brought near while another is multiplied.
  struct Ahead {
    const char *next, *end;
    int64_t slice;
    void bring() {
      for (const char* stop = std::min(next + slice, end); next < stop; next += 64) __builtin_prefetch(next, 0, 3);
    }
  };

  explicit Depthwise(const ConvDelta& op) : op(op) {}

  static int64_t bytes(const View& weight) {
    return weight.size[2] * weight.size[3] * up(weight.size[0], lanes) * lanes * int64_t(sizeof(T));
  }

  static bool pack(const View& weight, const T* scale, T* filters) {
    const int64_t taps = weight.size[2] * weight.size[3], channels = weight.size[0];
    const int64_t filled = up(channels, lanes) * lanes;
    std::memset(filters, 0, size_t(bytes(weight)));
    T poison = 0;  // NaN once anything is not finite
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const T value = static_cast<const T*>(weight.data)[c * taps + t] * (scale ? scale[c] : T(1));
        filters[t * filled + c] = value;
        poison += value * 0;
      }
    return poison == 0;
  }

  void operator()(int threads) const {
    const int64_t ring_size = rows * columns * pitch * int64_t(sizeof(T));
    parallel_for(op.delta.n(), 1, threads, [&](int64_t begin, int64_t end) {
      char* const memory = static_cast<char*>(thread_scratch(0, ring_size + conv.kernel[0] * int64_t(sizeof(Row))));
      T* const ring = reinterpret_cast<T*>(memory);
      std::memset(memory, 0, size_t(ring_size));
      for (int64_t b = begin; b < end; ++b) run(b, ring, reinterpret_cast<Row*>(memory + ring_size));
    });
  }

  void run(int64_t b, T* ring, Row* under) const {
    const int64_t *origin = op.origin + 2 * b, *corner = op.out_origin + 2 * b;
    const int64_t left = corner[1] * conv.stride[1] - conv.padding[1] - origin[1];
    const int64_t begin = std::min(std::max(-left, int64_t(0)), columns);
    const int64_t end = std::max(std::min(op.delta.w() - left, columns), begin);  // of the columns that the patch has
    for (int64_t r = 0; r < rows; ++r) {
      T* const row = ring + r * columns * pitch;
      std::memset(row, 0, size_t(begin * pitch) * sizeof(T));
      std::memset(row + end * pitch, 0, size_t((columns - end) * pitch) * sizeof(T));
    }
    int64_t next = 0;  // row of the patch to be kept
    for (int64_t y = 0; y < op.out.h(); ++y) {
      const int64_t top = (corner[0] + y) * conv.stride[0] - conv.padding[0] - origin[0];
      next = std::max(next, top);
      for (; next < std::min(top + rows, op.delta.h()); ++next) {
        T* const row = ring + next % rows * columns * pitch;
        for (int64_t x = begin; x < end; ++x)
          std::copy_n(at<T>(op.delta, b, 0, next, left + x), channels, row + x * pitch);
      }
      int64_t found = 0;
      for (int64_t i = 0; i < conv.kernel[0]; ++i) {
        const int64_t dy = top + i * conv.dilation[0];
        if (dy >= 0 && dy < op.delta.h())
          under[found++] = {ring + dy % rows * columns * pitch,
                            static_cast<const T*>(op.filters) + i * conv.kernel[1] * filled};
      }
      Ahead ahead = after(b, next);
      for (int64_t c = 0; c < channels; c += chunk) outputs<most_outputs>(b, y, 0, op.out.w(), c, under, found, &ahead);
    }
  }

  Ahead after(int64_t b, int64_t next) const {
    if (next >= op.delta.h()) ++b, next = 0;
    if (b >= op.delta.n()) return {nullptr, nullptr, 0};
    const char* const row = reinterpret_cast<const char*>(at<T>(op.delta, b, 0, next, 0));
    const int64_t size = ((op.delta.w() - 1) * op.delta.stride[3] + channels) * int64_t(sizeof(T));
    return {row, row + size, up(size, up(channels, chunk) * up(op.out.w(), most_outputs) * 64) * 64};
  }

  // Of a row of outputs those from x on, `left` of them, as many at once as there can be.
  template <int N>
  void outputs(int64_t b, int64_t y, int64_t x, int64_t left, int64_t c, const Row* under, int64_t found,
               Ahead* ahead) const {
    for (; left >= N; x += N, left -= N) {
      ahead->bring();
      multiply<N>(b, y, x, c, under, found);
    }
    if constexpr (N > 1)
      if (left > 0) outputs<N - 1>(b, y, x, left, c, under, found, ahead);
  }

  // A chunk of channels of N neighbouring outputs.
  template <int N>
  void multiply(int64_t b, int64_t y, int64_t x, int64_t first, const Row* under, int64_t found) const {
    const int64_t *corner = op.out_origin + 2 * b, stop = std::min(first + chunk, channels);
    T* const out = at_mut<T>(op.out, b, 0, y, x);
    const T* const clean = op.clean.data ? at<T>(op.clean, op.image[b], 0, corner[0] + y, corner[1] + x) : nullptr;
    for (int64_t c = first; c < stop; c += lanes) {
      V sum[N] = {};
      for (int64_t i = 0; i < found; ++i) {
        const T *value = under[i].value + x * step + c, *filter = under[i].filter + c;
        for (int64_t j = 0; j < conv.kernel[1]; ++j, value += tap_step, filter += filled) {
          const V f = load_vector(filter);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) sum[n] += load_vector(value + n * step) * f;
        }
      }
      const int64_t some = std::min(lanes, channels - c);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        T* const to = out + n * op.out.stride[3] + c;
        const T* const z = clean ? clean + n * op.clean.stride[3] + c : nullptr;
        if (some == lanes && clean) {
          const V before = load_vector(z), after = rectified_vector<T>(op.rectifier, before + sum[n]);
          store_vector(to, V(after - rectified_vector<T>(op.rectifier, before)));
        } else if (some == lanes) {
          store_vector(to, sum[n]);
        } else {
          T last[lanes];
          store_vector(last, sum[n]);
          if (clean)
            rectify_change(op.rectifier, z, last, to, some);
          else
            std::copy_n(last, some, to);
        }
      }
    }
  }
};

}  // namespace

void conv_delta(const ConvDelta& op, int threads) {
  if (op.out.numel() == 0) return;
  check(op);
  const auto run = [&](const auto& engine) { engine(threads); };
  const bool depthwise = is_depthwise(op.out.c(), op.delta.c() / op.groups, op.groups);
  if (op.delta.dtype == DType::f64 && depthwise)
    run(Depthwise<double>(op));
  else if (depthwise)
    run(Depthwise<float>(op));
  else if (op.delta.dtype == DType::f64)
    run(Engine<double, false>(op));
  else if (op.narrow)
    run(Engine<float, true>(op));
  else
    run(Engine<float, false>(op));
}

namespace {

// Calls f with the filters of a weight, and a null pointer of what they are made of.
template <class F>
auto with_filters(const View& weight, int64_t groups, bool narrow, const F& f) {
  if (weight.dtype == DType::f64) return f(Filters<double, false>(weight, groups), static_cast<double*>(nullptr));
  if (narrow) return f(Filters<float, true>(weight, groups), static_cast<float*>(nullptr));
  return f(Filters<float, false>(weight, groups), static_cast<float*>(nullptr));
}

}  // namespace

int64_t delta_filters_bytes(const View& weight, int64_t groups, bool narrow) {
  if (is_depthwise(weight.size[0], weight.size[1], groups))
    return weight.dtype == DType::f64 ? Depthwise<double>::bytes(weight) : Depthwise<float>::bytes(weight);
  return with_filters(weight, groups, narrow, [](const auto& filters, auto*) { return filters.bytes(); });
}

bool pack_delta_filters(const View& weight, const void* scale, void* filters, int64_t groups, bool narrow, int threads) {
  return with_filters(weight, groups, narrow, [&](const auto& packing, auto* type) {
    typedef typename Pointee<decltype(type)>::type T;
    if (is_depthwise(weight.size[0], weight.size[1], groups))
      return Depthwise<T>::pack(weight, static_cast<const T*>(scale), static_cast<T*>(filters));
    typedef typename std::decay<decltype(packing)>::type::U U;
    return packing.pack(weight, static_cast<const T*>(scale), static_cast<U*>(filters), threads);
  });
}

}  // namespace ZF_ISA
}  // namespace zf
