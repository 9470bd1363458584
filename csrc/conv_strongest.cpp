// CPU kernel of conv_strongest. The contract is in the header.
//
// Work: N * Oh * Ow * U * C * kh * kw multiply-adds, which bound it. Least traffic: the picture and the filters in, a
// number and a place a unit out; the maps, which are many times the picture, are not written.
//
// How: the filters of a block of units are packed tap after tap, so that a few vectors hold one tap of all of them. The
// sums of a tile, a few places times those vectors, stay in registers for all taps; each tap takes the vectors of its
// filters and one broadcast a place, straight out of a copy of the rows that a band of the map sees, with its padding.
// Then the tile's values meet the largest so far, lane by lane in raster order.
//
// A value is a sum over the taps in one fixed order, whatever the tile, band or thread, and bands are compared in
// order, so the bits and the places are always the same.
#include "conv_strongest.h"

#include <cstring>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

typedef Vec<float>::type V;
typedef Vec<float>::mask M;
constexpr int lanes = Vec<float>::lanes;

// A tile's sums, its filters' vectors and a broadcast fill the registers: 16 of them, or 32.
#if ZF_VECTOR_BYTES == 64
constexpr int most_vectors = 3, places = 8;
#else
constexpr int most_vectors = 2, places = 6;
#endif
constexpr int64_t band_bytes = 128 << 10;  // a band's rows, which every block of units reads anew: in the nearer caches
constexpr int64_t taps_at_once = 512;      // of one running sum; longer sums lose digits

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// sum[p][v] = the products of the taps' filters with what lies there from each place.
template <int Vectors>
inline void multiply(const float* const* place, const int64_t* tap, int64_t taps, const float* filters,
                     V (&sum)[places][Vectors]) {
  const float* at[places];
  V s[places][Vectors] = {};
#pragma GCC unroll 16
  for (int p = 0; p < places; ++p) at[p] = place[p];
  for (int64_t t = 0; t < taps; ++t, filters += Vectors * lanes) {
    const int64_t offset = tap[t];
    V f[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) f[v] = load_vector(filters + v * lanes);
#pragma GCC unroll 16
    for (int p = 0; p < places; ++p) {
      const V x = splat(at[p][offset]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) s[p][v] += x * f[v];
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < places; ++p)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[p][v] = s[p][v];
}

// The largest so far of each unit of a block, NaN before the first, and its place in the band.
struct Best {
  V value[most_vectors];
  M place[most_vectors];
};

// A band of a map: what it sees of the picture, and where its taps, from a place's first, and its places lie in that.
struct Band {
  const float* rows;
  const int64_t* tap;
  int64_t taps, height, width, step_y, step_x;
};

template <int Vectors>
void search(const Band& band, const float* filters, const float* bias, Best& best) {
  const int64_t count = band.height * band.width;
  V add[Vectors];
  for (int v = 0; v < Vectors; ++v) add[v] = load_vector(bias + v * lanes);
  int64_t x = 0;
  const float *row = band.rows, *next = row;
  for (int64_t first = 0; first < count; first += places) {
    const float* place[places];
    for (int p = 0; p < places; ++p) {  // past the end the last place once more: its values change nothing
      place[p] = next;
      if (first + p + 1 >= count) continue;
      next += band.step_x;
      if (++x == band.width) x = 0, row += band.step_y, next = row;
    }
    V sum[places][Vectors];
    multiply<Vectors>(place, band.tap, smaller(band.taps, taps_at_once), filters, sum);
    for (int64_t t = taps_at_once; t < band.taps; t += taps_at_once) {
      V more[places][Vectors];
      multiply<Vectors>(place, band.tap + t, smaller(band.taps - t, taps_at_once), filters + t * Vectors * lanes, more);
      for (int p = 0; p < places; ++p)
        for (int v = 0; v < Vectors; ++v) sum[p][v] += more[p][v];
    }
    for (int v = 0; v < Vectors; ++v) {
      V value = best.value[v];
      M at = best.place[v];
      for (int p = 0; p < places; ++p) {
        const V now = sum[p][v] + add[v];
        const M take = ~(now <= value) & (now == now);
        value = take ? now : value;
        at = take ? int32_t(first + p) - M{} : at;
      }
      best.value[v] = value, best.place[v] = at;
    }
  }
}

template <int Vectors>
void pick_search(int64_t vectors, const Band& band, const float* filters, const float* bias, Best& best) {
  if constexpr (Vectors > 0) {
    if (vectors == Vectors)
      search<Vectors>(band, filters, bias, best);
    else
      pick_search<Vectors - 1>(vectors, band, filters, bias, best);
  }
}

struct Search {
  const ConvStrongest& task;
  const int threads;
  const Window& conv = task.conv;
  const int64_t channels = task.images.c(), taps = channels * conv.taps();
  const int64_t height = task.map[0], width = task.map[1];

  // The rows and columns that a band of places sees, and how many rows a band has: enough bands for the threads, near
  // in memory, and no shorter than what they share with the next, which both copy.
  const int64_t reach = (conv.kernel[0] - 1) * conv.dilation[0] + 1;
  const int64_t columns = (width - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1;
  int64_t rows_seen(int64_t rows) const { return (rows - 1) * conv.stride[0] + reach; }
  const int64_t near_rows = (band_bytes / (channels * columns * 4) - reach) / conv.stride[0] + 1;
  const int64_t bands_wanted = threads > 1 ? ceil_div(int64_t(threads) * 8, task.images.n()) : 1;
  const int64_t band_rows = larger(1, smaller(larger(near_rows, reach), ceil_div(height, bands_wanted)));
  const int64_t bands = ceil_div(height, band_rows);

  // Units in near-equal blocks.
  const int64_t vectors = ceil_div(task.count, lanes);
  const int64_t blocks = ceil_div(vectors, most_vectors), block = ceil_div(vectors, blocks);
  const int64_t padded_units = vectors * lanes;

  // Of the calling thread: filters, biases, taps, and of each band of each image the largest values and their places.
  float *filters = nullptr, *bias = nullptr, *value = nullptr;
  int32_t* place = nullptr;
  int64_t* tap = nullptr;

  Search(const ConvStrongest& task, int threads) : task(task), threads(threads) {
    if (band_rows * width >= int64_t(1) << 31)
      throw std::invalid_argument("conv_strongest: rows of a map of 2**31 places or more");
    const int64_t found = task.images.n() * bands * padded_units;
    const int64_t filter_bytes = round_up(padded_units * taps * 4, 64), bias_bytes = round_up(padded_units * 4, 64);
    const int64_t found_bytes = round_up(found * 4, 64);
    char* memory =
        static_cast<char*>(thread_scratch(0, filter_bytes + bias_bytes + 2 * found_bytes + round_up(taps * 8, 64)));
    filters = reinterpret_cast<float*>(memory);
    bias = reinterpret_cast<float*>(memory += filter_bytes);
    value = reinterpret_cast<float*>(memory += bias_bytes);
    place = reinterpret_cast<int32_t*>(memory += found_bytes);
    tap = reinterpret_cast<int64_t*>(memory += found_bytes);
  }

  // [block][tap][the block's units]; lanes past the last unit are zero.
  void pack() const {
    for (int64_t first = 0; first < vectors; first += block) {
      const int64_t units = smaller(block, vectors - first) * lanes;
      float* packed = filters + first * lanes * taps;
      for (int64_t lane = 0; lane < units; ++lane) {
        const int64_t u = first * lanes + lane;
        const bool filled = u < task.count;
        const int64_t k = filled ? task.units[u] : 0;
        bias[u] = filled && task.bias ? task.bias[k] : 0.0f;
        float* p = packed + lane;
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < conv.kernel[0]; ++i)
            for (int64_t j = 0; j < conv.kernel[1]; ++j, p += units)
              *p = filled ? *at<float>(task.weight, k, c, i, j) : 0.0f;
      }
    }
  }

  void lay_out_taps() const {
    int64_t* t = tap;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < conv.kernel[0]; ++i)
        for (int64_t j = 0; j < conv.kernel[1]; ++j)
          *t++ = (c * rows_seen(band_rows) + i * conv.dilation[0]) * columns + j * conv.dilation[1];
  }

  // What `rows` rows of places see of the padded picture, from row y on.
  void copy_rows(int64_t n, int64_t y, int64_t rows, float* copy) const {
    const View& x = task.images;
    const int64_t top = y * conv.stride[0] - conv.padding[0], step = x.stride[3];
    const int64_t left = smaller(columns, conv.padding[1]);
    const int64_t right = larger(left, smaller(columns, x.w() + conv.padding[1]));
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t row = 0; row < rows_seen(rows); ++row) {
        float* p = copy + (c * rows_seen(band_rows) + row) * columns;
        if (top + row < 0 || top + row >= x.h()) {
          std::memset(p, 0, size_t(columns) * 4);
          continue;
        }
        const float* source = at<float>(x, n, c, top + row, 0);
        std::memset(p, 0, size_t(left) * 4);
        if (step == 1)
          std::memcpy(p + left, source, size_t(right - left) * 4);
        else
          for (int64_t column = left; column < right; ++column) p[column] = source[(column - left) * step];
        std::memset(p + right, 0, size_t(columns - right) * 4);
      }
  }

  void search_band(int64_t n, int64_t number) const {
    const int64_t y = number * band_rows, rows = smaller(band_rows, height - y);
    float* copy = static_cast<float*>(thread_scratch(1, channels * rows_seen(band_rows) * columns * 4));
    copy_rows(n, y, rows, copy);
    const Band band{copy, tap, taps, rows, width, conv.stride[0] * columns, conv.stride[1]};
    for (int64_t first = 0; first < vectors; first += block) {
      const int64_t some = smaller(block, vectors - first);
      const int64_t found = (n * bands + number) * padded_units + first * lanes;
      Best best;
      for (V& value : best.value) value = splat(std::numeric_limits<float>::quiet_NaN());
      for (M& place : best.place) place = M{};
      pick_search<most_vectors>(some, band, filters + first * lanes * taps, bias + first * lanes, best);
      std::memcpy(value + found, best.value, size_t(some) * sizeof(V));
      std::memcpy(place + found, best.place, size_t(some) * sizeof(M));
    }
  }

  void operator()() const {
    pack();
    lay_out_taps();
    parallel_for(task.images.n() * bands, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) search_band(i / bands, i % bands);
    });
    for (int64_t n = 0; n < task.images.n(); ++n)
      for (int64_t u = 0; u < task.count; ++u) {
        float most = std::numeric_limits<float>::quiet_NaN();
        int64_t index = 0;
        for (int64_t band = 0; band < bands; ++band) {
          const int64_t found = (n * bands + band) * padded_units + u;
          const float now = value[found];
          if (now == now && !(now <= most)) most = now, index = band * band_rows * width + place[found];
        }
        task.value[n * task.count + u] = most, task.index[n * task.count + u] = index;
      }
  }
};

}  // namespace

void conv_strongest(const ConvStrongest& task, int threads) {
  if (task.images.n() && task.count) Search(task, threads)();
}

}  // namespace ZF_ISA
}  // namespace zf
