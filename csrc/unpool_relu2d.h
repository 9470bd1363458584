// Unpooling: every pooled value goes to the place that its switch recorded, zeros elsewhere.
//
//   out[n,c,y,x] = act( sum over windows (oy,ox) whose switch names (y,x) of y[n,c,oy,ox] )
//
// act is ReLU when `relu` (NaN and -0 pass through), else the identity. Overlap::last keeps the last window in
// raster order instead of the sum, as torch's max_unpool2d does on one thread.
// pool_gather is the transpose of the sum: out[n,c,oy,ox] = x[n,c, the place its switch names]. With
// Overlap::last only the window that unpooling kept receives it, the others get 0.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 2.1 (unpooling, rectification).
#pragma once
#include "view.h"

namespace zf {

int64_t unpool_relu2d_cpu(const View& y, const View& switches, const View& out, const Window& pool,
                          bool relu, Overlap overlap, int threads);
int64_t pool_gather2d_cpu(const View& x, const View& switches, const View& out, const Window& pool,
                          Overlap overlap, int threads);

// A bad switch contributes nothing. bad: null, or a device int32 that is set to 1 when there was one.
void unpool_relu2d_cuda(const View& y, const View& switches, const View& out, const Window& pool,
                        bool relu, Overlap overlap, int32_t* bad, int device, void* stream);
void pool_gather2d_cuda(const View& x, const View& switches, const View& out, const Window& pool,
                        Overlap overlap, int32_t* bad, int device, void* stream);

}  // namespace zf
