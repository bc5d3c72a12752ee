#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/route.h"

namespace jaxmoe::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
// Up to kSelfCounted pairs, each of many small blocks counts all pairs itself: one kernel. Beyond,
// fewer large blocks read what a kernel before has counted.
constexpr int kSelfCounted = 32768;
constexpr int pairs_per_lane(bool counted) { return counted ? 8 : 2; }
constexpr int pairs_per_block(bool counted) { return kThreads * pairs_per_lane(counted); }

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
  const int begin = blockIdx.x * pairs_per_block(true);
  const int end = min(begin + pairs_per_block(true), args.pairs);
  for (int i = begin + threadIdx.x; i < end; i += kThreads) {
    const int e = local_expert(args.expert_ids, i, offset, args.experts);
    if (e >= 0) atomicAdd(&count[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < args.experts; e += kThreads) {
    args.counts[blockIdx.x * args.experts + e] = count[e];
  }
}

// Lanes of the warp with the same key, of `bits` bits. (match.any takes far longer.)
__device__ __forceinline__ unsigned lanes_with(int key, int bits) {
  unsigned same = ~0u;
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = key >> bit & 1;
    const unsigned with = __ballot_sync(~0u, set);
    same &= set ? with : ~with;
  }
  return same;
}

// Places each block's pairs. Each warp has a contiguous part of them: a pair's position is the
// first of its expert, plus the pairs of that expert in earlier blocks, earlier warps and earlier
// lanes.
template <bool kCounted>
__global__ void __launch_bounds__(kThreads) place_kernel(SortArgs args) {
  constexpr int kPairsPerLane = pairs_per_lane(kCounted);
  constexpr int kPairsPerBlock = pairs_per_block(kCounted);
  extern __shared__ int next[];  // [kWarps][experts]: pairs, then first position of each warp
  __shared__ int warp_sum[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int experts = args.experts;
  // [experts]: pairs of the blocks before this one and of those after it.
  int* const earlier_blocks = next + kWarps * experts;
  int* const later_blocks = earlier_blocks + experts;
  for (int i = threadIdx.x; i < (kWarps + 2) * experts; i += kThreads) next[i] = 0;
  __syncthreads();
  grid_launch_dependents();
  grid_wait();
  const int offset = *args.expert_offset;
  const int block_begin = blockIdx.x * kPairsPerBlock;
  const int block_pairs = min(kPairsPerBlock, args.pairs - block_begin);
  const int per_warp = (block_pairs + kThreads - 1) / kThreads * 32;
  const int begin = block_begin + warp * per_warp + lane;
  const int end = min(begin - lane + per_warp, block_begin + block_pairs);
  const int bits = 32 - __clz(experts);  // `experts` itself stands for none

  int expert[kPairsPerLane], rank[kPairsPerLane];
#pragma unroll
  for (int i = 0; i < kPairsPerLane; ++i) {
    const int pair = begin + i * 32;
    const int e = pair < end ? local_expert(args.expert_ids, pair, offset, experts) : -1;
    expert[i] = e < 0 ? experts : e;
  }
  if constexpr (!kCounted) {
#pragma unroll 4
    for (int pair = threadIdx.x; pair < args.pairs; pair += kThreads) {
      const int e = local_expert(args.expert_ids, pair, offset, experts);
      if (e < 0 || (pair >= block_begin && pair < block_begin + block_pairs)) continue;
      atomicAdd((pair < block_begin ? earlier_blocks : later_blocks) + e, 1);
    }
  }
#pragma unroll
  for (int i = 0; i < kPairsPerLane; ++i) {
    if (i * 32 >= per_warp) break;
    const unsigned same = lanes_with(expert[i], bits), earlier = same & ((1u << lane) - 1);
    const bool counts = expert[i] < experts;
    int* count = &next[warp * experts + (counts ? expert[i] : 0)];
    const int before = *count;
    __syncwarp();
    if (counts && earlier == 0) *count = before + __popc(same);
    __syncwarp();
    rank[i] = before + __popc(earlier);
  }
  __syncthreads();

  // Exclusive sums: over the experts for `first`, over blocks and warps inside an expert.
  int carry = 0;
  for (int base = 0; base < experts; base += kThreads) {
    const int e = base + threadIdx.x;
    int total = 0, before = 0;
    if (e < experts) {
      if constexpr (!kCounted) {
        before = earlier_blocks[e];
        total = before + later_blocks[e];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += next[w * experts + e];
      } else {
#pragma unroll 8
        for (int b = 0; b < static_cast<int>(gridDim.x); ++b) {
          const int n = args.counts[b * experts + e];
          total += n;
          before += b < static_cast<int>(blockIdx.x) ? n : 0;
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
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      earlier += w < warp ? warp_sum[w] : 0;
      all += warp_sum[w];
    }
    const int first = carry + earlier + sum - total;
    carry += all;
    if (e < experts) {
      int position = first + before;
#pragma unroll
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

#pragma unroll
  for (int i = 0; i < kPairsPerLane; ++i) {
    const int pair = begin + i * 32;
    if (pair >= end) break;
    int position = -1;
    if (expert[i] < experts) {
      position = next[warp * experts + expert[i]] + rank[i];
      args.pair_of[position] = pair;
      args.token_of[position] = pair / args.top_k;
    }
    args.position_of[pair] = position;
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

bool counted(int64_t pairs) { return pairs > kSelfCounted; }
int sort_blocks(int64_t pairs) {
  const int block = pairs_per_block(counted(pairs));
  return static_cast<int>((pairs + block - 1) / block);
}

}  // namespace

int64_t sort_count_elements(int64_t pairs, int64_t experts) {
  return counted(pairs) ? sort_blocks(pairs) * experts : 0;
}

cudaError_t sort_pairs(const SortArgs& args, cudaStream_t stream) {
  const int blocks = sort_blocks(args.pairs);
  const auto place = counted(args.pairs) ? place_kernel<true> : place_kernel<false>;
  if (counted(args.pairs)) {
    const cudaError_t error =
        launch(count_kernel, dim3(blocks), kThreads, args.experts * 4, stream, args);
    if (error != cudaSuccess) return error;
  }
  constexpr int kTables = kWarps + 2;
  // The most, not what this call needs: the limit is the function's, and other threads launch it
  // too.
  const cudaError_t error = cudaFuncSetAttribute(place, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 kTables * kMaxExperts * 4);
  if (error != cudaSuccess) return error;
  return launch(place, dim3(blocks), kThreads, kTables * args.experts * 4, stream, args);
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
