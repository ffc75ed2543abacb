// Loops that do nothing but reach one of the machine's limits, for benchmarks to compare kernels with.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvant::KVANT_ISA {

constexpr int kLanes = 12;  // independent sums: more than the products' latency needs

// Reads memory in four streams, asking for it ahead as the products of one token do; the sum keeps it from being left
// out.
inline int64_t read_limit(const void* data, int64_t bytes) {
  const int64_t quarter = bytes / 4 / 128 * 128, ahead = reads_ahead();
  const uint8_t* p = static_cast<const uint8_t*>(data);
  I8 sums[4] = {};
  for (int64_t at = 0; at < quarter; at += 128)
    for (int stream = 0; stream < 4; ++stream) {
      const uint8_t* from = p + stream * quarter + at;
      for (int i = 0; i < 128; i += 32) sums[stream] += load<I8>(from + i);
      if (ahead)
        for (int i = 0; i < 128; i += 64) __builtin_prefetch(from + ahead + i);
    }
  const I8 total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum(total) ? 4 * quarter : 4 * quarter + 1;
}

#if defined(__AVX512VNNI__)
// `Dot` in registers of 64 bytes.
struct WideDot {
  __m512i sum = _mm512_setzero_si512();
  inline void add(B32 u, B32 s) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_broadcast_i64x4((__m256i)u), _mm512_broadcast_i64x4((__m256i)s));
  }
  inline I8 total() const { return (I8)_mm512_castsi512_si256(sum); }
};
#else
typedef Dot WideDot;
#endif

// Products of unsigned 4-bit numbers (`data`'s first 32 bytes) with signed 8-bit numbers, added up; 2 operations a
// product.
inline int64_t dot_limit(const void* data, int64_t rounds) {
  const B32 s = load<B32>(static_cast<const uint8_t*>(data) + 32);
  I8 total = all(0);
  for (int64_t round = 0; round < rounds; ++round) {
    WideDot dots[kLanes];
    for (int step = 0; step < 8; ++step)
      for (int i = 0; i < kLanes; ++i) {
        asm volatile("" ::: "memory");  // or one product would serve all
        dots[i].add(load<B32>(data), s);
      }
    for (int i = 0; i < kLanes; ++i) total += dots[i].total();
  }
  return rounds * kLanes * 8 * 2 * kAlign + (sum(total) ? 0 : 1);
}

// Multiply-adds of float32; 2 operations each.
inline int64_t fma_limit(const void* data, int64_t rounds) {
  const FWide a = all<FWide>(load<float>(data)), b = all<FWide>(load<float>(static_cast<const uint8_t*>(data) + 32));
  FWide sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = all<FWide>(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round)
    for (int step = 0; step < 8; ++step)
      for (int i = 0; i < kLanes; ++i) sums[i] = sums[i] * a + b;
  FWide total = sums[0];
  for (int i = 1; i < kLanes; ++i) total += sums[i];
  return rounds * kLanes * 8 * 2 * kLanesOf<FWide> + (sum(folded_sum(total)) == 0.5f ? 1 : 0);
}

// What was read (in bytes) or computed (in operations). `data`: `count` bytes to read, or 64 bytes of operands.
int64_t reach_limit(int32_t limit, const void* data, int64_t count) {
  if (limit == kReadLimit) return read_limit(data, count);
  return limit == kDotLimit ? dot_limit(data, count) : fma_limit(data, count);
}

}  // namespace kvant::KVANT_ISA
