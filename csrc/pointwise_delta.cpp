// CPU kernel of pointwise_delta: one pass. The contract is in the header.
//
// Least traffic, in float32: 4 bytes of the change in and 4 of the result out (which may lie over the change) for each
// value; the clean values, 4 more, are read where they lie and shared by all patches of a picture.
// Operations on a value, both of f and the difference, a multiply-add counted as two: abs 2, square and sqrt 4,
// hardsigmoid 6, hardswish 8, exp 44, sigmoid, silu and elu 46, mish 52, gelu_tanh 54, gelu 80, tanh 84, softplus 96. Two of
// them are roots in sqrt, divisions in all others but abs, square, exp, elu and gelu. docs/occlusion.md has what is reached.
//
// f is worked out twice a value, with the same instructions, so that what does not change gives exactly zero. For that
// this file is compiled without contraction: a product of f fused with the difference would round differently.
#include "pointwise_delta.h"

#include <stdexcept>

#include "dispatch.h"
#include "elementary.h"
#include "parallel.h"

namespace zf {
namespace ZF_ISA {
namespace {

// Each is called with a vector of floats or with a double.
struct Sigmoid {
  template <class V>
  V operator()(V x) const {
    return number<V>(1) / one_plus_exponential(-x);
  }
};

struct Tanh {
  template <class V>
  V operator()(V x) const {
    return tangent(x);
  }
};

struct Silu {
  template <class V>
  V operator()(V x) const {
    return x / one_plus_exponential(-x);
  }
};

struct Hardsigmoid {
  template <class V>
  V operator()(V x) const {
    return at_most(at_least(x + number<V>(3), 0), 6) / number<V>(6);
  }
};

struct Hardswish {
  template <class V>
  V operator()(V x) const {
    return x * at_most(at_least(x + number<V>(3), 0), 6) / number<V>(6);
  }
};

struct Gelu {
  template <class V>
  V operator()(V x) const {
    return x * normal(x);
  }
};

// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  template <class V>
  V operator()(V x) const {
    const V u = x * (number<V>(-1.5957691216057308) + number<V>(-0.071354816272600251) * (x * x));
    return x / one_plus_exponential(u);
  }
};

// x tanh(log(1 + e)) = x n / (n + 2), with e = exp(x) and n = e (e + 2); x itself from 20 on.
struct Mish {
  template <class V>
  V operator()(V x) const {
    const V e = exponential(at_most(x, 20)), n = e * (e + number<V>(2));
    return x * (n / (n + number<V>(2)));
  }
};

// log(1 + exp(y)) / beta, y = beta x, which does not overflow where exp(y) does.
struct Softplus {
  double beta, threshold;
  template <class V>
  V operator()(V x) const {
    const V y = x * number<V>(beta);
    const V soft = (at_least(y, 0) + log_one_plus(exponential(-magnitude(y)))) / number<V>(beta);
    return y > number<V>(threshold) ? x : soft;
  }
};

struct Elu {
  double alpha;
  template <class V>
  V operator()(V x) const {
    const V low = number<V>(alpha) * exponential_less_one(at_most(x, 0));
    return x > V{} ? x : low;
  }
};

struct Exp {
  template <class V>
  V operator()(V x) const {
    return full_exponential(x);
  }
};

struct Square {
  template <class V>
  V operator()(V x) const {
    return x * x;
  }
};

struct Abs {
  template <class V>
  V operator()(V x) const {
    return magnitude(x);
  }
};

struct Sqrt {
  template <class V>
  V operator()(V x) const {
    return root(x);
  }
};

// out[i] = f(z[i] + d[i]) - f(z[i]) for i in [0, count), by the same instructions for each i.
template <class F>
void change_run(const F& f, const float* z, const float* d, float* out, int64_t count) {
  constexpr int lanes = Vec<float>::lanes;
  const auto changed = [&](Floats before, Floats change) { return Floats(f(Floats(before + change)) - f(before)); };
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_vector(out + i, changed(load_vector(z + i), load_vector(d + i)));
  if (i < count) {
    const size_t rest = size_t(count - i) * sizeof(float);
    Floats before{}, change{};
    std::memcpy(&before, z + i, rest);
    std::memcpy(&change, d + i, rest);
    const Floats result = changed(before, change);
    std::memcpy(out + i, &result, rest);
  }
}
template <class F>
void change_run(const F& f, const double* z, const double* d, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = f(z[i] + d[i]) - f(z[i]);
}

// A row of pixels is one run where nothing lies between them.
bool is_run(const View& v) { return v.w() == 1 || v.stride[3] == v.c(); }

template <class T, class F>
void change_patches(const Change& change, const F& f, int threads) {
  const bool rows = is_run(change.delta) && is_run(change.before) && is_run(change.out);
  const int64_t step = rows ? change.out.w() : 1;
  parallel_for(change.delta.n(), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* origin = change.origin + 2 * b;
      for (int64_t y = 0; y < change.out.h(); ++y)
        for (int64_t x = 0; x < change.out.w(); x += step)
          change_run(f, at<T>(change.before, change.image[b], 0, origin[0] + y, origin[1] + x),
                     at<T>(change.delta, b, 0, y, x), at_mut<T>(change.out, b, 0, y, x), step * change.out.c());
    }
  });
}

template <class T>
void change_all(const Change& change, const Pointwise& p, int threads) {
  const auto run = [&](const auto& f) { change_patches<T>(change, f, threads); };
  switch (p.function) {
    case Function::sigmoid: return run(Sigmoid{});
    case Function::tanh: return run(Tanh{});
    case Function::silu: return run(Silu{});
    case Function::hardswish: return run(Hardswish{});
    case Function::hardsigmoid: return run(Hardsigmoid{});
    case Function::gelu: return run(Gelu{});
    case Function::gelu_tanh: return run(GeluTanh{});
    case Function::mish: return run(Mish{});
    case Function::softplus: return run(Softplus{p.a, p.b});
    case Function::elu: return run(Elu{p.a});
    case Function::exp: return run(Exp{});
    case Function::square: return run(Square{});
    case Function::abs: return run(Abs{});
    case Function::sqrt: return run(Sqrt{});
    default: throw std::invalid_argument("pointwise_delta: no such function");
  }
}

}  // namespace

void pointwise_delta(const Change& change, const Pointwise& f, int threads) {
  change.check();
  if (change.delta.dtype == DType::f64)
    change_all<double>(change, f, threads);
  else
    change_all<float>(change, f, threads);
}

}  // namespace ZF_ISA
}  // namespace zf
