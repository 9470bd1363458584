// The CUDA kernels of deconv_step and their launcher. The bodies, their work and bytes are in the .cuh.
#include "deconv_step.h"

#include "deconv_step.cuh"
#include "launch.cuh"

namespace zf {
namespace {

// Two blocks of 256 threads to a multiprocessor: while one fills its places, the other multiplies.
template <class Body>
__global__ void __launch_bounds__(gpu::threads_per_block, 2) deconv_step_kernel(const __grid_constant__ Body body) {
  using T = typename Body::T;
  extern __shared__ __align__(gpu::vector_bytes) unsigned char memory[];
  T* const shared = reinterpret_cast<T*>(memory);
  // In shared memory it is read where it is needed, and takes no registers from the sums.
  __shared__ gpu::StepTile tile;
  if (threadIdx.x == 0) tile = body.tile(blockIdx.x);
  __syncthreads();
  typename Body::Sums sums;
  Body::clear(&sums);
  if (!tile.empty)
    for (int32_t c = 0; c < body.channels(); c += body.chunk()) {
      if (c > 0) __syncthreads();
      body.fill(tile, threadIdx.x, c, shared);
      __syncthreads();
      body.add(tile, threadIdx.x, c, shared, &sums);
    }
  body.write(tile, threadIdx.x, sums);
}

}  // namespace

void deconv_step_cuda(const DeconvStep& step, int device, void* stream) {
  const char* const op = "deconv_step";
  const gpu::DeviceGuard guard(op, device);
  int of_block = 0, of_multiprocessor = 0;
  gpu::check(op, device, cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  gpu::check(op, device,
             cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  constexpr int reserved = 1024;  // of each block, by the driver
  const int half = of_multiprocessor / 2 - reserved;
  // What is left beside the tile is for places and filters.
  const int limit = (half < of_block ? half : of_block) - int(sizeof(gpu::StepTile));
  gpu::deconv_step(step, limit, [&](const auto& body) {
    using Body = std::decay_t<decltype(body)>;
    const int bytes = int(body.shared_bytes());
    // Beyond 48 KiB a kernel has to be told. That is quick, holds for a device, and a capture allows it. All calls say
    // the same, since other threads may launch it meanwhile.
    gpu::check(op, device,
               cudaFuncSetAttribute(deconv_step_kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
    gpu::launch(op, deconv_step_kernel<Body>, body, device, stream, body.threads(), bytes);
  });
}

}  // namespace zf
