#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace kvant {

namespace {

constexpr int64_t kRowsAtOnce = 2;     // rows of simple ops in one unit
constexpr int64_t kLanes = 8;          // behind a quantized row's numbers so many are read and not used
constexpr int64_t kLine = 16;          // numbers; groups an odd number of lines apart fall into all sets of a cache
constexpr int64_t kTokenBlock = 256;   // tokens whose inputs stay in the cache while weights pass by
constexpr int64_t kPartFloats = 1 << 17;  // 512 KB of gates, which a second cache has room for
constexpr int kSplitsAtOnce = 2;       // of a context, in one unit of work for several threads
constexpr int64_t kHeadsWritten = 4;   // side by side where there is one token
constexpr int64_t kPartColumns = 512;  // at least so many a part of a panel's inputs has
constexpr int64_t kPanelNumbers = 24;  // of 64 columns of a panel's inputs at most: 4 rounds of 6
constexpr int kFewRows = 16;           // up to so many query rows a KV head, tokens are attended one by one

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some of a step's tokens, each as a sequence of its own with what it attends to.
class Alone {
 public:
  Alone(const Batch& all, const Wanted& wanted) : batch_(all), starts_(wanted.count + 1) {
    for (int64_t i = 0; i < wanted.count; ++i) {
      const int64_t token = wanted.tokens[i];
      const int64_t* next = std::upper_bound(all.query_starts, all.query_starts + all.sequences, token);
      const int64_t* table = all.block_tables + (next - all.query_starts - 1) * all.table_width;
      starts_[i + 1] = i + 1;
      positions_.push_back(all.positions[token]);
      lengths_.push_back(positions_.back() + 1);
      tables_.insert(tables_.end(), table, table + all.table_width);
    }
    batch_.tokens = batch_.sequences = static_cast<int32_t>(wanted.count);
    batch_.ids = batch_.slots = nullptr;  // nothing of them is to be written
    batch_.positions = positions_.data(), batch_.query_starts = starts_.data();
    batch_.context_lens = lengths_.data(), batch_.block_tables = tables_.data();
  }
  const Batch& batch() const { return batch_; }

 private:
  Batch batch_;
  std::vector<int64_t> starts_, positions_, lengths_, tables_;
};

}  // namespace

// Calls body(first, last) for all rows, `at_once` a unit.
template <class Body>
void Step::row_units(int64_t count, int64_t at_once, Body body) {
  turn_.run(ceil_div(count, at_once),
            [&](int64_t unit) { body(unit * at_once, std::min(count, (unit + 1) * at_once)); });
}

template <class Body>
void Step::rows(int64_t count, Body body) {
  row_units(count, kRowsAtOnce, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row);
  });
}

// Room for a linear layer's inputs, quantized as its weight wants them.
Input Step::room(const Weight& weight, const float* x, int64_t tokens) {
  if (weight.kind <= kWeightBF16) return {x, {}, weight.columns, {}, nullptr};
  const int padded = static_cast<int>(ceil_div(weight.columns, kGroup)) * kGroup;
  const int64_t stride = tokens < kLine ? tokens : (ceil_div(tokens, kLine) | 1) * kLine;
  const int64_t groups = stride * padded / kGroup;
  Arena& arena = turn_.arena();
  Input in = {x,
              {arena.take<int8_t>(tokens * padded + kGroup), arena.take<float>(groups + kLanes),
               arena.take<float>(groups), arena.take<int32_t>(groups), arena.take<int32_t>(2 * groups + kLanes),
               stride},
              padded,
              {},
              nullptr};
  const int height = k_.panel_height(tokens);
  if (!height) return in;
  const int64_t rows = ceil_div(tokens, height) * height, parts = ceil_div(padded, kPartColumns);
  const int64_t numbers = ceil_div(padded, 2 * kGroup) * kPanelNumbers;
  in.panels = {arena.take<int32_t>(rows * numbers), arena.take<float>(rows * parts), height};
  return in;
}

// A linear layer's inputs, x [tokens, columns]; `make(t)` writes row t of x first, on the thread that quantizes it.
template <class Make>
Input Step::inputs(const Weight& weight, const float* x, int64_t tokens, Make make) {
  Input in = room(weight, x, tokens);
  in.outliers = turn_.arena().take<Outlier>(tokens);
  float* ordered = weight.order ? turn_.arena().take<float>(tokens * weight.columns) : nullptr;
  const auto quantize = [&](int64_t t) {
    make(t);
    const float* row = x + t * weight.columns;
    if (ordered) {
      float* to = ordered + t * weight.columns;
      for (int c = 0; c < weight.columns; ++c) to[c] = row[weight.order[c]];
      row = to;
    }
    if (weight.kind > kWeightBF16) k_.quantize_row(row, weight.columns, in.row(t), in.outliers + t);
  };
  const int64_t at_once = in.panels.tiles ? in.panels.height : kRowsAtOnce;
  row_units(tokens, at_once, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) quantize(t);
    if (in.panels.tiles) k_.panel_tile_rows(weight, in, static_cast<int>(first), static_cast<int>(last));
  });
  return in;
}

// Into how many units a thread's share of a product is cut: into few where it waits for memory, which is best read on
// and on. One thread has nobody to take units over, and needs one.
int64_t Step::units_per_thread(int64_t tokens) const {
  if (turn_.threads() == 1) return 1;
  return tokens > 1 ? 8 : 2;
}

int64_t Step::Cuts::tiles() const { return ceil_div(tokens, height); }
int64_t Step::Cuts::chunks() const { return ceil_div(steps, width); }
int64_t Step::Cuts::rows() const { return ceil_div(tiles(), blocks) * height; }

Part Step::Cuts::part(int64_t unit) const {
  const int64_t block = unit / chunks(), begin = unit % chunks() * width;
  const auto start = [&](int64_t b) { return std::min(tokens, tiles() * b / blocks * height); };
  return {static_cast<int>(start(block)), static_cast<int>(start(block + 1)), static_cast<int>(begin),
          static_cast<int>(std::min(steps, begin + width))};
}

// Of a product of all tokens. Units are a multiple of `align` steps, but for the last, and have at most `floats`
// results, unless `align` steps alone have more.
Step::Cuts Step::cut(const Input& in, const Streams& streams, int64_t tokens, int align, int64_t floats) const {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(tokens, kTokenBlock));
  Cuts cuts = {tokens, std::max(1, in.panels.height), blocks, streams.steps, 0};
  const int64_t units = turn_.threads() * units_per_thread(tokens), steps = ceil_div(cuts.steps, align);
  const int64_t most = floats / (std::max<int64_t>(1, cuts.rows()) * streams.width * kRowBlock * align);
  cuts.width = std::max<int64_t>(1, std::min({steps, steps * blocks / units, most})) * align;
  return cuts;
}

Streams Step::streams(const Weight& weight, int64_t tokens) {
  return Streams(static_cast<int>(ceil_div(weight.rows, kRowBlock)), k_.linear_streams(weight, tokens));
}

void Step::multiply(const Linear& linear, const Input& in, int64_t tokens, float* out) {
  const Streams streams = this->streams(linear.weight, tokens);
  const Cuts cuts = cut(in, streams, tokens, 1, INT64_MAX);
  const Target target = {out, linear.weight.rows, 0, 0, streams.stride};
  turn_.run(cuts.blocks * cuts.chunks(),
            [&](int64_t unit) { k_.linear_part(linear, in, streams, cuts.part(unit), target); });
}

void Step::linear(const Linear& linear, const float* x, int64_t tokens, float* out) {
  multiply(linear, inputs(linear.weight, x, tokens, [](int64_t) {}), tokens, out);
}

// The inputs of `down`: the activations of gate_up's products. With as many streams in the gates as in what they gate,
// a step has both halves of the same columns: what a unit makes of them is meant to stay in the second cache.
Input Step::gated_inputs(const Model& model, const Layer& layer, const Input& in, int64_t tokens) {
  const Weight& down = layer.down.weight;
  const Streams halves = streams(layer.gate_up.weight, tokens);
  constexpr int kAlign = kGroup / kRowBlock;  // steps that make a group
  const int columns = halves.stride * kRowBlock;
  if (down.order || down.kind <= kWeightBF16 || columns % kGroup || columns * halves.width != 2 * model.intermediate)
    return gated_in_passes(model, layer, in, tokens);
  const Input out = room(down, nullptr, tokens);
  const Cuts cuts = cut(in, halves, tokens, kAlign, kPartFloats);
  const int64_t stream = cuts.width * kRowBlock, pitch = stream * halves.width, size = cuts.rows() * pitch;
  float* kept = turn_.arena().take<float>(turn_.threads() * size);
  turn_.run(cuts.blocks * cuts.chunks(), [&](int64_t unit, int thread) {
    const Part part = cuts.part(unit);
    const int count = (part.end - part.begin) * kRowBlock;
    float* row = kept + thread * size;
    k_.linear_part(layer.gate_up, in, halves, part, {row, pitch, part.first, part.begin, static_cast<int>(cuts.width)});
    for (int64_t t = part.first; t < part.last; ++t, row += pitch)
      for (int s = 0; s < halves.width / 2; ++s) {
        float* gate = row + s * stream;
        k_.gated_row(gate, gate + pitch / 2, count, model.activation, gate);
        k_.quantize_row(gate, count, out.row(t).group((s * columns + part.begin * kRowBlock) / kGroup), nullptr);
      }
  });
  if (out.panels.tiles)
    row_units(tokens, out.panels.height, [&](int64_t first, int64_t last) {
      k_.panel_tile_rows(down, out, static_cast<int>(first), static_cast<int>(last));
    });
  return out;
}

// The same of products that are all made before they are gated.
Input Step::gated_in_passes(const Model& model, const Layer& layer, const Input& in, int64_t tokens) {
  const int width = model.intermediate;
  float* wide = turn_.arena().take<float>(tokens * 2 * width);
  float* narrow = turn_.arena().take<float>(tokens * width);
  multiply(layer.gate_up, in, tokens, wide);
  return inputs(layer.down.weight, narrow, tokens, [&](int64_t t) {
    k_.gated_row(wide + t * 2 * width, wide + (t * 2 + 1) * width, width, model.activation, narrow + t * width);
  });
}

void Step::embedding(const Weight& weight, const int64_t* ids, int64_t tokens, float* out) {
  rows(tokens, [&](int64_t t) { k_.weight_row(weight, static_cast<int>(ids[t]), out + t * weight.columns); });
}

void Step::rms_norm(const float* x, const float* weight, float eps, int64_t count, int width, float* out) {
  rows(count, [&](int64_t row) { k_.rms_norm_row(x + row * width, weight, eps, width, out + row * width); });
}

void Step::gated(const float* x, int64_t count, int width, int32_t activation, float* out) {
  rows(count, [&](int64_t row) {
    k_.gated_row(x + row * 2 * width, x + (row * 2 + 1) * width, width, activation, out + row * width);
  });
}

// Cuts a step's vectors into units of up to kWriteWidth that are written side by side: a KV head's tokens, or where
// there are fewer of them, several heads' too. Calls `body(entries, count)`, entries without their vectors.
template <class Body>
void Step::write_units(const AttentionShape& shape, const Batch& batch, Body body) {
  const int64_t tokens = std::clamp<int64_t>(batch.tokens, 1, kWriteWidth);
  const int64_t heads = std::max<int64_t>(1, kHeadsWritten / tokens);
  const int64_t blocks = ceil_div(batch.tokens, tokens);
  turn_.run(blocks * ceil_div(shape.kv_heads, heads), [&](int64_t unit) {
    Entry entries[kWriteWidth];
    int count = 0;
    const int64_t first = unit / blocks * heads, token = unit % blocks * tokens;
    for (int64_t head = first; head < std::min<int64_t>(shape.kv_heads, first + heads); ++head)
      for (int64_t t = token; t < std::min<int64_t>(batch.tokens, token + tokens); ++t)
        entries[count++] = {static_cast<int>(head), static_cast<int>(t), batch.slots[t], batch.positions[t], nullptr};
    body(entries, count);
  });
}

void Step::write_kv(const KvLayer& cache, const AttentionShape& shape, const Batch& batch, const float* k,
                    const float* v, int64_t stride, uint8_t* bad) {
  write_units(shape, batch, [&](Entry* entries, int count) {
    write_side(cache, cache.key, shape.head_dim, k, stride, entries, count, bad);
    write_side(cache, cache.value, shape.head_dim, v, stride, entries, count, bad);
  });
}

// Writes the entries' keys or values, x: [tokens, kv_heads, head_dim], rows `stride` floats apart.
void Step::write_side(const KvLayer& cache, const Side& side, int dim, const float* x, int64_t stride, Entry* entries,
                      int count, uint8_t* bad) {
  for (int n = 0; n < count; ++n) entries[n].x = x + entries[n].token * stride + entries[n].head * dim;
  const unsigned failed = k_.write_vectors(side, cache, dim, entries, count);
  for (int n = 0; n < count; ++n)
    if (failed >> n & 1) bad[entries[n].token] = 1;
}

// Units of attention: of decodes a token, a KV head and up to `at_once` splits; or, with none of these, of prompts a
// tile of tokens and a KV head.
int64_t Step::plan(const AttentionShape& shape, const Batch& batch, int lead, int at_once, Unit* units) {
  const int shared = shape.heads / shape.kv_heads, tile = std::max(1, kTileRows / shared);
  int64_t count = 0;
  for (int s = 0; s < batch.sequences; ++s) {
    const int start = static_cast<int>(batch.query_starts[s]), stop = static_cast<int>(batch.query_starts[s + 1]);
    const bool few = (stop - start) * shared <= kFewRows || stop - start == 1 || shared > kTileRows;
    if (few != (at_once > 0)) continue;
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (int t = start; !few && t < stop; t += tile) units[count++] = {s, t, std::min(stop, t + tile), head, 0, 0};
      for (int t = start; few && t < stop; ++t)
        for (int splits = split_count(batch.positions[t] + 1, lead), i = 0; i < splits; i += at_once)
          units[count++] = {s, t, t + 1, head, i, std::min(splits, i + at_once)};
    }
  }
  return count;
}

void Step::attention(const KvLayer& cache, const AttentionShape& shape, const Batch& batch, const float* q,
                     int64_t stride, float* out) {
  int64_t longest = 1;
  for (int s = 0; s < batch.sequences; ++s) longest = std::max(longest, batch.context_lens[s]);
  const int lead = cache.lead, splits = split_count(longest, lead);
  Unit* units = turn_.arena().take<Unit>(int64_t{batch.tokens} * shape.kv_heads * splits);
  const int64_t tiles = plan(shape, batch, lead, 0, units);
  AttentionWork work{&cache, &shape, &batch, q, stride, out, nullptr, splits};
  turn_.run(tiles, [&](int64_t i) {
    k_.attend_tile(work, units[i].sequence, units[i].first, units[i].last, units[i].kv_head);
  });
  // What a token's splits share is made once for those of a unit; one thread needs no more units than that.
  const int at_once = turn_.threads() > 1 ? kSplitsAtOnce : splits;
  const int64_t parts = plan(shape, batch, lead, at_once, units);
  if (!parts) return;
  work.partials = turn_.arena().take<float>(int64_t{batch.tokens} * shape.heads * splits * (shape.head_dim + 2));
  const int shared = shape.heads / shape.kv_heads;
  const auto merge = [&](const Unit& unit) {
    for (int h = 0; h < shared; ++h) k_.attend_merge(work, unit.sequence, unit.first, unit.kv_head * shared + h);
  };
  turn_.run(parts, [&](int64_t i) {
    const Unit& unit = units[i];
    k_.attend_splits(work, unit.sequence, unit.first, unit.kv_head, unit.split, unit.last_split);
    if (splits <= at_once) merge(unit);
  });
  if (splits <= at_once) return;
  turn_.run(parts, [&](int64_t i) {
    if (!units[i].split) merge(units[i]);
  });
}

// Norms and rotates one head's vector, a query's or a key's.
void Step::rotate(const Layer& layer, const Model& model, const Rotary* rotaries, int64_t t, const float* norm,
                  float* x) {
  const int dim = layer.attention.head_dim;
  if (norm) k_.rms_norm_row(x, norm, model.eps, dim, x);
  if (layer.rope < 0) return;
  const Rotary& rotary = rotaries[layer.rope];
  k_.rope_row(x, rotary.cos + t * rotary.pairs, rotary.sin + t * rotary.pairs, rotary.pairs);
}

// Queries and keys are rotated, keys and values written.
void Step::enter_cache(const Layer& layer, const Model& model, const KvLayer& cache, const Batch& batch,
                       const Rotary* rotaries, const float* scale, float* qkv, uint8_t* bad) {
  const AttentionShape& shape = layer.attention;
  const int64_t dim = shape.head_dim, heads = shape.kv_heads, shared = shape.heads / heads;
  const int64_t stride = (shape.heads + 2 * heads) * dim;
  float* keys = qkv + shape.heads * dim;
  write_units(shape, batch, [&](Entry* entries, int count) {
    for (int n = 0; n < count; ++n) {
      const int64_t t = entries[n].token, head = entries[n].head;
      float* row = qkv + t * stride;
      for (int64_t query = head * shared; query < (head + 1) * shared; ++query) {
        rotate(layer, model, rotaries, t, layer.q_norm, row + query * dim);
        if (scale) k_.scale_row(row + query * dim, static_cast<int>(dim), scale[t]);
      }
      rotate(layer, model, rotaries, t, layer.k_norm, keys + t * stride + head * dim);
    }
    write_side(cache, cache.key, shape.head_dim, keys, stride, entries, count, bad);
    write_side(cache, cache.value, shape.head_dim, keys + heads * dim, stride, entries, count, bad);
  });
}

// Adds x, normed where it is to be, to the residual stream's row t.
void Step::add(const Model& model, const Stream& stream, int64_t t) {
  float* row = stream.x + t * model.hidden;
  if (stream.post_norm) k_.rms_norm_row(row, stream.post_norm, model.eps, model.hidden, row);
  k_.add_row(row, model.hidden, stream.residual + t * model.hidden);
}

// A linear layer's inputs: the residual stream, once x is added where there is one, normed.
Input Step::normed_inputs(const Model& model, const Linear& linear, const float* norm, bool has_x,
                          const Stream& stream) {
  const int64_t width = model.hidden;
  return inputs(linear.weight, stream.x, stream.tokens, [&, width](int64_t t) {
    if (has_x) add(model, stream, t);
    k_.rms_norm_row(stream.residual + t * width, norm, model.eps, model.hidden, stream.x + t * width);
  });
}

// The rows of x [tokens, width] that are wanted, rows of x `stride` floats apart.
float* Step::chosen(const float* x, int64_t stride, int64_t width, const Wanted& wanted) {
  float* out = turn_.arena().take<float>(wanted.count * width);
  for (int64_t i = 0; i < wanted.count; ++i)
    std::memcpy(out + i * width, x + wanted.tokens[i] * stride, sizeof(float) * width);
  return out;
}

// The last layer's attention, of the wanted tokens alone, with which the residual stream goes on.
void Step::narrow(const Model& model, const KvLayer& cache, const Batch& batch, const float* qkv, int64_t stride,
                  const Wanted& wanted, Stream& stream, float* mixed) {
  const AttentionShape& shape = model.layer[model.layers - 1].attention;
  const int64_t width = int64_t{shape.heads} * shape.head_dim;
  const Alone alone(batch, wanted);
  attention(cache, shape, alone.batch(), chosen(qkv, stride, width, wanted), width, mixed);
  stream.residual = chosen(stream.residual, model.hidden, model.hidden, wanted);
  stream.tokens = wanted.count;
}

bool Step::forward(const Model& model, const KvLayer* cache, const Batch& batch, const Rotary* rotaries,
                   const float* query_scale, const Wanted& wanted, float* hidden, uint8_t* bad) {
  const int64_t tokens = batch.tokens, width = model.hidden, most = std::max(tokens, wanted.count);
  Arena& arena = turn_.arena();
  const AttentionShape& shape = model.layer[0].attention;
  const int64_t all = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
  Stream stream = {tokens, arena.take<float>(tokens * width), arena.take<float>(most * width), nullptr};
  float* qkv = arena.take<float>(tokens * all);
  float* mixed = arena.take<float>(most * shape.heads * shape.head_dim);

  embedding(model.embedding, batch.ids, tokens, stream.residual);
  if (model.embedding_scale != 1)
    rows(tokens, [&](int64_t t) { k_.scale_row(stream.residual + t * width, model.hidden, model.embedding_scale); });
  const Arena::Mark mark = arena.mark();
  for (int index = 0; index < model.layers; ++index) {
    const Layer& layer = model.layer[index];
    arena.rewind(mark);
    multiply(layer.qkv, normed_inputs(model, layer.qkv, layer.input_norm, index > 0, stream), tokens, qkv);
    enter_cache(layer, model, cache[index], batch, rotaries, query_scale, qkv, bad);
    if (std::memchr(bad, 1, tokens)) return false;
    if (wanted.tokens && index + 1 == model.layers) narrow(model, cache[index], batch, qkv, all, wanted, stream, mixed);
    else attention(cache[index], layer.attention, batch, qkv, all, mixed);
    linear(layer.out, mixed, stream.tokens, stream.x);
    stream.post_norm = layer.post_attention_norm;
    const Input in = normed_inputs(model, layer.gate_up, layer.mlp_norm, true, stream);
    multiply(layer.down, gated_inputs(model, layer, in, stream.tokens), stream.tokens, stream.x);
    stream.post_norm = layer.post_mlp_norm;
  }
  rows(stream.tokens, [&](int64_t t) {
    add(model, stream, t);
    k_.rms_norm_row(stream.residual + t * width, model.norm, model.eps, model.hidden, hidden + t * width);
  });
  return true;
}

void Step::logits(const Model& model, const float* hidden, int64_t count, float* out) {
  linear(model.head, hidden, count, out);
  if (model.final_softcap > 0)
    rows(count, [&](int64_t row) {
      k_.softcap_row(out + row * model.head.weight.rows, model.head.weight.rows, model.final_softcap);
    });
}

}  // namespace kvant
