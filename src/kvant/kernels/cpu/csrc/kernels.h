// What one ISA's build of the kernels offers. Each function does one unit of work on the calling thread.
#pragma once

#include "types.h"

namespace kvant {

// A row of a linear layer's inputs in 8 bits, with what its products with codes need: x = code * scale. All but the
// codes of its groups lie `stride` apart: between them lie those of the other rows.
struct QuantizedRow {
  int8_t* codes;       // [padded]
  float* scales;       // [padded / 32]
  float* weighted;     // [padded / 32], scale * the sum of the group's codes
  int32_t* starts;     // [padded / 32], where sums of products start (Dot::start) so that a code of 8 counts as 0
  int32_t* half_sums;  // [padded / 16], the sums of half groups' codes
  int64_t stride;

  // The row from its group `index` on.
  QuantizedRow group(int64_t index) const {
    const int64_t at = index * stride;
    return {codes + index * kGroup, scales + at, weighted + at, starts + at, half_sums + 2 * at, stride};
  }
};

// Quantized rows as products by panels take them (panels.h), in tiles of `height`; `tiles` is null where none do.
struct PanelInput {
  int32_t* tiles;  // [tile][round of columns][starts, codes of 4 columns a step, scales][height], see panel_input.h
  float* steps;    // [tile][part][height], what a scale of 1 stands for
  int32_t height;
};

// An element that is so large that the codes of its group would be coarse: it is left out of them. Column -1: none is.
struct Outlier {
  float value;
  int32_t column;
};

// A linear layer's inputs: the rows, and the same quantized for weights of few bits. Of a group, all rows' scales lie
// together: a tile of rows reads them by one pointer.
struct Input {
  const float* x;
  QuantizedRow rows;  // the first
  int32_t padded;     // columns, a multiple of kGroup
  PanelInput panels;
  Outlier* outliers;  // [tokens], or null

  QuantizedRow row(int64_t token) const {
    return {rows.codes + token * padded, rows.scales + token,    rows.weighted + token,
            rows.starts + token,         rows.half_sums + token, rows.stride};
  }
};

// A matrix's row blocks as streams that are read side by side, each on and on, which is what a CPU's prefetchers are
// good at: step i is the blocks i, i + stride, i + 2 * stride, ... The blocks that are left over are steps of their
// own.
struct Streams {
  int width, stride, steps;
  Streams(int blocks, int streams)
      : width(streams), stride(blocks / streams), steps(blocks / streams + blocks % streams) {}
};

// Row blocks that are worked on together: the first, and how far apart they lie.
struct Blocks {
  int first, stride;
  int operator[](int b) const { return first + b * stride; }
};

// Part of a product: the tokens [first, last) times the steps [begin, end) of its streams.
struct Part {
  int first, last, begin, end;
};

// Where a step's products go: those of token `token` from `to` on, each next token's `pitch` floats further; row block
// b has place `places[b]`, of kRowBlock floats.
struct Output {
  float* to;
  int64_t pitch;
  int token;
  Blocks places;
  float* at(int t, int b) const { return to + (t - token) * pitch + int64_t{places[b]} * kRowBlock; }
};

// Where those of a part go: step `begin` of the first stream has place 0, each next stream's `stride` places further.
struct Target {
  float* to;
  int64_t pitch;
  int token, begin, stride;
  // Of step `step`, from stream `stream` on.
  Output of(int step, int stream = 0) const { return {to, pitch, token, {stream * stride + step - begin, stride}}; }
};

// How far ahead of what one token reads of a matrix of codes, in bytes of each stream, a core is told of it; 0 where it
// is better left alone. Intel's looks no further than a page by itself (Emerald Rapids: 27.9 GB/s, 30.1 when told). Zen
// 4 reads 36 GB/s by itself, and 25 to 28 when told. Compiled for every instruction set: no vectors here.
inline int64_t reads_ahead() {
#if defined(__x86_64__)
  static const int64_t bytes = __builtin_cpu_is("intel") ? 2048 : 0;
  return bytes;
#else
  return 0;
#endif
}

// Asks for memory that is needed soon, in the second cache: a CPU waits for few lines at once on their way to the
// first, and stalls when it is asked for more.
inline void bring_near(const void* from, int64_t bytes) {
  constexpr int kSecondCache = 2, kLine = 64;
  const char *line = static_cast<const char*>(from), *end = line + bytes;
#pragma GCC unroll 1
  for (; end - line >= 4 * kLine; line += 4 * kLine)  // one branch for four
    for (int i = 0; i < 4; ++i) __builtin_prefetch(line + i * kLine, 0, kSecondCache);
#pragma GCC unroll 1
  for (; line < end; line += kLine) __builtin_prefetch(line, 0, kSecondCache);
}

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

constexpr int kWriteWidth = 8;  // vectors that are written to the cache at once, at most

// A key or value, x [head_dim], on its way into the cache: a token's of the batch.
struct Entry {
  int head, token;
  int64_t slot, position;
  const float* x;
};

struct Kernels {
  const char* name;
  void (*quantize_row)(const float* x, int columns, const QuantizedRow& out, Outlier* outlier);
  int (*panel_height)(int64_t tokens);  // of the tiles that so many tokens make, 0 where they do not go by panels
  void (*panel_tile_rows)(const Weight&, const Input&, int first, int last);
  int (*linear_streams)(const Weight&, int64_t tokens);
  void (*linear_part)(const Linear&, const Input&, const Streams&, const Part&, const Target&);
  void (*weight_row)(const Weight&, int row, float* out);
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int count, float* y);
  void (*add_row)(const float* x, int count, float* total);
  void (*rope_row)(float* x, const float* cos, const float* sin, int pairs);
  void (*gated_row)(const float* gate, const float* up, int count, int32_t activation, float* y);
  void (*softcap_row)(float* x, int count, float cap);
  void (*scale_row)(float* x, int count, float factor);
  int (*argmax_row)(const float* x, int count);
  double (*exponentials_row)(const float* x, int count, float top, float factor, float* out);
  unsigned (*write_vectors)(const Side&, const KvLayer&, int dim, const Entry* entries, int count);
  void (*attend_splits)(const AttentionWork&, int sequence, int token, int kv_head, int first, int last);
  void (*attend_merge)(const AttentionWork&, int sequence, int token, int head);
  void (*attend_tile)(const AttentionWork&, int sequence, int first, int last, int kv_head);
  int64_t (*reach_limit)(int32_t limit, const void* data, int64_t count);
};

constexpr int kSplitSlots = 512;   // of a sequence in one part of a decode's attention
constexpr int kTileRows = 96;      // query rows that a unit of a prefill attends with, at most

// The parts of the first `tokens` of a sequence, which begin at its slot `lead`. They are cut where blocks are.
inline int split_count(int64_t tokens, int lead) {
  return static_cast<int>((tokens + lead + kSplitSlots - 1) / kSplitSlots);
}

const Kernels& generic_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& neon_kernels();

}  // namespace kvant
