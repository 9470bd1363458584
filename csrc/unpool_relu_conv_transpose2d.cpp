// CPU kernel of unpool_relu_conv_transpose2d: one deconvnet step on whole maps, whose switches may come from anyone.
// The contract is in the header; the work is done, and counted, in deconv_step.cpp.
#include "unpool_relu_conv_transpose2d.h"

#include "deconv_step.h"
#include "dispatch.h"
#include "switches.h"

namespace zf {
namespace ZF_ISA {

int64_t unpool_relu_conv_transpose2d(const View& y, const View& switches, const View& weight, const View& out,
                                     const int64_t unpooled[2], const Window& pool, const Window& conv, int64_t groups,
                                     Overlap overlap, int threads) {
  if (out.numel() == 0) return no_bad_switch;
  const int64_t bad = find_bad_switch(switches, pool, unpooled[0], unpooled[1], threads);
  if (bad != no_bad_switch) return bad;
  DeconvStep step;
  step.signal = y;
  step.switches = switches;
  step.weight = weight;
  step.out = out;
  for (int axis = 0; axis < 2; ++axis) {
    step.map[axis] = unpooled[axis];
    step.below[axis] = out.size[2 + axis];
  }
  step.pool = pool;
  step.conv = conv;
  step.groups = groups;
  step.last = overlap == Overlap::last;
  step.whole = true;
  deconv_step(step, threads);
  return no_bad_switch;
}

}  // namespace ZF_ISA
}  // namespace zf
