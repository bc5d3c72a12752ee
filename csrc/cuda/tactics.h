// The tactics of a family: how one grouped product is cut into tiles, or the whole MLP done by one
// kernel. Each is instantiated in its own translation unit (csrc/<family>/tactic_*.cu) for every
// format, dtype and epilogue.
#ifndef JAXMOE_CSRC_CUDA_TACTICS_H_
#define JAXMOE_CSRC_CUDA_TACTICS_H_

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "cuda/fused.h"
#include "cuda/gemm.h"
#include "cuda/moe_mlp.h"
#include "cuda/quantize.h"

namespace jaxmoe::cuda {

struct Launch {
  Format format;
  Dtype dtype;
  Epilogue epilogue;
  int multiprocessors;
  cudaStream_t stream;
};

struct Tactic {
  const char* name;
  int (*smem_bytes)(Format);  // at kMaxExperts, the most of any dtype and epilogue; 0: no kernel
  bool reads_sorted;          // GemmArgs::sorted in place of x and source
  // One product; null for a tactic of the whole MLP, which has the other two.
  cudaError_t (*run)(const GemmArgs& args, const Launch& launch);
  // The whole MLP; the epilogue is that of the first product.
  cudaError_t (*run_mlp)(const FusedArgs& args, const Launch& launch) = nullptr;
  // Why run_mlp cannot: "takes at most ...", or "".
  std::string (*obstacle)(const MlpShape& shape) = nullptr;
};

// What moe_mlp.h works with.
struct Family {
  std::vector<const Tactic*> tactics;
  // What runs where no tactic is named: a product of `rows` sorted rows, and a whole MLP.
  const Tactic* (*product_tactic)(Format format, int64_t rows, int64_t experts);
  const Tactic* (*mlp_tactic)(Format format, const MlpShape& shape, bool gated);
  // cuda::quantize_rows; null where no tactic multiplies e4m3.
  cudaError_t (*quantize_rows)(const QuantizeArgs& args, cudaStream_t stream) = nullptr;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_TACTICS_H_
