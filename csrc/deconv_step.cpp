// CPU kernel of deconv_step. The contract is in the header.
//
// Work: after a 3x3/2 unpool at most one place in four holds a value, and rectification removes what is negative, so
// only the non-zeros are multiplied: nnz * C/groups * kh * kw multiply-adds, against places * K times that for the dense
// transposed convolution. Least traffic: signal and switch bytes in, the filters once for a group of patches, the
// output out.
//
// How: the values that survive unpooling and rectification are sorted by the place that their switch names, each with
// its channel: one short list a place. The filter of a channel is packed as the run of outputs it adds to (kw*C
// contiguous floats for each of its kh rows), cut into chunks of vectors that stay in registers while the list of a
// place is walked: one broadcast, one multiply-add a vector. A chunk of a block of channels' filters stays in the
// nearest cache while the lists of a slice of rows, of several patches where these are small, pass by.
//
// The sum of an output is taken over slices, blocks of channels, places in raster order and channels, in that order and
// whatever the bands, groups of patches and threads, so the bits are always the same.
#include "deconv_step.h"

#include <stdexcept>
#include <type_traits>
#include <vector>

#include "deconv_depthwise.h"
#include "dispatch.h"
#include "layout.h"
#include "parallel.h"
#include "simd.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Vectors of a chunk, held in registers, and the cache in which a chunk of a block of channels is kept. Two multiply-adds
// a cycle take two vectors a cycle, which the first-level cache alone feeds, 256 bits wide or 512.
constexpr int most_vectors = 8;
constexpr int64_t near_bytes = 32 << 10;
constexpr int64_t lists_bytes = 512 << 10;  // room for the lists of a slice; half of it is used, or less
constexpr int64_t most_patches = 32;        // of a group that shares the filters while they are near

// Where the vectors of a filter add to.
struct Destinations {
  int64_t* element;  // [vectors]: elements from the place's corner in the canvas
  int32_t* filled;   // [vectors]: lanes that hold a weight; the rest must not be added
};

// The non-zeros of a slice of each patch, place after place: values, and their channels from the block's first.
template <class T>
struct Lists {
  T* value;
  int32_t* channel;
  int32_t* begin;   // [places + 1]
  int64_t* corner;  // [places]: where the place's corner lies in the canvas; -1: its outputs are another band's
  int64_t places;
};

#if ZF_VECTOR_BYTES == 32
// For every mask of eight lanes the indices of the kept lanes, one a byte, the first in the lowest byte.
struct CompressOrders {
  uint64_t order[256];
  constexpr CompressOrders() : order() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) order[mask] |= uint64_t(lane) << (8 * kept++);
    }
  }
};
constexpr CompressOrders compress_orders;
#endif

// Appends the lanes of v that `keep` names, with their channel. Returns how many. Writes whole vectors.
template <class T>
inline int64_t append(typename Vec<T>::type v, typename Vec<T>::mask keep, int32_t channel, T* value,
                      int32_t* channels) {
#if ZF_VECTOR_BYTES == 64
  if (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_movepi32_mask(reinterpret_cast<__m512i>(keep));
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    // Compressed in registers and stored whole: a compressing store is slow on some CPUs. The lists have room.
    _mm512_storeu_ps(reinterpret_cast<float*>(value),
                     _mm512_maskz_compress_ps(mask, reinterpret_cast<__m512>(v)));
    _mm512_storeu_si512(channels, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(channel))));
    return __builtin_popcount(mask);
  }
#elif ZF_VECTOR_BYTES == 32
  if (sizeof(T) == 4) {
    const unsigned mask = unsigned(_mm256_movemask_ps(reinterpret_cast<__m256>(keep)));
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(compress_orders.order[mask])));
    _mm256_storeu_ps(reinterpret_cast<float*>(value), _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), lanes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(channels), _mm256_add_epi32(lanes, _mm256_set1_epi32(channel)));
    return __builtin_popcount(mask);
  }
#endif
  int64_t count = 0;
  for (int i = 0; i < Vec<T>::lanes; ++i) {
    value[count] = v[i];
    channels[count] = channel + i;
    count += keep[i] != 0;
  }
  return count;
}

// One chunk of filters, `Vectors` wide, and one place: walks the place's list, then adds to the canvas.
template <class T, int Vectors>
inline void accumulate_place(const T* filters, const T* value, const int32_t* channel, int64_t count, T* corner,
                             const int64_t* destination, const int32_t* filled) {
  typedef typename Vec<T>::type V;
  typedef typename Vec<T>::mask M;
  constexpr int lanes = Vec<T>::lanes;
  V sum[Vectors] = {};
  for (int64_t t = 0; t < count; ++t) {
    const V v = splat(value[t]);
    const T* f = filters + int64_t(channel[t]) * (Vectors * lanes);
#pragma GCC unroll 32
    for (int i = 0; i < Vectors; ++i) sum[i] += v * load_vector(f + i * lanes);
  }
  M lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
#pragma GCC unroll 32
  for (int i = 0; i < Vectors; ++i) {
    T* p = corner + destination[i];
    // Lanes past the run belong to other outputs: an infinite value times their zero padding would poison them.
    const V add = filled[i] == lanes ? sum[i] : (lane < typename Vec<T>::lane(filled[i]) ? sum[i] : V{});
    store_vector(p, load_vector(p) + add);
  }
}

template <class T, int Vectors>
void accumulate_lists(const T* filters, const Lists<T>& lists, T* canvas, const int64_t* destination,
                      const int32_t* filled) {
  for (int64_t place = 0; place < lists.places; ++place) {
    const int64_t begin = lists.begin[place], count = lists.begin[place + 1] - begin;
    if (count && lists.corner[place] >= 0)
      accumulate_place<T, Vectors>(filters, lists.value + begin, lists.channel + begin, count,
                                   canvas + lists.corner[place], destination, filled);
  }
}

template <class T>
using AccumulateFn = void (*)(const T*, const Lists<T>&, T*, const int64_t*, const int32_t*);

template <class T, int Vectors>
AccumulateFn<T> pick_accumulate(int64_t vectors) {
  if constexpr (Vectors == 0)
    return nullptr;
  else
    return vectors == Vectors ? &accumulate_lists<T, Vectors> : pick_accumulate<T, Vectors - 1>(vectors);
}

// How the filters of a convolution are packed, in the compute type T: for each group [chunk][channel][vectors of the
// chunk][lanes].
template <class T>
struct Packing {
  static constexpr int lanes = Vec<T>::lanes;

  const Window& conv;
  int64_t group_in, group_out, groups;

  bool merged = conv.dilation[1] == 1;  // a filter row is one run over (column, channel)
  int64_t runs = merged ? conv.kernel[0] : conv.taps();
  int64_t run = merged ? conv.kernel[1] * group_out : group_out;
  int64_t run_vectors = ceil_div(run, lanes);
  int64_t vectors = runs * run_vectors;
  int64_t chunks = ceil_div(vectors, most_vectors);
  int64_t chunk = ceil_div(vectors, chunks);  // near-equal chunks
  // Channels whose filters of one chunk stay near while the lists of a slice pass by.
  int64_t block = smaller(group_in, larger(lanes, near_bytes / (chunk * lanes * int64_t(sizeof(T))) / lanes * lanes));

  Packing(const View& weight, const Window& conv, int64_t groups)
      : conv(conv), group_in(weight.size[0] / groups), group_out(weight.size[1]), groups(groups) {}

  int64_t group_elements() const { return round_up(group_in * vectors * lanes, 64); }
  int64_t bytes() const { return groups * group_elements() * int64_t(sizeof(T)); }

  Destinations lay_out_destinations(char* memory, int64_t row_elements) const {
    Destinations d{reinterpret_cast<int64_t*>(memory), reinterpret_cast<int32_t*>(memory + round_up(vectors * 8, 64))};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t r = v / run_vectors, within = v % run_vectors * lanes;
      const int64_t i = merged ? r : r / conv.kernel[1], j = merged ? 0 : r % conv.kernel[1];
      d.element[v] = i * conv.dilation[0] * row_elements + j * conv.dilation[1] * group_out + within;
      d.filled[v] = int32_t(smaller(lanes, run - within));
    }
    return d;
  }
  int64_t destination_bytes() const { return round_up(vectors * 8, 64) + round_up(vectors * 4, 64); }

  // The filter of channel k, from weight [K, C/groups, kh, kw], contiguous.
  template <class S>
  void pack(const View& weight, int64_t k, T scale, T* filters) const {
    const int64_t group = k / group_in, channel = k % group_in;
    const S* source = static_cast<const S*>(weight.data) + k * group_out * conv.taps();
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c0 = v / chunk, width = smaller(chunk, vectors - c0 * chunk);
      T* p = filters + group * group_elements() +
             (c0 * chunk * group_in + channel * width + (v - c0 * chunk)) * lanes;
      const int64_t r = v / run_vectors, within = v % run_vectors * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t e = within + lane;
        if (e >= run) {
          p[lane] = 0;
          continue;
        }
        const int64_t i = merged ? r : r / conv.kernel[1];
        const int64_t j = merged ? e / group_out : r % conv.kernel[1], c = e % group_out;
        p[lane] = to_compute(source[(c * conv.kernel[0] + i) * conv.kernel[1] + j]) * scale;
      }
    }
  }

  template <class S>
  void pack_all(const View& weight, const T* scale, T* filters, int threads) const {
    parallel_for(weight.size[0], 65536 / (vectors * lanes) + 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) pack<S>(weight, k, scale ? scale[k] : T(1), filters);
    });
  }
};

// Another window of the pool that may name the same place: where it lies from a window, and the tap by which it does,
// from the window's own tap.
struct Neighbour {
  int64_t dy, dx;
  int32_t tap;     // subtracted from the window's tap
  int32_t column;  // subtracted from the tap's column, which must stay inside the kernel
};

// Bytes of as many channels as fit a vector, to compare switches by.
constexpr int byte_lanes = ZF_VECTOR_BYTES;
typedef uint8_t Bytes __attribute__((vector_size(ZF_VECTOR_BYTES)));
typedef int8_t ByteMask __attribute__((vector_size(ZF_VECTOR_BYTES)));
inline Bytes load_byte_vector(const uint8_t* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline bool any(ByteMask m) {
  uint64_t words[ZF_VECTOR_BYTES / 8], all = 0;
  std::memcpy(words, &m, sizeof m);
  for (uint64_t word : words) all |= word;
  return all != 0;
}

template <class S>
struct Engine {
  typedef typename Compute<S>::type T;
  typedef typename Vec<T>::type V;
  typedef typename Vec<T>::mask M;
  static constexpr int lanes = Vec<T>::lanes;

  const DeconvStep& step;
  const Window &pool = step.pool, &conv = step.conv;
  const bool pooled = step.switches.data != nullptr;
  const std::vector<Neighbour> neighbours = find_neighbours();
  const Packing<T> packing{step.weight, conv, step.groups};
  const int64_t group_in = packing.group_in, group_out = packing.group_out, block = packing.block;

  // The places of u that a patch's windows can name, and the outputs that these reach.
  const int64_t places_h = (step.signal.h() - 1) * pool.stride[0] + (pool.kernel[0] - 1) * pool.dilation[0] + 1;
  const int64_t places_w = (step.signal.w() - 1) * pool.stride[1] + (pool.kernel[1] - 1) * pool.dilation[1] + 1;
  const int64_t reach_h = (conv.kernel[0] - 1) * conv.dilation[0];
  const int64_t canvas_w = (places_w - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1;

  // Whether places of the output lie as those of a canvas do; and whether it is the canvas itself: nothing to cut, no
  // vector over the end of its run.
  const bool same_layout = std::is_same<S, T>::value && step.groups == 1 && step.out.stride[1] == 1 &&
                           step.out.stride[3] == group_out;
  const bool direct_layout = same_layout && !step.whole && packing.run % lanes == 0 &&
                             step.out.stride[2] == step.out.w() * group_out;
  const bool by_bytes = !neighbours.empty() && pool.taps() <= 127;  // differences of taps then fit a byte, too

  int64_t tap_row[256] = {}, tap_offset[256] = {};
  uint8_t tap_column[256] = {};

  explicit Engine(const DeconvStep& step) : step(step) {
    for (int64_t t = 0; t < pool.taps(); ++t) {
      tap_row[t] = (t / pool.kernel[1]) * pool.dilation[0];
      tap_offset[t] = tap_row[t] * places_w + (t % pool.kernel[1]) * pool.dilation[1];
      tap_column[t] = uint8_t(t % pool.kernel[1]);
    }
  }

  std::vector<Neighbour> find_neighbours() const {
    std::vector<Neighbour> found;
    if (!pooled) return found;
    const auto shift = [&](int axis, int64_t d, int64_t* taps) {
      if (d * pool.stride[axis] % pool.dilation[axis]) return false;
      *taps = d * pool.stride[axis] / pool.dilation[axis];
      return *taps < pool.kernel[axis] && -*taps < pool.kernel[axis];
    };
    const int64_t most_y = (pool.kernel[0] - 1) * pool.dilation[0] / pool.stride[0];
    const int64_t most_x = (pool.kernel[1] - 1) * pool.dilation[1] / pool.stride[1];
    for (int64_t dy = -most_y; dy <= most_y; ++dy)
      for (int64_t dx = -most_x; dx <= most_x; ++dx) {
        int64_t rows = 0, columns = 0;
        if ((dy || dx) && shift(0, dy, &rows) && shift(1, dx, &columns))
          found.push_back({dy, dx, int32_t(rows * pool.kernel[1] + columns), int32_t(columns)});
      }
    return found;  // in raster order
  }

  // Signal and switches of one patch with channels contiguous: as they are, or copied.
  struct Patch {
    View signal, switches, passes;   // for image and patch 0; switches and passes from the patch's corner
    int64_t rows[2], columns[2];     // the patch's windows inside the map: [begin, end)
    int64_t map_rows[2], map_columns[2];  // all windows of the map, from the patch's corner
    int64_t place_y, place_x;        // where the patch's first place lies in the map
    int64_t out[2];                  // where its output begins in the map below
  };

  int64_t pack_bytes() const {
    const int64_t values = step.signal.c() * step.signal.h() * step.signal.w();
    return round_up(values * int64_t(sizeof(S)), 64) + 2 * round_up(values, 64) + 64;
  }

  Patch open_patch(int64_t b, char* memory) const {
    Patch patch{};
    const int64_t n = step.image ? step.image[b] : b;
    const int64_t origin[2] = {step.origin ? step.origin[2 * b] : 0, step.origin ? step.origin[2 * b + 1] : 0};
    const int64_t map[2] = {pooled ? step.switches.h() : step.map[0], pooled ? step.switches.w() : step.map[1]};
    const int64_t size[2] = {step.signal.h(), step.signal.w()};
    int64_t* ranges[2] = {patch.rows, patch.columns};
    int64_t* whole[2] = {patch.map_rows, patch.map_columns};
    for (int axis = 0; axis < 2; ++axis) {
      ranges[axis][0] = larger(0, -origin[axis]);
      ranges[axis][1] = larger(ranges[axis][0], smaller(size[axis], map[axis] - origin[axis]));
      whole[axis][0] = -origin[axis];
      whole[axis][1] = map[axis] - origin[axis];
    }
    patch.place_y = origin[0] * pool.stride[0] - pool.padding[0];
    patch.place_x = origin[1] * pool.stride[1] - pool.padding[1];
    for (int axis = 0; axis < 2; ++axis)
      patch.out[axis] = !step.whole ? canvas_in_map(patch, axis) : step.frame ? step.frame[2 * b + axis] : 0;
    const int64_t c = step.signal.c(), h = step.signal.h(), w = step.signal.w();
    const auto use = [&](View& v, void* data) {
      v.data = data;
      v.stride[1] = 1;
      v.stride[2] = w * c;
      v.stride[3] = c;
    };
    patch.signal = step.signal;
    patch.signal.data = at_mut<S>(step.signal, b, 0, 0, 0);
    if (!channels_contiguous(step.signal) && c > 1) {
      pack_channels<S>(patch.signal, 0, 0, c, reinterpret_cast<S*>(memory), [](S v) { return v; });
      use(patch.signal, memory);
      memory += round_up(c * h * w * int64_t(sizeof(S)), 64);
    }
    if (pooled) {
      patch.switches = step.switches;
      patch.switches.data = const_cast<uint8_t*>(at<uint8_t>(step.switches, n, 0, 0, 0) +
                                                 origin[0] * step.switches.stride[2] +
                                                 origin[1] * step.switches.stride[3]);
      if (!channels_contiguous(step.switches) && c > 1) {  // only whole maps come so: no part of them is outside
        pack_channels<uint8_t>(patch.switches, 0, 0, c, reinterpret_cast<uint8_t*>(memory), [](uint8_t v) { return v; });
        use(patch.switches, memory);
      }
    }
    if (step.passes.data) {
      patch.passes = step.passes;
      patch.passes.data = const_cast<uint8_t*>(at<uint8_t>(step.passes, n, 0, 0, 0));
    }
    return patch;
  }

  // Whether a window can share its place with another: one that brings nothing adds nothing, but still comes last.
  bool counts(const Patch& patch, int64_t y, int64_t x) const {
    const int64_t* rows = step.last ? patch.map_rows : patch.rows;
    const int64_t* columns = step.last ? patch.map_columns : patch.columns;
    return y >= rows[0] && y < rows[1] && x >= columns[0] && x < columns[1];
  }

  // The switches of one window for channels [c, c + byte_lanes), compared with those of the windows around it: which of
  // its values are another window's to add, and `value` plus what its own places get from others.
  ByteMask share(const Patch& patch, int64_t oy, int64_t ox, int64_t c, T* value) const {
    ByteMask dropped{};
    const Bytes taps = load_byte_vector(at<uint8_t>(patch.switches, 0, c, oy, ox));
    Bytes column = taps;
    for (int64_t ky = 1; ky < pool.kernel[0]; ++ky) {
      const Bytes at_least = reinterpret_cast<Bytes>(taps >= uint8_t(ky * pool.kernel[1]));
      column -= at_least & uint8_t(pool.kernel[1]);
    }
    for (const Neighbour& near : neighbours) {
      const int64_t y = oy + near.dy, x = ox + near.dx;
      if (!counts(patch, y, x)) continue;
      const Bytes theirs = load_byte_vector(at<uint8_t>(patch.switches, 0, c, y, x));
      const ByteMask same = (theirs == taps - uint8_t(near.tap)) &
                            (Bytes(column - uint8_t(near.column)) < uint8_t(pool.kernel[1]));
      const bool later = near.dy > 0 || (near.dy == 0 && near.dx > 0);
      if (later == step.last) {  // the first window of a place adds for all of them, or the last one has it alone
        dropped |= same;
      } else if (!step.last && any(same)) {
        const S* values = at<S>(patch.signal, 0, c, y, x);
        int8_t bytes[byte_lanes];
        std::memcpy(bytes, &same, sizeof bytes);
        for (int i = 0; i < byte_lanes; i += lanes) {
          const M chosen = load_bytes<T>(reinterpret_cast<const uint8_t*>(bytes + i)) != 0;
          const V v = load_storage(values + i);
          store_vector(value + i, load_vector(value + i) + (chosen ? v : V{}));
        }
      }
    }
    return dropped;
  }

  // As `share`, for one channel.
  bool share_one(const Patch& patch, int64_t oy, int64_t ox, int64_t c, T* value) const {
    bool dropped = false;
    const int tap = *at<uint8_t>(patch.switches, 0, c, oy, ox);
    for (const Neighbour& near : neighbours) {
      const int64_t y = oy + near.dy, x = ox + near.dx;
      if (!counts(patch, y, x)) continue;
      const int column = tap_column[tap] - near.column;
      if (*at<uint8_t>(patch.switches, 0, c, y, x) != tap - near.tap || column < 0 || column >= pool.kernel[1])
        continue;
      const bool later = near.dy > 0 || (near.dy == 0 && near.dx > 0);
      if (later == step.last)
        dropped = true;
      else if (!step.last)
        *value += to_compute(*at<S>(patch.signal, 0, c, y, x));
    }
    return dropped;
  }

  M survives(V v) const { return step.rectify ? M(~(v <= 0)) : M(v != 0); }  // NaN does
  bool survives_one(T v) const { return step.rectify ? !(v <= 0) : v != 0; }

  // The survivors of one window, of channels [c0, c1): values and channels (from c0), one after the other.
  int64_t list_window(const Patch& patch, int64_t oy, int64_t ox, int64_t c0, int64_t c1, T* value,
                      int32_t* channel) const {
    const S* signal = at<S>(patch.signal, 0, 0, oy, ox);
    int64_t count = 0, c = c0;
    if (by_bytes)
      for (; c + byte_lanes <= c1; c += byte_lanes) {
        T values[byte_lanes];
        for (int i = 0; i < byte_lanes; i += lanes) store_vector(values + i, load_storage(signal + c + i));
        const ByteMask dropped = share(patch, oy, ox, c, values);
        uint8_t bytes[byte_lanes];
        std::memcpy(bytes, &dropped, sizeof bytes);
        for (int i = 0; i < byte_lanes; i += lanes) {
          const V v = load_vector(values + i);
          const M keep = survives(v) & (load_bytes<T>(bytes + i) == 0);
          count += append<T>(v, keep, int32_t(c + i - c0), value + count, channel + count);
        }
      }
    else if (neighbours.empty())
      for (; c + lanes <= c1; c += lanes) {
        const V v = load_storage(signal + c);
        count += append<T>(v, survives(v), int32_t(c - c0), value + count, channel + count);
      }
    for (; c < c1; ++c) {
      T v = to_compute(signal[c]);
      const bool dropped = !neighbours.empty() && share_one(patch, oy, ox, c, &v);
      value[count] = v;
      channel[count] = int32_t(c - c0);
      count += !dropped && survives_one(v);
    }
    return count;
  }

  // Keeps of a window's list what `passes` lets through, each value at the place that its switch names; without a pool
  // (taps null) that is the window itself.
  int64_t keep_passing(const Patch& patch, int64_t c0, int64_t oy, int64_t ox, const uint8_t* taps, int64_t count,
                       T* value, int32_t* channel) const {
    const int64_t map_y = patch.place_y + oy * pool.stride[0], map_x = patch.place_x + ox * pool.stride[1];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t c = channel[i];
      const uint8_t tap = taps ? taps[c] : 0;
      value[kept] = value[i];
      channel[kept] = c;
      // A switch that names no place of the map passes nothing: nobody has checked it.
      const int64_t y = map_y + tap_row[tap], x = map_x + tap_column[tap] * pool.dilation[1];
      kept += y >= 0 && y < patch.passes.h() && x >= 0 && x < patch.passes.w() &&
              *at<uint8_t>(patch.passes, 0, c0 + c, y, x) != 0;
    }
    return kept;
  }

  // The survivors of a patch before they are sorted by place.
  struct Unsorted {
    T* value;
    int32_t *channel, *place;
  };

  // The lists of one patch: channels [c0, c1) of all, window rows [row, row_end). `begin`: the patch's first place, whose
  // list starts at *begin; sets the starts of the places after it.
  void list_rows(const Patch& patch, int64_t c0, int64_t c1, int64_t row, int64_t row_end, int64_t places,
                 const Lists<T>& lists, int32_t* begin, const Unsorted& unsorted) const {
    const int64_t first = larger(row, patch.rows[0]), end = smaller(row_end, patch.rows[1]);
    if (!pooled) {  // a window is a place, and the windows come in their order
      int32_t length = begin[0];
      for (int64_t oy = row; oy < row_end; ++oy)
        for (int64_t ox = 0; ox < places_w; ++ox) {
          *begin++ = length;
          if (oy < first || oy >= end || ox < patch.columns[0] || ox >= patch.columns[1]) continue;
          T* value = lists.value + length;
          int32_t* channel = lists.channel + length;
          int64_t count = list_window(patch, oy, ox, c0, c1, value, channel);
          if (step.passes.data)
            count = keep_passing(patch, c0, oy, ox, nullptr, count, value, channel);
          length += int32_t(count);
        }
      *begin = length;
      return;
    }
    int32_t* counts = begin + 1;  // a counting sort: what is counted for a place becomes where its list ends
    std::memset(counts, 0, size_t(places) * sizeof(int32_t));
    int64_t length = 0;
    for (int64_t oy = first; oy < end; ++oy)
      for (int64_t ox = patch.columns[0]; ox < patch.columns[1]; ++ox) {
        const int64_t base = (oy - row) * pool.stride[0] * places_w + ox * pool.stride[1];
        const uint8_t* taps = at<uint8_t>(patch.switches, 0, c0, oy, ox);
        int32_t* channel = unsorted.channel + length;
        int32_t* place = unsorted.place + length;
        int64_t count = list_window(patch, oy, ox, c0, c1, unsorted.value + length, channel);
        if (step.passes.data)
          count = keep_passing(patch, c0, oy, ox, taps, count, unsorted.value + length, channel);
        for (int64_t i = 0; i < count; ++i) {
          place[i] = int32_t(base + tap_offset[taps[channel[i]]]);
          ++counts[place[i]];
        }
        length += count;
      }
    int32_t start = begin[0];
    for (int64_t i = 0; i < places; ++i) {
      const int32_t count = counts[i];
      counts[i] = start;  // for now where the list of place i begins
      start += count;
    }
    for (int64_t i = 0; i < length; ++i) {
      const int32_t entry = counts[unsorted.place[i]]++;
      lists.value[entry] = unsorted.value[i];
      lists.channel[entry] = unsorted.channel[i];
    }
  }

  // ---- Sizes of a task's memory

  // Window rows whose lists are made at once.
  int64_t slice_rows() const {
    const int64_t row_bytes = step.signal.w() * block * int64_t(sizeof(T) + 4);
    return larger(1, smaller(step.signal.h(), lists_bytes / row_bytes));
  }
  int64_t slice_places() const {
    return ((slice_rows() - 1) * pool.stride[0] + (pool.kernel[0] - 1) * pool.dilation[0] + 1) * places_w;
  }
  int64_t slice_entries() const { return slice_rows() * step.signal.w() * block; }
  // Patches that share the filters of a chunk while these are near.
  int64_t patches_at_once() const {
    if (slice_rows() < step.signal.h()) return 1;
    return larger(1, smaller(most_patches, lists_bytes / (slice_entries() * int64_t(sizeof(T) + 4))));
  }
  int64_t row_elements(bool direct) const {
    // The padding lanes of a row's last run are read and written back.
    return direct ? step.out.w() * group_out : canvas_w * group_out + lanes;
  }
  int64_t canvas_rows(int64_t place_rows) const {
    return place_rows > 0 ? (place_rows - 1) * conv.stride[0] + reach_h + 1 : 0;
  }

  int64_t memory_bytes(int64_t patches, int64_t place_rows, bool direct) const {
    const int64_t canvas = direct ? 0 : patches * canvas_rows(place_rows) * row_elements(false) + lanes;
    const int64_t entries = patches * slice_entries() + 2 * lanes, unsorted = slice_entries() + 2 * lanes;
    return round_up(canvas * int64_t(sizeof(T)), 64) + round_up((entries + unsorted) * int64_t(sizeof(T)), 64) +
           round_up((entries + 2 * unsorted) * 4, 64) + round_up((patches * slice_places() + 1) * 4, 64) +
           round_up(patches * slice_places() * 8, 64) + packing.destination_bytes();
  }

  // Patches [first, first + count), output rows [begin, end).
  void run(int64_t first, int64_t count, int64_t begin, int64_t end, bool direct, const T* filters, const Patch* patches,
           char* memory) const {
    // The place rows that reach these outputs, and the canvas over all that these places reach.
    const int64_t out_first = first_out_row(patches[0]);  // the canvas row of output row 0
    int64_t place_begin = 0, place_end = places_h;
    if (count == 1) {
      const int64_t low = begin + out_first - reach_h, high = end - 1 + out_first;
      place_begin = low > 0 ? ceil_div(low, conv.stride[0]) : 0;
      place_end = high < 0 ? 0 : smaller(places_h, high / conv.stride[0] + 1);
    }
    const int64_t place_rows = larger(0, place_end - place_begin), elements = row_elements(direct);
    const int64_t rows = canvas_rows(place_rows);
    const int64_t canvas_elements = direct ? step.out.stride[0] : rows * elements;
    T* canvas = direct ? static_cast<T*>(step.out.data) + first * step.out.stride[0] : reinterpret_cast<T*>(memory);
    if (!direct) memory += round_up((count * canvas_elements + lanes) * int64_t(sizeof(T)), 64);

    const int64_t slice = slice_rows(), places = slice_places();
    const int64_t entries = count * slice_entries() + 2 * lanes, unsorted_entries = slice_entries() + 2 * lanes;
    Lists<T> lists;
    Unsorted unsorted;
    lists.value = reinterpret_cast<T*>(memory);
    unsorted.value = lists.value + entries;
    memory += round_up((entries + unsorted_entries) * int64_t(sizeof(T)), 64);
    lists.channel = reinterpret_cast<int32_t*>(memory);
    unsorted.channel = lists.channel + entries;
    unsorted.place = unsorted.channel + unsorted_entries;
    memory += round_up((entries + 2 * unsorted_entries) * 4, 64);
    lists.begin = reinterpret_cast<int32_t*>(memory);
    memory += round_up((count * places + 1) * 4, 64);
    lists.corner = reinterpret_cast<int64_t*>(memory);
    memory += round_up(count * places * 8, 64);
    const Destinations to = packing.lay_out_destinations(memory, elements);

    for (int64_t group = 0; group < step.groups; ++group) {
      for (int64_t b = 0; b < count; ++b)  // the canvas holds one group's outputs at a time
        std::memset(canvas + b * canvas_elements, 0, size_t(rows * elements) * sizeof(T));
      // Slices begin at fixed window rows, whatever the band, so that the order of the additions is fixed too.
      const int64_t reach = (pool.kernel[0] - 1) * pool.dilation[0];
      const int64_t first_window = place_begin > reach ? ceil_div(place_begin - reach, pool.stride[0]) : 0;
      for (int64_t row = first_window / slice * slice; row < step.signal.h(); row += slice) {
        if (row * pool.stride[0] >= place_end) break;
        const int64_t row_end = smaller(row + slice, step.signal.h());
        const int64_t slice_first = row * pool.stride[0];
        const int64_t slice_places_h = (row_end - 1 - row) * pool.stride[0] + reach + 1;
        const int64_t own_places = slice_places_h * places_w;
        lists.places = count * own_places;
        for (int64_t b = 0; b < count; ++b)
          for (int64_t y = 0; y < slice_places_h; ++y) {
            const int64_t place_row = slice_first + y;
            const bool ours = place_row >= place_begin && place_row < place_end;
            for (int64_t x = 0; x < places_w; ++x)
              lists.corner[b * own_places + y * places_w + x] =
                  ours ? b * canvas_elements + (place_row - place_begin) * conv.stride[0] * elements +
                             x * conv.stride[1] * group_out
                       : -1;
          }
        for (int64_t c = 0; c < group_in; c += block) {
          const int64_t c_end = smaller(c + block, group_in);
          lists.begin[0] = 0;
          for (int64_t b = 0; b < count; ++b)
            list_rows(patches[b], group * group_in + c, group * group_in + c_end, row, row_end, own_places, lists,
                      lists.begin + b * own_places, unsorted);
          const T* packed = filters + group * packing.group_elements();
          for (int64_t v = 0; v < packing.vectors; v += packing.chunk) {
            const int64_t width = smaller(packing.chunk, packing.vectors - v);
            pick_accumulate<T, most_vectors>(width)(packed + (v * group_in + c * width) * lanes, lists, canvas,
                                                    to.element + v, to.filled + v);
          }
        }
      }
      for (int64_t b = 0; b < count; ++b) {
        if (direct)
          clip(patches[b], canvas + b * canvas_elements);
        else
          copy_out(patches[b], canvas + b * canvas_elements, first + b, group, begin, end,
                   place_begin * conv.stride[0], rows);
      }
    }
  }

  // Where output (0, 0) lies in the canvas of a patch, along an axis; and in the map that it is about.
  int64_t canvas_in_map(const Patch& patch, int axis) const {
    return (axis ? patch.place_x : patch.place_y) * conv.stride[axis] - conv.padding[axis];
  }
  int64_t first_out_row(const Patch& patch) const { return patch.out[0] - canvas_in_map(patch, 0); }

  // Zeros what a patch brought to places outside its map.
  void clip(const Patch& patch, T* out) const {
    const int64_t h = step.out.h(), w = step.out.w();
    const int64_t y0 = canvas_in_map(patch, 0), x0 = canvas_in_map(patch, 1);
    const int64_t left = smaller(w, larger(0, -x0)), right = larger(left, smaller(w, step.below[1] - x0));
    for (int64_t y = 0; y < h; ++y) {
      T* row = out + y * w * group_out;
      if (y0 + y < 0 || y0 + y >= step.below[0]) {
        std::memset(row, 0, size_t(w * group_out) * sizeof(T));
        continue;
      }
      if (left) std::memset(row, 0, size_t(left * group_out) * sizeof(T));
      if (right < w) std::memset(row + right * group_out, 0, size_t((w - right) * group_out) * sizeof(T));
    }
  }

  // Output rows [begin, end) of a patch from its canvas, whose row 0 is row `canvas_first` of the patch's reach.
  void copy_out(const Patch& patch, const T* canvas, int64_t b, int64_t group, int64_t begin, int64_t end,
                int64_t canvas_first, int64_t rows) const {
    const View& out = step.out;
    const int64_t y0 = patch.out[0], x0 = patch.out[1];
    const int64_t shift_y = first_out_row(patch) - canvas_first;
    const int64_t shift_x = x0 - canvas_in_map(patch, 1);
    const int64_t left = larger(larger(0, -x0), -shift_x);
    const int64_t right = larger(left, smaller(smaller(out.w(), step.below[1] - x0), canvas_w - shift_x));
    const int64_t elements = row_elements(false);
    for (int64_t y = begin; y < end; ++y) {
      const int64_t row = y + shift_y;
      const bool covered = row >= 0 && row < rows && y0 + y >= 0 && y0 + y < step.below[0];
      const int64_t from = covered ? smaller(left, out.w()) : out.w(), to = covered ? smaller(right, out.w()) : out.w();
      const T* q = canvas + row * elements + shift_x * group_out;
      if (same_layout) {
        const size_t place_bytes = size_t(group_out) * sizeof(T);
        T* p = reinterpret_cast<T*>(at_mut<S>(out, b, 0, y, 0));
        std::memset(p, 0, size_t(from) * place_bytes);
        if (to > from) std::memcpy(p + from * group_out, q + from * group_out, size_t(to - from) * place_bytes);
        std::memset(p + to * group_out, 0, size_t(out.w() - to) * place_bytes);
        continue;
      }
      for (int64_t c = 0; c < group_out; ++c) {
        S* p = at_mut<S>(out, b, group * group_out + c, y, 0);
        const int64_t step_x = out.stride[3];
        for (int64_t x = 0; x < from; ++x) from_compute(T(0), p + x * step_x);
        for (int64_t x = from; x < to; ++x) from_compute(q[x * group_out + c], p + x * step_x);
        for (int64_t x = to; x < out.w(); ++x) from_compute(T(0), p + x * step_x);
      }
    }
  }

  // The packed filters: what was given, or packed now.
  const T* filters_of(int threads) const {
    if (step.filters) return static_cast<const T*>(step.filters);
    T* packed = static_cast<T*>(thread_scratch(1, packing.bytes()));
    packing.template pack_all<S>(step.weight, nullptr, packed, threads);
    return packed;
  }

  void operator()(int threads) const {
    const int64_t count = step.signal.n();
    if (patches_at_once() * larger(slice_places(), slice_entries()) >= int64_t(1) << 31)
      throw std::invalid_argument("deconv_step: a row of windows that reaches 2**31 places or more");
    // Whole patches where there are enough of them; else bands, whose edges are worked twice.
    const int64_t bands = count >= 2 * threads ? 1 : smaller(step.out.h(), ceil_div(2 * threads, count));
    const int64_t band = ceil_div(step.out.h(), bands);
    const int64_t together = bands > 1 ? 1 : smaller(patches_at_once(), ceil_div(count, 4 * threads));
    const bool direct = direct_layout && bands == 1;
    const T* filters = filters_of(threads);
    parallel_for(ceil_div(count, together) * bands, 1, threads, [&](int64_t begin, int64_t end) {
      char* patch_memory = static_cast<char*>(thread_scratch(2, together * pack_bytes()));
      char* memory = static_cast<char*>(thread_scratch(3, memory_bytes(together, places_h, direct)));
      Patch patches[most_patches];
      int64_t opened = -1;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task / bands * together, some = smaller(together, count - first);
        const int64_t out_first = task % bands * band;
        if (first != opened)
          for (int64_t b = 0; b < some; ++b) patches[b] = open_patch(first + b, patch_memory + b * pack_bytes());
        opened = first;
        if (out_first < step.out.h())
          run(first, some, out_first, smaller(out_first + band, step.out.h()), direct, filters, patches, memory);
      }
    });
  }
};

}  // namespace

void deconv_step(const DeconvStep& step, int threads) {
  if (step.out.numel() == 0) return;
  for_float_type(step.signal.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    const Engine<S> engine(step);
    if (Depthwise<S>::takes(step)) {
      const Depthwise<S> depthwise(step, engine.packing, engine.filters_of(threads));
      if (depthwise.finite) return depthwise(threads);
    }
    engine(threads);
  });
}

int64_t packed_filters_bytes(const View& weight, DType dtype, const Window& conv, int64_t groups) {
  int64_t bytes = 0;
  for_float_type(dtype, [&](auto* type) {
    typedef typename Compute<typename Pointee<decltype(type)>::type>::type T;
    bytes = Packing<T>(weight, conv, groups).bytes();
  });
  return bytes;
}

void pack_filters(const View& weight, const void* scale, void* filters, const Window& conv, int64_t groups,
                  int threads) {
  for_float_type(weight.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    typedef typename Compute<S>::type T;
    Packing<T>(weight, conv, groups)
        .template pack_all<S>(weight, static_cast<const T*>(scale), static_cast<T*>(filters), threads);
  });
}

}  // namespace ZF_ISA
}  // namespace zf
