// Where units are strongest: the position of the largest value of each chosen map.
//
//   index[n][u] = the first (row-major) of the largest of maps[n, units[u]], NaN passed over; 0 where all are NaN
//
// maps: [N, C, H, W], float; units: [U], each under C; index: [N][U], y * W + x.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.1 (the strongest activations of a feature map).
#pragma once
#include "view.h"

namespace zf {

void strongest_cpu(const View& maps, const int64_t* units, int64_t count, int64_t* index, int threads);

}  // namespace zf
