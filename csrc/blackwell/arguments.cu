#include <algorithm>

#include "blackwell/arguments.h"
#include "blackwell/target.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cutlass/cutlass.h"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"

namespace jaxmoe::blackwell {
namespace {

constexpr int kThreads = 256;

template <Format kFormat>
__device__ void describe(const ArgumentsOf& args, const Product& p, int e) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<block_size(kFormat)>;
  const int begin = args.offsets[e], rows = args.offsets[e + 1] - begin;
  const int k = static_cast<int>(padded_k(kFormat, p.k));
  const uint8_t* weights = p.weights + e * matrix_bytes(kFormat, p.outputs, p.k);
  const Groups& groups = p.groups;
  groups.shape[e] = {p.outputs, rows, k};
  groups.weights[e] = weights;
  groups.weight_scales[e] = weights + element_bytes(p.outputs, p.k);
  groups.rows[e] = p.codes + begin * row_bytes(kFormat, p.k);
  groups.row_scales[e] = p.scales + scale_bytes(kFormat, first_scale_row(begin, e), p.k);
  groups.out[e] = static_cast<uint16_t*>(p.out) + int64_t{begin} * p.outputs;
  groups.weight_stride[e] = p.k;
  groups.row_stride[e] = k;
  groups.out_stride[e] = p.outputs;
  const auto shape = cute::make_shape(p.outputs, rows, k, 1);
  const auto of_weights = Config::tile_atom_to_shape_SFA(shape);
  const auto of_rows = Config::tile_atom_to_shape_SFB(shape);
  static_assert(sizeof(of_weights) == sizeof(ScaleLayoutBytes) &&
                sizeof(of_rows) == sizeof(ScaleLayoutBytes));
  groups.weight_scale_layout[e] = reinterpret_cast<const ScaleLayoutBytes&>(of_weights);
  groups.row_scale_layout[e] = reinterpret_cast<const ScaleLayoutBytes&>(of_rows);
}

// The expert that has a position: the last whose offset is not past it.
__device__ int find_expert(const int32_t* offsets, int experts, int position) {
  if (position < offsets[0] || position >= offsets[experts]) return -1;
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (offsets[middle] <= position ? low : high) = middle;
  }
  return low;
}

template <Format kFormat>
__global__ void __launch_bounds__(kThreads) arguments_kernel(ArgumentsOf args) {
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < args.experts) {
    for (int p = 0; p < args.num_products; ++p) describe<kFormat>(args, args.products[p], i);
  }
  if (i < args.positions) {
    const int e = find_expert(args.offsets, args.experts, i);
    args.expert_of[i] = e;
    if (e >= 0) {
      const int begin = args.offsets[e];
      args.scale_row[i] = static_cast<int32_t>(first_scale_row(begin, e)) + i - begin;
    }
  }
}

}  // namespace

cudaError_t make_arguments(const ArgumentsOf& args, cudaStream_t stream) {
  const int threads = std::max(args.experts, args.positions);
  const auto kernel = args.format == Format::kNvfp4 ? arguments_kernel<Format::kNvfp4>
                                                    : arguments_kernel<Format::kMxfp4>;
  return cuda::launch(kernel, dim3((threads + kThreads - 1) / kThreads), kThreads, 0, stream, args);
}

}  // namespace jaxmoe::blackwell
