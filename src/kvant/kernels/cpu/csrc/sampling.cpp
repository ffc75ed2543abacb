// One token from a row of logits, by inverting the cumulative distribution of what top_k, top_p and min_p leave.
//
// What they leave is the likeliest tokens, ties by id, up to some rank. So tokens are taken in that order from a heap,
// until the filters end or the drawn number is reached: seldom more than some hundred of a large vocabulary.
#include <algorithm>
#include <limits>
#include <vector>

#include "decoder.h"

namespace kvant {

namespace {

struct Likely {
  float weight, logit;
  int id;
  bool operator<(const Likely& other) const { return logit != other.logit ? logit < other.logit : id > other.id; }
};

// Likeliest first.
class InOrder {
 public:
  InOrder(const float* weights, const float* logits, int count) : heap_(count) {
    for (int i = 0; i < count; ++i) heap_[i] = {weights[i], logits[i], i};
    std::make_heap(heap_.begin(), heap_.end());
  }
  bool empty() const { return heap_.empty(); }
  Likely next() {
    std::pop_heap(heap_.begin(), heap_.end());
    const Likely top = heap_.back();
    heap_.pop_back();
    return top;
  }

 private:
  std::vector<Likely> heap_;
};

// The likeliest `limit` tokens that top_p and min_p leave, in order; at least one.
std::vector<Likely> filtered(InOrder& order, double total, int64_t limit, double top_p, float min_p) {
  std::vector<Likely> kept{order.next()};
  double before = kept[0].weight;
  while (!order.empty() && static_cast<int64_t>(kept.size()) < limit && before < top_p * total) {
    const Likely next = order.next();
    if (next.weight < min_p * kept[0].weight) break;
    kept.push_back(next);
    before += next.weight;
  }
  return kept;
}

double sum_of(const std::vector<Likely>& tokens) {
  double sum = 0;
  for (const Likely& token : tokens) sum += token.weight;
  return sum;
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

// The weight of the `limit` likeliest tokens.
double weight_of_first(const float* weights, int count, int64_t limit, std::vector<float>& scratch) {
  scratch.assign(weights, weights + count);
  std::nth_element(scratch.begin(), scratch.begin() + limit, scratch.end(), [](float a, float b) { return a > b; });
  double sum = 0;
  for (int64_t i = 0; i < limit; ++i) sum += scratch[i];
  return sum;
}

}  // namespace

int64_t Step::sample_row(const float* logits, int count, const Sampling& how, int64_t row, float* weights) {
  const int likeliest = k_.argmax_row(logits, count);
  if (how.temperature[row] == 0) return likeliest;
  double total = k_.exponentials_row(logits, count, logits[likeliest], 1.0f / how.temperature[row], weights);
  InOrder order(weights, logits, count);
  const int64_t limit = how.top_k[row] > 0 ? std::min<int64_t>(how.top_k[row], count) : count;
  if (limit == count && how.top_p[row] >= 1 && how.min_p[row] <= 0) return draw(order, how.uniform[row] * total);
  std::vector<float> scratch;
  if (limit < count && how.top_p[row] < 1) total = weight_of_first(weights, count, limit, scratch);
  const double top_p = how.top_p[row] < 1 ? how.top_p[row] : std::numeric_limits<double>::infinity();
  const std::vector<Likely> kept = filtered(order, total, limit, top_p, how.min_p[row]);
  return draw(kept, how.uniform[row] * sum_of(kept));
}

void Step::sample(const float* logits, int64_t count, int vocab, const Sampling& how, int64_t* tokens) {
  float* weights = turn_.arena().take<float>(count * vocab);
  turn_.run(count, [&](int64_t row) {
    tokens[row] = sample_row(logits + row * vocab, vocab, how, row, weights + row * vocab);
  });
}

}  // namespace kvant
