// Scores of cached keys: eight or sixteen tokens, the lanes of vectors, with up to eight query heads at once.
#pragma once

#include "steps.h"

namespace kvant::KVANT_ISA {

constexpr int kMaxShared = 16;    // query heads of a KV head that one unit attends with
constexpr int kPad = kTile;       // floats before and behind a span's scores that may be written
constexpr int kPitch = kPad + kSpan + kPad;
constexpr int kHeadsAtOnce = 8;

#if defined(__ARM_NEON)
constexpr bool kSplitQueries = true;
#else
constexpr bool kSplitQueries = false;
#endif

#if defined(__AVX2__) && !defined(__AVX512VL__)
constexpr bool kRepeatQueries = true;  // a product takes an operand from memory, but not one to be repeated
#else
constexpr bool kRepeatQueries = false;
#endif

// A query for integer dots. Codes: in 8 bits the even ones of eight dims, then the odd ones; in 15 bits dims 0, 2, 1,
// 3. Split ones, for dots of bytes, are the lower 7 bits of eight dims, then the upper 8, and meet unsigned codes less
// 128: `start` is what that leaves out.
struct IntegerQuery {
  alignas(32) int8_t narrow[kMaxHeadDim];
  alignas(32) int16_t wide[kMaxHeadDim];
  float step[kMaxGroups], sum[kMaxGroups];
  int32_t start[kMaxGroups];
  alignas(32) int8_t repeated[kRepeatQueries ? 8 * kMaxHeadDim : 1];  // of narrow ones each four, eight times

  void repeat(int dim) {
    for (int i = 0; kRepeatQueries && i < dim; i += 4) store(repeated + 8 * i, broadcast4(narrow + i));
  }
  // Four narrow codes from `at` on in all lanes, once `repeat` was called.
  B32 four(int at) const { return kRepeatQueries ? load<B32>(repeated + 8 * at) : broadcast4(narrow + at); }
};

inline void store_split(int8_t* p, I8 codes) {
  store_bytes(p, codes & 127);
  store_bytes(p + 8, codes >> 7);
}

// Whether the loops below take this side's codes; others are decoded to floats first.
inline bool key_is_integer(const Side& side, int dim) {
  if (!is_integer(side.kind) || dim % 32) return false;
  return !is_4bit(side.kind) || dim / groups_of(side) % 32 == 0;
}

inline void quantize_query(const Side& side, const float* q, int dim, IntegerQuery* out) {
  const int groups = groups_of(side), size = dim / groups;
  const float largest_code = is_4bit(side.kind) ? 127.0f : 16383.0f;
  for (int g = 0; g < groups; ++g) {
    F8 top = all(0.0f);
    for (int i = g * size; i < (g + 1) * size; i += 8) top = larger(top, magnitude(load<F8>(q + i)));
    const float step = largest(top) / largest_code;
    const F8 inverse = all(step > 0 ? 1.0f / step : 0.0f);
    I8 added = all(0);
    for (int i = g * size; i < (g + 1) * size; i += 8) {
      const I8 codes = to_int(load<F8>(q + i) * inverse);
      added += codes;
      if (is_4bit(side.kind))
        store_bytes(out->narrow + i, __builtin_shufflevector(codes, codes, 0, 2, 4, 6, 1, 3, 5, 7));
      else if (kSplitQueries)
        store_split(reinterpret_cast<int8_t*>(out->wide + i), codes);
      else
        store_words(out->wide + i, __builtin_shufflevector(codes, codes, 0, 2, 1, 3, 4, 6, 5, 7));
    }
    if (kSplitQueries) out->start[g] = 128 * sum(added);
    out->step[g] = step;
    out->sum[g] = step * sum(to_float(added));
  }
}

// Bodies are taken by reference, here and below: a copy of what one captures is written word by word and read back
// whole, for which a CPU waits until all of it has left for the cache.
//
// Calls body(constant) with `count` as a compile-time constant, 1 to N.
template <int N, class Body>
inline void with_count(int count, const Body& body) {
  if constexpr (N > 1) {
    if (count < N) return with_count<N - 1>(count, body);
  }
  body(std::integral_constant<int, N>());
}

// Calls body(count), where that is kTile as a constant: then loops of so many steps end without a wrong guess.
template <class Body>
inline void with_tile(int count, const Body& body) {
  count == kTile ? body(std::integral_constant<int, kTile>()) : body(count);
}

// What a loop over so many tokens takes at once.
template <class Count>
using FOfCount = std::conditional_t<std::is_same_v<Count, std::integral_constant<int, kTile>>, FWide, F8>;

// Has gcc compute what follows from x here, not earlier, where it would take a register too many.
template <class V>
inline void wait_for([[maybe_unused]] V& x) {
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) asm volatile("" : "+x"(x));
  else asm volatile("" : "+r"(x));
#endif
}

// Eight rows of 16 bytes, `pitch` bytes apart: lane i of vector j has bytes 4j to 4j + 3 of row i.
inline void lanes_of_rows(const uint8_t* rows, int64_t pitch, B32 (&out)[4]) {
#if defined(__AVX2__)
  __m256i x[4];
  for (int i = 0; i < 4; ++i) {
    const __m128i low = load<__m128i>(rows + i * pitch), high = load<__m128i>(rows + (i + 4) * pitch);
    x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpackhi_epi32(x[0], x[1]);
  const __m256i c = _mm256_unpacklo_epi32(x[2], x[3]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  out[0] = (B32)_mm256_unpacklo_epi64(a, c);
  out[1] = (B32)_mm256_unpackhi_epi64(a, c);
  out[2] = (B32)_mm256_unpacklo_epi64(b, d);
  out[3] = (B32)_mm256_unpackhi_epi64(b, d);
#elif defined(__ARM_NEON)
  F4 low[4], high[4];
  for (int i = 0; i < 4; ++i) low[i] = load<F4>(rows + i * pitch), high[i] = load<F4>(rows + (i + 4) * pitch);
  transpose4(low), transpose4(high);
  for (int j = 0; j < 4; ++j) out[j] = of_halves<B32>(low[j], high[j]);
#else
  for (int j = 0; j < 4; ++j) {
    I8 lanes;
    for (int i = 0; i < 8; ++i) lanes[i] = load<int32_t>(rows + i * pitch + 4 * j);
    out[j] = as<B32>(lanes);
  }
#endif
}

// sum + the products of 16-bit pairs.
inline I8 add_pairs(I8 sum, S16 a, S16 b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (I8)_mm256_dpwssd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return (I8)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
  for (int i = 0; i < 8; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

inline S16 broadcast_pair(const int16_t* p) { return as<S16>(all(load<int32_t>(p))); }

// Dots of eight 4-bit rows with queries over 32 dims, which are 16 bytes.
template <int Heads>
inline void add_dots4(const uint8_t* rows, int64_t pitch, const IntegerQuery* queries, int dim, I8 (&totals)[Heads]) {
  B32 codes[4];
  lanes_of_rows(rows, pitch, codes);
  Dot dots[Heads];
  for (int j = 0; j < 4; ++j) {
    const B32 low = codes[j] & 15, high = as<B32>(as<U8>(codes[j]) >> 4) & 15;
    for (int h = 0; h < Heads; ++h) dots[h].add(low, queries[h].four(dim + 8 * j));
    for (int h = 0; h < Heads; ++h) dots[h].add(high, queries[h].four(dim + 8 * j + 4));
  }
  for (int h = 0; h < Heads; ++h) totals[h] += dots[h].total();
}

#if defined(__AVX512VNNI__)
// Sixteen rows of 16 bytes likewise, in sixteen lanes.
inline void lanes_of_rows(const uint8_t* rows, int64_t pitch, __m512i (&out)[4]) {
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = four_rows(rows + i * pitch, 4 * pitch);
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
  const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  out[0] = _mm512_unpacklo_epi64(a, c);
  out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d);
  out[3] = _mm512_unpackhi_epi64(b, d);
}

// The same dots of sixteen rows.
template <int Heads>
inline void add_dots4(const uint8_t* rows, int64_t pitch, const IntegerQuery* queries, int dim, I16 (&totals)[Heads]) {
  __m512i codes[4];
  lanes_of_rows(rows, pitch, codes);
  const __m512i mask = _mm512_set1_epi8(15);
  // A product is waited for five cycles: few heads have two sums each in turn.
  constexpr bool kTwo = Heads < 5;
  I16 others[Heads] = {};
  for (int j = 0; j < 4; ++j) {
    const __m512i low = codes[j] & mask, high = _mm512_srli_epi16(codes[j], 4) & mask;
    for (int h = 0; h < Heads; ++h) {
      const int8_t* q = queries[h].narrow + dim + 8 * j;
      add_dots(totals[h], low, q);
      add_dots(kTwo ? others[h] : totals[h], high, q + 4);
    }
  }
  for (int h = 0; kTwo && h < Heads; ++h) totals[h] += others[h];
}
#endif

// Those of eight 8-bit rows, signed or less 128, with split queries over 16 dims.
template <int Heads, bool Signed>
inline void add_dots_split(const B32 (&codes)[4], const IntegerQuery* queries, int dim, I8 (&totals)[Heads]) {
  for (int part = 0; part < 2; ++part) {
    Dot dots[Heads];
    for (int j = 0; j < 4; ++j) {
      const B32 c = Signed ? codes[j] : codes[j] ^ 128;
      const int64_t at = 2 * dim + j / 2 * 16 + part * 8 + j % 2 * 4;
      for (int h = 0; h < Heads; ++h)
        dots[h].add(c, broadcast4(reinterpret_cast<const int8_t*>(queries[h].wide) + at));
    }
    for (int h = 0; h < Heads; ++h) totals[h] += dots[h].total() << 7 * part;
  }
}

// Dots of eight 8-bit rows with queries over 16 dims.
template <int Heads, bool Signed>
inline void add_dots8(const uint8_t* rows, int64_t pitch, const IntegerQuery* queries, int dim, I8 (&totals)[Heads]) {
  B32 codes[4];
  lanes_of_rows(rows, pitch, codes);
  if constexpr (kSplitQueries) return add_dots_split<Heads, Signed>(codes, queries, dim, totals);
  for (int j = 0; j < 4; ++j) {
    const S16 both = as<S16>(codes[j]);
    S16 even, odd;
    if constexpr (Signed) even = (both << 8) >> 8, odd = both >> 8;
    else even = both & 255, odd = as<S16>(as<U16>(both) >> 8);
    const int at = dim + 4 * j;
    for (int h = 0; h < Heads; ++h) totals[h] = add_pairs(totals[h], even, broadcast_pair(queries[h].wide + at));
    for (int h = 0; h < Heads; ++h) totals[h] = add_pairs(totals[h], odd, broadcast_pair(queries[h].wide + at + 2));
  }
}

enum Codes { kCodes4, kUnsigned8, kSigned8 };

inline Codes codes_of(int32_t kind) { return is_4bit(kind) ? kCodes4 : is_signed(kind) ? kSigned8 : kUnsigned8; }

// Adds to `scores`, of heads kPitch apart, what the queries make of as many keys as F has lanes. A size of 0 is known
// at run time only.
template <class F, int Heads, Codes Kind, int Dim, int Groups>
inline void add_lane_scores(const Side& side, int kv_head, int head_dim, const uint8_t* rows, const uint16_t* words,
                            const IntegerQuery* queries, float* scores) {
  typedef std::conditional_t<sizeof(F) == sizeof(F8), I8, IWide> I;
  const int dim = Dim ? Dim : head_dim, groups = Groups ? Groups : groups_of(side);
  const int pitch = Kind == kCodes4 ? dim / 2 : dim, bytes = pitch / groups;
  F found[Heads];
  for (int h = 0; h < Heads; ++h) found[h] = load<F>(scores + h * kPitch);
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) {
    I totals[Heads] = {};
    if constexpr (kSplitQueries && Kind == kUnsigned8)
      for (int h = 0; h < Heads; ++h) totals[h] = all(queries[h].start[g]);
#pragma GCC unroll 4
    for (int b = 0; b < bytes; b += 16) {
      const int at = g * bytes + b;
      if constexpr (Kind == kCodes4) add_dots4(rows + at, pitch, queries, 2 * at, totals);
      else add_dots8<Heads, Kind == kSigned8>(rows + at, pitch, queries, at, totals);
    }
    StepOf<F> step;
    if constexpr (Groups == 2) step = read_pair<F>(words, g);
    else step = read_steps(side, kv_head, words, g);
    for (int h = 0; h < Heads; ++h) {
      found[h] += step.scale * (to_float(totals[h]) * all<F>(queries[h].step[g]));
      found[h] -= step.shift * all<F>(queries[h].sum[g]);
    }
  }
  for (int h = 0; h < Heads; ++h) store(scores + h * kPitch, found[h]);
}

// The same of a run's keys; scores are those of its span.
template <int Heads, Codes Kind, int Dim, int Groups>
inline void add_code_scores(const Side& side, int kv_head, int head_dim, const Run& run, const IntegerQuery* queries,
                            float* scores, Ahead& next) {
  const int pitch = code_bytes(side, Dim ? Dim : head_dim), width = meta_words(side), count = run.end - run.begin;
  const uint8_t* rows = codes_at<uint8_t>(side, head_dim, run.spot);
  const uint16_t* words = meta_at(side, run.spot);
  scores += run.begin;
  int t = 0;
  const auto add = [&](auto lanes) {
    typedef decltype(lanes) F;
    for (; t + kLanesOf<F> <= count; t += kLanesOf<F>) {
      for (int i = 0; i < kLanesOf<F>; i += 8) next.ask();
      add_lane_scores<F, Heads, Kind, Dim, Groups>(side, kv_head, head_dim, rows + t * pitch, words + t * width,
                                                   queries, scores + t);
    }
  };
  if constexpr (Groups == 2 && kLanesOf<FWide> > 8) add(FWide());
  add(F8());
}

struct Halves {
  typedef uint16_t Type;
  static F8 read(const uint16_t* p) { return load_half(p); }
};

struct Floats {
  typedef float Type;
  static F8 read(const float* p) { return load<F8>(p); }
};

// The same for keys [tokens][dim] that are floats; queries are `dim` floats, kMaxHeadDim apart.
template <int Heads, class Reader>
inline void add_float_scores(const typename Reader::Type* keys, int tokens, int dim, const float* queries,
                             float* scores, Ahead& next) {
  for (int t = 0; t < tokens; t += 4, keys += 4 * dim) {
    if (t % 8 == 0) next.ask();
    Carried<F8> dots[Heads][4] = {};
    for (int i = 0; i < dim; i += 8) {
      F8 key[4];
      for (int j = 0; j < 4; ++j) key[j] = Reader::read(keys + j * dim + i);
      for (int h = 0; h < Heads; ++h) {
        const F8 q = load<F8>(queries + h * kMaxHeadDim + i);
        for (int j = 0; j < 4; ++j) multiply_add(dots[h][j], q, key[j]);
      }
    }
    for (int h = 0; h < Heads; ++h) {
      float found[4];
      sums4({dots[h][0], dots[h][1], dots[h][2], dots[h][3]}, found);
      for (int j = 0; j < 4; ++j) scores[h * kPitch + t + j] += found[j];
    }
  }
}

}  // namespace kvant::KVANT_ISA
