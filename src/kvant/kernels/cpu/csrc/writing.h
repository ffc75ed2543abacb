// The KV cache's vectors: from floats to stored bytes, as kvant.formats.kv_codecs defines them.
#pragma once

#include "codecs.h"

namespace kvant::KVANT_ISA {

constexpr float kHalfLimit = 65504.0f;

inline float within(float x, float limit) { return std::min(std::max(x, -limit), limit); }

struct Range {
  float low, high;
};

inline Range range_of(const float* x, int count) {
  F8 low = all(INFINITY), high = all(-INFINITY);
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    low = smaller(low, load<F8>(x + i));
    high = larger(high, load<F8>(x + i));
  }
  Range range = {-largest(-low), largest(high)};
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
  const Range range = range_of(x, dim);
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
  const float* feedback;  // [head_dim, head_dim], or null
  uint8_t* codes;
};

// Chooses the groups' scales and offsets.
inline void prepare_grouped(Rounding& it, int dim, int groups, uint16_t* words) {
  const int size = dim / groups;
  for (int g = 0; g < groups; ++g) {
    const auto [low, high] = range_of(it.x + g * size, size);
    const float span = (high / 2 - low / 2) / 7.5f, middle = std::fabs(high / 2 + low / 2) / 3.875f;
    const int bits = (to_half(std::min(std::max(span, middle), 63488.0f)) + 31) / 32;
    const float scale = from_half(static_cast<uint16_t>(bits * 32)), step = scale > 0 ? scale : 1.0f;
    const float eighths = std::nearbyint(std::min(std::max((-low / step - 7.5f) * 8.0f, -32.0f), 31.0f));
    std::fill_n(it.scale + g * size, size, scale);
    std::fill_n(it.step + g * size, size, step);
    std::fill_n(it.shift + g * size, size, 7.5f + eighths / 8.0f);
    words[g] = static_cast<uint16_t>(bits * 64 + static_cast<int>(eighths) + 32);
  }
}

inline F8 code_of(F8 aim) { return nearest(within(aim, all(0.0f), all(15.0f))); }

inline F8 aims_of(const Rounding& it, int i) { return load<F8>(it.x + i) / load<F8>(it.step + i) + load<F8>(it.shift + i); }

inline void round_plainly(const Rounding& it, int dim) {
  for (int i = 0; i < dim; i += 8) put4(code_of(aims_of(it, i)), it.codes + i / 2);
}

// What a code's rounding error, in steps, changes of the aims of the block's later elements: row k is of element k.
inline void weigh_block(Rounding& it, int dim, int first) {
  const F8 inverse = all(1.0f) / load<F8>(it.step + first);
  for (int k = 0; k < 8; ++k) {
    const F8 row = load<F8>(it.feedback + static_cast<int64_t>(first + k) * dim + first);
    store(it.weights[k], row * (all(it.scale[first + k]) * inverse));
  }
}

inline F4 all4(float x) { return F4{x, x, x, x}; }

// An element's rounding error, in all lanes.
template <int Element>
inline F4 error_of(F4 aims) {
  const F4 aim = __builtin_shufflevector(aims, aims, Element, Element, Element, Element);
  const F4 held = smaller(larger(aim, all4(0.0f)), all4(15.0f));
  return aim - (held + all4(12582912.0f) - all4(12582912.0f));
}

struct Aims {
  F4 low[kWriteWidth], high[kWriteWidth];
};

template <int Element>
inline void pass_on(Aims& aims, const Rounding* const (&vectors)[kWriteWidth]) {
  KVANT_UNROLL
  for (int n = 0; n < kWriteWidth; ++n) {
    const float* weights = vectors[n]->weights[Element];
    const F4 error = error_of<Element % 4>(Element < 4 ? aims.low[n] : aims.high[n]);
    if (Element < 4) aims.low[n] -= error * load<F4>(weights);
    aims.high[n] -= error * load<F4>(weights + 4);
  }
}

template <int... Elements>
inline void pass_all_on(Aims& aims, const Rounding* const (&vectors)[kWriteWidth],
                        std::integer_sequence<int, Elements...>) {
  (pass_on<Elements>(aims, vectors), ...);
}

// Hands the errors of eight elements, in units of x, on to the elements [begin, end).
inline void correct(Rounding& it, int dim, int first, int begin, int end, F8 errors) {
  const float* feedback = it.feedback + static_cast<int64_t>(first) * dim;
  for (int i = begin; i < end; i += 8) {
    F8 x = load<F8>(it.x + i);
    for (int k = 0; k < 8; ++k) x -= all(errors[k]) * load<F8>(feedback + k * dim + i);
    store(it.x + i, x);
  }
}

// Rounds `count` vectors side by side, each rounding's error handed on to the elements that follow. A rounding waits
// for the one before it, which is what takes the time: kWriteWidth vectors take little more of it than one.
inline void round_with_feedback(Rounding* vectors, int count, int dim) {
  const Rounding* all_lanes[kWriteWidth];
  for (int n = 0; n < kWriteWidth; ++n) all_lanes[n] = vectors + std::min(n, count - 1);
  for (int first = 0; first < dim; first += 8) {
    for (int n = 0; n < count; ++n) weigh_block(vectors[n], dim, first);
    Aims aims;
    for (int n = 0; n < kWriteWidth; ++n) {
      const F8 eight = aims_of(*all_lanes[n], first);
      aims.low[n] = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
      aims.high[n] = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    }
    pass_all_on(aims, all_lanes, std::make_integer_sequence<int, 8>());
    float errors[kWriteWidth][8];
    KVANT_UNROLL
    for (int n = 0; n < kWriteWidth; ++n)
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
  I8 bad = all(0);
  for (int i = 0; i < dim; i += 8) {
    const F8 v = load<F8>(x + i);
    bad |= magnitude(v) <= all(3.4028235e38f) ? all(0) : all(1);
    store(out + i, within(v, all(-limit), all(limit)));
  }
  return sum(bad) == 0;
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
      it.feedback = side.feedback ? side.feedback + static_cast<int64_t>(entry.head) * dim * dim : nullptr;
      if (it.feedback) ++waiting;
      else round_plainly(it, dim);
    }
  }
  if (waiting) round_with_feedback(vectors, waiting, dim);
  return bad;
}

}  // namespace kvant::KVANT_ISA
