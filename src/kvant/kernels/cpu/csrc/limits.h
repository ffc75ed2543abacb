// Loops that do nothing but reach one of the machine's limits, for benchmarks to compare kernels with.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvant::KVANT_ISA {

constexpr int kLanes = 10;  // independent sums: more than the products' latency needs

// Reads memory in four streams; the sum keeps it from being left out.
inline int64_t read_limit(const void* data, int64_t bytes) {
  const int64_t quarter = bytes / 4 / 128 * 128;
  const uint8_t* p = static_cast<const uint8_t*>(data);
  I8 sums[4] = {};
  for (int64_t at = 0; at < quarter; at += 128)
    for (int stream = 0; stream < 4; ++stream)
      for (int i = 0; i < 128; i += 32) sums[stream] += load<I8>(p + stream * quarter + at + i);
  const I8 total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return sum(total) ? 4 * quarter : 4 * quarter + 1;
}

// Products of unsigned 4-bit numbers (`data`'s first 32 bytes) with signed 8-bit numbers, added up; 2 operations a
// product.
inline int64_t dot_limit(const void* data, int64_t rounds) {
  const B32 s = load<B32>(static_cast<const uint8_t*>(data) + 32);
  I8 total = all(0);
  for (int64_t round = 0; round < rounds; ++round) {
    Dot dots[kLanes];
    for (int step = 0; step < 8; ++step)
      for (int i = 0; i < kLanes; ++i) {
        asm volatile("" ::: "memory");  // or one product would serve all
        dots[i].add(load<B32>(data), s);
      }
    for (int i = 0; i < kLanes; ++i) total += dots[i].total();
  }
  return rounds * kLanes * 8 * 64 + (sum(total) ? 0 : 1);
}

// Multiply-adds of float32; 2 operations each.
inline int64_t fma_limit(const void* data, int64_t rounds) {
  const F8 a = load<F8>(data), b = load<F8>(static_cast<const uint8_t*>(data) + 32);
  F8 sums[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = all(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round)
    for (int step = 0; step < 8; ++step)
      for (int i = 0; i < kLanes; ++i) sums[i] = sums[i] * a + b;
  F8 total = sums[0];
  for (int i = 1; i < kLanes; ++i) total += sums[i];
  return rounds * kLanes * 8 * 16 + (sum(total) == 0.5f ? 1 : 0);
}

// What was read (in bytes) or computed (in operations). `data`: `count` bytes to read, or 64 bytes of operands.
int64_t reach_limit(int32_t limit, const void* data, int64_t count) {
  if (limit == kReadLimit) return read_limit(data, count);
  return limit == kDotLimit ? dot_limit(data, count) : fma_limit(data, count);
}

}  // namespace kvant::KVANT_ISA
