// The KV cache's vectors: from floats to stored bytes, as kvant.formats.kv_codecs defines them.
#pragma once

#include <utility>

#include "codecs.h"

namespace kvant::KVANT_ISA {

constexpr float kHalfLimit = 65504.0f;

inline float within(float x, float limit) { return std::min(std::max(x, -limit), limit); }

struct Extremes {
  float low, high;
};

inline Extremes range_of(const float* x, int count) {
  F8 low = all(INFINITY), high = all(-INFINITY);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    low = smaller(low, load<F8>(x + i));
    high = larger(high, load<F8>(x + i));
  }
  Extremes range = {-largest(-low), largest(high)};
  for (; i < count; ++i) range = {std::min(range.low, x[i]), std::max(range.high, x[i])};
  return range;
}

// Eight integers of 8 bits, or of 4 bits, two to a byte, the even element below.
inline void put8(F8 codes, uint8_t* out) { store(out, bytes_of(to_int(codes))); }

inline void put4(F8 codes, uint8_t* out) {
  const uint64_t bytes = bytes_of(to_int(codes));
  const uint64_t two = (bytes | bytes >> 4) & 0x00ff00ff00ff00ff, four = (two | two >> 8) & 0x0000ffff0000ffff;
  store(out, static_cast<uint32_t>(four | four >> 16));
}

inline void encode_affine(const float* x, int dim, int bits, uint8_t* out, uint16_t* affine) {
  const Extremes range = range_of(x, dim);
  const float levels = static_cast<float>((1 << bits) - 1);
  affine[1] = to_half(within(range.low, kHalfLimit));
  const float zero = from_half(affine[1]);
  affine[0] = to_half(std::min(std::max((range.high - zero) / levels, 0.0f), kHalfLimit));
  const float scale = from_half(affine[0]);
  const F8 step = all(scale > 0 ? scale : 1.0f), most = all(scale > 0 ? levels : 0.0f);
  for (int i = 0; i < dim; i += 8) {
    const F8 codes = within((load<F8>(x + i) - all(zero)) / step, all(0.0f), most);
    if (bits == 4) put4(codes, out + i / 2);
    else put8(codes, out + i);
  }
}

inline void encode_signed(const float* x, int dim, float scale, int8_t* out) {
  const F8 step = all(scale > 0 ? scale : 1.0f), most = all(scale > 0 ? 127.0f : 0.0f);
  for (int i = 0; i < dim; i += 8) store_bytes(out + i, to_int(within(load<F8>(x + i) / step, -most, most)));
}

inline void encode_symmetric(const float* x, int dim, int8_t* out, uint16_t* scale) {
  F8 top = all(0.0f);
  for (int i = 0; i < dim; i += 8) top = larger(top, magnitude(load<F8>(x + i)));
  *scale = to_half(std::min(largest(top) / 127.0f, kHalfLimit));
  encode_signed(x, dim, from_half(*scale), out);
}

// A vector on its way to 4-bit codes of x / step + shift; step is the scale, or 1 where that is 0.
struct alignas(32) Rounding {
  float weights[8][8];  // of eight elements, see weigh_block
  float x[kMaxHeadDim], step[kMaxHeadDim], scale[kMaxHeadDim], shift[kMaxHeadDim];
  const float* feedback;  // or null
  uint8_t* codes;
  bool even;  // any eight elements that are rounded together have one scale, and it is not 0
};

// Chooses the groups' scales and offsets.
inline void prepare_grouped(Rounding& it, int dim, int groups, uint16_t* words) {
  const int size = dim / groups;
  it.even = size % 8 == 0;
  for (int g = 0; g < groups; ++g) {
    const auto [low, high] = range_of(it.x + g * size, size);
    const float span = (high / 2 - low / 2) / 7.5f, middle = std::fabs(high / 2 + low / 2) / 3.875f;
    const int bits = (to_half(std::min(std::max(span, middle), 63488.0f)) + 31) / 32;
    const float scale = from_half(static_cast<uint16_t>(bits * 32)), step = scale > 0 ? scale : 1.0f;
    const float eighths = std::nearbyint(std::min(std::max((-low / step - 7.5f) * 8.0f, -32.0f), 31.0f));
    for (int i = g * size; i < (g + 1) * size; i += 8) {  // what lies behind is the next group's, if it is a vector's
      store(it.scale + i, all(scale));
      store(it.step + i, all(step));
      store(it.shift + i, all(7.5f + eighths / 8.0f));
    }
    it.even = it.even && scale > 0;
    words[g] = static_cast<uint16_t>(bits * 64 + static_cast<int>(eighths) + 32);
  }
}

inline F8 code_of(F8 aim) { return nearest(within(aim, all(0.0f), all(15.0f))); }

inline F8 aims_of(const Rounding& it, int i) {
  return load<F8>(it.x + i) / load<F8>(it.step + i) + load<F8>(it.shift + i);
}

inline void round_plainly(const Rounding& it, int dim) {
  for (int i = 0; i < dim; i += 8) put4(code_of(aims_of(it, i)), it.codes + i / 2);
}

// A head's feedback for the block of eight elements that begins with `first`: row k, dim - first floats further each,
// is of element first + k; to be read from `first` on.
inline const float* feedback_rows(const float* feedback, int dim, int first) {
  return feedback + first * (dim - first / 2 + 4) - first;
}

inline int64_t feedback_size(int dim) { return int64_t{dim} * (dim + 8) / 2; }

// What the rounding errors of eight elements, in steps, change of their aims: row k is of element k.
struct BlockWeights {
  const float* rows;
  int64_t stride;
};

inline BlockWeights weigh_block(Rounding& it, int dim, int first) {
  const float* rows = feedback_rows(it.feedback, dim, first) + first;
  if (it.even) return {rows, dim - first};
  const F8 inverse = all(1.0f) / load<F8>(it.step + first);
  for (int k = 0; k < 8; ++k) {
    const F8 row = load<F8>(rows + k * (dim - first));
    store(it.weights[k], row * (all(it.scale[first + k]) * inverse));
  }
  return {it.weights[0], 8};
}

constexpr int kChains = 4;  // vectors whose roundings take turns

struct Aims {
  F4 low[kChains], high[kChains];
};

inline F4 all4(float x) { return F4{x, x, x, x}; }

// Rounds an element, and hands its error on to the others of its block.
template <int Element>
inline void round_element(Aims& aims, const BlockWeights (&weights)[kChains]) {
  constexpr int kLane = Element % 4;
  KVANT_UNROLL
  for (int n = 0; n < kChains; ++n) {
    F4 &low = aims.low[n], &high = aims.high[n], from = Element < 4 ? low : high;
    const F4 aim = __builtin_shufflevector(from, from, kLane, kLane, kLane, kLane);
    const F4 held = smaller(larger(aim, all4(0.0f)), all4(15.0f));
    const F4 error = aim - (held + all4(kWhole) - all4(kWhole));
    const float* row = weights[n].rows + Element * weights[n].stride;
    if (Element < 4) low -= error * load<F4>(row);
    high -= error * load<F4>(row + 4);
  }
}

template <int... Elements>
inline void round_elements(Aims& aims, const BlockWeights (&weights)[kChains],
                           std::integer_sequence<int, Elements...>) {
  (round_element<Elements>(aims, weights), ...);
}

// Hands the errors of eight elements, in units of x, on to the elements [begin, end).
inline void correct(Rounding& it, int dim, int first, int begin, int end, F8 errors) {
  const float* rows = feedback_rows(it.feedback, dim, first);
  for (int i = begin; i < end; i += 8) {
    F8 x = load<F8>(it.x + i);
    for (int k = 0; k < 8; ++k) x -= all(errors[k]) * load<F8>(rows + k * (dim - first) + i);
    store(it.x + i, x);
  }
}

// Rounds up to kChains vectors, each rounding's error handed on to the elements that follow. A rounding waits for the
// one before it, which is what takes the time: several vectors take little more of it than one.
inline void round_in_turn(Rounding* vectors, int count, int dim) {
  for (int first = 0; first < dim; first += 8) {
    Aims aims;
    BlockWeights weights[kChains];
    for (int n = 0; n < kChains; ++n) {
      Rounding& it = vectors[std::min(n, count - 1)];
      weights[n] = weigh_block(it, dim, first);
      const F8 eight = aims_of(it, first);
      aims.low[n] = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
      aims.high[n] = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    }
    round_elements(aims, weights, std::make_integer_sequence<int, 8>());
    float errors[kChains][8];
    KVANT_UNROLL
    for (int n = 0; n < kChains; ++n)
      store(errors[n], __builtin_shufflevector(aims.low[n], aims.high[n], 0, 1, 2, 3, 4, 5, 6, 7));
    for (int n = 0; n < count; ++n) {
      const F8 eight = load<F8>(errors[n]), codes = code_of(eight);
      put4(codes, vectors[n].codes + first / 2);
      const F8 off = (eight - codes) * load<F8>(vectors[n].scale + first);
      store(errors[n], off);
      if (first + 8 < dim) correct(vectors[n], dim, first, first + 8, first + 16, off);
    }
    for (int n = 0; n < count; ++n) correct(vectors[n], dim, first, first + 16, dim, load<F8>(errors[n]));
  }
}

typedef float PerElement[kMaxHeadDim];

inline F8 lanes_of(const Rounding* vectors, PerElement Rounding::*constants, int i) {
  F8 lanes;
  for (int n = 0; n < 8; ++n) lanes[n] = (vectors[n].*constants)[i];
  return lanes;
}

// Eight elements of eight vectors: a vector is a lane.
inline void load_lanes(const Rounding* vectors, int first, F8 (&x)[8]) {
  for (int n = 0; n < 8; ++n) x[n] = load<F8>(vectors[n].x + first);
  transpose8(x);
}

// The same for eight even vectors of one head, a vector a lane: to the bit what `round_in_turn` makes of them.
inline void round_lanes(const Rounding* vectors, int dim) {
  F8 errors[kMaxHeadDim];
  const float* feedback = vectors[0].feedback;
  for (int first = 0; first < dim; first += 8) {
    F8 x[8];
    load_lanes(vectors, first, x);
    for (int block = 0; block < first; block += 8) {
      const float* row = feedback_rows(feedback, dim, block) + first;
      for (int i = block; i < block + 8; ++i, row += dim - block) {
        KVANT_UNROLL
        for (int k = 0; k < 8; ++k) x[k] -= errors[i] * all(row[k]);
      }
    }
    const F8 step = lanes_of(vectors, &Rounding::step, first), shift = lanes_of(vectors, &Rounding::shift, first);
    KVANT_UNROLL
    for (int k = 0; k < 8; ++k) x[k] = x[k] / step + shift;
    const float* rows = feedback_rows(feedback, dim, first) + first;
    KVANT_UNROLL
    for (int k = 0; k < 8; ++k) {
      const F8 code = code_of(x[k]), error = x[k] - code;
      const float* row = rows + k * (dim - first);
      for (int later = k + 1; later < 8; ++later) x[later] -= error * all(row[later]);
      errors[first + k] = error * step;
      x[k] = code;
    }
    transpose8(x);
    for (int n = 0; n < 8; ++n) put4(x[n], vectors[n].codes + first / 2);
  }
}

inline void round_with_feedback(Rounding* vectors, int count, int dim) {
  bool alike = count == 8;
  for (int n = 0; n < count; ++n) alike = alike && vectors[n].even && vectors[n].feedback == vectors[0].feedback;
  if (alike) return round_lanes(vectors, dim);
  for (int n = 0; n < count; n += kChains) round_in_turn(vectors + n, std::min(kChains, count - n), dim);
}

inline void encode_vector(const Side& side, int head, int dim, const float* x, uint8_t* codes, uint16_t* meta) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(codes);
  const F8 half = all(kHalfLimit), bfloat = all(3.3895314e38f);
  switch (side.kind) {
    case kVectorF32: std::memcpy(codes, x, sizeof(float) * dim); break;
    case kVectorF16:
      for (int i = 0; i < dim; i += 8) store_half(halves + i, within(load<F8>(x + i), -half, half));
      break;
    case kVectorBF16:
      for (int i = 0; i < dim; i += 8) store_bfloat(halves + i, within(load<F8>(x + i), -bfloat, bfloat));
      break;
    case kVectorAffine8: encode_affine(x, dim, 8, codes, meta); break;
    case kVectorAffine4: encode_affine(x, dim, 4, codes, meta); break;
    case kVectorSymmetric8: encode_symmetric(x, dim, reinterpret_cast<int8_t*>(codes), meta); break;
    case kVectorStatic8: encode_signed(x, dim, side.scale[head], reinterpret_cast<int8_t*>(codes)); break;
  }
}

// A sink's float16 bytes, spread over the codes of its slots.
inline void write_sink(const Side& side, const KvLayer& layer, int dim, const Entry& entry) {
  const int bytes = code_bytes(side, dim);
  uint16_t halves[kSinkSpan * kMaxHeadDim / 2] = {};
  for (int i = 0; i < dim; i += 8)
    store_half(halves + i, within(load<F8>(entry.x + i), all(-kHalfLimit), all(kHalfLimit)));
  const int64_t first = entry.slot - (entry.position + layer.lead) + kSinkSpan * entry.position;
  for (int s = 0; s < kSinkSpan; ++s) {
    const int start = s * bytes, length = std::max(0, std::min(bytes, 2 * dim - start));
    uint8_t* target = codes_at<uint8_t>(side, dim, spot_of(layer, entry.head, first + s));
    std::memset(target, 0, bytes);
    std::memcpy(target, reinterpret_cast<const uint8_t*>(halves) + start, length);
  }
}

// Copies a vector, held within `limit`; false where it is not finite.
inline bool copy_finite(const float* x, int dim, float limit, float* out) {
  I8 top = all(0);
  for (int i = 0; i < dim; i += 8) {
    const F8 v = load<F8>(x + i);
    top = larger(top, magnitude_bits(v));
    store(out + i, within(v, all(-limit), all(limit)));
  }
  return largest(top) < 0x7f800000;
}

// Stores up to kWriteWidth keys or values [dim]; a bit for each that is not finite, of which nothing is written.
unsigned write_vectors(const Side& side, const KvLayer& layer, int dim, const Entry* entries, int count) {
  Rounding vectors[kWriteWidth];
  int waiting = 0;  // for the others, to be rounded side by side
  unsigned bad = 0;
  for (int n = 0; n < count; ++n) {
    const Entry& entry = entries[n];
    Rounding& it = vectors[waiting];
    const Spot spot = spot_of(layer, entry.head, entry.slot);
    it.codes = codes_at<uint8_t>(side, dim, spot);
    if (!copy_finite(entry.x, dim, side.shaped ? 1e30f : INFINITY, it.x)) {
      bad |= 1u << n;
    } else if (entry.position < layer.sinks) {
      write_sink(side, layer, dim, entry);
    } else {
      shape_vector(side, layer, entry.head, dim, entry.position, it.x);
      if (side.kind != kVectorGrouped4) {
        encode_vector(side, entry.head, dim, it.x, it.codes, meta_at(side, spot));
        continue;
      }
      prepare_grouped(it, dim, side.groups, meta_at(side, spot));
      it.feedback = side.feedback ? side.feedback + entry.head * feedback_size(dim) : nullptr;
      if (it.feedback) ++waiting;
      else round_plainly(it, dim);
    }
  }
  if (waiting) round_with_feedback(vectors, waiting, dim);
  return bad;
}

}  // namespace kvant::KVANT_ISA
