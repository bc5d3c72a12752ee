// The whole expert MLP on one Blackwell GPU, from sorted experts to the weighted sum: what the FFI
// handlers call. Nothing here allocates, synchronises, or knows of XLA.
#ifndef JAXMOE_CSRC_BLACKWELL_MOE_MLP_H_
#define JAXMOE_CSRC_BLACKWELL_MOE_MLP_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "blackwell/layout.h"
#include "cuda/activations.h"
#include "cuda/route.h"

namespace jaxmoe::blackwell {

using cuda::kMaxExperts;

// Tile shapes of the products, by name; the empty name is the library's choice.
struct TacticInfo {
  const char* name;
  int smem_bytes;
};
std::vector<TacticInfo> tactics(Format format);

struct MlpShape {
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int64_t experts;
  int64_t top_k;
};
// The tactic for products of `rows` sorted rows.
const char* default_tactic(Format format, int64_t rows, int64_t experts);

struct MlpArgs {
  MlpShape shape;
  Format format;
  cuda::Activation activation;
  int num_params;
  bool weight_on_input;
  const void* x;                     // [T, H]
  const uint8_t* gate_up;            // [E, matrix_bytes(format, 2I or I, H)]
  const float* gate_up_global;       // [E]
  const uint8_t* down;               // [E, matrix_bytes(format, H, I)]
  const float* down_global;          // [E]
  const float* gate_up_bias;         // [E, 2I] or [E, I], or null
  const float* down_bias;            // [E, H], or null
  const float* params;               // [num_params, E]
  const float* gate_up_input_scale;  // [1], or null: from each row
  const float* down_input_scale;
  const int32_t* expert_ids;     // [T, k]
  const float* weights;          // [T, k]
  const int32_t* expert_offset;  // [] on the device
  void* out;                     // [T, H]
};

struct GroupedShape {
  int64_t rows;
  int64_t n;
  int64_t k;
  int64_t experts;
  int64_t groups;  // entries of group_sizes
};

struct GroupedArgs {
  GroupedShape shape;
  Format format;
  const void* x;                // [M, K]
  const uint8_t* w;             // [E, matrix_bytes(format, N, K)]
  const float* w_global;        // [E]
  const float* bias;            // [E, N], or null
  const float* input_scale;     // [1], or null
  const int32_t* group_sizes;   // [G]
  const int32_t* group_offset;  // [] on the device
  void* out;                    // [M, N], bf16
};

// Bytes of scratch on the device; any contents, aligned to 256 bytes.
int64_t mlp_workspace_bytes(Format format, const MlpShape& shape, bool gated);
int64_t grouped_workspace_bytes(Format format, const GroupedShape& shape);

// Enqueue on `stream`. Return "" or what went wrong, with the kernel's name.
std::string moe_mlp(const MlpArgs& args, const std::string& tactic, void* workspace,
                    cudaStream_t stream);
std::string grouped_matmul(const GroupedArgs& args, const std::string& tactic, void* workspace,
                           cudaStream_t stream);

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_MOE_MLP_H_
