// From the last product to the result: scales, bias, and the weighted sum of a token's choices.
#ifndef JAXMOE_CSRC_BLACKWELL_COMBINE_H_
#define JAXMOE_CSRC_BLACKWELL_COMBINE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jaxmoe::blackwell {

// out[t] = sum over j, in order, of
//   weights[t, j] * (product[p] * (global_scale[e] * row_scale[p]) + bias[e])
// with p the position of (t, j) and e its expert; a choice without either adds nothing.
struct CombineArgs {
  const void* product;  // [positions, columns], bf16; columns a multiple of 8
  int columns;
  const float* row_scale;      // [positions]
  const int32_t* expert_of;    // [positions]
  const float* global_scale;   // [experts]
  const float* bias;           // [experts, columns], or null
  const float* weights;        // [tokens, top_k], or null for ones
  const int32_t* position_of;  // [tokens, top_k]; or null: top_k is 1, and p is t
  int tokens;
  int top_k;
  void* out;  // [tokens, columns], bf16
};
cudaError_t combine(const CombineArgs& args, cudaStream_t stream);

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_COMBINE_H_
