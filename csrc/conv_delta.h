// How a convolution's output changes where its input changes inside a patch, for a batch of patches of clean maps.
//
//   d_b   = delta patch b, which lies at origin[b] in the map: the changed input less the clean one, zero elsewhere
//   g_b   = the convolution of d_b, without bias
//   out_b = f(z + g_b) - f(z) with the clean output z, cut at out_origin[b]; or g_b where nothing is rectified
//   f(v)  = slope * v where v < 0, upper where v > upper, else v
//
// Only products of values that are not zero count, and of those only the ones that both lie inside a window and inside
// the patch. out must hold all outputs that a patch reaches. Products with a zero may be left out or may not: filters
// have to be finite.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2; the reuse of clean maps: Nakandala et al., SIGMOD 2019.
#pragma once
#include "change.h"

namespace zf {

struct ConvDelta {
  View delta;                           // [B, C, h, w], channels last, float or double
  const int64_t* origin = nullptr;      // [B][2], rows then columns, inside the map
  const void* filters = nullptr;        // the weight [K, C/groups, kh, kw] as pack_delta_filters packs it
  View clean;                           // [N, K, *above], channels last; data null: out is not rectified
  const int64_t* image = nullptr;       // [B], which clean map
  View out;                             // [B, K, oh, ow], channels last
  const int64_t* out_origin = nullptr;  // [B][2], inside the map above
  int64_t map[2] = {0, 0};              // the size of the map that delta is about
  int64_t above[2] = {0, 0};            // the size of the map that out is about
  Window conv{};
  int64_t groups = 1;
  bool narrow = false;                  // values and filters are rounded to bf16; float only,
                                        // and not where each channel has a filter of its own
  Rectifier rectifier{0, 0};
};

// Throws std::invalid_argument where a patch is not inside its map or reaches outputs outside of out.
void conv_delta_cpu(const ConvDelta& op, int threads);

// The filters as the kernel of the active instruction set reads them: their bytes for this weight, and the packing,
// with output k times scale[k] (null: one) of the weight's type; `narrow` as of the op. The packing tells whether all of them are finite.
int64_t delta_filters_bytes_cpu(const View& weight, int64_t groups, bool narrow);
bool pack_delta_filters_cpu(const View& weight, const void* scale, void* filters, int64_t groups, bool narrow,
                            int threads);

}  // namespace zf
