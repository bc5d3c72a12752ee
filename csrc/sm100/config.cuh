// Kernels for SM 100 and 103: tcgen05 products of one multiprocessor, accumulated in tensor memory,
// 227 KiB of shared memory, clusters of one block. `Sm100` is a configuration of
// blackwell/gemm.cuh.
#ifndef JAXMOE_CSRC_SM100_CONFIG_CUH_
#define JAXMOE_CSRC_SM100_CONFIG_CUH_

#include "blackwell/gemm.cuh"

namespace jaxmoe::blackwell {

template <Format kFormat_, int kTokens_>
struct Sm100 {
  static constexpr Format kFormat = kFormat_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kSmemLimit = 232448;  // of one thread block: 227 KiB
  // 128 bytes of a row of shared memory, where FP4 beside FP8 takes a byte an element.
  static constexpr int kDepth = kFormat == Format::kNvfp4 ? 256 : 128;
  using Arch = cutlass::arch::Sm100;
  using Tile = cute::Shape<cute::_128, cute::Int<kTokens>, cute::Int<kDepth>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Schedule =
      cute::conditional_t<kFormat == Format::kNvfp4,
                          cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100,
                          cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmMxf8f6f4Sm100>;
  using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm;
  // The builder's own epilogue of 256 tokens takes the room of a stage.
  using EpilogueTile = cute::conditional_t<kTokens == 256, cute::Shape<cute::_128, cute::_64>,
                                           cutlass::epilogue::collective::EpilogueTileAuto>;
};

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_SM100_CONFIG_CUH_
