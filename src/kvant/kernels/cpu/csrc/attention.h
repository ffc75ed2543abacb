// Attention over the blocked cache: decodes token by token with integer dots, prompts tile by tile as float products.
//
// What a codec does to keys is done to the query instead, and what it does to values is undone on the output: a tile's
// codes are used as they lie. Scores gain the query's product with the keys' centre, a polynomial within each tile.
#pragma once

#include <limits>

#include "dots.h"

namespace kvant::KVANT_ISA {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int kMaxShared = 16;  // query heads a KV head that one unit attends with
constexpr int kTileRows = 96;   // query rows of a prefill unit

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
    return {table[number / layer.block_size], kv_head * layer.block_size + static_cast<int>(number % layer.block_size)};
  }
};

// A query as the cache's keys need it: `raw` is scaled, `inner` also transformed as the keys are.
struct Query {
  float raw[kMaxHeadDim], inner[kMaxHeadDim];
};

inline void make_query(const Place& at, const float* q, Query* out) {
  const Side& key = at.layer.key;
  for (int i = 0; i < at.dim; i += 8) {
    const F8 x = load<F8>(q + i) * all(at.shape.scale);
    store(out->raw + i, x);
    store(out->inner + i, key.shaped && key.balance ? x / load<F8>(key.balance + at.kv_head * at.dim + i) : x);
  }
  if (key.shaped) hadamard(out->inner, at.dim);
}

// Undoes on a sum of values, [dim], what the codec did to each.
inline void finish_output(const Place& at, float* x) {
  const Side& value = at.layer.value;
  if (!value.shaped) return;
  hadamard(x, at.dim);
  if (value.balance)
    for (int i = 0; i < at.dim; i += 8) store(x + i, load<F8>(x + i) / load<F8>(value.balance + at.kv_head * at.dim + i));
}

// Adds to the scores of a tile's tokens what the query makes of the keys' centre there.
inline void add_centre(const Place& at, const float* raw, int64_t tile, float* scores) {
  const Side& key = at.layer.key;
  if (!key.centre) return;
  const int half = at.layer.turning;
  const float *cos = at.layer.turn_cos + tile * half, *sin = at.layer.turn_sin + tile * half;
  float turned[kMaxHeadDim];
  std::memcpy(turned, raw, sizeof(float) * at.dim);
  for (int i = 0; i < half; i += 8) {  // the query turned back instead of the centre turned there
    const int left = half - i;
    const F8 a = load_some(raw + i, left), b = load_some(raw + half + i, left);
    const F8 c = load_some(cos + i, left), s = load_some(sin + i, left);
    store_some(turned + i, a * c + b * s, left);
    store_some(turned + half + i, b * c - a * s, left);
  }
  const float* coefficients = key.centre + static_cast<int64_t>(at.kv_head) * key.order * at.dim;
  for (int first = 0; first < key.order; first += 4) {
    const int count = std::min(4, key.order - first);
    F8 dots[4] = {};
    for (int i = 0; i < at.dim; i += 8) {
      const F8 q = load<F8>(turned + i);
      for (int j = 0; j < count; ++j) dots[j] += q * load<F8>(coefficients + (first + j) * at.dim + i);
    }
    float weights[4];
    sums4(dots, weights);
    const float* basis = at.layer.basis + first * kTile;
    for (int t = 0; t < kTile; t += 8) {
      F8 score = load<F8>(scores + t);
      for (int j = 0; j < count; ++j) score += all(weights[j]) * load<F8>(basis + j * kTile + t);
      store(scores + t, score);
    }
  }
}

inline void cap_scores(float* scores, float cap) {
  if (cap > 0) softcap_row(scores, kTile, cap);
}

// Softmax so far: of scores up to `top`, weights sum to `total`.
struct Softmax {
  float top = kNever, total = 0;

  // Turns scores outside [from, to) to 0 and the others to weights; returns what earlier sums are to be multiplied by.
  float fold(float* scores, int from, int to) {
    for (int t = 0; t < from; ++t) scores[t] = kNever;
    for (int t = to; t < kTile; ++t) scores[t] = kNever;
    F8 tops = load<F8>(scores);
    for (int t = 8; t < kTile; t += 8) tops = larger(tops, load<F8>(scores + t));
    const float next = std::max(top, largest(tops));
    if (next == kNever) {
      std::fill(scores, scores + kTile, 0.0f);
      return 1;
    }
    F8 added = all(0.0f);
    for (int t = 0; t < kTile; t += 8) {
      const F8 weight = exponential(load<F8>(scores + t) - all(next));
      store(scores + t, weight);
      added += weight;
    }
    const float kept = top == kNever ? 0.0f : exponential(all(top - next))[0];
    top = next;
    total = total * kept + sum(added);
    return kept;
  }
};

// A tile's tokens [from, to) in the runs that lie together in memory. The other tokens are taken for the nearest of
// these, so that whole vectors may be read.
struct TileRows {
  struct Run {
    int begin, end;
    Spot spot;
  };
  int64_t tile;
  int from, to, count = 0;
  Run runs[kTile / 8 + 1];

  TileRows(const Place& at, int64_t first, int64_t start, int64_t stop)
      : tile(first / kTile), from(static_cast<int>(start - first)), to(static_cast<int>(stop - first)) {
    for (int t = from; t < to;) {
      const int64_t number = first + t + at.layer.lead;
      const int left = at.layer.block_size - static_cast<int>(number % at.layer.block_size);
      const int end = std::min(to, t + left);
      runs[count++] = {t, end, at.spot(number)};
      t = end;
    }
  }

  Spot spot(int t) const {
    int i = 0;
    while (runs[i].end <= t) ++i;
    return runs[i].spot + (t - runs[i].begin);
  }

  void point(const Side& side, int dim, const uint8_t** out) const {
    const int64_t bytes = code_bytes(side, dim);
    for (int i = 0; i < count; ++i) {
      const uint8_t* codes = codes_at<uint8_t>(side, dim, runs[i].spot);
      for (int t = runs[i].begin; t < runs[i].end; ++t, codes += bytes) out[t] = codes;
    }
    std::fill(out, out + from, out[from]);
    std::fill(out + to, out + kTile, out[to - 1]);
  }

  void prefetch(const Side& side, int dim) const {
    const int64_t bytes = code_bytes(side, dim), words = 2 * meta_words(side);
    for (int i = 0; i < count; ++i) {
      const int64_t length = runs[i].end - runs[i].begin;
      const char* codes = codes_at<char>(side, dim, runs[i].spot);
      for (int64_t b = 0; b < length * bytes; b += 64) __builtin_prefetch(codes + b);
      const char* meta = reinterpret_cast<const char*>(meta_at(side, runs[i].spot));
      for (int64_t b = 0; b < length * words; b += 64) __builtin_prefetch(meta + b);
    }
  }
};

// Scale and shift of each token's codes: x = code * scale - shift. A vector's width is spare behind the tile.
struct Steps {
  alignas(32) float scale[kMaxGroups][kTile + 8], shift[kMaxGroups][kTile + 8];

  Steps(const Side& side, int kv_head, const TileRows& it) {
    const int width = meta_words(side), groups = groups_of(side);
    if (!width) put(0, it.from, all(side.scale[kv_head]), all(0.0f));
    for (int i = 0; i < it.count && width; ++i) read_run(side, it.runs[i], width);
    for (int g = 0; g < groups; ++g) {
      extend(scale[g], it, !width);
      extend(shift[g], it, !width);
    }
  }

 private:
  void put(int group, int t, F8 scales, F8 shifts) {
    store(scale[group] + t, scales);
    store(shift[group] + t, shifts);
  }

  // A run is read to its end, not beyond: its last vector overlaps the one before.
  void read_run(const Side& side, const TileRows::Run& run, int width) {
    const uint16_t* words = meta_at(side, run.spot);
    const int count = run.end - run.begin;
    if (count < 8) {
      uint16_t held[8 * kMaxGroups] = {};
      std::memcpy(held, words, sizeof(uint16_t) * width * count);
      read(side.kind, held, width, run.begin);
      return;
    }
    for (int t = 0; t < count; t += 8) {
      const int from = std::min(t, count - 8);
      read(side.kind, words + from * width, width, run.begin + from);
    }
  }

  void read(int32_t kind, const uint16_t* words, int width, int t) {
    if (kind == kVectorSymmetric8) {
      put(0, t, load_half(words), all(0.0f));
    } else if (kind != kVectorGrouped4) {
      const U8 both = load<U8>(words);
      put(0, t, widen_halves(both & 0xffff), -widen_halves(both >> 16));
    } else if (width == 2) {
      const U8 both = load<U8>(words);
      put_words(0, t, both & 0xffff);
      put_words(1, t, both >> 16);
    } else {
      for (int g = 0; g < width; ++g) {
        U8 lanes;
        for (int i = 0; i < 8; ++i) lanes[i] = words[i * width + g];
        put_words(g, t, lanes);
      }
    }
  }

  void put_words(int group, int t, U8 words) {
    const F8 scales = widen_halves((words & 0xffc0) >> 1);
    put(group, t, scales, scales * (to_float(as<I8>(words & 63)) * all(0.125f) + all(7.5f - 4.0f)));
  }

  // Tokens outside of the tile's have what the nearest has; with `all`, every token has what the first has.
  static void extend(float* x, const TileRows& it, bool all_alike) {
    const int to = all_alike ? it.from + 1 : it.to;
    std::fill(x, x + it.from, x[it.from]);
    std::fill(x + to, x + kTile, x[to - 1]);
  }
};

using Scores = float[kMaxShared][kTile];

inline void integer_scores(const Place& at, const TileRows& it, const IntegerQuery* queries, int heads, Scores scores) {
  const Side& key = at.layer.key;
  const uint8_t* codes[kTile];
  it.point(key, at.dim, codes);
  alignas(32) int32_t dots[kMaxShared][kMaxGroups][kTile];
  const int begin = it.from & ~7, end = (it.to + 7) & ~7, groups = groups_of(key);
  if (is_4bit(key.kind)) key_dots4(codes, begin, end, queries, heads, at.dim, groups, dots);
  else if (is_signed(key.kind)) key_dots8<true>(codes, begin, end, queries, heads, at.dim, dots);
  else key_dots8<false>(codes, begin, end, queries, heads, at.dim, dots);
  const Steps steps(key, at.kv_head, it);
  for (int h = 0; h < heads; ++h)
    for (int t = begin; t < end; t += 8) {
      F8 score = all(0.0f);
      for (int g = 0; g < groups; ++g) {
        score += load<F8>(steps.scale[g] + t) * (to_float(load<I8>(dots[h][g] + t)) * all(queries[h].step[g]));
        score -= load<F8>(steps.shift[g] + t) * all(queries[h].sum[g]);
      }
      store(scores[h] + t, score);
    }
}

// A tile's vectors as floats, [kTile][dim]; only its own tokens' are written.
inline void decode_rows(const Place& at, const Side& side, const TileRows& it, float* out) {
  for (int i = 0; i < it.count; ++i)
    for (int t = it.runs[i].begin; t < it.runs[i].end; ++t)
      decode_vector(side, at.kv_head, at.dim, it.runs[i].spot + (t - it.runs[i].begin), out + t * at.dim);
}

inline void float_scores(const Place& at, const TileRows& it, const Query* queries, int heads, Scores scores) {
  alignas(32) float keys[(kTile + 4) * kMaxHeadDim];
  decode_rows(at, at.layer.key, it, keys);
  for (int h = 0; h < heads; ++h)
    for (int t = it.from & ~3; t < it.to; t += 4) {
      F8 dots[4] = {};
      for (int i = 0; i < at.dim; i += 8) {
        const F8 q = load<F8>(queries[h].inner + i);
        for (int j = 0; j < 4; ++j) dots[j] += q * load<F8>(keys + (t + j) * at.dim + i);
      }
      sums4(dots, scores[h] + t);
    }
}

// Weighted sums of values for the heads of one KV head, in the order that the codes are mixed in.
struct Mixed {
  alignas(32) float sums[kMaxShared][kMaxHeadDim];
  float shifts[kMaxShared][kMaxGroups] = {};
  bool integer;
  int8_t group_of[kMaxHeadDim / 8][2];

  Mixed(const Place& at, int heads) : integer(value_is_integer(at.layer.value, at.dim)) {
    for (int h = 0; h < heads; ++h) std::fill(sums[h], sums[h] + at.dim, 0.0f);
    if (!integer) return;
    const int size = at.dim / groups_of(at.layer.value);
    for (int v = 0; v < at.dim / 8; ++v)
      for (int half = 0; half < 2; ++half)
        group_of[v][half] = static_cast<int8_t>(paired_dim(is_4bit(at.layer.value.kind), v, 4 * half) / size);
  }

  void rescale(const Place& at, int h, float kept) {
    scale_row(sums[h], at.dim, kept);
    for (float& shift : shifts[h]) shift *= kept;
  }

  void add(const Place& at, const TileRows& it, int heads, Scores weights) {
    integer ? add_codes(at, it, heads, weights) : add_floats(at, it, heads, weights);
  }

  void add_floats(const Place& at, const TileRows& it, int heads, Scores weights) {
    alignas(32) float values[kTile * kMaxHeadDim];
    decode_rows(at, at.layer.value, it, values);
    for (int h = 0; h < heads; ++h) {
      int i = 0;
      for (; i + 8 * kChunk <= at.dim; i += 8 * kChunk) add_columns<kChunk>(values + i, at.dim, it, weights[h], sums[h] + i);
      for (; i < at.dim; i += 8) add_columns<1>(values + i, at.dim, it, weights[h], sums[h] + i);
    }
  }

  template <int Vectors>
  static void add_columns(const float* values, int dim, const TileRows& it, const float* weights, float* into) {
    F8 acc[Vectors];
    for (int i = 0; i < Vectors; ++i) acc[i] = load<F8>(into + 8 * i);
    for (int t = it.from; t < it.to; ++t) {
      const F8 weight = all(weights[t]);
      for (int i = 0; i < Vectors; ++i) acc[i] += weight * load<F8>(values + t * dim + 8 * i);
    }
    for (int i = 0; i < Vectors; ++i) store(into + 8 * i, acc[i]);
  }

  void add_codes(const Place& at, const TileRows& it, int heads, Scores weights) {
    const Side& value = at.layer.value;
    const int groups = groups_of(value), begin = it.from & ~7, end = (it.to + 7) & ~7, tokens = end - begin;
    const uint8_t* codes[kTile];
    it.point(value, at.dim, codes);
    Pairs pairs;
    if (is_4bit(value.kind)) pair_values4(codes + begin, tokens, at.dim, pairs);
    else if (is_signed(value.kind)) pair_values8<true>(codes + begin, tokens, at.dim, pairs);
    else pair_values8<false>(codes + begin, tokens, at.dim, pairs);
    const Steps steps(value, at.kv_head, it);
    for (int h = 0; h < heads; ++h) {
      alignas(32) int16_t rounded[kMaxGroups][kTile];
      const float unit = round_weights(weights[h], steps, groups, begin, end, h, rounded);
      I8 mixed[kMaxHeadDim / 8];
      mix_pairs(pairs, tokens, at.dim / 8, rounded, group_of, mixed);
      for (int v = 0; v < at.dim / 8; ++v)
        store(sums[h] + 8 * v, load<F8>(sums[h] + 8 * v) + to_float(mixed[v]) * all(unit));
    }
  }

  // The weights times the codes' scales, in 15 bits; what they make of the shifts is added up at once.
  float round_weights(const float* weights, const Steps& steps, int groups, int begin, int end, int h,
                      int16_t (*rounded)[kTile]) {
    alignas(32) float scaled[kMaxGroups][kTile];
    F8 top = all(0.0f);
    for (int g = 0; g < groups; ++g) {
      F8 shift = all(0.0f);
      for (int t = begin; t < end; t += 8) {
        const F8 w = load<F8>(weights + t), x = w * load<F8>(steps.scale[g] + t);
        shift += w * load<F8>(steps.shift[g] + t);
        top = larger(top, magnitude(x));
        store(scaled[g] + t, x);
      }
      shifts[h][g] += sum(shift);
    }
    const float unit = largest(top) / 32767.0f;
    const F8 inverse = all(unit > 0 ? 1.0f / unit : 0.0f);
    typedef int16_t Narrow __attribute__((vector_size(16)));
    for (int g = 0; g < groups; ++g)
      for (int t = begin; t < end; t += 8)
        store(rounded[g] + t - begin, __builtin_convertvector(to_int(load<F8>(scaled[g] + t) * inverse), Narrow));
    return unit;
  }

  // The sums in the order of the head's dims.
  void collect(const Place& at, int h, float* out) const {
    if (!integer) {
      std::memcpy(out, sums[h], sizeof(float) * at.dim);
      return;
    }
    const bool four_bits = is_4bit(at.layer.value.kind);
    const int size = at.dim / groups_of(at.layer.value);
    for (int i = 0; i < at.dim; ++i) {
      const int d = paired_dim(four_bits, i / 8, i % 8);
      out[d] = sums[h][i] - shifts[h][d / size];
    }
  }
};

// The sinks' part of a decode: raw vectors in 16 bit, under a softmax of their own.
struct Sinks {
  Softmax softmax[kMaxShared];
  float sums[kMaxShared][kMaxHeadDim];

  void attend(const Place& at, const Query* queries, int heads, int64_t from, int64_t to) {
    const Spot first = at.spot(0);
    for (int h = 0; h < heads; ++h) std::fill(sums[h], sums[h] + at.dim, 0.0f);
    alignas(32) float key[kMaxHeadDim], value[kMaxHeadDim];
    for (int64_t p = from; p < to; ++p) {
      read_sink(at.layer.key, at.dim, first, p, key);
      read_sink(at.layer.value, at.dim, first, p, value);
      shape_vector(at.layer.value, at.layer, at.kv_head, at.dim, p, value);
      for (int h = 0; h < heads; ++h) {
        F8 dot = all(0.0f);
        for (int i = 0; i < at.dim; i += 8) dot += load<F8>(key + i) * load<F8>(queries[h].raw + i);
        float score[kTile] = {sum(dot)};
        cap_scores(score, at.shape.softcap);
        const float kept = softmax[h].fold(score, 0, 1);
        for (int i = 0; i < at.dim; i += 8)
          store(sums[h] + i, load<F8>(sums[h] + i) * all(kept) + all(score[0]) * load<F8>(value + i));
      }
    }
  }
};

// One part of a context: (top, total, sums [dim]) per head, for `attend_merge`.
inline void store_partial(float* out, const Softmax& a, const float* x, const Softmax* b, const float* y, int dim) {
  const float top = b ? std::max(a.top, b->top) : a.top;
  const float left = a.top == kNever ? 0 : std::exp(a.top - top), right = !b || b->top == kNever ? 0 : std::exp(b->top - top);
  out[0] = top;
  out[1] = a.total * left + (b ? b->total * right : 0.0f);
  for (int i = 0; i < dim; ++i) out[2 + i] = x[i] * left + (b ? y[i] * right : 0.0f);
}

// One new token of a sequence, the query heads of one KV head (at most kMaxShared), kSplitTokens of the context.
void attend_split(const AttentionWork& work, int sequence, int token, int kv_head, int split) {
  const Place at(work, sequence, kv_head);
  const int shared = at.shape.heads / at.shape.kv_heads, dim = at.dim;
  const int64_t position = work.batch->positions[token];
  const int64_t oldest = at.shape.window ? std::max<int64_t>(0, position - at.shape.window + 1) : 0;
  const int64_t start = std::max<int64_t>(oldest, int64_t{split} * kSplitTokens);
  const int64_t stop = std::min<int64_t>(position + 1, (int64_t{split} + 1) * kSplitTokens);
  for (int base = 0; base < shared; base += kMaxShared) {
    const int heads = std::min(kMaxShared, shared - base), head = kv_head * shared + base;
    Query queries[kMaxShared];
    IntegerQuery codes[kMaxShared];
    const bool integer = key_is_integer(at.layer.key, dim);
    for (int h = 0; h < heads; ++h) {
      make_query(at, work.q + token * work.q_stride + static_cast<int64_t>(head + h) * dim, &queries[h]);
      if (integer) quantize_query(at.layer.key, queries[h].inner, dim, &codes[h]);
    }
    Softmax softmax[kMaxShared];
    Mixed mixed(at, heads);
    Sinks sinks;
    const int64_t sunk = std::min<int64_t>(stop, at.layer.sinks);
    const bool has_sinks = start < sunk;
    if (has_sinks) sinks.attend(at, queries, heads, start, sunk);
    for (int64_t from = std::max<int64_t>(start, at.layer.sinks); from < stop;) {
      const int64_t tile = from / kTile * kTile, to = std::min<int64_t>(stop, tile + kTile);
      const TileRows it(at, tile, from, to);
      if (to < stop) {
        const TileRows next(at, to, to, std::min<int64_t>(stop, to + kTile));
        next.prefetch(at.layer.key, dim);
        next.prefetch(at.layer.value, dim);
      }
      alignas(32) Scores scores;
      integer ? integer_scores(at, it, codes, heads, scores) : float_scores(at, it, queries, heads, scores);
      for (int h = 0; h < heads; ++h) {
        add_centre(at, queries[h].raw, it.tile, scores[h]);
        cap_scores(scores[h], at.shape.softcap);
        const float kept = softmax[h].fold(scores[h], it.from, it.to);
        if (kept != 1) mixed.rescale(at, h, kept);
      }
      mixed.add(at, it, heads, scores);
      from = to;
    }
    for (int h = 0; h < heads; ++h) {
      float sums[kMaxHeadDim];
      mixed.collect(at, h, sums);
      float* out = work.partials + ((static_cast<int64_t>(token) * at.shape.heads + head + h) * work.splits + split) * (dim + 2);
      store_partial(out, softmax[h], sums, has_sinks ? &sinks.softmax[h] : nullptr, sinks.sums[h], dim);
    }
  }
}

// The parts of one head's context put together: its output.
void attend_merge(const AttentionWork& work, int sequence, int token, int head) {
  const Place at(work, sequence, head / (work.shape->heads / work.shape->kv_heads));
  const int64_t row = static_cast<int64_t>(token) * at.shape.heads + head;
  const int used = static_cast<int>(work.batch->positions[token] / kSplitTokens) + 1, stride = at.dim + 2;
  const float* parts = work.partials + row * work.splits * stride;
  float top = kNever, total = 0, sums[kMaxHeadDim] = {};
  for (int s = 0; s < used; ++s) top = std::max(top, parts[s * stride]);
  for (int s = 0; s < used; ++s) {
    if (parts[s * stride] == kNever) continue;
    const float weight = std::exp(parts[s * stride] - top);
    total += parts[s * stride + 1] * weight;
    for (int i = 0; i < at.dim; ++i) sums[i] += parts[s * stride + 2 + i] * weight;
  }
  for (int i = 0; i < at.dim; ++i) sums[i] /= total;
  finish_output(at, sums);
  std::memcpy(work.out + row * at.dim, sums, sizeof(float) * at.dim);
}

}  // namespace kvant::KVANT_ISA
