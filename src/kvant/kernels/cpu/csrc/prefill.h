// Attention of many new tokens of a sequence at once, tile by tile of the context.
#pragma once

#include "prefill_codes.h"
#include "prefill_floats.h"

namespace kvant::KVANT_ISA {

// Calls body(rows) for each tile that tokens [start, stop) lie in, of which there may be none.
template <class Body>
inline void for_tiles(const Place& at, int64_t start, int64_t stop, const Body& body) {
  for (int64_t tile = start / kTile * kTile; start < stop && tile < stop; tile += kTile)
    body(TileRows(at, tile, std::max(tile, start), std::min<int64_t>(tile + kTile, stop)));
}

// New tokens [first, last) and what they attend to, tokens [oldest, stop), in 4 bits but for the sinks. Neither this
// function nor the next one is inlined: each has much on its stack.
[[gnu::noinline]] void attend_codes(const Place& at, const AttentionWork& work, int first, int last, int64_t oldest,
                                    int64_t stop) {
  Bundle bundles[kBundles];
  const int rows = (last - first) * (at.shape.heads / at.shape.kv_heads);
  const auto each = [&](const auto& body) {
    for (int b = 0; b * kRowLanes < rows; ++b) body(bundles[b], b * kRowLanes);
  };
  each([&](Bundle& bundle, int row) { bundle.read(at, work, first, last, row); });
  const int64_t codes = std::clamp<int64_t>(at.layer.sinks, oldest, stop);
  for_tiles(at, oldest, codes, [&](const TileRows& it) {
    alignas(kAlign) float keys[kTile * kMaxHeadDim], values[kTile * kMaxHeadDim];
    decode_keys(at, it, keys);
    decode_tile(at, at.layer.value, it, values);
    each([&](Bundle& bundle, int) { bundle.attend(at, it, keys, values); });
  });
  for_tiles(at, codes, stop, [&](const TileRows& it) {
    const CodeTile tile(at, it);
    each([&](Bundle& bundle, int) { bundle.attend(at, it, tile); });
  });
  each([&](Bundle& bundle, int) { bundle.finish(at); });
}

// The same of any cache.
[[gnu::noinline]] void attend_floats(const Place& at, const AttentionWork& work, int first, int last, int64_t oldest,
                                     int64_t stop) {
  Rows rows(at, work, first, last);
  FloatTile tile;
  for_tiles(at, oldest, stop, [&](const TileRows& it) { tile.attend(at, it, rows); });
  rows.finish(at, work, first);
}

// New tokens [first, last) of a sequence, at most kTileRows with the heads of one KV head, and all that they attend to.
void attend_tile(const AttentionWork& work, int sequence, int first, int last, int kv_head) {
  const Place at(work, sequence, kv_head);
  const int64_t position = work.batch->positions[first], stop = work.batch->positions[last - 1] + 1;
  const int64_t oldest = at.shape.window ? std::max<int64_t>(0, position - at.shape.window + 1) : 0;
  const auto attend = attends_by_codes(at) ? attend_codes : attend_floats;
  attend(at, work, first, last, oldest, stop);
}

}  // namespace kvant::KVANT_ISA
