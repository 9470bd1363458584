// Where the units of a convolution are strongest, and how strong: its maps are never made.
//
//   map[n][u]   = bias[units[u]] + the convolution of images[n] with weight[units[u]], zeros beyond the picture's edges
//   index[n][u] = the first (row-major) of the largest of map[n][u], NaN passed over; 0 where all are NaN
//   value[n][u] = map[n][u] there
//
// images: [N, C, H, W] f32, any strides; weight: [K, C, kh, kw] f32, any strides; units: each under K.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1 (the strongest activations of a feature map).
#pragma once
#include "view.h"

namespace zf {

struct ConvStrongest {
  View images;
  View weight;
  const float* bias = nullptr;  // [K]; null: zeros
  const int64_t* units = nullptr;
  int64_t count = 0;  // of units
  Window conv{};
  int64_t map[2] = {0, 0};    // the size of a map
  float* value = nullptr;     // [N][count]
  int64_t* index = nullptr;   // [N][count], y * W + x
};

void conv_strongest_cpu(const ConvStrongest& task, int threads);

}  // namespace zf
