// What every kernel of this family needs to be launched.
#ifndef JAXMOE_CSRC_SM90_TACTIC_CUH_
#define JAXMOE_CSRC_SM90_TACTIC_CUH_

#include "cuda/instances.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "sm90/tactics.h"

namespace jaxmoe::sm90 {

inline constexpr int kSmemLimit = 232448;  // of one thread block on SM 90

// Always the most that the kernel may take: the limit belongs to the function, and a launch on
// another thread with more experts must not find it lowered.
template <class C, class Kernel>
cudaError_t allow_smem(Kernel kernel) {
  // The system keeps 1 KiB of every thread block.
  static_assert((C::smem_bytes(kMaxExperts) + 1024) * C::kBlocksPerSm <= kSmemLimit + 1024);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              C::smem_bytes(kMaxExperts));
}

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_TACTIC_CUH_
