// Launching a kernel body: the device it runs on, and what the driver says when it does not.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tiling.cuh"

namespace zf {
namespace gpu {

// The error as text, prefixed by the op: the driver's own words, but where those mislead.
inline std::string error_text(const char* op, int device, cudaError_t error) {
  const std::string where = "zfcore: " + std::string(op) + " on cuda:" + std::to_string(device) + ": ";
  const std::string driver_text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
      return where + "this machine has no NVIDIA driver (libcuda.so.1 was not found)";
    return where + "the NVIDIA driver supports CUDA " + std::to_string(driver / 1000) + "." +
           std::to_string(driver % 1000 / 10) + ", older than the CUDA " +
           std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10) +
           " that zfcore was built with (" + driver_text + ")";
  }
  if (error == cudaErrorNoDevice) return where + "the NVIDIA driver finds no GPU (" + driver_text + ")";
  if (error == cudaErrorNoKernelImageForDevice)
    return where + "zfcore was not built for this GPU; add it to ZFCORE_CUDA_ARCHITECTURES (" + driver_text +
           ")";
  return where + driver_text;
}

inline void check(const char* op, int device, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here, so that no later call reports it again
  throw std::runtime_error(error_text(op, device, error));
}

// Makes `device` the thread's device, and puts the one before back.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    check(op, device, cudaGetDevice(&before_));
    if (before_ == device) return;
    check(op, device, cudaSetDevice(device));
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_)
      (void)cudaSetDevice(before_);  // it was current a moment ago; a destructor has nobody to tell
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Launches `kernel`, which runs `body` at its block and thread, on every block of the body, each of `threads` and
// with `shared_bytes` of dynamic shared memory. Never synchronises.
template <class Body>
void launch(const char* op, void (*kernel)(Body), const Body& body, int device, void* stream,
            uint32_t threads = threads_per_block, int64_t shared_bytes = 0) {
  void* arguments[] = {const_cast<Body*>(&body)};
  check(op, device,
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(uint32_t(body.blocks())),
                         dim3(threads), arguments, size_t(shared_bytes), static_cast<cudaStream_t>(stream)));
}

}  // namespace gpu
}  // namespace zf
