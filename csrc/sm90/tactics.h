// The tactics: how one grouped product is cut into tiles, or the whole MLP done by one kernel. Each
// is instantiated in its own translation unit (tactic_*.cu) for every format, dtype and epilogue.
#ifndef JAXMOE_CSRC_SM90_TACTICS_H_
#define JAXMOE_CSRC_SM90_TACTICS_H_

#include <cuda_runtime_api.h>

#include <string>

#include "sm90/fused.h"
#include "sm90/gemm.h"
#include "sm90/moe_mlp.h"

namespace jaxmoe::sm90 {

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

extern const Tactic kFused;
extern const Tactic kDecode;
extern const Tactic kWgmma64;
extern const Tactic kWgmma64Tall;
extern const Tactic kWgmma128;
extern const Tactic kWgmma192;
extern const Tactic kWgmma256;

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_TACTICS_H_
