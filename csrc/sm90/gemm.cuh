// The grouped product with wgmma, for more than a few tokens per expert.
//
//   out[token, row] = epilogue(sum_k W[expert of token][row, k] * x[token, k])
//
// for x of 16 bits, or of e4m3 with a scale for each token. Computed as W * x^T: the weights are
// dequantised into registers and are wgmma's A operand, a tile of up to kN tokens of one expert is
// its B operand in shared memory. A cluster of kCluster blocks of threads holds a tile of kN tokens
// by kCluster * kStrips strips of 64 rows at a time, and takes every n-th tile. Its blocks have the
// tokens in common: each fetches a part of them for all (multicast). One producer warp keeps the
// ring of stages full, across tiles: tokens by the tensor map of the sorted rows, weights by bulk
// copies of whole blocks. A scout warp is a tile or two ahead and has ready what the end of a tile
// takes, so that the warpgroups that multiply go from tile to tile without a wait for memory.
#ifndef JAXMOE_CSRC_SM90_GEMM_CUH_
#define JAXMOE_CSRC_SM90_GEMM_CUH_

#include "cuda/dequantize.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gemm.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"
#include "sm90/ring.cuh"
#include "sm90/tactic.cuh"
#include "sm90/wgmma.cuh"

namespace jaxmoe::sm90 {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kBoxRows = 32;         // rows of tokens that one copy fetches,
inline constexpr int kSmallBoxRows = 8;     // in tiles of few tokens
inline constexpr int kSmallBoxTokens = 24;  // at most
inline constexpr int kRowBytes = 128;       // of a block of K: 64 numbers of 16 bits or 128 of e4m3

inline constexpr int kBriefingSlots = 2;

// What the scout tells of a tile.
template <int kN>
struct alignas(16) Briefing {
  int expert, first_strip, tokens;  // tokens: -1 after the last tile
  int padding;
  int target[kN];    // row of `out` of each token
  float weight[kN];  // what its sums are multiplied by
};

template <class T_, Format kFormat_, Epilogue kEpilogue_, int kN_, int kWarpgroups_,
          int kStripsPerWarpgroup_, int kDepth_, int kStages_, int kCluster_, int kBlocksPerSm_ = 1,
          int kUnusedRegisters_ = 0>
struct GemmConfig {
  using T = T_;  // of `out`, and of x unless that is e4m3
  static constexpr Format kFormat = kFormat_;
  static constexpr bool kFp8 = is_fp8(kFormat);
  using Operand = std::conditional_t<kFp8, E4m3, T>;
  static constexpr int kBlockK = block_k(kFormat);
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr int kN = kN_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kStripsPerWarpgroup = kStripsPerWarpgroup_;
  static constexpr int kDepth = kDepth_;  // blocks of K in a stage
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;

  static constexpr bool kGated = is_gated(kEpilogue);
  static constexpr int kConsumers = kWarpgroups * kWarpgroupThreads;
  static constexpr int kThreads = kConsumers + kWarpgroupThreads;
  // Registers a thread: few for the producer's warpgroup, of which two warps work, the rest for
  // sums. Some may be left unused: with fewer of them ptxas moves less across the products.
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = (65536 / kBlocksPerSm / kThreads / 8 * 8 * kThreads -
                                             kProducerRegisters * kWarpgroupThreads) /
                                                kConsumers / 8 * 8 -
                                            kUnusedRegisters_;

  static constexpr int kStrips = kWarpgroups * kStripsPerWarpgroup;
  static constexpr int kStripOutputs = kGated ? kStripRows / 2 : kStripRows;
  static constexpr int kWarpgroupOutputs = kStripsPerWarpgroup * kStripOutputs;

  static constexpr int kSizeStep = kN / 8;           // tiles of tokens are cut to multiples of this
  static constexpr int kTileBytes = kN * kRowBytes;  // one block of K of the tokens
  static constexpr int kTokenBytes = kDepth * kTileBytes;
  static constexpr int kStripBytes = kDepth * block_bytes(kFormat);
  static constexpr int kWeightBytes = kStrips * kStripBytes;
  static constexpr int kChunk = 32;  // tokens that the epilogue transposes at once
  static constexpr int kPitch = kWarpgroupOutputs * 2 + 16;
  // Offsets in shared memory.
  static constexpr int kTokens = 0;
  static constexpr int kWeights = kTokens + kStages * kTokenBytes;
  static constexpr int kTransposed = kWeights + kStages * kWeightBytes;
  static constexpr int kBriefings = kTransposed + kWarpgroups * kChunk * kPitch;
  static constexpr int kBarriers = kBriefings + kBriefingSlots * sizeof(Briefing<kN>);
  static constexpr int kTables =
      kBarriers + (2 * (kStages + kBriefingSlots) + (kCluster > 1 ? kStages : 0)) * 8;
  static constexpr int smem_bytes(int experts) {
    return 1024 + kTables + TileTable::bytes(experts);
  }
};

template <class C>
struct GemmTile {
  int expert, first_strip, begin, tokens;  // begin: position of the first token among the sorted

  __device__ GemmTile(const TileTable& table, int tile, int row_tiles) {
    const auto found = table.find<C::kN>(tile, row_tiles);
    expert = found.expert;
    first_strip = found.row_tile * C::kCluster * C::kStrips;
    if constexpr (C::kCluster > 1) first_strip += cuda::cluster_rank() * C::kStrips;
    // The tiles of an expert are as even as can be: a small one takes nearly as long as a full one.
    const int first = table.offset(expert), all = table.offset(expert + 1) - first;
    const int tiles = divide_up(all, C::kN);
    const int size = divide_up(divide_up(all, tiles), C::kSizeStep) * C::kSizeStep;
    begin = first + min(found.token_tile * size, all);
    tokens = min(size, first + all - begin);
  }
};

template <class C>
__device__ __forceinline__ void produce(const GemmArgs& args, const CUtensorMap* rows,
                                        const CUtensorMap* small_rows, const TileTable& table,
                                        uint32_t smem, const Ring& ring, int row_tiles) {
  constexpr int kBoxes = std::max(C::kN / kBoxRows, kSmallBoxTokens / kSmallBoxRows);
  constexpr int kCopies = C::kDepth * kBoxes;
  static_assert(C::kStrips <= 32 && kCopies <= 32);
  const int lane = threadIdx.x % 32;
  const uint32_t rank = C::kCluster > 1 ? cuda::cluster_rank() : 0;
  const int blocks = num_blocks(args.k, C::kFormat);
  const int strips = num_strips(args.outputs, C::kGated);
  const int64_t matrix = matrix_bytes(C::kFormat, args.outputs, args.k, C::kGated);
  Cursor<C::kStages> at;
  for (int tile = blockIdx.x / C::kCluster; tile < table.total(); tile += gridDim.x / C::kCluster) {
    const GemmTile<C> t(table, tile, row_tiles);
    const int live_strips = max(0, min(C::kStrips, strips - t.first_strip));
    const bool small = C::kCluster == 1 && t.tokens <= kSmallBoxTokens;
    const int box_rows = small ? kSmallBoxRows : kBoxRows;
    const CUtensorMap* map = small ? small_rows : rows;
    const int boxes = divide_up(t.tokens, box_rows);
    const uint8_t* weights = args.weights + t.expert * matrix +
                             int64_t{t.first_strip + lane} * strip_bytes(C::kFormat, args.k);
    for (int block = 0; block < blocks; block += C::kDepth) {
      const int live = min(C::kDepth, blocks - block);
      const uint32_t bytes = live * block_bytes(C::kFormat);
      uint64_t* full = &ring.full[at.slot];
      cuda::barrier_wait(&ring.empty[at.slot], at.phase ^ 1);
      if constexpr (C::kCluster > 1) {  // and the other block's slot, which this one writes to
        cuda::barrier_wait(&ring.empty_there[at.slot], at.phase ^ 1);
      }
      if (lane == 0) {
        cuda::barrier_arrive_expect(full,
                                    live_strips * bytes + live * boxes * box_rows * kRowBytes);
      }
      __syncwarp();
      if (lane < live_strips) {
        cuda::bulk_load(smem + C::kWeights + at.slot * C::kWeightBytes + lane * C::kStripBytes,
                        weights + int64_t{block} * block_bytes(C::kFormat), bytes, full);
      }
      if (lane < kCopies) {
        const int box = lane % kBoxes, d = lane / kBoxes;
        const uint32_t to = smem + C::kTokens + at.slot * C::kTokenBytes + d * C::kTileBytes +
                            box * box_rows * kRowBytes;
        const int k = (block + d) * C::kBlockK, row = t.begin + box * box_rows;
        if (box < boxes && d < live) {
          if constexpr (C::kCluster == 1) {
            cuda::tensor_load(to, map, k, row, full);
          } else if (box % C::kCluster == rank) {
            cuda::tensor_load_multicast(to, rows, k, row, full, (1 << C::kCluster) - 1);
          }
        }
      }
      at.advance();
    }
  }
}

// Briefs the warpgroups on the block's tiles, in order.
template <class C>
__device__ __forceinline__ void scout(const GemmArgs& args, const TileTable& table,
                                      Briefing<C::kN>* briefings, const Ring& ring, int row_tiles) {
  const int lane = threadIdx.x % 32;
  Cursor<kBriefingSlots> at;
  for (int tile = blockIdx.x / C::kCluster;; tile += gridDim.x / C::kCluster) {
    Briefing<C::kN>& b = briefings[at.slot];
    cuda::barrier_wait(&ring.empty[at.slot], at.phase ^ 1);
    if (tile >= table.total()) {
      if (lane == 0) b.tokens = -1;
      cuda::barrier_arrive(&ring.full[at.slot]);
      break;
    }
    const GemmTile<C> t(table, tile, row_tiles);
    if (lane == 0) b.expert = t.expert, b.first_strip = t.first_strip, b.tokens = t.tokens;
    for (int i = lane; i < t.tokens; i += 32) {
      const int position = t.begin + i;
      const int source = args.source ? args.source[position] : position;
      float weight = args.row_weight ? args.row_weight[source] : 1.0f;
      if constexpr (C::kFp8) weight *= args.row_scale[source];
      b.target[i] = args.target ? args.target[position] : position;
      b.weight[i] = weight;
    }
    const int first = t.first_strip * C::kStripOutputs;
    Finish<typename C::T, C::kFormat, C::kEpilogue>::prefetch(
        args, t.expert, first, min(C::kStrips * C::kStripOutputs, args.outputs - first), lane);
    cuda::barrier_arrive(&ring.full[at.slot]);
    at.advance();
  }
}

// This thread is through with a stage. Every thread says so for itself, since nothing else holds
// the four warps of a warpgroup together; one lane for its warp would not be faster, and a
// __syncwarp before it makes ptxas serialise every wgmma.
__device__ __forceinline__ void release(const Ring& ring, int slot) {
  cuda::barrier_arrive(&ring.empty[slot]);
}

// This warp is through with the tokens of a stage, which the cluster's other block writes too. Not
// beside the above: two arrivals in one place make ptxas serialise every wgmma.
template <class C>
__device__ __forceinline__ void release_there(const Ring& ring, int slot) {
  static_assert(C::kCluster <= 2);
  if constexpr (C::kCluster > 1) {
    if (threadIdx.x % 32 == 0) {
      cuda::barrier_arrive_at(&ring.empty_there[slot], cuda::cluster_rank() ^ 1);
    }
  }
}

// The sums of one tile over K, with kTokens >= the tile's tokens.
template <class C, int kTokens, int kSize>
__device__ __forceinline__ void multiply(float (&sum)[C::kStripsPerWarpgroup][kSize], int blocks,
                                         uint32_t smem, const Ring& ring, int warpgroup,
                                         Cursor<C::kStages>& at) {
  using T = typename C::T;
  constexpr int kStrips = C::kStripsPerWarpgroup;
  const int thread = threadIdx.x % kWarpgroupThreads;
  const uint32_t weights = smem + C::kWeights + warpgroup * kStrips * C::kStripBytes;
  const uint32_t elements = weights + thread * 16;
  const uint32_t scales = weights + element_bytes(C::kFormat) +
                          (thread / 32 * 8 + thread % 32 / 4) * 2 * scales_per_row(C::kFormat);
  uint32_t a[2][kStrips][4];
  int previous = 0;
  for (int first = 0; first < blocks; first += C::kDepth) {
    cuda::barrier_wait(&ring.full[at.slot], at.phase);
#pragma unroll
    for (int d = 0; d < C::kDepth; ++d) {
      if (d > 0 && first + d >= blocks) break;
      PackedBlock<T, C::kFormat> packed[kStrips];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const uint32_t offset =
            at.slot * C::kWeightBytes + s * C::kStripBytes + d * block_bytes(C::kFormat);
        packed[s].load(elements + offset, scales + offset);
      }
      const uint32_t tokens =
          swizzled_tile(smem + C::kTokens + at.slot * C::kTokenBytes + d * C::kTileBytes);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int s = 0; s < kStrips; ++s) packed[s].fragment(step, a[step & 1][s]);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          Wgmma<typename C::Operand, kTokens>::run(sum[s], a[step & 1][s], tokens + step * 2,
                                                   d + step > 0 || first > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();
        // The previous stage's last step is over: its slot can be filled again.
        if (d == 0 && step == 0 && first > 0) release(ring, previous);
        if (d == 0 && step == 1 && first > 0) release_there<C>(ring, previous);
      }
    }
    previous = at.slot;
    at.advance();
  }
  wgmma_wait<0>();
  release(ring, previous);
  release_there<C>(ring, previous);
}

// Bias, activation, rounding; then through shared memory, since a lane holds a column and a row of
// `out` must be written whole.
template <class C, int kSize>
__device__ __forceinline__ void finish(const GemmArgs& args, const Briefing<C::kN>& tile,
                                       float (&sum)[C::kStripsPerWarpgroup][kSize], uint32_t smem,
                                       int warpgroup) {
  using T = typename C::T;
  constexpr int kStrips = C::kStripsPerWarpgroup;
  constexpr int kGroups = C::kChunk / 8;
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warp = thread / 32, lane = thread % 32;
  const int matrix = lane / 8, row = lane % 8;
  const int barrier = 1 + warpgroup;
  const int first_output = (tile.first_strip + warpgroup * kStrips) * C::kStripOutputs;
  const bool weighted = C::kFp8 || args.row_weight;
  const uint32_t transposed = smem + C::kTransposed + warpgroup * C::kChunk * C::kPitch;
  Finish<T, C::kFormat, C::kEpilogue> values[kStrips];
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
    values[s] = {args, tile.expert,
                 first_output + s * C::kStripOutputs + warp * C::kStripOutputs / 4, lane / 4};
  }

#pragma unroll
  for (int first = 0; first < C::kN; first += C::kChunk) {
    if (first >= tile.tokens) break;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      uint32_t fragment[kGroups][2];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        float2 w = {1.0f, 1.0f};
        if (weighted) {
          w = *reinterpret_cast<const float2*>(tile.weight + first + group * 8 + lane % 4 * 2);
        }
        values[s](&sum[s][(first / 8 + group) * 4], w, fragment[group]);
      }
      const uint32_t to = transposed + s * C::kStripOutputs * 2;
      if constexpr (C::kGated) {
        cuda::store_matrices_transposed(to + (matrix * 8 + row) * C::kPitch + warp * 16,
                                        fragment[0][0], fragment[1][0], fragment[2][0],
                                        fragment[3][0]);
      } else {
#pragma unroll
        for (int group = 0; group < kGroups; group += 2) {
          cuda::store_matrices_transposed(
              to + ((group + matrix / 2) * 8 + row) * C::kPitch + warp * 32 + matrix % 2 * 16,
              fragment[group][0], fragment[group][1], fragment[group + 1][0],
              fragment[group + 1][1]);
        }
      }
    }
    cuda::named_barrier(barrier, kWarpgroupThreads);
    constexpr int kLanesPerRow = C::kWarpgroupOutputs / 8;
    constexpr int kRowsPerPass = kWarpgroupThreads / kLanesPerRow;
    const int column = first_output + thread % kLanesPerRow * 8;
#pragma unroll
    for (int r = thread / kLanesPerRow; r < C::kChunk; r += kRowsPerPass) {
      if (first + r < tile.tokens && column < args.outputs) {
        auto* to =
            static_cast<T*>(args.out) + int64_t{tile.target[first + r]} * args.outputs + column;
        *reinterpret_cast<uint4*>(to) =
            cuda::load_shared_16(transposed + r * C::kPitch + thread % kLanesPerRow * 16);
      }
    }
    cuda::named_barrier(barrier, kWarpgroupThreads);
  }
}

// Calls run(Int<n>) for the smallest size n that is at least `tokens`: multiples of kN / 8 in the
// upper half, of kN / 4 below. (Two strips of 128 with yet more sizes: ptxas finds no registers to
// keep the products asynchronous.)
template <int kN, int kSize = kN, class Run>
__device__ __forceinline__ void with_size(int tokens, Run run) {
  constexpr int kLess = kSize - (kSize > kN / 2 ? kN / 8 : kN / 4);
  if constexpr (kLess > 0) {
    if (tokens <= kLess) return with_size<kN, kLess>(tokens, run);
  }
  run(Int<kSize>());
}

template <class C>
__device__ __forceinline__ void consume(const GemmArgs& args, uint32_t smem,
                                        const Briefing<C::kN>* briefings, const Ring& ring,
                                        const Ring& briefing_ring, int warpgroup) {
  const int blocks = num_blocks(args.k, C::kFormat);
  const int strips = num_strips(args.outputs, C::kGated);
  Cursor<C::kStages> at;
  Cursor<kBriefingSlots> next;
  for (;; next.advance()) {
    cuda::barrier_wait(&briefing_ring.full[next.slot], next.phase);
    const Briefing<C::kN>& tile = briefings[next.slot];
    if (tile.tokens < 0) break;
    if (tile.first_strip + warpgroup * C::kStripsPerWarpgroup < strips) {
      float sum[C::kStripsPerWarpgroup][C::kN / 2];
      // An expert's last tile is rarely full: the smallest instruction that holds it will do.
      with_size<C::kN>(tile.tokens, [&](auto size) {
        multiply<C, decltype(size)::value>(sum, blocks, smem, ring, warpgroup, at);
      });
      finish<C>(args, tile, sum, smem, warpgroup);
    } else {  // past the last row
      for (int block = 0; block < blocks; block += C::kDepth) {
        cuda::barrier_wait(&ring.full[at.slot], at.phase);
        release(ring, at.slot);
        release_there<C>(ring, at.slot);
        at.advance();
      }
    }
    cuda::barrier_arrive(&briefing_ring.empty[next.slot]);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    gemm_kernel(const __grid_constant__ GemmArgs args, const __grid_constant__ CUtensorMap rows,
                const __grid_constant__ CUtensorMap small_rows) {
  extern __shared__ uint8_t raw[];
  const uint32_t base = cuda::smem_address(raw);
  const uint32_t smem = (base + 1023) & ~1023u;
  uint8_t* pointer = raw + (smem - base);
  auto* barriers = reinterpret_cast<uint64_t*>(pointer + C::kBarriers);
  const Ring briefing_ring{barriers, barriers + kBriefingSlots};
  barriers += 2 * kBriefingSlots;
  const Ring ring{barriers, barriers + C::kStages, barriers + 2 * C::kStages};
  auto* briefings = reinterpret_cast<Briefing<C::kN>*>(pointer + C::kBriefings);
  const int row_tiles = divide_up(num_strips(args.outputs, C::kGated), C::kCluster * C::kStrips);
  if (threadIdx.x == 0) {
    cuda::prefetch_map(&rows);
    cuda::prefetch_map(&small_rows);
    for (int i = 0; i < C::kStages; ++i) {
      cuda::barrier_init(&ring.full[i], 1);
      cuda::barrier_init(&ring.empty[i], C::kConsumers);
      if constexpr (C::kCluster > 1) cuda::barrier_init(&ring.empty_there[i], C::kConsumers / 32);
    }
    for (int i = 0; i < kBriefingSlots; ++i) {
      cuda::barrier_init(&briefing_ring.full[i], 32);
      cuda::barrier_init(&briefing_ring.empty[i], C::kConsumers);
    }
    cuda::fence_barrier_init();
  }
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  TileTable table(pointer + C::kTables, args.experts);
  table.fill<C::kN>(args.offsets, row_tiles);
  if constexpr (C::kCluster > 1) cuda::cluster_sync();
  __syncthreads();

  // Uniform over the warp, and the compiler may know it.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / kWarpgroupThreads, 0);
  if (warpgroup == C::kWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = threadIdx.x % kWarpgroupThreads / 32;
    if (warp == 0) produce<C>(args, &rows, &small_rows, table, smem, ring, row_tiles);
    if (warp == 1) scout<C>(args, table, briefings, briefing_ring, row_tiles);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kConsumerRegisters));
    consume<C>(args, smem, briefings, ring, briefing_ring, warpgroup);
  }
  // A block must not leave while others may still write to it.
  if constexpr (C::kCluster > 1) cuda::cluster_sync();
}

struct GemmRun {
  template <class C>
  static cudaError_t run(const GemmArgs& args, const Launch& launch) {
    const int smem = C::smem_bytes(args.experts);
    cudaError_t error = allow_smem<C>(gemm_kernel<C>);
    if (error != cudaSuccess) return error;
    CUtensorMap rows, small_rows;
    const auto type = C::kFp8                        ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                      : launch.dtype == Dtype::kFp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                     : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    error = cuda::make_row_map(args.sorted, args.positions, args.k, kBoxRows, type, &rows);
    if (error != cudaSuccess) return error;
    error =
        cuda::make_row_map(args.sorted, args.positions, args.k, kSmallBoxRows, type, &small_rows);
    if (error != cudaSuccess) return error;
    const int blocks = launch.multiprocessors * C::kBlocksPerSm / C::kCluster * C::kCluster;
    return cuda::launch_clusters(gemm_kernel<C>, C::kCluster, dim3(blocks), C::kThreads, smem,
                                 launch.stream, args, rows, small_rows);
  }
};

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_GEMM_CUH_
