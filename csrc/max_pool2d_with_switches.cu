// The CUDA kernel of max_pool2d_with_switches and its launcher. Its body, bytes and floor are in the .cuh.
#include "max_pool2d_with_switches.h"

#include "launch.cuh"
#include "max_pool2d_with_switches.cuh"

namespace zf {
namespace {

template <class Body>
__global__ void __launch_bounds__(gpu::threads_per_block)
    max_pool2d_with_switches_kernel(const __grid_constant__ Body body) {
  body(blockIdx.x, threadIdx.x);
}

}  // namespace

void max_pool2d_with_switches_cuda(const View& x, const View& y, const View& switches, const Window& pool,
                                   int device, void* stream) {
  const char* const op = "max_pool2d_with_switches";
  const gpu::DeviceGuard guard(op, device);
  gpu::max_pool2d_with_switches(x, y, switches, pool, [&](const auto& body) {
    gpu::launch(op, max_pool2d_with_switches_kernel, body, device, stream);
  });
}

}  // namespace zf
