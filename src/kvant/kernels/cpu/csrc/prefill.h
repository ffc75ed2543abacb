// Attention of many new tokens at once: a tile of query rows meets a tile of the context as two float products.
#pragma once

#include "attention.h"

namespace kvant::KVANT_ISA {

constexpr float kSlack = 8;  // weights may be up to 2^8: so few rows of sums are scaled again

template <int M, int NB>
inline void product_tile(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int inner) {
  F8 acc[M][NB];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NB; ++n) acc[m][n] = load<F8>(c + m * ldc + 8 * n);
  for (int k = 0; k < inner; ++k) {
    F8 row[NB];
    for (int n = 0; n < NB; ++n) row[n] = load<F8>(b + k * ldb + 8 * n);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < NB; ++n) acc[m][n] += row[n] * all(a[m * lda + k]);
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NB; ++n) store(c + m * ldc + 8 * n, acc[m][n]);
}

template <int NB>
inline void product_rows(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int inner) {
  int m = 0;
  for (; m + 6 <= rows; m += 6) product_tile<6, NB>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, inner);
  for (; m + 2 <= rows; m += 2) product_tile<2, NB>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, inner);
  for (; m < rows; ++m) product_tile<1, NB>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, inner);
}

// c [rows, columns] += a [rows, inner] b [inner, columns]; columns a multiple of 8.
inline void add_product(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int rows, int inner,
                        int columns) {
  int n = 0;
  for (; n + 16 <= columns; n += 16) product_rows<2>(a, lda, b + n, ldb, c + n, ldc, rows, inner);
  for (; n < columns; n += 8) product_rows<1>(a, lda, b + n, ldb, c + n, ldc, rows, inner);
}

// As many of a tile's tokens as are worked on: whole eights.
inline int width_of(const TileRows& it) { return (it.to + 7) & ~7; }

// A tile's vectors as the inner codec knows them, sinks too; tokens outside of it are zero.
inline void decode_tile(const Place& at, const Side& side, const TileRows& it, float* out) {
  std::fill(out, out + it.from * at.dim, 0.0f);
  std::fill(out + it.to * at.dim, out + width_of(it) * at.dim, 0.0f);
  for (int t = it.from; t < it.to; ++t) {
    const int64_t position = it.tile * kTile + t;
    float* x = out + t * at.dim;
    if (position < at.layer.sinks) {
      read_sink(side, at.dim, at.spot(0), position, x);
      shape_vector(side, at.layer, at.kv_head, at.dim, position, x);
    } else {
      decode_vector(side, at.kv_head, at.dim, it.spot(t), x);
    }
  }
}

// Adds to a tile's keys what their centre is to the inner codec: its expansion, transformed as they are.
inline void add_centre_to_keys(const Place& at, const TileRows& it, float* keys) {
  const Side& key = at.layer.key;
  const int64_t turn = it.tile * at.layer.turning;
  const float *cos = at.layer.turn_cos + turn, *sin = at.layer.turn_sin + turn;
  for (int j = 0; key.centre && j < key.order; ++j) {
    float term[kMaxHeadDim];
    std::memcpy(term, key.centre + (static_cast<int64_t>(at.kv_head) * key.order + j) * at.dim, sizeof(float) * at.dim);
    rope_row(term, cos, sin, at.layer.turning);
    if (key.balance) multiply_row(term, key.balance + at.kv_head * at.dim, at.dim);
    hadamard(term, at.dim);
    for (int t = it.from; t < it.to; ++t) {
      const F8 weight = all(at.layer.basis[j * kTile + t]);
      float* x = keys + t * at.dim;
      for (int i = 0; i < at.dim; i += 8) store(x + i, load<F8>(x + i) + weight * load<F8>(term + i));
    }
  }
}

// The first `count` vectors, a multiple of 8, by elements: out [dim][kTile].
inline void transpose_tile(const float* x, int dim, int count, float* out) {
  for (int t = 0; t < count; t += 8)
    for (int i = 0; i < dim; i += 8) {
      F8 held[8];
      for (int j = 0; j < 8; ++j) held[j] = load<F8>(x + (t + j) * dim + i);
      transpose8(held);
      for (int j = 0; j < 8; ++j) store(out + (i + j) * kTile + t, held[j]);
    }
}

// A prefill unit's rows: new tokens [first, last) times the query heads of a KV head, token by token.
struct Rows {
  int count = 0, shared;
  int64_t position;
  alignas(32) float inner[kTileRows * kMaxHeadDim], sums[kTileRows * kMaxHeadDim];
  alignas(32) float scores[kTileRows][kTile];
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

  int64_t position_of(int row) const { return position + row / shared; }

  void attend(const Place& at, const TileRows& it, const float* keys, const float* values) {
    const int width = width_of(it);
    std::fill(scores[0], scores[0] + count * kTile, 0.0f);
    add_product(inner, at.dim, keys, kTile, scores[0], kTile, count, at.dim, width);
    for (int row = 0; row < count; ++row) {
      const int64_t base = it.tile * kTile, window = at.shape.window;
      const int64_t from = window ? std::max<int64_t>(it.from, position_of(row) - window + 1 - base) : it.from;
      const int64_t to = std::min<int64_t>(it.to, position_of(row) + 1 - base);
      if (from < to) weigh(at, row, static_cast<int>(from), static_cast<int>(to), width);
      else std::fill(scores[row], scores[row] + width, 0.0f);
    }
    add_product(scores[0], kTile, values, at.dim, sums, at.dim, count, width, at.dim);
  }

 private:
  // Turns a row's scores of tokens [from, to) into weights, those of others into next to nothing.
  void weigh(const Place& at, int row, int from, int to, int width) {
    cap_scores(scores[row], width, at.shape.softcap);
    mask_scores(scores[row], from, to, width);
    const float kept = softmax[row].raise(scores[row], width, kSlack);
    if (kept != 1) scale_row(sums + row * at.dim, at.dim, kept);
    softmax[row].weigh(scores[row], width);
  }
};

// New tokens [first, last) of a sequence, at most kTileRows with the heads of one KV head, and all that they attend to.
void attend_tile(const AttentionWork& work, int sequence, int first, int last, int kv_head) {
  const Place at(work, sequence, kv_head);
  Rows rows(at, work, first, last);
  const int64_t newest = work.batch->positions[last - 1];
  const int64_t oldest = at.shape.window ? std::max<int64_t>(0, rows.position - at.shape.window + 1) : 0;
  alignas(32) float keys[kTile * kMaxHeadDim], turned[kTile * kMaxHeadDim], values[kTile * kMaxHeadDim];
  for (int64_t tile = oldest / kTile * kTile; tile <= newest; tile += kTile) {
    const TileRows it(at, tile, std::max(tile, oldest), std::min<int64_t>(tile + kTile, newest + 1));
    decode_tile(at, at.layer.key, it, keys);
    add_centre_to_keys(at, it, keys);
    transpose_tile(keys, at.dim, width_of(it), turned);
    decode_tile(at, at.layer.value, it, values);
    rows.attend(at, it, turned, values);
  }
  for (int row = 0; row < rows.count; ++row) {
    float* x = rows.sums + row * at.dim;
    scale_row(x, at.dim, 1.0f / rows.softmax[row].total());
    finish_output(at, x);
    const int64_t token = first + row / rows.shared;
    const int64_t head = token * at.shape.heads + kv_head * rows.shared + row % rows.shared;
    std::memcpy(work.out + head * at.dim, x, sizeof(float) * at.dim);
  }
}

}  // namespace kvant::KVANT_ISA
