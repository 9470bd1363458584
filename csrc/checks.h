// What the binding refuses: numbers with which a kernel would read or write outside of what it was given.
//
// zfcore/ops checks every argument too, and its messages are for users. These checks are the last ones, and the only ones
// for callers of zfcore._C; they stay in release builds, and cost a few comparisons a call. None can see whether a
// pointer leads to as much memory as the sizes and strides with it say: the caller answers for that.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "change.h"
#include "conv_delta.h"
#include "conv_strongest.h"
#include "deconv_step.h"
#include "lrn_delta.h"
#include "paste_boxes.h"
#include "view.h"

namespace zf {

constexpr int64_t most_elements = int64_t(1) << 48;  // of a kernel's scratch: more than memory, and times 64 no overflow
constexpr int64_t most_pixels = int64_t(1) << 31;    // along an axis, where kernels count in 32 bits
constexpr int64_t most_offset = int64_t(1) << 62;    // of a sum of products

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument("zfcore._C: " + what); }
inline void require(bool holds, const char* what) {
  if (!holds) refuse(what);
}

// The product of sizes of which none is negative, at most `most`.
inline int64_t product(std::initializer_list<int64_t> sizes, int64_t most = most_elements) {
  int64_t total = 1;
  for (int64_t size : sizes) require(size >= 0, "a size is negative");
  for (int64_t size : sizes)
    if (size == 0) return 0;
  for (int64_t size : sizes)
    require(!__builtin_mul_overflow(total, size, &total) && total <= most, "sizes multiply to more than memory holds");
  return total;
}

// a * b + c, all of them at least 0, under most_offset.
inline int64_t bounded(int64_t a, int64_t b, int64_t c) {
  int64_t value;
  require(!__builtin_mul_overflow(a, b, &value) && !__builtin_add_overflow(value, c, &value) && value < most_offset,
          "a window's numbers multiply to more than 64 bits hold");
  return value;
}

inline int64_t numel(const View& v) {
  return product({v.size[0], v.size[1], v.size[2], v.size[3]}, most_offset / 8);
}

inline void check_view(const View& v) {
  require(v.data || numel(v) == 0, "a tensor without memory");
  numel(v);
}
inline void check_float(const View& v) {
  check_view(v);
  require(v.dtype >= DType::f32 && v.dtype <= DType::f16, "a tensor of no float type");
}
inline void check_bytes(const View& v) {
  check_view(v);
  require(v.dtype == DType::u8, "switches of another type than bytes");
}
inline void check_same_size(const View& a, const View& b) {
  for (int axis = 0; axis < 4; ++axis) require(a.size[axis] == b.size[axis], "shapes do not belong together");
}
inline void check_same_dtype(const View& a, const View& b) { require(a.dtype == b.dtype, "dtypes do not belong together"); }
inline void check_contiguous(const View& v) {
  int64_t stride = 1;
  for (int axis = 3; axis >= 0; --axis) {
    require(v.size[axis] == 1 || v.stride[axis] == stride, "filters that are not contiguous");
    stride *= v.size[axis];
  }
}
inline void check_channels_last(const View& v) {
  require(v.size[1] == 1 || v.stride[1] == 1, "channels that are not next to each other");
}
inline void check_indices(const int64_t* p, int64_t count) { require(p || count == 0, "indices without memory"); }

// The windows of an axis, `count` of them over a map of `size` that has this stride in memory.
inline void check_axis(const Window& w, int axis, int64_t count, int64_t size, int64_t stride) {
  require(w.kernel[axis] >= 1 && w.stride[axis] >= 1 && w.dilation[axis] >= 1 && w.padding[axis] >= 0,
          "a window with a number that is too small");
  const int64_t reach = bounded(w.kernel[axis] - 1, w.dilation[axis], size);
  const int64_t last = bounded(std::max<int64_t>(count, 1) - 1, w.stride[axis], reach);
  bounded(bounded(1, w.padding[axis], last), std::max<int64_t>(stride, 1), 0);
}
inline void check_windows(const Window& w, const View& windows, const View& map) {
  for (int axis = 0; axis < 2; ++axis) check_axis(w, axis, windows.size[2 + axis], map.size[2 + axis], map.stride[2 + axis]);
}
inline void check_taps(const Window& w) { require(product({w.kernel[0], w.kernel[1]}) <= 255, "a window of over 255 taps"); }

// A pooled map, its switches and the map that they are about.
inline void check_pool(const View& pooled, const View& switches, const View& map, const Window& pool) {
  check_float(pooled);
  check_float(map);
  check_bytes(switches);
  check_same_size(pooled, switches);
  check_same_dtype(pooled, map);
  require(pooled.size[0] == map.size[0] && pooled.size[1] == map.size[1], "shapes do not belong together");
  check_windows(pool, pooled, map);
  check_taps(pool);
}

inline void check_pixels(const int64_t size[2]) {
  for (int axis = 0; axis < 2; ++axis)
    require(size[axis] >= 1 && size[axis] < most_pixels, "a map of no pixels, or of 2**31 or more along an axis");
}

inline void check_groups(int64_t groups, int64_t channels) {
  require(groups >= 1 && channels % groups == 0, "groups that do not divide the channels");
}

// What a window reaches from `count` places on, in pixels.
inline int64_t reach_of(const Window& w, int axis, int64_t count) {
  check_axis(w, axis, count, 0, 1);
  const int64_t reach = bounded(std::max<int64_t>(count, 1) - 1, w.stride[axis], bounded(w.kernel[axis] - 1, w.dilation[axis], 1));
  require(reach < most_pixels, "windows that reach over 2**31 pixels or more");
  return reach;
}

// Filters [K, C / groups, kh, kw] for packing; conv: of the convolution, null where its geometry plays no part.
inline void check_filters(const View& weight, const Window* conv, int64_t groups) {
  check_float(weight);
  require(numel(weight) > 0, "filters without a value");
  for (int axis = 0; conv && axis < 2; ++axis) {
    require(weight.size[2 + axis] == conv->kernel[axis], "filters of another kernel");
    reach_of(*conv, axis, 1);
  }
  check_groups(groups, weight.size[0]);
  product({weight.size[0] + 64, weight.size[1] + 64, weight.size[2], weight.size[3]});
}

// outputs: [C], of the result; for the CPU's kernel and CUDA's.
inline void check_step(const DeconvStep& step, int64_t outputs) {
  check_float(step.signal);
  check_float(step.out);
  check_same_dtype(step.signal, step.out);
  const int64_t b = step.signal.size[0];
  require(numel(step.signal) > 0 || b == 0, "a signal with an axis of 0");
  require(step.out.size[0] == b && step.out.size[1] == outputs, "shapes do not belong together");
  check_pixels(step.map);
  check_pixels(step.below);
  check_taps(step.pool);
  int64_t places[2], canvas[2];
  for (int axis = 0; axis < 2; ++axis) {
    places[axis] = reach_of(step.pool, axis, step.signal.size[2 + axis]);
    canvas[axis] = reach_of(step.conv, axis, places[axis]);
  }
  product({places[0], places[1], step.signal.size[1]});
  product({canvas[0], canvas[1], outputs + 64});
  for (int axis = 0; axis < 2 && b > 0; ++axis)
    require(step.out.size[2 + axis] == (step.whole ? step.frame ? step.out.size[2 + axis] : step.below[axis] : canvas[axis]),
            "a result of another size");
  const View* maps[2] = {&step.switches, &step.passes};
  for (const View* v : maps) {
    if (!v->data) continue;
    check_bytes(*v);
    require(v->size[1] == step.signal.size[1], "shapes do not belong together");
  }
  if (step.switches.data) {
    require(step.switches.size[1] == 1 || step.switches.stride[1] == 1 || !step.origin,
            "switches whose channels are not next to each other");
    require(step.switches.size[2] < most_pixels && step.switches.size[3] < most_pixels, "switches of too many windows");
  } else if (b > 0) {
    for (int axis = 0; axis < 2; ++axis)
      require(step.pool.kernel[axis] == 1 && step.pool.stride[axis] == 1, "a pool without switches");
  }
  require(!step.passes.data || (step.passes.size[2] == step.map[0] && step.passes.size[3] == step.map[1]),
          "passes of another map");
}

// The same of what lies in the CPU's memory: a GPU's indices cannot be read here, and its kernels look themselves.
inline void check_step_on_cpu(const DeconvStep& step) {
  if (!step.filters) check_contiguous(step.weight);  // else it is not read
  check_filters(step.weight, &step.conv, step.groups);
  check_same_dtype(step.signal, step.weight);
  require(step.weight.size[0] == step.signal.size[1], "filters of another number of channels");
  check_step(step, product({step.weight.size[1], step.groups}));
  for (int axis = 0; axis < 2; ++axis)  // of the ring that depthwise filters keep
    product({step.conv.kernel[axis], reach_of(step.conv, axis, step.signal.size[2 + axis]) * 2 + 64, int64_t(64)});
  const int64_t b = step.signal.size[0];
  for (const View* v : {&step.switches, &step.passes})
    for (int64_t i = 0; v->data && i < b; ++i) {
      const int64_t n = step.image ? step.image[i] : i;
      require(n >= 0 && n < v->size[0], "a patch of an image that is not there");
    }
  for (const int64_t* corners : {step.origin, step.frame})
    for (int64_t i = 0; corners && i < 2 * b; ++i) {
      const int axis = int(i % 2);
      require(corners[i] > -most_pixels && corners[i] < most_pixels, "a patch that begins 2**31 pixels off its map");
      const int64_t off = corners[i] < 0 ? -corners[i] : corners[i];
      const int64_t place = bounded(off, step.pool.stride[axis], step.pool.padding[axis]);
      bounded(place, step.conv.stride[axis], step.conv.padding[axis]);
    }
}

// Patches of changes whose result has as many channels. That they lie inside their maps, Change::check() looks.
inline void check_change(const Change& c) {
  for (const View* v : {&c.delta, &c.before, &c.after, &c.out}) {
    check_float(*v);
    check_channels_last(*v);
    check_same_dtype(*v, c.delta);
    require(v->size[1] == c.delta.size[1], "channels do not belong together");
  }
  require(c.delta.dtype == DType::f32 || c.delta.dtype == DType::f64, "changes of a half type");
  require(c.out.size[0] == c.delta.size[0] && c.before.size[0] == c.after.size[0], "shapes do not belong together");
  for (const int64_t* p : {c.image, c.origin, c.out_origin}) check_indices(p, c.delta.size[0]);
}
inline void check_same_patches(const Change& c) {
  check_change(c);
  check_same_size(c.delta, c.out);
  check_same_size(c.before, c.after);
}
inline void check_pool_change(const Change& c, const Window& pool) {
  check_change(c);
  check_windows(pool, c.after, c.before);
  check_taps(pool);
}

inline void check_conv_delta(const ConvDelta& op) {
  for (const View* v : {&op.delta, &op.out}) {
    check_float(*v);
    check_channels_last(*v);
  }
  check_same_dtype(op.delta, op.out);
  require(op.delta.dtype == DType::f32 || (op.delta.dtype == DType::f64 && !op.narrow), "changes of a half type");
  const int64_t b = op.delta.size[0];
  require(numel(op.delta) > 0 || b == 0, "changes with an axis of 0");
  require(op.out.size[0] == b, "shapes do not belong together");
  check_groups(op.groups, op.delta.size[1]);
  check_groups(op.groups, op.out.size[1]);
  check_pixels(op.map);
  check_pixels(op.above);
  for (int axis = 0; axis < 2; ++axis) {
    check_axis(op.conv, axis, op.above[axis], op.map[axis], op.delta.stride[2 + axis]);
    reach_of(op.conv, axis, op.out.size[2 + axis]);
    product({op.map[axis], op.conv.kernel[axis]}, most_pixels / 16);  // where each tap of each pixel leads is kept
    product({op.above[axis], 1}, most_pixels / 16);
  }
  product({reach_of(op.conv, 0, 1), reach_of(op.conv, 1, op.out.size[3]), op.out.size[1] + 64});
  check_indices(op.origin, b);
  check_indices(op.out_origin, b);
  if (!op.clean.data) return;
  check_view(op.clean);
  check_channels_last(op.clean);
  check_same_dtype(op.clean, op.delta);
  require(op.clean.size[1] == op.out.size[1] && op.clean.size[2] == op.above[0] && op.clean.size[3] == op.above[1],
          "clean maps of another shape");
  check_indices(op.image, b);
  for (int64_t i = 0; i < b; ++i)
    require(op.image[i] >= 0 && op.image[i] < op.clean.size[0], "a patch of an image that is not there");
}

inline void check_paste(const PasteBoxes& op) {
  for (const View* v : {&op.images, &op.fill, &op.out}) {
    check_float(*v);
    check_same_dtype(*v, op.images);
  }
  check_same_size(op.images, op.fill);
  check_channels_last(op.out);
  require(op.out.size[1] == op.images.size[1], "channels do not belong together");
  for (const int64_t* p : {op.image, op.origin, op.boxes}) check_indices(p, op.out.size[0]);
}

inline void check_units(const int64_t* units, int64_t count, int64_t maps, int64_t channels, const int64_t* index) {
  require(count >= 0, "a negative number of units");
  check_indices(units, count);
  check_indices(index, product({maps, count}));
  for (int64_t u = 0; u < count; ++u) require(units[u] >= 0 && units[u] < channels, "a unit that is not there");
}

inline void check_conv_strongest(const ConvStrongest& task) {
  for (const View* v : {&task.images, &task.weight}) {
    check_view(*v);
    require(v->dtype == DType::f32, "a dtype other than float32");
  }
  require(task.images.size[1] == task.weight.size[1] && task.images.size[1] >= 1, "channels do not belong together");
  require(task.weight.size[2] == task.conv.kernel[0] && task.weight.size[3] == task.conv.kernel[1], "another kernel");
  check_pixels(task.map);
  for (int axis = 0; axis < 2; ++axis) {
    check_axis(task.conv, axis, task.map[axis], task.images.size[2 + axis], task.images.stride[2 + axis]);
    reach_of(task.conv, axis, task.map[axis]);
  }
  product({task.images.size[1], reach_of(task.conv, 0, task.map[0]), reach_of(task.conv, 1, task.map[1])});
  product({task.weight.size[1], task.weight.size[2], task.weight.size[3], task.count + 64});
  check_units(task.units, task.count, task.images.size[0], task.weight.size[0], task.index);
  require(task.value || !task.index, "values without memory");
}

inline void check_lrn(const Change& c, const Lrn& lrn) {
  check_same_patches(c);
  require(lrn.size >= 1, "a normalisation over no channels");
}

}  // namespace zf
