// Query rows as lanes: there and back, their Hadamard transforms, and integer dots of theirs with what all rows share.
#pragma once

#include "prefill_tile.h"

namespace kvant::KVANT_ISA {

constexpr int kRowLanes = kLanesOf<FWide>;
constexpr int kDotDims = 32;  // whose products with a rounded query fit the sums of a `LaneDot`

// Sums over four bytes, unsigned times signed, in as many lanes as FWide has; see `Dot`.
#if defined(__AVX512VNNI__)
constexpr int kDotsAtOnce = 16;  // that stay in registers
inline __m512i in_all_lanes(const uint8_t* four) { return _mm512_set1_epi32(load<int32_t>(four)); }
struct LaneDot {
  typedef __m512i Bytes;
  I16 sum = {};
  void add(__m512i u, __m512i s) { sum = (I16)_mm512_dpbusd_epi32((__m512i)sum, u, s); }
  I16 total() const { return sum; }
};
#else
constexpr int kDotsAtOnce = 8;
inline B32 in_all_lanes(const uint8_t* four) { return broadcast4(reinterpret_cast<const int8_t*>(four)); }
struct LaneDot : Dot {
  typedef B32 Bytes;
};
#endif
typedef LaneDot::Bytes Bytes;
constexpr int kStepBytes = sizeof(Bytes);  // of four codes or weights in each lane

// Calls use(i, dots) of kDotsAtOnce tokens' codes, as `spread_keys` has them, and kDotDims dims of rounded queries.
template <class Use>
inline void key_dots(const uint8_t* codes, const uint8_t* queries, const Use& use) {
  static_assert(kDotDims / 2 * 15 * 127 <= 32767, "sums over two bytes fit 16 bits");
  LaneDot dots[kDotsAtOnce];
  KVANT_UNROLL
  for (int s = 0; s < kDotDims / 4; ++s) {
    const Bytes q = load<Bytes>(queries + s * kStepBytes);
    for (int i = 0; i < kDotsAtOnce; ++i) dots[i].add(in_all_lanes(codes + s * 4 * kTileLanes + 4 * i), q);
  }
  for (int i = 0; i < kDotsAtOnce; ++i) use(i, dots[i].total());
}

// The same of kDotsAtOnce dims of values, as `spread_values` has them, and rounded weights of 4 * Steps tokens.
template <int Steps, class Use>
inline void value_dots(const uint8_t* codes, const uint8_t* weights, const Use& use) {
  static_assert(Steps % 8 == 0 && Steps * 2 * 8 * kTopNarrow <= 32767, "sums over two bytes fit 16 bits");
  LaneDot dots[kDotsAtOnce];
  for (int first = 0; first < Steps; first += 8) {
    KVANT_UNROLL
    for (int s = 0; s < 8; ++s, codes += 64, weights += kStepBytes) {
      const Bytes w = load<Bytes>(weights);
      for (int i = 0; i < kDotsAtOnce; ++i) dots[i].add(w, in_all_lanes(codes + 4 * i));
    }
  }
  for (int i = 0; i < kDotsAtOnce; ++i) use(i, dots[i].total());
}

// Four numbers a lane, each within uint8, as its bytes.
inline UWide four_bytes(IWide a, IWide b, IWide c, IWide d) {
  return as<UWide>(a) | as<UWide>(b) << 8 | as<UWide>(c) << 16 | as<UWide>(d) << 24;
}

// Rows of `dim` floats to lanes, out [dim][kRowLanes], and back.
inline void to_lanes(const float* const* rows, int dim, float* out) {
  for (int i = 0; i < dim; i += 8)
    for (int r = 0; r < kRowLanes; r += 8) {
      F8 held[8];
      for (int j = 0; j < 8; ++j) held[j] = load<F8>(rows[r + j] + i);
      transpose8(held);
      for (int j = 0; j < 8; ++j) store(out + (i + j) * kRowLanes + r, held[j]);
    }
}

inline void from_lanes(const float* x, int dim, int count, float* const* rows) {
  for (int i = 0; i < dim; i += 8)
    for (int r = 0; r < count; r += 8) {
      F8 held[8];
      for (int j = 0; j < 8; ++j) held[j] = load<F8>(x + (i + j) * kRowLanes + r);
      transpose8(held);
      for (int j = 0; j < std::min(8, count - r); ++j) store(rows[r + j] + i, held[j]);
    }
}

// Sums and differences of Count vectors, `stride` floats apart: of neighbours, then of twos, and so on.
template <int Count>
inline void butterflies(float* x, int stride) {
  FWide v[Count];
  for (int i = 0; i < Count; ++i) v[i] = load<FWide>(x + i * stride);
  KVANT_UNROLL
  for (int half = 1; half < Count; half *= 2) {
    KVANT_UNROLL
    for (int i = 0; i < Count; ++i) {
      if (i & half) continue;
      const FWide a = v[i], b = v[i + half];
      v[i] = a + b, v[i + half] = a - b;
    }
  }
  for (int i = 0; i < Count; ++i) store(x + i * stride, v[i]);
}

// `hadamard` of each lane, x [size][kRowLanes].
inline void hadamard_lanes(float* x, int size) {
  const int block = hadamard_block(size);
  const FWide norm = all<FWide>(1.0f / std::sqrt(static_cast<float>(block)));
  for (int i = 0; i < size; ++i) store(x + i * kRowLanes, load<FWide>(x + i * kRowLanes) * norm);
  for (int half = 1; half < block;) {
    const int count = half * 8 <= block ? 8 : 2;
    for (int i = 0; i < size; i += half * count)
      for (int j = i; j < i + half; ++j)
        count == 8 ? butterflies<8>(x + j * kRowLanes, half * kRowLanes)
                   : butterflies<2>(x + j * kRowLanes, half * kRowLanes);
    half *= count;
  }
}

}  // namespace kvant::KVANT_ISA
