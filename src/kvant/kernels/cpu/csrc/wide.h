// Vectors of sixteen lanes for the loops that take most of the time. Where registers hold eight, FWide is F8.
#pragma once

#include <type_traits>

#include "lanes.h"

namespace kvant::KVANT_ISA {

#if defined(__AVX512VNNI__)
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t UWide __attribute__((vector_size(64)));
typedef F16 FWide;
typedef I16 IWide;
#else
typedef F8 FWide;
typedef I8 IWide;
typedef U8 UWide;
#endif
constexpr int kAlign = sizeof(FWide);  // of what is read and written by them again and again
template <class F>
constexpr int kLanesOf = sizeof(F) / sizeof(float);
template <class F>
using UnsignedOf = std::conditional_t<sizeof(F) == sizeof(F8), U8, UWide>;

// A number in all lanes of either width.
template <class V, class X>
inline V all(X x) {
  if constexpr (sizeof(V) == sizeof(F8)) return all(x);
  else return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

constexpr float kWhole = 12582912.0f;  // what is added to it is rounded to integers, which its lowest bits then are

// To the nearest integer, ties to even, |x| < 2^22.
inline F8 nearest(F8 x) { return x + all(kWhole) - all(kWhole); }

#if defined(__AVX512VNNI__)
inline F16 to_float(I16 x) { return (F16)_mm512_cvtepi32_ps((__m512i)x); }
inline I16 to_int(F16 x) { return (I16)_mm512_cvtps_epi32((__m512)x); }
inline F16 larger(F16 a, F16 b) { return (F16)_mm512_max_ps((__m512)a, (__m512)b); }
inline F16 smaller(F16 a, F16 b) { return (F16)_mm512_min_ps((__m512)a, (__m512)b); }

// 2^x to 3 units in the last place; subnormal results become 0 where `FlushTiny` holds.
inline F16 power_of_two(F16 x) {
  constexpr int kFloor = 9;  // x less the integer below it, and no exceptions
  const F16 r = (F16)_mm512_reduce_ps((__m512)x, kFloor);
  F16 p = all<F16>(1.8671305e-3f);
  p = p * r + all<F16>(9.0170288e-3f);
  p = p * r + all<F16>(5.5799913e-2f);
  p = p * r + all<F16>(2.4016444e-1f);
  p = p * r + all<F16>(6.9315130e-1f);
  p = p * r + all<F16>(1.0f);
  return (F16)_mm512_scalef_ps((__m512)p, (__m512)x);
}

template <int Half>
inline F8 half_of(F16 x) {
  return (F8)_mm512_extractf32x8_ps((__m512)x, Half);
}
inline F16 of_halves(F8 low, F8 high) {
  return (F16)_mm512_insertf32x8(_mm512_castps256_ps512((__m256)low), (__m256)high, 1);
}

// sum += products of unsigned bytes and four signed ones that all lanes share. gcc 12 alone reads those into a register
// first, and copies sums from register to register.
inline void add_dots(I16& sum, __m512i u, const int8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const char(*)[4]>(four)));
}

// Four rows of 16 bytes, `pitch` bytes apart, side by side.
inline __m512i four_rows(const uint8_t* rows, int64_t pitch) {
  const __m512i first = _mm512_castsi128_si512(load<__m128i>(rows));
  const __m512i two = _mm512_inserti32x4(first, load<__m128i>(rows + pitch), 1);
  const __m512i three = _mm512_inserti32x4(two, load<__m128i>(rows + 2 * pitch), 2);
  return _mm512_inserti32x4(three, load<__m128i>(rows + 3 * pitch), 3);
}

// Two rows of 32 bytes likewise.
inline __m512i two_rows(const uint8_t* rows, int64_t pitch) {
  if (pitch == 32) return load<__m512i>(rows);
  return _mm512_inserti64x4(_mm512_castsi256_si512(load<__m256i>(rows)), load<__m256i>(rows + pitch), 1);
}

// To eight lanes, by sums or by maxima.
inline F8 folded_sum(F16 x) { return half_of<0>(x) + half_of<1>(x); }
inline F8 folded_top(F16 x) { return larger(half_of<0>(x), half_of<1>(x)); }
#endif
inline F8 folded_sum(F8 x) { return x; }
inline F8 folded_top(F8 x) { return x; }

}  // namespace kvant::KVANT_ISA
