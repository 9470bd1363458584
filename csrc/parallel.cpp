#include "parallel.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(ZFCORE_THREADS_OPENMP)
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace zf {

namespace {

constexpr int scratch_slots = 4;

struct Scratch {
  void* data[scratch_slots] = {};
  int64_t size[scratch_slots] = {};
  ~Scratch() {
    for (void* p : data) std::free(p);
  }
};

thread_local Scratch scratch;

}  // namespace

void* thread_scratch(int slot, int64_t bytes) {
  if (scratch.size[slot] < bytes) {
    std::free(scratch.data[slot]);
    scratch.data[slot] = nullptr;
    scratch.size[slot] = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data[slot] = std::aligned_alloc(4096, static_cast<size_t>(rounded));
    if (!scratch.data[slot]) throw std::bad_alloc();
    scratch.size[slot] = rounded;
  }
  return scratch.data[slot];
}

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t(4095);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~uintptr_t(4095);
  if (bytes >= int64_t(4 * huge)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void parallel_ranges(int64_t n, int64_t grain, int threads, RangeFn fn, void* context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t wanted = std::min<int64_t>(std::max(threads, 1), (n + grain - 1) / grain);
  if (wanted <= 1) {
    fn(context, 0, n);
    return;
  }
  // Several ranges a thread: they even out unequal tasks and cores that other work slows down.
  const int64_t pieces = std::min<int64_t>(wanted * 16, (n + grain - 1) / grain);
  std::exception_ptr failure;
  std::mutex guard;
  const auto piece = [&](int64_t i) {
    try {
      fn(context, n * i / pieces, n * (i + 1) / pieces);
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
#if defined(ZFCORE_THREADS_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(wanted))
  for (int64_t i = 0; i < pieces; ++i) piece(i);
#else
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < wanted; ++t)
    pool.emplace_back([&, t] {
      for (int64_t i = t; i < pieces; i += wanted) piece(i);
    });
  for (std::thread& t : pool) t.join();
#endif
  if (failure) std::rethrow_exception(failure);
}

}  // namespace zf
