// Matrix products. Quantized weights meet activations of 8 bits, 32 columns a scale: integer dots, no unpacking.
//
// An 8-bit weight is two 4-bit ones, 16 * high + low, since only 4-bit products add up in 16 bits without overflow.
#pragma once

#include "panels.h"

namespace kvant::KVANT_ISA {

#if defined(__AVX512VL__)
constexpr int kTileBlocks = 4;  // 32 registers
#else
constexpr int kTileBlocks = 2;  // 16 registers, or 32 of half the size
#endif
constexpr int kStreams = 4;  // of row blocks, where one token waits for memory more than it computes

// Returns the largest magnitude; what is not finite is larger than all else.
inline float quantize_group(const float* x, const QuantizedRow& out, int group) {
  F8 held[4];
  I8 top = all(0);
  for (int i = 0; i < 4; ++i) {
    held[i] = load<F8>(x + 8 * i);
    top = larger(top, magnitude_bits(held[i]));
  }
  const int32_t bits = largest(top);
  const float size = load<float>(&bits), step = size / 127.0f + (size - size);  // NaN where it is not finite
  if (!(step >= 0))
    for (F8& x8 : held) x8 = all(0.0f);  // a number that is not finite has no code: the scale alone tells
  const F8 inverse = all(step > 0 ? 1.0f / step : 0.0f);
  I8 codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = to_int(held[i] * inverse);
  const B32 bytes = signed_bytes_of(codes);
  store(out.codes + group * kGroup, bytes);
  int32_t sums[2];
  half_sums(bytes, sums);
  const int64_t at = group * out.stride;
  out.half_sums[2 * at] = sums[0];
  out.half_sums[2 * at + out.stride] = sums[1];
  out.scales[at] = step;
  out.weighted[at] = step * static_cast<float>(sums[0] + sums[1]);
  out.starts[at] = Dot::start_of(-8 * (sums[0] + sums[1]));
  return size;
}

// A row's group, which may be its last and shorter, but for the column `left_out` of it, if that is not negative.
inline float quantize_columns(const float* x, int columns, const QuantizedRow& out, int group, int left_out) {
  const int first = group * kGroup, count = std::min(kGroup, columns - first);
  if (count == kGroup && left_out < 0) return quantize_group(x + first, out, group);
  float held[kGroup] = {};
  if (count == kGroup) std::memcpy(held, x + first, sizeof held);  // a constant size is no loop over bytes
  else std::memcpy(held, x + first, sizeof(float) * count);
  if (left_out >= 0) held[left_out] = 0;
  return quantize_group(held, out, group);
}

// The largest of up to 32 elements, if it is more than twice as large as any other.
inline Outlier find_outlier(const float* x, int count) {
  F8 tops = all(0.0f), nexts = all(0.0f);
  for_eights(count, [&](int i, int left) {
    const F8 size = magnitude(load_some(x + i, left));
    nexts = larger(nexts, smaller(tops, size));
    tops = larger(tops, size);
  });
  const float top = largest(tops);
  const I8 at_top = tops == all(top);
  const float next = largest(larger(nexts, at_top ? all(0.0f) : tops));
  if (sum(at_top) == -1)  // one lane has it
    for (int i = 0; i < count && top > 2 * next; ++i)
      if (std::fabs(x[i]) == top) return {x[i], i};
  return {0, -1};
}

// Into codes of 8 bits. With `outlier`, the largest element of the group that has the row's largest is left out where
// it stands out.
void quantize_row(const float* x, int columns, const QuantizedRow& out, Outlier* outlier) {
  float top = 0;
  int widest = 0;
  for (int group = 0; group * kGroup < columns; ++group) {
    const float size = quantize_columns(x, columns, out, group, -1);
    if (size > top) top = size, widest = group;
  }
  if (!outlier) return;
  const int first = widest * kGroup;
  *outlier = find_outlier(x + first, std::min(kGroup, columns - first));
  if (outlier->column < 0) return;
  quantize_columns(x, columns, out, widest, outlier->column);
  outlier->column += first;
}

// Weights without biases and zero points, in groups of 32 columns and more: their products start where 8 counts as 0.
template <bool Biased, int Parts>
constexpr bool kStarted = !Biased && Parts == 1;

// What a group's dots make of the result: acc += dots * scale * step, less its zero point, or plus its bias. `row` is
// the token's, moved on to the group.
template <int Bits, bool Biased, int Parts>
inline void add_group(F8& acc, I8 total, F8 scale, F8 bias, const QuantizedRow& row, int m, int part) {
  const F8 step = all(row.scales[m]);
  const int32_t half_sum = Parts == 1 ? 0 : row.half_sums[part * row.stride + m];
  if constexpr (Biased) {
    acc += to_float(total) * (scale * step);
    acc += bias * (Parts == 1 ? all(row.weighted[m]) : step * all(static_cast<float>(half_sum)));
  } else {
    if constexpr (Parts == 2) total -= all(8 * half_sum) << (Bits - 4);
    acc += to_float(total) * (scale * step);
  }
}

template <int M, int NB>
inline void collect(const Dot (&dots)[M][NB], bool high, I8 (&total)[M][NB]) {
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < NB; ++b) total[m][b] = high ? total[m][b] + (dots[m][b].total() << 4) : dots[m][b].total();
}

// The dots of one group of 32 columns (or, with Parts 2, of one half of it): total[m][b] of 8 rows each.
template <int M, int NB, int Bits, bool Started, int Parts>
inline void group_dots(const uint8_t* const* codes, const QuantizedRow& row, int64_t padded, int part,
                       I8 (&total)[M][NB]) {
  constexpr int kSteps = Bits / Parts, kColumns = 32 / Bits;  // steps of 32 code bytes
  for (int nibble = 0; nibble < Bits / 4; ++nibble) {
    Dot dots[M][NB];
    if (Started && nibble == Bits / 4 - 1) start_all(dots, row.starts);
KVANT_UNROLL
    for (int s = part * kSteps; s < (part + 1) * kSteps; ++s) {
      const int8_t* x = row.codes + kColumns * s;
      B32 c[NB];
      for (int b = 0; b < NB; ++b) c[b] = (load<B32>(codes[b] + 32 * s) >> (4 * nibble)) & 15;
      add_step(dots, c, x, padded);
      if constexpr (Bits == 4) {
        for (int b = 0; b < NB; ++b) c[b] = (load<B32>(codes[b] + 32 * s) >> 4) & 15;
        add_step(dots, c, x + 4, padded);
      }
    }
    collect(dots, nibble, total);
  }
}

inline void store_rows(F8 y, const Linear& linear, int row, float* out) {
  const int left = linear.weight.rows - row;
  if (left >= kRowBlock) {
    if (linear.bias) y += load<F8>(linear.bias + row);
    store(out, y);
  } else {
    for (int r = 0; r < left; ++r) out[r] = y[r] + (linear.bias ? linear.bias[row + r] : 0.0f);
  }
}

// M tokens from `token` on times NB row blocks.
template <int M, int NB, int Bits, bool Biased, int Parts>
void quantized_tile(const Linear& linear, const Input& in, int token, Blocks blocks, const Output& out) {
  const Weight& w = linear.weight;
  const int groups = in.padded / kGroup, spans = num_spans(w, in.padded);
  const int shift = Parts == 2 ? -1 : __builtin_ctz(w.group / kGroup);
  const uint8_t* codes[NB];
  int64_t starts[NB];
  for (int b = 0; b < NB; ++b) {
    codes[b] = static_cast<const uint8_t*>(w.codes) + static_cast<int64_t>(blocks[b]) * groups * 32 * Bits;
    starts[b] = static_cast<int64_t>(blocks[b]) * spans * kRowBlock;
  }
  // What is asked for meanwhile: the stream's next block; for one token, what it reaches soon.
  const int64_t ahead = M > 1 ? int64_t{groups} * 32 * Bits : reads_ahead();
  const QuantizedRow first = in.row(token);
  F8 acc[M][NB] = {};
  for (int g = 0; g < groups; ++g) {
    const QuantizedRow row = first.group(g);
    for (int part = 0; part < Parts; ++part) {
      I8 total[M][NB] = {};
      group_dots<M, NB, Bits, kStarted<Biased, Parts>, Parts>(codes, row, in.padded, part, total);
      const int span = (Parts == 2 ? 2 * g + part : g >> shift) * kRowBlock;
      for (int b = 0; b < NB; ++b) {
        const F8 scale = load_half(w.scales + starts[b] + span);
        const F8 bias = Biased ? bias_of(w, starts[b] + span, scale) : all(0.0f);
        for (int m = 0; m < M; ++m) add_group<Bits, Biased, Parts>(acc[m][b], total[m][b], scale, bias, row, m, part);
      }
    }
    for (int b = 0; b < NB; ++b) {
      if (ahead)
        for (int i = 0; i < 32 * Bits; i += 64) __builtin_prefetch(codes[b] + ahead + i);
      codes[b] += 32 * Bits;
    }
  }
  Columns<NB> columns;
  add_outliers<false>(w, in, token, M, blocks, columns, acc);
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < NB; ++b)
      store_rows(acc[m][b], linear, blocks[b] * kRowBlock, out.at(token + m, b));
}

#if defined(__AVX512VNNI__)
// The dots of a group of M tokens, whose codes lie `padded` apart, with four row blocks of 4 bits, of which two are a
// register and lie `apart`.
template <int M>
inline void wide_dots(const uint8_t* const (&codes)[2], int64_t apart, const QuantizedRow& row, int64_t padded,
                      I16 (&dots)[M][2]) {
  const __m512i mask = _mm512_set1_epi8(15);
  for (int m = 0; m < M; ++m) dots[m][0] = dots[m][1] = all<I16>(row.starts[m]);
  KVANT_UNROLL
  for (int s = 0; s < 4; ++s) {
    const __m512i held[2] = {two_rows(codes[0] + 32 * s, apart), two_rows(codes[1] + 32 * s, apart)};
    for (int high = 0; high < 2; ++high) {
      __m512i c[2];
      for (int p = 0; p < 2; ++p) c[p] = (high ? _mm512_srli_epi16(held[p], 4) : held[p]) & mask;
      for (int m = 0; m < M; ++m) {
        const __m512i four = _mm512_set1_epi32(load<int32_t>(row.codes + m * padded + 8 * s + 4 * high));
        for (int p = 0; p < 2; ++p) dots[m][p] = (I16)_mm512_dpbusd_epi32((__m512i)dots[m][p], c[p], four);
      }
    }
  }
}

// M tokens from `token` on times four row blocks of 4 bits, without biases and zero points, in groups of 32 columns and
// more: `quantized_tile` with two blocks to a register.
template <int M>
void wide_tile(const Linear& linear, const Input& in, int token, Blocks blocks, const Output& out) {
  constexpr int kBytes = kGroup / 2 * kRowBlock;  // of a group of a row block
  const Weight& w = linear.weight;
  const int64_t groups = in.padded / kGroup, spans = num_spans(w, in.padded), shift = __builtin_ctz(w.group / kGroup);
  const int64_t apart = blocks.stride * groups * kBytes, scales_apart = blocks.stride * spans * kRowBlock;
  const uint8_t* codes[2];
  const uint16_t* scales[2];
  for (int p = 0; p < 2; ++p) {
    codes[p] = static_cast<const uint8_t*>(w.codes) + blocks[2 * p] * groups * kBytes;
    scales[p] = w.scales + blocks[2 * p] * spans * kRowBlock;
  }
  const QuantizedRow first = in.row(token);
  F16 acc[M][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const QuantizedRow row = first.group(g);
    I16 dots[M][2];
    wide_dots(codes, apart, row, in.padded, dots);
    for (int p = 0; p < 2; ++p) {
      const uint16_t* from = scales[p] + (g >> shift) * kRowBlock;
      const F16 scale = of_halves(load_half(from), load_half(from + scales_apart));
      for (int m = 0; m < M; ++m) acc[m][p] += to_float(dots[m][p]) * (scale * all<F16>(row.scales[m]));
    }
    for (const uint8_t*& from : codes) {
      for (int64_t i : {int64_t{0}, apart})  // the streams' next blocks
        for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(from + i + groups * kBytes + line);
      from += kBytes;
    }
  }
  F8 y[M][4];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p) store(&y[m][2 * p], acc[m][p]);
  Columns<4> columns;
  add_outliers<false>(w, in, token, M, blocks, columns, y);
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < 4; ++b) store_rows(y[m][b], linear, blocks[b] * kRowBlock, out.at(token + m, b));
}
#endif

template <WeightKind Kind>
inline F8 dense_rows(const void* codes, int64_t index) {
  if constexpr (Kind == kWeightF32) return load<F8>(static_cast<const float*>(codes) + index);
  if constexpr (Kind == kWeightF16) return load_half(static_cast<const uint16_t*>(codes) + index);
  return load_bfloat(static_cast<const uint16_t*>(codes) + index);
}

template <int M, int NB, WeightKind Kind>
void dense_tile(const Linear& linear, const Input& in, int token, Blocks blocks, const Output& out) {
  const Weight& w = linear.weight;
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = in.x + static_cast<int64_t>(token + m) * w.columns;
  Carried<F8> acc[M][NB] = {};
  for (int64_t k = 0; k < w.columns; ++k) {
    F8 rows[NB];
    for (int b = 0; b < NB; ++b) rows[b] = dense_rows<Kind>(w.codes, (blocks[b] * int64_t{w.columns} + k) * kRowBlock);
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < NB; ++b) multiply_add(acc[m][b], rows[b], all(x[m][k]));
  }
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < NB; ++b)
      store_rows(acc[m][b], linear, blocks[b] * kRowBlock, out.at(token + m, b));
}

using Tile = void (*)(const Linear&, const Input&, int token, Blocks blocks, const Output& out);

// Of 4-bit codes in groups of 32 columns and more, without biases and zero points.
template <int M, int NB>
Tile plain_tile() {
#if defined(__AVX512VNNI__)
  if constexpr (NB == 4 && M > 1) return wide_tile<M>;
  else
#endif
    return quantized_tile<M, NB, 4, false, 1>;
}

template <int M, int NB>
Tile tile_of(const Weight& w) {
  const bool halves = w.group < kGroup, biased = w.biases || w.zeros;
  switch (w.kind) {
    case kWeightF32: return dense_tile<M, NB, kWeightF32>;
    case kWeightF16: return dense_tile<M, NB, kWeightF16>;
    case kWeightBF16: return dense_tile<M, NB, kWeightBF16>;
    case kWeightU4:
      if (halves) return biased ? quantized_tile<M, NB, 4, true, 2> : quantized_tile<M, NB, 4, false, 2>;
      return biased ? quantized_tile<M, NB, 4, true, 1> : plain_tile<M, NB>();
    default:
      if (halves) return biased ? quantized_tile<M, NB, 8, true, 2> : quantized_tile<M, NB, 8, false, 2>;
      return biased ? quantized_tile<M, NB, 8, true, 1> : quantized_tile<M, NB, 8, false, 1>;
  }
}

template <int NB>
Tile tile_of(const Weight& w, int tokens) {
  switch (tokens) {
    case 1: return tile_of<1, NB>(w);
    case 2: return tile_of<2, NB>(w);
    case 3: return tile_of<3, NB>(w);
    case 4: return tile_of<4, NB>(w);
    case 5: return tile_of<5, NB>(w);
    default: return tile_of<kTileTokens, NB>(w);
  }
}

// The tokens [first, last) times NB row blocks; tiles of equal heights: 8 tokens are 4 + 4, not 6 + 2.
template <int NB>
void by_tiles(const Linear& linear, const Input& in, int first, int last, Blocks blocks, const Output& out) {
  const int tokens = last - first, tiles = (tokens + kTileTokens - 1) / kTileTokens;
  for (int tile = 0; tile < tiles; ++tile) {
    const int from = first + tokens * tile / tiles, to = first + tokens * (tile + 1) / tiles;
    tile_of<NB>(linear.weight, to - from)(linear, in, from, blocks, out);
  }
}

// How many streams of row blocks a product of so many tokens reads.
int linear_streams(const Weight& w, int64_t tokens) {
  if (tokens == 1) return kStreams;
  return w.kind >= kWeightU4 && panel_height(tokens) ? kPanelBlocks : kTileBlocks;
}

template <int NB>
void linear_step(const Linear& linear, const Input& in, int first, int last, Blocks blocks, const Output& out) {
  const auto step = in.panels.tiles ? by_panels<NB> : by_tiles<NB>;
  step(linear, in, first, last, blocks, out);
}

void linear_part(const Linear& linear, const Input& in, const Streams& streams, const Part& part,
                 const Target& target) {
  const int stride = streams.stride, whole = std::min(part.end, stride), last_stream = streams.width - 1;
  for (int i = part.begin; i < whole; ++i) {
    const Output out = target.of(i);
    if (streams.width == kPanelBlocks) linear_step<kPanelBlocks>(linear, in, part.first, part.last, {i, stride}, out);
    else tile_of<1, kStreams>(linear.weight)(linear, in, part.first, {i, stride}, out);
  }
  for (int i = std::max(part.begin, stride); i < part.end; ++i)
    linear_step<1>(linear, in, part.first, part.last, {stride * last_stream + i, 1}, target.of(i, last_stream));
}

// One row's values in the order of the inputs, as `linear_part` multiplies them.
void weight_row(const Weight& w, int row, float* out) {
  const int64_t block = row / kRowBlock, lane = row % kRowBlock;
  if (w.kind <= kWeightBF16) {
    const int64_t start = block * w.columns * kRowBlock + lane;
    for (int c = 0; c < w.columns; ++c) {
      const int64_t at = start + int64_t{c} * kRowBlock;
      if (w.kind == kWeightF32) out[c] = static_cast<const float*>(w.codes)[at];
      else if (w.kind == kWeightF16) out[c] = from_half(static_cast<const uint16_t*>(w.codes)[at]);
      else out[c] = from_bfloat(static_cast<const uint16_t*>(w.codes)[at]);
    }
    return;
  }
  const int bits = w.kind == kWeightU4 ? 4 : 8, padded = (w.columns + kGroup - 1) / kGroup * kGroup;
  const int64_t spans = num_spans(w, padded);
  const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + block * padded * bits;
  for (int c = 0; c < w.columns; ++c) {
    const int step = c / (32 / bits);
    const uint8_t byte = codes[int64_t{step} * 32 + lane * 4 + c % 4];
    const int code = bits == 8 ? byte : c % 8 < 4 ? byte & 15 : byte >> 4;
    const int64_t at = (block * spans + c / w.group) * kRowBlock + lane;
    const float scale = from_half(w.scales[at]);
    const int zero = w.zeros ? w.zeros[at] : 1 << (bits - 1);
    out[w.order ? w.order[c] : c] = w.biases ? code * scale + from_half(w.biases[at]) : (code - zero) * scale;
  }
}

}  // namespace kvant::KVANT_ISA
