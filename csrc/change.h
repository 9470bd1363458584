// Patches of changes of clean maps, before and after an operation that takes each map to one of as many channels.
//
// delta_b is what the input changes by inside patch b, which lies at origin[b] in the map of image[b]; out_b is what the
// output changes by, in the patch at out_origin[b] of its map. All are channels last and of one float type; patches lie
// inside their maps.
#pragma once
#include <stdexcept>
#include <string>

#include "view.h"

namespace zf {

struct Change {
  View delta;                           // [B, C, h, w]
  View before, after;                   // [N, C, H, W], [N, C, H', W']: the clean input and output
  View out;                             // [B, C, h', w']
  const int64_t* image = nullptr;       // [B]
  const int64_t* origin = nullptr;      // [B][2], rows then columns
  const int64_t* out_origin = nullptr;  // [B][2]

  // Throws std::invalid_argument where a patch is not inside its map.
  void check() const {
    for (int64_t b = 0; b < delta.n(); ++b) {
      const int64_t *i = origin + 2 * b, *o = out_origin + 2 * b;
      const bool inside = i[0] >= 0 && i[1] >= 0 && i[0] <= before.h() - delta.h() && i[1] <= before.w() - delta.w() &&
                          o[0] >= 0 && o[1] >= 0 && o[0] <= after.h() - out.h() && o[1] <= after.w() - out.w();
      if (!inside || image[b] < 0 || image[b] >= before.n())
        throw std::invalid_argument("patch " + std::to_string(b) + " is not inside its map");
    }
  }
};

// A member of the ReLU family: slope * v where v < 0, upper where v > upper, else v.
struct Rectifier {
  double slope, upper;
};

}  // namespace zf
