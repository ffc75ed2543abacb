// What a burst's steps begin with, and when it ends.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "types.h"

namespace kvant {

// The steps of a batch of rows of one token each, the first one's given.
class Going {
 public:
  Going(const Batch& first, const KvLayer& cache, const Sampling& how)
      : batch_(first),
        how_(how),
        lead_(cache.lead),
        block_size_(cache.block_size),
        positions_(first.positions, first.positions + first.tokens),
        slots_(first.tokens),
        lengths_(first.context_lens, first.context_lens + first.tokens) {}

  const Batch& batch() const { return batch_; }
  const Sampling& how() const { return how_; }

  // Whether the step that drew `tokens` is the burst's last one.
  bool ends(const Burst& burst, const int64_t* tokens) const {
    const double spent = std::chrono::duration<double>(Clock::now() - start_).count();
    if (burst.done >= burst.steps || __atomic_load_n(burst.interrupt, __ATOMIC_RELAXED)) return true;
    if (spent + spent / burst.done > burst.seconds) return true;
    for (int row = 0; row < batch_.tokens; ++row) {
      const int64_t *first = burst.stops + burst.stop_starts[row], *last = burst.stops + burst.stop_starts[row + 1];
      if (std::find(first, last, tokens[row]) != last) return true;
    }
    return false;
  }

  // Goes on to the step after the one that drew `tokens`, which must stay where they are.
  void go_on(const int64_t* tokens) {
    for (int row = 0; row < batch_.tokens; ++row) {
      const int64_t place = ++positions_[row] + lead_;
      const int64_t block = batch_.block_tables[int64_t{row} * batch_.table_width + place / block_size_];
      slots_[row] = block * block_size_ + place % block_size_;
      ++lengths_[row];
    }
    batch_.ids = tokens;
    batch_.positions = positions_.data(), batch_.slots = slots_.data(), batch_.context_lens = lengths_.data();
    how_.uniform += batch_.tokens;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Batch batch_;
  Sampling how_;
  int64_t lead_, block_size_;
  std::vector<int64_t> positions_, slots_, lengths_;
  Clock::time_point start_ = Clock::now();
};

}  // namespace kvant
