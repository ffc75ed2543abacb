// What decodes and prompts share in attention over the blocked cache: queries, the keys' centre, softmax, outputs.
//
// What a codec does to keys is done to the query instead, and what it does to values is undone on the output: codes are
// used as they lie. Scores gain the query's product with the keys' centre, a polynomial within each tile. Scores are
// to the base of 2.
#pragma once

#include <limits>

#include "values.h"

namespace kvant::KVANT_ISA {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

// A query as the cache's keys need it: `raw` is scaled, `inner` also transformed as the keys are.
inline void make_query(const Place& at, const float* q, float* raw, float* inner) {
  const Side& key = at.layer.key;
  const F8 scale = all(at.shape.softcap > 0 ? at.shape.scale : at.shape.scale * kLog2E);
  for (int i = 0; i < at.dim; i += 8) {
    const F8 x = load<F8>(q + i) * scale;
    store(raw + i, x);
    store(inner + i, key.shaped && key.balance ? x / load<F8>(key.balance + at.kv_head * at.dim + i) : x);
  }
  if (key.shaped) hadamard(inner, at.dim);
}

// Undoes on a sum of values, [dim], what the codec did to each.
inline void finish_output(const Place& at, float* x) {
  const Side& value = at.layer.value;
  if (!value.shaped) return;
  hadamard(x, at.dim);
  if (value.balance)
    for (int i = 0; i < at.dim; i += 8)
      store(x + i, load<F8>(x + i) / load<F8>(value.balance + at.kv_head * at.dim + i));
}

inline void cap_scores(float* scores, int count, float cap) {
  if (cap <= 0) return;
  for (int t = 0; t < count; t += 8)
    store(scores + t, hyperbolic_tangent(load<F8>(scores + t) / all(cap)) * all(cap * kLog2E));
}

// A query's products with the centre's coefficients, as functions of the angle that a tile's middle is turned by:
// term j is sum_i cosine[j][i] cos_i + sine[j][i] sin_i, and `still[j]` from the elements that do not turn.
struct CentreQuery {
  alignas(kAlign) float cosine[kMaxOrder][kMaxHeadDim / 2], sine[kMaxOrder][kMaxHeadDim / 2];
  float still[kMaxOrder];

  void make(const Place& at, const float* raw) {
    const Side& key = at.layer.key;
    const int half = at.layer.turning;
    for (int j = 0; j < key.order; ++j) {
      const float* c = key.centre + (static_cast<int64_t>(at.kv_head) * key.order + j) * at.dim;
      for_eights(half, [&](int i, int left) {
        const F8 a = load_some(raw + i, left), b = load_some(raw + half + i, left);
        const F8 x = load_some(c + i, left), y = load_some(c + half + i, left);
        store(cosine[j] + i, a * x + b * y);
        store(sine[j] + i, b * x - a * y);
      });
      still[j] = 0;
      for (int i = 2 * half; i < at.dim; ++i) still[j] += raw[i] * c[i];
    }
  }

  // What a tile's scores have of each polynomial.
  template <int Order>
  void weigh(const KvLayer& layer, int64_t tile, float* weights) const {
    const int half = layer.turning, whole = half & -kLanesOf<FWide>;
    const float *cos = layer.turn_cos + tile * half, *sin = layer.turn_sin + tile * half;
    FWide wide[Order] = {}, others[Order] = {};
    for (int i = 0; i < whole; i += kLanesOf<FWide>)
      add_turned<Order>(load<FWide>(cos + i), load<FWide>(sin + i), i, wide, others);
    F8 terms[kMaxOrder] = {};
    for (int j = 0; j < Order; ++j) terms[j] = folded_sum(wide[j] + others[j]);
    for_eights(half - whole, [&](int i, int left) {
      add_turned<Order>(load_some(cos + whole + i, left), load_some(sin + whole + i, left), whole + i, terms, terms);
    });
    sums4(terms, weights);
    for (int j = 0; j < Order; ++j) weights[j] += still[j];
  }

 private:
  // What the elements of some pairs, from `at` on, add to the terms: cosines to some sums, sines to others.
  template <int Order, class F>
  void add_turned(F cos, F sin, int at, F* terms, F* others) const {
    for (int j = 0; j < Order; ++j) terms[j] += cos * load<F>(cosine[j] + at);
    for (int j = 0; j < Order; ++j) others[j] += sin * load<F>(sine[j] + at);
  }
};

// Writes the scores [kTile] that a tile's centre makes.
template <int Order>
inline void centre_scores(const KvLayer& layer, const float* weights, float* out) {
  for (int t = 0; t < kTile; t += kLanesOf<FWide>) {
    FWide score = all<FWide>(0.0f);
    for (int j = 0; j < Order; ++j) score += all<FWide>(weights[j]) * load<FWide>(layer.basis + j * kTile + t);
    store(out + t, score);
  }
}

// Softmax so far: of scores up to `top`, weights sum to the total of `sums`.
struct Softmax {
  F8 sums = all(0.0f);
  float top = kNever;

  float total() const { return sum(sums); }

  // Takes note of more scores, a multiple of 8, one of them not kNever; returns what earlier sums are to be multiplied
  // by. Up to `slack` above the top, they leave it as it is.
  float raise(const float* scores, int count, float slack = 0) {
    constexpr int kWide = kLanesOf<FWide>;
    FWide even = all<FWide>(kNever), odd = even;  // in turn: each waits for its last
    int t = 0;
    for (; t + 2 * kWide <= count; t += 2 * kWide) {
      even = larger(even, load<FWide>(scores + t));
      odd = larger(odd, load<FWide>(scores + t + kWide));
    }
    F8 tops = folded_top(larger(even, odd));
    for (; t < count; t += 8) tops = larger(tops, load<F8>(scores + t));
    const float next = largest(tops);
    if (next <= top + slack) return 1;
    const float kept = top == kNever ? 0.0f : power_of_two(all(top - next))[0];
    top = next;
    sums *= all(kept);
    return kept;
  }

  // Turns scores into weights.
  void weigh(float* scores, int count) {
    for (int t = 0; t < count; t += 8) {
      const F8 weight = power_of_two(load<F8>(scores + t) - all(top));
      store(scores + t, weight);
      sums += weight;
    }
  }
};

// Makes of scores weights times the values' scales, and adds up the weights and what they make of the values' shifts.
// Returns the largest. The sums, where they are wanted, are of each group's scaled weights.
template <int Groups, class Count>
inline float scale_weights(const float* scores, const Steps& steps, Count count, Softmax& softmax, F8* shifts,
                           float (*scaled)[kTile], F8* sums = nullptr) {
  typedef FOfCount<Count> F;
  F top = all<F>(0.0f), total = all<F>(0.0f), shift[Groups] = {}, added[Groups] = {};
  const F most = all<F>(softmax.top);
  for (int t = 0; t < count; t += kLanesOf<F>) {
    const F weight = power_of_two(load<F>(scores + t) - most);
    total += weight;
    for (int g = 0; g < Groups; ++g) {
      const F x = weight * load<F>(steps.scale[g] + t);
      shift[g] += weight * load<F>(steps.shift[g] + t);
      top = larger(top, x);
      added[g] += x;
      store(scaled[g] + t, x);
    }
  }
  softmax.sums += folded_sum(total);
  for (int g = 0; g < Groups; ++g) shifts[g] += folded_sum(shift[g]);
  for (int g = 0; sums && g < Groups; ++g) sums[g] = folded_sum(added[g]);
  return largest(folded_top(top));
}

inline void mask_scores(float* scores, int from, int to, int count) {
  std::fill(scores, scores + from, kNever);
  std::fill(scores + to, scores + count, kNever);
}

}  // namespace kvant::KVANT_ISA
