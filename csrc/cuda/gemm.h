// What the grouped products take, for host and device.
#ifndef JAXMOE_CSRC_CUDA_GEMM_H_
#define JAXMOE_CSRC_CUDA_GEMM_H_

#include <cstdint>

#include "cuda/activations.h"

namespace jaxmoe::cuda {

// What happens to a sum before it is rounded; kSwiglu is kGated for one activation, and faster.
enum class Epilogue { kStore, kPlain, kGated, kSwiglu };
constexpr bool is_gated(Epilogue e) { return e == Epilogue::kGated || e == Epilogue::kSwiglu; }

struct GemmArgs {
  const uint8_t* weights;     // [E] matrices in the sm90_fragment layout
  const float* global_scale;  // [E]
  const float* bias;          // [E, outputs] (gated: [E, 2 outputs]), or null
  const float* params;        // [num_params, E] of the activation
  const float* row_weight;    // [rows of x], factor before the bias, or null
  const float* row_scale;     // [rows of x], of e4m3; null otherwise
  const void* x;              // [rows, k]
  const void* sorted;         // [positions, k], x in the order of positions; gemm_kernel reads this
  int positions;
  void* out;               // [rows, outputs]
  const int32_t* offsets;  // [E + 1]: tokens of expert e are sorted positions offsets[e] ...
  const int32_t* source;   // row of x at each sorted position, or null: the position
  const int32_t* target;   // row of out, likewise
  int experts;
  int outputs;
  int k;
  int num_params;
  Activation activation;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_GEMM_H_
