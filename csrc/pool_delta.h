// How max-pooled maps change where their input changes inside a patch, for a batch of patches of clean maps.
//
//   out_b = max over each window of (x + d_b) - y, with the clean input x, its change d_b, zero outside the patch, and
//           the clean output y
// Windows are clipped at the map's edges. NaN propagates.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
#pragma once
#include "change.h"

namespace zf {

void pool_delta_cpu(const Change& change, const Window& pool, int threads);

}  // namespace zf
