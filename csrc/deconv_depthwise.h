// deconv_step of a depthwise convolution: one filter a channel, which sees nothing but it. No pool above.
//
// Work: every output is a dot product of at most kh * kw numbers, so what counts is what moves: the signal in, the
// output out, once each. Zeros are not worth looking for: a list of them would cost more than the multiply-adds.
//
// How: a task takes some vectors of channels of one patch down, row of the output by row. The rows of the signal that
// it needs are kept in a ring, gated already, with zeros around them, so that the loops know no edges. Outputs of one
// phase of the stride read the same taps, all of them a constant number of places away; eight of them are summed in
// registers at a time. Each output is summed over rows, then taps, in that order, so the bits are always the same.
#pragma once
#include <cmath>
#include <vector>

#include "deconv_step.h"
#include "parallel.h"
#include "window.h"

namespace zf {
namespace ZF_ISA {
namespace {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }  // b > 0

// An entry of a sum: the row of the ring from its column of output 0, and the vector of the tap's filters.
template <class T>
struct DepthwiseTap {
  const T* row;
  const T* filter;
};

// Outputs [0, Outputs) of a phase: out[q] = sum over taps of row[q] * filter. Moves the rows on.
template <class T, int Outputs>
void depthwise_outputs(DepthwiseTap<T>* taps, int64_t count, T* out, int64_t apart) {
  constexpr int lanes = Vec<T>::lanes;
  typename Vec<T>::type sum[Outputs] = {};
  for (int64_t t = 0; t < count; ++t) {
    const typename Vec<T>::type f = load_vector(taps[t].filter);
    const T* row = taps[t].row;
#pragma GCC unroll 8
    for (int q = 0; q < Outputs; ++q) sum[q] += load_vector(row + q * lanes) * f;
    taps[t].row = row + Outputs * lanes;
  }
#pragma GCC unroll 8
  for (int q = 0; q < Outputs; ++q) store_vector(out + q * apart, sum[q]);
}

template <class T>
using DepthwiseFn = void (*)(DepthwiseTap<T>*, int64_t, T*, int64_t);

template <class T, int Outputs>
DepthwiseFn<T> pick_depthwise(int64_t outputs) {
  if constexpr (Outputs == 0)
    return nullptr;
  else
    return outputs == Outputs ? &depthwise_outputs<T, Outputs> : pick_depthwise<T, Outputs - 1>(outputs);
}

template <class S>
struct Depthwise {
  typedef typename Compute<S>::type T;
  typedef typename Vec<T>::type V;
  typedef typename Vec<T>::mask M;
  static constexpr int lanes = Vec<T>::lanes;
  static constexpr int64_t most_rows = 256;   // of a filter
  static constexpr int outputs = 8;           // summed at a time, in registers
  static constexpr int64_t ring_bytes = 256 << 10;  // of a task, about: a part of the second-level cache

  const DeconvStep& step;
  const Window& conv = step.conv;
  const int64_t h = step.signal.h(), w = step.signal.w();
  const int64_t canvas_w = (w - 1) * conv.stride[1] + (conv.kernel[1] - 1) * conv.dilation[1] + 1;
  // The filters of [taps][channels, in whole vectors], the last lanes zero.
  std::vector<T> filters;
  bool finite = true;
  // Whether vectors of the signal are read, and those of the output written, where they lie.
  const bool plain = std::is_same<S, T>::value && step.signal.stride[1] == 1 && !step.passes.data;
  const bool direct_out = std::is_same<S, T>::value && step.out.stride[1] == 1;
  const DepthwiseFn<T> most = pick_depthwise<T, outputs>(outputs);

  // filters: packed as `Packing` does it for one channel a group.
  template <class Packing>
  Depthwise(const DeconvStep& step, const Packing& packing, const T* packed) : step(step) {
    const int64_t channels = round_up(step.signal.c(), lanes);
    filters.assign(size_t(conv.taps() * channels), T(0));
    for (int64_t k = 0; k < step.signal.c(); ++k)
      for (int64_t i = 0; i < conv.kernel[0]; ++i)
        for (int64_t j = 0; j < conv.kernel[1]; ++j) {
          const int64_t at = packing.merged ? i * packing.run_vectors * lanes + j : (i * conv.kernel[1] + j) * lanes;
          const T f = packed[k * packing.group_elements() + at];
          filters[size_t((i * conv.kernel[1] + j) * channels + k)] = f;
          finite = finite && std::isfinite(f);
        }
  }

  // Of it the filters must be finite: 0 x inf and 0 x NaN are to be 0.
  static bool takes(const DeconvStep& step) {
    return step.groups > 1 && step.weight.size[0] == step.groups && step.weight.size[1] == 1 && !step.switches.data &&
           step.conv.kernel[0] <= most_rows;
  }

  static int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  // One task: where its patch lies, its channels, and its ring.
  struct Task {
    int64_t b, image, origin[2], corner[2];  // corner: of the canvas, in the map below
    int64_t out[2];                          // of the output, in the map below
    int64_t c, vectors;
    int64_t begin, end;  // the columns of the signal that are units of the map
    int64_t low, width;  // those that a row of the ring holds, zeros around the others: [low, low + width)
    T* ring;             // [kernel rows][vectors][width][lanes]
    int64_t held[most_rows];   // the signal's row in each place of the ring, -1 for none
  };

  // What comes down at one place, of one vector of channels, after the rectifier; zeros past the last channel.
  V gated(const Task& task, int64_t c, int64_t y, int64_t x) const {
    const int64_t left = step.signal.c() - c;
    const S* p = at<S>(step.signal, task.b, c, y, x);
    const int64_t apart = step.signal.stride[1];
    V v{};
    if (apart == 1 && left >= lanes)
      v = load_storage(p);
    else
      for (int64_t i = 0; i < smaller(lanes, left); ++i) v[i] = to_compute(p[i * apart]);
    if (step.rectify) v = v <= V{} ? V{} : v;  // NaN stays
    if (step.passes.data) {
      const uint8_t* pass = at<uint8_t>(step.passes, task.image, c, task.origin[0] + y, task.origin[1] + x);
      const int64_t step_c = step.passes.stride[1];
      if (step_c == 1 && left >= lanes) {
        v = load_bytes<T>(pass) != 0 ? v : V{};
      } else {
        for (int64_t i = 0; i < smaller(lanes, left); ++i)
          if (!pass[i * step_c]) v[i] = 0;
      }
    }
    return v;
  }

  // The ring's row that holds row y of the signal.
  const T* row_of(Task& task, int64_t y) const {
    const int64_t slot = y % conv.kernel[0];
    T* row = task.ring + slot * task.vectors * task.width * lanes;
    if (task.held[slot] == y) return row;
    task.held[slot] = y;
    for (int64_t v = 0; v < task.vectors; ++v) {
      const int64_t c = task.c + v * lanes;
      T* p = row + (v * task.width + task.begin - task.low) * lanes;
      if (plain && step.signal.c() - c >= lanes) {
        const T* q = reinterpret_cast<const T*>(at<S>(step.signal, task.b, c, y, task.begin));
        const int64_t apart = step.signal.stride[3];
        for (int64_t x = task.begin; x < task.end; ++x, p += lanes, q += apart) {
          const V value = load_vector(q);
          store_vector(p, step.rectify ? (value <= V{} ? V{} : value) : value);
        }
      } else {
        for (int64_t x = task.begin; x < task.end; ++x, p += lanes) store_vector(p, gated(task, c, y, x));
      }
    }
    return row;
  }

  void store(const Task& task, int64_t c, int64_t y, int64_t x, V v) const {
    S* p = at_mut<S>(step.out, task.b, c, y, x);
    const int64_t left = smaller(lanes, step.out.c() - c), apart = step.out.stride[1];
    if (apart == 1 && left == lanes) {
      store_storage(p, v);
    } else {
      for (int64_t i = 0; i < left; ++i) from_compute(T(v[i]), p + i * apart);
    }
  }

  // Output row r of a task.
  void run_row(Task& task, int64_t r, std::vector<DepthwiseTap<T>>& taps) const {
    const int64_t channels = round_up(step.signal.c(), lanes);
    const int64_t y = task.out[0] + r;                  // in the map below
    const int64_t canvas_y = y - task.corner[0];
    const int64_t shift = task.out[1] - task.corner[1];  // from a column of the output to one of the canvas
    // Columns of the output that anything reaches.
    const int64_t begin = larger(0, larger(-task.out[1], -shift));
    int64_t end = smaller(smaller(step.out.w(), step.below[1] - task.out[1]), canvas_w - shift);
    int64_t first = 0, last = -1;  // rows of the signal
    const int64_t s = conv.stride[0], d = conv.dilation[0], reach = (conv.kernel[0] - 1) * d;
    if (y >= 0 && y < step.below[0] && canvas_y >= 0) {
      first = larger(larger(0, -task.origin[0]), canvas_y > reach ? ceil_div(canvas_y - reach, s) : 0);
      last = smaller(smaller(h, step.map[0] - task.origin[0]) - 1, canvas_y / s);
    }
    if (first > last || end < begin) end = begin;
    for (int64_t v = 0; v < task.vectors; ++v) {
      const int64_t c = task.c + v * lanes;
      for (int64_t x = 0; x < smaller(begin, step.out.w()); ++x) store(task, c, r, x, V{});
      for (int64_t x = end; x < step.out.w(); ++x) store(task, c, r, x, V{});
      if (begin == end) continue;
      for (int64_t phase = 0; phase < conv.stride[1]; ++phase) {
        const int64_t x0 = begin + (phase + conv.stride[1] - (begin + shift) % conv.stride[1]) % conv.stride[1];
        if (x0 >= end) continue;
        const int64_t place = floor_div(x0 + shift - phase, conv.stride[1]);
        taps.clear();
        for (int64_t source = first; source <= last; ++source) {
          const int64_t offset = canvas_y - source * s;
          if (offset % d) continue;
          const T* row = row_of(task, source) + v * task.width * lanes;
          for (int64_t j = 0; j < conv.kernel[1]; ++j) {
            const int64_t away = phase - j * conv.dilation[1];
            if (away % conv.stride[1]) continue;
            const int64_t column = place + away / conv.stride[1] - task.low;
            taps.push_back({row + column * lanes, &filters[size_t((offset / d * conv.kernel[1] + j) * channels + c)]});
          }
        }
        const int64_t count = ceil_div(end - x0, conv.stride[1]);
        const bool direct = direct_out && step.out.c() - c >= lanes;
        T some[outputs * lanes];
        for (int64_t q = 0; q < count; q += outputs) {
          const int64_t now = smaller(outputs, count - q), x = x0 + q * conv.stride[1];
          T* out = direct ? reinterpret_cast<T*>(at_mut<S>(step.out, task.b, c, r, x)) : some;
          (now == outputs ? most : pick_depthwise<T, outputs>(now))(
              taps.data(), int64_t(taps.size()), out, direct ? conv.stride[1] * step.out.stride[3] : lanes);
          for (int64_t i = 0; !direct && i < now; ++i)
            store(task, c, r, x + i * conv.stride[1], load_vector(some + i * lanes));
        }
      }
    }
  }

  void operator()(int threads) const {
    // Columns of the signal that any output reads, and what reaches past it.
    const int64_t before = (conv.kernel[1] - 1) * conv.dilation[1] / conv.stride[1] + 1, width = w + 2 * before + 1;
    const int64_t vector_bytes = conv.kernel[0] * width * lanes * int64_t(sizeof(T));
    const int64_t all = ceil_div(step.signal.c(), lanes), most_vectors = larger(1, smaller(all, ring_bytes / vector_bytes));
    const int64_t blocks = ceil_div(all, most_vectors), block = ceil_div(all, blocks);  // near-equal ones
    const int64_t tasks = step.signal.n() * blocks;
    const int64_t bands = tasks >= 2 * threads ? 1 : smaller(step.out.h(), ceil_div(2 * threads, tasks));
    const int64_t band = ceil_div(step.out.h(), bands);
    parallel_for(tasks * bands, 1, threads, [&](int64_t begin, int64_t end) {
      T* ring = static_cast<T*>(thread_scratch(3, block * vector_bytes));
      std::vector<DepthwiseTap<T>> taps;
      taps.reserve(size_t(conv.taps()));
      for (int64_t i = begin; i < end; ++i) {
        Task task;
        task.b = i / bands / blocks;
        task.c = i / bands % blocks * block * lanes;
        task.vectors = larger(0, smaller(block, all - i / bands % blocks * block));
        task.image = step.image ? step.image[task.b] : task.b;
        for (int axis = 0; axis < 2; ++axis) {
          task.origin[axis] = step.origin ? step.origin[2 * task.b + axis] : 0;
          task.corner[axis] = task.origin[axis] * conv.stride[axis] - conv.padding[axis];
          task.out[axis] = !step.whole ? task.corner[axis] : step.frame ? step.frame[2 * task.b + axis] : 0;
        }
        task.low = -before;
        task.width = width;
        task.ring = ring;
        task.begin = smaller(w, larger(0, -task.origin[1]));
        task.end = larger(task.begin, smaller(w, step.map[1] - task.origin[1]));
        std::memset(ring, 0, size_t(task.vectors * vector_bytes));
        for (int64_t row = 0; row < conv.kernel[0]; ++row) task.held[row] = -1;
        const int64_t first = i % bands * band;
        for (int64_t r = first; r < smaller(first + band, step.out.h()); ++r) run_row(task, r, taps);
      }
    });
  }
};

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
