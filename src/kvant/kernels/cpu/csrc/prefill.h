// Attention of many new tokens of a sequence at once, tile by tile of the context.
#pragma once

#include "prefill_codes.h"
#include "prefill_floats.h"

namespace kvant::KVANT_ISA {

// Has a tile of floats, or of codes, attend to each tile that tokens [start, stop) lie in; there is one at least.
template <class Attending>
inline void attend_tiles(const Place& at, int64_t start, int64_t stop, Rows& rows, Attending& attending) {
  for (int64_t tile = start / kTile * kTile; tile < stop; tile += kTile)
    attending.attend(at, TileRows(at, tile, std::max(tile, start), std::min<int64_t>(tile + kTile, stop)), rows);
}

// New tokens [first, last) of a sequence, at most kTileRows with the heads of one KV head, and all that they attend to.
void attend_tile(const AttentionWork& work, int sequence, int first, int last, int kv_head) {
  const Place at(work, sequence, kv_head);
  Rows rows(at, work, first, last);
  const int64_t stop = work.batch->positions[last - 1] + 1;
  const int64_t oldest = at.shape.window ? std::max<int64_t>(0, rows.position - at.shape.window + 1) : 0;
  const int64_t floats = attends_by_codes(at) ? std::clamp<int64_t>(at.layer.sinks, oldest, stop) : stop;
  if (oldest < floats) {
    FloatTile tile;
    attend_tiles(at, oldest, floats, rows, tile);
  }
  if (floats < stop) {
    CodeRows codes(at, rows);
    attend_tiles(at, floats, stop, rows, codes);
    codes.finish(at, rows);
  }
  rows.finish(at, work, first);
}

}  // namespace kvant::KVANT_ISA
