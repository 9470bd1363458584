#include "dispatch.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "max_pool2d_with_switches.h"
#include "strongest.h"
#include "unpool_relu2d.h"
#include "unpool_relu_conv_transpose2d.h"

namespace zf {

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = [] {
    CpuFeatures f{};
#if defined(__x86_64__)
    __builtin_cpu_init();
    f.avx2 = __builtin_cpu_supports("avx2");
    f.fma = __builtin_cpu_supports("fma");
    f.f16c = f.avx2;  // every CPU with AVX2 has F16C; older compilers have no name for it here
    f.avx512f = __builtin_cpu_supports("avx512f");
    f.avx512bw = __builtin_cpu_supports("avx512bw");
    f.avx512vl = __builtin_cpu_supports("avx512vl");
    f.avx512dq = __builtin_cpu_supports("avx512dq");
    f.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
#endif
    return f;
  }();
  return features;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

bool isa_usable(Isa isa) {
  const CpuFeatures& f = cpu_features();
  (void)f;
  switch (isa) {
#if defined(ZF_HAVE_AVX512)
    case Isa::avx512: return f.avx2 && f.fma && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
#endif
#if defined(ZF_HAVE_AVX2)
    case Isa::avx2: return f.avx2 && f.fma;
#endif
    case Isa::generic: return true;
    default: return false;
  }
}

namespace {

std::atomic<int>& active() {
  static std::atomic<int> isa{static_cast<int>(isa_usable(Isa::avx512) ? Isa::avx512
                                               : isa_usable(Isa::avx2) ? Isa::avx2
                                                                       : Isa::generic)};
  return isa;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(active().load(std::memory_order_relaxed)); }

void set_active_isa(Isa isa) {
  if (!isa_usable(isa))
    throw std::invalid_argument(std::string("zfcore: this build or CPU has no ") + isa_name(isa) + " kernels");
  active().store(static_cast<int>(isa), std::memory_order_relaxed);
}

#if defined(ZF_HAVE_AVX512)
#define ZF_CASE_AVX512(call) \
  case Isa::avx512: return avx512::call;
#else
#define ZF_CASE_AVX512(call)
#endif
#if defined(ZF_HAVE_AVX2)
#define ZF_CASE_AVX2(call) \
  case Isa::avx2: return avx2::call;
#else
#define ZF_CASE_AVX2(call)
#endif
#define ZF_DISPATCH(call)  \
  switch (active_isa()) {  \
    ZF_CASE_AVX512(call)   \
    ZF_CASE_AVX2(call)     \
    default: return generic::call; \
  }

void max_pool2d_with_switches_cpu(const View& x, const View& y, const View& switches, const Window& pool,
                                  int threads) {
  ZF_DISPATCH(max_pool2d_with_switches(x, y, switches, pool, threads))
}

int64_t unpool_relu2d_cpu(const View& y, const View& switches, const View& out, const Window& pool, bool relu,
                          Overlap overlap, int threads) {
  ZF_DISPATCH(unpool_relu2d(y, switches, out, pool, relu, overlap, threads))
}

int64_t pool_gather2d_cpu(const View& x, const View& switches, const View& out, const Window& pool, Overlap overlap,
                          int threads) {
  ZF_DISPATCH(pool_gather2d(x, switches, out, pool, overlap, threads))
}

int64_t unpool_relu_conv_transpose2d_cpu(const View& y, const View& switches, const View& weight, const View& out,
                                         const int64_t unpooled[2], const Window& pool, const Window& conv,
                                         int64_t groups, Overlap overlap, int threads) {
  ZF_DISPATCH(unpool_relu_conv_transpose2d(y, switches, weight, out, unpooled, pool, conv, groups, overlap, threads))
}

void conv_delta_cpu(const ConvDelta& op, int threads) { ZF_DISPATCH(conv_delta(op, threads)) }

int64_t delta_filters_bytes_cpu(const View& weight, int64_t groups, bool narrow) {
  ZF_DISPATCH(delta_filters_bytes(weight, groups, narrow))
}

bool pack_delta_filters_cpu(const View& weight, const void* scale, void* filters, int64_t groups, bool narrow,
                            int threads) {
  ZF_DISPATCH(pack_delta_filters(weight, scale, filters, groups, narrow, threads))
}

void pool_delta_cpu(const Change& change, const Window& pool, int threads) {
  ZF_DISPATCH(pool_delta(change, pool, threads))
}

void lrn_delta_cpu(const Change& change, const Lrn& lrn, int threads) { ZF_DISPATCH(lrn_delta(change, lrn, threads)) }

void relu_delta_cpu(const Change& change, const Rectifier& rectifier, int threads) {
  ZF_DISPATCH(relu_delta(change, rectifier, threads))
}

void pointwise_delta_cpu(const Change& change, const Pointwise& f, int threads) {
  ZF_DISPATCH(pointwise_delta(change, f, threads))
}

void paste_boxes_cpu(const PasteBoxes& op, int threads) { ZF_DISPATCH(paste_boxes(op, threads)) }

void strongest_cpu(const View& maps, const int64_t* units, int64_t count, int64_t* index, int threads) {
  ZF_DISPATCH(strongest(maps, units, count, index, threads))
}

void conv_strongest_cpu(const ConvStrongest& task, int threads) { ZF_DISPATCH(conv_strongest(task, threads)) }

void deconv_step_cpu(const DeconvStep& step, int threads) { ZF_DISPATCH(deconv_step(step, threads)) }

int64_t packed_filters_bytes_cpu(const View& weight, DType dtype, const Window& conv, int64_t groups) {
  ZF_DISPATCH(packed_filters_bytes(weight, dtype, conv, groups))
}

void pack_filters_cpu(const View& weight, const void* scale, void* filters, const Window& conv, int64_t groups,
                      int threads) {
  ZF_DISPATCH(pack_filters(weight, scale, filters, conv, groups, threads))
}

}  // namespace zf
