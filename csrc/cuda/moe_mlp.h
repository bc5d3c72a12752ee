// The whole expert MLP on one GPU, by the tactics of a family, from sorted experts to the weighted
// sum: what the FFI handlers call. Nothing here allocates, synchronises, or knows of XLA.
#ifndef JAXMOE_CSRC_CUDA_MOE_MLP_H_
#define JAXMOE_CSRC_CUDA_MOE_MLP_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/activations.h"
#include "cuda/layout.h"
#include "cuda/route.h"

namespace jaxmoe::cuda {

enum class Dtype { kBf16, kFp16 };

struct Family;  // cuda/tactics.h

// Kernels of the two products and their tile shapes, or of the whole MLP, by name; the empty name
// is `default_tactic`.
struct TacticInfo {
  const char* name;
  int smem_bytes;  // most shared memory that one of its kernels takes
};
std::vector<TacticInfo> tactics(const Family& family, Format format);

struct MlpShape {
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int64_t experts;
  int64_t top_k;
};
const char* default_tactic(const Family& family, Format format, const MlpShape& shape, bool gated);

struct MlpArgs {
  MlpShape shape;
  Format format;
  Dtype dtype;
  Activation activation;
  int num_params;
  bool weight_on_input;
  const void* x;                 // [T, H]
  const uint8_t* gate_up;        // [E, matrix_bytes(format, I, H, gated)]
  const float* gate_up_global;   // [E]
  const uint8_t* down;           // [E, matrix_bytes(format, H, I, false)]
  const float* down_global;      // [E]
  const float* gate_up_bias;     // [E, 2I] or [E, I], or null
  const float* down_bias;        // [E, H], or null
  const float* params;           // [num_params, E]
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
  Dtype dtype;
  const void* x;                // [M, K]
  const uint8_t* w;             // [E, matrix_bytes(format, N, K, false)]
  const float* w_global;        // [E]
  const float* bias;            // [E, N], or null
  const int32_t* group_sizes;   // [G]
  const int32_t* group_offset;  // [] on the device
  void* out;                    // [M, N], rounded to dtype
};

// Bytes of scratch on the device; any contents, aligned to 256 bytes.
int64_t mlp_workspace_bytes(Format format, const MlpShape& shape);
int64_t grouped_workspace_bytes(Format format, const GroupedShape& shape);

// Enqueue on `stream`. Return "" or what went wrong, with the kernel's name.
std::string moe_mlp(const Family& family, const MlpArgs& args, const std::string& tactic,
                    void* workspace, cudaStream_t stream);
std::string grouped_matmul(const Family& family, const GroupedArgs& args, const std::string& tactic,
                           void* workspace, cudaStream_t stream);

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_MOE_MLP_H_
