// What boxes painted over pictures change them by, in a patch around each box: the first change of occlusion.
//
//   out_b[c, i, j] = fill[n, c, y, x] - images[n, c, y, x]   where (y, x) is under box b
//                  = 0                                       elsewhere
// with n = image[b], y = origin[b][0] + i, x = origin[b][1] + j. A difference of half types is rounded once.
// Paper: Zeiler & Fergus, arXiv:1311.2901, section 4.2.
#pragma once
#include "view.h"

namespace zf {

struct PasteBoxes {
  View images, fill;                // [N, C, H, W], any strides, one float type
  View out;                         // [B, C, h, w], channels next to each other
  const int64_t* image = nullptr;   // [B]
  const int64_t* origin = nullptr;  // [B][2], rows then columns
  const int64_t* boxes = nullptr;   // [B][4]: y0, x0, y1, x1, in pixels of the picture; y1 and x1 are not covered
};

// float and double. Throws std::invalid_argument where a patch is not inside its picture.
void paste_boxes_cpu(const PasteBoxes& op, int threads);

// Every float type. A pixel outside of the pictures is under no box.
void paste_boxes_cuda(const PasteBoxes& op, int device, void* stream);

}  // namespace zf
