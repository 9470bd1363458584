// How rectified maps change where their input changes inside a patch, for a batch of patches of clean maps.
//
//   out_b = f(x + d_b) - f(x), with the clean input x (`before`), its change d_b and a rectifier f
// `after` is not read. Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
#pragma once
#include "change.h"

namespace zf {

void relu_delta_cpu(const Change& change, const Rectifier& rectifier, int threads);

}  // namespace zf
