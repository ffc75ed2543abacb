// The KV cache's vectors: from floats to stored bytes and back, as kvant.formats.kv_codecs defines them.
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
  std::fill(out, out + dim, 0.0f);
  for (int j = 0; j < side.order; ++j) {
    const F8 weight = all(layer.basis[j * kCentreTile + position % kCentreTile]);
    for (int i = 0; i < dim; i += 8) store(out + i, load<F8>(out + i) + weight * load<F8>(coefficients + j * dim + i));
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

inline void span_of(const float* x, int count, float* low, float* high) {
  *low = *high = x[0];
  for (int i = 1; i < count; ++i) {
    *low = std::min(*low, x[i]);
    *high = std::max(*high, x[i]);
  }
}

constexpr float kHalfLimit = 65504.0f;

inline float within(float x, float limit) { return std::min(std::max(x, -limit), limit); }

inline void put4(const float* codes, int dim, uint8_t* out) {
  for (int i = 0; i < dim / 2; ++i) out[i] = static_cast<uint8_t>(codes[2 * i]) | static_cast<uint8_t>(codes[2 * i + 1]) << 4;
}

inline void encode_affine(const float* x, int dim, int bits, uint8_t* out, uint16_t* affine) {
  float low, high, codes[kMaxHeadDim];
  span_of(x, dim, &low, &high);
  const float levels = static_cast<float>((1 << bits) - 1);
  affine[1] = to_half(within(low, kHalfLimit));
  const float zero = from_half(affine[1]);
  affine[0] = to_half(std::min(std::max((high - zero) / levels, 0.0f), kHalfLimit));
  const float scale = from_half(affine[0]);
  for (int i = 0; i < dim; ++i)
    codes[i] = scale > 0 ? within(std::nearbyint((x[i] - zero) / scale) - levels / 2, levels / 2) + levels / 2 : 0.0f;
  if (bits == 4) put4(codes, dim, out);
  else
    for (int i = 0; i < dim; ++i) out[i] = static_cast<uint8_t>(codes[i]);
}

// 4-bit codes of x / scale + shift, each rounding's error handed on to the elements that follow, where there is
// feedback. Eight elements at a time are rounded one by one, then what they make of the others is added up at once.
inline void round4(float* x, const float* scale, const float* shift, const float* feedback, int dim, float* codes) {
  for (int first = 0; first < dim; first += 8) {
    float errors[8];
    F8 held = load<F8>(x + first);
    for (int k = 0; k < 8; ++k) {
      const int i = first + k;
      const float step = scale[i] > 0 ? scale[i] : 1.0f, aim = held[k] / step + shift[i];
      codes[i] = std::min(std::max(std::nearbyint(aim), 0.0f), 15.0f);
      errors[k] = (aim - codes[i]) * scale[i];
      if (feedback) held -= all(errors[k]) * load<F8>(feedback + static_cast<int64_t>(i) * dim + first);  // 0 up to i
    }
    if (!feedback) continue;
    for (int j = first + 8; j < dim; j += 8) {
      F8 later = load<F8>(x + j);
      for (int k = 0; k < 8; ++k) later -= all(errors[k]) * load<F8>(feedback + static_cast<int64_t>(first + k) * dim + j);
      store(x + j, later);
    }
  }
}

inline void encode_grouped(float* x, int dim, int groups, const float* feedback, uint8_t* out, uint16_t* words) {
  const int size = dim / groups;
  float scales[kMaxHeadDim], shifts[kMaxHeadDim], codes[kMaxHeadDim], low, high;
  for (int g = 0; g < groups; ++g) {
    span_of(x + g * size, size, &low, &high);
    const float span = (high / 2 - low / 2) / 7.5f, middle = std::fabs(high / 2 + low / 2) / 3.875f;
    const int bits = (to_half(std::min(std::max(span, middle), 63488.0f)) + 31) / 32;
    const float scale = from_half(static_cast<uint16_t>(bits * 32));
    const float eighths = std::nearbyint((-low / (scale > 0 ? scale : 1.0f) - 7.5f) * 8.0f);
    const int offset = static_cast<int>(std::min(std::max(eighths, -32.0f), 31.0f));
    std::fill(scales + g * size, scales + (g + 1) * size, scale);
    std::fill(shifts + g * size, shifts + (g + 1) * size, 7.5f + static_cast<float>(offset) / 8.0f);
    words[g] = static_cast<uint16_t>(bits * 64 + offset + 32);
  }
  round4(x, scales, shifts, feedback, dim, codes);
  put4(codes, dim, out);
}

inline void encode_signed(const float* x, int dim, float scale, int8_t* out) {
  for (int i = 0; i < dim; ++i)
    out[i] = scale > 0 ? static_cast<int8_t>(within(std::nearbyint(x[i] / scale), 127.0f)) : int8_t{0};
}

inline void encode_symmetric(const float* x, int dim, int8_t* out, uint16_t* scale) {
  float top = 0;
  for (int i = 0; i < dim; ++i) top = std::max(top, std::fabs(x[i]));
  *scale = to_half(std::min(top / 127.0f, kHalfLimit));
  encode_signed(x, dim, from_half(*scale), out);
}

inline void encode_vector(const Side& side, int head, int dim, Spot spot, float* x) {
  uint8_t* codes = codes_at<uint8_t>(side, dim, spot);
  uint16_t* meta = meta_at(side, spot);
  switch (side.kind) {
    case kVectorF32: std::memcpy(codes, x, sizeof(float) * dim); break;
    case kVectorF16:
      for (int i = 0; i < dim; ++i) reinterpret_cast<uint16_t*>(codes)[i] = to_half(within(x[i], kHalfLimit));
      break;
    case kVectorBF16:
      for (int i = 0; i < dim; ++i) reinterpret_cast<uint16_t*>(codes)[i] = to_bfloat(within(x[i], 3.3895314e38f));
      break;
    case kVectorAffine8: encode_affine(x, dim, 8, codes, meta); break;
    case kVectorAffine4: encode_affine(x, dim, 4, codes, meta); break;
    case kVectorGrouped4: {
      const float* feedback = side.feedback ? side.feedback + static_cast<int64_t>(head) * dim * dim : nullptr;
      encode_grouped(x, dim, side.groups, feedback, codes, meta);
      break;
    }
    case kVectorSymmetric8: encode_symmetric(x, dim, reinterpret_cast<int8_t*>(codes), meta); break;
    case kVectorStatic8: encode_signed(x, dim, side.scale[head], reinterpret_cast<int8_t*>(codes)); break;
  }
}

// A sink's float16 bytes, spread over the codes of its slots.
inline void write_sink(const Side& side, const KvLayer& layer, int head, int dim, int64_t slot, int64_t position,
                       const float* x) {
  const int bytes = code_bytes(side, dim);
  uint16_t halves[kSinkSpan * kMaxHeadDim / 2] = {};
  for (int i = 0; i < dim; ++i) halves[i] = to_half(within(x[i], kHalfLimit));
  const int64_t first = slot - (position + layer.lead) + kSinkSpan * position;
  for (int s = 0; s < kSinkSpan; ++s) {
    const int start = s * bytes, length = std::max(0, std::min(bytes, 2 * dim - start));
    uint8_t* target = codes_at<uint8_t>(side, dim, spot_of(layer, head, first + s));
    std::memset(target, 0, bytes);
    std::memcpy(target, reinterpret_cast<const uint8_t*>(halves) + start, length);
  }
}

// The raw vector of the sink at `position`; first: its sequence's first slot, in whose block all sinks lie.
inline void read_sink(const Side& side, int dim, Spot first, int64_t position, float* x) {
  const uint16_t* halves = codes_at<uint16_t>(side, dim, first + kSinkSpan * static_cast<int>(position));
  for (int i = 0; i < dim; i += 8) store(x + i, load_half(halves + i));
}

// Stores one key or value [dim]; false, and nothing written, where it is not finite.
bool write_vector(const Side& side, const KvLayer& layer, int head, int dim, int64_t slot, int64_t position,
                  const float* x) {
  float held[kMaxHeadDim];
  I8 bad = all(0);
  for (int i = 0; i < dim; i += 8) {
    const F8 v = load<F8>(x + i);
    bad |= magnitude(v) <= all(3.4028235e38f) ? all(0) : all(1);
    store(held + i, smaller(larger(v, all(-1e30f)), all(1e30f)));
  }
  if (sum(to_float(bad)) > 0) return false;
  if (position < layer.sinks) {
    write_sink(side, layer, head, dim, slot, position, x);
    return true;
  }
  if (side.shaped) shape_vector(side, layer, head, dim, position, held);
  else std::memcpy(held, x, sizeof(float) * dim);
  encode_vector(side, head, dim, spot_of(layer, head, slot), held);
  return true;
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
        store(x + i, to_float(__builtin_convertvector(load<B8>(codes + i), I8)) * all(scale) + all(shift));
      return;
    default: {
      typedef int8_t Signs __attribute__((vector_size(8)));
      scale = side.kind == kVectorStatic8 ? side.scale[head] : from_half(meta[0]);
      for (int i = 0; i < dim; i += 8) store(x + i, to_float(__builtin_convertvector(load<Signs>(codes + i), I8)) * all(scale));
    }
  }
}

inline void decode_eight(const Side& side, int head, int dim, Spot first, float* out) {
  for (int i = 0; i < 8; ++i) decode_vector(side, head, dim, first + i, out + i * dim);
}

}  // namespace kvant::KVANT_ISA
