// How contrast-normalised maps change where their input changes inside a patch, for a batch of patches of clean maps.
//
//   out_b[c] = v[c] / (k + alpha / size * sum of v[c']^2)^beta - y[c],  v = x + d_b, c' from c - size/2 to c + (size-1)/2
//
// with the clean input x (`before`), its change d_b and the clean output y (`after`).
// Paper: Krizhevsky et al. 2012, section 3.3, as torch.nn.LocalResponseNorm has it; Zeiler & Fergus, arXiv:1311.2901,
// section 4.2.
#pragma once
#include "change.h"

namespace zf {

struct Lrn {
  int64_t size;
  double alpha, beta, k;
};

void lrn_delta_cpu(const Change& change, const Lrn& lrn, int threads);

}  // namespace zf
