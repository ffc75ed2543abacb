// Attention of many new tokens to 4-bit keys and values by integer dots. A lane is a query row: what a row has of its
// own is in vectors, what a token has is in all lanes, and nothing is added or compared across lanes.
#pragma once

#include "prefill_lanes.h"

namespace kvant::KVANT_ISA {

constexpr int kBundles = kTileRows / kRowLanes;
constexpr int kCodeWidth = 32;  // tokens that a tile's weights come in
static_assert(kTileRows % kRowLanes == 0, "all rows have a lane");

// As many query rows as there are lanes, those behind the last one the same as it; their sums so far.
class Bundle {
 public:
  // Rows from `row` on of those of the tokens [first, last), which are `row / shared` tokens from the first.
  void read(const Place& at, const AttentionWork& work, int first, int last, int row) {
    const int shared = at.shape.heads / at.shape.kv_heads, rows = (last - first) * shared;
    const float* from[kRowLanes];
    count_ = std::min(kRowLanes, rows - row);
    for (int lane = 0; lane < kRowLanes; ++lane) {
      const int mine = row + std::min(lane, count_ - 1), token = first + mine / shared;
      const int64_t head = int64_t{at.kv_head} * shared + mine % shared;
      from[lane] = work.q + token * work.q_stride + head * at.dim;
      out_[lane] = work.out + (int64_t{token} * at.shape.heads + head) * at.dim;
      positions_[lane] = work.batch->positions[first] + mine / shared;
    }
    to_lanes(from, at.dim, queries_);
    shape_queries(at);
    round_queries(at.layer.key, at.dim);
    std::fill(sums_, sums_ + at.dim * kRowLanes, 0.0f);
  }

  // Attends to a tile's tokens.
  void attend(const Place& at, const TileRows& it, const CodeTile& tile) {
    const int seen = seen_by_last(it), width = (seen + kCodeWidth - 1) & -kCodeWidth;
    if (seen <= it.from) return;
    alignas(kAlign) float scores[kTile * kRowLanes];
    with_count<kMaxGroups>(groups_of(at.layer.key), [&](auto groups) {
      with_count<kMaxOrder + 1>(at.layer.key.centre ? at.layer.key.order + 1 : 1,
                                [&](auto terms) { start_scores<terms() - 1, groups()>(at, tile, width, scores); });
    });
    add_scores(at, tile, width, scores);
    raise(at, it, 0, width, scores);
    with_count<kMaxGroups>(groups_of(at.layer.value),
                           [&](auto groups) { add_values<groups()>(at, tile, width, scores); });
  }

  // The same of tokens whose keys and values are floats, [kTile][dim].
  void attend(const Place& at, const TileRows& it, const float* keys, const float* values) {
    const int stop = seen_by_last(it);
    if (stop <= it.from) return;
    alignas(kAlign) float scores[kTile * kRowLanes];
    for (int t = it.from & -4; t < stop; t += 4) {
      FWide products[4];
      multiply<4>(keys + t * at.dim, at.dim, at.dim, products);
      for (int i = 0; i < 4; ++i) store(scores + (t + i) * kRowLanes, products[i]);
    }
    raise(at, it, it.from, stop, scores);
    for (int t = it.from; t < stop; ++t) {
      const FWide weight = power_of_two(load<FWide>(scores + t * kRowLanes) - top_);
      total_ += weight;
      store(scores + t * kRowLanes, weight);
    }
    for (int d = 0; d < at.dim; ++d) {
      FWide sum = load<FWide>(sums_ + d * kRowLanes);
      for (int t = it.from; t < stop; ++t)
        sum += load<FWide>(scores + t * kRowLanes) * all<FWide>(values[t * at.dim + d]);
      store(sums_ + d * kRowLanes, sum);
    }
  }

  // Writes the outputs, as `finish_output` makes them.
  void finish(const Place& at) {
    const Side& value = at.layer.value;
    const int size = at.dim / groups_of(value);
    const FWide share = all<FWide>(1.0f) / total_;
    for (int d = 0; d < at.dim; ++d) {
      float* sum = sums_ + d * kRowLanes;
      store(sum, (load<FWide>(sum) - shifts_[d / size]) * share);
    }
    if (value.shaped) {
      hadamard_lanes(sums_, at.dim);
      if (value.balance) divide(sums_, value.balance + at.kv_head * at.dim, at.dim);
    }
    from_lanes(sums_, at.dim, count_, out_);
  }

 private:
  alignas(kAlign) float queries_[kMaxHeadDim * kRowLanes];  // [dim][lane], shaped as the keys are
  alignas(kAlign) float sums_[kMaxHeadDim * kRowLanes];     // [dim][lane]
  alignas(kAlign) uint8_t codes_[kMaxHeadDim * kRowLanes];  // of queries: [4 dims, in the order of keys][lane][4]
  FWide step_[kMaxGroups], sum_[kMaxGroups];                // of these: a unit, and their sums times it
  FWide top_ = all<FWide>(std::numeric_limits<float>::lowest()), total_ = all<FWide>(0.0f);
  FWide shifts_[kMaxGroups] = {};  // what the weights made of the values' shifts
  float* out_[kRowLanes];
  int64_t positions_[kRowLanes];
  int count_;

  static void divide(float* x, const float* by, int dim) {
    alignas(kAlign) float inverse[kMaxHeadDim];
    map_row(by, dim, inverse, [](int, F8 v, int) { return all(1.0f) / v; });
    for (int d = 0; d < dim; ++d) store(x + d * kRowLanes, load<FWide>(x + d * kRowLanes) * all<FWide>(inverse[d]));
  }

  // As `make_query` does it.
  void shape_queries(const Place& at) {
    const Side& key = at.layer.key;
    const FWide scale = all<FWide>(at.shape.softcap > 0 ? at.shape.scale : at.shape.scale * kLog2E);
    for (int d = 0; d < at.dim; ++d)
      store(queries_ + d * kRowLanes, load<FWide>(queries_ + d * kRowLanes) * scale);
    if (!key.shaped) return;
    if (key.balance) divide(queries_, key.balance + at.kv_head * at.dim, at.dim);
    hadamard_lanes(queries_, at.dim);
  }

  void round_queries(const Side& key, int dim) {
    const int size = dim / groups_of(key);
    uint8_t* to = codes_;
    for (int g = 0; g < groups_of(key); ++g) {
      const float* x = queries_ + g * size * kRowLanes;
      FWide top = all<FWide>(1e-30f);
      for (int d = 0; d < size; ++d) {
        const FWide v = load<FWide>(x + d * kRowLanes);
        top = larger(top, larger(v, -v));
      }
      const FWide inverse = all<FWide>(127.0f) / top;
      IWide added = {};
      const auto code = [&](int d) {
        const IWide rounded = to_int(load<FWide>(x + d * kRowLanes) * inverse);
        added += rounded;
        return rounded;
      };
      for (int d = 0; d < size; d += 8)
        for (int i = d; i < d + 2; ++i, to += kStepBytes)
          store(to, four_bytes(code(i) & 255, code(i + 2) & 255, code(i + 4) & 255, code(i + 6)));
      step_[g] = top * all<FWide>(1.0f / 127);
      sum_[g] = step_[g] * to_float(added);
    }
  }

  // How many tokens, from the tile's first on, lie before the end of what the last row sees.
  int seen_by_last(const TileRows& it) const {
    return static_cast<int>(std::clamp<int64_t>(positions_[kRowLanes - 1] + 1 - it.tile * kTile, 0, it.to));
  }

  // The queries' products with `Count` vectors, `pitch` floats apart.
  template <int Count>
  void multiply(const float* x, int pitch, int dim, FWide* out) const {
    FWide even[Count] = {}, odd[Count] = {};
    for (int d = 0; d < dim; d += 2) {
      const FWide a = load<FWide>(queries_ + d * kRowLanes), b = load<FWide>(queries_ + (d + 1) * kRowLanes);
      for (int i = 0; i < Count; ++i) even[i] += a * all<FWide>(x[i * pitch + d]);
      for (int i = 0; i < Count; ++i) odd[i] += b * all<FWide>(x[i * pitch + d + 1]);
    }
    for (int i = 0; i < Count; ++i) out[i] = even[i] + odd[i];
  }

  // What the keys' centre and their shifts make of the scores, [width][lane].
  template <int Order, int Groups>
  void start_scores(const Place& at, const CodeTile& tile, int width, float* scores) const {
    FWide weights[Order + 1];
    if constexpr (Order > 0) multiply<Order>(tile.terms[0], kMaxHeadDim, at.dim, weights);
    for (int t = 0; t < width; ++t) {
      FWide score = all<FWide>(0.0f);
      for (int j = 0; j < Order; ++j) score += weights[j] * all<FWide>(at.layer.basis[j * kTile + t]);
      for (int g = 0; g < Groups; ++g) score -= sum_[g] * all<FWide>(tile.key_steps.shift[g][t]);
      store(scores + t * kRowLanes, score);
    }
  }

  void add_scores(const Place& at, const CodeTile& tile, int width, float* scores) const {
    const int size = at.dim / groups_of(at.layer.key);
    for (int d = 0; d < at.dim; d += kDotDims) {
      const int g = d / size;
      const FWide step = step_[g];
      for (int t = 0; t < width; t += kDotsAtOnce) {
        const float* scales = tile.key_steps.scale[g] + t;
        float* to = scores + t * kRowLanes;
        const uint8_t* codes = tile.keys + t / kTileLanes * kTileLanes * at.dim + d * kTileLanes + t % kTileLanes * 4;
        key_dots(codes, codes_ + d * kRowLanes, [&](int i, IWide dots) {
          float* score = to + i * kRowLanes;
          store(score, load<FWide>(score) + to_float(dots) * (step * all<FWide>(scales[i])));
        });
      }
    }
  }

  // Takes scores [begin, end) out that a row does not see, and notes the largest. Up to kSlack above the top so far,
  // they leave it as it is; else sums are scaled.
  void raise(const Place& at, const TileRows& it, int begin, int end, float* scores) {
    cap_scores(scores + begin * kRowLanes, (end - begin) * kRowLanes, at.shape.softcap);
    hide(at, it, begin, end, scores);
    FWide even = all<FWide>(kNever), odd = even;  // in turn: each waits for its last
    int t = begin;
    for (; t + 2 <= end; t += 2) {
      even = larger(even, load<FWide>(scores + t * kRowLanes));
      odd = larger(odd, load<FWide>(scores + (t + 1) * kRowLanes));
    }
    if (t < end) even = larger(even, load<FWide>(scores + t * kRowLanes));
    const FWide tops = larger(larger(even, odd), top_);
    if (largest(folded_top(tops - top_)) <= kSlack) return;
    const FWide kept = power_of_two(top_ - tops);
    top_ = tops;
    total_ *= kept;
    for (FWide& shift : shifts_) shift *= kept;
    for (int d = 0; d < at.dim; ++d) store(sums_ + d * kRowLanes, load<FWide>(sums_ + d * kRowLanes) * kept);
  }

  // The scores of what a row does not see, because it comes later, or a window ends, or it is none of the tile's,
  // become kNever.
  void hide(const Place& at, const TileRows& it, int begin, int end, float* scores) const {
    const int64_t base = it.tile * kTile, window = at.shape.window;
    const auto oldest = [&](int64_t self) { return window ? self - window + 1 - base : 0; };
    const int64_t seen = std::min<int64_t>(it.to, positions_[0] + 1 - base);  // by all rows
    if (it.from <= begin && oldest(positions_[kRowLanes - 1]) <= begin && end <= seen) return;
    alignas(kAlign) int32_t from[kRowLanes], count[kRowLanes];
    for (int lane = 0; lane < kRowLanes; ++lane) {
      from[lane] = static_cast<int32_t>(std::clamp<int64_t>(oldest(positions_[lane]), it.from, kTile));
      const auto to = static_cast<int32_t>(std::clamp<int64_t>(positions_[lane] + 1 - base, 0, it.to));
      count[lane] = std::max(0, to - from[lane]);
    }
    for (int t = begin; t < end; ++t) {
      float* score = scores + t * kRowLanes;
      for (int lane = 0; lane < kRowLanes; ++lane)
        score[lane] = static_cast<uint32_t>(t - from[lane]) < static_cast<uint32_t>(count[lane]) ? score[lane] : kNever;
    }
  }

  // Turns scores into weights, rounds them for each of the values' groups, and adds the values.
  template <int Groups>
  void add_values(const Place& at, const CodeTile& tile, int width, const float* scores) {
    alignas(kAlign) float scaled[Groups][kTile * kRowLanes];
    alignas(kAlign) uint8_t weights[Groups][kTile * kRowLanes];
    const FWide unit = weigh<Groups>(tile, width, scores, scaled) * all<FWide>(1.0f / kTopNarrow);
    const FWide inverse = all<FWide>(1.0f) / larger(unit, all<FWide>(1e-30f));
    for (int g = 0; g < Groups; ++g) {
      const auto rounded = [&](int t) {
        return to_int(load<FWide>(scaled[g] + t * kRowLanes) * inverse + all<FWide>(kDither.of[t]));
      };
      for (int t = 0; t < width; t += 4)
        store(weights[g] + t / 4 * kStepBytes, four_bytes(rounded(t), rounded(t + 1), rounded(t + 2), rounded(t + 3)));
    }
    for (int d = 0; d < at.dim; d += 16)
      for (int i = 0; i < 16; i += kDotsAtOnce) {
        const uint8_t *codes = tile.values + d * kTile + 4 * i, *w = weights[d * Groups / at.dim];
        const auto add = [&](int k, IWide dots) {  // of 16 dims the even ones, then the odd ones
          float* sum = sums_ + (d + (i + k) % 8 * 2 + (i + k) / 8) * kRowLanes;
          store(sum, load<FWide>(sum) + to_float(dots) * unit);
        };
        width == kTile ? value_dots<kTileSteps>(codes, w, add) : value_dots<kTileSteps / 2>(codes, w, add);
      }
  }

  // Weights times the values' scales, [group][width][lane]; returns the largest of each lane.
  template <int Groups>
  FWide weigh(const CodeTile& tile, int width, const float* scores, float (*scaled)[kTile * kRowLanes]) {
    FWide most = all<FWide>(0.0f), total = total_, shift[Groups];
    for (int g = 0; g < Groups; ++g) shift[g] = shifts_[g];
    for (int t = 0; t < width; ++t) {
      const FWide weight = power_of_two(load<FWide>(scores + t * kRowLanes) - top_);
      total += weight;
      for (int g = 0; g < Groups; ++g) {
        const FWide x = weight * all<FWide>(tile.value_steps.scale[g][t]);
        shift[g] += weight * all<FWide>(tile.value_steps.shift[g][t]);
        most = larger(most, x);
        store(scaled[g] + t * kRowLanes, x);
      }
    }
    total_ = total;
    for (int g = 0; g < Groups; ++g) shifts_[g] = shift[g];
    return most;
  }
};

}  // namespace kvant::KVANT_ISA
