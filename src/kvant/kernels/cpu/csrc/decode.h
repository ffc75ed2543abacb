// Attention of one new token to a part of the context: scores of all of its tokens, then, run by run, weights and sums.
#pragma once

#include "attention.h"

namespace kvant::KVANT_ISA {

// The query heads of one KV head that a unit attends with.
struct Heads {
  int count;
  alignas(kAlign) float raw[kMaxShared][kMaxHeadDim], inner[kMaxShared][kMaxHeadDim];
  IntegerQuery codes[kMaxShared];
  CentreQuery centre[kMaxShared];

  Heads(const Place& at, const float* q, int heads) : count(heads) {
    const bool integer = key_is_integer(at.layer.key, at.dim);
    for (int h = 0; h < heads; ++h) {
      make_query(at, q + h * at.dim, raw[h], inner[h]);
      if (integer) quantize_query(at.layer.key, inner[h], at.dim, &codes[h]);
      if (integer && is_4bit(at.layer.key.kind)) codes[h].repeat(at.dim);
      if (at.layer.key.centre) centre[h].make(at, raw[h]);
    }
  }
};

// Calls body(constant, first) for blocks of up to N heads.
template <int N, class Body>
inline void for_heads(int heads, const Body& body) {
  for (int h = 0; h < heads; h += N) with_count<N>(std::min(N, heads - h), [&](auto n) { body(n, h); });
}

// What a unit reads, in order: of each span the keys, run by run, then the values. While one is worked on, memory is
// asked for another, about two tiles further on: one tile takes less time than memory takes to answer.
struct Reads {
  const Place& at;
  const Span &now, &next;
  const int distance;

  Reads(const Place& place, const Span& span, const Span& following)
      : at(place), now(span), next(following), distance(std::max(2, 2 * kTile / place.layer.block_size)) {}

  // What to ask for during the work on the `i`th.
  Ahead during(int i) const { return of(i + distance); }
  // Asks for the first ones, which come after no work.
  void begin() const {
    for (int i = 0; i < distance; ++i) of(i).ask_all();
  }

 private:
  Ahead of(int i) const {
    for (const Span* span : {&now, &next})
      for (const Side* side : {&at.layer.key, &at.layer.value}) {
        if (i < span->count) return Ahead(*side, at.dim, span->runs[i]);
        i -= span->count;
      }
    return Ahead();
  }
};

// Scores of a span's tokens under the heads, [heads][kPitch] from kPad on.
struct Scores {
  alignas(kAlign) float all[kMaxShared * kPitch];
  float* of(int h) { return all + h * kPitch + kPad; }

  void compute(const Place& at, const Heads& heads, const Reads& reads) {
    const Span& it = reads.now;
    start(at, heads, it);
    for (int i = 0; i < it.count; ++i) {
      const Run& run = it.runs[i];
      Ahead next = reads.during(i);
      if (!key_is_integer(at.layer.key, at.dim)) add_floats(at, heads, run, next);
      else
        for_heads<kHeadsAtOnce>(heads.count,
                                [&](auto n, int h) { add_codes<n()>(at, heads.codes + h, run, of(h), next); });
    }
    for (int h = 0; h < heads.count; ++h) {
      cap_scores(of(h), it.size, at.shape.softcap);
      mask_scores(of(h), it.from, it.to, it.size);
    }
  }

 private:
  // The scores that the keys' centre makes, or none.
  void start(const Place& at, const Heads& heads, const Span& it) {
    if (!at.layer.key.centre) {
      for (int h = 0; h < heads.count; ++h) std::fill(of(h), of(h) + it.size, 0.0f);
      return;
    }
    const int64_t origin = it.first - at.layer.lead;  // the position of the span's first slot
    const int64_t first = (origin + it.from) / kTile, last = (origin + it.to - 1) / kTile;
    with_count<kMaxOrder>(at.layer.key.order, [&](auto order) {
      float weights[kSpan / kTile + 2][kMaxShared][kMaxOrder];
      for (int64_t tile = first; tile <= last; ++tile)
        for (int h = 0; h < heads.count; ++h)
          heads.centre[h].template weigh<order()>(at.layer, tile, weights[tile - first][h]);
      for (int64_t tile = first; tile <= last; ++tile)
        for (int h = 0; h < heads.count; ++h)
          centre_scores<order()>(at.layer, weights[tile - first][h], of(h) + (tile * kTile - origin));
    });
  }

  template <int N>
  static void add_codes(const Place& at, const IntegerQuery* queries, const Run& run, float* scores, Ahead& next) {
    const Side& key = at.layer.key;
    if (at.dim == 64) add_codes<N, 64>(key, at, queries, run, scores, next);
    else if (at.dim == 128) add_codes<N, 128>(key, at, queries, run, scores, next);
    else add_codes<N, 0>(key, at, queries, run, scores, next);
  }

  template <int N, int Dim>
  static void add_codes(const Side& key, const Place& at, const IntegerQuery* queries, const Run& run, float* scores,
                        Ahead& next) {
    const int head = at.kv_head, dim = at.dim;
    if (key.kind == kVectorGrouped4 && key.groups == 2 && Dim)
      return add_code_scores<N, kCodes4, Dim, 2>(key, head, dim, run, queries, scores, next);
    switch (codes_of(key.kind)) {
      case kCodes4: return add_code_scores<N, kCodes4, 0, 0>(key, head, dim, run, queries, scores, next);
      case kUnsigned8: return add_code_scores<N, kUnsigned8, Dim, 1>(key, head, dim, run, queries, scores, next);
      case kSigned8: return add_code_scores<N, kSigned8, 0, 1>(key, head, dim, run, queries, scores, next);
    }
  }

  void add_floats(const Place& at, const Heads& heads, const Run& run, Ahead& next) {
    const Side& key = at.layer.key;
    if (key.kind == kVectorF16) {
      const uint16_t* keys = codes_at<uint16_t>(key, at.dim, run.spot);
      return for_heads<3>(heads.count, [&](auto n, int h) {
        add_float_scores<n(), Halves>(keys, run.end - run.begin, at.dim, heads.inner[h], of(h) + run.begin, next);
      });
    }
    alignas(kAlign) float keys[8 * kMaxHeadDim];
    for (int t = run.begin; t < run.end; t += 8) {
      decode_eight(key, at.kv_head, at.dim, run.spot + (t - run.begin), keys);
      for_heads<3>(heads.count, [&](auto n, int h) {
        add_float_scores<n(), Floats>(keys, 8, at.dim, heads.inner[h], of(h) + t, next);
      });
    }
  }
};

// Weighted sums of values under the heads, in the order that the codes are mixed in.
struct Mixed {
  alignas(kAlign) float sums[kMaxShared][kMaxHeadDim];
  F8 shifts[kMaxShared][kMaxGroups];
  Softmax softmax[kMaxShared];
  bool integer;

  Mixed(const Place& at, int heads) : integer(value_is_integer(at.layer.value, at.dim)) {
    for (int h = 0; h < heads; ++h) {
      std::fill(sums[h], sums[h] + at.dim, 0.0f);
      std::fill(shifts[h], shifts[h] + kMaxGroups, all(0.0f));
    }
  }

  // Adds the tokens of what is read now.
  void add(const Place& at, int heads, Scores& scores, const Reads& reads) {
    const Span& it = reads.now;
    for (int h = 0; h < heads; ++h) softmax[h].raise(scores.of(h), it.size);
    if (!integer)
      for (int h = 0; h < heads; ++h) softmax[h].weigh(scores.of(h), it.size);
    for (int i = 0; i < it.count; ++i) {
      Ahead next = reads.during(it.count + i);
      if (integer) add_codes(at, it, it.runs[i], heads, scores, next);
      else add_floats(at, it, it.runs[i], heads, scores, next);
    }
  }

  // The sums in the order of the head's dims.
  void collect(const Place& at, int h, float* out) const {
    if (!integer) {
      std::memcpy(out, sums[h], sizeof(float) * at.dim);
      return;
    }
    const bool four_bits = is_4bit(at.layer.value.kind);
    const int size = at.dim / groups_of(at.layer.value);
    for (int d = 0; d < at.dim; d += 32) {
      F8 x[4];
      unpaired(four_bits, sums[h] + d, x);
      const float shift[2] = {sum(shifts[h][d / size]), sum(shifts[h][(d + 16) / size])};
      for (int i = 0; i < 4; ++i) store(out + d + 8 * i, x[i] - all(shift[i / 2]));
    }
  }

 private:
  void add_floats(const Place& at, const Span& it, const Run& run, int heads, Scores& scores, Ahead& next) {
    const int from = std::max(it.from, run.begin), to = std::min(it.to, run.end);
    const Spot spot = run.spot + (from - run.begin);
    const Side& value = at.layer.value;
    if (value.kind == kVectorF16) {
      const uint16_t* values = codes_at<uint16_t>(value, at.dim, spot);
      return for_heads<3>(heads, [&](auto n, int h) {
        add_values<n(), Halves>(values, at.dim, to - from, scores.of(h) + from, sums[h], next);
      });
    }
    alignas(kAlign) float values[8 * kMaxHeadDim];
    for (int t = from; t < to; t += 8) {
      const int count = std::min(8, to - t);
      for (int j = 0; j < count; ++j)
        decode_vector(value, at.kv_head, at.dim, spot + (t - from + j), values + j * at.dim);
      for_heads<3>(heads, [&](auto n, int h) {
        add_values<n(), Floats>(values, at.dim, count, scores.of(h) + t, sums[h], next);
      });
    }
  }

  void add_codes(const Place& at, const Span& it, const Run& run, int heads, Scores& scores, Ahead& next) {
    const Side& value = at.layer.value;
    const Steps steps(value, at.kv_head, meta_at(value, run.spot), run.end - run.begin, it.from - run.begin,
                      it.to - run.begin);
    const bool narrow = has_narrow_weights(value, at.dim);
    alignas(kAlign) Weights weights[kMaxShared];
    float units[kMaxShared];
    with_count<kMaxGroups>(groups_of(value), [&](auto groups) {
      with_tile(run.end - run.begin, [&](auto count) {
        round_weights<groups()>(scores, steps, it, run.begin, count, heads, narrow, weights, units);
      });
    });
    switch (codes_of(value.kind)) {
      case kCodes4: return mix<kCodes4>(at, run, heads, weights, units, next);
      case kUnsigned8: return mix<kUnsigned8>(at, run, heads, weights, units, next);
      case kSigned8: return mix<kSigned8>(at, run, heads, weights, units, next);
    }
  }

  template <Codes Kind>
  void mix(const Place& at, const Run& run, int heads, const Weights* weights, const float* units, Ahead& next) {
    if (Kind == kCodes4 && has_narrow_weights(at.layer.value, at.dim)) {
      int d = 0;
      for (; d + 32 * kMixHalves <= at.dim; d += 32 * kMixHalves)
        add_narrow<kMixHalves>(at, run, heads, d, weights, units, next);
      for (; d < at.dim; d += 32) add_narrow<1>(at, run, heads, d, weights, units, next);
      return;
    }
    const uint8_t* rows = codes_at<uint8_t>(at.layer.value, at.dim, run.spot);
    const int size = at.dim / groups_of(at.layer.value), tokens = run.end - run.begin;
    for (int d = 0; d < at.dim; d += 32, rows += Kind == kCodes4 ? 16 : 32) {
      const int g = d / size;
      if constexpr (Kind == kCodes4)
        for (int h = 0; h < heads; ++h)
          mix_halves(rows, at.dim, tokens, weights[h][g], weights[h][g + 1], units[h], sums[h] + d, next);
      else
        for_heads<kMixHeads>(heads, [&](auto n, int h) {
          with_tile(tokens, [&](auto count) {
            mix_rows<n(), Kind>(rows, at.dim, count, weights[h][g], kMaxGroups * kTile, units + h, sums[h] + d, next);
          });
        });
    }
  }

  // Dims `d` to d + 32 * Halves of 4-bit codes.
  template <int Halves>
  void add_narrow(const Place& at, const Run& run, int heads, int d, const Weights* weights, const float* units,
                  Ahead& next) {
    const uint8_t* rows = codes_at<uint8_t>(at.layer.value, at.dim, run.spot) + d / 2;
    const int size = at.dim / groups_of(at.layer.value), g = d / size, last = (d + 32 * (Halves - 1)) / size;
    for_heads<kMixHeads>(heads, [&](auto n, int h) {
      with_tile(run.end - run.begin, [&](auto count) {
        mix_narrow<n(), Halves>(rows, at.dim / 2, count, weights[h][g], weights[h][last], kMaxGroups * kTile, units + h,
                                sums[h] + d, next);
      });
    });
  }

  // Softmax weights times the codes' scales, rounded to multiples of the heads' units; what they make of the shifts is
  // added up at once.
  template <int Groups, class Count>
  void round_weights(Scores& scores, const Steps& steps, const Span& it, int first, Count count, int heads,
                     bool narrow, Weights* rounded, float* units) {
    alignas(kAlign) float scaled[kMaxShared][Groups][kTile];
    const float most = narrow ? kTopNarrow : kTopWide;
    const int slot = static_cast<int>((it.first + first) % kTile);
    float tops[kMaxShared];
    F8 exact[kMaxShared][Groups];
    for (int h = 0; h < heads; ++h)
      tops[h] = scale_weights<Groups>(scores.of(h) + first, steps, count, softmax[h], shifts[h], scaled[h], exact[h]);
    for (int h = 0; h < heads; ++h) {
      units[h] = tops[h] * (1 / most);
      const float inverse = units[h] > 0 ? most / tops[h] : 0.0f;  // a unit too small to be told from 0 has none
      for (int g = 0; g < Groups; ++g) {
        const float* x = scaled[h][g];
        int16_t* out = rounded[h][g];
        if (narrow) {
          typedef FOfCount<Count> F;
          decltype(to_int(F{})) added = {};
          for (int t = 0; t < count; t += kLanesOf<F>)
            added += store_narrow(out, t, load<F>(x + t), all<F>(inverse), slot + t);
          // Codes lie about their middle: times that, what rounding adds would be in all dims alike.
          const F8 rounding = folded_sum(to_float(added)) * all(units[h]) - exact[h][g];
          shifts[h][g] += all(kMiddle4) * rounding;
        } else {
          for (int t = 0; t < count; t += 8) store_words(out + t, to_int(load<F8>(x + t) * all(inverse)));
        }
      }
    }
  }
};

// The sinks' part of a decode: raw vectors in 16 bit, under a softmax of their own, eight at a time.
struct Sinks {
  Softmax softmax[kMaxShared];
  alignas(kAlign) float sums[kMaxShared][kMaxHeadDim];

  // `scores` is room for theirs.
  void attend(const Place& at, const Heads& heads, int64_t from, int64_t to, Scores& scores) {
    for (int h = 0; h < heads.count; ++h) std::fill(sums[h], sums[h] + at.dim, 0.0f);
    for (int64_t first = from; first < to; first += 8)
      add(at, heads, first, static_cast<int>(std::min<int64_t>(8, to - first)), scores);
    for (int h = 0; h < heads.count; ++h)  // what the codec does to values is linear: it may wait for their sum
      shape_vector(at.layer.value, at.layer, at.kv_head, at.dim, 0, sums[h]);
  }

 private:
  alignas(kAlign) float vectors_[8 * kMaxHeadDim];
  Ahead none_;

  void read(const Place& at, const Side& side, int64_t first, int count) {
    for (int p = 0; p < count; ++p) read_sink(side, at.dim, at.spot(0), first + p, vectors_ + p * at.dim);
  }

  void add(const Place& at, const Heads& heads, int64_t first, int count, Scores& scores) {
    const int fours = (count + 3) & ~3;
    read(at, at.layer.key, first, count);
    std::fill(vectors_ + count * at.dim, vectors_ + fours * at.dim, 0.0f);
    for (int h = 0; h < heads.count; ++h) store(scores.of(h), all(0.0f));
    for_heads<3>(heads.count, [&](auto n, int h) {
      add_float_scores<n(), Floats>(vectors_, fours, at.dim, heads.raw[h], scores.of(h), none_);
    });
    for (int h = 0; h < heads.count; ++h) {
      cap_scores(scores.of(h), 8, at.shape.softcap);
      mask_scores(scores.of(h), 0, count, 8);
      scale_row(sums[h], at.dim, softmax[h].raise(scores.of(h), 8));
      softmax[h].weigh(scores.of(h), 8);
    }
    read(at, at.layer.value, first, count);
    for_heads<3>(heads.count, [&](auto n, int h) {
      add_values<n(), Floats>(vectors_, at.dim, count, scores.of(h), sums[h], none_);
    });
  }
};

// One part of a context: (top, total, sums [dim]) per head, for `attend_merge`.
inline void store_partial(float* out, const Softmax& a, const float* x, const Softmax* b, const float* y, int dim) {
  const float top = b ? std::max(a.top, b->top) : a.top;
  const float left = a.top == kNever ? 0 : power_of_two(a.top - top);
  const float right = !b || b->top == kNever ? 0 : power_of_two(b->top - top);
  out[0] = top;
  out[1] = a.total() * left + (b ? b->total() * right : 0.0f);
  for (int i = 0; i < dim; ++i) out[2 + i] = x[i] * left + (b ? y[i] * right : 0.0f);
}

// The slots of split `split` of a sequence that a token at `position` attends to: those of tokens [start, stop).
struct Split {
  int64_t start, stop;
  Split(const Place& at, int64_t position, int split) {
    const int64_t oldest = at.shape.window ? std::max<int64_t>(0, position - at.shape.window + 1) : 0;
    const int64_t first = int64_t{split} * kSplitSlots - at.layer.lead;
    start = std::max(oldest, first), stop = std::min(position + 1, first + kSplitSlots);
  }
  // All of them but the sinks'.
  Span span(const Place& at) const { return Span(at, std::max<int64_t>(start, at.layer.sinks), stop); }
};

// One part of a context for the query heads from `head` on.
inline void attend_split(const AttentionWork& work, const Place& at, const Heads& heads, int token, int head, int split,
                         const Reads& reads) {
  const Split part(at, work.batch->positions[token], split);
  const int64_t sunk = std::min<int64_t>(part.stop, at.layer.sinks);
  const bool has_sinks = part.start < sunk;
  Mixed mixed(at, heads.count);
  Sinks sinks;
  Scores scores;
  if (has_sinks) sinks.attend(at, heads, part.start, sunk, scores);
  if (reads.now.size) {
    scores.compute(at, heads, reads);
    mixed.add(at, heads.count, scores, reads);
  }
  for (int h = 0; h < heads.count; ++h) {
    float sums[kMaxHeadDim];
    mixed.collect(at, h, sums);
    const int64_t row = static_cast<int64_t>(token) * at.shape.heads + head + h;
    float* out = work.partials + (row * work.splits + split) * (at.dim + 2);
    store_partial(out, mixed.softmax[h], sums, has_sinks ? &sinks.softmax[h] : nullptr, sinks.sums[h], at.dim);
  }
}

// One new token of a sequence, all query heads of one KV head, the splits [first, last) of the context.
void attend_splits(const AttentionWork& work, int sequence, int token, int kv_head, int first, int last) {
  const Place at(work, sequence, kv_head);
  const int shared = at.shape.heads / at.shape.kv_heads;
  const auto span = [&](int split) {
    return split < last ? Split(at, work.batch->positions[token], split).span(at) : Span(at, 0, 0);
  };
  for (int base = 0; base < shared; base += kMaxShared) {
    const int head = kv_head * shared + base;
    const float* q = work.q + token * work.q_stride + static_cast<int64_t>(head) * at.dim;
    Span spans[2] = {span(first), span(first + 1)};
    Reads(at, spans[0], spans[1]).begin();
    const Heads heads(at, q, std::min(kMaxShared, shared - base));
    for (int split = first, i = 0; split < last; ++split, i = 1 - i) {
      const Span &now = spans[i], &next = spans[1 - i];
      attend_split(work, at, heads, token, head, split, Reads(at, now, next));
      const bool idle = !now.count;
      spans[i] = span(split + 2);
      if (idle) Reads(at, next, spans[i]).begin();
    }
  }
}

// The parts of one head's context put together: its output.
void attend_merge(const AttentionWork& work, int sequence, int token, int head) {
  const Place at(work, sequence, head / (work.shape->heads / work.shape->kv_heads));
  const int64_t row = static_cast<int64_t>(token) * at.shape.heads + head;
  const int used = split_count(work.batch->positions[token] + 1, at.layer.lead), stride = at.dim + 2;
  const float* parts = work.partials + row * work.splits * stride;
  float top = kNever, total = 0, sums[kMaxHeadDim] = {};
  for (int s = 0; s < used; ++s) top = std::max(top, parts[s * stride]);
  for (int s = 0; s < used; ++s) {
    if (parts[s * stride] == kNever) continue;
    const float weight = power_of_two(parts[s * stride] - top);
    total += parts[s * stride + 1] * weight;
    for (int i = 0; i < at.dim; ++i) sums[i] += parts[s * stride + 2 + i] * weight;
  }
  scale_row(sums, at.dim, 1 / total);
  finish_output(at, sums);
  std::memcpy(work.out + row * at.dim, sums, sizeof(float) * at.dim);
}

}  // namespace kvant::KVANT_ISA
