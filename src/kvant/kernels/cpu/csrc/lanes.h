// The vector types, of eight lanes, and the simplest of what is done with them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Before a loop of up to 8 rounds with vectors in registers. Where the compiler takes vectors apart it only bloats.
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define KVANT_UNROLL _Pragma("GCC unroll 8")
#else
#define KVANT_UNROLL
#endif

namespace kvant::KVANT_ISA {

typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef int16_t S16 __attribute__((vector_size(32)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));
typedef uint8_t B32 __attribute__((vector_size(32)));
typedef uint8_t B8 __attribute__((vector_size(8)));

template <class V, class P>
inline V load(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class P>
inline void store(P* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

template <class To, class From>
inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&v);
}

#if defined(__ARM_NEON)
// A vector of 32 bytes is two registers here. What gcc does lane by lane,
// such as shuffles, comparisons and some conversions, is done half by half.
template <class Q, int Half, class V>
inline Q half_of(const V& v) {
  static_assert(sizeof(V) == 32 && sizeof(Q) == 16);
  return load<Q>(reinterpret_cast<const char*>(&v) + 16 * Half);
}

template <class V, class Q>
inline V of_halves(Q low, Q high) {
  static_assert(sizeof(V) == 32 && sizeof(Q) == 16);
  V v;
  store(&v, low);
  store(reinterpret_cast<char*>(&v) + 16, high);
  return v;
}

// A vector that a loop hands on from round to round: gcc keeps whole ones in memory there.
template <class V>
struct Carried {
  F4 low = {}, high = {};
  Carried() = default;
  inline Carried(V v) : low(half_of<F4, 0>(v)), high(half_of<F4, 1>(v)) {}
  inline operator V() const { return of_halves<V>(low, high); }
};
#else
template <class V>
using Carried = V;
#endif

// What `body` makes of vectors lane by lane.
template <class Body, class... V>
inline F8 by_registers(Body body, V... x) {
#if defined(__ARM_NEON)
  return of_halves<F8>(body(half_of<F4, 0>(x)...), body(half_of<F4, 1>(x)...));
#else
  return body(x...);
#endif
}

inline F8 all(float x) { return F8{x, x, x, x, x, x, x, x}; }
#if defined(__ARM_NEON)
inline I8 all(int32_t x) { return of_halves<I8>(vdupq_n_s32(x), vdupq_n_s32(x)); }
#else
inline I8 all(int32_t x) { return I8{x, x, x, x, x, x, x, x}; }
#endif

#if defined(__ARM_NEON)
inline F8 to_float(I8 x) {
  return of_halves<F8>(vcvtq_f32_s32(half_of<int32x4_t, 0>(x)), vcvtq_f32_s32(half_of<int32x4_t, 1>(x)));
}
#else
inline F8 to_float(I8 x) { return __builtin_convertvector(x, F8); }
#endif
#if defined(__AVX2__)
inline F8 larger(F8 a, F8 b) { return (F8)_mm256_max_ps((__m256)a, (__m256)b); }
inline F8 smaller(F8 a, F8 b) { return (F8)_mm256_min_ps((__m256)a, (__m256)b); }
inline F4 larger(F4 a, F4 b) { return (F4)_mm_max_ps((__m128)a, (__m128)b); }
inline F4 smaller(F4 a, F4 b) { return (F4)_mm_min_ps((__m128)a, (__m128)b); }
inline I8 larger(I8 a, I8 b) { return (I8)_mm256_max_epi32((__m256i)a, (__m256i)b); }
#else
inline F8 larger(F8 a, F8 b) {
  return by_registers([](auto x, auto y) { return x > y ? x : y; }, a, b);
}
inline F8 smaller(F8 a, F8 b) {
  return by_registers([](auto x, auto y) { return x < y ? x : y; }, a, b);
}
inline F4 larger(F4 a, F4 b) { return a > b ? a : b; }
inline F4 smaller(F4 a, F4 b) { return a < b ? a : b; }
inline I8 larger(I8 a, I8 b) { return a > b ? a : b; }
#endif

inline void multiply_add(Carried<F8>& to, F8 a, F8 b) {
#if defined(__ARM_NEON)
  to.low += half_of<F4, 0>(a) * half_of<F4, 0>(b);
  to.high += half_of<F4, 1>(a) * half_of<F4, 1>(b);
#else
  to += a * b;
#endif
}

}  // namespace kvant::KVANT_ISA
