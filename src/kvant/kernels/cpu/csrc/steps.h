// What a vector's codes mean: x = code * scale - shift.
#pragma once

#include "rows.h"

namespace kvant::KVANT_ISA {

constexpr int kMaxGroups = 4;

inline bool is_4bit(int32_t kind) { return kind == kVectorGrouped4 || kind == kVectorAffine4; }
inline bool is_integer(int32_t kind) { return kind >= kVectorAffine8; }
inline bool is_signed(int32_t kind) { return kind == kVectorSymmetric8 || kind == kVectorStatic8; }
inline int groups_of(const Side& side) { return side.kind == kVectorGrouped4 ? side.groups : 1; }

// Of one group of vectors, which are lanes.
template <class F>
struct StepOf {
  F scale, shift;
};
typedef StepOf<F8> Step8;

template <class F, class Words>
inline StepOf<F> split_words(Words words) {
  typedef decltype(F{} < F{}) I;
  const F scale = as<F>((words & 0xffc0) << 12) * all<F>(0x1p112f);
  return {scale, scale * (to_float(as<I>(words & 63)) * all<F>(0.125f) + all<F>(7.5f - 4.0f))};
}

// The words of group `group` of eight vectors, `width` words each.
inline U8 words_of(const uint16_t* words, int width, int group) {
  if (width == 2) return group ? load<U8>(words) >> 16 : load<U8>(words) & 0xffff;
  U8 lanes;
  for (int i = 0; i < 8; ++i) lanes[i] = words[i * width + group];
  return lanes;
}

// Steps of a group of eight vectors whose words are given.
inline Step8 read_steps(const Side& side, int kv_head, const uint16_t* words, int group) {
  switch (side.kind) {
    case kVectorGrouped4: return split_words<F8>(words_of(words, side.groups, group));
    case kVectorSymmetric8: return {load_half(words), all(0.0f)};
    case kVectorStatic8: return {all(side.scale[kv_head]), all(0.0f)};
    default: return {widen_halves(words_of(words, 2, 0)), -widen_halves(words_of(words, 2, 1))};
  }
}

// The same of two words a vector, a group each, for as many vectors as there are lanes.
template <class F>
inline StepOf<F> read_pair(const uint16_t* words, int group) {
  const auto both = load<UnsignedOf<F>>(words);
  return split_words<F>(group ? both >> 16 : both & 0xffff);
}

// Steps of `count` vectors whose words are given; 0 for those outside of [from, to), whose words may be anything.
struct Steps {
  alignas(kAlign) float scale[kMaxGroups][kTile], shift[kMaxGroups][kTile];

  Steps(const Side& side, int kv_head, const uint16_t* words, int count, int from, int to) {
    const int groups = groups_of(side), width = meta_words(side);
    if (side.kind == kVectorGrouped4 && groups == 2) {
      const int whole = count & -kLanesOf<FWide>;
      fill<FWide>(words, width, 0, whole, groups, read_pair<FWide>);
      fill<F8>(words, width, whole, count, groups, read_pair<F8>);
    } else {
      fill<F8>(words, width, 0, count, groups,
               [&](const uint16_t* w, int g) { return read_steps(side, kv_head, w, g); });
    }
    for (int g = 0; g < groups; ++g)
      for (float* x : {scale[g], shift[g]}) {
        std::fill(x, x + std::max(0, from), 0.0f);
        std::fill(x + std::min(to, count), x + count, 0.0f);
      }
  }

 private:
  template <class F, class Read>
  void fill(const uint16_t* words, int width, int from, int to, int groups, Read read) {
    for (int t = from; t < to; t += kLanesOf<F>)
      for (int g = 0; g < groups; ++g) {
        const StepOf<F> step = read(words + t * width, g);
        store(scale[g] + t, step.scale);
        store(shift[g] + t, step.shift);
      }
  }
};

}  // namespace kvant::KVANT_ISA
