// Attention of many new tokens of a sequence at once, tile by tile of the context.
#pragma once

#include "prefill_codes.h"
#include "prefill_floats.h"

namespace kvant::KVANT_ISA {

// Calls attend(tile) for each tile that tokens [start, stop) lie in.
template <class Attend>
inline void for_tiles(const Place& at, int64_t start, int64_t stop, Attend attend) {
  for (int64_t tile = start / kTile * kTile; tile < stop; tile += kTile)
    attend(TileRows(at, tile, std::max(tile, start), std::min<int64_t>(tile + kTile, stop)));
}

// New tokens [first, last) of a sequence, at most kTileRows with the heads of one KV head, and all that they attend to.
void attend_tile(const AttentionWork& work, int sequence, int first, int last, int kv_head) {
  const Place at(work, sequence, kv_head);
  Rows rows(at, work, first, last);
  const int64_t stop = work.batch->positions[last - 1] + 1;
  const int64_t oldest = at.shape.window ? std::max<int64_t>(0, rows.position - at.shape.window + 1) : 0;
  const int64_t floats = attends_by_codes(at) ? std::clamp<int64_t>(at.layer.sinks, oldest, stop) : stop;
  FloatTile tile;
  for_tiles(at, oldest, floats, [&](const TileRows& it) { tile.attend(at, it, rows); });
  if (floats < stop) {
    CodeRows codes(at, rows);
    for_tiles(at, floats, stop, [&](const TileRows& it) { codes.attend(at, it, rows); });
    codes.finish(at, rows);
  }
  rows.finish(at, work, first);
}

}  // namespace kvant::KVANT_ISA
