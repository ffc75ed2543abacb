// A tile of the context as the integer dots of a prefill take it: 4-bit codes spread to bytes once for all query rows.
#pragma once

#include "prefill_rows.h"

namespace kvant::KVANT_ISA {

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

typedef uint8_t B16 __attribute__((vector_size(16)));

constexpr int kTileLanes = 16;  // tokens, or dims of values, that lie side by side

// Keys' codes [kTile][dim / 2] as bytes: [16 tokens][8 dims][the four even ones, the odd ones][16 tokens][4].
inline void spread_keys(const uint8_t* rows, int dim, uint8_t* out) {
  const int pitch = dim / 2, steps = dim / 4;
  for (int t = 0; t < kTile; t += 8)
    for (int b = 0; b < pitch; b += 16) {
      B32 lanes[4];
      lanes_of_rows(rows + t * pitch + b, pitch, lanes);
      uint8_t* to = out + ((t / kTileLanes * steps + b / 2) * 2 + t / 8 % 2) * 32;
      for (int j = 0; j < 4; ++j, to += 128) {
        store(to, lanes[j] & 15);
        store(to + 64, as<B32>(as<U8>(lanes[j]) >> 4) & 15);
      }
    }
}

// Bytes of four rows side by side: `First` to `First` + 7 of each.
template <int First>
inline B32 interleave_rows(const B16 (&x)[4]) {
  static constexpr int f = First, s = First + 16;  // clang would have the closure capture them
  const auto zip = [](B16 a, B16 b) {
    return as<H8>(__builtin_shufflevector(a, b, f, s, f + 1, s + 1, f + 2, s + 2, f + 3, s + 3, f + 4, s + 4, f + 5,
                                          s + 5, f + 6, s + 6, f + 7, s + 7));
  };
  return as<B32>(__builtin_shufflevector(zip(x[0], x[1]), zip(x[2], x[3]), 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6,
                                         14, 7, 15));
}

constexpr int kTileSteps = kTile / 4;

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

// A tile: bytes, what they mean, and what the keys' centre is to them.
struct CodeTile {
  alignas(kAlign) uint8_t keys[kTile * kMaxHeadDim], values[kTile * kMaxHeadDim];
  alignas(kAlign) float terms[kMaxOrder][kMaxHeadDim];
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

}  // namespace kvant::KVANT_ISA
