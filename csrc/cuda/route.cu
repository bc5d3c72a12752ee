#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/route.h"

namespace jaxmoe::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kPairsPerBlock = 4096;

// The local expert of a pair, or -1.
__device__ __forceinline__ int local_expert(const int32_t* ids, int pair, int offset, int experts) {
  // Ids near the ends of int32 must not wrap around into the range.
  const int64_t local = int64_t{ids[pair]} - offset;
  return local >= 0 && local < experts ? static_cast<int>(local) : -1;
}

// How often each expert stands in each block's pairs: counts[block][expert].
__global__ void __launch_bounds__(kThreads) count_kernel(SortArgs args) {
  extern __shared__ int count[];
  for (int e = threadIdx.x; e < args.experts; e += kThreads) count[e] = 0;
  __syncthreads();
  grid_launch_dependents();
  grid_wait();
  const int offset = *args.expert_offset;
  const int begin = blockIdx.x * kPairsPerBlock;
  const int end = min(begin + kPairsPerBlock, args.pairs);
  for (int i = begin + threadIdx.x; i < end; i += kThreads) {
    const int e = local_expert(args.expert_ids, i, offset, args.experts);
    if (e >= 0) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < args.experts; e += kThreads) {
    args.counts[blockIdx.x * args.experts + e] = count[e];
  }
}

// Places each block's pairs. Each warp has a contiguous part of them: a pair's position is the
// first of its expert, plus the pairs of that expert in earlier blocks, earlier warps and earlier
// lanes.
__global__ void __launch_bounds__(kThreads) place_kernel(SortArgs args) {
  extern __shared__ int next[];  // [kWarps][experts]: next position of each warp and expert
  __shared__ int warp_sum[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int experts = args.experts;
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) next[i] = 0;
  __syncthreads();
  grid_launch_dependents();
  grid_wait();
  const int offset = *args.expert_offset;
  const int block_begin = blockIdx.x * kPairsPerBlock;
  const int block_pairs = min(kPairsPerBlock, args.pairs - block_begin);
  const int per_warp = (block_pairs + kThreads - 1) / kThreads * 32;
  const int begin = block_begin + warp * per_warp;
  const int end = min(begin + per_warp, block_begin + block_pairs);

  for (int i = begin; i < end; i += 32) {
    const int e = i + lane < end ? local_expert(args.expert_ids, i + lane, offset, experts) : -1;
    const unsigned same = __match_any_sync(~0u, e);
    if (e >= 0 && __ffs(same) - 1 == lane) next[warp * experts + e] += __popc(same);
    __syncwarp();
  }
  __syncthreads();

  // Exclusive sums: over the experts for `first`, over blocks and warps inside an expert.
  int carry = 0;
  for (int base = 0; base < experts; base += kThreads) {
    const int e = base + threadIdx.x;
    int total = 0, before = 0;
    if (e < experts) {
      if (gridDim.x == 1) {
        for (int w = 0; w < kWarps; ++w) total += next[w * experts + e];
      } else {
        for (int b = 0; b < static_cast<int>(gridDim.x); ++b) {
          const int n = args.counts[b * experts + e];
          total += n;
          if (b < static_cast<int>(blockIdx.x)) before += n;
        }
      }
    }
    int sum = total;
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    int earlier = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) earlier += warp_sum[w];
      all += warp_sum[w];
    }
    const int first = carry + earlier + sum - total;
    carry += all;
    if (e < experts) {
      int position = first + before;
      for (int w = 0; w < kWarps; ++w) {
        const int n = next[w * experts + e];
        next[w * experts + e] = position;
        position += n;
      }
      if (blockIdx.x == 0) args.offsets[e] = first;
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) args.offsets[experts] = carry;

  for (int i = begin; i < end; i += 32) {
    const int pair = i + lane;
    const int e = pair < end ? local_expert(args.expert_ids, pair, offset, experts) : -1;
    const unsigned same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0) {
      const int position = next[warp * experts + e] + rank;
      args.pair_of[position] = pair;
      args.token_of[position] = pair / args.top_k;
      args.position_of[pair] = position;
    } else if (pair < end) {
      args.position_of[pair] = -1;
    }
    __syncwarp();
    if (e >= 0 && rank == 0) next[warp * experts + e] += __popc(same);
    __syncwarp();
  }
}

__global__ void __launch_bounds__(32) group_kernel(GroupArgs args) {
  grid_launch_dependents();
  grid_wait();
  // The rows before each group, in one warp; sizes below zero count as zero, and no group reaches
  // past the last row. 64-bit sums: sizes may be anything.
  const int64_t offset = *args.group_offset;
  int64_t carry = 0;
  for (int base = 0; base <= args.groups; base += 32) {
    const int group = base + threadIdx.x;
    const int64_t size = group < args.groups ? max(args.group_sizes[group], 0) : 0;
    int64_t sum = size;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t other = __shfl_up_sync(~0u, sum, d);
      if (static_cast<int>(threadIdx.x) >= d) sum += other;
    }
    const int before = static_cast<int>(min(carry + sum - size, int64_t{args.rows}));
    if (group <= args.groups) {
      // offsets[e] belongs to group offset + e; those before the first or past the last are empty.
      const int64_t e = group - offset;
      if (e >= 0 && e <= args.experts) args.offsets[e] = before;
      if (group == 0) {
        for (int64_t i = 0; i < min(e, int64_t{args.experts} + 1); ++i) args.offsets[i] = before;
      }
      if (group == args.groups) {
        for (int64_t i = max(e + 1, int64_t{0}); i <= args.experts; ++i) args.offsets[i] = before;
      }
    }
    carry += __shfl_sync(~0u, sum, 31);
  }
}

__global__ void __launch_bounds__(256)
    gather_kernel(const uint4* x, const int32_t* position_of, int tokens, int top_k, int chunks,
                  uint4* out) {
  grid_launch_dependents();
  grid_wait();
  for (int token = blockIdx.y; token < tokens; token += gridDim.y) {
    const int32_t* positions = position_of + int64_t{token} * top_k;
    for (int chunk = blockIdx.x * blockDim.x + threadIdx.x; chunk < chunks;
         chunk += gridDim.x * blockDim.x) {
      const uint4 v = x[int64_t{token} * chunks + chunk];
      for (int j = 0; j < top_k; ++j) {
        const int position = positions[j];
        if (position >= 0) out[int64_t{position} * chunks + chunk] = v;
      }
    }
  }
}

__global__ void clear_kernel(const int32_t* offsets, int experts, uint4* out, int rows,
                             int chunks) {
  grid_launch_dependents();
  grid_wait();
  const int begin = offsets[0], end = offsets[experts];
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    if (row >= begin && row < end) continue;
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
      out[int64_t{row} * chunks + i] = make_uint4(0, 0, 0, 0);
    }
  }
}

// Eight columns a thread.
template <class T>
__global__ void __launch_bounds__(256) combine_kernel(CombineArgs args) {
  grid_launch_dependents();
  grid_wait();
  const int chunks = args.hidden / 8;
  const int offset = *args.expert_offset;
  const auto* y = static_cast<const uint4*>(args.y);
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       at < int64_t{args.tokens} * chunks; at += int64_t{gridDim.x} * blockDim.x) {
    const int token = static_cast<int>(at / chunks), chunk = static_cast<int>(at % chunks);
    float sum[8] = {};
    constexpr int kAtOnce = 4;  // loads in flight
    for (int first = 0; first < args.top_k; first += kAtOnce) {
      uint4 v[kAtOnce];
      float weight[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int pair = token * args.top_k + first + j;
        v[j] = make_uint4(0, 0, 0, 0);  // nothing is added for a pair of another shard
        weight[j] = 0.0f;
        if (first + j < args.top_k &&
            local_expert(args.expert_ids, pair, offset, args.experts) >= 0) {
          v[j] = y[int64_t{pair} * chunks + chunk];
          weight[j] = args.weights ? args.weights[pair] : 1.0f;
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t words[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[2 * i] += weight[j] * Pair<T>::low(words[i]);
          sum[2 * i + 1] += weight[j] * Pair<T>::high(words[i]);
        }
      }
    }
    uint4 out;
    out.x = Pair<T>::make(sum[0], sum[1]);
    out.y = Pair<T>::make(sum[2], sum[3]);
    out.z = Pair<T>::make(sum[4], sum[5]);
    out.w = Pair<T>::make(sum[6], sum[7]);
    static_cast<uint4*>(args.out)[at] = out;
  }
}

int sort_blocks(int64_t pairs) {
  return static_cast<int>((pairs + kPairsPerBlock - 1) / kPairsPerBlock);
}

}  // namespace

int64_t sort_count_elements(int64_t pairs, int64_t experts) { return sort_blocks(pairs) * experts; }

cudaError_t sort_pairs(const SortArgs& args, cudaStream_t stream) {
  const int blocks = sort_blocks(args.pairs);
  if (blocks > 1) {
    const cudaError_t error =
        launch(count_kernel, dim3(blocks), kThreads, args.experts * 4, stream, args);
    if (error != cudaSuccess) return error;
  }
  const int smem = kWarps * args.experts * 4;
  // The most, not `smem`: the limit is the function's, and other threads launch it too.
  const cudaError_t error = cudaFuncSetAttribute(
      place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kWarps * kMaxExperts * 4);
  if (error != cudaSuccess) return error;
  return launch(place_kernel, dim3(blocks), kThreads, smem, stream, args);
}

cudaError_t gather_rows(const void* x, const int32_t* position_of, int tokens, int top_k,
                        int64_t row_bytes, void* out, cudaStream_t stream) {
  const int chunks = static_cast<int>(row_bytes / 16);
  return launch(gather_kernel, dim3((chunks + 255) / 256, min(tokens, 65535)), 256, 0, stream,
                static_cast<const uint4*>(x), position_of, tokens, top_k, chunks,
                static_cast<uint4*>(out));
}

cudaError_t group_offsets(const GroupArgs& args, cudaStream_t stream) {
  return launch(group_kernel, dim3(1), 32, 0, stream, args);
}

cudaError_t clear_other_rows(const int32_t* offsets, int experts, void* out, int rows,
                             int64_t row_bytes, cudaStream_t stream) {
  return launch(clear_kernel, dim3(min(rows, 1024)), 128, 0, stream, offsets, experts,
                static_cast<uint4*>(out), rows, static_cast<int>(row_bytes / 16));
}

cudaError_t combine(const CombineArgs& args, cudaStream_t stream) {
  const int64_t threads = int64_t{args.tokens} * (args.hidden / 8);
  const dim3 blocks(static_cast<unsigned>(min((threads + 255) / 256, int64_t{1} << 20)));
  return launch(args.fp16 ? combine_kernel<__half> : combine_kernel<__nv_bfloat16>, blocks, 256, 0,
                stream, args);
}

}  // namespace jaxmoe::cuda
