// Vectors for the CPU kernels. Every kernel file is compiled once per instruction set with its own ZF_ISA (a namespace)
// and ZF_VECTOR_BYTES; the vectors are the compiler's own, so the source is one and the width follows.
// Everything has internal linkage, so that no AVX-512 copy of an inline function can be linked into the generic path.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own header, which makes an undefined vector out of itself.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "view.h"

namespace zf {
namespace ZF_ISA {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Vec;
template <>
struct Vec<float> {
  typedef float type __attribute__((vector_size(ZF_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(ZF_VECTOR_BYTES)));
  typedef uint8_t bytes __attribute__((vector_size(ZF_VECTOR_BYTES / 4)));
  typedef int32_t lane;
  static constexpr int lanes = ZF_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef double type __attribute__((vector_size(ZF_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(ZF_VECTOR_BYTES)));
  typedef uint8_t bytes __attribute__((vector_size(ZF_VECTOR_BYTES / 8)));
  typedef int64_t lane;
  static constexpr int lanes = ZF_VECTOR_BYTES / 8;
};

// The type that a storage type is computed in.
template <class S>
struct Compute {
  typedef float type;
};
template <>
struct Compute<double> {
  typedef double type;
};

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_compute(float v) { return v; }
inline double to_compute(double v) { return v; }
inline float to_compute(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float to_compute(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, mantissa = v.bits & 0x3ff;
  const uint32_t exponent = (v.bits >> 10) & 31;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
  if (exponent) return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // a subnormal: mantissa * 2^-24
  return sign ? -magnitude : magnitude;
}

inline void from_compute(float v, float* out) { *out = v; }
inline void from_compute(double v, double* out) { *out = v; }
inline void from_compute(float v, bf16* out) {
  const uint32_t bits = float_to_bits(v);
  if (v != v)
    out->bits = uint16_t((bits >> 16) | 0x40);
  else
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest, ties to even
}
inline void from_compute(float v, f16* out) {
  const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = uint16_t(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude >= 0x38800000) {
    const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
    out->bits = uint16_t(sign | (rounded >> 13));
  } else {
    // Adding 0.5 lines the mantissa up with f16's subnormal grid of 2^-24; the adder rounds to nearest even.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    out->bits = uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
  }
}

template <class T>
inline typename Vec<T>::type splat(T v) {
  return v - typename Vec<T>::type{};
}

template <class T>
inline typename Vec<T>::type load_vector(const T* p) {
  typename Vec<T>::type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_vector(T* p, typename Vec<T>::type v) {
  std::memcpy(p, &v, sizeof v);
}

// A vector of `lanes` storage values, in the compute type.
inline Vec<float>::type load_storage(const float* p) { return load_vector(p); }
inline Vec<double>::type load_storage(const double* p) { return load_vector(p); }
inline Vec<float>::type load_storage(const bf16* p) {
#if ZF_VECTOR_BYTES == 64
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec<float>::type>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
  typedef uint16_t half_vector __attribute__((vector_size(ZF_VECTOR_BYTES / 2)));
  typedef uint32_t word_vector __attribute__((vector_size(ZF_VECTOR_BYTES)));
  half_vector bits;
  std::memcpy(&bits, p, sizeof bits);
  const word_vector words = __builtin_convertvector(bits, word_vector) << 16;
  return reinterpret_cast<Vec<float>::type>(words);
#endif
}
inline Vec<float>::type load_storage(const f16* p) {
#if ZF_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<float>::type>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif ZF_VECTOR_BYTES == 32
  return reinterpret_cast<Vec<float>::type>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float>::type v;
  for (int i = 0; i < Vec<float>::lanes; ++i) v[i] = to_compute(p[i]);
  return v;
#endif
}
template <class T>
inline void store_storage(T* p, typename Vec<T>::type v) {
  store_vector(p, v);
}
template <class S>
inline void store_storage(S* p, Vec<float>::type v) {
  float lanes[Vec<float>::lanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < Vec<float>::lanes; ++i) from_compute(lanes[i], p + i);
}
#if ZF_VECTOR_BYTES == 64
inline void store_storage(bf16* p, Vec<float>::type v) {
  typedef uint32_t word_vector __attribute__((vector_size(64)));
  const word_vector bits = reinterpret_cast<word_vector>(v);
  const word_vector stored = v != v ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(stored)));
}
inline void store_storage(f16* p, Vec<float>::type v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif ZF_VECTOR_BYTES == 32
inline void store_storage(bf16* p, Vec<float>::type v) {
  typedef uint32_t word_vector __attribute__((vector_size(32)));
  const word_vector bits = reinterpret_cast<word_vector>(v);
  const __m256i stored =
      reinterpret_cast<__m256i>(v != v ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(stored), _mm256_extracti128_si256(stored, 1)));
}
inline void store_storage(f16* p, Vec<float>::type v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#endif

// One byte per lane to and from integer lanes. GCC 12's own conversion goes byte by byte, so the instruction is named.
template <class T>
inline typename Vec<T>::mask load_bytes(const uint8_t* p) {
  typename Vec<T>::bytes v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, typename Vec<T>::mask);
}
template <class T>
inline void store_bytes(uint8_t* p, typename Vec<T>::mask v) {
  const typename Vec<T>::bytes narrow = __builtin_convertvector(v, typename Vec<T>::bytes);
  std::memcpy(p, &narrow, sizeof narrow);
}
#if ZF_VECTOR_BYTES == 64
template <>
inline Vec<float>::mask load_bytes<float>(const uint8_t* p) {
  return reinterpret_cast<Vec<float>::mask>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <>
inline Vec<double>::mask load_bytes<double>(const uint8_t* p) {
  return reinterpret_cast<Vec<double>::mask>(
      _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <>
inline void store_bytes<float>(uint8_t* p, Vec<float>::mask v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}
template <>
inline void store_bytes<double>(uint8_t* p, Vec<double>::mask v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(reinterpret_cast<__m512i>(v)));
}
#elif ZF_VECTOR_BYTES == 32
template <>
inline Vec<float>::mask load_bytes<float>(const uint8_t* p) {
  return reinterpret_cast<Vec<float>::mask>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <>
inline Vec<double>::mask load_bytes<double>(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return reinterpret_cast<Vec<double>::mask>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)));
}
template <>
inline void store_bytes<float>(uint8_t* p, Vec<float>::mask v) {
  const __m256i words = reinterpret_cast<__m256i>(v);
  const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
}
#endif

template <class S>
inline const S* at(const View& v, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<const S*>(v.data) + n * v.stride[0] + c * v.stride[1] + h * v.stride[2] + w * v.stride[3];
}
template <class S>
inline S* at_mut(const View& v, int64_t n, int64_t c, int64_t h, int64_t w) {
  return const_cast<S*>(at<S>(v, n, c, h, w));
}

template <class P>
struct Pointee;
template <class T>
struct Pointee<T*> {
  typedef T type;
};

// Calls f with a null pointer of the storage type that `dtype` names. Returns whether it is a float type.
template <class F>
inline bool for_float_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: f(static_cast<float*>(nullptr)); return true;
    case DType::f64: f(static_cast<double*>(nullptr)); return true;
    case DType::bf16: f(static_cast<bf16*>(nullptr)); return true;
    case DType::f16: f(static_cast<f16*>(nullptr)); return true;
    default: return false;
  }
}

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
