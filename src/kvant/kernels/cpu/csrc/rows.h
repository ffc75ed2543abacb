// Where a sequence's tokens lie: tiles of the context by position, spans of it by slot.
#pragma once

#include "codecs.h"

namespace kvant::KVANT_ISA {

constexpr int kTile = kCentreTile;
constexpr int kSpan = kSplitSlots;  // slots of a decode's unit

struct Place {
  const KvLayer& layer;
  const AttentionShape& shape;
  const int64_t* table;
  int kv_head;
  int dim;

  Place(const AttentionWork& work, int sequence, int head)
      : layer(*work.cache), shape(*work.shape),
        table(work.batch->block_tables + static_cast<int64_t>(sequence) * work.batch->table_width), kv_head(head),
        dim(work.shape->head_dim) {}

  // The slot that the sequence's slots have this number in.
  Spot spot(int64_t number) const {
    return spot(number / layer.block_size, static_cast<int>(number % layer.block_size));
  }
  // The slot so far into one of its blocks.
  Spot spot(int64_t block, int offset) const { return {table[block], kv_head * layer.block_size + offset}; }
};

// Slots [begin, end) of a tile or span that lie together in memory.
struct Run {
  int begin, end;
  Spot spot;
};

// Runs, of at most kTile slots, of the sequence's slots from number `first` on, for offsets [from, to) from there.
inline int find_runs(const Place& at, int64_t first, int from, int to, Run* runs) {
  int count = 0;
  const int size = at.layer.block_size;
  int64_t block = (first + from) / size;  // divided once: it takes long
  int offset = static_cast<int>((first + from) % size);
  for (int t = from; t < to; t = runs[count++].end) {
    const int end = std::min({to, t + size - offset, t + kTile});
    runs[count] = {t, end, at.spot(block, offset)};
    offset += end - t;
    if (offset == size) ++block, offset = 0;
  }
  return count;
}

// Has a run's vectors brought near before they are needed, eight at a time while others are worked on.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Side& side, int dim, const Run& run)
      : left_((run.end - run.begin) / 8), codes_(codes_at<char>(side, dim, run.spot)),
        meta_(reinterpret_cast<const char*>(meta_at(side, run.spot))), code_step_(8 * code_bytes(side, dim)),
        meta_step_(16 * meta_words(side)) {}

  // Asks for the eight that follow those of the last call.
  void ask() {
    if (!left_) return;
    --left_;
    bring_near(codes_, code_step_);
    if (meta_step_) bring_near(meta_, 1);  // one line
    codes_ += code_step_, meta_ += meta_step_;
  }
  void ask_all() {
    while (left_) ask();
  }

 private:
  int left_ = 0;
  const char *codes_ = nullptr, *meta_ = nullptr;
  int code_step_ = 0, meta_step_ = 0;
};

// Tokens [from, to) of a tile of positions.
struct TileRows {
  int64_t tile;
  int from, to, count;
  Run runs[kTile / 8 + 1];

  TileRows(const Place& at, int64_t first, int64_t start, int64_t stop)
      : tile(first / kTile), from(static_cast<int>(start - first)), to(static_cast<int>(stop - first)),
        count(find_runs(at, first + at.layer.lead, from, to, runs)) {}

  Spot spot(int t) const {
    int i = 0;
    while (runs[i].end <= t) ++i;
    return runs[i].spot + (t - runs[i].begin);
  }
};

// The slots of tokens [start, stop) of a sequence, at most kSplitSlots, in whole eights, which no block's end divides;
// of them, [from, to) are those of the tokens. The others hold anything.
struct Span {
  int64_t first;
  int from, to, size, count;
  Run runs[kSpan / 8];

  Span(const Place& at, int64_t start, int64_t stop)
      : first((start + at.layer.lead) & ~int64_t{7}), from(static_cast<int>(start + at.layer.lead - first)),
        to(static_cast<int>(stop + at.layer.lead - first)), size(start < stop ? (to + 7) & ~7 : 0),
        count(find_runs(at, first, 0, size, runs)) {}
};

}  // namespace kvant::KVANT_ISA
