#include "decoder.h"

#include <algorithm>
#include <cstring>

namespace kvant {

namespace {

constexpr int64_t kRowsAtOnce = 8;     // rows of simple ops in one unit
constexpr int64_t kTokenBlock = 96;    // tokens whose inputs stay in the cache while weights pass by
constexpr int64_t kUnitsPerThread = 6;
constexpr int kPrefillRows = 96;       // query rows of a prefill unit: kTileRows of prefill.h
constexpr int kFewRows = 16;           // up to so many query rows a KV head, tokens are attended one by one

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <class Body>
void Step::rows(int64_t count, Body body) {
  turn_.run(ceil_div(count, kRowsAtOnce), [&](int64_t unit) {
    const int64_t stop = std::min(count, (unit + 1) * kRowsAtOnce);
    for (int64_t row = unit * kRowsAtOnce; row < stop; ++row) body(row);
  });
}

Input Step::quantized(const Weight& weight, const float* x, int64_t tokens) {
  if (weight.kind <= kWeightBF16) return {x, {}, weight.columns};
  const int padded = static_cast<int>(ceil_div(weight.columns, kGroup)) * kGroup;
  const int64_t groups = tokens * padded / kGroup;
  Arena& arena = turn_.arena();
  const Input in{x,
                 {arena.take<int8_t>(tokens * padded), arena.take<float>(groups), arena.take<float>(groups),
                  arena.take<int32_t>(groups), arena.take<int32_t>(2 * groups)},
                 padded};
  float* ordered = weight.order ? arena.take<float>(tokens * weight.columns) : nullptr;
  rows(tokens, [&](int64_t t) {
    const float* row = x + t * weight.columns;
    if (ordered) {
      float* to = ordered + t * weight.columns;
      for (int c = 0; c < weight.columns; ++c) to[c] = row[weight.order[c]];
      row = to;
    }
    k_.quantize_row(row, weight.columns, in.row(t));
  });
  return in;
}

void Step::linear(const Linear& linear, const float* x, int64_t tokens, float* out) {
  const Input in = quantized(linear.weight, x, tokens);
  const int64_t blocks = ceil_div(linear.weight.rows, kRowBlock), token_blocks = ceil_div(tokens, kTokenBlock);
  const int64_t wanted = turn_.threads() > 1 ? turn_.threads() * kUnitsPerThread : 1;
  const int64_t chunk = std::max<int64_t>(4, ceil_div(ceil_div(blocks * token_blocks, wanted), 4) * 4);
  const int64_t chunks = ceil_div(blocks, std::min(chunk, ceil_div(blocks, 4) * 4)), width = std::min(chunk, ceil_div(blocks, 4) * 4);
  turn_.run(token_blocks * chunks, [&](int64_t unit) {
    const int64_t first = unit / chunks * kTokenBlock, begin = unit % chunks * width;
    k_.linear_part(linear, in, static_cast<int>(first), static_cast<int>(std::min(tokens, first + kTokenBlock)),
                   static_cast<int>(begin), static_cast<int>(std::min(blocks, begin + width)), out);
  });
}

void Step::embedding(const Weight& weight, const int64_t* ids, int64_t tokens, float* out) {
  rows(tokens, [&](int64_t t) { k_.weight_row(weight, static_cast<int>(ids[t]), out + t * weight.columns); });
}

void Step::rms_norm(const float* x, const float* weight, float eps, int64_t count, int width, float* out) {
  rows(count, [&](int64_t row) { k_.rms_norm_row(x + row * width, weight, eps, width, out + row * width); });
}

void Step::gated(const float* x, int64_t count, int width, int32_t activation, float* out) {
  rows(count, [&](int64_t row) { k_.gated_row(x + row * 2 * width, width, activation, out + row * width); });
}

void Step::write_kv(const KvLayer& cache, const AttentionShape& shape, const Batch& batch, const float* k,
                    const float* v, int64_t stride, uint8_t* bad) {
  const int64_t heads = shape.kv_heads;
  turn_.run(batch.tokens * heads, [&](int64_t unit) {
    const int64_t t = unit / heads, head = unit % heads, offset = t * stride + head * shape.head_dim;
    for (const auto& [side, x] : {std::pair{&cache.key, k}, std::pair{&cache.value, v}})
      if (!k_.write_vector(*side, cache, static_cast<int>(head), shape.head_dim, batch.slots[t], batch.positions[t],
                           x + offset))
        bad[t] = 1;
  });
}

// Units of attention: for decodes a token, a KV head and a split; for prompts a tile of tokens and a KV head.
int64_t Step::plan(const AttentionShape& shape, const Batch& batch, int splits, Unit* units, bool decodes) {
  const int shared = shape.heads / shape.kv_heads, tile = std::max(1, kPrefillRows / shared);
  int64_t count = 0;
  for (int s = 0; s < batch.sequences; ++s) {
    const int start = static_cast<int>(batch.query_starts[s]), stop = static_cast<int>(batch.query_starts[s + 1]);
    const bool few = (stop - start) * shared <= kFewRows || stop - start == 1 || shared > kPrefillRows;
    if (few != decodes) continue;
    for (int head = 0; head < shape.kv_heads; ++head) {
      if (few) {
        for (int t = start; t < stop; ++t)
          for (int split = 0; split <= batch.positions[t] / kSplitTokens && split < splits; ++split) units[count++] = {s, t, t + 1, head, split};
      } else {
        for (int t = start; t < stop; t += tile) units[count++] = {s, t, std::min(stop, t + tile), head, 0};
      }
    }
  }
  return count;
}

void Step::attention(const KvLayer& cache, const AttentionShape& shape, const Batch& batch, const float* q,
                     int64_t stride, float* out) {
  int64_t longest = 1;
  for (int s = 0; s < batch.sequences; ++s) longest = std::max(longest, batch.context_lens[s]);
  const int splits = static_cast<int>(ceil_div(longest, kSplitTokens));
  Unit* units = turn_.arena().take<Unit>(int64_t{batch.tokens} * shape.kv_heads * splits);
  const int64_t tiles = plan(shape, batch, splits, units, false);
  AttentionWork work{&cache, &shape, &batch, q, stride, out, nullptr, splits};
  turn_.run(tiles, [&](int64_t i) { k_.attend_tile(work, units[i].sequence, units[i].first, units[i].last, units[i].kv_head); });
  const int64_t parts = plan(shape, batch, splits, units, true);
  if (!parts) return;
  work.partials = turn_.arena().take<float>(int64_t{batch.tokens} * shape.heads * splits * (shape.head_dim + 2));
  turn_.run(parts, [&](int64_t i) { k_.attend_split(work, units[i].sequence, units[i].first, units[i].kv_head, units[i].split); });
  const int shared = shape.heads / shape.kv_heads;
  turn_.run(parts, [&](int64_t i) {
    if (units[i].split) return;
    for (int h = 0; h < shared; ++h) k_.attend_merge(work, units[i].sequence, units[i].first, units[i].kv_head * shared + h);
  });
}

void Step::rotate(const Layer& layer, const Model& model, const Batch& batch, const Rotary* rotaries,
                  const float* scale, float* qkv) {
  const AttentionShape& shape = layer.attention;
  const int dim = shape.head_dim, all = shape.heads + 2 * shape.kv_heads;
  rows(batch.tokens, [&](int64_t t) {
    for (int head = 0; head < shape.heads + shape.kv_heads; ++head) {
      float* x = qkv + (t * all + head) * dim;
      const float* norm = head < shape.heads ? layer.q_norm : layer.k_norm;
      if (norm) k_.rms_norm_row(x, norm, model.eps, dim, x);
      if (layer.rope >= 0) {
        const Rotary& rotary = rotaries[layer.rope];
        k_.rope_row(x, rotary.cos + t * rotary.pairs, rotary.sin + t * rotary.pairs, rotary.pairs);
      }
      if (scale && head < shape.heads) k_.scale_row(x, dim, scale[t]);
    }
  });
}

bool Step::forward(const Model& model, const KvLayer* cache, const Batch& batch, const Rotary* rotaries,
                   const float* query_scale, float* hidden, uint8_t* bad) {
  const int64_t tokens = batch.tokens, width = model.hidden;
  Arena& arena = turn_.arena();
  const AttentionShape& shape = model.layer[0].attention;
  const int64_t all = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, mixed_width = shape.heads * shape.head_dim;
  float* residual = arena.take<float>(tokens * width);
  float* x = arena.take<float>(tokens * width);
  float* qkv = arena.take<float>(tokens * all);
  float* mixed = arena.take<float>(tokens * mixed_width);
  float* wide = arena.take<float>(tokens * 2 * model.intermediate);
  float* narrow = arena.take<float>(tokens * model.intermediate);

  const auto norm = [&](const float* weight) { rms_norm(residual, weight, model.eps, tokens, model.hidden, x); };
  const auto add = [&](const float* post_norm) {
    rows(tokens, [&](int64_t t) {
      float* row = x + t * width;
      if (post_norm) k_.rms_norm_row(row, post_norm, model.eps, model.hidden, row);
      k_.add_row(row, model.hidden, residual + t * width);
    });
  };

  embedding(model.embedding, batch.ids, tokens, residual);
  if (model.embedding_scale != 1)
    rows(tokens, [&](int64_t t) { k_.scale_row(residual + t * width, model.hidden, model.embedding_scale); });
  for (int index = 0; index < model.layers; ++index) {
    const Layer& layer = model.layer[index];
    const Arena::Mark mark = arena.mark();
    norm(layer.input_norm);
    linear(layer.qkv, x, tokens, qkv);
    rotate(layer, model, batch, rotaries, query_scale, qkv);
    write_kv(cache[index], layer.attention, batch, qkv + mixed_width, qkv + mixed_width + shape.kv_heads * shape.head_dim,
             all, bad);
    if (std::memchr(bad, 1, tokens)) return false;
    attention(cache[index], layer.attention, batch, qkv, all, mixed);
    linear(layer.out, mixed, tokens, x);
    add(layer.post_attention_norm);
    norm(layer.mlp_norm);
    linear(layer.gate_up, x, tokens, wide);
    gated(wide, tokens, model.intermediate, model.activation, narrow);
    linear(layer.down, narrow, tokens, x);
    add(layer.post_mlp_norm);
    arena.rewind(mark);
  }
  rms_norm(residual, model.norm, model.eps, tokens, model.hidden, hidden);
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
