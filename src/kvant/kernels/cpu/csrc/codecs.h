// The KV cache's vectors: where they lie, what shapes them, and from stored bytes back to floats, as
// kvant.formats.kv_codecs defines them.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "vectors.h"

namespace kvant::KVANT_ISA {

// Where a head's vector lies in a plane: a block, and its number within the block.
struct Spot {
  int64_t block;
  int index;
  Spot operator+(int tokens) const { return {block, index + tokens}; }
};

inline Spot spot_of(const KvLayer& layer, int head, int64_t slot) {
  return {slot / layer.block_size, head * layer.block_size + static_cast<int>(slot % layer.block_size)};
}

inline int code_bytes(const Side& side, int dim) {
  switch (side.kind) {
    case kVectorF32: return 4 * dim;
    case kVectorF16:
    case kVectorBF16: return 2 * dim;
    case kVectorAffine4:
    case kVectorGrouped4: return dim / 2;
    default: return dim;
  }
}

// 16-bit words beside a vector's codes.
inline int meta_words(const Side& side) {
  switch (side.kind) {
    case kVectorAffine8:
    case kVectorAffine4: return 2;
    case kVectorGrouped4: return side.groups;
    case kVectorSymmetric8: return 1;
    default: return 0;
  }
}

template <class T>
inline T* codes_at(const Side& side, int dim, Spot spot) {
  return reinterpret_cast<T*>(static_cast<uint8_t*>(side.codes) + spot.block * side.codes_stride +
                              static_cast<int64_t>(spot.index) * code_bytes(side, dim));
}

inline uint16_t* meta_at(const Side& side, Spot spot) {
  return reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(side.meta) + spot.block * side.meta_stride) +
         spot.index * meta_words(side);
}

// c(m), the centre of a head's keys at a position; see kvant.formats.kv_stats.Centre.
inline void centre_at(const Side& side, const KvLayer& layer, int head, int dim, int64_t position, float* out) {
  const float* coefficients = side.centre + static_cast<int64_t>(head) * side.order * dim;
  const int64_t tile = position / kCentreTile;
  for (int i = 0; i < dim; i += 8) {
    F8 sum = all(0.0f);
    for (int j = 0; j < side.order; ++j)
      sum += all(layer.basis[j * kCentreTile + position % kCentreTile]) * load<F8>(coefficients + j * dim + i);
    store(out + i, sum);
  }
  rope_row(out, layer.turn_cos + tile * layer.turning, layer.turn_sin + tile * layer.turning, layer.turning);
}

// As the inner codec of a shaped side gets a vector: centred, balanced, rotated.
inline void shape_vector(const Side& side, const KvLayer& layer, int head, int dim, int64_t position, float* x) {
  if (!side.shaped) return;
  float centre[kMaxHeadDim];
  if (side.centre) {
    centre_at(side, layer, head, dim, position, centre);
    for (int i = 0; i < dim; i += 8) store(x + i, load<F8>(x + i) - load<F8>(centre + i));
  }
  if (side.balance) multiply_row(x, side.balance + head * dim, dim);
  hadamard(x, dim);
}

// The raw vector of the sink at `position`; first: its sequence's first slot, in whose block all sinks lie.
inline void read_sink(const Side& side, int dim, Spot first, int64_t position, float* x) {
  const uint16_t* halves = codes_at<uint16_t>(side, dim, first + kSinkSpan * static_cast<int>(position));
  for (int i = 0; i < dim; i += 8) store(x + i, load_half(halves + i));
}

// What a word of `kVectorGrouped4` means: x = code * scale - shift.
inline void split_word(uint16_t word, float* scale, float* shift) {
  *scale = from_half((word & 0xffc0) >> 1);
  *shift = *scale * (7.5f + static_cast<float>((word & 63) - 32) / 8.0f);
}

// The stored vector as its inner codec knows it (a shaped side's transforms are not undone), for any kind.
inline void decode_vector(const Side& side, int head, int dim, Spot spot, float* x) {
  const uint8_t* codes = codes_at<uint8_t>(side, dim, spot);
  const uint16_t* meta = meta_at(side, spot);
  float scale = 1, shift = 0;
  switch (side.kind) {
    case kVectorF32: std::memcpy(x, codes, sizeof(float) * dim); return;
    case kVectorF16:
      for (int i = 0; i < dim; i += 8) store(x + i, load_half(reinterpret_cast<const uint16_t*>(codes) + i));
      return;
    case kVectorBF16:
      for (int i = 0; i < dim; i += 8) store(x + i, load_bfloat(reinterpret_cast<const uint16_t*>(codes) + i));
      return;
    case kVectorGrouped4:
      for (int g = 0, size = dim / side.groups; g < side.groups; ++g) {
        split_word(meta[g], &scale, &shift);
        int i = g * size;
        for (; i % 2 == 0 && i + 8 <= (g + 1) * size; i += 8)
          store(x + i, to_float(nibbles(codes + i / 2)) * all(scale) - all(shift));
        for (; i < (g + 1) * size; ++i) x[i] = (codes[i / 2] >> (i % 2 * 4) & 15) * scale - shift;
      }
      return;
    case kVectorAffine4:
      scale = from_half(meta[0]), shift = from_half(meta[1]);
      for (int i = 0; i < dim; i += 8) store(x + i, to_float(nibbles(codes + i / 2)) * all(scale) + all(shift));
      return;
    case kVectorAffine8:
      scale = from_half(meta[0]), shift = from_half(meta[1]);
      for (int i = 0; i < dim; i += 8)
        store(x + i, to_float(wide_bytes(codes + i)) * all(scale) + all(shift));
      return;
    default: {
      const auto signs = reinterpret_cast<const int8_t*>(codes);
      scale = side.kind == kVectorStatic8 ? side.scale[head] : from_half(meta[0]);
      for (int i = 0; i < dim; i += 8)
        store(x + i, to_float(wide_bytes(signs + i)) * all(scale));
    }
  }
}

inline void decode_eight(const Side& side, int head, int dim, Spot first, float* out) {
  for (int i = 0; i < 8; ++i) decode_vector(side, head, dim, first + i, out + i * dim);
}

}  // namespace kvant::KVANT_ISA
