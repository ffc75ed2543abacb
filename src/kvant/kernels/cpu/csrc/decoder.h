// The ops on whole steps, and the decoder made of them: the work of `Kernels` spread over the pool.
#pragma once

#include "kernels.h"
#include "pool.h"

namespace kvant {

// Of which of a step's tokens hidden states are wanted: of `count`, in this order; null: of all `count` that there are.
struct Wanted {
  const int64_t* tokens;
  int64_t count;
};

class Step {
 public:
  Step(const Kernels& kernels, int threads) : k_(kernels), turn_(threads) {}

  void linear(const Linear& linear, const float* x, int64_t tokens, float* out);
  void embedding(const Weight& weight, const int64_t* ids, int64_t tokens, float* out);
  void rms_norm(const float* x, const float* weight, float eps, int64_t rows, int count, float* out);
  void gated(const float* x, int64_t rows, int width, int32_t activation, float* out);
  // k, v: [tokens, kv_heads, head_dim], rows `stride` floats apart. Marks tokens that are not finite in `bad`.
  void write_kv(const KvLayer& cache, const AttentionShape& shape, const Batch& batch, const float* k, const float* v,
                int64_t stride, uint8_t* bad);
  void attention(const KvLayer& cache, const AttentionShape& shape, const Batch& batch, const float* q, int64_t stride,
                 float* out);
  // Hidden states after the final norm; false where a key or value is not finite, as `bad` tells.
  bool forward(const Model& model, const KvLayer* cache, const Batch& batch, const Rotary* rotaries,
               const float* query_scale, const Wanted& wanted, float* hidden, uint8_t* bad);
  void logits(const Model& model, const float* hidden, int64_t rows, float* out);
  void sample(const float* logits, int64_t rows, int vocab, const Sampling& how, int64_t* tokens);

 private:
  struct Unit {
    int sequence, first, last, kv_head, split, last_split;
  };
  // How a product is cut into units of work: `blocks` blocks of tokens, whole tiles of `height`, each times `width` of
  // the steps.
  struct Cuts {
    int64_t tokens, height, blocks, steps, width;
    int64_t tiles() const;
    int64_t chunks() const;
    int64_t rows() const;  // the most tokens that a block has
    Part part(int64_t unit) const;
  };
  // The residual stream, and what it gets next: x, normed by `post_norm` where there is one. Both [tokens, hidden].
  struct Stream {
    int64_t tokens;
    float *residual, *x;
    const float* post_norm;
  };
  template <class Body>
  void row_units(int64_t count, int64_t at_once, Body body);
  template <class Body>
  void rows(int64_t count, Body body);
  Input room(const Weight& weight, const float* x, int64_t tokens);
  template <class Make>
  Input inputs(const Weight& weight, const float* x, int64_t tokens, Make make);
  Streams streams(const Weight& weight, int64_t tokens);
  int64_t units_per_thread(int64_t tokens) const;
  Cuts cut(const Input& in, const Streams& streams, int64_t tokens, int align, int64_t floats) const;
  void multiply(const Linear& linear, const Input& in, int64_t tokens, float* out);
  Input gated_inputs(const Model& model, const Layer& layer, const Input& in, int64_t tokens);
  Input gated_in_passes(const Model& model, const Layer& layer, const Input& in, int64_t tokens);
  template <class Body>
  void write_units(const AttentionShape& shape, const Batch& batch, Body body);
  void write_side(const KvLayer& cache, const Side& side, int dim, const float* x, int64_t stride, Entry* entries,
                  int count, uint8_t* bad);
  void rotate(const Layer& layer, const Model& model, const Rotary* rotaries, int64_t t, const float* norm, float* x);
  void enter_cache(const Layer& layer, const Model& model, const KvLayer& cache, const Batch& batch,
                   const Rotary* rotaries, const float* scale, float* qkv, uint8_t* bad);
  void add(const Model& model, const Stream& stream, int64_t t);
  Input normed_inputs(const Model& model, const Linear& linear, const float* norm, bool has_x,
                      const Stream& stream);
  float* chosen(const float* x, int64_t stride, int64_t width, const Wanted& wanted);
  void narrow(const Model& model, const KvLayer& cache, const Batch& batch, const float* qkv, int64_t stride,
              const Wanted& wanted, Stream& stream, float* mixed);
  int64_t sample_row(const float* logits, int count, const Sampling& how, int64_t row, float* weights);
  int64_t plan(const AttentionShape& shape, const Batch& batch, int lead, int at_once, Unit* units);

  const Kernels& k_;
  Turn turn_;
};

}  // namespace kvant
