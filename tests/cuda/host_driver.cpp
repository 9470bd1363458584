// Runs the bodies of the CUDA kernels on the CPU: every index that a launch would have, in a loop. The
// bodies, the choice of their variants and the slicing of a batch are those of the library; only the launch
// itself is replaced.
//
// Compiled by tests/cuda/driver.py with a plain C++ compiler, and called through ctypes.
#include <cstring>
#include <exception>
#include <vector>

#include "deconv_step.cuh"
#include "max_pool2d_with_switches.cuh"
#include "paste_boxes.cuh"
#include "unpool_relu2d.cuh"

namespace {

// What was launched, for the tests to see that they reached the variant that they meant.
struct Report {
  int64_t launches;
  int64_t blocks;
  int64_t index_bits;  // of the last launch
  int64_t channels;    // of a thread
  int64_t packed;      // whether these are one access
  int64_t known_kernel;
  int64_t phase;
  int64_t way;           // how deconv_step fills its places
  int64_t in_shared;     // whether it does
  int64_t shared_bytes;
  int64_t threads;
  char error[256];
};

template <class I, class W, class L>
void describe(Report* report) {
  report->index_bits = 8 * int64_t(sizeof(I));
  report->channels = L::count;
  report->packed = L::packed;
  report->known_kernel = W::known_kernel;
}
template <class S, class I, class W, class L>
void describe(const zf::gpu::MaxPool<S, I, W, L>&, Report* report) {
  describe<I, W, L>(report);
}
template <class S, class I, class W, class L, int Phase>
void describe(const zf::gpu::Unpool<S, I, W, L, Phase>&, Report* report) {
  describe<I, W, L>(report);
  report->phase = Phase;
}
template <class S, class I, class L, bool Last>
void describe(const zf::gpu::PoolGather<S, I, L, Last>&, Report* report) {
  describe<I, zf::gpu::AnyWindow<I>, L>(report);
}
template <class I>
void describe(const zf::gpu::FindBadSwitch<I>&, Report*) {}
template <class S, class L>
void describe(const zf::gpu::PasteBox<S, L>&, Report* report) {
  describe<int64_t, zf::gpu::AnyWindow<int64_t>, L>(report);
}

// A launcher that takes blocks and threads from the last to the first when `backwards`: no result may depend
// on it.
auto launcher(bool backwards, Report* report) {
  return [=](const auto& body) {
    report->launches += 1;
    report->blocks += body.blocks();
    describe(body, report);
    for (int64_t i = 0; i < body.blocks(); ++i)
      for (int64_t j = 0; j < zf::gpu::threads_per_block; ++j)
        body(uint32_t(backwards ? body.blocks() - 1 - i : i),
             uint32_t(backwards ? zf::gpu::threads_per_block - 1 - j : j));
  };
}

// The same of deconv_step, whose threads pass a block's phases together. Its shared memory is full of NaN before each
// block, and guarded by what lies beside it in the heap.
auto step_launcher(bool backwards, Report* report) {
  return [=](const auto& body) {
    using Body = std::decay_t<decltype(body)>;
    report->launches += 1;
    report->blocks += body.blocks();
    report->channels = Body::channels_of_results;
    report->known_kernel = Body::known_kernel;
    report->in_shared = Body::in_shared;
    report->way = int64_t(body.way());
    report->shared_bytes = body.shared_bytes();
    report->threads = body.threads();
    const uint32_t threads = body.threads();
    const auto each = [&](const auto& f) {
      for (uint32_t j = 0; j < threads; ++j) f(backwards ? threads - 1 - j : j);
    };
    using T = typename Body::T;
    using Vector = zf::gpu::Vec<T, zf::gpu::vector_bytes / sizeof(T)>;
    std::vector<Vector> memory(size_t(body.shared_bytes()) / sizeof(Vector));
    std::vector<typename Body::Sums> sums(threads);
    for (int64_t i = 0; i < body.blocks(); ++i) {
      if (!memory.empty()) std::memset(static_cast<void*>(memory.data()), 0xff, memory.size() * sizeof(Vector));
      T* const shared = reinterpret_cast<T*>(memory.data());
      const auto tile = body.tile(uint32_t(backwards ? body.blocks() - 1 - i : i));
      each([&](uint32_t j) { Body::clear(&sums[j]); });
      if (!tile.empty)
        for (int32_t c = 0; c < body.channels(); c += body.chunk()) {
          each([&](uint32_t j) { body.fill(tile, j, c, shared); });
          each([&](uint32_t j) { body.add(tile, j, c, shared, &sums[j]); });
        }
      each([&](uint32_t j) { body.write(tile, j, sums[j]); });
    }
  };
}

template <class F>
int guarded(Report* report, const F& f) {
  std::memset(report, 0, sizeof *report);
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(report->error, error.what(), sizeof report->error - 1);
    return 1;
  }
}

}  // namespace

extern "C" {

int max_pool2d_with_switches(const zf::View* x, const zf::View* y, const zf::View* switches,
                             const zf::Window* pool, int backwards, Report* report) {
  return guarded(report, [&] {
    zf::gpu::max_pool2d_with_switches(*x, *y, *switches, *pool, launcher(backwards, report));
  });
}

int unpool_relu2d(const zf::View* y, const zf::View* switches, const zf::View* out, const zf::Window* pool,
                  int relu, int last, int32_t* bad, int backwards, Report* report) {
  return guarded(report, [&] {
    const zf::Overlap overlap = last ? zf::Overlap::last : zf::Overlap::sum;
    zf::gpu::unpool_relu2d(*y, *switches, *out, *pool, relu, overlap, launcher(backwards, report));
    Report unused;
    if (bad) zf::gpu::find_bad_switch(*switches, *out, *pool, bad, launcher(backwards, &unused));
  });
}

int pool_gather2d(const zf::View* x, const zf::View* switches, const zf::View* out, const zf::Window* pool,
                  int last, int32_t* bad, int backwards, Report* report) {
  return guarded(report, [&] {
    const zf::Overlap overlap = last ? zf::Overlap::last : zf::Overlap::sum;
    zf::gpu::pool_gather2d(*x, *switches, *out, *pool, overlap, bad, launcher(backwards, report));
  });
}

int paste_boxes(const zf::View* images, const zf::View* fill, const zf::View* out, const int64_t* image,
                const int64_t* origin, const int64_t* boxes, int backwards, Report* report) {
  return guarded(report, [&] {
    zf::gpu::paste_boxes({*images, *fill, *out, image, origin, boxes}, launcher(backwards, report));
  });
}

int deconv_step(const zf::DeconvStep* op, int64_t shared_limit, int backwards, Report* report) {
  return guarded(report, [&] { zf::gpu::deconv_step(*op, shared_limit, step_launcher(backwards, report)); });
}

// Quotients and remainders of `count` numbers by `divisor`.
void divide(uint32_t divisor, const uint32_t* numbers, int64_t count, uint32_t* quotients,
            uint32_t* remainders) {
  const zf::gpu::Divisor d(divisor);
  for (int64_t i = 0; i < count; ++i) {
    quotients[i] = d.quotient(numbers[i]);
    remainders[i] = d.remainder(numbers[i], quotients[i]);
  }
}

// How often a launch visits each place of [n, c, h, w]; every count must be one. Returns the blocks, -1 on an
// error.
int64_t visit(int64_t n, int64_t c, int lanes, int64_t h, int64_t w, int channels_fast, int item_bytes,
              uint8_t* counts) {
  try {
    const zf::gpu::Tiling<int32_t> tiling(n, c, lanes, h, w, channels_fast, item_bytes);
    if (counts == nullptr) return tiling.blocks();
    for (int64_t block = 0; block < tiling.blocks(); ++block)
      for (uint32_t thread = 0; thread < zf::gpu::threads_per_block; ++thread) {
        zf::gpu::Place<int32_t> p;
        if (!tiling.place(uint32_t(block), thread, &p)) continue;
        for (int lane = 0; lane < lanes; ++lane)
          ++counts[((int64_t(p.n) * c + p.c + lane) * h + p.y) * w + p.x];
      }
    return tiling.blocks();
  } catch (const std::runtime_error&) {
    return -1;
  }
}

// Storage and compute types: from the two bytes to float, and back.
void widen(int dtype, const uint16_t* bits, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i)
    values[i] = dtype == int(zf::DType::bf16) ? zf::gpu::widen(zf::gpu::bf16{bits[i]})
                                              : zf::gpu::widen(zf::gpu::f16{bits[i]});
}
void narrow(int dtype, const float* values, int64_t count, uint16_t* bits) {
  for (int64_t i = 0; i < count; ++i)
    bits[i] = dtype == int(zf::DType::bf16) ? zf::gpu::narrow<zf::gpu::bf16>(values[i]).bits
                                            : zf::gpu::narrow<zf::gpu::f16>(values[i]).bits;
}

}  // extern "C"
