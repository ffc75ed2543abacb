// Products of many tokens with quantized weights: row blocks' codes are spread to bytes once, 1,024 columns at a time
// (a panel), for all tokens to use.
//
// Scales are integers here: a weight's relative to the row's largest of the panel, a token's relative to the sum of its
// scales, so that all sums of a panel fit 32 bits. What is left for each sum is two multiplications and an addition.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace kvant::KVANT_ISA {

constexpr int kTileTokens = 6;
constexpr int kPanelTokens = 2 * kTileTokens + 1;  // up to two tiles of tokens, a tile unpacks for itself
#if defined(__AVX512VNNI__)
constexpr int kPanelHeight = 8, kPanelBlocks = 4;  // 16 registers of dots
#else
constexpr int kPanelHeight = 6, kPanelBlocks = 2;  // whose sums and dots stay in registers
#endif
static_assert(kPanelHeight <= 8, "tokens are lanes");
constexpr int kPanelColumns = 1024;                // of 4 bits, so that a panel stays in a near cache; half of 8
constexpr int kUnits = Dot::kUnits;
constexpr float kScaleTop = 32767, kScaleUnit = 32768;
constexpr float kScaleSum = 65000;  // of a token's scales: times 32 * 8 * 127 it stays below 2^31, rounding included

inline int num_spans(const Weight& w, int padded) { return (padded + w.group - 1) / w.group; }

// What a code of 0 stands for, of 8 rows: the bias, or what a zero point of 8 bits makes of the scale, exactly.
inline F8 bias_of(const Weight& w, int64_t at, F8 scale) {
  if (w.biases) return load_half(w.biases + at);
  return -(to_float(wide_bytes(w.zeros + at)) * scale);
}

// NB row blocks' weights in a few stored columns: those asked for last, one for each remainder.
template <int NB>
class Columns {
 public:
  Columns() {
    std::fill(numbers_, numbers_ + kPlaces + 1, -1);
    std::fill(weights_[kPlaces], weights_[kPlaces] + NB, all(0.0f));
  }

  // For a column of -1, zeros.
  const F8* get(const Weight& w, Blocks blocks, int column, int padded) {
    const int place = column < 0 ? kPlaces : static_cast<unsigned>(column) % kPlaces;
    if (numbers_[place] != column) read(w, blocks, column, padded, place);
    return weights_[place];
  }

 private:
  static constexpr unsigned kPlaces = 8;  // and one for no column

  void read(const Weight& w, Blocks blocks, int column, int padded, int place) {
    const int bits = w.kind == kWeightU4 ? 4 : 8, shift = __builtin_ctz(w.group), mask = (1 << bits) - 1;
    const int64_t scales = ((padded - 1) >> shift) + 1;
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + column * bits / 32 * 32;
    const int bit = 8 * (column % 4) + (column % 8 & bits);  // of 4 bits, columns 4 to 7 of eight are the high ones
    for (int b = 0; b < NB; ++b) {
      const I8 code = as<I8>(load<U8>(codes + int64_t{blocks[b]} * padded * bits) >> bit) & mask;
      const int64_t at = (blocks[b] * scales + (column >> shift)) * kRowBlock;
      const F8 scale = load_half(w.scales + at);
      const F8 bias = w.biases || w.zeros ? bias_of(w, at, scale) : scale * all(bits == 4 ? -8.0f : -128.0f);
      weights_[place][b] = to_float(code) * scale + bias;
    }
    numbers_[place] = column;
  }

  int numbers_[kPlaces + 1];
  F8 weights_[kPlaces + 1][NB];
};

// What the inputs' outliers make of the products of `tokens` tokens from `first` on. Most tokens have theirs in one of
// a few columns. With `Always`, one that has none has one of 0, which may cost less than wrong guesses.
template <bool Always, int M, int NB>
inline void add_outliers(const Weight& w, const Input& in, int first, int tokens, Blocks blocks, Columns<NB>& columns,
                         F8 (&y)[M][NB]) {
  if (!in.outliers) return;
  for (int m = 0; m < tokens; ++m) {
    const auto [value, column] = in.outliers[first + m];
    if (!Always && column < 0) continue;
    const F8* weights = columns.get(w, blocks, column, in.padded);
    for (int b = 0; b < NB; ++b) y[m][b] += weights[b] * all(value);
  }
}

// One step of 32 codes of NB row blocks times 4 columns of M tokens, whose codes lie `padded` apart.
template <int M, int NB>
inline void add_step(Dot (&dots)[M][NB], const B32 (&c)[NB], const int8_t* x, int64_t padded) {
  for (int m = 0; m < M; ++m) {
    const B32 a = broadcast4(x + m * padded);
    for (int b = 0; b < NB; ++b) dots[m][b].add(c[b], a);
  }
}

template <int M, int NB>
inline void start_all(Dot (&dots)[M][NB], const int32_t* starts) {
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < NB; ++b) dots[m][b].start(starts[m]);
}

// How columns are cut: a unit has one scale of the weight and one of the tokens, 16 or 32 columns; a round is as many
// units as a lane of `Dot` holds apart; a part is the rounds of one panel.
struct Cut {
  int unit, rounds, part, planes;
  Cut(const Weight& w, int columns) : unit(std::min(w.group, kGroup)), planes(w.kind == kWeightU4 ? 1 : 2) {
    rounds = (columns + kUnits * unit - 1) / (kUnits * unit);
    part = kPanelColumns / planes / (kUnits * unit);
  }
  int steps() const { return kUnits * unit / 4; }
  int parts() const { return (rounds + part - 1) / part; }
  // Numbers of a round for each token: where its sums start, codes, scales.
  int numbers() const { return steps() + 2; }
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
    const I8 start = lanes_of(starts), scale = Dot::scale_of(lanes_of(scales));
    std::memcpy(out, &start, sizeof(int32_t) * Height);
    std::memcpy(out + (cut.steps() + 1) * Height, &scale, sizeof(int32_t) * Height);
  }
  return total >= all(0.0f) ? step : total;
}

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
    panel_codes<Height>(codes, other, in.padded, last - first, cut, out + (r * cut.numbers() + 1) * Height);
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

// Row blocks' codes and scales: codes [plane][round][step of 4 columns][NB][32], scales [round][NB][16]. An 8-bit code
// less 128 is 16 times what the first plane has above 8, and what the second has.
template <int NB>
struct Panel {
  alignas(kAlign) uint8_t codes[kPanelColumns / 4 * NB * 32];
  alignas(kAlign) int16_t scales[kPanelColumns / 16 / kUnits * NB * 16];
  alignas(kAlign) F8 tops[NB];
};

// One round's codes of a block; the second unit's lie apart. Steps lie `stride` bytes apart, planes `plane`.
template <int Planes>
inline void unpack_round(const uint8_t* first, const uint8_t* second, int unit, int stride, int64_t plane,
                         uint8_t* to) {
  for (int v = 0; v < unit * Planes / 8; ++v) {
    U8 parts[2] = {load<U8>(first + 32 * v)};
    if (kUnits == 2) {
      const U8 other = load<U8>(second + 32 * v);
      const U8 held = parts[0];
      parts[0] = (held & 0xffff) | other << 16;
      parts[1] = held >> 16 | (other & 0xffff0000);
    }
    for (int i = 0; i < kUnits; ++i) {
      const B32 c = as<B32>(parts[i]);
      if (Planes == 1) {
        store(to + (2 * v * kUnits + i) * stride, c & 15);
        store(to + ((2 * v + 1) * kUnits + i) * stride, (c >> 4) & 15);
      } else {
        store(to + (v * kUnits + i) * stride, ((c >> 4) & 15) + ((c >> 3) & 1));
        store(to + (v * kUnits + i) * stride + plane, (c + 8) & 15);
      }
    }
  }
}

// Scales of a block's units [begin, end), 8 rows each; returns what a scale of 2^15 stands for.
inline F8 unpack_scales(const Weight& w, const uint16_t* scales, const Cut& cut, int begin, int end, int stride,
                        int16_t* to) {
  const auto scale_at = [&](int u) { return load_half(scales + int64_t{u * cut.unit / w.group} * kRowBlock); };
  F8 top = all(0.0f), poison = all(0.0f);
  for (int u = begin; u < end; ++u) {
    top = larger(top, magnitude(scale_at(u)));
    poison += scale_at(u) - scale_at(u);  // a maximum may hide a NaN
  }
  const F8 inverse = top > all(0.0f) ? all(kScaleTop) / top : all(0.0f);
  for (int u = begin; u < end; u += kUnits, to += stride) {
    I8 lane = to_int(scale_at(u) * inverse);
    if (kUnits == 2) lane = (lane & 0xffff) | (u + 1 < end ? to_int(scale_at(u + 1) * inverse) << 16 : all(0));
    store(to, lane);
  }
  return top * all(kScaleUnit / kScaleTop) + poison;
}

// The rounds [begin, end) of NB row blocks.
template <int NB>
inline void unpack_panel(const Weight& w, const Cut& cut, int padded, Blocks blocks, int begin, int end,
                         Panel<NB>& out) {
  const int units = padded / cut.unit, bytes = cut.unit * 4 * cut.planes, stride = NB * 32;
  const int last = std::min(units, end * kUnits);
  const int64_t plane = int64_t{end - begin} * cut.steps() * stride;
  for (int b = 0; b < NB; ++b) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + int64_t{blocks[b]} * units * bytes;
    for (int r = begin; r < end; ++r) {
      const uint8_t* first = codes + int64_t{r} * kUnits * bytes;
      const uint8_t* second = first + (r * kUnits + 1 < units ? bytes : 0);
      uint8_t* to = out.codes + (r - begin) * cut.steps() * stride + b * 32;
      bring_near(first + int64_t{end - begin} * kUnits * bytes, kUnits * bytes);  // the stream's next panel
      cut.planes == 1 ? unpack_round<1>(first, second, cut.unit, stride, plane, to)
                      : unpack_round<2>(first, second, cut.unit, stride, plane, to);
    }
    const uint16_t* scales = w.scales + int64_t{blocks[b]} * num_spans(w, padded) * kRowBlock;
    bring_near(scales + last * cut.unit / w.group * kRowBlock, (last - begin * kUnits) * kRowBlock * 2);
    out.tops[b] = unpack_scales(w, scales, cut, begin * kUnits, last, NB * 16, out.scales + b * 16);
  }
}

// Dots of `rounds` rounds, summed with their scales.
template <int Steps, int M, int NB>
inline void panel_sums(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, I8 (&sums)[M][NB]) {
  for (int r = 0; r < rounds; ++r) {
    Dot dots[M][NB];
    start_all(dots, x);
    x += M;
KVANT_UNROLL
    for (int s = 0; s < Steps; ++s) {
      B32 c[NB];
      for (int b = 0; b < NB; ++b) c[b] = load<B32>(codes + b * 32);
      add_step(dots, c, reinterpret_cast<const int8_t*>(x), 4);
      codes += NB * 32;
      x += M;
    }
    for (int m = 0; m < M; ++m) {
      const I8 scale = all(x[m]);
      for (int b = 0; b < NB; ++b) dots[m][b].add_scaled(sums[m][b], load<I8>(scales + b * 16), scale);
    }
    x += M;
    scales += NB * 16;
  }
}

// The same as floats, y: `tops` and `steps` are what scales stand for. Added to y, where that is not `First`.
template <bool First, int Steps, int M, int NB>
inline void panel_floats(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, const F8* tops,
                         const float* steps, float factor, F8 (&y)[M][NB]) {
  I8 sums[M][NB] = {};
  panel_sums<Steps>(codes, scales, x, rounds, sums);
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < NB; ++b) {
      const F8 product = to_float(sums[m][b]) * (tops[b] * all(factor * steps[m]));
      y[m][b] = First ? product : y[m][b] + product;
    }
}

#if defined(__AVX512VNNI__)
// The same of four row blocks, two to a register.
template <bool First, int Steps, int M>
inline void panel_floats(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, const F8* tops,
                         const float* steps, float factor, F8 (&y)[M][4]) {
  __m512i sums[M][2];
  for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = _mm512_setzero_si512();
  for (int r = 0; r < rounds; ++r, scales += 64) {
    __m512i dots[M][2];
    for (int m = 0; m < M; ++m) dots[m][0] = dots[m][1] = _mm512_set1_epi32(x[m]);
    x += M;
    KVANT_UNROLL
    for (int s = 0; s < Steps; ++s, codes += 128, x += M) {
      const __m512i c[2] = {load<__m512i>(codes), load<__m512i>(codes + 64)};
      for (int m = 0; m < M; ++m) {
        const __m512i four = _mm512_set1_epi32(x[m]);
        for (int b = 0; b < 2; ++b) dots[m][b] = _mm512_dpbusd_epi32(dots[m][b], c[b], four);
      }
    }
    const __m512i scale[2] = {load<__m512i>(scales), load<__m512i>(scales + 32)};
    for (int m = 0; m < M; ++m) {
      const __m512i other = _mm512_set1_epi32(x[m]);
      for (int b = 0; b < 2; ++b)
        sums[m][b] = _mm512_dpwssd_epi32(sums[m][b], dots[m][b], _mm512_mulhrs_epi16(scale[b], other));
    }
    x += M;
  }
  for (int b = 0; b < 2; ++b) {
    const __m512 top = load<__m512>(tops + 2 * b) * _mm512_set1_ps(factor);
    for (int m = 0; m < M; ++m) {
      const __m512 product = _mm512_cvtepi32_ps(sums[m][b]) * (top * _mm512_set1_ps(steps[m]));
      store(&y[m][2 * b], First ? product : load<__m512>(&y[m][2 * b]) + product);
    }
  }
}
#endif

// What biases or zero points add, of units [begin, end): a centred code of 0 is a code of 8 or 128.
template <int M, int NB>
void add_biases(const Weight& w, const Cut& cut, int padded, Blocks blocks, const QuantizedRow& row, int tokens,
                int begin, int end, F8 (&y)[M][NB]) {
  const int last = std::min(end, padded / cut.unit);
  for (int b = 0; b < NB; ++b)
    for (int u = begin; u < last; ++u) {
      const int64_t at = (int64_t{blocks[b]} * num_spans(w, padded) + u * cut.unit / w.group) * kRowBlock;
      const F8 scale = load_half(w.scales + at);
      const F8 bias = bias_of(w, at, scale) + scale * all(cut.planes == 1 ? 8.0f : 128.0f);
      const F8 sums = unit_scales(row, cut, u) * to_float(as<I8>(unit_sums(row, cut, u)));
      for (int m = 0; m < tokens; ++m) y[m][b] += bias * all(sums[m]);
    }
}

// A row block's sums with some tokens, `stride` apart: put into out, a token every `pitch`, with the bias, if they are
// the `first`, or added to it.
inline void store_block(const Linear& linear, int row, const F8* sums, int stride, int tokens, bool first, float* out,
                        int64_t pitch) {
  const int left = std::min(kRowBlock, linear.weight.rows - row);
  if (first && !linear.bias && left == kRowBlock) {
    for (int m = 0; m < tokens; ++m) store(out + m * pitch, sums[m * stride]);
    return;
  }
  for (int m = 0; m < tokens; ++m, out += pitch) {
    const float* base = !first ? out : linear.bias ? linear.bias + row : nullptr;
    store_some(out, base ? sums[m * stride] + load_some(base, left) : sums[m * stride], left);
  }
}

// A tile of tokens times a panel of the rounds [begin, end), added to `out` unless they are the first. The last tile
// may have room for more tokens than there are: what that holds is multiplied as well, and dropped.
template <int M, int NB, int Steps>
void panel_tile(const Linear& linear, const Input& in, const Cut& cut, const Panel<NB>& panel, int begin, int end,
                int first, int last, Blocks blocks, Columns<NB>& columns, const Output& out) {
  const Weight& w = linear.weight;
  const int64_t tile = first / M;
  const int32_t* x = in.panels.tiles + (tile * cut.rounds + begin) * (Steps + 2) * M;
  const float* steps = in.panels.steps + (tile * cut.parts() + begin / cut.part) * M;
  alignas(kAlign) F8 y[M][NB];
  const float first_factor = cut.planes == 1 ? 1 : 16;
  panel_floats<true, Steps>(panel.codes, panel.scales, x, end - begin, panel.tops, steps, first_factor, y);
  if (cut.planes == 2)
    panel_floats<false, Steps>(panel.codes + int64_t{end - begin} * Steps * NB * 32, panel.scales, x, end - begin,
                               panel.tops, steps, 1, y);
  if (w.biases || w.zeros)
    add_biases(w, cut, in.padded, blocks, in.row(first), last - first, begin * kUnits, end * kUnits, y);
  if (!begin) add_outliers<NB == 4>(w, in, first, last - first, blocks, columns, y);
  for (int b = 0; b < NB; ++b)
    store_block(linear, blocks[b] * kRowBlock, y[0] + b, NB, last - first, !begin, out.at(first, b), out.pitch);
}

template <int NB>
using PanelTile = void (*)(const Linear&, const Input&, const Cut&, const Panel<NB>&, int begin, int end, int first,
                           int last, Blocks, Columns<NB>& columns, const Output& out);

template <int NB>
PanelTile<NB> panel_tile_of(int unit, int height) {
  constexpr int kSteps = kUnits * kGroup / 4;
  constexpr int kHeight = kPanelHeight;
  if (unit == kGroup) return height == kHeight ? panel_tile<kHeight, NB, kSteps> : panel_tile<kHeight - 1, NB, kSteps>;
  return height == kHeight ? panel_tile<kHeight, NB, kSteps / 2> : panel_tile<kHeight - 1, NB, kSteps / 2>;
}

// The tokens [first, last), whole tiles but for the last of all, times NB row blocks.
template <int NB>
void by_panels(const Linear& linear, const Input& in, int first, int last, Blocks blocks, const Output& out) {
  const Cut cut(linear.weight, in.padded);
  const int height = in.panels.height;
  const PanelTile<NB> tile = panel_tile_of<NB>(cut.unit, height);
  Panel<NB> panel;
  Columns<NB> columns;
  for (int begin = 0; begin < cut.rounds; begin += cut.part) {
    const int end = std::min(cut.rounds, begin + cut.part);
    unpack_panel(linear.weight, cut, in.padded, blocks, begin, end, panel);
    for (int token = first; token < last; token += height)
      tile(linear, in, cut, panel, begin, end, token, std::min(last, token + height), blocks, columns, out);
  }
}

}  // namespace kvant::KVANT_ISA
