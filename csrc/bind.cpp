// The only file that knows Python: one m.def per entry point, and build_info().
//
// A tensor arrives as the tuple (data pointer, dtype code, sizes, strides); zfcore/ops/_boundary.py makes them, keeps
// the memory alive and has checked every shape. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "checks.h"
#include "conv_delta.h"
#include "conv_strongest.h"
#include "deconv_step.h"
#include "dispatch.h"
#include "hash.h"
#include "lrn_delta.h"
#include "max_pool2d_with_switches.h"
#include "parallel.h"
#include "paste_boxes.h"
#include "pointwise_delta.h"
#include "pool_delta.h"
#include "relu_delta.h"
#include "strongest.h"
#include "unpool_relu2d.h"
#include "unpool_relu_conv_transpose2d.h"

namespace py = pybind11;

namespace {

using Quad = std::array<int64_t, 4>;
using Pair = std::array<int64_t, 2>;
using TensorTuple = std::tuple<uintptr_t, int, Quad, Quad>;
using Memory = std::pair<uintptr_t, int64_t>;  // packed filters, and their bytes
using WindowTuple = std::tuple<Pair, Pair, Pair, Pair>;

zf::View view(const TensorTuple& t) {
  zf::View v;
  v.data = reinterpret_cast<void*>(std::get<0>(t));
  const int dtype = std::get<1>(t);
  zf::require(dtype >= static_cast<int>(zf::DType::f32) && dtype <= static_cast<int>(zf::DType::u8), "no dtype");
  v.dtype = static_cast<zf::DType>(dtype);
  for (int i = 0; i < 4; ++i) v.size[i] = std::get<2>(t)[i], v.stride[i] = std::get<3>(t)[i];
  return v;
}

zf::Window window(const WindowTuple& t) {
  zf::Window w;
  for (int i = 0; i < 2; ++i) {
    w.kernel[i] = std::get<0>(t)[i];
    w.stride[i] = std::get<1>(t)[i];
    w.padding[i] = std::get<2>(t)[i];
    w.dilation[i] = std::get<3>(t)[i];
  }
  return w;
}

// Outputs are fresh and dense. Bigger ones are faulted in by huge pages where the system allows it.
zf::View output(const TensorTuple& t) {
  const zf::View v = view(t);
  static constexpr int64_t item[] = {4, 8, 2, 2, 1};
  zf::advise_huge_pages(v.data, zf::numel(v) * item[static_cast<int>(v.dtype)]);
  return v;
}

using ChangeTuple = std::tuple<TensorTuple, TensorTuple, TensorTuple, TensorTuple, uintptr_t, uintptr_t, uintptr_t>;

zf::Change change(const ChangeTuple& t) {
  zf::Change c;
  c.delta = view(std::get<0>(t));
  c.before = view(std::get<1>(t));
  c.after = view(std::get<2>(t));
  c.out = output(std::get<3>(t));
  c.image = reinterpret_cast<const int64_t*>(std::get<4>(t));
  c.origin = reinterpret_cast<const int64_t*>(std::get<5>(t));
  c.out_origin = reinterpret_cast<const int64_t*>(std::get<6>(t));
  return c;
}

// images, fill, out; image, origin, boxes.
using PasteTuple = std::tuple<TensorTuple, TensorTuple, TensorTuple, uintptr_t, uintptr_t, uintptr_t>;

zf::PasteBoxes paste(const PasteTuple& t) {
  zf::PasteBoxes op;
  op.images = view(std::get<0>(t));
  op.fill = view(std::get<1>(t));
  op.out = view(std::get<2>(t));
  op.image = reinterpret_cast<const int64_t*>(std::get<3>(t));
  op.origin = reinterpret_cast<const int64_t*>(std::get<4>(t));
  op.boxes = reinterpret_cast<const int64_t*>(std::get<5>(t));
  return op;
}

// Maps that patches are of: none at all would pass for maps that were not given.
zf::View filled(const TensorTuple& t, const zf::View& patches) {
  const zf::View v = view(t);
  zf::require(v.data || patches.n() == 0, "patches of maps that are not there");
  return v;
}

// What both backends' steps of the deconvnet are given.
zf::DeconvStep deconv_step(const TensorTuple& signal, const std::optional<TensorTuple>& switches,
                           const std::optional<TensorTuple>& passes, uintptr_t filters, const zf::View& out,
                           uintptr_t image, uintptr_t origin, uintptr_t frame, const Pair& map, const Pair& below,
                           const WindowTuple& pool, const WindowTuple& conv, bool rectify, bool overlap_last, bool whole) {
  zf::DeconvStep step;
  step.signal = view(signal);
  if (switches) step.switches = filled(*switches, step.signal);
  if (passes) step.passes = filled(*passes, step.signal);
  step.filters = reinterpret_cast<const void*>(filters);
  step.out = out;
  step.image = reinterpret_cast<const int64_t*>(image);
  step.origin = reinterpret_cast<const int64_t*>(origin);
  step.frame = reinterpret_cast<const int64_t*>(frame);
  for (int axis = 0; axis < 2; ++axis) step.map[axis] = map[axis], step.below[axis] = below[axis];
  step.pool = window(pool);
  step.conv = window(conv);
  step.rectify = rectify;
  step.last = overlap_last;
  step.whole = whole;
  return step;
}

// The filters' memory, of which a kernel takes `bytes`.
void* packed(const Memory& filters, int64_t bytes) {
  zf::require(filters.first && filters.second >= bytes, "packed filters in too little memory");
  return reinterpret_cast<void*>(filters.first);
}

int at_least_one(int threads) { return threads < 1 ? 1 : threads; }

zf::Overlap overlap(bool last) { return last ? zf::Overlap::last : zf::Overlap::sum; }

zf::Isa isa_of(const std::string& name) {
  for (zf::Isa isa : {zf::Isa::generic, zf::Isa::avx2, zf::Isa::avx512})
    if (name == zf::isa_name(isa)) return isa;
  throw py::value_error("isa must be 'generic', 'avx2' or 'avx512', got '" + name + "'");
}

py::dict build_info() {
  py::dict d;
  d["version"] = ZF_VERSION;
#if defined(__VERSION__)
  d["compiler"] = __VERSION__;
#endif
  d["build_type"] = ZF_BUILD_TYPE;
  d["openmp"] = bool(ZF_WITH_OPENMP);
  d["isas"] = ZF_ISAS;
  d["with_cuda"] = bool(ZF_WITH_CUDA);
  d["cuda_version"] = ZF_WITH_CUDA ? ZF_CUDA_VERSION : "";
  d["cuda_architectures"] = ZF_WITH_CUDA ? ZF_CUDA_ARCHITECTURES : "";
  d["sanitize"] = ZF_SANITIZE;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "zfcore's native kernels. Call them through zfcore.ops, which checks every argument.";
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::invalid_argument& error) {
      py::set_error(py::module_::import("zfcore.errors").attr("ArgumentError"), error.what());
    }
  });
  m.def("build_info", &build_info);
  m.def("cpu_features", [] {
    const zf::CpuFeatures& f = zf::cpu_features();
    py::dict d;
    d["avx2"] = f.avx2;
    d["fma"] = f.fma;
    d["f16c"] = f.f16c;
    d["avx512f"] = f.avx512f;
    d["avx512bw"] = f.avx512bw;
    d["avx512vl"] = f.avx512vl;
    d["avx512dq"] = f.avx512dq;
    d["avx512_bf16"] = f.avx512_bf16;
    return d;
  });
  m.def("cpu_isa", [] { return std::string(zf::isa_name(zf::active_isa())); });
  m.def("set_cpu_isa", [](const std::string& name) { zf::set_active_isa(isa_of(name)); });
  m.def("usable_isas", [] {
    py::list names;
    for (zf::Isa isa : {zf::Isa::generic, zf::Isa::avx2, zf::Isa::avx512})
      if (zf::isa_usable(isa)) names.append(zf::isa_name(isa));
    return names;
  });

  m.def("max_pool2d_with_switches_cpu", [](const TensorTuple& x, const TensorTuple& y, const TensorTuple& switches,
                                           const WindowTuple& pool, int threads) {
    py::gil_scoped_release release;
    zf::check_pool(view(y), view(switches), view(x), window(pool));
    zf::max_pool2d_with_switches_cpu(view(x), output(y), output(switches), window(pool), at_least_one(threads));
  });
  m.def("unpool_relu2d_cpu", [](const TensorTuple& y, const TensorTuple& switches, const TensorTuple& out,
                                const WindowTuple& pool, bool relu, bool overlap_last, int threads) {
    py::gil_scoped_release release;
    zf::check_pool(view(y), view(switches), view(out), window(pool));
    return zf::unpool_relu2d_cpu(view(y), view(switches), output(out), window(pool), relu, overlap(overlap_last),
                                 at_least_one(threads));
  });
  m.def("pool_gather2d_cpu", [](const TensorTuple& x, const TensorTuple& switches, const TensorTuple& out,
                                const WindowTuple& pool, bool overlap_last, int threads) {
    py::gil_scoped_release release;
    zf::check_pool(view(out), view(switches), view(x), window(pool));
    return zf::pool_gather2d_cpu(view(x), view(switches), output(out), window(pool), overlap(overlap_last), at_least_one(threads));
  });
  m.def("unpool_relu_conv_transpose2d_cpu",
        [](const TensorTuple& y, const TensorTuple& switches, const TensorTuple& weight, const TensorTuple& out,
           const Pair& unpooled, const WindowTuple& pool, const WindowTuple& conv, int64_t groups, bool overlap_last,
           int threads) {
          py::gil_scoped_release release;
          zf::DeconvStep whole;  // which it is, of switches that are checked
          whole.signal = view(y);
          whole.switches = view(switches);
          whole.weight = view(weight);
          whole.out = view(out);
          whole.groups = groups;
          whole.whole = true;
          for (int axis = 0; axis < 2; ++axis) whole.map[axis] = unpooled[axis], whole.below[axis] = whole.out.size[2 + axis];
          whole.pool = window(pool);
          whole.conv = window(conv);
          zf::check_step_on_cpu(whole);
          zf::check_same_size(whole.signal, whole.switches);
          return zf::unpool_relu_conv_transpose2d_cpu(view(y), view(switches), view(weight), output(out),
                                                      unpooled.data(), window(pool), window(conv), groups,
                                                      overlap(overlap_last), at_least_one(threads));
        });

  m.def("deconv_step_cpu",
        [](const TensorTuple& signal, const std::optional<TensorTuple>& switches,
           const std::optional<TensorTuple>& passes, const TensorTuple& weight, const Memory& filters,
           const TensorTuple& out, uintptr_t image, uintptr_t origin, uintptr_t frame, const Pair& map, const Pair& below,
           const WindowTuple& pool, const WindowTuple& conv, int64_t groups, bool rectify, bool overlap_last,
           bool whole, int threads) {
          py::gil_scoped_release release;
          zf::DeconvStep step = deconv_step(signal, switches, passes, filters.first, output(out), image, origin, frame, map, below,
                                            pool, conv, rectify, overlap_last, whole);
          step.weight = view(weight);
          step.groups = groups;
          zf::check_step_on_cpu(step);
          packed(filters, zf::packed_filters_bytes_cpu(step.weight, step.weight.dtype, step.conv, groups));
          zf::deconv_step_cpu(step, at_least_one(threads));
        });
  m.def("strongest_cpu", [](const TensorTuple& maps, uintptr_t units, int64_t count, uintptr_t index, int threads) {
    py::gil_scoped_release release;
    zf::check_float(view(maps));
    zf::check_units(reinterpret_cast<const int64_t*>(units), count, view(maps).n(), view(maps).c(),
                    reinterpret_cast<int64_t*>(index));
    zf::strongest_cpu(view(maps), reinterpret_cast<const int64_t*>(units), count, reinterpret_cast<int64_t*>(index),
                      at_least_one(threads));
  });
  m.def("conv_strongest_cpu",
        [](const TensorTuple& images, const TensorTuple& weight, uintptr_t bias, uintptr_t units, int64_t count,
           const WindowTuple& conv, const Pair& map, uintptr_t value, uintptr_t index, int threads) {
          py::gil_scoped_release release;
          zf::ConvStrongest task;
          task.images = view(images);
          task.weight = view(weight);
          task.bias = reinterpret_cast<const float*>(bias);
          task.units = reinterpret_cast<const int64_t*>(units);
          task.count = count;
          task.conv = window(conv);
          for (int axis = 0; axis < 2; ++axis) task.map[axis] = map[axis];
          task.value = reinterpret_cast<float*>(value);
          task.index = reinterpret_cast<int64_t*>(index);
          zf::check_conv_strongest(task);
          zf::conv_strongest_cpu(task, at_least_one(threads));
        });
  m.def("packed_filters_bytes_cpu", [](const TensorTuple& weight, const WindowTuple& conv, int64_t groups) {
    const zf::Window geometry = window(conv);
    zf::check_filters(view(weight), &geometry, groups);
    return zf::packed_filters_bytes_cpu(view(weight), view(weight).dtype, geometry, groups);
  });
  m.def("pack_filters_cpu", [](const TensorTuple& weight, uintptr_t scale, const Memory& filters, const WindowTuple& conv,
                               int64_t groups, int threads) {
    py::gil_scoped_release release;
    const zf::Window geometry = window(conv);
    zf::check_filters(view(weight), &geometry, groups);
    zf::check_contiguous(view(weight));
    void* const to = packed(filters, zf::packed_filters_bytes_cpu(view(weight), view(weight).dtype, geometry, groups));
    zf::pack_filters_cpu(view(weight), reinterpret_cast<const void*>(scale), to, geometry, groups, at_least_one(threads));
  });
  m.def("conv_delta_cpu",
        [](const TensorTuple& delta, uintptr_t origin, const Memory& filters, const std::optional<TensorTuple>& clean,
           uintptr_t image, const TensorTuple& out, uintptr_t out_origin, const Pair& map, const Pair& above,
           const WindowTuple& conv, int64_t groups, bool narrow, double slope, double upper, int threads) {
          py::gil_scoped_release release;
          zf::ConvDelta op;
          op.delta = view(delta);
          op.origin = reinterpret_cast<const int64_t*>(origin);
          op.filters = reinterpret_cast<const void*>(filters.first);
          if (clean) op.clean = filled(*clean, op.delta);
          op.image = reinterpret_cast<const int64_t*>(image);
          op.out = output(out);
          op.out_origin = reinterpret_cast<const int64_t*>(out_origin);
          for (int axis = 0; axis < 2; ++axis) op.map[axis] = map[axis], op.above[axis] = above[axis];
          op.conv = window(conv);
          op.groups = groups;
          op.narrow = narrow;
          op.rectifier = {slope, upper};
          zf::check_conv_delta(op);
          zf::View weight = op.delta;  // of whose sizes the filters are
          for (int axis = 0; axis < 4; ++axis)
            weight.size[axis] = axis == 0   ? op.out.c()
                                : axis == 1 ? op.delta.c() / groups
                                            : op.conv.kernel[axis - 2];
          packed(filters, zf::delta_filters_bytes_cpu(weight, groups, narrow));
          zf::conv_delta_cpu(op, at_least_one(threads));
        });
  m.def("delta_filters_bytes_cpu", [](const TensorTuple& weight, int64_t groups, bool narrow) {
    zf::check_filters(view(weight), nullptr, groups);
    return zf::delta_filters_bytes_cpu(view(weight), groups, narrow);
  });
  m.def("pack_delta_filters_cpu",
        [](const TensorTuple& weight, uintptr_t scale, const Memory& filters, int64_t groups, bool narrow, int threads) {
          py::gil_scoped_release release;
          zf::check_filters(view(weight), nullptr, groups);
          zf::check_contiguous(view(weight));
          void* const to = packed(filters, zf::delta_filters_bytes_cpu(view(weight), groups, narrow));
          return zf::pack_delta_filters_cpu(view(weight), reinterpret_cast<const void*>(scale), to, groups, narrow,
                                            at_least_one(threads));
        });
  m.def("pool_delta_cpu", [](const ChangeTuple& c, const WindowTuple& pool, int threads) {
    py::gil_scoped_release release;
    const zf::Change patches = change(c);
    zf::check_pool_change(patches, window(pool));
    zf::pool_delta_cpu(patches, window(pool), at_least_one(threads));
  });
  m.def("lrn_delta_cpu", [](const ChangeTuple& c, int64_t size, double alpha, double beta, double k, int threads) {
    py::gil_scoped_release release;
    const zf::Change patches = change(c);
    zf::check_lrn(patches, {size, alpha, beta, k});
    zf::lrn_delta_cpu(patches, {size, alpha, beta, k}, at_least_one(threads));
  });
  m.def("relu_delta_cpu", [](const ChangeTuple& c, double slope, double upper, int threads) {
    py::gil_scoped_release release;
    const zf::Change patches = change(c);
    zf::check_same_patches(patches);
    zf::relu_delta_cpu(patches, {slope, upper}, at_least_one(threads));
  });
  m.def("pointwise_delta_cpu", [](const ChangeTuple& c, int function, double a, double b, int threads) {
    py::gil_scoped_release release;
    const zf::Change patches = change(c);
    zf::check_same_patches(patches);
    zf::pointwise_delta_cpu(patches, {static_cast<zf::Function>(function), a, b}, at_least_one(threads));
  });
  m.def("paste_boxes_cpu", [](const PasteTuple& op, int threads) {
    py::gil_scoped_release release;
    zf::check_paste(paste(op));
    zf::paste_boxes_cpu(paste(op), at_least_one(threads));
  });
  m.def("advise_huge_pages", [](uintptr_t data, int64_t bytes) {
    zf::advise_huge_pages(reinterpret_cast<void*>(data), bytes);
  });
  m.def("hash_bytes", [](uintptr_t data, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    return zf::hash_bytes(reinterpret_cast<const void*>(data), bytes, at_least_one(threads));
  });

#if ZF_WITH_CUDA
  m.def("max_pool2d_with_switches_cuda", [](const TensorTuple& x, const TensorTuple& y, const TensorTuple& switches,
                                            const WindowTuple& pool, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    zf::check_pool(view(y), view(switches), view(x), window(pool));
    zf::max_pool2d_with_switches_cuda(view(x), view(y), view(switches), window(pool), device,
                                      reinterpret_cast<void*>(stream));
  });
  m.def("unpool_relu2d_cuda", [](const TensorTuple& y, const TensorTuple& switches, const TensorTuple& out,
                                 const WindowTuple& pool, bool relu, bool overlap_last, uintptr_t bad, int device,
                                 uintptr_t stream) {
    py::gil_scoped_release release;
    zf::check_pool(view(y), view(switches), view(out), window(pool));
    zf::unpool_relu2d_cuda(view(y), view(switches), view(out), window(pool), relu, overlap(overlap_last),
                           reinterpret_cast<int32_t*>(bad), device, reinterpret_cast<void*>(stream));
  });
  m.def("pool_gather2d_cuda", [](const TensorTuple& x, const TensorTuple& switches, const TensorTuple& out,
                                 const WindowTuple& pool, bool overlap_last, uintptr_t bad, int device,
                                 uintptr_t stream) {
    py::gil_scoped_release release;
    zf::check_pool(view(out), view(switches), view(x), window(pool));
    zf::pool_gather2d_cuda(view(x), view(switches), view(out), window(pool), overlap(overlap_last),
                           reinterpret_cast<int32_t*>(bad), device, reinterpret_cast<void*>(stream));
  });
  m.def("deconv_step_cuda",
        [](const TensorTuple& signal, const std::optional<TensorTuple>& switches,
           const std::optional<TensorTuple>& passes, uintptr_t filters, uintptr_t not_finite, const TensorTuple& out,
           uintptr_t image, uintptr_t origin, uintptr_t frame, const Pair& map, const Pair& below,
           const WindowTuple& pool, const WindowTuple& conv, bool rectify, bool overlap_last, bool whole, int device,
           uintptr_t stream) {
          py::gil_scoped_release release;
          zf::DeconvStep step = deconv_step(signal, switches, passes, filters, view(out), image, origin, frame, map, below,
                                            pool, conv, rectify, overlap_last, whole);
          step.not_finite = reinterpret_cast<const uint8_t*>(not_finite);
          zf::check_step(step, step.out.c());
          zf::deconv_step_cuda(step, device, reinterpret_cast<void*>(stream));
        });
  m.def("paste_boxes_cuda", [](const PasteTuple& op, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    zf::check_paste(paste(op));
    zf::paste_boxes_cuda(paste(op), device, reinterpret_cast<void*>(stream));
  });
#endif
}
