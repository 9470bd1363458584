// The body of the CUDA kernel of paste_boxes, and the choice of its variant. The contract is in the header.
//
// It has to move: the result out, and where it is under a box the pictures and the fill in, of which the boxes of one
// picture share theirs in the caches. One subtraction for each value. A thread writes 16 bytes where the results allow
// it, whatever the number of channels: pixels of a dense patch follow one another.
#pragma once
#include "paste_boxes.h"
#include "tiling.cuh"

namespace zf {
namespace gpu {

// L: Packed, neighbours in a dense patch; or Spread<1>, one value of a patch of any strides.
template <class S, class L>
class PasteBox {
 public:
  explicit PasteBox(const PasteBoxes& op)
      : images_(op.images, 0),
        fill_(op.fill, 0),
        out_(op.out, 0),
        image_(op.image),
        origin_(op.origin),
        boxes_(op.boxes),
        count_(op.images.n()),
        height_(op.images.h()),
        width_(op.images.w()),
        channels_(uint32_t(op.out.c())),
        columns_(uint32_t(op.out.w())),
        by_channels_(channels_),
        by_columns_(columns_) {
    constexpr int64_t limit = 0x7fffffff;
    const int64_t values = op.out.c() * op.out.h() * op.out.w();
    if (op.out.c() > limit || op.out.h() * op.out.w() > limit / op.out.c())
      throw std::runtime_error("zfcore: a patch has more values than 32 bits can count");
    values_ = uint32_t(values);
    const int64_t parts = (values + int64_t(threads_per_block) * V - 1) / (int64_t(threads_per_block) * V);
    if (op.out.n() > limit / parts)
      throw std::runtime_error("zfcore: the patches have more values than the blocks of a grid can hold");
    blocks_ = op.out.n() * parts;
    parts_ = Divisor(uint32_t(parts));
  }

  int64_t blocks() const { return blocks_; }

  ZF_HD void operator()(uint32_t block, uint32_t thread) const {
    const uint32_t b = parts_.quotient(block);
    const uint32_t first = (parts_.remainder(block, b) * threads_per_block + thread) * V;
    if (first >= values_) return;
    const int64_t n = image_[b], *origin = origin_ + 2 * int64_t(b), *box = boxes_ + 4 * int64_t(b);
    const uint32_t pixel = by_channels_.quotient(first);
    uint32_t c = by_channels_.remainder(first, pixel);
    const uint32_t i = by_columns_.quotient(pixel);
    uint32_t j = by_columns_.remainder(pixel, i);
    S* const to = out_.at(b, c, i, j);
    int64_t y = origin[0] + i, x = origin[1] + j;
    const bool known = n >= 0 && n < count_;
    Vec<S, V> result;
#pragma unroll
    for (int lane = 0; lane < V; ++lane) {
      const bool covered = known && y >= 0 && y < height_ && x >= 0 && x < width_ && y >= box[0] && y < box[2] &&
                           x >= box[1] && x < box[3];
      typename Compute<S>::type v = 0;
      if (covered) v = widen(*fill_.at(n, c, y, x)) - widen(*images_.at(n, c, y, x));
      result.lane[lane] = narrow<S>(v);
      if (++c == channels_) {
        c = 0, ++x;
        if (++j == columns_) j = 0, x = origin[1], ++y;
      }
    }
    L::store(to, int64_t(1), result);
  }

 private:
  static constexpr int V = L::count;

  Strided<const S, int64_t> images_, fill_;
  Strided<S, int64_t> out_;
  const int64_t *image_, *origin_, *boxes_;
  int64_t count_, height_, width_;
  uint32_t channels_, columns_, values_ = 0;
  Divisor by_channels_, by_columns_, parts_;
  int64_t blocks_ = 0;
};

// Call launch(body) for each launch that the op takes; a launch runs the body at every block and thread.
template <class Launch>
void paste_boxes(const PasteBoxes& op, const Launch& launch) {
  const View& out = op.out;
  if (out.numel() == 0) return;
  for_float_storage(out.dtype, [&](auto storage) {
    using S = TypeIn<decltype(storage)>;
    constexpr int lanes = vector_bytes / int(sizeof(S));
    const int64_t c = out.c(), w = out.w();
    const bool dense = (c == 1 || out.stride[1] == 1) && (w == 1 || out.stride[3] == c) &&
                       (out.h() == 1 || out.stride[2] == w * c);
    const bool aligned = reinterpret_cast<uintptr_t>(out.data) % vector_bytes == 0 &&
                         (out.n() == 1 || out.stride[0] % lanes == 0) && c * w * out.h() % lanes == 0;
    if (dense && aligned) return launch(PasteBox<S, Packed<lanes>>(op));
    launch(PasteBox<S, Spread<1>>(op));
  });
}

}  // namespace gpu
}  // namespace zf
