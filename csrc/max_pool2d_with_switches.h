// Max-pooling that records, for every output, which tap of its window held the maximum.
//
//   y[n,c,oy,ox] = max over taps (ky,kx) of x[n,c, oy*sh - ph + ky*dh, ox*sw - pw + kx*dw]
//   switches     = ky*kw + kx of that tap, one byte, counted from the unclipped window's corner
//
// Taps outside the map take no part. Ties: the first tap in raster order. NaN wins over every number,
// and the last NaN of the window over the others (as torch does). All -inf: the first tap in the map.
// x, y: [N,C,H,W] and [N,C,Oh,Ow] of one float dtype; switches: uint8 [N,C,Oh,Ow]; any strides.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (switches).
#pragma once
#include "view.h"

namespace zf {

void max_pool2d_with_switches_cpu(const View& x, const View& y, const View& switches,
                                  const Window& pool, int threads);

// Throws std::runtime_error with the driver's text when the launch fails. Never synchronises.
void max_pool2d_with_switches_cuda(const View& x, const View& y, const View& switches,
                                   const Window& pool, int device, void* stream);

}  // namespace zf
