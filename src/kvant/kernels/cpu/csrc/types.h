// The plain structures that Python hands over (mirrored in structs.py) and that every kernel works on.
#pragma once

#include <cstdint>

namespace kvant {

constexpr int kRowBlock = 8;     // output rows that lie side by side in a packed weight
constexpr int kGroup = 32;       // input columns that share one scale of the quantized activations
constexpr int kCentreTile = 64;  // positions that share one expansion of the keys' centre
constexpr int kSinkSpan = 4;     // slots whose codes hold one sink in 16 bit
constexpr int kMaxHeadDim = 256;
constexpr int kMaxOrder = 4;     // terms of the centre's expansion

enum WeightKind : int32_t { kWeightF32, kWeightF16, kWeightBF16, kWeightU4, kWeightU8 };

// A matrix [rows, columns], packed by `kvant_pack` for blocks of kRowBlock rows; columns are padded to kGroup. Codes:
//   floats  [row block][column][8]
//   U4      [row block][group of 32][4 steps of 8 columns][8 rows][4]: columns 0-3 in low nibbles, 4-7 in high ones
//   U8      [row block][group of 32][8 steps of 4 columns][8 rows][4]
// Scales are float16 [row block][columns / group, rounded up][8]; a group is 16 or 32 * 2^n columns. Biases are
// float16, zeros 8 bits, both as scales: value = code * scale + bias, or (code - zero) * scale, with a zero of 8 or 128
// where there are neither. Stored column c is input order[c], or input c where there is no order.
struct Weight {
  int32_t kind, rows, columns, group;
  const void* codes;
  const uint16_t* scales;
  const uint16_t* biases;
  const uint8_t* zeros;
  const int32_t* order;
};

struct Linear {
  Weight weight;
  const float* bias;
};

enum VectorKind : int32_t {
  kVectorF32,
  kVectorF16,
  kVectorBF16,
  kVectorAffine8,   // u8 codes, (scale, zero) float16
  kVectorAffine4,   // u4 codes, (scale, zero) float16
  kVectorGrouped4,  // u4 codes, a word a group: 10 bits of scale, 6 bits of offset
  kVectorSymmetric8,  // s8 codes, scale float16
  kVectorStatic8,     // s8 codes, a measured scale a head
};

// One side (keys or values) of one layer's cache; the arrays are those of kvant.formats.
struct Side {
  int32_t kind, groups, shaped, order;
  void* codes;             // [blocks, kv_heads, block_size, bytes of a vector's codes], blocks `codes_stride` apart
  void* meta;              // [blocks, kv_heads, block_size, ...] float16 or words, blocks `meta_stride` bytes apart
  int64_t codes_stride, meta_stride;
  const float* centre;     // [kv_heads, order, head_dim], or null
  const float* balance;    // [kv_heads, head_dim], or null
  const float* feedback;   // [kv_heads][block of 8 elements][8][from the block's first element on], or null
  const float* scale;      // [kv_heads], or null
};

struct KvLayer {
  Side key, value;
  int32_t sinks, block_size, lead, turning;  // turning: pairs that the centre turns in
  const float* turn_cos;                     // [tiles, turning]: the angle of each tile's middle
  const float* turn_sin;
  const float* basis;                        // [order][kCentreTile]
};

struct Batch {
  int32_t tokens, sequences, table_width;
  const int64_t* ids;
  const int64_t* positions;
  const int64_t* slots;
  const int64_t* query_starts;  // [sequences + 1]
  const int64_t* context_lens;  // [sequences]
  const int64_t* block_tables;  // [sequences, table_width]
};

struct Rotary {
  const float* cos;  // [tokens, pairs]
  const float* sin;
  int32_t pairs;
};

struct AttentionShape {
  int32_t heads, kv_heads, head_dim, window;  // window 0: none
  float scale, softcap;                       // softcap 0: none
};

// How rows of logits are sampled, an entry a row; see kvant.kernels.ops.SamplingBatch.
struct Sampling {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const double* uniform;
};

// Decode steps one after the other: each row of one begins with the token that the row drew in the one before.
struct Burst {
  int32_t steps, done;         // at most; how many there were
  const int64_t* stops;        // after these tokens there is no other step: those of all rows, one after the other
  const int64_t* stop_starts;  // [rows + 1]
  double seconds;              // nor one that would end later than so long after the start
  const int32_t* interrupt;    // nor any once this is not 0
};

struct Layer {
  const float *input_norm, *mlp_norm, *post_attention_norm, *post_mlp_norm, *q_norm, *k_norm;
  Linear qkv, out, gate_up, down;
  AttentionShape attention;
  int32_t rope;  // index into the step's rotaries, -1: none
};

enum Activation : int32_t { kSilu, kGeluTanh, kGelu };

enum Limit : int32_t { kReadLimit, kDotLimit, kFmaLimit };

struct Model {
  int32_t hidden, intermediate, layers, activation;
  float eps, embedding_scale, final_softcap;  // final_softcap 0: none
  const Layer* layer;
  const float* norm;
  Weight embedding;
  Linear head;
};

}  // namespace kvant
