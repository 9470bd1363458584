// What the CUDA kernels store and compute in: f32, f64, bf16 and f16 values, and short vectors of them.
//
// Like every kernel body (*.cuh but launch.cuh) this file includes no CUDA header, and a plain C++ compiler
// takes it: the tests drive the bodies on the CPU, in loops over the indices that a launch would have.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "view.h"

#if defined(__CUDACC__)
#define ZF_HD __host__ __device__ __forceinline__
#else
#define ZF_HD inline
#endif

namespace zf {
namespace gpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type that a storage type is computed in.
template <class S>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

ZF_HD float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
ZF_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ZF_HD float widen(float v) { return v; }
ZF_HD double widen(double v) { return v; }
ZF_HD float widen(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
ZF_HD float widen(f16 v) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Read with float's bias the exponent is 112 too small, for normal and subnormal numbers alike.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

// Rounds to nearest, ties to even.
template <class S>
ZF_HD S narrow(typename Compute<S>::type v);
template <>
ZF_HD float narrow<float>(float v) {
  return v;
}
template <>
ZF_HD double narrow<double>(double v) {
  return v;
}
template <>
ZF_HD bf16 narrow<bf16>(float v) {
  bf16 result;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
#else
  const uint32_t bits = float_to_bits(v);
  result.bits = v != v ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return result;
}
template <>
ZF_HD f16 narrow<f16>(float v) {
  f16 result;
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
#else
  const uint32_t sign = float_to_bits(v) >> 16 & 0x8000;
  const float magnitude = std::fabs(v);
  uint32_t bits;
  if (v != v) {
    bits = 0x7e00;
  } else if (magnitude >= 0x1p16f) {
    bits = 0x7c00;
  } else {
    // A subnormal has the exponent -14 and fewer than 1024 steps of 2^-24; a carry moves into the exponent.
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    bits = (uint32_t(exponent + 14) << 10) + uint32_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  }
  result.bits = uint16_t(sign | bits);
#endif
  return result;
}

// V values; neighbours in memory move by one access of V * sizeof(T) bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Vec {
  T lane[V];
};

template <class T, int V>
ZF_HD void store_vector(T* p, const Vec<T, V>& v) {
  *reinterpret_cast<Vec<T, V>*>(p) = v;
}

// The same to shared memory, in one access for certain: where its address is computed, the compiler makes four of it.
ZF_HD void store_shared(float* p, const Vec<float, 4>& v) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(uint32_t(__cvta_generic_to_shared(p))), "f"(v.lane[0]),
               "f"(v.lane[1]), "f"(v.lane[2]), "f"(v.lane[3])
               : "memory");
#else
  store_vector(p, v);
#endif
}

// V channels that are next to each other in memory.
template <int V>
struct Packed {
  static constexpr int count = V;
  static constexpr bool packed = true;

  template <class T, class I>
  static ZF_HD Vec<std::remove_const_t<T>, V> load(T* p, I) {
    return *reinterpret_cast<const Vec<std::remove_const_t<T>, V>*>(p);
  }
  template <class T, class I>
  static ZF_HD void store(T* p, I, const Vec<T, V>& v) {
    store_vector(p, v);
  }
};

// V channels of any stride, each moved by itself: they share the arithmetic of indices.
template <int V>
struct Spread {
  static constexpr int count = V;
  static constexpr bool packed = false;

  template <class T, class I>
  static ZF_HD Vec<std::remove_const_t<T>, V> load(T* p, I channel_stride) {
    Vec<std::remove_const_t<T>, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.lane[i] = p[i * channel_stride];
    return v;
  }
  template <class T, class I>
  static ZF_HD void store(T* p, I channel_stride, const Vec<T, V>& v) {
#pragma unroll
    for (int i = 0; i < V; ++i) p[i * channel_stride] = v.lane[i];
  }
};

constexpr int vector_bytes = 16;    // the widest access of a thread
constexpr int spread_channels = 4;  // that a thread takes where they are not next to each other

// A type as a value, for generic lambdas.
template <class T>
struct Type {
  using type = T;
};
template <class Value>
using TypeIn = typename std::decay_t<Value>::type;

// Calls f(Type<S>) with the storage type of `dtype`.
template <class F>
void for_float_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(Type<float>{});
    case DType::f64: return f(Type<double>{});
    case DType::bf16: return f(Type<bf16>{});
    case DType::f16: return f(Type<f16>{});
    case DType::u8: break;
  }
  throw std::invalid_argument("zfcore: a feature map must be f32, f64, bf16 or f16");
}

// The same where values are moved but not computed with: their size alone matters.
template <class F>
void for_storage_size(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(Type<uint32_t>{});
    case DType::f64: return f(Type<uint64_t>{});
    case DType::bf16:
    case DType::f16: return f(Type<uint16_t>{});
    case DType::u8: break;
  }
  throw std::invalid_argument("zfcore: a feature map must be f32, f64, bf16 or f16");
}

}  // namespace gpu
}  // namespace zf
