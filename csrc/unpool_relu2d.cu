// The CUDA kernels of unpool_relu2d and pool_gather2d and their launchers. Bodies and bytes are in the .cuh.
#include "unpool_relu2d.h"

#include "launch.cuh"
#include "unpool_relu2d.cuh"

namespace zf {
namespace {

template <class Body>
__global__ void __launch_bounds__(gpu::threads_per_block)
    unpool_relu2d_kernel(const __grid_constant__ Body body) {
  body(blockIdx.x, threadIdx.x);
}

template <class Body>
__global__ void __launch_bounds__(gpu::threads_per_block)
    pool_gather2d_kernel(const __grid_constant__ Body body) {
  body(blockIdx.x, threadIdx.x);
}

template <class Body>
__global__ void __launch_bounds__(gpu::threads_per_block)
    find_bad_switch_kernel(const __grid_constant__ Body body) {
  body(blockIdx.x, threadIdx.x);
}

}  // namespace

void unpool_relu2d_cuda(const View& y, const View& switches, const View& out, const Window& pool, bool relu,
                        Overlap overlap, int32_t* bad, int device, void* stream) {
  const char* const op = "unpool_relu2d";
  const gpu::DeviceGuard guard(op, device);
  gpu::unpool_relu2d(y, switches, out, pool, relu, overlap,
                     [&](const auto& body) { gpu::launch(op, unpool_relu2d_kernel, body, device, stream); });
  if (bad == nullptr) return;
  gpu::find_bad_switch(switches, out, pool, bad, [&](const auto& body) {
    gpu::launch(op, find_bad_switch_kernel, body, device, stream);
  });
}

void pool_gather2d_cuda(const View& x, const View& switches, const View& out, const Window& pool,
                        Overlap overlap, int32_t* bad, int device, void* stream) {
  const char* const op = "pool_gather2d";
  const gpu::DeviceGuard guard(op, device);
  gpu::pool_gather2d(x, switches, out, pool, overlap, bad,
                     [&](const auto& body) { gpu::launch(op, pool_gather2d_kernel, body, device, stream); });
}

}  // namespace zf
