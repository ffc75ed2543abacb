// What products by panels (panels.h) take of the tokens: tiles of them, quantized, in the order of their use.
//
// A round of columns is kUnits units: two where a lane holds two sums apart (AVX2), or where the units have lanes in
// turn (AVX-512). Of a round, a tile has for each token where its sums start, codes of four columns a step, and scales.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace kvant::KVANT_ISA {

constexpr int kTileTokens = 6;
constexpr int kPanelTokens = 2 * kTileTokens + 1;  // up to two tiles of tokens, a tile unpacks for itself
#if defined(__AVX512VNNI__)
constexpr int kPanelHeight = 8, kPanelBlocks = 4;  // in two passes, of 16 registers of dots and 8 of sums
constexpr bool kPaired = true;                     // each of two units has every other lane of 4 bytes
constexpr int kUnits = 2, kStarts = 2;
#else
constexpr int kPanelHeight = 6, kPanelBlocks = 2;  // whose sums and dots stay in registers
constexpr bool kPaired = false;
constexpr int kUnits = Dot::kUnits, kStarts = 1;
#endif
static_assert(kPanelHeight <= 8, "tokens are lanes");
constexpr int kPanelColumns = 1024;  // of 4 bits, so that a panel stays in a near cache; half of 8
constexpr float kScaleTop = 32767, kScaleUnit = 32768;
constexpr float kScaleSum = 65000;  // of a token's scales: times 32 * 8 * 127 it stays below 2^31, rounding included

// How columns are cut: a unit has one scale of the weight and one of the tokens, 16 or 32 columns; a round is kUnits
// units; a part is the rounds of one panel.
struct Cut {
  int unit, rounds, part, planes;
  Cut(const Weight& w, int columns) : unit(std::min(w.group, kGroup)), planes(w.kind == kWeightU4 ? 1 : 2) {
    rounds = (columns + kUnits * unit - 1) / (kUnits * unit);
    part = kPanelColumns / planes / (kUnits * unit);
  }
  int steps() const { return kUnits * unit / 4; }
  int parts() const { return (rounds + part - 1) / part; }
  // Numbers of a round for each token: where its sums start, codes, scales.
  int numbers() const { return kStarts + steps() + 1; }
};

// Tiles of about equal heights, kPanelHeight or one less: of at most 6, 13 tokens are 5 + 5 + 3, not 6 + 6 + 1.
int panel_height(int64_t tokens) {
  if (tokens < kPanelTokens) return 0;
  const int64_t tiles = (tokens + kPanelHeight - 1) / kPanelHeight;
  return std::max(kPanelHeight - 1, static_cast<int>((tokens + tiles - 1) / tiles));
}

// Of up to eight tokens from the row's on, which are lanes: a unit's scales, and the sums of its codes. Lanes behind a
// tile's tokens hold anything, or what another thread is writing, and nobody uses what becomes of them; integers are
// unsigned where they could overflow.
inline F8 unit_scales(const QuantizedRow& row, const Cut& cut, int u) {
  return load<F8>(row.scales + u * cut.unit / kGroup * row.stride);
}

inline U8 unit_sums(const QuantizedRow& row, const Cut& cut, int u) {
  if (cut.unit < kGroup) return load<U8>(row.half_sums + u * row.stride);
  return load<U8>(row.half_sums + 2 * u * row.stride) + load<U8>(row.half_sums + (2 * u + 1) * row.stride);
}

// The units of a round in one number a token, as a lane of `Dot` has them.
inline I8 lanes_of(const U8 (&x)[2]) { return as<I8>(kUnits == 1 ? x[0] : (x[0] & 0xffff) | x[1] << 16); }

// The lanes from `First` to `First` + 3 of two vectors in turn.
template <int First>
inline U8 in_turn(const U8 (&x)[2]) {
  constexpr int f = First, s = First + 8;
  return __builtin_shufflevector(x[0], x[1], f, s, f + 1, s + 1, f + 2, s + 2, f + 3, s + 3);
}

// Scales and starts of a tile's tokens, which are lanes, for the units [begin, end) of one part; returns what a scale
// of 1 stands for.
template <int Height>
inline F8 panel_scales(const QuantizedRow& row, const Cut& cut, int begin, int end, int32_t* out) {
  F8 top = all(0.0f), total = all(0.0f);
  for (int u = begin; u < end; ++u) {
    top = larger(top, unit_scales(row, cut, u));
    total += unit_scales(row, cut, u);  // NaN where one is
  }
  total *= all(cut.unit / static_cast<float>(kGroup));
  const F8 step = larger(total * all(1 / kScaleSum), top * all(1 / kScaleTop));
  const F8 inverse = step > all(0.0f) ? all(1.0f) / step : all(0.0f);
  for (int u = begin; u < end; u += kUnits, out += cut.numbers() * Height) {
    U8 scales[2] = {}, starts[2] = {};
    for (int i = 0; i < kUnits && u + i < end; ++i) {
      scales[i] = as<U8>(to_int(unit_scales(row, cut, u + i) * inverse));
      starts[i] = unit_sums(row, cut, u + i) * static_cast<uint32_t>(-8);
    }
    const I8 scale = Dot::scale_of(lanes_of(scales));
    if constexpr (kPaired) {
      const U8 both[2] = {in_turn<0>(starts), in_turn<4>(starts)};
      std::memcpy(out, both, sizeof(int32_t) * 2 * Height);
    } else {
      const I8 start = lanes_of(starts);
      std::memcpy(out, &start, sizeof(int32_t) * Height);
    }
    std::memcpy(out + (kStarts + cut.steps()) * Height, &scale, sizeof(int32_t) * Height);
  }
  return total >= all(0.0f) ? step : total;
}

#if defined(__AVX512VNNI__)
// A round's codes of a tile's tokens, `padded` apart, of both units in turn: [step of 4 columns][token][unit][4].
template <int Height>
inline void panel_codes(const int8_t* first, const int8_t* second, int padded, int tokens, const Cut& cut,
                        int32_t* out) {
  for (int m = 0; m < Height; ++m) {
    const int64_t token = int64_t{std::min(m, tokens - 1)} * padded;
    for (int c = 0; c < cut.unit; c += 16) {
      const __m128i a = load<__m128i>(first + token + c);
      const __m128i b = second ? load<__m128i>(second + token + c) : _mm_setzero_si128();
      const __m128i pairs[2] = {_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)};
      int32_t* to = out + (c / 4 * Height + m) * 2;
      for (int i = 0; i < 4; ++i) std::memcpy(to + 2 * i * Height, reinterpret_cast<const char*>(pairs) + 8 * i, 8);
    }
  }
}
#else
typedef int16_t W8 __attribute__((vector_size(16)));

// Eight numbers of a token, four columns each: with two units, two columns of each; of the second, which may be null,
// zeros.
inline I8 panel_numbers(const int8_t* first, const int8_t* second) {
  if constexpr (kUnits == 1) return load<I8>(first);
  const W8 a = load<W8>(first), b = second ? load<W8>(second) : W8{};
  return as<I8>(__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}

// A round's codes of a tile's tokens, `padded` apart, step by step. Behind the last step, up to three numbers are
// written where the scales come later.
template <int Height>
inline void panel_codes(const int8_t* first, const int8_t* second, int padded, int tokens, const Cut& cut,
                        int32_t* out) {
  for (int at = 0; at < cut.steps(); at += 8) {
    const int columns = at * 4 / kUnits;
    F8 numbers[8] = {};
    for (int m = 0; m < Height; ++m) {
      const int64_t from = int64_t{std::min(m, tokens - 1)} * padded + columns;
      numbers[m] = as<F8>(panel_numbers(first + from, second ? second + from : nullptr));
    }
    transpose8(numbers);
    for (int i = 0; i < std::min(8, cut.steps() - at); ++i) store(out + (at + i) * Height, numbers[i]);
  }
}
#endif

// Makes of the quantized rows [first, last), a tile, what panels take.
template <int Height>
void panel_rows(const Weight& w, const Input& in, int first, int last) {
  const Cut cut(w, in.padded);
  const QuantizedRow row = in.row(first);
  const int tile = first / Height, units = in.padded / cut.unit;
  int32_t* out = in.panels.tiles + int64_t{tile} * cut.rounds * cut.numbers() * Height;
  for (int r = 0; r < cut.rounds; ++r) {
    const int8_t* codes = row.codes + r * kUnits * cut.unit;
    const int8_t* other = kUnits == 2 && r * 2 + 1 < units ? codes + cut.unit : nullptr;
    panel_codes<Height>(codes, other, in.padded, last - first, cut, out + (r * cut.numbers() + kStarts) * Height);
  }
  float* steps = in.panels.steps + int64_t{tile} * cut.parts() * Height;
  for (int begin = 0; begin < cut.rounds; begin += cut.part, steps += Height) {
    const int end = std::min(units, (begin + cut.part) * kUnits);
    const F8 step = panel_scales<Height>(row, cut, begin * kUnits, end, out + begin * cut.numbers() * Height);
    std::memcpy(steps, &step, sizeof(float) * Height);
  }
}

void panel_tile_rows(const Weight& w, const Input& in, int first, int last) {
  in.panels.height == kPanelHeight ? panel_rows<kPanelHeight>(w, in, first, last)
                                   : panel_rows<kPanelHeight - 1>(w, in, first, last);
}

}  // namespace kvant::KVANT_ISA
