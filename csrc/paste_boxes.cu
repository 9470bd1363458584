// The CUDA kernel of paste_boxes and its launcher. The body and its bytes are in the .cuh.
#include "paste_boxes.h"

#include "launch.cuh"
#include "paste_boxes.cuh"

namespace zf {
namespace {

template <class Body>
__global__ void __launch_bounds__(gpu::threads_per_block) paste_boxes_kernel(const __grid_constant__ Body body) {
  body(blockIdx.x, threadIdx.x);
}

}  // namespace

void paste_boxes_cuda(const PasteBoxes& op, int device, void* stream) {
  const gpu::DeviceGuard guard("paste_boxes", device);
  gpu::paste_boxes(
      op, [&](const auto& body) { gpu::launch("paste_boxes", paste_boxes_kernel, body, device, stream); });
}

}  // namespace zf
