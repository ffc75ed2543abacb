// Norms, rotations and activations of single rows.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace kvant::KVANT_ISA {

inline void store_some(float* x, F8 v, int count) {
  if (count >= 8) store(x, v);
  else std::memcpy(x, &v, sizeof(float) * count);
}

inline F8 load_some(const float* x, int count) {
  if (count >= 8) return load<F8>(x);
  float held[8] = {};
  std::memcpy(held, x, sizeof(float) * count);
  return load<F8>(held);
}

// Calls body(offset, left) for each eight of `count` elements; all but the last have a constant 8 left.
template <class Body>
inline void for_eights(int count, Body body) {
  int i = 0;
  for (; i + 8 <= count; i += 8) body(i, 8);
  if (i < count) body(i, count - i);
}

// y = body(offset, vector of x, left), eight at a time.
template <class Body>
inline void map_row(const float* x, int count, float* y, Body body) {
  for_eights(count, [&](int i, int left) { store_some(y + i, body(i, load_some(x + i, left), left), left); });
}

inline float sum_of_squares(const float* x, int count) {
  F8 sums[4] = {};
  int i = 0;
  for (; i + 32 <= count; i += 32)
    for (int j = 0; j < 4; ++j) {
      const F8 v = load<F8>(x + i + 8 * j);
      sums[j] += v * v;
    }
  for_eights(count - i, [&](int j, int left) {
    const F8 v = load_some(x + i + j, left);
    sums[0] += v * v;
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void rms_norm_row(const float* x, const float* weight, float eps, int count, float* y) {
  const F8 factor = all(1.0f / std::sqrt(sum_of_squares(x, count) / static_cast<float>(count) + eps));
  map_row(x, count, y, [&](int i, F8 v, int left) { return v * factor * load_some(weight + i, left); });
}

void add_row(const float* x, int count, float* total) {
  map_row(x, count, total, [&](int i, F8 v, int left) { return v + load_some(total + i, left); });
}

inline void multiply_row(float* x, const float* factors, int count) {
  map_row(x, count, x, [&](int i, F8 v, int left) { return v * load_some(factors + i, left); });
}

void rope_row(float* x, const float* cos, const float* sin, int pairs) {
  for_eights(pairs, [&](int i, int left) {
    const F8 a = load_some(x + i, left), b = load_some(x + pairs + i, left);
    const F8 c = load_some(cos + i, left), s = load_some(sin + i, left);
    store_some(x + i, a * c - b * s, left);
    store_some(x + pairs + i, b * c + a * s, left);
  });
}

template <class F>
inline F silu(F x) {
  return x / (all<F>(1.0f) + power_of_two(smaller(x * all<F>(-1.44269504f), all<F>(126.0f))));
}

inline F8 activate(F8 x, int32_t activation) {
  if (activation == kSilu) return silu(x);
  if (activation == kGeluTanh) {
    const F8 inner = all(0.7978845608f) * (x + all(0.044715f) * x * x * x);
    return all(0.5f) * x * (all(1.0f) + hyperbolic_tangent(inner));
  }
  F8 y;
  for (int i = 0; i < 8; ++i) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  return y;
}

// y may be `gate`.
void gated_row(const float* gate, const float* up, int count, int32_t activation, float* y) {
  constexpr int kWide = kLanesOf<FWide>;
  int done = 0;
  for (; activation == kSilu && done + kWide <= count; done += kWide)
    store(y + done, silu(load<FWide>(gate + done)) * load<FWide>(up + done));
  map_row(gate + done, count - done, y + done,
          [&](int i, F8 x, int left) { return activate(x, activation) * load_some(up + done + i, left); });
}

void softcap_row(float* x, int count, float cap) {
  map_row(x, count, x, [&](int, F8 v, int) { return hyperbolic_tangent(v / all(cap)) * all(cap); });
}

void scale_row(float* x, int count, float factor) {
  map_row(x, count, x, [&](int, F8 v, int) { return v * all(factor); });
}

// Where a row's first maximum is.
int argmax_row(const float* x, int count) {
  F8 tops = all(-INFINITY);
  for (int i = 0; i + 8 <= count; i += 8) tops = larger(tops, load<F8>(x + i));
  float top = largest(tops);
  for (int i = count & ~7; i < count; ++i) top = x[i] > top ? x[i] : top;
  int first = 0;
  while (first < count - 1 && !(x[first] == top)) ++first;
  return first;
}

// out = exp((x - top) * factor), and its sum.
double exponentials_row(const float* x, int count, float top, float factor, float* out) {
  double total = 0;
  for_eights(count, [&](int i, int left) {
    const F8 weight = exponential((load_some(x + i, left) - all(top)) * all(factor));
    store_some(out + i, weight, left);
    for (int j = 0; j < left; ++j) total += weight[j];
  });
  return total;
}

// The largest power of two that divides a head's size: its Hadamard matrix consists of blocks of that size.
inline int hadamard_block(int size) { return size & -size; }

// Within each vector of x, and then between vectors, of which there are a power of two.
template <int Count>
inline void hadamard_step(float* x, F8 norm) {
  const F8 one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1}, four = {1, 1, 1, 1, -1, -1, -1, -1};
  F8 v[Count];
  KVANT_UNROLL
  for (int i = 0; i < Count; ++i) {
    v[i] = load<F8>(x + 8 * i) * norm;
    v[i] = v[i] * one + swapped<1>(v[i]);
    v[i] = v[i] * two + swapped<2>(v[i]);
    v[i] = v[i] * four + swapped<4>(v[i]);
  }
  KVANT_UNROLL
  for (int half = 1; half < Count; half *= 2) {
    KVANT_UNROLL
    for (int i = 0; i < Count; ++i) {
      if (i & half) continue;
      const F8 a = v[i], b = v[i + half];
      v[i] = a + b, v[i + half] = a - b;
    }
  }
  KVANT_UNROLL
  for (int i = 0; i < Count; ++i) store(x + 8 * i, v[i]);
}

// x times its Hadamard matrix, in place; blocks of 8 and more.
inline void hadamard(float* x, int size) {
  const int block = hadamard_block(size), step = block < 64 ? 8 : 64;
  const F8 norm = all(1.0f / std::sqrt(static_cast<float>(block)));
  for (int i = 0; i < size; i += step)
    if (step == 64) hadamard_step<8>(x + i, norm);
    else hadamard_step<1>(x + i, norm);
  for (int half = step; half < block; half *= 2)
    for (int start = 0; start < size; start += 2 * half)
      for (int i = start; i < start + half; i += 8) {
        const F8 a = load<F8>(x + i), b = load<F8>(x + half + i);
        store(x + i, a + b);
        store(x + half + i, a - b);
      }
}

}  // namespace kvant::KVANT_ISA
