// The MoE MLP on packed FP4 weights: out[t] = sum over j of weights[t,j] (down(act(gate_up(x[t]) +
// b1)) + b2).
//
// - sort, one task: (token, choice) pairs of a chunk of tokens by expert; cut into segments of rows
// - gate_up, by (segment, panel): gather x, then per panel multiply, scale, bias, activation ->
//   workspace
// - down, by groups of output columns: all segments in order, multiply, weighted sum -> out
//
// A column group belongs to one task and takes experts in ascending order, so that every sum has
// one fixed order and no two threads write the same output. The workspace holds the activations of
// one chunk.
#ifndef JAXMOE_CSRC_CPU_MOE_MLP_H_
#define JAXMOE_CSRC_CPU_MOE_MLP_H_

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/types.h"

namespace jaxmoe::cpu {

struct MoeMlpShape {
  int64_t tokens = 0, hidden_size = 0, intermediate_size = 0, num_experts = 0, top_k = 0;
};

struct MoeMlpArgs {
  const Kernels* kernels = nullptr;  // that this machine can run
  Format format = Format::kNvfp4;
  Compute compute = Compute::kW4a16;
  Activation activation = Activation::kSwiglu;
  Dtype dtype = Dtype::kF32;  // of x and out
  Tactic tactic = Tactic::kAuto;
  MoeMlpShape shape;
  bool weight_on_input = false;
  int64_t expert_offset = 0;

  const void* x = nullptr;                   // [T, H]
  const uint8_t* gate_up = nullptr;          // packed, per expert
  const float* gate_up_global = nullptr;     // [E]
  const uint8_t* down = nullptr;             // packed, per expert
  const float* down_global = nullptr;        // [E]
  const float* gate_up_bias = nullptr;       // [E, 2I] or [E, I], or null
  const float* down_bias = nullptr;          // [E, H], or null
  const float* activation_params = nullptr;  // [P, E]
  const int32_t* expert_ids = nullptr;       // [T, k]
  const float* weights = nullptr;            // [T, k]
  void* out = nullptr;                       // [T, H]
  void* workspace = nullptr;                 // moe_mlp_workspace_bytes
};

// Bytes per expert of the packed operands.
int64_t gate_up_bytes(Format format, Activation activation, const MoeMlpShape& shape);
int64_t down_bytes(Format format, const MoeMlpShape& shape);

// Enough for every tactic.
int64_t moe_mlp_workspace_bytes(const Kernels& kernels, Compute compute, Dtype dtype,
                                const MoeMlpShape& shape);

// False if memory for a thread's scratch ran out. The arguments must be consistent (the handler
// checks them) and this machine must be able to run the variant.
bool moe_mlp(const MoeMlpArgs& args, Executor* executor);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_MOE_MLP_H_
