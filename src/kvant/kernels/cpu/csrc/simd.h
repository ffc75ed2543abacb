// Vectors of eight lanes. The compiler's vector types make them portable; what these cannot say is written per ISA.
#pragma once

#include <cmath>

#include "wide.h"

namespace kvant::KVANT_ISA {

inline F8 within(F8 x, F8 low, F8 high) { return smaller(larger(x, low), high); }
inline I8 magnitude_bits(F8 x) { return as<I8>(x) & all(0x7fffffff); }  // in the order of magnitudes, NaN above all
inline F8 magnitude(F8 x) { return as<F8>(magnitude_bits(x)); }

#if defined(__AVX2__)
inline I8 to_int(F8 x) { return (I8)_mm256_cvtps_epi32((__m256)x); }
#elif defined(__ARM_NEON)
inline I8 to_int(F8 x) {
  return of_halves<I8>(vcvtnq_s32_f32(half_of<float32x4_t, 0>(x)), vcvtnq_s32_f32(half_of<float32x4_t, 1>(x)));
}
#else
inline I8 to_int(F8 x) { return as<I8>(as<U8>(x + all(kWhole)) - 0x4b400000u); }
#endif

inline float sum(F8 x) {
#if defined(__AVX2__)
  __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#elif defined(__ARM_NEON)
  const float32x4_t h = half_of<float32x4_t, 0>(x) + half_of<float32x4_t, 1>(x);
  return vpadds_f32(vget_low_f32(h) + vget_high_f32(h));
#else
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

// The four vectors' sums, in the order given.
inline void sums4(const F8 (&x)[4], float* out) {
#if defined(__AVX2__)
  const __m256 low = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), high = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
  const __m256 both = _mm256_hadd_ps(low, high);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
#elif defined(__ARM_NEON)
  float32x4_t h[4];
  for (int i = 0; i < 4; ++i) h[i] = half_of<float32x4_t, 0>(x[i]) + half_of<float32x4_t, 1>(x[i]);
  store(out, vpaddq_f32(vpaddq_f32(h[0], h[1]), vpaddq_f32(h[2], h[3])));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
#endif
}

// Each lane gets what the lane has whose number differs by `Distance`, 1, 2 or 4.
template <int Distance>
inline F8 swapped(F8 x) {
#if defined(__ARM_NEON)
  const F4 low = half_of<F4, 0>(x), high = half_of<F4, 1>(x);
  if constexpr (Distance == 4) return of_halves<F8>(high, low);
  constexpr int a = Distance, b = 1 ^ Distance, c = 2 ^ Distance, d = 3 ^ Distance;
  return of_halves<F8>(__builtin_shufflevector(low, low, a, b, c, d), __builtin_shufflevector(high, high, a, b, c, d));
#else
  constexpr int d = Distance;
  return __builtin_shufflevector(x, x, d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d);
#endif
}

#if defined(__ARM_NEON)
inline int32_t largest(I8 x) { return vmaxvq_s32(vmaxq_s32(half_of<int32x4_t, 0>(x), half_of<int32x4_t, 1>(x))); }

inline float largest(F8 x) {
  F4 h = larger(half_of<F4, 0>(x), half_of<F4, 1>(x));
  h = larger(h, __builtin_shufflevector(h, h, 2, 3, 0, 1));
  return larger(h, __builtin_shufflevector(h, h, 1, 0, 3, 2))[0];
}
#else
template <class V>
inline auto largest(V x) {
  x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return larger(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6))[0];
}
#endif

#if defined(__ARM_NEON)
inline void transpose4(F4 (&x)[4]) {
  const F4 a = __builtin_shufflevector(x[0], x[1], 0, 4, 2, 6), b = __builtin_shufflevector(x[0], x[1], 1, 5, 3, 7);
  const F4 c = __builtin_shufflevector(x[2], x[3], 0, 4, 2, 6), d = __builtin_shufflevector(x[2], x[3], 1, 5, 3, 7);
  x[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), x[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  x[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7), x[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}
#endif

// Rows to columns.
inline void transpose8(F8 (&x)[8]) {
#if defined(__ARM_NEON)
  F4 low[2][4], high[2][4];  // of the rows: 0-3, 4-7
  for (int i = 0; i < 8; ++i) low[i / 4][i % 4] = half_of<F4, 0>(x[i]), high[i / 4][i % 4] = half_of<F4, 1>(x[i]);
  for (int i = 0; i < 2; ++i) transpose4(low[i]), transpose4(high[i]);
  for (int i = 0; i < 4; ++i) {
    x[i] = of_halves<F8>(low[0][i], low[1][i]);
    x[i + 4] = of_halves<F8>(high[0][i], high[1][i]);
  }
#else
  F8 two[8], four[8];
  KVANT_UNROLL
  for (int i = 0; i < 8; i += 2) {
    two[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    two[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  KVANT_UNROLL
  for (int i = 0; i < 8; ++i) {
    const F8 a = two[i / 4 * 4 + i % 4 / 2], b = two[i / 4 * 4 + i % 4 / 2 + 2];
    four[i] = i % 2 ? __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
                    : __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
  }
  KVANT_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = __builtin_shufflevector(four[i], four[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(four[i], four[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#endif
}

inline F8 load_half(const uint16_t* p) {
#if defined(__AVX2__)
  return (F8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__ARM_NEON)
  const float16x8_t x = load<float16x8_t>(p);
  return of_halves<F8>(vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x));
#else
  typedef _Float16 Half8 __attribute__((vector_size(16)));
  return __builtin_convertvector(load<Half8>(p), F8);
#endif
}

inline void store_half(uint16_t* p, F8 x) {
#if defined(__AVX2__)
  store(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  store(p, vcvt_high_f16_f32(vcvt_f16_f32(half_of<float32x4_t, 0>(x)), half_of<float32x4_t, 1>(x)));
#else
  typedef _Float16 Half8 __attribute__((vector_size(16)));
  store(p, __builtin_convertvector(x, Half8));
#endif
}

// Finite halves that lie in the low 16 bits of each lane.
inline F8 widen_halves(U8 bits) {
  const F8 size = as<F8>((bits & 0x7fff) << 13) * all(0x1p112f);
  return as<F8>(as<U8>(size) | (bits & 0x8000) << 16);
}

inline F8 load_bfloat(const uint16_t* p) { return as<F8>(__builtin_convertvector(load<H8>(p), U8) << 16); }

inline void store_bfloat(uint16_t* p, F8 x) {
  const U8 bits = as<U8>(x);
  store(p, __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, H8));
}

#if defined(__ARM_NEON)
typedef __fp16 Half;  // gcc 12 has no other name for it here
#elif !defined(__AVX2__)
typedef _Float16 Half;
#endif

inline float from_half(uint16_t bits) {
#if defined(__AVX2__)
  return _cvtsh_ss(bits);
#else
  Half half;
  std::memcpy(&half, &bits, sizeof half);
  return half;
#endif
}

inline uint16_t to_half(float x) {
#if defined(__AVX2__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  Half half = static_cast<Half>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
#endif
}

inline float from_bfloat(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  return load<float>(&wide);
}

// exp(x) to 2 units in the last place; 0 below -86, and no more than exp(88). No step of it is subnormal: that is slow.
inline F8 exponential(F8 x) {
  F8 held = smaller(larger(x, all(-86.0f)), all(88.0f));
  F8 n = nearest(held * all(1.44269504f));
  F8 r = held - n * all(0.693359375f) - n * all(-2.12194440e-4f);
  F8 p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
  F8 power = as<F8>((to_int(n) + all(127)) << 23);
  return by_registers([](auto x, auto y, auto zero) { return x < -86.0f ? zero : y; }, x, p * power, all(0.0f));
}

// 2^x to 2 units in the last place, for x of at most 126; below -125 it stays at 2^-125, since subnormal steps are
// slow.
template <class F>
inline F power_of_two(F x) {
  typedef decltype(x < x) I;
  const F held = larger(x, all<F>(-125.0f)), shifted = held + all<F>(kWhole);
  const F r = held - (shifted - all<F>(kWhole));
  F p = all<F>(1.3276472e-3f);
  p = p * r + all<F>(9.6755410e-3f);
  p = p * r + all<F>(5.5507131e-2f);
  p = p * r + all<F>(2.4022120e-1f);
  p = p * r + all<F>(6.9314694e-1f);
  p = p * r + all<F>(1.0000001f);
  return as<F>(as<I>(p) + (as<I>(shifted) << 23));
}

inline float power_of_two(float x) { return power_of_two(all(x))[0]; }

inline F8 hyperbolic_tangent(F8 x) {
  F8 e = exponential(smaller(magnitude(x), all(20.0f)) * all(-2.0f));
  F8 t = (all(1.0f) - e) / (all(1.0f) + e);
  return by_registers([](auto x, auto y) { return x != x ? x : x < 0.0f ? -y : y; }, x, t);
}

// Eight codes of 8 bits.
inline I8 wide_bytes(const uint8_t* p) {
#if defined(__ARM_NEON)
  const uint16x8_t words = vmovl_u8(load<uint8x8_t>(p));
  return of_halves<I8>(vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words));
#else
  return __builtin_convertvector(load<B8>(p), I8);
#endif
}

inline I8 wide_bytes(const int8_t* p) {
#if defined(__ARM_NEON)
  const int16x8_t words = vmovl_s8(load<int8x8_t>(p));
  return of_halves<I8>(vmovl_s16(vget_low_s16(words)), vmovl_high_s16(words));
#else
  typedef int8_t Signs __attribute__((vector_size(8)));
  return __builtin_convertvector(load<Signs>(p), I8);
#endif
}

// Eight 4-bit codes from the low halves of four bytes and their high halves, in the order of `_paired`: element 2i in
// the low nibble of byte i.
inline I8 nibbles(const uint8_t* p) {
  const I8 bytes = all(load<int32_t>(p));
  return as<I8>(as<U8>(bytes) >> U8{0, 4, 8, 12, 16, 20, 24, 28}) & all(15);
}

#if defined(__ARM_NEON)
// The lower halves of eight lanes.
inline int16x8_t words_of(I8 x) {
  return vuzp1q_s16(vreinterpretq_s16_s32(half_of<int32x4_t, 0>(x)), vreinterpretq_s16_s32(half_of<int32x4_t, 1>(x)));
}

// The lowest bytes of 16 lanes.
inline int8x16_t bytes_of(I8 x, I8 y) {
  return vuzp1q_s8(vreinterpretq_s8_s16(words_of(x)), vreinterpretq_s8_s16(words_of(y)));
}
#endif

// Rounded values, each within int8, as eight bytes.
inline void store_bytes(int8_t* p, I8 x) {
#if defined(__AVX2__)
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#elif defined(__ARM_NEON)
  store(p, vmovn_s16(words_of(x)));
#else
  typedef int8_t Narrow __attribute__((vector_size(8)));
  store(p, __builtin_convertvector(x, Narrow));
#endif
}

// 32 rounded values, each within int8.
inline B32 signed_bytes_of(const I8 (&x)[4]) {
#if defined(__AVX2__)
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
  const __m256i places = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return (B32)_mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), places);
#elif defined(__ARM_NEON)
  return of_halves<B32>(bytes_of(x[0], x[1]), bytes_of(x[2], x[3]));
#else
  B32 out;
  for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>(x[i / 8][i % 8]);
  return out;
#endif
}

// The sums of the first and the last 16 of 32 signed bytes.
inline void half_sums(B32 x, int32_t (&out)[2]) {
#if defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), (__m256i)x);
  __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4e));
  fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xb1));
  out[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(fours));
  out[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(fours, 1));
#elif defined(__ARM_NEON)
  out[0] = vaddlvq_s8(half_of<int8x16_t, 0>(x));
  out[1] = vaddlvq_s8(half_of<int8x16_t, 1>(x));
#else
  out[0] = out[1] = 0;
  for (int i = 0; i < 32; ++i) out[i / 16] += static_cast<int8_t>(x[i]);
#endif
}

// Rounded values, each within uint8, as eight bytes, the first one lowest.
inline uint64_t bytes_of(I8 x) {
#if defined(__AVX2__)
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#elif defined(__ARM_NEON)
  return vget_lane_u64(vreinterpret_u64_s8(vmovn_s16(words_of(x))), 0);
#else
  const B8 bytes = __builtin_convertvector(x, B8);
  return load<uint64_t>(&bytes);
#endif
}

// Rounded values, each within int16, as eight words.
inline void store_words(int16_t* p, I8 x) {
#if defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  store(p, _mm_packs_epi32(low, high));
#else
  typedef int16_t Narrow __attribute__((vector_size(16)));
  store(p, __builtin_convertvector(x, Narrow));
#endif
}

inline int32_t sum(I8 x) {
#if defined(__AVX2__)
  __m128i h = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
#elif defined(__ARM_NEON)
  return vaddvq_s32(half_of<int32x4_t, 0>(x) + half_of<int32x4_t, 1>(x));
#else
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

// Four bytes of `p` in each of the eight lanes.
inline B32 broadcast4(const int8_t* p) {
#if defined(__AVX2__)
  return (B32)_mm256_set1_epi32(load<int32_t>(p));
#else
  return as<B32>(all(load<int32_t>(p)));
#endif
}

#if defined(__ARM_NEON)
// sum + the products of four signed bytes a lane.
inline int32x4_t dot4(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
  asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));  // gcc alone loads ahead, and spills
  return sum;
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return sum + vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}
#endif

// Sums over each lane's four bytes of u * s, u unsigned and at most 127, s signed: `add`s, then `total`. The sums over
// two bytes are to fit 16 bits: those of 8 `add`s do where u is at most 15, of 16 where s is -8 to 7. `start`
// makes all lanes' sums begin elsewhere, at what `start_of` made of a number: minus 8 times the sum of all s to come.
//
// Or, where panels (panels.h) have no loop of their own, `add_scaled` adds the products of sums that fit 16 bits with
// scale * other / 2^15, rounded, and a lane holds kUnits sums apart: with two, bytes 0 and 1 of a lane, scales and
// starts are in the lower 16 bits of one number, bytes 2 and 3 in the upper. What does not fit wraps around. `other` is
// what `scale_of` made of a number of at least 0.
struct Dot {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  __m256i sum = _mm256_setzero_si256();
  static int32_t start_of(int32_t x) { return x; }
  inline void start(int32_t x) { sum = _mm256_set1_epi32(x); }
  inline void add(B32 u, B32 s) { sum = _mm256_dpbusd_epi32(sum, (__m256i)u, (__m256i)s); }
  inline I8 total() const { return (I8)sum; }
  static I8 scale_of(I8 x) { return x; }
#elif defined(__AVX2__)
  static constexpr int kUnits = 2;
  // int16, two a lane: 8 * 2 * 15 * 127 fits, and so does what starts in the lower one with its half of the products.
  __m256i sum = _mm256_setzero_si256();
  static int32_t start_of(int32_t x) { return x & 0xffff; }
  inline void start(int32_t x) { sum = _mm256_set1_epi32(x); }
  inline void add(B32 u, B32 s) {
    const __m256i product = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
    asm volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(product));  // gcc alone collects products first, and spills
  }
  inline I8 total() const { return (I8)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  static I8 scale_of(I8 x) { return x; }
  inline void add_scaled(I8& to, I8 scale, I8 other) const {
    const __m256i product = _mm256_madd_epi16(sum, _mm256_mulhrs_epi16((__m256i)scale, (__m256i)other));
    to = (I8)_mm256_add_epi32((__m256i)to, product);
  }
#elif defined(__ARM_NEON)
  static constexpr int kUnits = 1;
  int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
  static int32_t start_of(int32_t x) { return x; }
  inline void start(int32_t x) { low = high = vdupq_n_s32(x); }
  inline void add(B32 u, B32 s) {
    low = dot4(low, half_of<int8x16_t, 0>(u), half_of<int8x16_t, 0>(s));
    high = dot4(high, half_of<int8x16_t, 1>(u), half_of<int8x16_t, 1>(s));
  }
  inline I8 total() const { return of_halves<I8>(low, high); }
  static I8 scale_of(I8 x) { return x << 16; }
  inline void add_scaled(I8& to, I8 scale, I8 other) const {
    const int32x4_t first = vqrdmulhq_s32(half_of<int32x4_t, 0>(scale), half_of<int32x4_t, 0>(other));
    const int32x4_t second = vqrdmulhq_s32(half_of<int32x4_t, 1>(scale), half_of<int32x4_t, 1>(other));
    to = of_halves<I8>(vmlaq_s32(half_of<int32x4_t, 0>(to), low, first),
                       vmlaq_s32(half_of<int32x4_t, 1>(to), high, second));
  }
#else
  static constexpr int kUnits = 1;
  U8 sum = as<U8>(all(0));  // it may start at anything
  static int32_t start_of(int32_t x) { return x; }
  inline void start(int32_t x) { sum = as<U8>(all(x)); }
  inline void add(B32 u, B32 s) {
    I8 first = as<I8>(u), second = as<I8>(s);
    for (int shift = 24; shift >= 0; shift -= 8) sum += as<U8>(((first << shift) >> 24) * ((second << shift) >> 24));
  }
  inline I8 total() const { return as<I8>(sum); }
  static I8 scale_of(I8 x) { return x; }
  inline void add_scaled(I8& to, I8 scale, I8 other) const {
    const I8 product = as<I8>(as<U8>(scale) * as<U8>(other) + (1 << 14)) >> 15;
    to = as<I8>(as<U8>(to) + sum * as<U8>(product));
  }
#endif
};

}  // namespace kvant::KVANT_ISA
