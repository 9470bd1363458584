// One step of the deconvnet on a batch of patches: unpool (where there is a pool), rectify, transposed filter.
//
//   s     = signal patch b, whose corner is at origin[b] in its map of image image[b]
//   u     = unpool(s, switches of the image) or s; then, with `rectify`, max(u, 0); then 0 where `passes` is 0
//   out_b = the transposed convolution of u, zero outside the map that it is about
//
// What reaches over the edges of a map is no unit of it: those windows and places are passed over, and their outputs
// are zero. The patch of the result begins at origin * pool.stride - pool.padding, times conv.stride, less
// conv.padding, and is as large as its windows reach; with `whole` it is the map itself, or what `frame` cuts out of it.
// Products with an exact zero
// of u are skipped (so 0 x inf and 0 x NaN of the weights give 0).
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1.
#pragma once
#include "view.h"

namespace zf {

struct DeconvStep {
  View signal;                      // [B, K, h, w], float
  View switches;                    // [N, K, Hp, Wp] bytes, each naming a place inside the map; data null: no pool
  View passes;                      // [N, K, Hu, Wu] bytes: 0 stops what comes down there; data null: nothing is stopped
  View weight;                      // [K, C/groups, kh, kw], contiguous
  const void* filters = nullptr;    // the weight as pack_filters packs it; null: packed for this call. On CUDA, always
                                    // given: [K, kh, kw, C] contiguous, times the scale, f64 for f64, else f32
  const uint8_t* not_finite = nullptr;  // CUDA: one byte, not 0 where any of the filters is infinite or NaN
  View out;                         // [B, C, H, W]
  const int64_t* image = nullptr;   // [B]; null: the b-th
  const int64_t* origin = nullptr;  // [B][2], rows then columns; null: 0, 0
  const int64_t* frame = nullptr;   // [B][2], with whole: where out begins in the map below; null: 0, 0
  int64_t map[2] = {0, 0};          // the size of the map that u is about
  int64_t below[2] = {0, 0};        // the size of the map that out is about
  Window pool{};                    // kernel and stride 1 without a pool
  Window conv{};
  int64_t groups = 1;
  bool rectify = true;
  bool last = false;                // keep the last of the windows that name one place, not their sum
  bool whole = false;
};

void deconv_step_cpu(const DeconvStep& step, int threads);

// The same for results of one to four channels (pictures) and one group, on a GPU, where all pointers are the device's;
// weight.data is not read. Any byte as a switch is safe: one that names no tap, or a place outside of the map, brings
// nothing. So does a patch whose image the switches or passes do not hold, since nobody can wait for a GPU to check it.
// Throws std::runtime_error where sizes and strides pass 32 bits along an axis, or a grid's blocks do not suffice.
constexpr int64_t most_cuda_channels = 4;
void deconv_step_cuda(const DeconvStep& step, int device, void* stream);

// The filters as the kernel of the active instruction set reads them: their bytes for this weight, and the packing.
// dtype is the signal's; `scale`, one float or double a filter (as the packed type), multiplies it, null for none.
int64_t packed_filters_bytes_cpu(const View& weight, DType dtype, const Window& conv, int64_t groups);
void pack_filters_cpu(const View& weight, const void* scale, void* filters, const Window& conv, int64_t groups,
                      int threads);

}  // namespace zf
