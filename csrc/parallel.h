// parallel_for over [0, n): the one place that knows which threads run the CPU kernels.
//
// OpenMP by default, on the runtime that torch has loaded, with the thread count that the caller passes
// (torch.get_num_threads()). ZFCORE_THREADS=std builds it on std::thread, whose races a thread sanitizer can see.
// Results never depend on how a range is split: every output element is written by exactly one task.
#pragma once
#include <cstdint>

namespace zf {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Calls fn on sub-ranges of [0, n) of at least `grain` items, on at most `threads` threads. An exception in a task
// is carried to the caller.
void parallel_ranges(int64_t n, int64_t grain, int threads, RangeFn fn, void* context);

template <class F>
inline void parallel_for(int64_t n, int64_t grain, int threads, const F& body) {
  parallel_ranges(
      n, grain, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&body));
}

// Scratch of the calling thread, at least `bytes` long, 64-byte aligned, its contents undefined. It lives until the
// thread ends or asks for another under the same slot, so that large scratch is not faulted in anew at every call.
void* thread_scratch(int slot, int64_t bytes);

// Asks the system for huge pages behind a large output that is about to be written for the first time: faulting in
// 4 KiB pages costs more than the arithmetic of a pool. Advice only; where it is refused nothing changes.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace zf
