// Do the CPU kernels of one instruction set agree with the generic ones? A few hundred seeded cases: all float types,
// layouts, windows, overlaps, odd values, and widths and channel counts around the vectors' lengths.
//   isa_agreement ISA [planted]     planted: spoils every result first, so each comparison must complain
// Pooling and unpooling must agree bit for bit, as must the changes of pooled and of rectified maps; the fused step, and
// the changes of convolved and of contrast-normalised maps and of other functions, within rounding. Inputs and outputs
// end, or begin, at an unreadable page; the bytes of an output's memory that belong to no element must stay as they were.
// Exit status: 0 they agree, 1 they do not, 2 wrong arguments, 77 this CPU lacks the instruction set.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#define ZF_ISA generic
#define ZF_VECTOR_BYTES 16
#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "window.h"

namespace {

using zf::DType;
using zf::Overlap;
using zf::View;
using zf::Window;
using zf::generic::bf16;
using zf::generic::f16;

constexpr uint8_t untouched = 0xa5;
constexpr int pool_cases = 320, fused_cases = 200, change_cases = 200;
const DType float_types[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::u8: return 1;
    default: return 2;
  }
}

const char* name_of(DType dtype) {
  const char* const names[] = {"f32", "f64", "bf16", "f16", "u8"};
  return names[int(dtype)];
}

// splitmix64: the same cases with every compiler and library.
struct Random {
  uint64_t state;

  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  template <size_t N>
  int64_t pick(const int64_t (&choices)[N]) {
    return choices[below(int64_t(N))];
  }
};

// Memory between two unreadable pages, all of it `untouched`. The used part ends, or begins, at such a page.
class Pages {
 public:
  Pages(int64_t bytes, bool at_end) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    usable_ = (bytes + 64 + page - 1) / page * page;
    total_ = usable_ + 2 * page;
    void* const all = mmap(nullptr, size_t(total_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    all_ = static_cast<uint8_t*>(all);
    begin_ = all_ + page;
    if (mprotect(begin_, size_t(usable_), PROT_READ | PROT_WRITE) != 0) {
      std::perror("mprotect");
      std::exit(2);
    }
    std::memset(begin_, untouched, size_t(usable_));
    used_ = at_end ? begin_ + usable_ - bytes : begin_;
  }
  ~Pages() { munmap(all_, size_t(total_)); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  uint8_t* used() const { return used_; }
  const uint8_t* begin() const { return begin_; }
  int64_t size() const { return usable_; }

 private:
  uint8_t *all_, *begin_, *used_;
  int64_t usable_, total_;
};

enum class Layout { nchw, nhwc, gaps_between_rows, gaps_between_pixels, wide_steps, transposed, expanded, count };

// A tensor in memory of its own.
class Map {
 public:
  Map(DType dtype, const int64_t (&size)[4], Layout layout, bool at_end)
      : view_(lay_out(dtype, size, layout)), pages_(extent(view_) * bytes_of(dtype), at_end) {
    view_.data = pages_.used();
  }

  const View& view() const { return view_; }
  uint8_t* element(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return pages_.used() + bytes_of(view_.dtype) * (n * view_.stride[0] + c * view_.stride[1] + h * view_.stride[2] +
                                                    w * view_.stride[3]);
  }
  template <class F>
  void each(const F& f) const {
    for (int64_t n = 0; n < view_.n(); ++n)
      for (int64_t c = 0; c < view_.c(); ++c)
        for (int64_t h = 0; h < view_.h(); ++h)
          for (int64_t w = 0; w < view_.w(); ++w) f(n, c, h, w);
  }
  // Whether every byte that belongs to no element is as it was made.
  bool rest_is_untouched() const {
    std::vector<bool> owned(size_t(pages_.size()));
    const int64_t bytes = bytes_of(view_.dtype);
    each([&](int64_t n, int64_t c, int64_t h, int64_t w) {
      const int64_t first = element(n, c, h, w) - pages_.begin();
      for (int64_t i = 0; i < bytes; ++i) owned[size_t(first + i)] = true;
    });
    for (int64_t i = 0; i < pages_.size(); ++i)
      if (!owned[size_t(i)] && pages_.begin()[i] != untouched) return false;
    return true;
  }

 private:
  static View lay_out(DType dtype, const int64_t (&size)[4], Layout layout) {
    View v;
    v.dtype = dtype;
    std::copy(size, size + 4, v.size);
    const int64_t c = size[1], h = size[2], w = size[3];
    const auto strides = [&](int64_t sn, int64_t sc, int64_t sh, int64_t sw) {
      const int64_t s[4] = {sn, sc, sh, sw};
      std::copy(s, s + 4, v.stride);
    };
    switch (layout) {
      case Layout::nhwc: strides(h * w * c, 1, w * c, c); break;
      case Layout::gaps_between_rows: strides(c * h * (w + 3), h * (w + 3), w + 3, 1); break;
      case Layout::gaps_between_pixels: strides(h * w * (c + 3), 1, w * (c + 3), c + 3); break;
      case Layout::wide_steps: strides(c * h * (2 * w + 1), h * (2 * w + 1), 2 * w + 1, 2); break;
      case Layout::transposed: strides(c * h * w, h * w, 1, h); break;
      case Layout::expanded: strides(0, h * w, w, 1); break;
      default: strides(c * h * w, h * w, w, 1); break;
    }
    return v;
  }
  static int64_t extent(const View& v) {
    int64_t last = 0;
    for (int axis = 0; axis < 4; ++axis) last += (v.size[axis] - 1) * v.stride[axis];
    return last + 1;
  }

  View view_;
  Pages pages_;
};

template <class S>
void put(uint8_t* address, double value) {
  S stored;
  zf::generic::from_compute(typename zf::generic::Compute<S>::type(value), &stored);
  std::memcpy(address, &stored, sizeof stored);
}
void put(DType dtype, uint8_t* address, double value) {
  zf::generic::for_float_type(dtype, [&](auto* type) {
    put<typename zf::generic::Pointee<decltype(type)>::type>(address, value);
  });
}

double get(DType dtype, const uint8_t* address) {
  double value = 0;
  zf::generic::for_float_type(dtype, [&](auto* type) {
    typename zf::generic::Pointee<decltype(type)>::type stored;
    std::memcpy(&stored, address, sizeof stored);
    value = double(zf::generic::to_compute(stored));
  });
  return value;
}

enum class Values { smooth, ties, special, lowest, count };

double draw(Random& random, Values values) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const double smooth = 2 * random.uniform() - 1;
  switch (values) {
    case Values::ties: {
      const double level = double(random.below(4));
      return random.one_in(2) ? level : -level;  // -0 too
    }
    case Values::special:
      switch (random.below(24)) {
        case 0: return nan;
        case 1: return -nan;
        case 2: return infinity;
        case 3: return -infinity;
        case 4: return -0.0;
        case 5: return smooth * 0x1p-20;  // subnormal in f16
        case 6: return smooth * 0x1p-135;  // subnormal in f32 and bf16
        default: return smooth;
      }
    case Values::lowest: return random.one_in(40) ? nan : random.one_in(40) ? smooth : -infinity;
    default: return smooth;
  }
}

void fill(const Map& map, Random& random, Values values) {
  map.each([&](int64_t n, int64_t c, int64_t h, int64_t w) {
    put(map.view().dtype, map.element(n, c, h, w), draw(random, values));
  });
}

// What runs, and what it was called with: printed when a case fails, also by a signal.
char now[512];
int failures = 0, comparisons = 0;
bool planted = false;

void complain(const char* what) {
  if (++failures <= 20) std::printf("MISMATCH %s: %s\n", now, what);
}

void on_crash(int signal) {
  // Only what a signal handler may do: the line is complete already.
  const char text[] = "CRASH ";
  ssize_t written = write(1, text, sizeof text - 1);
  written += write(1, now, std::strlen(now));
  written += write(1, "\n", 1);
  _exit(written > 0 ? 128 + signal : 1);
}

double largest_of(const Map& map) {
  double largest = 0;
  map.each([&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const double v = std::fabs(get(map.view().dtype, map.element(n, c, h, w)));
    if (std::isfinite(v)) largest = std::max(largest, v);
  });
  return largest;
}

// Tolerance 0: the same bits, but for NaNs when `any_nan`: an addition may pass on either operand's payload.
// Else the difference may be `tolerance` of the largest value, and one rounding of the storage type. at_least: how
// large a value was on the way, where a result that was cut short does not show it.
void compare(const char* what, const Map& expected, const Map& actual, double tolerance, bool any_nan,
             double at_least = 0) {
  ++comparisons;
  const DType dtype = expected.view().dtype;
  const int64_t bytes = bytes_of(dtype);
  if (planted) *actual.element(0, 0, 0, 0) ^= 0x40, actual.element(0, 0, 0, 0)[bytes - 1] ^= 0x41;
  const double largest = tolerance > 0 ? std::max(at_least, largest_of(expected)) : 0;
  const double rounding = dtype == DType::bf16 ? 0x1p-7 : dtype == DType::f16 ? 0x1p-10 : 0;
  const double smallest_step = dtype == DType::f16 ? 0x1p-24 : 0;
  int64_t wrong = 0;
  char first[256] = "";
  expected.each([&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const uint8_t *e = expected.element(n, c, h, w), *a = actual.element(n, c, h, w);
    if (std::memcmp(e, a, size_t(bytes)) == 0) return;
    const double want = dtype == DType::u8 ? *e : get(dtype, e), is = dtype == DType::u8 ? *a : get(dtype, a);
    if (any_nan && std::isnan(want) && std::isnan(is)) return;
    if (tolerance > 0 && std::isfinite(want) && std::isfinite(is) &&
        std::fabs(want - is) <= tolerance * largest + rounding * std::fabs(want) + smallest_step)
      return;
    if (wrong++ == 0)
      std::snprintf(first, sizeof first, "%s[%d,%d,%d,%d] is %.17g instead of %.17g", what, int(n), int(c), int(h),
                    int(w), is, want);
  });
  if (wrong) complain((std::string(first) + ", " + std::to_string(wrong) + " wrong").c_str());
  if (!actual.rest_is_untouched()) complain((std::string(what) + ": wrote outside its elements").c_str());
}

void compare(const char* what, int64_t expected, int64_t actual) {
  ++comparisons;
  if (expected != actual + (planted ? 1 : 0)) complain(what);
}

// Scratch that other work has left is no zeros: kernels must not count on it.
void spoil_scratch() {
  for (int slot = 0; slot < 4; ++slot) std::memset(zf::thread_scratch(slot, 1 << 16), 0xff, 1 << 16);
}

struct Kernels {
  decltype(&zf::generic::max_pool2d_with_switches) pool;
  decltype(&zf::generic::unpool_relu2d) unpool;
  decltype(&zf::generic::pool_gather2d) gather;
  decltype(&zf::generic::unpool_relu_conv_transpose2d) fused;
  decltype(&zf::generic::delta_filters_bytes) delta_bytes;
  decltype(&zf::generic::pack_delta_filters) pack_delta;
  decltype(&zf::generic::conv_delta) conv_delta;
  decltype(&zf::generic::pool_delta) pool_delta;
  decltype(&zf::generic::lrn_delta) lrn_delta;
  decltype(&zf::generic::relu_delta) relu_delta;
  decltype(&zf::generic::pointwise_delta) pointwise_delta;
};
#define KERNELS(isa)                                                                                      \
  Kernels {                                                                                               \
    &zf::isa::max_pool2d_with_switches, &zf::isa::unpool_relu2d, &zf::isa::pool_gather2d,                 \
        &zf::isa::unpool_relu_conv_transpose2d, &zf::isa::delta_filters_bytes, &zf::isa::pack_delta_filters, \
        &zf::isa::conv_delta, &zf::isa::pool_delta, &zf::isa::lrn_delta, &zf::isa::relu_delta,            \
        &zf::isa::pointwise_delta                                                                         \
  }

std::string describe(const char* label, int64_t a, int64_t b) {
  return std::string(" ") + label + " " + std::to_string(a) + "x" + std::to_string(b);
}

std::string describe(const char* label, const Window& w) {
  return describe(label, w.kernel[0], w.kernel[1]) + describe("stride", w.stride[0], w.stride[1]) +
         describe("padding", w.padding[0], w.padding[1]) + describe("dilation", w.dilation[0], w.dilation[1]);
}

void announce(int index, DType dtype, const std::string& rest) {
  std::snprintf(now, sizeof now, "case %d %s%s", index, name_of(dtype), rest.c_str());
}

Window draw_pool(Random& random) {
  Window pool;
  const int64_t kernels[] = {1, 2, 2, 3, 3, 3, 4, 5}, strides[] = {1, 2, 2, 3};
  const bool square = !random.one_in(3);
  for (int axis = 0; axis < 2; ++axis) {
    pool.kernel[axis] = axis && square ? pool.kernel[0] : random.pick(kernels);
    pool.stride[axis] = axis && square ? pool.stride[0] : random.pick(strides);
    pool.padding[axis] = random.below(pool.kernel[axis] / 2 + 1);
    pool.dilation[axis] = random.one_in(5) ? 2 : 1;
  }
  return pool;
}

// The size of a map that `count` windows fill, or a little more.
int64_t map_size(Random& random, const Window& pool, int axis, int64_t count) {
  const int64_t reach = pool.dilation[axis] * (pool.kernel[axis] - 1) + 1;
  const int64_t size = (count - 1) * pool.stride[axis] + reach - 2 * pool.padding[axis];
  return std::max<int64_t>(size + random.below(pool.stride[axis]), 1);
}

int64_t window_count(const Window& pool, int axis, int64_t size) {
  const int64_t reach = pool.dilation[axis] * (pool.kernel[axis] - 1) + 1;
  return std::max<int64_t>((size + 2 * pool.padding[axis] - reach) / pool.stride[axis] + 1, 1);
}

// A tap of its window for every switch, not only those that pooling would name; the map has one in every window.
void fill_switches(const Map& switches, Random& random, const Window& pool, int64_t height, int64_t width) {
  switches.each([&](int64_t n, int64_t c, int64_t oy, int64_t ox) {
    const auto tap = [&](int axis, int64_t o, int64_t size) {
      const zf::generic::Range inside = zf::generic::taps_inside(pool, axis, o, size);
      return inside.end > inside.begin ? inside.begin + random.below(inside.end - inside.begin) : 0;
    };
    *switches.element(n, c, oy, ox) = uint8_t(tap(0, oy, height) * pool.kernel[1] + tap(1, ox, width));
  });
}

void pool_case(int index, const Kernels& isa) {
  Random random{uint64_t(index)};
  const DType dtype = float_types[index % 4];
  const Window pool = draw_pool(random);
  // Half of the cases put vectors over columns, the others over channels.
  const int64_t lengths[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33};
  const int64_t channel_counts[] = {1, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49};
  const bool wide = random.one_in(2);
  const int64_t h = map_size(random, pool, 0, 1 + random.below(wide ? 4 : 8));
  const int64_t w = map_size(random, pool, 1, wide ? random.pick(lengths) : 1 + random.below(9));
  const int64_t c = wide ? 1 + random.below(5) : random.pick(channel_counts), n = 1 + random.below(2);
  const int64_t oh = window_count(pool, 0, h), ow = window_count(pool, 1, w);
  const int64_t in[4] = {n, c, h, w}, pooled[4] = {n, c, oh, ow};
  const Layout in_layout = Layout(random.below(int64_t(Layout::count)));
  const Layout out_layouts[] = {Layout::nchw, Layout::nhwc, Layout::gaps_between_rows, Layout::gaps_between_pixels,
                                Layout::wide_steps};
  const bool channels_last = in_layout == Layout::nhwc || in_layout == Layout::gaps_between_pixels;
  const Layout out_layout = random.one_in(4) ? out_layouts[random.below(5)]
                            : channels_last  ? Layout::nhwc
                                             : Layout::nchw;
  const Values values = Values(random.below(int64_t(Values::count)));
  const int threads = random.one_in(16) ? 3 : 1;
  const bool at_end = !random.one_in(4);
  const std::string shape = " n " + std::to_string(n) + " c " + std::to_string(c) + describe("map", h, w) +
                            describe("pool", pool) + " layouts " + std::to_string(int(in_layout)) + "," +
                            std::to_string(int(out_layout)) + " values " + std::to_string(int(values));

  const Map x(dtype, in, in_layout, at_end);
  fill(x, random, values);
  const Map y0(dtype, pooled, out_layout, at_end), y1(dtype, pooled, out_layout, at_end);
  const Map s0(DType::u8, pooled, out_layout, at_end), s1(DType::u8, pooled, out_layout, at_end);
  announce(index, dtype, " max_pool2d_with_switches" + shape);
  zf::generic::max_pool2d_with_switches(x.view(), y0.view(), s0.view(), pool, threads);
  spoil_scratch();
  isa.pool(x.view(), y1.view(), s1.view(), pool, threads);
  compare("y", y0, y1, 0, false);
  compare("switches", s0, s1, 0, false);

  const Map y(dtype, pooled, in_layout, at_end);
  fill(y, random, Values(random.below(int64_t(Values::lowest))));
  const bool drawn = random.one_in(2);
  if (drawn) fill_switches(s0, random, pool, h, w);
  if (random.one_in(12)) *s0.element(n - 1, random.below(c), random.below(oh), ow - 1) = uint8_t(pool.taps());
  for (const Overlap overlap : {Overlap::sum, Overlap::last}) {
    const bool relu = random.one_in(2);
    const std::string mode = std::string(overlap == Overlap::last ? " last" : " sum") + (relu ? " relu" : "");
    announce(index, dtype, " unpool_relu2d" + mode + shape);
    const Map u0(dtype, in, out_layout, at_end), u1(dtype, in, out_layout, at_end);
    const int64_t bad0 = zf::generic::unpool_relu2d(y.view(), s0.view(), u0.view(), pool, relu, overlap, threads);
    spoil_scratch();
    const int64_t bad1 = isa.unpool(y.view(), s0.view(), u1.view(), pool, relu, overlap, threads);
    compare("the bad switch", bad0, bad1);
    compare("out", u0, u1, 0, true);
    announce(index, dtype, " pool_gather2d" + mode + shape);
    const Map g0(dtype, pooled, out_layout, at_end), g1(dtype, pooled, out_layout, at_end);
    const int64_t bad2 = zf::generic::pool_gather2d(x.view(), s0.view(), g0.view(), pool, overlap, threads);
    spoil_scratch();
    const int64_t bad3 = isa.gather(x.view(), s0.view(), g1.view(), pool, overlap, threads);
    compare("the bad switch", bad2, bad3);
    compare("out", g0, g1, 0, false);
  }
}

void fused_case(int index, const Window& pool, const Window& conv, int64_t groups, int64_t group_in,
                int64_t group_out, int64_t height, int64_t width, Random& random, const Kernels& isa) {
  const DType dtype = float_types[index % 4];
  const int64_t n = 1 + random.below(2), k = groups * group_in, c = groups * group_out;
  const int64_t unpooled[2] = {height, width};
  int64_t out_size[2];
  for (int axis = 0; axis < 2; ++axis)
    out_size[axis] = (unpooled[axis] - 1) * conv.stride[axis] - 2 * conv.padding[axis] +
                     conv.dilation[axis] * (conv.kernel[axis] - 1) + 1 + random.below(conv.stride[axis]);
  if (out_size[0] < 1 || out_size[1] < 1) return;
  const int64_t pooled[4] = {n, k, window_count(pool, 0, height), window_count(pool, 1, width)};
  const int64_t weights[4] = {k, group_out, conv.kernel[0], conv.kernel[1]};
  const int64_t out[4] = {n, c, out_size[0], out_size[1]};
  const Overlap overlap = random.one_in(3) ? Overlap::last : Overlap::sum;
  const Layout layout = Layout(random.below(int64_t(Layout::count)));
  const Layout out_layout = random.one_in(2) ? Layout::nhwc : Layout::nchw;
  const bool at_end = !random.one_in(4);
  const int threads = random.one_in(16) ? 3 : 1;
  const Values values = random.one_in(8) ? Values::special : random.one_in(4) ? Values::ties : Values::smooth;

  const Map y(dtype, pooled, layout, at_end), weight(dtype, weights, Layout::nchw, at_end);
  const Map switches(DType::u8, pooled, random.one_in(2) ? layout : Layout::nchw, at_end);
  fill(y, random, values);
  fill(weight, random, Values::smooth);
  if (values == Values::special && random.one_in(2))
    put(dtype, weight.element(random.below(k), random.below(group_out), 0, 0),
        std::numeric_limits<double>::infinity());
  fill_switches(switches, random, pool, height, width);
  announce(index, dtype,
           " unpool_relu_conv_transpose2d n " + std::to_string(n) + " groups " + std::to_string(groups) +
               describe("channels", group_in, group_out) + describe("map", height, width) + describe("pool", pool) +
               describe("conv", conv) + " layouts " + std::to_string(int(layout)) + "," +
               std::to_string(int(out_layout)) + " values " + std::to_string(int(values)));
  const Map z0(dtype, out, out_layout, at_end), z1(dtype, out, out_layout, at_end);
  const int64_t bad0 = zf::generic::unpool_relu_conv_transpose2d(y.view(), switches.view(), weight.view(), z0.view(),
                                                                 unpooled, pool, conv, groups, overlap, threads);
  spoil_scratch();
  const int64_t bad1 = isa.fused(y.view(), switches.view(), weight.view(), z1.view(), unpooled, pool, conv, groups,
                                 overlap, threads);
  compare("the bad switch", bad0, bad1);
  compare("out", z0, z1, dtype == DType::f64 ? 1e-12 : 1e-5, true);
}

void drawn_fused_case(int index, const Kernels& isa) {
  Random random{uint64_t(index) + 1000000};
  const Window pool = draw_pool(random);
  const int64_t kernels[] = {1, 2, 3, 3, 5, 7}, group_counts[] = {1, 1, 2, 3};
  const int64_t outputs[] = {1, 2, 3, 5, 8, 16, 17, 33};
  const int64_t inputs[] = {1, 3, 5, 7, 8, 9, 15, 16, 17, 24, 32, 33, 47, 48, 49};
  Window conv;
  for (int axis = 0; axis < 2; ++axis) {
    conv.kernel[axis] = random.pick(kernels);
    conv.stride[axis] = 1 + random.below(2);
    conv.padding[axis] = random.below(conv.kernel[axis]);
    conv.dilation[axis] = random.one_in(4) ? 2 : 1;
  }
  const int64_t groups = random.pick(group_counts), group_in = random.pick(inputs), group_out = random.pick(outputs);
  const int64_t height = map_size(random, pool, 0, 1 + random.below(5));
  const int64_t width = map_size(random, pool, 1, 1 + random.below(6));
  fused_case(index, pool, conv, groups, group_in, group_out, height, width, random, isa);
}

// Filters of every number of vectors, from less than one to more than one chunk.
void sweep_fused_widths(const Kernels& isa) {
  const Window pool{{3, 3}, {2, 2}, {1, 1}, {1, 1}}, conv{{1, 1}, {1, 1}, {0, 0}, {1, 1}};
  for (int quarter = 1; quarter <= 52; ++quarter)
    for (int type = 0; type < 4; ++type) {
      const int index = 10000 + quarter * 4 + type;
      Random random{uint64_t(index)};
      fused_case(index, pool, conv, 1, 5 + quarter, quarter * 4 - quarter % 3, 5, 6, random, isa);
    }
}

// Patches of changes: where they lie in the maps below and above, and in which image's.
struct Patches {
  std::vector<int64_t> image, origin, corner;
};

void fill_change(const Map& delta, Random& random, Values values) {
  const int64_t zeros = 1 + random.below(3);  // one value in so many is not zero
  delta.each([&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const double nothing = random.one_in(2) ? 0.0 : -0.0;
    put(delta.view().dtype, delta.element(n, c, h, w), random.one_in(zeros) ? draw(random, values) : nothing);
  });
}

void conv_delta_case(int index, const Kernels& isa) {
  Random random{uint64_t(index) + 2000000};
  const DType dtype = index % 3 ? DType::f32 : DType::f64;
  const int64_t kernels[] = {1, 2, 3, 3, 5, 7}, group_counts[] = {1, 1, 1, 2, 3};
  const int64_t inputs[] = {1, 3, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 49, 130};
  const int64_t outputs[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 49, 65};
  zf::ConvDelta op;
  int64_t size[2], reach[2];
  for (int axis = 0; axis < 2; ++axis) {
    op.conv.kernel[axis] = random.pick(kernels);
    op.conv.stride[axis] = 1 + random.below(3);
    op.conv.padding[axis] = random.below(op.conv.kernel[axis]);
    op.conv.dilation[axis] = random.one_in(4) ? 2 : 1;
    op.above[axis] = 1 + random.below(6);
    op.map[axis] = map_size(random, op.conv, axis, op.above[axis]);
    size[axis] = random.one_in(3) ? op.map[axis] : 1 + random.below(op.map[axis]);
  }
  op.groups = random.pick(group_counts);
  const int64_t batches[] = {1, 2, 5, 6, 11, 12, 13, 25}, b = random.pick(batches), images = 1 + random.below(2);
  const int64_t c = op.groups * random.pick(inputs), k = op.groups * random.pick(outputs);
  // The whole map is the result, or what the widest of the patches reaches.
  Patches at;
  const bool whole = random.one_in(2);
  for (int64_t i = 0; i < b; ++i) {
    at.image.push_back(random.below(images));
    for (int axis = 0; axis < 2; ++axis) at.origin.push_back(random.below(op.map[axis] - size[axis] + 1));
  }
  std::vector<int64_t> first(size_t(2 * b));
  for (int axis = 0; axis < 2; ++axis) {
    reach[axis] = 1;
    for (int64_t i = 0; i < b; ++i) {
      const int64_t s = op.conv.stride[axis], begin = at.origin[size_t(2 * i + axis)] + op.conv.padding[axis];
      const int64_t low = begin - op.conv.dilation[axis] * (op.conv.kernel[axis] - 1);
      const int64_t from = std::min(low > 0 ? (low + s - 1) / s : 0, op.above[axis] - 1);
      const int64_t to = std::min((begin + size[axis] - 1) / s, op.above[axis] - 1);
      first[size_t(2 * i + axis)] = from;
      reach[axis] = std::max(reach[axis], to - from + 1);
    }
    if (whole) reach[axis] = op.above[axis];
  }
  for (int64_t i = 0; i < 2 * b; ++i)
    at.corner.push_back(std::min(first[size_t(i)], op.above[i % 2] - reach[i % 2]));

  op.narrow = dtype == DType::f32 && random.one_in(3);
  const bool at_end = !random.one_in(4);
  const int threads = random.one_in(16) ? 3 : 1;
  const Values values = random.one_in(8) ? Values::special : random.one_in(4) ? Values::ties : Values::smooth;
  const int64_t deltas[4] = {b, c, size[0], size[1]}, weights[4] = {k, c / op.groups, op.conv.kernel[0], op.conv.kernel[1]};
  const int64_t cleans[4] = {images, k, op.above[0], op.above[1]}, outs[4] = {b, k, reach[0], reach[1]};
  const int64_t scales[4] = {1, k, 1, 1};
  const Layout layouts[] = {Layout::nhwc, Layout::nhwc, Layout::gaps_between_pixels};
  const Map delta(dtype, deltas, layouts[random.below(3)], at_end), weight(dtype, weights, Layout::nchw, at_end);
  const Map clean(dtype, cleans, layouts[random.below(3)], at_end), scale(dtype, scales, Layout::nhwc, at_end);
  fill_change(delta, random, values);
  fill(weight, random, Values::smooth);
  fill(clean, random, values);
  fill(scale, random, Values::smooth);
  const bool scaled = random.one_in(2);
  if (random.one_in(10))
    put(dtype, weight.element(random.below(k), c / op.groups - 1, 0, 0), std::numeric_limits<double>::quiet_NaN());
  op.rectifier = {random.one_in(2) ? 0.0 : 0.2, random.one_in(2) ? 0.7 : std::numeric_limits<double>::infinity()};
  op.delta = delta.view();
  op.origin = at.origin.data(), op.out_origin = at.corner.data(), op.image = at.image.data();
  announce(index, dtype,
           " conv_delta batch " + std::to_string(b) + " groups " + std::to_string(op.groups) +
               (op.narrow ? " narrow" : "") + describe("channels", c / op.groups, k / op.groups) + describe("map", op.map[0], op.map[1]) +
               describe("patch", size[0], size[1]) + describe("result", reach[0], reach[1]) + describe("conv", op.conv) +
               " values " + std::to_string(int(values)));
  const Layout out_layout = layouts[random.below(3)];
  const Map g0(dtype, outs, out_layout, at_end), g1(dtype, outs, out_layout, at_end);
  const Map z0(dtype, outs, out_layout, at_end), z1(dtype, outs, out_layout, at_end);
  const auto apply = [&](const Map& change, const Map& out, auto bytes, auto pack, auto run) {
    const Pages filters(bytes(weight.view(), op.groups, op.narrow), true);
    const bool finite = pack(weight.view(), scaled ? scale.view().data : nullptr, filters.used(), op.groups,
                             op.narrow, threads);
    if (!finite) return false;
    op.filters = filters.used();
    op.clean.data = nullptr;
    op.out = change.view();
    run(op, threads);
    op.clean = clean.view();
    op.out = out.view();
    run(op, threads);
    return true;
  };
  const bool finite0 = apply(g0, z0, &zf::generic::delta_filters_bytes, &zf::generic::pack_delta_filters,
                             &zf::generic::conv_delta);
  spoil_scratch();
  const bool finite1 = apply(g1, z1, isa.delta_bytes, isa.pack_delta, isa.conv_delta);
  compare("whether the filters are finite", finite0, finite1);
  if (!finite0) return;
  const double tolerance = dtype == DType::f64 ? 1e-12 : 1e-5;
  compare("out", g0, g1, tolerance, true);
  compare("rectified out", z0, z1, tolerance, true, std::max(largest_of(g0), largest_of(clean)));
}

void change_case(int index, const Kernels& isa) {
  Random random{uint64_t(index) + 3000000};
  const DType dtype = index % 3 ? DType::f32 : DType::f64;
  const int64_t channel_counts[] = {1, 3, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49, 130};
  const Window pool = draw_pool(random);
  const int64_t b = 1 + random.below(7), images = 1 + random.below(2), c = random.pick(channel_counts);
  int64_t map[2], above[2], size[2], pooled_size[2];
  for (int axis = 0; axis < 2; ++axis) {
    map[axis] = map_size(random, pool, axis, 1 + random.below(6));
    above[axis] = window_count(pool, axis, map[axis]);
    size[axis] = random.one_in(3) ? map[axis] : 1 + random.below(map[axis]);
    pooled_size[axis] = random.one_in(3) ? above[axis] : 1 + random.below(above[axis]);
  }
  Patches at;
  for (int64_t i = 0; i < b; ++i) {
    at.image.push_back(random.below(images));
    for (int axis = 0; axis < 2; ++axis) {
      at.origin.push_back(random.below(map[axis] - size[axis] + 1));
      at.corner.push_back(random.below(above[axis] - pooled_size[axis] + 1));
    }
  }
  const bool at_end = !random.one_in(4);
  const int threads = random.one_in(16) ? 3 : 1;
  const Values values = Values(random.below(int64_t(Values::lowest)));
  const int64_t deltas[4] = {b, c, size[0], size[1]}, below[4] = {images, c, map[0], map[1]};
  const int64_t pooled[4] = {images, c, above[0], above[1]}, outs[4] = {b, c, pooled_size[0], pooled_size[1]};
  const Layout layouts[] = {Layout::nhwc, Layout::nhwc, Layout::gaps_between_pixels};
  const Map delta(dtype, deltas, layouts[random.below(3)], at_end), before(dtype, below, layouts[random.below(3)], at_end);
  const Map after(dtype, below, layouts[random.below(3)], at_end), maxima(dtype, pooled, layouts[random.below(3)], at_end);
  fill_change(delta, random, values);
  for (const Map* map : {&before, &after, &maxima}) fill(*map, random, values);
  const std::string shape = " batch " + std::to_string(b) + " c " + std::to_string(c) + describe("map", map[0], map[1]) +
                            describe("patch", size[0], size[1]) + describe("pool", pool) + " values " +
                            std::to_string(int(values));
  const auto change = [&](const Map& above, const Map& out, const std::vector<int64_t>& corner) {
    return zf::Change{delta.view(), before.view(), above.view(), out.view(), at.image.data(), at.origin.data(), corner.data()};
  };
  const Layout out_layout = layouts[random.below(3)];

  announce(index, dtype, " pool_delta" + shape);
  const Map p0(dtype, outs, out_layout, at_end), p1(dtype, outs, out_layout, at_end);
  zf::generic::pool_delta(change(maxima, p0, at.corner), pool, threads);
  spoil_scratch();
  isa.pool_delta(change(maxima, p1, at.corner), pool, threads);
  compare("out", p0, p1, 0, true);

  const int64_t sizes[] = {1, 2, 3, 5, 5, 8, 20};
  const double betas[] = {0.75, 0.5, 1, 0.6};
  const zf::Lrn lrn{random.pick(sizes), random.one_in(2) ? 1e-4 : 0.5, betas[random.below(4)], double(1 + random.below(2))};
  announce(index, dtype, " lrn_delta size " + std::to_string(lrn.size) + shape);
  const Map l0(dtype, deltas, out_layout, at_end), l1(dtype, deltas, out_layout, at_end);
  zf::generic::lrn_delta(change(after, l0, at.origin), lrn, threads);
  spoil_scratch();
  isa.lrn_delta(change(after, l1, at.origin), lrn, threads);
  compare("out", l0, l1, dtype == DType::f64 ? 1e-12 : 1e-5, true, largest_of(before));

  // A slope makes a product, which one instruction set fuses with the sum that follows and another does not.
  const zf::Rectifier rectifier{random.one_in(2) ? 0.0 : 0.2, random.one_in(2) ? 0.7 : INFINITY};
  announce(index, dtype, " relu_delta" + shape);
  const Map r0(dtype, deltas, out_layout, at_end), r1(dtype, deltas, out_layout, at_end);
  zf::generic::relu_delta(change(before, r0, at.origin), rectifier, threads);
  spoil_scratch();
  isa.relu_delta(change(before, r1, at.origin), rectifier, threads);
  compare("out", r0, r1, rectifier.slope == 0 ? 0 : dtype == DType::f64 ? 1e-12 : 1e-5, true, 2);

  const zf::Pointwise f{zf::Function(index % int(zf::Function::count)), 0.5 + random.uniform(), 2};
  announce(index, dtype, " pointwise_delta function " + std::to_string(int(f.function)) + shape);
  const Map f0(dtype, deltas, out_layout, at_end), f1(dtype, deltas, out_layout, at_end);
  zf::generic::pointwise_delta(change(before, f0, at.origin), f, threads);
  spoil_scratch();
  isa.pointwise_delta(change(before, f1, at.origin), f, threads);
  compare("out", f0, f1, dtype == DType::f64 ? 1e-12 : 1e-6, true, 2);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  planted = argc > 2 && std::string(argv[2]) == "planted";
  zf::Isa isa;
  Kernels kernels;
#if defined(ZF_HAVE_AVX2)
  if (name == "avx2") {
    isa = zf::Isa::avx2;
    kernels = KERNELS(avx2);
  } else
#endif
#if defined(ZF_HAVE_AVX512)
      if (name == "avx512") {
    isa = zf::Isa::avx512;
    kernels = KERNELS(avx512);
  } else
#endif
  {
    std::fprintf(stderr, "isa_agreement: '%s' is no instruction set of this build besides generic\n", name.c_str());
    return 2;
  }
  if (!zf::isa_usable(isa)) {
    std::printf("isa_agreement: this CPU has no %s\n", name.c_str());
    return 77;
  }
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) ::signal(signal, on_crash);
  for (int index = 0; index < pool_cases; ++index) pool_case(index, kernels);
  std::printf("isa_agreement %s: pooling and unpooling: %d comparisons, %d mismatches\n", name.c_str(), comparisons,
              failures);
  const int pool_failures = failures, pool_comparisons = comparisons;
  for (int index = 0; index < fused_cases; ++index) drawn_fused_case(index, kernels);
  sweep_fused_widths(kernels);
  std::printf("isa_agreement %s: fused step: %d comparisons, %d mismatches\n", name.c_str(),
              comparisons - pool_comparisons, failures - pool_failures);
  const int fused_failures = failures, fused_comparisons = comparisons;
  for (int index = 0; index < change_cases; ++index) conv_delta_case(index, kernels);
  for (int index = 0; index < change_cases; ++index) change_case(index, kernels);
  std::printf("isa_agreement %s: changes: %d comparisons, %d mismatches\n", name.c_str(),
              comparisons - fused_comparisons, failures - fused_failures);
  return failures ? 1 : 0;
}
