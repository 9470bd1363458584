// One bug for each tool of compute-sanitizer, and the same program without it: planted TOOL [clean]
//
// A tool that stays silent about its bug proves nothing about the kernels; one that reports the clean program neither.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

constexpr int kThreads = 64;

// memcheck: a block one element longer than the memory that it writes.
__global__ void write_kernel(int* out) { out[threadIdx.x] = static_cast<int>(threadIdx.x); }

// racecheck: the first thread sums what the others may not have written yet.
template <bool kClean>
__global__ void sum_kernel(const int* in, int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (kClean) __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
#pragma unroll 1
    for (int i = 0; i < kThreads; ++i) total += values[i];
    *out = total;
  }
}

// initcheck: memory of which only a part was set.
__global__ void add_kernel(int* values) { values[threadIdx.x] += static_cast<int>(threadIdx.x); }

// synccheck: a barrier that some threads of the block pass by.
template <bool kClean>
__global__ void barrier_kernel(const int* in, int* out) {
  __shared__ int values[kThreads];
  const bool takes_part = kClean || threadIdx.x < kThreads - 16;
  values[threadIdx.x] = 0;
  __syncthreads();
  if (takes_part) {
    values[threadIdx.x] += in[threadIdx.x];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = values[kThreads / 2];
}

int main(int count, char** arguments) {
  if (count < 2) return std::fprintf(stderr, "usage: planted memcheck|racecheck|initcheck|synccheck [clean]\n"), 2;
  const char* tool = arguments[1];
  const bool clean = count > 2 && std::strcmp(arguments[2], "clean") == 0;
  int *in = nullptr, *out = nullptr;
  const auto failed = [](cudaError_t error) {
    if (error != cudaSuccess) std::fprintf(stderr, "planted: %s\n", cudaGetErrorString(error));
    return error != cudaSuccess;
  };
  if (failed(cudaMalloc(&in, kThreads * sizeof(int))) || failed(cudaMalloc(&out, kThreads * sizeof(int)))) return 2;
  const bool is_init = std::strcmp(tool, "initcheck") == 0;
  const size_t set = is_init && !clean ? kThreads : kThreads * sizeof(int);  // the bug: elements, not bytes
  if (failed(cudaMemset(in, 0, set)) || failed(cudaMemset(out, 0, kThreads * sizeof(int)))) return 2;

  if (std::strcmp(tool, "memcheck") == 0) {
    write_kernel<<<1, clean ? kThreads : kThreads + 1>>>(out);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    if (clean) sum_kernel<true><<<1, kThreads>>>(in, out);
    else sum_kernel<false><<<1, kThreads>>>(in, out);
  } else if (is_init) {
    add_kernel<<<1, kThreads>>>(in);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    if (clean) barrier_kernel<true><<<1, kThreads>>>(in, out);
    else barrier_kernel<false><<<1, kThreads>>>(in, out);
  } else {
    return std::fprintf(stderr, "planted: unknown tool %s\n", tool), 2;
  }
  // A tool may end a kernel that it caught: only the clean program has to come to its end.
  const bool ended_badly = failed(cudaGetLastError()) | failed(cudaDeviceSynchronize());
  cudaFree(in);
  cudaFree(out);
  return clean && ended_badly ? 2 : 0;
}
