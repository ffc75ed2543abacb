// The kernels as compiled for one instruction set, KVANT_ISA.
#include "decode.h"
#include "limits.h"
#include "linear.h"
#include "prefill.h"
#include "writing.h"

#define KVANT_JOIN_(a, b) a##b
#define KVANT_JOIN(a, b) KVANT_JOIN_(a, b)
#define KVANT_TEXT_(a) #a
#define KVANT_TEXT(a) KVANT_TEXT_(a)

namespace kvant {

const Kernels& KVANT_JOIN(KVANT_ISA, _kernels)() {
  using namespace KVANT_ISA;
  static const Kernels kernels = {
      KVANT_TEXT(KVANT_ISA), quantize_row,  panel_height,     panel_tile_rows, linear_streams, linear_part,
      weight_row,            rms_norm_row,  add_row,          rope_row,        gated_row,      softcap_row,
      scale_row,             argmax_row,    exponentials_row, write_vectors,   attend_splits,  attend_merge,
      attend_tile,           reach_limit,
  };
  return kernels;
}

}  // namespace kvant
