// One token from a row of logits, by inverting the cumulative distribution of what top_k, top_p and min_p leave.
//
// What they leave is the likeliest tokens, ties by id, up to some rank. So tokens are taken in that order until the
// filters end or the drawn number is reached: seldom more than some hundred of a large vocabulary, and seldom others than
// those whose logits are near the largest.
#include <algorithm>
#include <limits>
#include <vector>

#include "decoder.h"

namespace kvant {

namespace {

constexpr float kNear = 4;  // logits that are looked at first: e^-4 of the likeliest token's weight and more

struct Likely {
  float weight, logit;
  int id;
  bool operator<(const Likely& other) const { return logit != other.logit ? logit < other.logit : id > other.id; }
};

// Likeliest first. They are put in order a range of logits at a time: most are never asked for.
class InOrder {
 public:
  // Logits of at most `top`, the first range of them `step` wide.
  InOrder(const float* weights, const float* logits, int count, float top, float step)
      : weights_(weights), logits_(logits), count_(count) {
    for (int i = 0; i < kRanges - 1; ++i) floors_[i] = top - step * (1 + 0.5f * i);
    fill();
  }
  bool empty() const { return heap_.empty(); }
  Likely next() {
    std::pop_heap(heap_.begin(), heap_.end());
    const Likely top = heap_.back();
    heap_.pop_back();
    fill();
    return top;
  }

 private:
  static constexpr int kRanges = 5;

  void fill() {
    for (; heap_.empty() && range_ < kRanges; ++range_) {
      for (int i = 0; i < count_; ++i)
        if (is_in_range(logits_[i])) heap_.push_back({weights_[i], logits_[i], i});
      std::make_heap(heap_.begin(), heap_.end());
    }
  }
  // The last range has all that are left, those too that compare with nothing.
  bool is_in_range(float logit) const {
    const bool above = range_ > 0 && logit >= floors_[range_ - 1];
    return !above && (range_ == kRanges - 1 || logit >= floors_[range_]);
  }

  const float *weights_, *logits_;
  int count_, range_ = 0;
  float floors_[kRanges - 1];
  std::vector<Likely> heap_;
};

double sum_of(const std::vector<Likely>& tokens) {
  double sum = 0;
  for (const Likely& token : tokens) sum += token.weight;
  return sum;
}

// Tokens that were in order before.
class Taken {
 public:
  Taken(InOrder& order, int64_t limit) {
    for (; limit > 0 && !order.empty(); --limit) tokens_.push_back(order.next());
  }
  bool empty() const { return at_ == tokens_.size(); }
  Likely next() { return tokens_[at_++]; }
  double total() const { return sum_of(tokens_); }

 private:
  std::vector<Likely> tokens_;
  size_t at_ = 0;
};

// Of tokens in order those that top_p, of `total`, and min_p leave; at least one.
template <class Order>
std::vector<Likely> filtered(Order& order, double total, double top_p, float min_p) {
  std::vector<Likely> kept{order.next()};
  double before = kept[0].weight;
  while (!order.empty() && before < top_p * total) {
    const Likely next = order.next();
    if (next.weight < min_p * kept[0].weight) break;
    kept.push_back(next);
    before += next.weight;
  }
  return kept;
}

int draw(InOrder& order, double target) {
  double sum = 0;
  int id = 0;
  do {
    const Likely next = order.next();
    if (next.weight == 0) break;  // only what rounding made unreachable is left
    id = next.id;
    sum += next.weight;
  } while (sum <= target && !order.empty());
  return id;
}

int draw(const std::vector<Likely>& tokens, double target) {
  double sum = 0;
  for (const Likely& token : tokens)
    if ((sum += token.weight) > target) return token.id;
  return tokens.back().id;
}

}  // namespace

int64_t Step::sample_row(const float* logits, int count, const Sampling& how, int64_t row, float* weights) {
  const int likeliest = k_.argmax_row(logits, count);
  if (how.temperature[row] == 0) return likeliest;
  const float top = logits[likeliest], temperature = how.temperature[row];
  const double total = k_.exponentials_row(logits, count, top, 1.0f / temperature, weights);
  InOrder order(weights, logits, count, top, kNear * std::max(temperature, 1.0f));
  const int64_t limit = how.top_k[row] > 0 ? std::min<int64_t>(how.top_k[row], count) : count;
  if (limit == count && how.top_p[row] >= 1 && how.min_p[row] <= 0) return draw(order, how.uniform[row] * total);
  const double top_p = how.top_p[row] < 1 ? how.top_p[row] : std::numeric_limits<double>::infinity();
  const float min_p = how.min_p[row];
  std::vector<Likely> kept;
  if (limit < count) {
    Taken first(order, limit);
    kept = filtered(first, first.total(), top_p, min_p);
  } else {
    kept = filtered(order, total, top_p, min_p);
  }
  return draw(kept, how.uniform[row] * sum_of(kept));
}

void Step::sample(const float* logits, int64_t count, int vocab, const Sampling& how, int64_t* tokens) {
  float* weights = turn_.arena().take<float>(count * vocab);
  turn_.run(count, [&](int64_t row) {
    tokens[row] = sample_row(logits + row * vocab, vocab, how, row, weights + row * vocab);
  });
}

}  // namespace kvant
