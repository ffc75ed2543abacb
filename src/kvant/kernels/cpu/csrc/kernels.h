// What one ISA's build of the kernels offers. Each function does one unit of work on the calling thread.
#pragma once

#include "types.h"

namespace kvant {

// A row of a linear layer's inputs in 8 bits, with what its products with codes need: x = code * scale.
struct QuantizedRow {
  int8_t* codes;       // [padded]
  float* scales;       // [padded / 32]
  float* weighted;     // [padded / 32], scale * the sum of the group's codes
  int32_t* zeros;      // [padded / 32], 8 * that sum: what a zero point of 8 adds
  int32_t* half_sums;  // [padded / 16], the sums of half groups
};

// A linear layer's inputs: the rows, and the same quantized for weights of few bits, row after row.
struct Input {
  const float* x;
  QuantizedRow rows;
  int32_t padded;  // columns, a multiple of kGroup

  QuantizedRow row(int64_t token) const {
    const int64_t groups = padded / 32, at = token * groups;
    return {rows.codes + token * padded, rows.scales + at, rows.weighted + at, rows.zeros + at, rows.half_sums + 2 * at};
  }
};

struct AttentionWork {
  const KvLayer* cache;
  const AttentionShape* shape;
  const Batch* batch;
  const float* q;  // [tokens, heads, head_dim], rows `q_stride` floats apart
  int64_t q_stride;
  float* out;       // [tokens, heads, head_dim]
  float* partials;  // decode: [tokens, heads, splits, head_dim + 2]
  int32_t splits;
};

struct Kernels {
  const char* name;
  void (*quantize_row)(const float* x, int columns, const QuantizedRow& out);
  void (*linear_part)(const Linear&, const Input&, int first, int last, int begin, int end, float* out);
  void (*weight_row)(const Weight&, int row, float* out);
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int count, float* y);
  void (*add_row)(const float* x, int count, float* total);
  void (*rope_row)(float* x, const float* cos, const float* sin, int pairs);
  void (*gated_row)(const float* x, int width, int32_t activation, float* y);
  void (*softcap_row)(float* x, int count, float cap);
  void (*scale_row)(float* x, int count, float factor);
  int (*argmax_row)(const float* x, int count);
  double (*exponentials_row)(const float* x, int count, float top, float factor, float* out);
  bool (*write_vector)(const Side&, const KvLayer&, int head, int dim, int64_t slot, int64_t position, const float* x);
  void (*attend_split)(const AttentionWork&, int sequence, int token, int kv_head, int split);
  void (*attend_merge)(const AttentionWork&, int sequence, int token, int head);
  void (*attend_tile)(const AttentionWork&, int sequence, int first, int last, int kv_head);
  int64_t (*reach_limit)(int32_t limit, const void* data, int64_t count);
};

constexpr int kSplitTokens = 512;  // of the context that one unit of a decode attends to

const Kernels& generic_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& neon_kernels();

}  // namespace kvant
