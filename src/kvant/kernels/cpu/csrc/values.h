// Weighted sums of cached values: codes in pairs of tokens with weights of 15 bits, or floats.
#pragma once

#include "keys.h"

namespace kvant::KVANT_ISA {

constexpr int kColumns = 4;  // vectors of sums that stay in registers for each head
constexpr int kMixHeads = 3;
constexpr int kTopWeight = 32767;

inline bool value_is_integer(const Side& side, int dim) {
  if (!is_integer(side.kind) || dim % 32) return false;
  const int size = dim / groups_of(side);
  return !is_4bit(side.kind) || size % 32 == 0 || size == 16;
}

// Calls use(i, vector) with 32 dims of two tokens as four vectors of 8 dims: the first token's code below the second's.
// Which dims a vector has is the ISA's affair; `paired_dim` knows.
template <Codes Kind, class Use>
inline void pair_rows(const uint8_t* a, const uint8_t* b, Use use) {
#if defined(__AVX2__)
  const auto words = [](const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Kind == kSigned8 ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
  };
  for (int i = 0; i < 4; i += 2) {
    if (Kind == kCodes4 && i) break;
    wait_for(a);
    const __m256i x = words(a + 8 * i), y = words(b + 8 * i), mask = _mm256_set1_epi16(15);
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
#else
  const auto code = [](const uint8_t* p, int i) -> int16_t {
    if (Kind == kCodes4) return p[i / 2] >> i % 2 * 4 & 15;
    return Kind == kSigned8 ? static_cast<int8_t>(p[i]) : p[i];
  };
  for (int v = 0; v < kColumns; ++v) {
    S16 pair;
    for (int i = 0; i < 8; ++i) pair[2 * i] = code(a, 8 * v + i), pair[2 * i + 1] = code(b, 8 * v + i);
    use(v, pair);
  }
#endif
}

// The dim of lane `lane` in vector `vector` of `Pairs`.
inline int paired_dim(bool four_bits, int vector, int lane) {
#if defined(__AVX2__)
  const int byte = 4 * (four_bits ? vector / 2 % 2 : vector % 2) + lane % 4 + lane / 4 * 8;
  return four_bits ? vector / 4 * 32 + 2 * byte + vector % 2 : vector / 2 * 16 + byte;
#else
  (void)four_bits;
  return 8 * vector + lane;
#endif
}

inline S16 pair_weights(const int16_t* low, const int16_t* high) {
  const int32_t a = load<int32_t>(low), b = load<int32_t>(high);
  return as<S16>(I8{a, a, a, a, b, b, b, b});
}

using Weights = int16_t[kMaxGroups][kTile];

inline void add_scaled(I8 x, float unit, float* sum) { store(sum, load<F8>(sum) + to_float(x) * all(unit)); }

template <Codes Kind>
constexpr int row_bytes(int dim) {
  return Kind == kCodes4 ? dim / 2 : dim;
}

// sums[head] += 32 dims of a run's codes times the heads' weights, `pitch` apart, times their units.
template <int Heads, Codes Kind, class Count>
inline void mix_rows(const uint8_t* rows, int dim, Count tokens, const int16_t* weights, int64_t pitch,
                     const float* units, float* sums, Ahead& next) {
  const int bytes = row_bytes<Kind>(dim);
  I8 acc[Heads][kColumns] = {};
  for (int t = 0; t < tokens; t += 2, rows += 2 * bytes, weights += 2) {
    if (t % 8 == 0) next.ask();
    pair_rows<Kind>(rows, rows + bytes, [&](int i, S16 pair) {
      wait_for(weights);  // broadcast again: there are no registers to keep them in
      for (int h = 0; h < Heads; ++h) acc[h][i] = add_pairs(acc[h][i], pair, broadcast_pair(weights + h * pitch));
    });
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < kColumns; ++i) add_scaled(acc[h][i], units[h], sums + h * kMaxHeadDim + 8 * i);
}

// The same for one head and 4-bit codes in groups of 16 dims.
inline void mix_halves(const uint8_t* rows, int dim, int tokens, const int16_t* first, const int16_t* second,
                       float unit, float* sums, Ahead& next) {
  I8 acc[kColumns] = {};
  for (int t = 0; t < tokens; t += 2, rows += dim) {
    if (t % 8 == 0) next.ask();
    pair_rows<kCodes4>(rows, rows + dim / 2, [&](int i, S16 pair) {
      const int16_t* low = paired_dim(true, i, 0) >= 16 ? second : first;
      const int16_t* high = paired_dim(true, i, 4) >= 16 ? second : first;
      acc[i] = add_pairs(acc[i], pair, pair_weights(low + t, high + t));
    });
  }
  for (int i = 0; i < kColumns; ++i) add_scaled(acc[i], unit, sums + 8 * i);
}

// sums[head][0 to Vectors) += values [tokens][dim], of which the columns from `values` on, times weights
// [head][kPitch].
template <int Heads, int Vectors, class Reader>
inline void add_columns(const typename Reader::Type* values, int dim, int tokens, const float* weights, float* sums,
                        Ahead& next) {
  F8 acc[Heads][Vectors];
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) acc[h][i] = load<F8>(sums + h * kMaxHeadDim + 8 * i);
  for (int t = 0; t < tokens; ++t, values += dim) {
    if (t % 8 == 0) next.ask();
    F8 weight[Heads];
    for (int h = 0; h < Heads; ++h) weight[h] = all(weights[h * kPitch + t]);
    for (int i = 0; i < Vectors; ++i) {
      const F8 value = Reader::read(values + 8 * i);
      for (int h = 0; h < Heads; ++h) acc[h][i] += weight[h] * value;
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (int i = 0; i < Vectors; ++i) store(sums + h * kMaxHeadDim + 8 * i, acc[h][i]);
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
