// What a unit of a prefill attends with where keys and values meet it as floats: the query rows of some new tokens, and
// their sums so far. And what it shares with one that attends to codes.
#pragma once

#include "attention.h"

namespace kvant::KVANT_ISA {

constexpr float kSlack = 8;  // weights may be up to 2^8: so few rows of sums are scaled again

// New tokens [first, last) times the query heads of a KV head, token by token.
struct Rows {
  int count = 0, shared;
  int64_t position;
  alignas(kAlign) float inner[kTileRows * kMaxHeadDim], sums[kTileRows * kMaxHeadDim];
  Softmax softmax[kTileRows];

  Rows(const Place& at, const AttentionWork& work, int first, int last)
      : shared(at.shape.heads / at.shape.kv_heads), position(work.batch->positions[first]) {
    for (int token = first; token < last; ++token)
      for (int h = 0; h < shared; ++h, ++count) {
        const int64_t head = static_cast<int64_t>(at.kv_head) * shared + h;
        float raw[kMaxHeadDim];
        make_query(at, work.q + token * work.q_stride + head * at.dim, raw, inner + count * at.dim);
      }
    std::fill(sums, sums + count * at.dim, 0.0f);
  }

  // Those of a tile that a row sees: [from, to), or none where from is not below to.
  struct Seen {
    int from, to;
  };
  Seen seen(const Place& at, const TileRows& it, int row) const {
    const int64_t self = position + row / shared, base = it.tile * kTile, window = at.shape.window;
    const int64_t oldest = window ? self - window + 1 - base : 0, next = self + 1 - base;
    return {static_cast<int>(std::clamp<int64_t>(oldest, it.from, kTile)),
            static_cast<int>(std::clamp<int64_t>(next, 0, it.to))};
  }

  // Writes the outputs.
  void finish(const Place& at, const AttentionWork& work, int first) {
    for (int row = 0; row < count; ++row) {
      float* x = sums + row * at.dim;
      scale_row(x, at.dim, 1.0f / softmax[row].total());
      finish_output(at, x);
      const int64_t token = first + row / shared;
      const int64_t head = token * at.shape.heads + at.kv_head * shared + row % shared;
      std::memcpy(work.out + head * at.dim, x, sizeof(float) * at.dim);
    }
  }
};

// What the centre's term j is to a tile's keys as the inner codec knows them, [dim].
inline void centre_term(const Place& at, int64_t tile, int j, float* term) {
  const Side& key = at.layer.key;
  const int64_t turn = tile * at.layer.turning;
  std::memcpy(term, key.centre + (static_cast<int64_t>(at.kv_head) * key.order + j) * at.dim, sizeof(float) * at.dim);
  rope_row(term, at.layer.turn_cos + turn, at.layer.turn_sin + turn, at.layer.turning);
  if (key.balance) multiply_row(term, key.balance + at.kv_head * at.dim, at.dim);
  hadamard(term, at.dim);
}

}  // namespace kvant::KVANT_ISA
