// Attention of many new tokens to 4-bit keys and values by integer dots: a tile of the context is spread to bytes once
// for all query rows, of which kRowTile are worked on at a time.
#pragma once

#include "panels.h"
#include "prefill_rows.h"

namespace kvant::KVANT_ISA {

#if defined(__AVX512VNNI__)
constexpr int kRowTile = 12;  // sixteen lanes are one register
#else
constexpr int kRowTile = 6;
#endif
static_assert(kTileRows % kRowTile == 0, "rows behind the last have a place");
constexpr int kPanelLanes = 16;  // tokens or dims whose dots stay in registers
constexpr int kStepsAtOnce = 8;  // of four codes each, that `Dot` adds up
constexpr int kTileSteps = kTile / 4;
constexpr int kCodeWidth = 4 * kStepsAtOnce;  // tokens that a tile's weights come in

inline bool attends_by_codes(const Place& at) {
  const Side &key = at.layer.key, &value = at.layer.value;
  return is_4bit(key.kind) && key_is_integer(key, at.dim) && value_is_integer(value, at.dim) &&
         has_narrow_weights(value, at.dim);
}

// A tile's codes and words of one side, put together; those of tokens outside of it are zero.
struct Gathered {
  alignas(kAlign) uint8_t codes[kTile * kMaxHeadDim / 2];
  alignas(kAlign) uint16_t words[kTile * kMaxGroups];

  Gathered(const Place& at, const Side& side, const TileRows& it) {
    const int pitch = code_bytes(side, at.dim), width = meta_words(side);
    const auto clear = [&](int begin, int end) {
      std::fill(codes + begin * pitch, codes + end * pitch, uint8_t{0});
      std::fill(words + begin * width, words + end * width, uint16_t{0});
    };
    clear(0, it.from);
    clear(it.to, kTile);
    for (int i = 0; i < it.count; ++i) {
      const auto [begin, end, spot] = it.runs[i];
      std::memcpy(codes + begin * pitch, codes_at<uint8_t>(side, at.dim, spot), (end - begin) * pitch);
      std::memcpy(words + begin * width, meta_at(side, spot), sizeof(uint16_t) * (end - begin) * width);
    }
  }
};

// Keys' codes [kTile][dim / 2] as bytes: [16 tokens][step of 4 dims][2][8 tokens][4], dims in the order of a narrow
// query's.
inline void spread_keys(const uint8_t* rows, int dim, uint8_t* out) {
  const int pitch = dim / 2, steps = dim / 4;
  for (int t = 0; t < kTile; t += 8)
    for (int b = 0; b < pitch; b += 16) {
      B32 lanes[4];
      lanes_of_rows(rows + t * pitch + b, pitch, lanes);
      uint8_t* to = out + ((t / kPanelLanes * steps + b / 2) * 2 + t / 8 % 2) * 32;
      for (int j = 0; j < 4; ++j, to += 128) {
        store(to, lanes[j] & 15);
        store(to + 64, as<B32>(as<U8>(lanes[j]) >> 4) & 15);
      }
    }
}

typedef uint8_t B16 __attribute__((vector_size(16)));

// Bytes of four rows side by side: `First` to `First` + 7 of each.
template <int First>
inline B32 interleave_rows(const B16 (&x)[4]) {
  static constexpr int f = First, s = First + 16;  // clang would have the closure capture them
  const auto zip = [](B16 a, B16 b) {
    return as<W8>(__builtin_shufflevector(a, b, f, s, f + 1, s + 1, f + 2, s + 2, f + 3, s + 3, f + 4, s + 4, f + 5,
                                          s + 5, f + 6, s + 6, f + 7, s + 7));
  };
  return as<B32>(__builtin_shufflevector(zip(x[0], x[1]), zip(x[2], x[3]), 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6,
                                         14, 7, 15));
}

// Values' codes [kTile][dim / 2], less 8, as bytes: [16 dims][step of 4 tokens][even dims, odd dims][8 dims][4].
inline void spread_values(const uint8_t* rows, int dim, uint8_t* out) {
  const int pitch = dim / 2;
  for (int t = 0; t < kTile; t += 4)
    for (int b = 0; b < pitch; b += 16) {
      B16 x[4];
      for (int i = 0; i < 4; ++i) x[i] = load<B16>(rows + (t + i) * pitch + b);
      uint8_t* to = out + (b / 8 * kTileSteps + t / 4) * 64;
      for (const B32 bytes : {interleave_rows<0>(x), interleave_rows<8>(x)}) {
        store(to, (bytes & 15) - 8);
        store(to + 32, (as<B32>(as<U8>(bytes) >> 4) & 15) - 8);
        to += kTileSteps * 64;
      }
    }
}

// A tile of the context: bytes, what they mean, and what the keys' centre is to them.
struct CodeTile {
  alignas(kAlign) uint8_t keys[kTile * kMaxHeadDim], values[kTile * kMaxHeadDim];
  alignas(kAlign) float terms[kMaxOrder][kMaxHeadDim] = {};
  Steps key_steps, value_steps;

  CodeTile(const Place& at, const TileRows& it)
      : CodeTile(at, it, Gathered(at, at.layer.key, it), Gathered(at, at.layer.value, it)) {}

 private:
  CodeTile(const Place& at, const TileRows& it, const Gathered& key, const Gathered& value)
      : key_steps(at.layer.key, at.kv_head, key.words, kTile, it.from, it.to),
        value_steps(at.layer.value, at.kv_head, value.words, kTile, it.from, it.to) {
    spread_keys(key.codes, at.dim, keys);
    spread_values(value.codes, at.dim, values);
    for (int g = 0; g < groups_of(at.layer.value); ++g)
      map_row(value_steps.scale[g], kTile, value_steps.shift[g],
              [&](int t, F8 scale, int) { return load<F8>(value_steps.shift[g] + t) - all(8.0f) * scale; });
    for (int j = 0; at.layer.key.centre && j < at.layer.key.order; ++j) centre_term(at, it.tile, j, terms[j]);
  }
};

// Calls use(m, lane, dots) for a tile's rows' numbers, [step][4] and `Pitch` apart, and 16 lanes' codes, [step][2][32],
// for as many lanes at a time as a register has. Codes are unsigned, or else the rows' numbers are.
#if defined(__AVX512VNNI__)
template <int Steps, int Pitch, bool Unsigned, class Use>
inline void code_dots(const uint8_t* codes, const int8_t* x, const Use& use) {
  __m512i dots[kRowTile] = {};
  for (int first = 0; first < Steps; first += kStepsAtOnce) {
    KVANT_UNROLL
    for (int s = 0; s < kStepsAtOnce; ++s, codes += 64, x += 4) {
      const __m512i c = load<__m512i>(codes);
      for (int m = 0; m < kRowTile; ++m) {
        const __m512i a = _mm512_set1_epi32(load<int32_t>(x + m * Pitch));
        dots[m] = Unsigned ? _mm512_dpbusd_epi32(dots[m], c, a) : _mm512_dpbusd_epi32(dots[m], a, c);
      }
    }
  }
  for (int m = 0; m < kRowTile; ++m) use(m, 0, (I16)dots[m]);
}
#else
template <int Steps, int Pitch, bool Unsigned, class Use>
inline void code_dots(const uint8_t* codes, const int8_t* x, const Use& use) {
  static_assert(Steps * 2 * (Unsigned ? 15 : 8) * 127 <= 32767, "sums fit 16 bits");
  Dot dots[kRowTile][2];
  for (int first = 0; first < Steps; first += kStepsAtOnce) {
    KVANT_UNROLL
    for (int s = 0; s < kStepsAtOnce; ++s, codes += 64, x += 4) {
      const B32 c[2] = {load<B32>(codes), load<B32>(codes + 32)};
      for (int m = 0; m < kRowTile; ++m) {
        const B32 a = broadcast4(x + m * Pitch);
        for (int b = 0; b < 2; ++b) Unsigned ? dots[m][b].add(c[b], a) : dots[m][b].add(a, c[b]);
      }
    }
  }
  for (int m = 0; m < kRowTile; ++m)
    for (int b = 0; b < 2; ++b) use(m, 8 * b, dots[m][b].total());
}
#endif

// The query rows as integers, and what of their sums is not in floats yet. While a CodeRows is at work, a row's sums
// are in the order of `spread_values`: of 16 dims the even ones, then the odd ones.
class CodeRows {
 public:
  CodeRows(const Place& at, Rows& rows) {
    for (int row = 0; row < rows.count; ++row) {
      IntegerQuery query;
      quantize_query(at.layer.key, rows.inner + row * at.dim, at.dim, &query);
      std::copy(query.narrow, query.narrow + at.dim, queries_[row]);
      std::copy(query.step, query.step + kMaxGroups, step_[row]);
      std::copy(query.sum, query.sum + kMaxGroups, sum_[row]);
      reorder(rows.sums + row * at.dim, at.dim, [](F8& a, F8& b) {
        const F8 x = a, y = b;
        a = __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
        b = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
      });
    }
  }

  void attend(const Place& at, const TileRows& it, Rows& rows) {
    const CodeTile tile(at, it);
    for (int first = 0; first < rows.count; first += kRowTile) {
      const int last = std::min(rows.count, first + kRowTile) - 1;
      const int from = rows.seen(at, it, first).from, to = rows.seen(at, it, last).to;
      if (from < to) attend_rows(at, it, tile, rows, first, last + 1, (to + kCodeWidth - 1) & -kCodeWidth);
    }
  }

  // Puts the rows' sums in the order of dims, and takes the values' shifts from them.
  void finish(const Place& at, Rows& rows) const {
    const int size = at.dim / groups_of(at.layer.value);
    for (int row = 0; row < rows.count; ++row) {
      float* x = rows.sums + row * at.dim;
      for (int d = 0; d < at.dim; d += size) {
        const F8 shift = all(sum(shifts_[row][d / size]));
        map_row(x + d, size, x + d, [&](int, F8 v, int) { return v - shift; });
      }
      reorder(x, at.dim, [](F8& a, F8& b) {
        const F8 even = a, odd = b;
        a = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
        b = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
      });
    }
  }

 private:
  alignas(kAlign) int8_t queries_[kTileRows][kMaxHeadDim] = {};
  float step_[kTileRows][kMaxGroups] = {}, sum_[kTileRows][kMaxGroups] = {};
  F8 shifts_[kTileRows][kMaxGroups] = {};  // what the weights made of the values' shifts
  // Of the rows at hand. Behind a tile's last row they are anything, and so become sums that nobody uses.
  alignas(kAlign) float scores_[kRowTile][kTile] = {};
  alignas(kAlign) int8_t weights_[kMaxGroups][kRowTile][kTile] = {};
  float units_[kRowTile] = {};
  bool seen_[kRowTile] = {};

  template <class Reorder>
  static void reorder(float* x, int dim, Reorder two) {
    for (int d = 0; d < dim; d += 16) {
      F8 a = load<F8>(x + d), b = load<F8>(x + d + 8);
      two(a, b);
      store(x + d, a);
      store(x + d + 8, b);
    }
  }

  // Rows [first, last), at most kRowTile, and the tile's first `width` tokens.
  void attend_rows(const Place& at, const TileRows& it, const CodeTile& tile, Rows& rows, int first, int last,
                   int width) {
    start_scores(at, tile, rows, first, last);
    add_scores(at, tile, first, width);
    for (int row = first; row < last; ++row) raise(at, it, rows, row, row - first, width);
    with_count<kMaxGroups>(groups_of(at.layer.value), [&](auto groups) {
      with_tile(width, [&](auto count) { weigh<groups()>(tile, rows, first, last, count); });
    });
    add_values(at, tile, rows.sums + first * at.dim, width);
  }

  // What the keys' centre and their shifts make of the scores of rows [first, last).
  void start_scores(const Place& at, const CodeTile& tile, const Rows& rows, int first, int last) {
    alignas(kAlign) float weights[kRowTile][kMaxOrder];
    const int order = at.layer.key.centre ? at.layer.key.order : 0;
    for (int row = first; order && row < last; ++row)
      centre_weights(at, tile, rows.inner + row * at.dim, weights[row - first]);
    with_count<kMaxOrder + 1>(order + 1, [&](auto terms) {
      with_count<kMaxGroups>(groups_of(at.layer.key), [&](auto groups) {
        for (int row = first; row < last; ++row)
          start_row<terms() - 1, groups()>(at, tile, weights[row - first], sum_[row], scores_[row - first]);
      });
    });
  }

  static void centre_weights(const Place& at, const CodeTile& tile, const float* query, float* weights) {
    F8 dots[kMaxOrder] = {};
    for (int i = 0; i < at.dim; i += 8)
      for (int j = 0; j < kMaxOrder; ++j) dots[j] += load<F8>(query + i) * load<F8>(tile.terms[j] + i);
    sums4(dots, weights);
  }

  template <int Order, int Groups>
  static void start_row(const Place& at, const CodeTile& tile, const float* weights, const float* sum, float* out) {
    for (int t = 0; t < kTile; t += kLanesOf<FWide>) {
      FWide score = all<FWide>(0.0f);
      for (int j = 0; j < Order; ++j) score += all<FWide>(weights[j]) * load<FWide>(at.layer.basis + j * kTile + t);
      for (int g = 0; g < Groups; ++g) score -= all<FWide>(sum[g]) * load<FWide>(tile.key_steps.shift[g] + t);
      store(out + t, score);
    }
  }

  void add_scores(const Place& at, const CodeTile& tile, int first, int width) {
    const int groups = groups_of(at.layer.key), steps = at.dim / 4;
    const uint8_t* codes = tile.keys;
    for (int t = 0; t < width; t += kPanelLanes)
      for (int s = 0; s < steps; s += kStepsAtOnce, codes += kStepsAtOnce * 64) {
        const int g = s * groups / steps;
        const float* scales = tile.key_steps.scale[g] + t;
        code_dots<kStepsAtOnce, kMaxHeadDim, true>(codes, queries_[first] + 4 * s, [&](int m, int lane, IWide dots) {
          float* score = scores_[m] + t + lane;
          const FWide product = to_float(dots) * all<FWide>(step_[first + m][g]);
          store(score, load<FWide>(score) + load<FWide>(scales + lane) * product);
        });
      }
  }

  // Notes a row's largest score, and takes those out that it does not see.
  void raise(const Place& at, const TileRows& it, Rows& rows, int row, int m, int width) {
    const auto [from, to] = rows.seen(at, it, row);
    seen_[m] = from < to;
    if (!seen_[m]) return;
    cap_scores(scores_[m], width, at.shape.softcap);
    if (from > 0 || to < width) mask_scores(scores_[m], from, to, width);
    const float kept = rows.softmax[row].raise(scores_[m], width, kSlack);
    if (kept == 1) return;
    scale_row(rows.sums + row * at.dim, at.dim, kept);
    for (F8& shift : shifts_[row]) shift *= all(kept);
  }

  // Turns scores into rounded weights.
  template <int Groups, class Count>
  void weigh(const CodeTile& tile, Rows& rows, int first, int last, Count width) {
    alignas(kAlign) float scaled[kRowTile][Groups][kTile];
    for (int row = first, m = 0; row < last; ++row, ++m) {
      float top = 0;
      if (seen_[m])
        top = scale_weights<Groups>(scores_[m], tile.value_steps, width, rows.softmax[row], shifts_[row], scaled[m]);
      units_[m] = top / kTopNarrow;
    }
    for (int m = 0; m < last - first; ++m)
      for (int g = 0; g < Groups; ++g) round_weights(scaled[m][g], width, m, weights_[g][m]);
  }

  template <class Count>
  void round_weights(const float* scaled, Count width, int m, int8_t* out) const {
    if (!seen_[m]) return std::fill(out, out + width, int8_t{0});
    const FWide inverse = all<FWide>(units_[m] > 0 ? 1.0f / units_[m] : 0.0f);
    for (int t = 0; t < width; t += 32) {
      constexpr int kAtOnce = kLanesOf<FWide>;
      IWide rounded[32 / kAtOnce];
      for (int i = 0; i < 32 / kAtOnce; ++i) {
        const int slot = t + kAtOnce * i;
        rounded[i] = to_int(dithered(load<FWide>(scaled + slot), inverse, slot));
      }
      store_bytes(out + t, rounded);
    }
  }

  void add_values(const Place& at, const CodeTile& tile, float* sums, int width) const {
    const int size = at.dim / groups_of(at.layer.value);
    const uint8_t* codes = tile.values;
    for (int d = 0; d < at.dim; d += kPanelLanes, codes += kTileSteps * 64) {
      const auto add = [&](int m, int lane, IWide dots) { add_scaled(dots, units_[m], sums + m * at.dim + d + lane); };
      const int8_t* weights = weights_[d / size][0];
      width == kTile ? code_dots<kTileSteps, kTile, false>(codes, weights, add)
                     : code_dots<kTileSteps / 2, kTile, false>(codes, weights, add);
    }
  }
};

}  // namespace kvant::KVANT_ISA
