// Attention of many new tokens at once: a tile of query rows meets a tile of the context as two float products.
#pragma once

#include "prefill_rows.h"

namespace kvant::KVANT_ISA {

template <int M, int NB>
inline void product_tile(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int inner) {
  Carried<F8> acc[M][NB];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NB; ++n) acc[m][n] = load<F8>(c + m * ldc + 8 * n);
  for (int k = 0; k < inner; ++k) {
    F8 row[NB];
    for (int n = 0; n < NB; ++n) row[n] = load<F8>(b + k * ldb + 8 * n);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < NB; ++n) multiply_add(acc[m][n], row[n], all(a[m * lda + k]));
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < NB; ++n) store<F8>(c + m * ldc + 8 * n, acc[m][n]);
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

// A tile's keys likewise, with what their centre is to the inner codec.
inline void decode_keys(const Place& at, const TileRows& it, float* keys) {
  const Side& key = at.layer.key;
  decode_tile(at, key, it, keys);
  for (int j = 0; key.centre && j < key.order; ++j) {
    float term[kMaxHeadDim];
    centre_term(at, it.tile, j, term);
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

// A tile's keys, by elements, and values as floats, and room for the rows' scores.
class FloatTile {
 public:
  void attend(const Place& at, const TileRows& it, Rows& rows) {
    alignas(32) float keys[kTile * kMaxHeadDim];
    decode_keys(at, it, keys);
    transpose_tile(keys, at.dim, width_of(it), keys_);
    decode_tile(at, at.layer.value, it, values_);
    const int width = width_of(it);
    std::fill(scores_[0], scores_[0] + rows.count * kTile, 0.0f);
    add_product(rows.inner, at.dim, keys_, kTile, scores_[0], kTile, rows.count, at.dim, width);
    for (int row = 0; row < rows.count; ++row) weigh(at, it, rows, row, width);
    add_product(scores_[0], kTile, values_, at.dim, rows.sums, at.dim, rows.count, width, at.dim);
  }

 private:
  alignas(32) float keys_[kTile * kMaxHeadDim], values_[kTile * kMaxHeadDim], scores_[kTileRows][kTile];

  // Turns a row's scores of what it sees into weights, the others into next to nothing.
  void weigh(const Place& at, const TileRows& it, Rows& rows, int row, int width) {
    const auto [from, to] = rows.seen(at, it, row);
    if (from >= to) return std::fill(scores_[row], scores_[row] + width, 0.0f);
    cap_scores(scores_[row], width, at.shape.softcap);
    mask_scores(scores_[row], from, to, width);
    const float kept = rows.softmax[row].raise(scores_[row], width, kSlack);
    if (kept != 1) scale_row(rows.sums + row * at.dim, at.dim, kept);
    rows.softmax[row].weigh(scores_[row], width);
  }
};

}  // namespace kvant::KVANT_ISA
