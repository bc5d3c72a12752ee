// What the kernel of a whole MLP takes, for host and device.
#ifndef JAXMOE_CSRC_CUDA_FUSED_H_
#define JAXMOE_CSRC_CUDA_FUSED_H_

#include <cstdint>

#include "cuda/gemm.h"

namespace jaxmoe::cuda {

struct FusedArgs {
  GemmArgs up, down;             // up.out is down.x, scratch: [pairs, I], I padded to whole blocks
  const int32_t* expert_ids;     // [T, k]
  const int32_t* expert_offset;  // []
  const float* weights;          // [T, k]
  int tokens;
  int top_k;
  bool weight_on_input;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_FUSED_H_
