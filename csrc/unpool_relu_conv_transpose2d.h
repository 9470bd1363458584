// One step of the deconvnet, fused: unpool, rectify, transposed filter. The unpooled map is never in memory.
//
//   u = relu(unpool(y, switches))                                   [N, K, Hu, Wu], never written
//   out[n,c,Y,X] = sum over k,i,j with Y = uy*sh - ph + i*dh, X = ux*sw - pw + j*dw of u[n,k,uy,ux]*w[k,c,i,j]
//
// y, switches: [N,K,Hp,Wp]; weight: [K, C/groups, kh, kw], contiguous; out: [N,C,H,W]; unpooled = (Hu, Wu).
// Products with an exact zero of u are skipped (so 0 x inf and 0 x NaN of the weights give 0).
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling, rectification, filtering).
#pragma once
#include "view.h"

namespace zf {

int64_t unpool_relu_conv_transpose2d_cpu(const View& y, const View& switches, const View& weight,
                                         const View& out, const int64_t unpooled[2], const Window& pool,
                                         const Window& conv, int64_t groups, Overlap overlap, int threads);

}  // namespace zf
