// The ops that read switches while another thread writes to them, for the thread and address sanitizers.
//
// Whoever writes to what an op reads races with it: `write_switches` alone may be seen in a race, which the run suppresses
// by that name. Between the kernels' own threads there must be none, and no access may leave an op's memory, which lies in
// allocations of exactly its size. With the argument "planted" two tasks write to one place, which must be reported.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "parallel.h"
#include "view.h"

namespace zf {
namespace generic {
int64_t unpool_relu2d(const View&, const View&, const View&, const Window&, bool, Overlap, int);
int64_t pool_gather2d(const View&, const View&, const View&, const Window&, Overlap, int);
int64_t unpool_relu_conv_transpose2d(const View&, const View&, const View&, const View&, const int64_t[2], const Window&,
                                     const Window&, int64_t, Overlap, int);
}  // namespace generic
}  // namespace zf

namespace {

struct Map {
  zf::View view;
  std::unique_ptr<char[]> memory;

  Map(zf::DType dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
    const int64_t item = dtype == zf::DType::u8 ? 1 : 4, size[4] = {n, c, h, w};
    memory.reset(new char[size_t(n * c * h * w * item)]());
    view.data = memory.get();
    view.dtype = dtype;
    std::memcpy(view.size, size, sizeof size);
    const int64_t plain[4] = {c * h * w, h * w, w, 1}, last[4] = {c * h * w, 1, w * c, c};
    std::memcpy(view.stride, channels_last ? last : plain, sizeof plain);
  }
};

__attribute__((noinline)) void write_switches(uint8_t* bytes, int64_t count, std::mt19937& random) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = uint8_t(random());  // most name no tap, many a place outside
}
__attribute__((noinline)) void restore_switches_write(uint8_t* bytes, const uint8_t* good, int64_t count) {
  for (int64_t i = 0; i < count; ++i) bytes[i] = good[i];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "planted") == 0) {
    int64_t shared = 0;
    zf::parallel_for(64, 1, 4, [&](int64_t begin, int64_t end) { shared += end - begin; });
    std::printf("%lld\n", static_cast<long long>(shared));
    return 0;
  }
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1.0;
  const zf::Window pool{{3, 3}, {2, 2}, {1, 1}, {1, 1}}, conv{{3, 3}, {1, 1}, {0, 0}, {1, 1}};
  const int64_t n = 3, c = 20, h = 15, w = 13, pooled_h = 8, pooled_w = 7, below[2] = {h + 2, w + 2}, unpooled[2] = {h, w};
  long calls = 0, refused = 0;
  for (bool channels_last : {false, true}) {
    Map y(zf::DType::f32, n, c, pooled_h, pooled_w, channels_last), switches(zf::DType::u8, n, c, pooled_h, pooled_w, channels_last);
    Map map(zf::DType::f32, n, c, h, w, channels_last), out(zf::DType::f32, n, c, pooled_h, pooled_w, channels_last);
    Map weight(zf::DType::f32, c, 4, 3, 3, false), picture(zf::DType::f32, n, 4, below[0], below[1], channels_last);
    for (auto* m : {&y, &weight}) {
      float* p = reinterpret_cast<float*>(m->memory.get());
      for (int64_t i = 0; i < m->view.numel(); ++i) p[i] = float(i % 7) - 2.0f;
    }
    auto* bytes = reinterpret_cast<uint8_t*>(switches.memory.get());
    const int64_t count = switches.view.numel();
    const std::vector<uint8_t> good(size_t(count), 4);  // each window's middle, which lies in the map
    std::memcpy(bytes, good.data(), good.size());
    std::atomic<bool> stop{false};
    std::thread writer([&] {
      std::mt19937 random(1);
      while (!stop.load()) {
        write_switches(bytes, count, random);
        restore_switches_write(bytes, good.data(), count);
        std::this_thread::yield();
      }
    });
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds / 2);
    while (std::chrono::steady_clock::now() < end)
      for (zf::Overlap overlap : {zf::Overlap::sum, zf::Overlap::last}) {
        for (bool relu : {false, true})
          refused += zf::generic::unpool_relu2d(y.view, switches.view, map.view, pool, relu, overlap, 3) >= 0;
        refused += zf::generic::pool_gather2d(map.view, switches.view, out.view, pool, overlap, 3) >= 0;
        refused += zf::generic::unpool_relu_conv_transpose2d(y.view, switches.view, weight.view, picture.view, unpooled, pool,
                                                             conv, 1, overlap, 3) >= 0;
        calls += 4;
      }
    stop = true;
    writer.join();
  }
  std::printf("%ld calls, %ld refused\n", calls, refused);
  return calls > 0 && refused > 0 && refused < calls ? 0 : 1;
}
