// Integer products of queries and softmax weights with the cache's codes: the inner loops of decode attention.
//
// A tile is kCentreTile tokens of one KV head. Keys: 4 tokens at a time, the query in 8 bits against 4-bit codes, in 16
// bits against 8-bit codes. Values: tokens in pairs, the weights in 16 bits. All sums are exact in 32 bits.
#pragma once

#include "codecs.h"

namespace kvant::KVANT_ISA {

constexpr int kTile = kCentreTile;
constexpr int kMaxGroups = 4;
constexpr int kChunk = 8;  // vectors of value sums that stay in registers

// A query for integer dots, in the parts that one group of the codes meets.
struct IntegerQuery {
  alignas(32) int8_t even[kMaxHeadDim / 2], odd[kMaxHeadDim / 2];
  alignas(32) int16_t wide[kMaxHeadDim];
  float step[kMaxGroups], sum[kMaxGroups];
};

inline bool is_4bit(int32_t kind) { return kind == kVectorGrouped4 || kind == kVectorAffine4; }
inline bool is_integer(int32_t kind) { return kind >= kVectorAffine8; }
inline bool is_signed(int32_t kind) { return kind == kVectorSymmetric8 || kind == kVectorStatic8; }
inline int groups_of(const Side& side) { return side.kind == kVectorGrouped4 ? side.groups : 1; }

// Whether the loops below take this side's codes; others are decoded to floats first.
inline bool key_is_integer(const Side& side, int dim) {
  if (!is_integer(side.kind) || dim % 64) return false;
  return !is_4bit(side.kind) || dim / groups_of(side) % 32 == 0;
}

inline bool value_is_integer(const Side& side, int dim) {
  if (!is_integer(side.kind) || dim % 64) return false;
  const int size = dim / groups_of(side);
  return !is_4bit(side.kind) || size % 32 == 0 || size == 16;
}

inline void quantize_query(const Side& side, const float* q, int dim, IntegerQuery* out) {
  const int groups = groups_of(side), size = dim / groups;
  const float largest_code = is_4bit(side.kind) ? 127.0f : 16383.0f;
  for (int g = 0; g < groups; ++g) {
    F8 top = all(0.0f);
    for (int i = g * size; i < (g + 1) * size; i += 8) top = larger(top, magnitude(load<F8>(q + i)));
    const float step = largest(top) / largest_code;
    const F8 inverse = all(step > 0 ? 1.0f / step : 0.0f);
    I8 added = all(0);
    for (int i = g * size; i < (g + 1) * size; i += 8) {
      const I8 codes = to_int(load<F8>(q + i) * inverse);
      added += codes;
      if (is_4bit(side.kind))
        for (int j = 0; j < 8; j += 2) {
          out->even[(i + j) / 2] = static_cast<int8_t>(codes[j]);
          out->odd[(i + j) / 2] = static_cast<int8_t>(codes[j + 1]);
        }
      else
        for (int j = 0; j < 8; ++j) out->wide[i + j] = static_cast<int16_t>(codes[j]);
    }
    out->step[g] = step;
    out->sum[g] = step * sum(to_float(added));
  }
}

#if defined(__AVX2__)
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpwssd_epi32(sum, a, b);
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
}

// The sums of four vectors' lower halves, then those of their upper halves.
inline __m256i half_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
}

inline __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
#endif

// dots[head][group][token] of 4-bit keys for a tile's tokens [begin, end), multiples of 4, whose code rows are given.
inline void key_dots4(const uint8_t* const* rows, int begin, int end, const IntegerQuery* queries, int heads, int dim,
                      int groups, int32_t (*dots)[kMaxGroups][kTile]) {
#if defined(__AVX2__)
  int group_of[kMaxHeadDim / 32];  // of each 16-byte lane
  for (int lane = 0; lane < dim / 32; ++lane) group_of[lane] = 32 * lane / (dim / groups);
  [[maybe_unused]] const __m256i ones = _mm256_set1_epi16(1);
  for (int t = begin; t < end; t += 4)
    for (int chunk = 0; chunk < dim / 64; ++chunk) {
      __m256i low[4], high[4];
      for (int i = 0; i < 4; ++i) {
        const __m256i codes = (__m256i)load<B32>(rows[t + i] + 32 * chunk);
        low[i] = low_nibbles(codes);
        high[i] = low_nibbles(_mm256_srli_epi16(codes, 4));
      }
      const int first = group_of[2 * chunk], second = group_of[2 * chunk + 1];
      const bool fresh = chunk == 0 || group_of[2 * chunk - 1] != first;
      for (int h = 0; h < heads; ++h) {
        const __m256i even = (__m256i)load<B32>(queries[h].even + 32 * chunk);
        const __m256i odd = (__m256i)load<B32>(queries[h].odd + 32 * chunk);
        __m256i s[4];
        for (int i = 0; i < 4; ++i) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
          s[i] = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), low[i], even), high[i], odd);
#else
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low[i], even), _mm256_maddubs_epi16(high[i], odd));
          s[i] = _mm256_madd_epi16(pairs, ones);
#endif
        }
        const __m256i both = half_sums(s[0], s[1], s[2], s[3]);
        __m128i lower = _mm256_castsi256_si128(both), upper = _mm256_extracti128_si256(both, 1);
        __m128i* into = reinterpret_cast<__m128i*>(dots[h][first] + t);
        if (first != second) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(dots[h][second] + t), upper);
        } else {
          lower = _mm_add_epi32(lower, upper);
        }
        _mm_storeu_si128(into, fresh ? lower : _mm_add_epi32(lower, _mm_loadu_si128(into)));
      }
    }
#else
  const int bytes = dim / groups / 2;
  for (int t = begin; t < end; ++t)
    for (int h = 0; h < heads; ++h)
      for (int g = 0; g < groups; ++g) {
        int32_t total = 0;
        for (int i = g * bytes; i < (g + 1) * bytes; ++i)
          total += (rows[t][i] & 15) * queries[h].even[i] + (rows[t][i] >> 4) * queries[h].odd[i];
        dots[h][g][t] = total;
      }
#endif
}

// The same for 8-bit keys, whose codes are one group.
template <bool Signed>
inline void key_dots8(const uint8_t* const* rows, int begin, int end, const IntegerQuery* queries, int heads, int dim,
                      int32_t (*dots)[kMaxGroups][kTile]) {
#if defined(__AVX2__)
  for (int t = begin; t < end; t += 4) {
    alignas(32) int16_t wide[4][kMaxHeadDim];
    for (int i = 0; i < 4; ++i)
      for (int d = 0; d < dim; d += 16) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[t + i] + d));
        store(wide[i] + d, Signed ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes));
      }
    for (int h = 0; h < heads; ++h) {
      __m256i s[4] = {};
      for (int d = 0; d < dim; d += 16) {
        const __m256i q = load<__m256i>(queries[h].wide + d);
        for (int i = 0; i < 4; ++i) s[i] = add_products(s[i], q, load<__m256i>(wide[i] + d));
      }
      const __m256i both = half_sums(s[0], s[1], s[2], s[3]);
      const __m128i added = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dots[h][0] + t), added);
    }
  }
#else
  for (int t = begin; t < end; ++t)
    for (int h = 0; h < heads; ++h) {
      int32_t total = 0;
      for (int d = 0; d < dim; ++d) {
        const int code = Signed ? static_cast<int8_t>(rows[t][d]) : rows[t][d];
        total += code * queries[h].wide[d];
      }
      dots[h][0][t] = total;
    }
#endif
}

// Values' codes of a tile as pairs of tokens: pairs[pair * vectors + vector] has 8 dims, the even token's code below the odd one's.
// Which dims a vector has is the ISA's affair; `paired_dim` knows.
using Pairs = S16[kTile / 2 * kMaxHeadDim / 8];

inline void pair_values4(const uint8_t* const* rows, int tokens, int dim, Pairs& all_pairs) {
  for (int p = 0; p < tokens / 2; ++p) {
    S16* pairs = all_pairs + p * dim / 8;
    const uint8_t *a = rows[2 * p], *b = rows[2 * p + 1];
    for (int c = 0; c < dim / 32; ++c) {
#if defined(__AVX2__)
      const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 16 * c)));
      const __m256i y = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 16 * c)));
      const __m256i mask = _mm256_set1_epi16(15);
      const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
      pairs[4 * c] = (S16)_mm256_and_si256(low, mask);
      pairs[4 * c + 1] = (S16)_mm256_srli_epi16(low, 4);
      pairs[4 * c + 2] = (S16)_mm256_and_si256(high, mask);
      pairs[4 * c + 3] = (S16)_mm256_srli_epi16(high, 4);
#else
      for (int i = 0; i < 32; ++i) {
        const int byte = 16 * c + i / 2, shift = i % 2 * 4;
        pairs[4 * c + i / 8][2 * (i % 8)] = a[byte] >> shift & 15;
        pairs[4 * c + i / 8][2 * (i % 8) + 1] = b[byte] >> shift & 15;
      }
#endif
    }
  }
}

template <bool Signed>
inline void pair_values8(const uint8_t* const* rows, int tokens, int dim, Pairs& all_pairs) {
  for (int p = 0; p < tokens / 2; ++p) {
    S16* pairs = all_pairs + p * dim / 8;
    const uint8_t *a = rows[2 * p], *b = rows[2 * p + 1];
    for (int c = 0; c < dim / 16; ++c) {
#if defined(__AVX2__)
      const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 16 * c));
      const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 16 * c));
      const __m256i x = Signed ? _mm256_cvtepi8_epi16(first) : _mm256_cvtepu8_epi16(first);
      const __m256i y = Signed ? _mm256_cvtepi8_epi16(second) : _mm256_cvtepu8_epi16(second);
      pairs[2 * c] = (S16)_mm256_unpacklo_epi16(x, y);
      pairs[2 * c + 1] = (S16)_mm256_unpackhi_epi16(x, y);
#else
      for (int i = 0; i < 16; ++i) {
        const int d = 16 * c + i;
        pairs[2 * c + i / 8][2 * (i % 8)] = Signed ? static_cast<int8_t>(a[d]) : a[d];
        pairs[2 * c + i / 8][2 * (i % 8) + 1] = Signed ? static_cast<int8_t>(b[d]) : b[d];
      }
#endif
    }
  }
}

// The first dim of lane `lane` in vector `vector` of `Pairs`.
inline int paired_dim(bool four_bits, int vector, int lane) {
#if defined(__AVX2__)
  const int byte = 4 * (four_bits ? vector / 2 % 2 : vector % 2) + lane % 4 + lane / 4 * 8;
  return four_bits ? vector / 4 * 32 + 2 * byte + vector % 2 : vector / 2 * 16 + byte;
#else
  (void)four_bits;
  return 8 * vector + lane;
#endif
}

inline I8 add_pairs(I8 sum, S16 codes, S16 weights) {
#if defined(__AVX2__)
  return (I8)add_products((__m256i)sum, (__m256i)codes, (__m256i)weights);
#else
  for (int i = 0; i < 8; ++i) sum[i] += codes[2 * i] * weights[2 * i] + codes[2 * i + 1] * weights[2 * i + 1];
  return sum;
#endif
}

// sums[vector] = the pairs' codes times their weights [group][token], for one head. group_of[half of a vector].
inline void mix_pairs(const Pairs& pairs, int tokens, int vectors, const int16_t (*weights)[kTile],
                      const int8_t (*group_of)[2], I8* sums) {
  for (int v = 0; v < vectors; v += kChunk) {
    I8 acc[kChunk] = {};
    bool halved = true;  // one group for the first four vectors, one for the others
    for (int i = 0; i < kChunk; ++i)
      for (int side = 0; side < 2; ++side) halved &= group_of[v + i][side] == group_of[v + i / 4 * 4][0];
    const S16* codes = pairs + v;
    if (halved) {
      const int16_t *first = weights[group_of[v][0]], *second = weights[group_of[v + 4][0]];
      for (int p = 0; p < tokens / 2; ++p, codes += vectors) {
        const S16 w = as<S16>(all(load<int32_t>(first + 2 * p))), x = as<S16>(all(load<int32_t>(second + 2 * p)));
        for (int i = 0; i < kChunk; ++i) acc[i] = add_pairs(acc[i], codes[i], i < 4 ? w : x);
      }
    } else {
      for (int p = 0; p < tokens / 2; ++p, codes += vectors)
        for (int i = 0; i < kChunk; ++i) {
          const int32_t a = load<int32_t>(weights[group_of[v + i][0]] + 2 * p);
          const int32_t b = load<int32_t>(weights[group_of[v + i][1]] + 2 * p);
          acc[i] = add_pairs(acc[i], codes[i], as<S16>(I8{a, a, a, a, b, b, b, b}));
        }
    }
    for (int i = 0; i < kChunk; ++i) sums[v + i] = acc[i];
  }
}

}  // namespace kvant::KVANT_ISA
