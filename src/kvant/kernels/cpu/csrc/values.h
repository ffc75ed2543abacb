// Weighted sums of cached values: codes in pairs or fours of tokens with weights of 7 or 15 bits, or floats.
#pragma once

#include "keys.h"

namespace kvant::KVANT_ISA {

constexpr int kColumns = 4;  // vectors of sums that stay in registers for each head
constexpr int kMixHeads = 3;
#if defined(__AVX512VNNI__)
constexpr int kMixHalves = 2;  // of 32 dims each, whose 4-bit codes are mixed at once
#else
constexpr int kMixHalves = 1;
#endif
constexpr int kTopNarrow = 127, kTopWide = 32767;  // the largest weight
constexpr float kMiddle4 = 7.5f;                   // of codes of 4 bits
constexpr int kNarrowTokens = 32;  // whose codes times narrow weights fit 16 bits: 32 * 15 * 127

inline bool value_is_integer(const Side& side, int dim) {
  if (!is_integer(side.kind) || dim % 32) return false;
  const int size = dim / groups_of(side);
  return !is_4bit(side.kind) || size % 32 == 0 || size == 16;
}

#if defined(__ARM_NEON)
// 32 dims' codes, a byte each.
template <Codes Kind>
inline void codes_in_order(const uint8_t* p, uint8x16_t (&out)[2]) {
  const uint8x16_t x = load<uint8x16_t>(p);
  out[0] = Kind == kCodes4 ? vzip1q_u8(x & 15, x >> 4) : x;
  out[1] = Kind == kCodes4 ? vzip2q_u8(x & 15, x >> 4) : load<uint8x16_t>(p + (Kind == kCodes4 ? 0 : 16));
}

template <Codes Kind>
inline int16x8_t words_of(uint8x16_t x, bool upper) {
  const uint8x8_t bytes = upper ? vget_high_u8(x) : vget_low_u8(x);
  return Kind == kSigned8 ? vmovl_s8(vreinterpret_s8_u8(bytes)) : vreinterpretq_s16_u16(vmovl_u8(bytes));
}
#elif defined(__AVX2__)
template <Codes Kind>
inline __m256i words_of(const uint8_t* p) {
  const __m128i bytes = load<__m128i>(p);
  return Kind == kSigned8 ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
}
#else
template <Codes Kind>
inline int16_t code_of(const uint8_t* p, int i) {
  if (Kind == kCodes4) return p[i / 2] >> i % 2 * 4 & 15;
  return Kind == kSigned8 ? static_cast<int8_t>(p[i]) : p[i];
}
#endif

// Calls use(i, vector) with 32 dims of two tokens as four vectors of 8 dims: the first token's code below the second's.
// Which dims a vector has is the ISA's affair; `unpaired` knows.
template <Codes Kind, class Use>
inline void pair_rows(const uint8_t* a, const uint8_t* b, Use use) {
#if defined(__AVX2__)
  for (int i = 0; i < 4; i += 2) {
    if (Kind == kCodes4 && i) break;
    wait_for(a);
    const __m256i x = words_of<Kind>(a + 8 * i), y = words_of<Kind>(b + 8 * i), mask = _mm256_set1_epi16(15);
    __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
    if constexpr (Kind != kCodes4) {
      use(i, (S16)low);
      use(i + 1, (S16)high);
    } else {
      use(0, (S16)_mm256_and_si256(low, mask));
      use(1, (S16)_mm256_srli_epi16(low, 4));
      wait_for(high);
      use(2, (S16)_mm256_and_si256(high, mask));
      use(3, (S16)_mm256_srli_epi16(high, 4));
    }
  }
#elif defined(__ARM_NEON)
  // Eight dims of one token, then of the other.
  uint8x16_t x[2], y[2];
  codes_in_order<Kind>(a, x);
  codes_in_order<Kind>(b, y);
  for (int v = 0; v < kColumns; ++v)
    use(v, of_halves<S16>(words_of<Kind>(x[v / 2], v % 2), words_of<Kind>(y[v / 2], v % 2)));
#else
  for (int v = 0; v < kColumns; ++v) {
    S16 pair;
    for (int i = 0; i < 16; ++i) pair[i] = code_of<Kind>(i % 2 ? b : a, 8 * v + i / 2);
    use(v, pair);
  }
#endif
}

// Whether a half of vector `vector` has 4-bit codes of the second 16 of 32 dims.
constexpr bool in_second_half([[maybe_unused]] int vector, [[maybe_unused]] int half) {
#if defined(__AVX2__)
  return half;  // each vector has 4 of 8 dims of both
#else
  return vector >= 2;
#endif
}

// Four vectors of sums in the order of their 32 dims.
inline void unpaired([[maybe_unused]] bool four_bits, const float* sums, F8 (&out)[4]) {
  const F8 x[4] = {load<F8>(sums), load<F8>(sums + 8), load<F8>(sums + 16), load<F8>(sums + 24)};
#if defined(__AVX2__)
  for (int i = 0; i < 4; i += 2) {
    F8 &low = out[four_bits ? i / 2 : i], &high = out[four_bits ? i / 2 + 2 : i + 1];
    if (four_bits) {
      low = __builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
      high = __builtin_shufflevector(x[i], x[i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
      low = __builtin_shufflevector(x[i], x[i + 1], 0, 1, 2, 3, 8, 9, 10, 11);
      high = __builtin_shufflevector(x[i], x[i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
#else
  std::memcpy(&out, &x, sizeof x);
#endif
}

inline S16 pair_weights(const int16_t* low, const int16_t* high) {
  const int32_t a = load<int32_t>(low), b = load<int32_t>(high);
  return as<S16>(I8{a, a, a, a, b, b, b, b});
}

// sum + a pair of tokens' codes, as `pair_rows` has them, times their weights, a pair in every half.
inline I8 add_weighted(I8 sum, S16 pair, S16 weights) {
#if defined(__ARM_NEON)
  const int16x8_t x = half_of<int16x8_t, 0>(pair), y = half_of<int16x8_t, 1>(pair);
  const int16x4_t both = vget_low_s16(half_of<int16x8_t, 0>(weights));
  const int32x4_t low = vmlal_lane_s16(half_of<int32x4_t, 0>(sum), vget_low_s16(x), both, 0);
  const int32x4_t high = vmlal_high_lane_s16(half_of<int32x4_t, 1>(sum), x, both, 0);
  return of_halves<I8>(vmlal_lane_s16(low, vget_low_s16(y), both, 1), vmlal_high_lane_s16(high, y, both, 1));
#else
  return add_pairs(sum, pair, weights);
#endif
}

template <class I>
inline void add_scaled(I x, float unit, float* sum) {
  typedef decltype(to_float(x)) F;
  store(sum, load<F>(sum) + to_float(x) * all<F>(unit));
}

using Weights = int16_t[kMaxGroups][kTile];  // narrow ones: two tokens' bytes, twice, or as `store_narrow` says

// Whether a value's codes meet narrow weights.
inline bool has_narrow_weights(const Side& side, int dim) { return is_4bit(side.kind) && dim / groups_of(side) >= 32; }

// What is added to weights before they are rounded to nearest, -1/2 to 1/2: each of 64 slots has its own, in an order
// that spreads any few. So small weights are not all lost beside a large one, but some of them count as 1.
struct Dither {
  alignas(kAlign) float of[kTile + 8];  // the first eight again at the end, for sixteen to be read from any eighth on
  constexpr Dither() : of() {
    for (int t = 0; t < kTile + 8; ++t) {
      int reversed = 0;
      for (int bit = 1, back = kTile / 2; back; bit *= 2, back /= 2) reversed += t & bit ? back : 0;
      of[t] = (static_cast<float>(reversed) + 0.5f) / kTile - 0.5f;
    }
  }
};
constexpr Dither kDither;

// Weights, of at most kTopNarrow once they are divided by their unit, not rounded yet.
template <class F>
inline F dithered(F weights, F inverse, int slot) {
  return weights * inverse + load<F>(kDither.of + slot % kTile);
}

// Stores the same of token `t` and those that follow, rounded: two tokens' bytes, twice, or with AVX-512 a byte each.
// Returns them as integers.
template <class F>
inline auto store_narrow(int16_t* out, int t, F weights, F inverse, int slot) {
  const F steps = dithered(weights, inverse, slot);
  const auto rounded = to_int(steps);
  [[maybe_unused]] int16_t* p = out + t;
#if defined(__AVX512VNNI__)
  int8_t* bytes = reinterpret_cast<int8_t*>(out) + t;
  if constexpr (sizeof(F) == 64) store(bytes, _mm512_cvtepi32_epi8((__m512i)rounded));
  else _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), _mm256_cvtepi32_epi8((__m256i)rounded));
#elif defined(__AVX2__)
  const __m256i places = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 0, 4, 8, 12, 8, 12, 0, 4, 0, 4, 8, 12, 8, 12));
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)rounded, places);  // the lowest of each number
  store(p, _mm_unpacklo_epi64(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#elif defined(__ARM_NEON)
  const int16x8_t bytes = vreinterpretq_s16_s8(bytes_of(rounded, I8{}));
  store(p, vzip1q_s16(bytes, bytes));
#else
  const uint64_t bytes = bytes_of(rounded);
  for (int i = 0; i < 8; ++i) p[i] = static_cast<int16_t>(bytes >> (i / 2 * 16));
#endif
  return rounded;
}

// sums[head] += 32 dims of a run's 8-bit codes times the heads' weights, `pitch` apart, times their units.
template <int Heads, Codes Kind, class Count>
inline void mix_rows(const uint8_t* rows, int dim, Count tokens, const int16_t* weights, int64_t pitch,
                     const float* units, float* sums, Ahead& next) {
  Carried<I8> acc[Heads][kColumns] = {};
  for (int t = 0; t < tokens; t += 2, rows += 2 * dim, weights += 2) {
    if (t % 8 == 0) next.ask();
    pair_rows<Kind>(rows, rows + dim, [&](int i, S16 pair) {
      wait_for(weights);  // broadcast again: there are no registers to keep them in
      for (int h = 0; h < Heads; ++h) acc[h][i] = add_weighted(acc[h][i], pair, broadcast_pair(weights + h * pitch));
    });
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < kColumns; ++i) add_scaled(acc[h][i], units[h], sums + h * kMaxHeadDim + 8 * i);
}

#if defined(__AVX512VNNI__)
// Four rows of 16 bytes a half: the four bytes of a column, one of each row, are a lane. Lanes are in the order that
// `unpaired` expects once the upper halves of even and odd dims' sums lie behind the lower ones.
template <int Halves>
inline void fours_of_rows(const uint8_t* rows, int pitch, __m512i (&out)[Halves]) {
  const __m512i places = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  if constexpr (Halves == 1) {
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    out[0] = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, four_rows(rows, pitch)), places);
  } else {
    const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 2, 10, 18, 26, 1, 9, 17, 25, 3, 11, 19, 27);
    const __m512i x = two_rows(rows, pitch), y = two_rows(rows + 2 * pitch, pitch);
    for (int i = 0; i < 2; ++i) {
      const __m512i lanes = _mm512_add_epi32(first, _mm512_set1_epi32(4 * i));
      out[i] = _mm512_shuffle_epi8(_mm512_permutex2var_epi32(x, lanes, y), places);
    }
  }
}

// What `mix_rows` adds, of 4-bit codes and narrow weights, 32 dims a half: those of the second half meet `others`.
template <int Heads, int Halves, class Count>
inline void mix_narrow(const uint8_t* rows, int bytes, Count tokens, const int16_t* weights, const int16_t* others,
                       int64_t pitch, const float* units, float* sums, Ahead& next) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(-16);
  I16 acc[Heads][Halves][2] = {};
  for (int t = 0; t < tokens; t += 4, rows += 4 * bytes) {
    if (t % 8 == 0) next.ask();
    __m512i codes[Halves];
    fours_of_rows(rows, bytes, codes);
    for (int i = 0; i < Halves; ++i)
      for (int h = 0; h < Heads; ++h) {
        const int8_t* weight = reinterpret_cast<const int8_t*>((i ? others : weights) + h * pitch) + t;
        const __m512i four = _mm512_set1_epi32(load<int32_t>(weight));
        acc[h][i][0] = (I16)_mm512_dpbusd_epi32((__m512i)acc[h][i][0], codes[i] & low, four);
        acc[h][i][1] = (I16)_mm512_dpbusd_epi32((__m512i)acc[h][i][1], codes[i] & high, four);
      }
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Halves; ++i) {
      const F16 even = to_float(acc[h][i][0]) * all<F16>(units[h]);
      const F16 odd = to_float(acc[h][i][1]) * all<F16>(units[h] / 16);  // of high halves, which were not moved
      float* to = sums + h * kMaxHeadDim + 32 * i;
      store(to, load<F16>(to) + of_halves(half_of<0>(even), half_of<0>(odd)));
      store(to + 16, load<F16>(to + 16) + of_halves(half_of<1>(even), half_of<1>(odd)));
    }
}
#else
// sums + the products of unsigned and signed bytes in pairs, of the order of `pair_codes4`, which wrap around.
inline U16 add_byte_pairs(U16 sums, B32 u, B32 s) {
#if defined(__AVX2__)
  const __m256i products = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
  return (U16)_mm256_add_epi16((__m256i)sums, products);
#elif defined(__ARM_NEON)
  const int8x16_t x = half_of<int8x16_t, 0>(u), y = half_of<int8x16_t, 1>(u), both = half_of<int8x16_t, 0>(s);
  const int8x16_t first = vdupq_laneq_s8(both, 0), second = vdupq_laneq_s8(both, 1);
  const int16x8_t low = vmlal_s8(half_of<int16x8_t, 0>(sums), vget_low_s8(x), vget_low_s8(first));
  const int16x8_t high = vmlal_high_s8(half_of<int16x8_t, 1>(sums), x, first);
  return of_halves<U16>(vmlal_s8(low, vget_low_s8(y), vget_low_s8(second)), vmlal_high_s8(high, y, second));
#else
  for (int i = 0; i < 32; ++i) sums[i / 2] += u[i] * static_cast<int8_t>(s[i]);
  return sums;
#endif
}

// 32 dims of two tokens' 4-bit codes: 16 dims a vector, the first token's code below the second's; with NEON all of the
// first token's before the second's.
inline void pair_codes4(const uint8_t* a, const uint8_t* b, B32 (&out)[2]) {
#if defined(__AVX2__)
  const __m128i x = load<__m128i>(a), y = load<__m128i>(b);
  const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y));
  out[0] = (B32)both & 15;
  out[1] = (B32)_mm256_srli_epi16(both, 4) & 15;
#elif defined(__ARM_NEON)
  uint8x16_t x[2], y[2];
  codes_in_order<kCodes4>(a, x);
  codes_in_order<kCodes4>(b, y);
  for (int i = 0; i < 2; ++i) out[i] = of_halves<B32>(x[i], y[i]);
#else
  for (int i = 0; i < 32; ++i) {
    out[i / 16][i % 16 * 2] = a[i / 2] >> i % 2 * 4 & 15;
    out[i / 16][i % 16 * 2 + 1] = b[i / 2] >> i % 2 * 4 & 15;
  }
#endif
}

// Adds the sums of such a vector to floats, in the order that `unpaired` expects.
inline void add_wide(U16 sums, int vector, float unit, float* out) {
#if defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  add_scaled((I8)_mm256_unpacklo_epi16((__m256i)sums, zero), unit, out + 8 * vector);
  add_scaled((I8)_mm256_unpackhi_epi16((__m256i)sums, zero), unit, out + 8 * vector + 16);
#elif defined(__ARM_NEON)
  const uint16x8_t low = half_of<uint16x8_t, 0>(sums), high = half_of<uint16x8_t, 1>(sums);
  add_scaled(of_halves<I8>(vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low)), unit, out + 16 * vector);
  add_scaled(of_halves<I8>(vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)), unit, out + 16 * vector + 8);
#else
  for (int i = 0; i < 16; ++i) out[16 * vector + i] += static_cast<float>(sums[i]) * unit;
#endif
}

// What `mix_rows` adds, of 4-bit codes and narrow weights.
template <int Heads, int Halves, class Count>
inline void mix_narrow(const uint8_t* rows, int bytes, Count tokens, const int16_t* weights, const int16_t*,
                       int64_t pitch, const float* units, float* sums, Ahead& next) {
  for (int first = 0; first < tokens; first += kNarrowTokens) {
    Carried<U16> acc[Heads][2] = {};
    const int stop = std::min<int>(first + kNarrowTokens, tokens);
    for (int t = first; t < stop; t += 2, rows += 2 * bytes, weights += 2) {
      if (t % 8 == 0) next.ask();
      B32 codes[2];
      pair_codes4(rows, rows + bytes, codes);
      for (int h = 0; h < Heads; ++h) {
        const B32 weight = as<B32>(broadcast_pair(weights + h * pitch));
        for (int i = 0; i < 2; ++i) acc[h][i] = add_byte_pairs(acc[h][i], codes[i], weight);
      }
    }
    for (int h = 0; h < Heads; ++h)
      for (int i = 0; i < 2; ++i) add_wide(acc[h][i], i, units[h], sums + h * kMaxHeadDim);
  }
}

#endif
// The same for one head and 4-bit codes in groups of 16 dims.
inline void mix_halves(const uint8_t* rows, int dim, int tokens, const int16_t* first, const int16_t* second,
                       float unit, float* sums, Ahead& next) {
  Carried<I8> acc[kColumns] = {};
  for (int t = 0; t < tokens; t += 2, rows += dim) {
    if (t % 8 == 0) next.ask();
    pair_rows<kCodes4>(rows, rows + dim / 2, [&](int i, S16 pair) {
      const int16_t* low = in_second_half(i, 0) ? second : first;
      const int16_t* high = in_second_half(i, 1) ? second : first;
      acc[i] = add_weighted(acc[i], pair, pair_weights(low + t, high + t));
    });
  }
  for (int i = 0; i < kColumns; ++i) add_scaled(acc[i], unit, sums + 8 * i);
}

// sums[head][0 to Vectors) += values [tokens][dim], of which the columns from `values` on, times weights
// [head][kPitch].
template <int Heads, int Vectors, class Reader>
inline void add_columns(const typename Reader::Type* values, int dim, int tokens, const float* weights, float* sums,
                        Ahead& next) {
  Carried<F8> acc[Heads][Vectors];
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) acc[h][i] = load<F8>(sums + h * kMaxHeadDim + 8 * i);
  for (int t = 0; t < tokens; ++t, values += dim) {
    if (t % 8 == 0) next.ask();
    F8 weight[Heads];
    for (int h = 0; h < Heads; ++h) weight[h] = all(weights[h * kPitch + t]);
    for (int i = 0; i < Vectors; ++i) {
      const F8 value = Reader::read(values + 8 * i);
      for (int h = 0; h < Heads; ++h) multiply_add(acc[h][i], weight[h], value);
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) store<F8>(sums + h * kMaxHeadDim + 8 * i, acc[h][i]);
}

template <int Heads, class Reader>
inline void add_values(const typename Reader::Type* values, int dim, int tokens, const float* weights, float* sums,
                        Ahead& next) {
  int i = 0;
  for (; i + 8 * kColumns <= dim; i += 8 * kColumns)
    add_columns<Heads, kColumns, Reader>(values + i, dim, tokens, weights, sums + i, next);
  for (; i < dim; i += 8) add_columns<Heads, 1, Reader>(values + i, dim, tokens, weights, sums + i, next);
}

}  // namespace kvant::KVANT_ISA
