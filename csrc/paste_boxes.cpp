// CPU kernel of paste_boxes: one pass, bound by memory. The contract is in the header.
#include "paste_boxes.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

template <class T>
void paste(const PasteBoxes& op, int64_t b) {
  const int64_t n = op.image[b], *origin = op.origin + 2 * b, *box = op.boxes + 4 * b;
  const auto column = [&](int64_t x) {  // of the patch; a box may end anywhere
    return std::clamp<int64_t>(std::clamp<int64_t>(x, 0, op.images.w()) - origin[1], 0, op.out.w());
  };
  const int64_t channels = op.out.c(), left = column(box[1]), right = std::max(left, column(box[3]));
  for (int64_t i = 0; i < op.out.h(); ++i) {
    const int64_t y = origin[0] + i;
    T* const row = static_cast<T*>(op.out.data) + b * op.out.stride[0] + i * op.out.stride[2];
    const int64_t pixel = op.out.stride[3];
    const bool covered = box[0] <= y && y < box[2];
    const int64_t begin = covered ? left : op.out.w(), end = covered ? right : op.out.w();
    const auto clear = [&](int64_t from, int64_t to) {
      for (int64_t j = from; j < to; ++j)
        for (int64_t c = 0; c < channels; ++c) row[j * pixel + c] = 0;
    };
    clear(0, begin);
    clear(end, op.out.w());
    for (int64_t c = 0; c < channels && begin < end; ++c) {
      const int64_t x = origin[1] + begin;
      const auto first = [&](const View& v) {
        return static_cast<const T*>(v.data) + n * v.stride[0] + c * v.stride[1] + y * v.stride[2] + x * v.stride[3];
      };
      const T *fill = first(op.fill), *picture = first(op.images);
      T* to = row + begin * pixel + c;
      for (int64_t j = 0; j < end - begin; ++j)
        to[j * pixel] = fill[j * op.fill.stride[3]] - picture[j * op.images.stride[3]];
    }
  }
}

}  // namespace

void paste_boxes(const PasteBoxes& op, int threads) {
  for (int64_t b = 0; b < op.out.n(); ++b) {
    const int64_t* o = op.origin + 2 * b;
    if (op.image[b] < 0 || op.image[b] >= op.images.n() || o[0] < 0 || o[1] < 0 ||
        o[0] > op.images.h() - op.out.h() || o[1] > op.images.w() - op.out.w())
      throw std::invalid_argument("patch " + std::to_string(b) + " is not inside its picture");
  }
  parallel_for(op.out.n(), 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      if (op.out.dtype == DType::f64)
        paste<double>(op, b);
      else
        paste<float>(op, b);
  });
}

}  // namespace ZF_ISA
}  // namespace zf
