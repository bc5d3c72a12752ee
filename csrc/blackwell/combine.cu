#include <algorithm>

#include "blackwell/combine.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace jaxmoe::blackwell {
namespace {

constexpr int kThreads = 256;

// Eight columns a thread.
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs args) {
  using Pair = cuda::Pair<__nv_bfloat16>;
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  const int chunks = args.columns / 8;
  const auto* product = static_cast<const uint4*>(args.product);
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
       at < int64_t{args.tokens} * chunks; at += int64_t{gridDim.x} * kThreads) {
    const int token = static_cast<int>(at / chunks), chunk = static_cast<int>(at % chunks);
    float sum[8] = {};
    for (int j = 0; j < args.top_k; ++j) {
      const int64_t choice = int64_t{token} * args.top_k + j;
      const int position = args.position_of ? args.position_of[choice] : token;
      const int expert = position < 0 ? -1 : args.expert_of[position];
      if (expert < 0) continue;
      const float weight = args.weights ? args.weights[choice] : 1.0f;
      const float scale = args.global_scale[expert] * args.row_scale[position];
      const uint4 v = product[int64_t{position} * chunks + chunk];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      const float* bias =
          args.bias ? args.bias + int64_t{expert} * args.columns + chunk * 8 : nullptr;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float d = i % 2 ? Pair::high(words[i / 2]) : Pair::low(words[i / 2]);
        sum[i] += weight * (d * scale + (bias ? bias[i] : 0.0f));
      }
    }
    static_cast<uint4*>(args.out)[at] =
        make_uint4(Pair::make(sum[0], sum[1]), Pair::make(sum[2], sum[3]),
                   Pair::make(sum[4], sum[5]), Pair::make(sum[6], sum[7]));
  }
}

}  // namespace

cudaError_t combine(const CombineArgs& args, cudaStream_t stream) {
  const int64_t threads = int64_t{args.tokens} * (args.columns / 8);
  const int64_t blocks = std::min((threads + kThreads - 1) / kThreads, int64_t{1} << 20);
  return cuda::launch(combine_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream,
                      args);
}

}  // namespace jaxmoe::blackwell
