// The CPU kernels exist once per instruction set, each in its own namespace; dispatch.cpp picks among them at run time.
#pragma once
#include <cstdint>

#include "conv_delta.h"
#include "conv_strongest.h"
#include "deconv_step.h"
#include "lrn_delta.h"
#include "paste_boxes.h"
#include "pointwise_delta.h"
#include "view.h"

#define ZF_DECLARE_KERNELS(isa)                                                                                      \
  namespace isa {                                                                                                    \
  void max_pool2d_with_switches(const View&, const View&, const View&, const Window&, int);                          \
  int64_t unpool_relu2d(const View&, const View&, const View&, const Window&, bool, Overlap, int);                   \
  int64_t pool_gather2d(const View&, const View&, const View&, const Window&, Overlap, int);                         \
  int64_t unpool_relu_conv_transpose2d(const View&, const View&, const View&, const View&, const int64_t[2],         \
                                       const Window&, const Window&, int64_t, Overlap, int);                         \
  void conv_delta(const ConvDelta&, int);                                                                            \
  int64_t delta_filters_bytes(const View&, int64_t, bool);                                                           \
  bool pack_delta_filters(const View&, const void*, void*, int64_t, bool, int);                                      \
  void pool_delta(const Change&, const Window&, int);                                                                \
  void lrn_delta(const Change&, const Lrn&, int);                                                                    \
  void relu_delta(const Change&, const Rectifier&, int);                                                             \
  void pointwise_delta(const Change&, const Pointwise&, int);                                                        \
  void paste_boxes(const PasteBoxes&, int);                                                                          \
  void strongest(const View&, const int64_t*, int64_t, int64_t*, int);                                               \
  void conv_strongest(const ConvStrongest&, int);                                                                    \
  void deconv_step(const DeconvStep&, int);                                                                          \
  int64_t packed_filters_bytes(const View&, DType, const Window&, int64_t);                                          \
  void pack_filters(const View&, const void*, void*, const Window&, int64_t, int);                                   \
  }

namespace zf {

ZF_DECLARE_KERNELS(generic)
ZF_DECLARE_KERNELS(avx2)
ZF_DECLARE_KERNELS(avx512)

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

struct CpuFeatures {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16;
};

const CpuFeatures& cpu_features();
bool isa_usable(Isa isa);  // built into this library, and this CPU has it
Isa active_isa();
void set_active_isa(Isa isa);  // throws std::invalid_argument when it is not usable
const char* isa_name(Isa isa);

}  // namespace zf
