// Products of many tokens with quantized weights: row blocks' codes are spread to bytes once, 1,024 columns at a time
// (a panel), for all tokens to use.
//
// Scales are integers here: a weight's relative to the row's largest of the panel, a token's relative to the sum of its
// scales, so that all sums of a panel fit 32 bits. What is left for each sum is two multiplications and an addition.
#pragma once

#include "panel_input.h"

namespace kvant::KVANT_ISA {

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

// Row blocks' codes and scales: codes [plane][round][step of 4 columns][NB][32], or of both units' [NB][64], scales
// [round][NB][16]. An 8-bit code less 128 is 16 times what the first plane has above 8, and what the second has.
template <int NB>
struct Panel {
  alignas(kAlign) uint8_t codes[kPanelColumns / 4 * NB * 32];
  alignas(kAlign) int16_t scales[kPanelColumns / 16 / kUnits * NB * 16];
  alignas(kAlign) F8 tops[NB];
};

// Codes as bytes: of 4 bits, those of two steps, `next` bytes apart; of 8 bits, those of one step in two planes.
template <int Planes, class B>
inline void store_codes(B c, uint8_t* to, int64_t next, int64_t plane) {
  if (Planes == 1) {
    store(to, c & 15);
    store(to + next, (c >> 4) & 15);
  } else {
    store(to, ((c >> 4) & 15) + ((c >> 3) & 1));
    store(to + plane, (c + 8) & 15);
  }
}

// One round's codes of a block, or of two that lie `apart`; the second unit's lie apart, too. Steps lie `stride` bytes
// apart, planes `plane`.
#if defined(__AVX512VNNI__)
typedef uint8_t B64 __attribute__((vector_size(64)));

template <int Planes, int Together>
inline void unpack_round(const uint8_t* first, const uint8_t* second, int64_t apart, int unit, int stride,
                         int64_t plane, uint8_t* to) {
  // A block's rows; or of two rows 0, 1, 4 and 5, then 2, 3, 6 and 7: `_mm512_packs_epi32` puts all in order.
  const __m512i in_order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i outer = _mm512_setr_epi32(0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const __m512i places[2] = {Together == 1 ? in_order : outer, outer + _mm512_set1_epi64(0x200000002)};
  const int next = 2 * stride;  // both units of a step
  for (int v = 0; v < unit * Planes / 8; ++v, to += next * 2 / Planes, first += 32, second += 32) {
    const __m512i a = two_rows(first, Together == 1 ? 0 : apart), b = two_rows(second, Together == 1 ? 0 : apart);
    for (int i = 0; i < Together; ++i)
      store_codes<Planes>((B64)_mm512_permutex2var_epi32(a, places[i], b), to + i * kAlign, next, plane);
  }
}
#else
template <int Planes, int Together>
inline void unpack_round(const uint8_t* first, const uint8_t* second, int64_t, int unit, int stride, int64_t plane,
                         uint8_t* to) {
  for (int v = 0; v < unit * Planes / 8; ++v) {
    U8 parts[2] = {load<U8>(first + 32 * v)};
    if (kUnits == 2) {
      const U8 other = load<U8>(second + 32 * v);
      const U8 held = parts[0];
      parts[0] = (held & 0xffff) | other << 16;
      parts[1] = held >> 16 | (other & 0xffff0000);
    }
    for (int i = 0; i < kUnits; ++i)
      store_codes<Planes>(as<B32>(parts[i]), to + (v * 2 / Planes * kUnits + i) * stride, kUnits * stride, plane);
  }
}
#endif

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
  constexpr int kTogether = kPaired && NB > 1 ? 2 : 1;
  const int64_t apart = int64_t{blocks.stride} * units * bytes;
  for (int b = 0; b < NB; b += kTogether) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + int64_t{blocks[b]} * units * bytes;
    for (int r = begin; r < end; ++r) {
      const uint8_t* first = codes + int64_t{r} * kUnits * bytes;
      const uint8_t* second = first + (r * kUnits + 1 < units ? bytes : 0);
      uint8_t* to = out.codes + (r - begin) * cut.steps() * stride + b * sizeof(FWide);
      for (int i = 0; i < kTogether; ++i)  // the stream's next panel
        bring_near(first + i * apart + int64_t{end - begin} * kUnits * bytes, kUnits * bytes);
      cut.planes == 1 ? unpack_round<1, kTogether>(first, second, apart, cut.unit, stride, plane, to)
                      : unpack_round<2, kTogether>(first, second, apart, cut.unit, stride, plane, to);
    }
  }
  for (int b = 0; b < NB; ++b) {
    const uint16_t* scales = w.scales + int64_t{blocks[b]} * num_spans(w, padded) * kRowBlock;
    bring_near(scales + last * cut.unit / w.group * kRowBlock, (last - begin * kUnits) * kRowBlock * 2);
    out.tops[b] = unpack_scales(w, scales, cut, begin * kUnits, last, NB * 16, out.scales + b * 16);
  }
}

#if defined(__AVX512VNNI__)
// Dots of `rounds` rounds of NB row blocks with the tokens [From, From + M) of a tile of `Height`: of each round,
// add(m, dots, scales, scale) gets token From + m's, both units in turn, to be summed with these scales.
template <int Steps, int Height, int From, int M, int NB, class Add>
inline void panel_rounds(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, const Add& add) {
  for (int r = 0; r < rounds; ++r, scales += 16 * NB) {
    __m512i dots[M][NB];
    for (int m = 0; m < M; ++m)
      for (__m512i& dot : dots[m]) dot = _mm512_set1_epi64(load<int64_t>(x + 2 * (From + m)));
    x += 2 * Height;
    KVANT_UNROLL
    for (int s = 0; s < Steps / 2; ++s, codes += 64 * NB, x += 2 * Height) {
      __m512i c[NB];
      for (int b = 0; b < NB; ++b) c[b] = load<__m512i>(codes + 64 * b);
      for (int m = 0; m < M; ++m) {
        const __m512i eight = _mm512_set1_epi64(load<int64_t>(x + 2 * (From + m)));
        for (int b = 0; b < NB; ++b) dots[m][b] = _mm512_dpbusd_epi32(dots[m][b], c[b], eight);
      }
    }
    for (int m = 0; m < M; ++m) add(m, dots[m], scales, x[From + m]);
    x += Height;
  }
}

// The same as floats, y: `tops` and `steps` are what scales stand for. Added to y, where that is not `First`.
template <bool First, int Steps, int From, int M, int Height>
inline void panel_pass(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, const F8* tops,
                       const float* steps, float factor, F8 (&y)[Height][4]) {
  __m512i sums[M][2] = {};
  panel_rounds<Steps, Height, From, M, 4>(
      codes, scales, x, rounds, [&](int m, const __m512i (&dots)[4], const int16_t* scale, int32_t other) {
        for (int p = 0; p < 2; ++p) {
          const __m512i both = _mm512_mulhrs_epi16(load<__m512i>(scale + 32 * p), _mm512_set1_epi32(other));
          sums[m][p] = _mm512_dpwssd_epi32(sums[m][p], _mm512_packs_epi32(dots[2 * p], dots[2 * p + 1]), both);
        }
      });
  for (int p = 0; p < 2; ++p) {
    const F16 top = load<F16>(tops + 2 * p) * all<F16>(factor);
    for (int m = 0; m < M; ++m) {
      const F16 product = to_float((I16)sums[m][p]) * (top * all<F16>(steps[From + m]));
      F8* to = &y[From + m][2 * p];
      store(to, First ? product : load<F16>(to) + product);
    }
  }
}

// Four row blocks' by two passes over them, whose sums and dots stay in registers.
template <bool First, int Steps, int M>
inline void panel_floats(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, const F8* tops,
                         const float* steps, float factor, F8 (&y)[M][4]) {
  constexpr int kHalf = 4;
  panel_pass<First, Steps, 0, kHalf>(codes, scales, x, rounds, tops, steps, factor, y);
  panel_pass<First, Steps, kHalf, M - kHalf>(codes, scales, x, rounds, tops, steps, factor, y);
}

// A single block's.
template <bool First, int Steps, int M>
inline void panel_floats(const uint8_t* codes, const int16_t* scales, const int32_t* x, int rounds, const F8* tops,
                         const float* steps, float factor, F8 (&y)[M][1]) {
  __m256i sums[M] = {};
  panel_rounds<Steps, M, 0, M, 1>(
      codes, scales, x, rounds, [&](int m, const __m512i (&dots)[1], const int16_t* scale, int32_t other) {
        const __m256i low = _mm512_castsi512_si256(dots[0]), high = _mm512_extracti64x4_epi64(dots[0], 1);
        const __m256i units = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);  // rows in order
        const __m256i both = _mm256_mulhrs_epi16(load<__m256i>(scale), _mm256_set1_epi32(other));
        sums[m] = _mm256_dpwssd_epi32(sums[m], units, both);
      });
  for (int m = 0; m < M; ++m) {
    const F8 product = to_float((I8)sums[m]) * (tops[0] * all(factor * steps[m]));
    y[m][0] = First ? product : y[m][0] + product;
  }
}
#else
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
  const int32_t* x = in.panels.tiles + (tile * cut.rounds + begin) * cut.numbers() * M;
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
