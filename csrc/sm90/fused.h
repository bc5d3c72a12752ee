// What the kernel of a whole MLP takes, for host and device.
#ifndef JAXMOE_CSRC_SM90_FUSED_H_
#define JAXMOE_CSRC_SM90_FUSED_H_

#include <cstdint>

#include "sm90/gemm.h"

namespace jaxmoe::sm90 {

struct FusedArgs {
  GemmArgs up, down;             // up.out is down.x, scratch: [pairs, I], I padded to whole blocks
  const int32_t* expert_ids;     // [T, k]
  const int32_t* expert_offset;  // []
  const float* weights;          // [T, k]
  int tokens;
  int top_k;
  bool weight_on_input;
};

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_FUSED_H_
