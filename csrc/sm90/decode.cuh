// The grouped product with mma.sync, for few tokens per expert, where reading the weights is all
// that counts. A tile is 16 * kRowWarps rows of one expert's matrix by up to kN tokens. The
// consumer warps share it out: kRowWarps along the rows, kDepthWarps along K, which add their sums
// through shared memory in a fixed order. A stage holds kBlocks blocks of K for each depth warp.
// One producer warp keeps a ring of stages full by bulk copies, across tiles, so that memory never
// waits for the end of a tile; several small blocks of threads per multiprocessor let one multiply
// while another finishes.
#ifndef JAXMOE_CSRC_SM90_DECODE_CUH_
#define JAXMOE_CSRC_SM90_DECODE_CUH_

#include "cuda/dequantize.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gemm.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"
#include "sm90/ring.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {

template <class T_, Format kFormat_, Epilogue kEpilogue_, int kN_, int kRowWarps_, int kDepthWarps_,
          int kBlocks_, int kStages_, int kBlocksPerSm_>
struct DecodeConfig {
  using T = T_;
  static constexpr Format kFormat = kFormat_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr int kN = kN_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kDepthWarps = kDepthWarps_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;

  static constexpr bool kGated = is_gated(kEpilogue);
  static constexpr int kConsumers = kRowWarps * kDepthWarps * 32;
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kParts = 4 / kRowWarps;  // tiles of a strip
  static constexpr int kWarpOutputs = kGated ? 8 : 16;
  static constexpr int kGroups = kN / 8;

  static constexpr int kStageBlocks = kDepthWarps * kBlocks;
  static constexpr int kWarpElements = kElementBytes / 4;
  static constexpr int kWarpScales = scale_bytes(kFormat) / 4;
  static constexpr int kTileBlockBytes = kRowWarps * (kWarpElements + kWarpScales);
  static constexpr int kWeightBytes = kStageBlocks * kTileBlockBytes;
  static constexpr int kTokenPitch = kStageBlocks * kBlockK * 2 + 16;
  static constexpr int kTokenBytes = kN * kTokenPitch;
  static constexpr int kSumBytes = kDepthWarps > 1 ? kConsumers* kGroups * 16 : 0;
  // Offsets in shared memory.
  static constexpr int kWeights = 0;
  static constexpr int kTokens = kWeights + kStages * kWeightBytes;
  static constexpr int kSums = kTokens + kStages * kTokenBytes;
  static constexpr int kBarriers = kSums + 2 * kSumBytes;
  static constexpr int kTables = kBarriers + 2 * kStages * 8;
  static constexpr int smem_bytes(int experts) { return kTables + TileTable::bytes(experts); }
};

template <class C>
__device__ __forceinline__ void decode_produce(const GemmArgs& args, const TileTable& table,
                                               uint32_t smem, const Ring& ring, int row_tiles) {
  const int lane = threadIdx.x % 32;
  const int blocks = num_blocks(args.k);
  const int64_t matrix = matrix_bytes(C::kFormat, args.outputs, args.k, C::kGated);
  Cursor<C::kStages> at;
  for (TileTable::Walk<C::kN> tile(table, row_tiles); !tile.done(); tile.next()) {
    const int strip = tile.row_tile / C::kParts, part = tile.row_tile % C::kParts;
    const int tokens = tile.tokens();
    const uint8_t* weights =
        args.weights + tile.expert * matrix + int64_t{strip} * blocks * block_bytes(C::kFormat);
    const uint8_t* row = nullptr;
    if (lane < tokens) {
      const int r = args.source ? args.source[tile.begin() + lane] : tile.begin() + lane;
      row = static_cast<const uint8_t*>(args.x) + int64_t{r} * args.k * 2;
    }
    for (int block = 0; block < blocks; block += C::kStageBlocks) {
      const int live = min(C::kStageBlocks, blocks - block);
      const int row_bytes = 2 * (min(args.k, (block + live) * kBlockK) - block * kBlockK);
      const uint32_t weights_to = smem + C::kWeights + at.slot * C::kWeightBytes;
      const uint32_t row_to = smem + C::kTokens + at.slot * C::kTokenBytes + lane * C::kTokenPitch;
      cuda::barrier_wait(&ring.empty[at.slot], at.phase ^ 1);
      // The end of K inside a block: zeros, since 0 * (what lay here before) might be NaN.
      if (lane < tokens) {
        for (int to = row_bytes; to < live * kBlockK * 2; to += 16) {
          cuda::store_shared_zero_16(row_to + to);
        }
        if (row_bytes < live * kBlockK * 2)
          cuda::fence_async_proxy();  // a later copy may land here
      }
      __syncwarp();
      if (lane == 0) {
        cuda::barrier_arrive_expect(&ring.full[at.slot],
                                    live * C::kTileBlockBytes + tokens * row_bytes);
      }
      __syncwarp();
      if constexpr (C::kParts == 1) {
        if (lane == 0) {
          cuda::bulk_load(weights_to, weights + int64_t{block} * block_bytes(C::kFormat),
                          live * C::kTileBlockBytes, &ring.full[at.slot]);
        }
      } else {
        static_assert(2 * C::kStageBlocks <= 32);
        if (lane < 2 * live) {
          const int b = lane / 2;
          const bool scales = lane % 2;
          const int per_warp = scales ? C::kWarpScales : C::kWarpElements;
          cuda::bulk_load(
              weights_to + b * C::kTileBlockBytes + (scales ? C::kRowWarps * C::kWarpElements : 0),
              weights + int64_t{block + b} * block_bytes(C::kFormat) +
                  (scales ? kElementBytes : 0) + part * C::kRowWarps * per_warp,
              C::kRowWarps * per_warp, &ring.full[at.slot]);
        }
      }
      if (lane < tokens) {
        cuda::bulk_load(row_to, row + block * kBlockK * 2, row_bytes, &ring.full[at.slot]);
      }
      at.advance();
    }
  }
}

// The tokens of a lane's columns of one group of eight: 2c and 2c + 1.
struct Columns {
  int target[2];
  float weight[2];
};

template <class C>
__device__ __forceinline__ void decode_consume(const GemmArgs& args, const TileTable& table,
                                               uint32_t smem, uint8_t* pointer, const Ring& ring,
                                               int row_tiles) {
  using T = typename C::T;
  constexpr int kScales = scales_per_row(C::kFormat);
  constexpr int kMine = (C::kGroups + C::kDepthWarps - 1) / C::kDepthWarps;  // groups to finish
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int row_warp = warp % C::kRowWarps, depth_warp = warp / C::kRowWarps;
  const int blocks = num_blocks(args.k);
  const uint32_t elements = smem + C::kWeights + depth_warp * C::kTileBlockBytes +
                            row_warp * C::kWarpElements + lane * 16;
  const uint32_t scales = smem + C::kWeights + depth_warp * C::kTileBlockBytes +
                          C::kRowWarps * C::kWarpElements + row_warp * C::kWarpScales +
                          g * 2 * kScales;
  const uint32_t rows =
      smem + C::kTokens + lane % 8 * C::kTokenPitch + depth_warp * kBlockK * 2 + lane / 8 * 16;
  auto* sums = reinterpret_cast<float4*>(pointer + C::kSums);
  Cursor<C::kStages> at;
  int buffer = 0;

  for (TileTable::Walk<C::kN> tile(table, row_tiles); !tile.done(); tile.next()) {
    const int tokens = tile.tokens();
    const int row = (tile.row_tile * C::kRowWarps + row_warp) * C::kWarpOutputs;
    // Read now what the end of the tile needs.
    const Finish<T, C::kFormat, C::kEpilogue> finish(args, tile.expert, row, g);
    Columns columns[kMine];
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = (depth_warp + m * C::kDepthWarps) * 8 + 2 * c + i;
        columns[m].target[i] = -1;
        columns[m].weight[i] = 1.0f;
        if (token < tokens) {
          const int position = tile.begin() + token;
          columns[m].target[i] = args.target ? args.target[position] : position;
          if (args.row_weight) columns[m].weight[i] = args.row_weight[args.source[position]];
        }
      }
    }

    float sum[C::kGroups][4] = {};
    for (int first = 0; first < blocks; first += C::kStageBlocks) {
      cuda::barrier_wait(&ring.full[at.slot], at.phase);
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
        if (first + i * C::kDepthWarps + depth_warp >= blocks) break;
        const uint32_t weights_at =
            at.slot * C::kWeightBytes + i * C::kDepthWarps * C::kTileBlockBytes;
        const uint32_t rows_at = rows + at.slot * C::kTokenBytes + i * C::kDepthWarps * kBlockK * 2;
        PackedBlock<T, C::kFormat> packed;
        packed.load(elements + weights_at, scales + weights_at);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[2][4];
          packed.fragment(2 * half, a[0]);
          packed.fragment(2 * half + 1, a[1]);
#pragma unroll
          for (int group = 0; group < C::kGroups; ++group) {
            if (group == 0 || group * 8 < tokens) {
              uint32_t b[4];
              cuda::load_matrices(rows_at + group * 8 * C::kTokenPitch + half * 64, b);
              cuda::mma_16x8x16<T>(sum[group], a[0], b[0], b[1]);
              cuda::mma_16x8x16<T>(sum[group], a[1], b[2], b[3]);
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) cuda::barrier_arrive(&ring.empty[at.slot]);
      at.advance();
    }

    const float4* parts = nullptr;
    if constexpr (C::kDepthWarps > 1) {
      // Two buffers: a warp that is a tile ahead cannot overwrite what others still add up.
      float4* const to = sums + buffer * (C::kSumBytes / 16) + warp * C::kGroups * 32 + lane;
      buffer ^= 1;
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        if (group * 8 < tokens) {
          to[group * 32] = make_float4(sum[group][0], sum[group][1], sum[group][2], sum[group][3]);
        }
      }
      cuda::named_barrier(1 + row_warp, C::kDepthWarps * 32);
      parts = to - depth_warp * C::kRowWarps * C::kGroups * 32;
    }
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int group = depth_warp + m * C::kDepthWarps;
      if (group * 8 >= tokens) break;
      float total[4];
      if constexpr (C::kDepthWarps > 1) {
        total[0] = total[1] = total[2] = total[3] = 0.0f;
#pragma unroll
        for (int d = 0; d < C::kDepthWarps; ++d) {
          const float4 v = parts[(d * C::kRowWarps * C::kGroups + group) * 32];
          total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] = sum[m][i];
      }
      uint32_t value[2];
      finish(total, {columns[m].weight[0], columns[m].weight[1]}, value);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (columns[m].target[i] < 0) continue;
        auto* out = static_cast<uint16_t*>(args.out) +
                    int64_t{columns[m].target[i]} * args.outputs + row + g;
        if (row + g < args.outputs) *out = static_cast<uint16_t>(value[0] >> (16 * i));
        if (!C::kGated && row + g + 8 < args.outputs) {
          out[8] = static_cast<uint16_t>(value[1] >> (16 * i));
        }
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    decode_kernel(const __grid_constant__ GemmArgs args) {
  extern __shared__ __align__(128) uint8_t pointer[];
  const uint32_t smem = cuda::smem_address(pointer);
  auto* barriers = reinterpret_cast<uint64_t*>(pointer + C::kBarriers);
  const Ring ring{barriers, barriers + C::kStages};
  const int row_tiles = num_strips(args.outputs, C::kGated) * C::kParts;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      cuda::barrier_init(&ring.full[i], 1);
      cuda::barrier_init(&ring.empty[i], C::kConsumers / 32);
    }
    cuda::fence_barrier_init();
  }
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  TileTable table(pointer + C::kTables, args.experts);
  table.fill<C::kN>(args.offsets, row_tiles);
  __syncthreads();
  if (threadIdx.x >= C::kConsumers) {
    decode_produce<C>(args, table, smem, ring, row_tiles);
  } else {
    decode_consume<C>(args, table, smem, pointer, ring, row_tiles);
  }
}

struct DecodeRun {
  template <class C>
  static cudaError_t run(const GemmArgs& args, const Launch& launch) {
    const int smem = C::smem_bytes(args.experts);
    const cudaError_t error = allow_smem<C>(decode_kernel<C>);
    if (error != cudaSuccess) return error;
    return cuda::launch(decode_kernel<C>, dim3(launch.multiprocessors * C::kBlocksPerSm),
                        C::kThreads, smem, launch.stream, args);
  }
};

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_DECODE_CUH_
