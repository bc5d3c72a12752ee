// Kernels for SM 120 and 121: block-scaled mma.sync out of registers, 99 KiB of shared memory, no
// clusters. `Tile` is a configuration of blackwell/gemm.cuh.
#ifndef JAXMOE_CSRC_SM120_CONFIG_CUH_
#define JAXMOE_CSRC_SM120_CONFIG_CUH_

#include "blackwell/gemm.cuh"

namespace jaxmoe::blackwell {

template <Format kFormat_, int kTokens_, int kDepth, bool kPingpong = false>
struct Sm120 {
  static constexpr Format kFormat = kFormat_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kSmemLimit = 101376;  // of one thread block: 99 KiB
  using Arch = cutlass::arch::Sm120;
  using Tile = cute::Shape<cute::_128, cute::Int<kTokens>, cute::Int<kDepth>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Schedule =
      cute::conditional_t<kPingpong, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong,
                          cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>;
  using EpilogueSchedule =
      cute::conditional_t<kPingpong, cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong,
                          cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
};

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_SM120_CONFIG_CUH_
