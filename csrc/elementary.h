// Elementary functions on vectors of floats, for the CPU kernels, and by the same names on a double.
//
// Polynomials are minimax fits; their errors below are those of the polynomial alone, and what is rounded on the way adds
// up to less than two units in the last place. NaN gives NaN, infinities what the limit is.
#pragma once
#include <cmath>

#include "simd.h"

namespace zf {
namespace ZF_ISA {
namespace {

typedef Vec<float>::type Floats;
typedef Vec<float>::mask Lanes;

inline Lanes bits_of(Floats v) { return reinterpret_cast<Lanes>(v); }
inline Floats floats_of(Lanes bits) { return reinterpret_cast<Floats>(bits); }

template <class V>
inline V number(double v);
template <>
inline Floats number<Floats>(double v) {
  return splat(float(v));
}
template <>
inline double number<double>(double v) {
  return v;
}

// a * b + c, rounded once where the processor can: said in so many words, since a file may ask the compiler not to fuse.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if ZF_VECTOR_BYTES == 64
  return reinterpret_cast<Floats>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif ZF_VECTOR_BYTES == 32
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// c[0] + c[1] x + c[2] x^2 + ..., two terms at a time, which halves how long one waits for the other.
template <int N>
inline Floats polynomial(Floats x, const float (&c)[N]) {
  const auto pair = [&](int i) { return i + 1 < N ? multiply_add(splat(c[i + 1]), x, splat(c[i])) : splat(c[i]); };
  const Floats square = x * x;
  Floats sum = pair((N - 1) / 2 * 2);
#pragma GCC unroll 16
  for (int i = (N - 1) / 2 * 2 - 2; i >= 0; i -= 2) sum = multiply_add(sum, square, pair(i));
  return sum;
}

// The smaller, the larger of a number and a bound. NaN stays.
template <class V>
inline V at_most(V v, double bound) {
  const V high = number<V>(bound);
  return high < v ? high : v;
}
template <class V>
inline V at_least(V v, double bound) {
  const V low = number<V>(bound);
  return v < low ? low : v;
}

inline Floats root(Floats v) {
#if ZF_VECTOR_BYTES == 64
  return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
#elif ZF_VECTOR_BYTES == 32
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#else
  for (int i = 0; i < Vec<float>::lanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline double root(double v) { return std::sqrt(v); }

template <class V>
inline V magnitude(V v);
template <>
inline Floats magnitude(Floats v) {
  return floats_of(bits_of(v) & 0x7fffffff);
}
template <>
inline double magnitude(double v) {
  return std::fabs(v);
}

// e^x = 2^power * (1 + rest), |rest| < 0.42. Adding 1.5 * 2^23 rounds to a whole number and leaves it in the lowest bits.
// Relative error 3.2e-9.
struct Power {
  Floats rest;
  Lanes power;  // only its lower half counts
};
inline Power power_of(Floats x) {
  const Floats shift = splat(12582912.0f);
  const Floats shifted = multiply_add(x, splat(1.44269504f), shift), n = shifted - shift;
  const Floats r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  const Floats q = polynomial(r, {0.5f, 0.166665182f, 0.041666206f, 0.00836891774f, 0.00139505405f});
  return {multiply_add(r * r, q, r), bits_of(shifted)};
}
inline Floats two_to(Lanes power) { return floats_of((power << 23) + 0x3f800000); }  // 0 of -127, infinity of 128

// e^x for x up to 88; zero below 2^-126.
inline Floats exponential(Floats x) {
  const Power p = power_of(at_least(x, -88));
  return (p.rest + 1.0f) * two_to(p.power);
}
inline double exponential(double x) { return std::exp(x); }

// 1 + e^x, rounded once; infinity from x = 88 on.
inline Floats one_plus_exponential(Floats x) {
  const Power p = power_of(at_least(x > splat(88.0f) ? splat(89.0f) : x, -88));
  const Floats scale = two_to(p.power);
  return multiply_add(p.rest, scale, scale + 1.0f);
}
inline double one_plus_exponential(double x) { return 1 + std::exp(x); }

// e^x, with all that float has.
inline Floats full_exponential(Floats x) {
  const Power p = power_of(at_least(at_most(x, 89), -104));
  const Lanes power = p.power - 0x4b400000, half = power >> 1;
  return (p.rest + 1.0f) * two_to(half) * two_to(power - half);
}
inline double full_exponential(double x) { return std::exp(x); }

// e^x - 1 for x up to 88.
inline Floats exponential_less_one(Floats x) {
  const Power p = power_of(at_least(x, -88));
  const Floats scale = two_to(p.power);
  return multiply_add(p.rest, scale, scale - 1.0f);
}
inline double exponential_less_one(double x) { return std::expm1(x); }

// log(1 + t) for t in [0, 1]: of (1 + t) / 2 where that is nearer to one. Error 7.3e-10.
inline Floats log_one_plus(Floats t) {
  const Lanes far = t > splat(0.414213562f);
  const Floats f = far ? (t - 1.0f) * 0.5f : t;
  const Floats p = polynomial(f, {0.333333105f, -0.249999866f, 0.200022265f, -0.16669251f, 0.142186582f, -0.123843431f,
                                  0.118729658f, -0.117898352f, 0.0691542476f});
  const Floats square = f * f, log = multiply_add(square, multiply_add(f, p, splat(-0.5f)), f);
  return far ? log + 0.693147181f : log;
}
inline double log_one_plus(double t) { return std::log1p(t); }

// tanh(x) = x + x^3 p(x^2) near zero, of error 1e-9; further out 1 - 2 / (1 + exp(2 |x|)), and x's sign.
inline Floats tangent(Floats x) {
  const Floats t = magnitude(x), square = x * x;
  const Floats p = polynomial(square, {-0.333333224f, 0.133329988f, -0.0539309457f, 0.0216695536f, -0.00827567745f,
                                       0.00259281578f, -0.000459078146f});
  const Floats far = 1.0f - 2.0f / one_plus_exponential(t + t);
  const Floats signed_far = floats_of(bits_of(far) | (bits_of(x) & int32_t(0x80000000)));
  return t > splat(0.9f) ? signed_far : multiply_add(x * square, p, x);
}
inline double tangent(double x) { return std::tanh(x); }

// (1 + erf(x / sqrt(2))) / 2, the share of normal numbers below x. Of t = |x| it is half of exp(t p(t)), which times t has
// an error of 9e-9 up to 6.5, and falls to nothing at 15.
inline Floats normal(Floats x) {
  const Floats t = at_most(magnitude(x), 15);
  const Floats p = polynomial(t, {-0.797889352f, -0.318266958f, -0.0364786796f, 0.00502214348f, -0.000188588834f,
                                  -9.11301177e-05f, 1.94475469e-05f, -1.31840784e-06f});
  const Power e = power_of(at_least(t * p, -88));
  const Floats tail = (e.rest + 1.0f) * (two_to(e.power) * 0.5f);
  return x > Floats{} ? 1.0f - tail : tail;
}
inline double normal(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

}  // namespace
}  // namespace ZF_ISA
}  // namespace zf
