// Vectors of the instruction set this file is compiled for, through the vector extensions of GCC and Clang.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"

namespace diffmas {
namespace DIFFMAS_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTOR_REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, VECTOR_REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, VECTOR_REGISTERS = 16;
#endif

template <class T>
struct Lanes {
  static constexpr int64_t W = VECTOR_BYTES / sizeof(T);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef Bits BitsVec __attribute__((vector_size(VECTOR_BYTES)));
  typedef Integer IntegerVec __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint16_t Narrow __attribute__((vector_size(VECTOR_BYTES * 2 / sizeof(T))));
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
constexpr int64_t W = Lanes<T>::W;

template <class To, class From>
inline To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

inline Vec<float> load(const float* p) {
  return bit_copy<Vec<float>>(*reinterpret_cast<const char (*)[VECTOR_BYTES]>(p));
}

inline Vec<double> load(const double* p) {
  return bit_copy<Vec<double>>(*reinterpret_cast<const char (*)[VECTOR_BYTES]>(p));
}

inline Lanes<float>::BitsVec load_narrow(const void* p) {
  Lanes<float>::Narrow narrow;
  __builtin_memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, Lanes<float>::BitsVec);
}

inline void store_narrow(void* p, Lanes<float>::BitsVec bits) {
  const auto narrow = __builtin_convertvector(bits, Lanes<float>::Narrow);
  __builtin_memcpy(p, &narrow, sizeof(narrow));
}

inline Vec<float> load(const BFloat16* p) { return bit_copy<Vec<float>>(load_narrow(p) << 16); }

inline Vec<float> load(const Half* p) {
  const auto bits = load_narrow(p);
  // The exponent is rebiased by a multiplication, which also normalises subnormal numbers.
  auto value = bit_copy<Lanes<float>::BitsVec>(
      bit_copy<Vec<float>>((bits & 0x7fffu) << 13) * bit_copy<float>(uint32_t{(127 + 112) << 23}));
  value |= (bits & 0x7c00u) == 0x7c00u ? Lanes<float>::BitsVec{} + 0x7f800000u : Lanes<float>::BitsVec{};
  return bit_copy<Vec<float>>(value | (bits & 0x8000u) << 16);
}

template <class T, std::enable_if_t<std::is_floating_point_v<T>, int> = 0>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

/// Both 16-bit stores round to nearest, ties to even.
inline void store(BFloat16* p, Vec<float> v) {
  const auto bits = bit_copy<Lanes<float>::BitsVec>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_narrow(p, v == v ? rounded : Lanes<float>::BitsVec{} + 0x7fc0u);
}

inline void store(Half* p, Vec<float> v) {
  using Bits = Lanes<float>::BitsVec;
  const Bits bits = bit_copy<Bits>(v), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  constexpr uint32_t overflow = (127 + 16) << 23, normal = 113u << 23;
  constexpr uint32_t subnormal_shift = ((127 - 15) + (23 - 10) + 1) << 23;
  const Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits subnormal =
      bit_copy<Bits>(bit_copy<Vec<float>>(magnitude) + bit_copy<float>(subnormal_shift)) - subnormal_shift;
  const Bits rounded = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  store_narrow(p, (magnitude >= overflow ? special : magnitude < normal ? subnormal : rounded) | sign >> 16);
}

/// The first `count` < W elements; the other lanes are zero.
template <class S>
inline Vec<Acc<S>> load_partial(const S* p, int64_t count) {
  S lanes[W<Acc<S>>] = {};
  __builtin_memcpy(lanes, p, sizeof(S) * count);
  return load(lanes);
}

template <class S>
inline void store_partial(S* p, Vec<Acc<S>> v, int64_t count) {
  S lanes[W<Acc<S>>];
  store(lanes, v);
  __builtin_memcpy(p, lanes, sizeof(S) * count);
}

template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

/// exp, accurate to about one unit in the last place; 0 below the smallest normal result, so exp(-inf) is exactly 0.
inline Vec<float> exponential(Vec<float> x) {
  const auto underflow = x < -87.3f;
  x = x > 88.7f ? Vec<float>{} + 88.7f : underflow ? Vec<float>{} : x;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const Vec<float> shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto scaled = bit_copy<Lanes<float>::BitsVec>(p) + (bit_copy<Lanes<float>::BitsVec>(shifted) << 23);
  return underflow ? Vec<float>{} : bit_copy<Vec<float>>(scaled);
}

inline Vec<double> exponential(Vec<double> x) {
  const auto underflow = x < -708.0;
  x = x > 709.7 ? Vec<double>{} + 709.7 : underflow ? Vec<double>{} : x;
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> shifted = x * 1.4426950408889634074 + magic, n = shifted - magic;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  constexpr double coefficients[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                     1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,     0.5};
#pragma GCC unroll 10
  for (double coefficient : coefficients) p = p * r + coefficient;
  p = p * (r * r) + r + 1.0;
  const auto scaled = bit_copy<Lanes<double>::BitsVec>(p) + (bit_copy<Lanes<double>::BitsVec>(shifted) << 52);
  return underflow ? Vec<double>{} : bit_copy<Vec<double>>(scaled);
}

/// tanh, accurate to a few units in the last place everywhere (Cephes: a fraction near zero, the exponential beyond).
inline Vec<float> hyperbolic_tangent(Vec<float> x) {
  const Vec<float> magnitude = x < 0.0f ? -x : x, square = x * x;
  Vec<float> p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec<float> near = p * square * x + x, far = 1.0f - 2.0f / (exponential(magnitude + magnitude) + 1.0f);
  return magnitude < 0.625f ? near : x < 0.0f ? -far : far;
}

inline Vec<double> hyperbolic_tangent(Vec<double> x) {
  const Vec<double> magnitude = x < 0.0 ? -x : x, square = x * x;
  const Vec<double> p =
      (square * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * square - 1.61468768441708447952e3;
  const Vec<double> q =
      ((square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3) * square + 4.84406305325125486048e3;
  const Vec<double> near = p / q * square * x + x, far = 1.0 - 2.0 / (exponential(magnitude + magnitude) + 1.0);
  return magnitude < 0.625 ? near : x < 0.0 ? -far : far;
}

/// Scalars by way of the vectors, so that every element of a row is rounded the same way.
template <class T>
inline T exponential_scalar(T x) {
  return exponential(splat(x))[0];
}

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

/// Folds a vector to its lowest 16 bytes by additions.
template <class T>
struct Quarter {
  typedef T type __attribute__((vector_size(16)));
};

template <class T>
inline typename Quarter<T>::type fold(Vec<T> v) {
  typename Quarter<T>::type parts[VECTOR_BYTES / 16];
  __builtin_memcpy(parts, &v, sizeof(v));
  for (int w = VECTOR_BYTES / 32; w; w /= 2)
    for (int i = 0; i < w; ++i) parts[i] += parts[i + w];
  return parts[0];
}

#if defined(__clang__) || __GNUC__ >= 12
#define DIFFMAS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DIFFMAS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

/// Sums of the lanes of four folded vectors.
inline void sums(
    Quarter<float>::type a, Quarter<float>::type b, Quarter<float>::type c, Quarter<float>::type d, float* out) {
  const auto ab = DIFFMAS_SHUFFLE(a, b, 0, 4, 1, 5) + DIFFMAS_SHUFFLE(a, b, 2, 6, 3, 7);
  const auto cd = DIFFMAS_SHUFFLE(c, d, 0, 4, 1, 5) + DIFFMAS_SHUFFLE(c, d, 2, 6, 3, 7);
  const auto result = DIFFMAS_SHUFFLE(ab, cd, 0, 1, 4, 5) + DIFFMAS_SHUFFLE(ab, cd, 2, 3, 6, 7);
  __builtin_memcpy(out, &result, sizeof(result));
}

inline void sums(
    Quarter<double>::type a, Quarter<double>::type b, Quarter<double>::type c, Quarter<double>::type d, double* out) {
  const auto ab = DIFFMAS_SHUFFLE(a, b, 0, 2) + DIFFMAS_SHUFFLE(a, b, 1, 3);
  const auto cd = DIFFMAS_SHUFFLE(c, d, 0, 2) + DIFFMAS_SHUFFLE(c, d, 1, 3);
  __builtin_memcpy(out, &ab, sizeof(ab));
  __builtin_memcpy(out + 2, &cd, sizeof(cd));
}

/// Sums of the lanes of four vectors.
template <class T>
inline void sums(const Vec<T> (&v)[4], T* out) {
  sums(fold<T>(v[0]), fold<T>(v[1]), fold<T>(v[2]), fold<T>(v[3]), out);
}

template <class T>
inline T sum(Vec<T> v) {
  const auto folded = fold<T>(v);
  T total = folded[0];
  for (int i = 1; i < int(16 / sizeof(T)); ++i) total += folded[i];
  return total;
}

template <class T>
inline T largest(Vec<T> v) {
  T result = v[0];
  for (int i = 1; i < W<T>; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

}  // namespace DIFFMAS_ISA
}  // namespace diffmas
