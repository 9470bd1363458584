// CPU kernel of unpool_relu_conv_transpose2d. The contract is in the header.
//
// Work: after a 3x3/2 unpool at most one place in four holds a value, and rectification removes what is negative, so
// only the non-zeros are multiplied: nnz * C/groups * kh * kw multiply-adds, against Hu*Wu*K times that for the dense
// transposed convolution. Least traffic: pooled values and bytes in, the weights once per image, the output out.
//
// How: for every place of the unpooled map, the list of (channel, value) that survive unpooling and rectification is
// made in registers from the pooled values and switches, channels contiguous. The filter of a channel is packed as
// the run of outputs it adds to (kw*C contiguous floats for each of its kh rows), cut into chunks of vectors that
// stay in registers while the list of a place is walked: one broadcast, one multiply-add a vector. A chunk of a block of
// channels' filters stays in the nearer caches while the lists of a slice of rows pass by.
//
// The sum of an output is taken over slices, blocks of channels, places in raster order and channels, in that order and
// whatever the bands and threads, so the bits are always the same.
#include "unpool_relu_conv_transpose2d.h"

#include "dispatch.h"
#include "layout.h"
#include "parallel.h"
#include "simd.h"
#include "switches.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Vectors of a chunk, held in registers, and the cache in which a chunk of a block of channels is kept. 256-bit units
// do two multiply-adds a cycle, which only the first-level cache feeds; 512-bit ones are fed by the second level too.
#if ZF_VECTOR_BYTES == 64
constexpr int most_vectors = 12;
constexpr int64_t near_bytes = 256 << 10;
#else
constexpr int most_vectors = 8;
constexpr int64_t near_bytes = 32 << 10;
#endif

// Where the vectors of a filter add to.
struct Destinations {
  int64_t* element;  // [vectors]: elements from the place's corner in the canvas
  int32_t* filled;   // [vectors]: lanes that hold a weight; the rest must not be added
};

// The non-zeros of a band of the unpooled map, place after place.
template <class T>
struct Lists {
  T* value;
  int32_t* channel;
  int64_t* begin;  // [places + 1]
  int64_t* corner; // [places]: where the place's corner lies in the canvas
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

// Appends the lanes of v that survive rectification (positive or NaN) with their channel. Returns how many.
template <class T>
inline int64_t append_survivors(typename Vec<T>::type v, int32_t channel, T* value, int32_t* channels) {
  const auto keep = ~(v <= 0);
#if ZF_VECTOR_BYTES == 64
  if (sizeof(T) == 4) {
    const __mmask16 mask = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_setzero_ps(), _CMP_NLE_UQ);
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
    if (count)
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

// Everything about one call, in the compute type T.
template <class S>
struct Step {
  typedef typename Compute<S>::type T;
  static constexpr int lanes = Vec<T>::lanes;

  const View &y, &switches, &weight, &out;
  const int64_t* unpooled;
  const Window &pool, &conv;
  int64_t groups;
  bool last;

  int64_t group_in = y.c() / groups;             // pooled channels a group
  int64_t group_out = out.c() / groups;          // output channels a group
  bool merged = conv.dilation[1] == 1;           // a filter row is one run over (column, channel)
  int64_t runs = merged ? conv.kernel[0] : conv.taps();
  int64_t run = merged ? conv.kernel[1] * group_out : group_out;
  int64_t run_vectors = ceil_div(run, lanes);
  int64_t vectors = runs * run_vectors;
  int64_t chunks = ceil_div(vectors, most_vectors);
  int64_t chunk = ceil_div(vectors, chunks);     // near-equal chunks
  // Channels whose filters of one chunk stay near while the lists of a slice pass by.
  int64_t block = smaller(group_in, larger(lanes, near_bytes / (chunk * lanes * int64_t(sizeof(T))) / lanes * lanes));
  int64_t columns = larger((unpooled[1] - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1,
                           out.w() + conv.padding[1]);
  int64_t row_elements = columns * group_out + lanes;  // the last run's padding lanes are read and written back

  // The packed filters of a group: [chunk][channel][vectors of the chunk][lanes].
  int64_t filters_bytes() const { return round_up(group_in * vectors * lanes * int64_t(sizeof(T)), 64); }

  T* filters_of(char* memory, int64_t group) const { return reinterpret_cast<T*>(memory + group * filters_bytes()); }

  int64_t destination_bytes() const { return round_up(vectors * 8, 64) + round_up(vectors * 4, 64); }

  Destinations lay_out_destinations(char* memory) const {
    Destinations d{reinterpret_cast<int64_t*>(memory), reinterpret_cast<int32_t*>(memory + round_up(vectors * 8, 64))};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t r = v / run_vectors, within = v % run_vectors * lanes;
      const int64_t i = merged ? r : r / conv.kernel[1], j = merged ? 0 : r % conv.kernel[1];
      d.element[v] = i * conv.dilation[0] * row_elements + j * conv.dilation[1] * group_out + within;
      d.filled[v] = int32_t(smaller(lanes, run - within));
    }
    return d;
  }

  // weight is [K, C/groups, kh, kw], contiguous.
  void pack_filter(char* memory, int64_t group, int64_t channel) const {
    const S* source = static_cast<const S*>(weight.data) + (group * group_in + channel) * group_out * conv.taps();
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c0 = v / chunk, width = smaller(chunk, vectors - c0 * chunk);
      T* p = filters_of(memory, group) + (c0 * chunk * group_in + channel * width + (v - c0 * chunk)) * lanes;
      const int64_t r = v / run_vectors, within = v % run_vectors * lanes;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t e = within + lane;
        if (e >= run) {
          p[lane] = 0;
          continue;
        }
        const int64_t i = merged ? r : r / conv.kernel[1];
        const int64_t j = merged ? e / group_out : r % conv.kernel[1], c = e % group_out;
        p[lane] = to_compute(source[(c * conv.kernel[0] + i) * conv.kernel[1] + j]);
      }
    }
  }

  // Pooled values and switches with channels contiguous: as they are, or copied for one image.
  struct Pooled {
    View y, switches;
  };

  int64_t pack_bytes() const {
    return round_up(y.c() * y.h() * y.w() * int64_t(sizeof(S)), 64) + round_up(y.c() * y.h() * y.w(), 64) + 64;
  }

  Pooled pack(int64_t n, char* memory) const {
    Pooled packed{y, switches};
    const int64_t c = y.c(), w = y.w();
    const auto use = [&](View& v, void* data) {
      v.data = data;
      v.stride[0] = 0;
      v.stride[1] = 1;
      v.stride[2] = w * c;
      v.stride[3] = c;
    };
    if (channels_contiguous(y) || c == 1) {
      packed.y.data = at_mut<S>(y, n, 0, 0, 0);
      packed.y.stride[0] = 0;
    } else {
      pack_channels<S>(y, n, 0, c, reinterpret_cast<S*>(memory), [](S v) { return v; });
      use(packed.y, memory);
    }
    if (channels_contiguous(switches) || c == 1) {
      packed.switches.data = at_mut<uint8_t>(switches, n, 0, 0, 0);
      packed.switches.stride[0] = 0;
    } else {
      char* bytes = memory + round_up(y.c() * y.h() * y.w() * int64_t(sizeof(S)), 64);
      pack_channels<uint8_t>(switches, n, 0, c, reinterpret_cast<uint8_t*>(bytes), [](uint8_t v) { return v; });
      use(packed.switches, bytes);
    }
    return packed;
  }

  // Rows of the unpooled map that add to output rows [begin, end).
  Range places_for(int64_t begin, int64_t end) const {
    const int64_t reach = (conv.kernel[0] - 1) * conv.dilation[0];
    const int64_t low = begin + conv.padding[0] - reach, high = end - 1 + conv.padding[0];
    return {low > 0 ? ceil_div(low, conv.stride[0]) : 0, smaller(unpooled[0], high / conv.stride[0] + 1)};
  }

  // One image, one group, output rows [begin, end).
  void run_band(const Pooled& pooled, const T* filters, const Destinations& to, int64_t n, int64_t group,
                int64_t begin, int64_t end, char* memory) const {
    const Range rows = places_for(begin, end);
    const int64_t canvas_first = rows.begin * conv.stride[0] - conv.padding[0];
    const int64_t canvas_rows =
        rows.end > rows.begin
            ? (rows.end - 1 - rows.begin) * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1
            : 0;
    T* canvas = reinterpret_cast<T*>(memory);
    std::memset(canvas, 0, size_t(canvas_rows * row_elements) * sizeof(T));
    memory += round_up((canvas_rows * row_elements + lanes) * int64_t(sizeof(T)), 64);

    // The lists of a few rows at a time, so that they stay in the second-level cache while the chunks pass over them.
    const int64_t slice = slice_rows();
    const int64_t capacity = slice * unpooled[1] * group_in + 2 * lanes;
    Lists<T> lists;
    lists.value = reinterpret_cast<T*>(memory);
    memory += round_up(capacity * int64_t(sizeof(T)), 64);
    lists.channel = reinterpret_cast<int32_t*>(memory);
    memory += round_up(capacity * 4, 64);
    lists.begin = reinterpret_cast<int64_t*>(memory);
    memory += round_up((slice * unpooled[1] + 1) * 8, 64);
    lists.corner = reinterpret_cast<int64_t*>(memory);
    memory += round_up(slice * unpooled[1] * 8, 64);
    auto* windows = reinterpret_cast<CoveringWindow<S>*>(memory);

    for (int64_t row = rows.begin; row < rows.end;) {
      // Slices end at fixed rows of the map, whatever the band, so that the order of the additions is fixed too.
      const int64_t row_end = smaller(row / slice * slice + slice, rows.end);
      for (int64_t c = 0; c < group_in; c += block) {
        const int64_t c_end = smaller(c + block, group_in);
        list_rows(pooled, group * group_in, c, c_end, row, row_end, rows.begin, windows, lists);
        for (int64_t v = 0; v < vectors; v += chunk) {
          const int64_t width = smaller(chunk, vectors - v);
          pick_accumulate<T, most_vectors>(width)(filters + (v * group_in + c * width) * lanes, lists, canvas,
                                                  to.element + v, to.filled + v);
        }
      }
      row = row_end;
    }

    for (int64_t Y = begin; Y < end; ++Y)
      for (int64_t c = 0; c < group_out; ++c) {
        S* p = at_mut<S>(out, n, group * group_out + c, Y, 0);
        const int64_t canvas_row = Y - canvas_first;
        const T* q = canvas + canvas_row * row_elements + conv.padding[1] * group_out + c;
        const bool covered = canvas_row >= 0 && canvas_row < canvas_rows;
        const int64_t right = covered ? smaller(out.w(), columns - conv.padding[1]) : 0;
        for (int64_t X = 0; X < right; ++X) from_compute(q[X * group_out], p + X * out.stride[3]);
        for (int64_t X = right; X < out.w(); ++X) from_compute(T(0), p + X * out.stride[3]);
      }
  }

  // The lists of channels [c0, c1) of the group that starts at `group_channel`, for rows [row, row_end).
  void list_rows(const Pooled& pooled, int64_t group_channel, int64_t c0, int64_t c1, int64_t row, int64_t row_end,
                 int64_t first_row, CoveringWindow<S>* windows, Lists<T>& lists) const {
    int64_t length = 0;
    lists.places = 0;
    for (int64_t uy = row; uy < row_end; ++uy)
      for (int64_t ux = 0; ux < unpooled[1]; ++ux) {
        const int count = list_windows<S>(pooled.y, pooled.switches, pool, 0, uy, ux, windows);
        lists.begin[lists.places] = length;
        lists.corner[lists.places] =
            (uy - first_row) * conv.stride[0] * row_elements + ux * conv.stride[1] * group_out;
        ++lists.places;
        int64_t c = c0;
        for (; c + lanes <= c1; c += lanes)
          length += append_survivors<T>(gather_vector(windows, count, group_channel + c, last), int32_t(c - c0),
                                        lists.value + length, lists.channel + length);
        for (; c < c1; ++c) {
          const T v = gather_one(windows, count, group_channel + c, last);
          lists.value[length] = v;
          lists.channel[length] = int32_t(c - c0);
          length += !(v <= 0);
        }
      }
    lists.begin[lists.places] = length;
  }

  int64_t slice_rows() const {
    const int64_t bytes_a_row = unpooled[1] * group_in * int64_t(sizeof(T) + 4);
    return larger(1, smaller(unpooled[0], (int64_t(1) << 21) / larger(bytes_a_row, 1)));
  }

  int64_t band_bytes(int64_t band) const {
    const Range widest{0, smaller(unpooled[0], (band + (conv.kernel[0] - 1) * conv.dilation[0]) / conv.stride[0] + 2)};
    const int64_t canvas_rows = widest.end * conv.stride[0] + (conv.kernel[0] - 1) * conv.dilation[0] + 1;
    const int64_t slice = slice_rows();
    const int64_t capacity = slice * unpooled[1] * group_in + 2 * lanes;
    return round_up((canvas_rows * row_elements + lanes) * int64_t(sizeof(T)), 64) +
           round_up(capacity * int64_t(sizeof(T)), 64) + round_up(capacity * 4, 64) +
           round_up((slice * unpooled[1] + 1) * 8, 64) + round_up(slice * unpooled[1] * 8, 64) +
           most_covering(pool) * int64_t(sizeof(CoveringWindow<S>)) + 64;
  }

  void operator()(int threads) const {
    // Whole images where there are enough of them; else bands, whose edges are worked twice.
    const int64_t bands = y.n() >= 2 * threads ? 1 : smaller(out.h(), ceil_div(2 * threads, y.n()));
    const int64_t band = ceil_div(out.h(), bands);
    char* packed_filters = static_cast<char*>(thread_scratch(1, groups * filters_bytes()));
    parallel_for(y.c(), 65536 / (vectors * lanes) + 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) pack_filter(packed_filters, k / group_in, k % group_in);
    });
    parallel_for(y.n() * bands, 1, threads, [&](int64_t begin, int64_t end) {
      char* pooled_memory = static_cast<char*>(thread_scratch(2, pack_bytes()));
      char* band_memory = static_cast<char*>(thread_scratch(3, band_bytes(band) + destination_bytes()));
      const Destinations destinations = lay_out_destinations(band_memory);
      int64_t packed_image = -1;
      Pooled pooled{};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / bands, first = task % bands * band;
        if (n != packed_image) pooled = pack(n, pooled_memory);
        packed_image = n;
        for (int64_t group = 0; group < groups && first < out.h(); ++group)
          run_band(pooled, filters_of(packed_filters, group), destinations, n, group, first,
                   smaller(first + band, out.h()), band_memory + destination_bytes());
      }
    });
  }
};

}  // namespace

int64_t unpool_relu_conv_transpose2d(const View& y, const View& switches, const View& weight, const View& out,
                                     const int64_t unpooled[2], const Window& pool, const Window& conv, int64_t groups,
                                     Overlap overlap, int threads) {
  if (out.numel() == 0) return no_bad_switch;
  const int64_t bad = find_bad_switch(switches, pool, unpooled[0], unpooled[1], threads);
  if (bad != no_bad_switch) return bad;
  for_float_type(y.dtype, [&](auto* type) {
    typedef typename Pointee<decltype(type)>::type S;
    const Step<S> step{y, switches, weight, out, unpooled, pool, conv, groups, overlap == Overlap::last};
    step(threads);
  });
  return no_bad_switch;
}

}  // namespace ZF_ISA
}  // namespace zf
