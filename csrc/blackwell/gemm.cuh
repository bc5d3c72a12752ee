// A grouped product by a CUTLASS kernel: `Config` names the kernel's parts, `GroupedGemm<Config>`
// makes a Tactic of it.
//
// Weights are operand A and tokens operand B, both K-major; the result is M-major, that is, rows of
// tokens one after the other. There is no C operand: without it more stages fit.
#ifndef JAXMOE_CSRC_BLACKWELL_GEMM_CUH_
#define JAXMOE_CSRC_BLACKWELL_GEMM_CUH_

#include <algorithm>

// Of CUTLASS, cute/tensor.hpp must be first: other headers find its algorithms only then.
#include "blackwell/gemm.h"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace jaxmoe::blackwell {

template <Format kFormat>
struct Operands;
template <>
struct Operands<Format::kNvfp4> {
  using Weights = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  using Rows = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  static constexpr int kWeightAlignment = 32, kRowAlignment = 32;  // in elements
};
template <>
struct Operands<Format::kMxfp4> {
  using Weights = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
  using Rows = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
  static constexpr int kWeightAlignment = 128, kRowAlignment = 16;
};

// Config: kFormat, kName, kTokens, kSmemLimit; Arch, Tile, Cluster, Schedule, EpilogueSchedule,
// EpilogueTile.
template <class Config>
struct GroupedGemm {
  using Ops = Operands<Config::kFormat>;
  using Output = cutlass::bfloat16_t;
  using OutputLayout = cutlass::layout::ColumnMajor;
  static constexpr int kOutputAlignment = 8;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Config::Arch, cutlass::arch::OpClassBlockScaledTensorOp, typename Config::Tile,
      typename Config::Cluster, typename Config::EpilogueTile, float, float, void, OutputLayout*,
      kOutputAlignment, Output, OutputLayout*, kOutputAlignment,
      typename Config::EpilogueSchedule>::CollectiveOp;
  // Beside the epilogue's storage, the scheduler, tensor maps and alignment take room that the
  // builder does not count in every release.
  static constexpr int kCarveout =
      static_cast<int>(sizeof(typename Epilogue::SharedStorage)) + 2048;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<kCarveout>;

  // A stage: both operands, FP4 beside FP8 spread over bytes, and their scales. Of all the stages
  // that fit, a kernel needs two.
  static constexpr int kDepth = cute::size<2>(typename Config::Tile{});
  static constexpr int kStageBytes =
      (cute::size<0>(typename Config::Tile{}) + Config::kTokens) * kDepth /
          (Config::kFormat == Format::kNvfp4 ? 2 : 1) +
      (cute::size<0>(typename Config::Tile{}) + round_up(Config::kTokens, kScaleRows)) * kDepth /
          block_size(Config::kFormat);
  static_assert(
      2 * kStageBytes + kCarveout <= Config::kSmemLimit,
      "the tile is too large: two stages of it, and the results, exceed the shared memory "
      "that a thread block of this SM may have; take fewer tokens or less depth");
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Config::Arch, cutlass::arch::OpClassBlockScaledTensorOp, typename Ops::Weights,
      cutlass::layout::RowMajor*, Ops::kWeightAlignment, typename Ops::Rows,
      cutlass::layout::ColumnMajor*, Ops::kRowAlignment, float, typename Config::Tile,
      typename Config::Cluster, Stages, typename Config::Schedule>::CollectiveOp;
  using ProblemShape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static constexpr int kSmemBytes = static_cast<int>(sizeof(typename Kernel::SharedStorage));
  static_assert(kSmemBytes <= Config::kSmemLimit,
                "the kernel's shared memory exceeds what a thread block of this SM may have");

  static_assert(sizeof(typename ProblemShape::UnderlyingProblemShape) == sizeof(Groups::Shape));
  static_assert(sizeof(typename Mainloop::InternalStrideA) == sizeof(int64_t));
  static_assert(sizeof(typename Mainloop::InternalStrideB) == sizeof(int64_t));
  static_assert(sizeof(typename Mainloop::InternalLayoutSFA) == sizeof(ScaleLayoutBytes));
  static_assert(sizeof(typename Mainloop::InternalLayoutSFB) == sizeof(ScaleLayoutBytes));

  static typename Gemm::Arguments arguments(const Groups& groups, int experts,
                                            int multiprocessors) {
    using OutputStride = typename Epilogue::InternalStrideD;
    static_assert(sizeof(OutputStride) == sizeof(int64_t));
    using ElementA = typename Mainloop::ElementA;
    using ElementB = typename Mainloop::ElementB;
    using ElementSF = typename Mainloop::ElementSF;
    typename Gemm::Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {
        experts, reinterpret_cast<typename ProblemShape::UnderlyingProblemShape*>(groups.shape),
        nullptr};
    args.mainloop.ptr_A = reinterpret_cast<const ElementA**>(groups.weights);
    args.mainloop.dA = reinterpret_cast<typename Mainloop::StrideA>(groups.weight_stride);
    args.mainloop.ptr_B = reinterpret_cast<const ElementB**>(groups.rows);
    args.mainloop.dB = reinterpret_cast<typename Mainloop::StrideB>(groups.row_stride);
    args.mainloop.ptr_SFA = reinterpret_cast<const ElementSF**>(groups.weight_scales);
    args.mainloop.layout_SFA =
        reinterpret_cast<typename Mainloop::LayoutSFA>(groups.weight_scale_layout);
    args.mainloop.ptr_SFB = reinterpret_cast<const ElementSF**>(groups.row_scales);
    args.mainloop.layout_SFB =
        reinterpret_cast<typename Mainloop::LayoutSFB>(groups.row_scale_layout);
    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = 0.0f;
    args.epilogue.ptr_D = reinterpret_cast<Output**>(groups.out);
    args.epilogue.dD = reinterpret_cast<typename Epilogue::StrideD>(groups.out_stride);
    args.hw_info.sm_count = std::min(multiprocessors, kMaxMultiprocessors);
    return args;
  }

  static int64_t workspace_bytes() {
    return static_cast<int64_t>(
        Gemm::get_workspace_size(arguments(Groups{}, 1, kMaxMultiprocessors)));
  }

  static std::string run(const Groups& groups, int experts, int multiprocessors, void* workspace,
                         cudaStream_t stream) {
    const auto failed = [](const char* step, cutlass::Status status) {
      return std::string(Config::kName) + ": " + step + ": " + cutlassGetStatusString(status) +
             ", " + cudaGetErrorString(cudaGetLastError());
    };
    Gemm gemm;
    cutlass::Status status =
        gemm.initialize(arguments(groups, experts, multiprocessors), workspace, stream);
    if (status != cutlass::Status::kSuccess) return failed("initialize", status);
    status = gemm.run(stream, nullptr, /*launch_with_pdl=*/true);
    if (status != cutlass::Status::kSuccess) return failed("run", status);
    return "";
  }

  static constexpr Tactic kTactic = {Config::kName, Config::kFormat, Config::kTokens,
                                     kSmemBytes,    workspace_bytes, run};
};

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_GEMM_CUH_
