// How maps of a function of each value change where their input changes inside a patch, for a batch of patches.
//
//   out_b = f(x + d_b) - f(x), with the clean input x (`before`) and its change d_b
// `after` is not read. Where nothing changes, and f(x) is finite, the result is exactly zero.
#pragma once
#include "change.h"

namespace zf {

// In the order of the names in zfcore/reference/pointwise_delta.py, which defines them.
enum class Function : int {
  sigmoid, tanh, silu, hardswish, hardsigmoid, gelu, gelu_tanh, mish, softplus, elu, exp, square, abs, sqrt, count
};

struct Pointwise {
  Function function;
  double a, b;  // softplus: beta and threshold; elu: alpha
};

void pointwise_delta_cpu(const Change& change, const Pointwise& f, int threads);

}  // namespace zf
