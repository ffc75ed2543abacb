// The C functions that Python calls (kvant/kernels/cpu/library.py). None throws: a negative result is an error.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include "burst.h"
#include "decoder.h"

#if defined(KVANT_BUILT_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define KVANT_API extern "C" __attribute__((visibility("default")))

using namespace kvant;

namespace {

constexpr int kAbi = 7;

#if defined(KVANT_BUILT_NEON)
// Dot products and arithmetic of 16-bit floats, which came later than NEON itself.
bool has_neon_dots() {
#if defined(__linux__)
  constexpr unsigned long kNeeded = HWCAP_ASIMDDP | HWCAP_ASIMDHP | HWCAP_FPHP;
  return (getauxval(AT_HWCAP) & kNeeded) == kNeeded;
#else
  return true;
#endif
}
#endif

struct Isa {
  const char* name;
  bool supported;
  const Kernels& (*kernels)();
};

const Isa kIsas[] = {
#if defined(KVANT_BUILT_AVX512)
    {"avx512",
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c"),
     avx512_kernels},
#endif
#if defined(KVANT_BUILT_AVX2)
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
     avx2_kernels},
#endif
#if defined(KVANT_BUILT_NEON)
    {"neon", has_neon_dots(), neon_kernels},
#endif
    {"generic", true, generic_kernels},
};

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  } catch (const std::system_error&) {
    return -3;
  } catch (...) {
    return -2;
  }
}

// A body that tells whether all is finite, and marks in `bad` the tokens that are not: 1 where some are.
template <class Body>
int guarded_step(const Batch* batch, uint8_t* bad, Body body) {
  std::memset(bad, 0, batch->tokens);
  bool finite = true;
  const int error = guarded([&] { finite = body(); });
  return error ? error : !finite;
}

// Moves a matrix's elements into the order of a packed weight: out[to(row, column)] = element(row, column).
template <class T>
void pack_dense(const T* x, int64_t rows, int64_t columns, T* out) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; ++c)
      out[(row / kRowBlock * columns + c) * kRowBlock + row % kRowBlock] = x[row * columns + c];
}

// Eight 4-bit codes, two a byte as they are stored, as four bytes: codes 0-3 below, 4-7 above.
uint32_t spread_codes(uint32_t codes) {
  const uint32_t even = codes & 0x0f0f0f0f, odd = codes >> 4 & 0x0f0f0f0f;
  const uint32_t first = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 | (odd & 0xff00) << 16;
  const uint32_t second = (even >> 16 & 0xff) | (odd >> 16 & 0xff) << 8 | (even >> 24) << 16 | (odd >> 24) << 24;
  return first | second << 4;
}

// Codes of a multiple of kGroup columns.
void pack_codes(const uint8_t* x, int bits, int64_t rows, int64_t columns, uint8_t* out) {
  const int64_t steps = columns * bits / 32;
  for (int64_t row = 0; row < rows; ++row, x += 4 * steps) {
    uint8_t* lane = out + row / kRowBlock * columns * bits + row % kRowBlock * 4;
    for (int64_t step = 0; step < steps; ++step) {
      uint32_t codes;
      std::memcpy(&codes, x + 4 * step, sizeof codes);
      if (bits == 4) codes = spread_codes(codes);
      std::memcpy(lane + 32 * step, &codes, sizeof codes);
    }
  }
}

// The codes of one of GGML's blocks of kGroup columns as steps of a row, 32 bytes apart.
void pack_block(const uint8_t* x, int bits, uint8_t* lane) {
  uint32_t codes[kGroup / 4], steps[kGroup / 4];
  std::memcpy(codes, x, kGroup * bits / 8);
  if (bits == 8) {
    for (int i = 0; i < kGroup / 4; ++i) steps[i] = codes[i] ^ 0x80808080;
  } else {
    constexpr uint32_t kLow = 0x0f0f0f0f;  // columns 0 to 15; columns 16 to 31 are in high nibbles
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = codes[2 * i], second = codes[2 * i + 1];
      steps[i] = (first & kLow) | (second & kLow) << 4;
      steps[i + 2] = (first >> 4 & kLow) | (second & ~kLow);
    }
  }
  for (int i = 0; i < bits; ++i) std::memcpy(lane + 32 * i, steps + i, sizeof steps[i]);
}

// Rows of such blocks, which have a float16 scale, and maybe a bias, before their codes.
void pack_blocks(const uint8_t* x, int bits, int64_t rows, int64_t groups, uint8_t* codes, uint16_t* scales,
                 uint16_t* biases) {
  constexpr int kHalf = sizeof(uint16_t);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = row / kRowBlock * groups * kRowBlock, lane = row % kRowBlock;
    for (int64_t group = 0; group < groups; ++group, x += kGroup * bits / 8) {
      const int64_t at = first + group * kRowBlock + lane;
      std::memcpy(scales + at, x, kHalf);
      x += kHalf;
      if (biases) {
        std::memcpy(biases + at, x, kHalf);
        x += kHalf;
      }
      pack_block(x, bits, codes + first * kGroup * bits / 8 + group * 32 * bits + lane * 4);
    }
  }
}

// A rotary embedding as Python hands it over: a token's angles are its position times its row of frequencies.
struct Rope {
  const float* frequencies;  // [rows, pairs]
  int32_t rows, pairs;       // one row: of all tokens
  float factor;              // of cosines and sines
};

// The cosines and sines of a step's tokens.
class Rotaries {
 public:
  Rotaries(const Rope* ropes, int count, const Batch& batch) {
    for (int i = 0; i < count; ++i) add(ropes[i], batch);
  }
  const Rotary* data() const { return rotaries_.data(); }

 private:
  void add(const Rope& rope, const Batch& batch) {
    const int64_t numbers = int64_t{batch.tokens} * rope.pairs;
    std::vector<float>& turns = memory_.emplace_back(2 * numbers);
    float *cos = turns.data(), *sin = cos + numbers;
    rotaries_.push_back({cos, sin, rope.pairs});
    for (int64_t t = 0; t < batch.tokens; ++t, cos += rope.pairs, sin += rope.pairs) {
      const float* frequencies = rope.frequencies + (rope.rows == 1 ? 0 : t) * rope.pairs;
      for (int pair = 0; pair < rope.pairs; ++pair) {
        const float angle = static_cast<float>(batch.positions[t]) * frequencies[pair];
        cos[pair] = std::cos(angle) * rope.factor;
        sin[pair] = std::sin(angle) * rope.factor;
      }
    }
  }

  std::vector<std::vector<float>> memory_;
  std::vector<Rotary> rotaries_;
};

}  // namespace

KVANT_API int kvant_abi() { return kAbi; }

// The names of the instruction sets that this build has and this CPU runs, best first, separated by commas.
KVANT_API const char* kvant_isas() {
  static const std::string names = [] {
    std::string found;
    for (const Isa& isa : kIsas)
      if (isa.supported) found += (found.empty() ? "" : ",") + std::string(isa.name);
    return found;
  }();
  return names.c_str();
}

// The kernels of an instruction set, to be handed to the functions below; null where it is not to be had.
KVANT_API const Kernels* kvant_kernels(const char* name) {
  for (const Isa& isa : kIsas)
    if (isa.supported && !std::strcmp(isa.name, name)) return &isa.kernels();
  return nullptr;
}

// sizeof of the structures that Python mirrors, in the order of types.h: it compares them once.
KVANT_API void kvant_sizes(int64_t* out) {
  const int64_t sizes[] = {sizeof(Weight), sizeof(Linear), sizeof(Side),  sizeof(KvLayer), sizeof(Batch),
                           sizeof(Rope), sizeof(AttentionShape), sizeof(Sampling), sizeof(Burst), sizeof(Layer),
                           sizeof(Model)};
  std::memcpy(out, sizes, sizeof sizes);
}

// Packs rows of a matrix, from a multiple of 8 on, into `out`, zeroed, as types.h lays out its kind.
KVANT_API void kvant_pack(int32_t kind, const void* x, int64_t rows, int64_t columns, void* out) {
  switch (kind) {
    case kWeightF32: return pack_dense(static_cast<const float*>(x), rows, columns, static_cast<float*>(out));
    case kWeightF16:
    case kWeightBF16: return pack_dense(static_cast<const uint16_t*>(x), rows, columns, static_cast<uint16_t*>(out));
    default:
      return pack_codes(static_cast<const uint8_t*>(x), kind == kWeightU4 ? 4 : 8, rows, columns,
                        static_cast<uint8_t*>(out));
  }
}

// The same for GGML's blocks Q4_0, Q4_1 (4 bits) and Q8_0: codes, scales and, unless null, biases.
KVANT_API void kvant_pack_blocks(int32_t bits, const void* x, int64_t rows, int64_t groups, void* codes, void* scales,
                                 void* biases) {
  pack_blocks(static_cast<const uint8_t*>(x), bits, rows, groups, static_cast<uint8_t*>(codes),
              static_cast<uint16_t*>(scales), static_cast<uint16_t*>(biases));
}

KVANT_API int kvant_linear(const Kernels* k, int threads, const Linear* linear, const float* x, int64_t tokens,
                           float* out) {
  return guarded([&] { Step(*k, threads).linear(*linear, x, tokens, out); });
}

KVANT_API int kvant_embedding(const Kernels* k, int threads, const Weight* weight, const int64_t* ids, int64_t tokens,
                              float* out) {
  return guarded([&] { Step(*k, threads).embedding(*weight, ids, tokens, out); });
}

KVANT_API int kvant_rms_norm(const Kernels* k, int threads, const float* x, const float* weight, float eps,
                             int64_t rows, int32_t width, float* out) {
  return guarded([&] { Step(*k, threads).rms_norm(x, weight, eps, rows, width, out); });
}

KVANT_API int kvant_gated(const Kernels* k, int threads, const float* x, int64_t rows, int32_t width,
                          int32_t activation, float* out) {
  return guarded([&] { Step(*k, threads).gated(x, rows, width, activation, out); });
}

KVANT_API int kvant_write_kv(const Kernels* k, int threads, const KvLayer* cache, const AttentionShape* shape,
                             const Batch* batch, const float* keys, const float* values, uint8_t* bad) {
  return guarded([&] {
    Step(*k, threads).write_kv(*cache, *shape, *batch, keys, values, int64_t{shape->kv_heads} * shape->head_dim, bad);
  });
}

KVANT_API int kvant_attention(const Kernels* k, int threads, const KvLayer* cache, const AttentionShape* shape,
                              const Batch* batch, const float* q, float* out) {
  return guarded([&] {
    Step(*k, threads).attention(*cache, *shape, *batch, q, int64_t{shape->heads} * shape->head_dim, out);
  });
}

// Hidden states of `count` of a step's tokens, see `Wanted`. 1 where keys or values of the tokens marked in `bad` are
// not finite.
KVANT_API int kvant_forward(const Kernels* k, int threads, const Model* model, const KvLayer* cache, const Batch* batch,
                            const Rope* ropes, int32_t rope_count, const float* query_scale, uint8_t* bad,
                            const int64_t* wanted, int64_t count, float* hidden) {
  return guarded_step(batch, bad, [&] {
    const Rotaries rotaries(ropes, rope_count, *batch);
    return Step(*k, threads).forward(*model, cache, *batch, rotaries.data(), query_scale, {wanted, count}, hidden,
                                     bad);
  });
}

// A burst of such steps, of one token a row, and the tokens that they draw, `tokens` [steps, rows], without going back
// to Python between. In one of several steps, frequencies and the queries' scale must not depend on positions. It ends
// before a step that is not finite, unless that is the first: then it is the next burst's.
KVANT_API int kvant_draw(const Kernels* k, int threads, const Model* model, const KvLayer* cache, const Batch* batch,
                         const Rope* ropes, int32_t rope_count, const float* query_scale, uint8_t* bad,
                         const Sampling* how, Burst* burst, int64_t* tokens) {
  return guarded_step(batch, bad, [&] {
    const int32_t count = batch->tokens, vocab = model->head.weight.rows;
    const std::unique_ptr<float[]> hidden(new float[int64_t{count} * model->hidden]);
    const std::unique_ptr<float[]> logits(new float[int64_t{count} * vocab]);
    for (Going going(*batch, *cache, *how);; going.go_on(tokens), tokens += count) {
      const Rotaries rotaries(ropes, rope_count, going.batch());
      Step step(*k, threads);
      if (!step.forward(*model, cache, going.batch(), rotaries.data(), query_scale, {nullptr, count}, hidden.get(),
                        bad))
        return burst->done > 0;
      step.logits(*model, hidden.get(), count, logits.get());
      step.sample(logits.get(), count, vocab, going.how(), tokens);
      ++burst->done;
      if (going.ends(*burst, tokens) || Turn::is_awaited()) return true;
    }
  });
}

KVANT_API int kvant_logits(const Kernels* k, int threads, const Model* model, const float* hidden, int64_t rows,
                           float* out) {
  return guarded([&] { Step(*k, threads).logits(*model, hidden, rows, out); });
}

KVANT_API int kvant_sample(const Kernels* k, int threads, const float* logits, int64_t rows, int32_t vocab,
                           const Sampling* how, int64_t* tokens) {
  return guarded([&] { Step(*k, threads).sample(logits, rows, vocab, *how, tokens); });
}

// Work of one kind alone, for benchmarks; returns how much was done, see limits.h.
KVANT_API int64_t kvant_limit(const Kernels* k, int32_t limit, const void* data, int64_t count) {
  return k->reach_limit(limit, data, count);
}
