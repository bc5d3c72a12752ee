// The grouped product with what every GPU from SM 80 on has: mma.sync m16n8k16 and cp.async.
//
//   out[token, row] = epilogue(sum_k W[expert of token][row, k] * x[token, k])
//
// Computed as W * x^T: the weights are dequantised into registers and are the A operand, up to kN
// tokens of one expert the B operand. A tile is kTileQuarters * 16 rows of one expert's matrix by
// kN tokens; a block of threads has a share of the tiles. Its warps cut a tile along the rows, the
// tokens and K (kRowWarps, kTokenWarps, kDepthWarps); those that share out K add up their sums
// through shared memory in a fixed order.
//
// All threads fill a ring of stages, each with kStageBlocks blocks of K: 16 bytes a copy, packed
// weights as they lie in memory and rows of x wherever they are. The copies run ahead of the
// products by kStages - 1 stages, also across tiles. One __syncthreads a stage orders both: what
// has arrived can be read, and the slot that everyone has read can be filled.
#ifndef JAXMOE_CSRC_SM80_GEMM_CUH_
#define JAXMOE_CSRC_SM80_GEMM_CUH_

#include <algorithm>
#include <new>
#include <type_traits>

#include "cuda/dequantize.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/gemm.h"
#include "cuda/instances.cuh"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"
#include "sm80/tactics.h"

namespace jaxmoe::sm80 {

// The least that a block of threads may have on any of the family's SMs: 86, 89 and 120.
inline constexpr int kSmemLimit = 101376;

// Which tiles a block of threads has. kContiguous: its share of them in the order of memory, for
// kernels that stream the weights once. kInterleaved: every n-th, so that those that are worked on
// at a time have weights and tokens in common, which then are in the L2 cache.
enum class Order { kContiguous, kInterleaved };

template <class T_, Format kFormat_, Epilogue kEpilogue_, Order kOrder_, int kN_, int kRowWarps_,
          int kQuarters_, int kTokenWarps_, int kDepthWarps_, int kBlocks_, int kStages_,
          int kBlocksPerSm_>
struct GemmConfig {
  using T = T_;
  static constexpr Format kFormat = kFormat_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr Order kOrder = kOrder_;
  static constexpr int kN = kN_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kQuarters = kQuarters_;  // of a strip, 16 rows each, for each row warp
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kDepthWarps = kDepthWarps_;
  static constexpr int kBlocks = kBlocks_;  // in a stage, for each depth warp
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;

  static constexpr bool kGated = is_gated(kEpilogue);
  static constexpr int kThreads = kRowWarps * kTokenWarps * kDepthWarps * 32;
  static constexpr int kTileQuarters = kRowWarps * kQuarters;
  static constexpr int kStrips = (kTileQuarters + 3) / 4;   // that a tile touches
  static constexpr int kHeld = std::min(4, kTileQuarters);  // quarters of each
  static constexpr int kQuarterOutputs = kGated ? 8 : 16;
  static constexpr int kGroups = kN / 8 / kTokenWarps;  // of eight tokens, for each warp
  static constexpr int kUnits = kQuarters * kGroups;    // m16n8 sums of a warp
  static constexpr int kMine = (kUnits + kDepthWarps - 1) / kDepthWarps;  // that it finishes
  static_assert(kTileQuarters % 4 == 0 || 4 % kTileQuarters == 0);

  static constexpr int kStageBlocks = kDepthWarps * kBlocks;
  static constexpr int kQuarterElements = kElementBytes / 4;
  static constexpr int kQuarterScales = scale_bytes(kFormat) / 4;
  static constexpr int kHeldBytes = kHeld * (kQuarterElements + kQuarterScales);  // of one block
  static constexpr int kStripBytes = kStageBlocks * kHeldBytes;
  static constexpr int kWeightBytes = kStrips * kStripBytes;
  static constexpr int kRowChunks = kStageBlocks * kBlockK * 2 / 16;
  static constexpr int kTokenPitch = kRowChunks * 16 + 16;  // rows in different banks
  static constexpr int kTokenBytes = kN * kTokenPitch;
  static constexpr int kSumBytes = kDepthWarps > 1 ? kThreads* kUnits * 16 : 0;
  // Offsets in shared memory.
  static constexpr int kWeights = 0;
  static constexpr int kTokens = kWeights + kStages * kWeightBytes;
  static constexpr int kSums = kTokens + kStages * kTokenBytes;
  static constexpr int kPlan = kSums + kSumBytes;
  static constexpr int kTables = kPlan + 64 + (kStages + 2) * 16;
  static constexpr int smem_bytes(int experts) { return kTables + TileTable::bytes(experts); }
};

// Every n-th tile; TileTable::Walk is the other order.
template <int kN>
class Interleaved {
 public:
  __device__ Interleaved(const TileTable& table, int row_tiles)
      : table_(table), row_tiles_(row_tiles), tile_(blockIdx.x) {
    find();
  }
  __device__ bool done() const { return tile_ >= table_.total(); }
  __device__ void next() {
    tile_ += gridDim.x;
    find();
  }
  __device__ int begin() const { return begin_; }
  __device__ int tokens() const { return tokens_; }

  int expert = 0, row_tile = 0;

 private:
  __device__ void find() {
    if (done()) return;
    const auto found = table_.find<kN>(tile_, row_tiles_);
    expert = found.expert;
    row_tile = found.row_tile;
    begin_ = table_.offset(expert) + found.token_tile * kN;
    tokens_ = min(kN, table_.offset(expert + 1) - begin_);
  }

  const TileTable& table_;
  int row_tiles_, tile_, begin_ = 0, tokens_ = 0;
};

struct Tile {
  int expert;  // -1 after the last
  int row_tile, begin, tokens;
};

// The tiles of this block of threads in shared memory, found by its first thread one tile ahead of
// the copies, which are kStages - 1 stages ahead of the products.
template <class C>
class Plan {
 public:
  __device__ Plan(uint8_t* tables, int experts, int row_tiles)
      : table_(tables, experts), tiles_(table_, row_tiles) {
    put(0);
  }
  // The first thread alone; others see it after a barrier.
  __device__ void put_after(int at) {
    if (!tiles_.done()) tiles_.next();
    put(after(at));
  }
  __device__ const Tile& operator[](int at) const { return ring_[at]; }
  static __device__ int after(int at) { return at + 1 == kTiles ? 0 : at + 1; }

 private:
  static constexpr int kTiles = C::kStages + 2;
  __device__ void put(int at) {
    const bool done = tiles_.done();
    ring_[at] = {done ? -1 : tiles_.expert, tiles_.row_tile, done ? 0 : tiles_.begin(),
                 done ? 0 : tiles_.tokens()};
  }

  TileTable table_;
  std::conditional_t<C::kOrder == Order::kContiguous, TileTable::Walk<C::kN>, Interleaved<C::kN>>
      tiles_;
  Tile ring_[kTiles];
};

// Where the next copies come from and go to. It runs ahead of the products. Its pointers are those
// of this thread's first chunk of 16 bytes in the next stage.
template <class C>
class Loader {
 public:
  __device__ Loader(const GemmArgs& args, Plan<C>* plan, uint32_t smem)
      : args_(args),
        plan_(plan),
        weights_to_(smem + C::kWeights + threadIdx.x * 16),
        tokens_to_(smem + C::kTokens + threadIdx.x / C::kRowChunks * C::kTokenPitch +
                   threadIdx.x % C::kRowChunks * 16) {
    enter();
  }

  // Asks for one stage; a group of copies, empty if there is nothing left.
  __device__ __forceinline__ void load(int slot) {
    if (left_ > 0) {
      copy(slot);
      left_ -= C::kStageBlocks;
      if (left_ <= 0) enter();
    }
    cuda::copy_async_commit();
  }

 private:
  static constexpr int kElementChunks = C::kHeld * C::kQuarterElements / 16;
  static constexpr int kBlockChunks = C::kHeldBytes / 16;
  static constexpr int kStripChunks = C::kStageBlocks * kBlockChunks;
  static constexpr int kStripPasses = (kStripChunks + C::kThreads - 1) / C::kThreads;
  static constexpr int kRowsAtOnce = C::kThreads / C::kRowChunks;
  static constexpr int kPasses = (C::kN + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kStageBytes = C::kStageBlocks * block_bytes(C::kFormat);
  static constexpr int kStageRowBytes = C::kStageBlocks * kBlockK * 2;
  static_assert(C::kThreads % C::kRowChunks == 0);

  __device__ __forceinline__ void enter() {
    const Tile tile = (*plan_)[at_];
    if (threadIdx.x == 0) plan_->put_after(at_);
    at_ = Plan<C>::after(at_);
    if (tile.expert < 0) return;

    const int64_t strip_bytes = num_blocks(args_.k) * block_bytes(C::kFormat);
    const int strips = static_cast<int>(num_strips(args_.outputs, C::kGated));
    const int quarter = tile.row_tile * C::kTileQuarters;
    const uint8_t* strip =
        args_.weights + (int64_t{tile.expert} * strips + quarter / 4) * strip_bytes;
    if constexpr (C::kHeld == 4) {  // one range
      weights_ = strip + threadIdx.x * 16;
      live_strips_ = strips - quarter / 4;
    } else {  // of each block the elements of the held quarters, then their scales
      weights_ = strip;
#pragma unroll
      for (int p = 0; p < kStripPasses; ++p) {
        const int chunk = p * C::kThreads + threadIdx.x;
        const int block = chunk / kBlockChunks, within = chunk % kBlockChunks;
        offset_[p] = block * block_bytes(C::kFormat) +
                     (within < kElementChunks ? quarter % 4 * C::kQuarterElements + within * 16
                                              : kElementBytes + quarter % 4 * C::kQuarterScales +
                                                    (within - kElementChunks) * 16);
      }
    }
    left_ = static_cast<int>(num_blocks(args_.k));
    const int chunk = threadIdx.x % C::kRowChunks;
    inside_ = args_.k - chunk * 8;
    // The tiles before often have the same tokens.
    if (C::kOrder == Order::kInterleaved || tile.begin != begin_) {
      begin_ = tile.begin;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int token = threadIdx.x / C::kRowChunks + i * kRowsAtOnce;
        const int position = tile.begin + token;
        row_[i] = -1;
        if (token < tile.tokens) row_[i] = args_.source ? args_.source[position] : position;
      }
    }
    x_ = static_cast<const uint8_t*>(args_.x) + chunk * 16;
  }

  __device__ __forceinline__ void copy(int slot) {
    const int live = min(C::kStageBlocks, left_) * kBlockChunks - static_cast<int>(threadIdx.x);
    const uint32_t weights_to = weights_to_ + slot * C::kWeightBytes;
    const uint8_t* from = weights_;
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      if (s > 0) {
        if (s >= live_strips_) break;
        from += num_blocks(args_.k) * block_bytes(C::kFormat);
      }
#pragma unroll
      for (int p = 0; p < kStripPasses; ++p) {
        if (p * C::kThreads < live) {
          cuda::copy_async_16(weights_to + s * C::kStripBytes + p * C::kThreads * 16,
                              from + (C::kHeld == 4 ? p * C::kThreads * 16 : offset_[p]));
        }
      }
    }
    weights_ += kStageBytes;
    // Zeros past the end of K, since 0 * (what lay here before) might be NaN.
    const uint32_t tokens_to = tokens_to_ + slot * C::kTokenBytes;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (row_[i] >= 0) {
        cuda::copy_async_16(tokens_to + i * kRowsAtOnce * C::kTokenPitch,
                            inside_ > 0 ? x_ + int64_t{row_[i]} * args_.k * 2 : x_, inside_ > 0);
      }
    }
    x_ += kStageRowBytes;
    inside_ -= kStageRowBytes / 2;
  }

  const GemmArgs& args_;
  Plan<C>* plan_;
  uint32_t weights_to_, tokens_to_;
  int at_ = 0, begin_ = -1;
  int left_ = 0;    // blocks of the tile
  int inside_ = 0;  // elements from this thread's chunk of a row to the end of K
  int live_strips_ = 0;
  const uint8_t *weights_ = nullptr, *x_ = nullptr;
  int offset_[kStripPasses] = {};
  int row_[kPasses];
};

// One warp's part of a tile.
template <class C>
struct Warp {
  int row_warp, token_warp, depth_warp, lane;
  __device__ Warp() {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    row_warp = warp % C::kRowWarps;
    token_warp = warp / C::kRowWarps % C::kTokenWarps;
    depth_warp = warp / (C::kRowWarps * C::kTokenWarps);
  }
};

// The products of one stage with the first kLive groups of this warp's tokens. `first` is the
// stage's first block of K.
template <class C, int kLive>
__device__ __forceinline__ void multiply(float (&sum)[C::kQuarters][C::kGroups][4], uint32_t smem,
                                         int slot, int first, int blocks, const Warp<C>& w) {
  using T = typename C::T;
  const uint32_t stage = smem + C::kWeights + slot * C::kWeightBytes;
  // A load of four 8x8 matrices serves two steps of one group of tokens; or two groups in one step,
  // which takes fewer registers.
  constexpr int kSteps = kLive % 2 ? 2 : 1, kTogether = 2 / kSteps;
  const int eighth = w.lane / 8;
  const uint32_t rows =
      smem + C::kTokens + slot * C::kTokenBytes +
      (w.token_warp * C::kGroups * 8 + w.lane % 8 + (kTogether > 1 ? eighth / 2 * 8 : 0)) *
          C::kTokenPitch +
      (kTogether > 1 ? eighth % 2 : eighth) * 16;
#pragma unroll
  for (int i = 0; i < C::kBlocks; ++i) {
    const int block = i * C::kDepthWarps + w.depth_warp;
    if (C::kStageBlocks > 1 && first + block >= blocks) break;
    PackedBlock<T, C::kFormat> packed[C::kQuarters];
#pragma unroll
    for (int q = 0; q < C::kQuarters; ++q) {
      const int quarter = w.row_warp * C::kQuarters + q;
      const uint32_t held = stage + quarter / 4 * C::kStripBytes + block * C::kHeldBytes;
      packed[q].load(held + quarter % 4 * C::kQuarterElements + w.lane * 16,
                     held + C::kHeld * C::kQuarterElements + quarter % 4 * C::kQuarterScales +
                         w.lane / 4 * 2 * scales_per_row(C::kFormat));
    }
#pragma unroll
    for (int step = 0; step < 4; step += kSteps) {
      uint32_t a[C::kQuarters][kSteps][4];
#pragma unroll
      for (int q = 0; q < C::kQuarters; ++q) {
#pragma unroll
        for (int j = 0; j < kSteps; ++j) packed[q].fragment(step + j, a[q][j]);
      }
#pragma unroll
      for (int group = 0; group < kLive; group += kTogether) {
        uint32_t b[4];
        cuda::load_matrices(rows + group * 8 * C::kTokenPitch + block * kBlockK * 2 + step * 32, b);
#pragma unroll
        for (int q = 0; q < C::kQuarters; ++q) {
          cuda::mma_16x8x16<T>(sum[q][group], a[q][0], b[0], b[1]);
          cuda::mma_16x8x16<T>(sum[q][group + kTogether - 1], a[q][kSteps - 1], b[2], b[3]);
        }
      }
    }
  }
}

// The same with 1, 2, 4, ... groups, as many as hold all tokens, if that is little code.
template <class C, int kLive>
__device__ __forceinline__ void multiply_live(float (&sum)[C::kQuarters][C::kGroups][4],
                                              uint32_t smem, int slot, int first, int blocks,
                                              int tokens, const Warp<C>& w) {
  if constexpr (kLive > 1 && C::kQuarters == 1) {
    if (tokens <= kLive * 4) {
      return multiply_live<C, kLive / 2>(sum, smem, slot, first, blocks, tokens, w);
    }
  }
  multiply<C, kLive>(sum, smem, slot, first, blocks, w);
}

// Rows of `out` of the tokens that this lane writes, -1 for none.
template <class C>
__device__ __forceinline__ void find_targets(const GemmArgs& args, const Tile& tile,
                                             int first_token, int lane, int (&target)[C::kGroups]) {
#pragma unroll
  for (int group = 0; group < C::kGroups; ++group) {
    const int token = first_token + group * 8 + lane / 4, position = tile.begin + token;
    target[group] = -1;
    if (token < tile.tokens) target[group] = args.target ? args.target[position] : position;
  }
}

// Scale, bias, activation and rounding of one m16n8 of sums; written as pairs of columns of `out`.
template <class C>
__device__ __forceinline__ void store(const GemmArgs& args,
                                      const Finish<typename C::T, C::kFormat, C::kEpilogue>& finish,
                                      const float* sum, float2 weight, int row, int target,
                                      int lane) {
  uint32_t value[2];
  finish(sum, weight, value);
  auto* out = static_cast<uint16_t*>(args.out) + int64_t{target} * args.outputs;
#pragma unroll
  for (int half = 0; half < (C::kGated ? 1 : 2); ++half) {
    const uint32_t pair = cuda::transpose_matrix(value[half]);
    const int column = row + half * 8 + lane % 4 * 2;
    if (target >= 0 && column < args.outputs) *reinterpret_cast<uint32_t*>(out + column) = pair;
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    mma_kernel(const __grid_constant__ GemmArgs args) {
  extern __shared__ __align__(128) uint8_t pointer[];
  const uint32_t smem = cuda::smem_address(pointer);
  const int row_tiles =
      (num_strips(args.outputs, C::kGated) * 4 + C::kTileQuarters - 1) / C::kTileQuarters;
  const int blocks = static_cast<int>(num_blocks(args.k));
  const Warp<C> w;
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  static_assert(sizeof(Plan<C>) <= C::kTables - C::kPlan);
  auto& plan = *reinterpret_cast<Plan<C>*>(pointer + C::kPlan);
  TileTable(pointer + C::kTables, args.experts).template fill<C::kN>(args.offsets, row_tiles);
  if (threadIdx.x == 0) new (&plan) Plan<C>(pointer + C::kTables, args.experts, row_tiles);
  __syncthreads();

  Loader<C> loader(args, &plan, smem);
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) {
    __syncthreads();  // the tile after this stage's is in the plan
    loader.load(i);
  }
  const int first_token = w.token_warp * C::kGroups * 8;
  int slot = 0;
  for (int at = 0; plan[at].expert >= 0; at = Plan<C>::after(at)) {
    const Tile& tile = plan[at];
    // Read now what the end of the tile needs, if that is little.
    constexpr bool kEarly = C::kGroups <= 2;
    int target[C::kGroups];
    if constexpr (kEarly) find_targets<C>(args, tile, first_token, w.lane, target);
    const int tokens = tile.tokens - first_token;  // of this warp

    float sum[C::kQuarters][C::kGroups][4] = {};
    for (int first = 0; first < blocks; first += C::kStageBlocks) {
      cuda::copy_async_wait<C::kStages - 2>();
      __syncthreads();
      loader.load(slot == 0 ? C::kStages - 1 : slot - 1);  // the stage before
      if (tokens > 0) multiply_live<C, C::kGroups>(sum, smem, slot, first, blocks, tokens, w);
      if (++slot == C::kStages) slot = 0;
    }

    if constexpr (!kEarly) find_targets<C>(args, tile, first_token, w.lane, target);
    auto* sums = reinterpret_cast<float4*>(pointer + C::kSums);
    if constexpr (C::kDepthWarps > 1) {
      // [row and token warp][unit][depth warp][lane]. The next tile's first barrier comes before
      // anything is overwritten.
      float4* const to =
          sums + (w.row_warp + w.token_warp * C::kRowWarps) * C::kUnits * C::kDepthWarps * 32 +
          w.depth_warp * 32 + w.lane;
#pragma unroll
      for (int u = 0; u < C::kUnits; ++u) {
        const float(&s)[4] = sum[u / C::kGroups][u % C::kGroups];
        to[u * C::kDepthWarps * 32] = make_float4(s[0], s[1], s[2], s[3]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int q = 0; q < C::kQuarters; ++q) {
      const int row =
          (tile.row_tile * C::kTileQuarters + w.row_warp * C::kQuarters + q) * C::kQuarterOutputs;
      const Finish<typename C::T, C::kFormat, C::kEpilogue> finish(args, tile.expert, row,
                                                                   w.lane / 4);
#pragma unroll
      for (int group = 0; group < C::kGroups; ++group) {
        if (group * 8 >= tokens) break;
        const int u = q * C::kGroups + group;
        if (C::kDepthWarps > 1 && u % C::kDepthWarps != w.depth_warp) continue;
        float2 weight = {1.0f, 1.0f};
        if (args.row_weight) {
          const int token = group * 8 + w.lane % 4 * 2;
          const int32_t* source = args.source + tile.begin + first_token + token;
          if (token < tokens) weight.x = args.row_weight[source[0]];
          if (token + 1 < tokens) weight.y = args.row_weight[source[1]];
        }
        float total[4] = {sum[q][group][0], sum[q][group][1], sum[q][group][2], sum[q][group][3]};
        if constexpr (C::kDepthWarps > 1) {
          const float4* const parts =
              sums +
              ((w.row_warp + w.token_warp * C::kRowWarps) * C::kUnits + u) * C::kDepthWarps * 32 +
              w.lane;
          total[0] = total[1] = total[2] = total[3] = 0.0f;
#pragma unroll
          for (int d = 0; d < C::kDepthWarps; ++d) {
            const float4 v = parts[d * 32];
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
          }
        }
        store<C>(args, finish, total, weight, row, target[group], w.lane);
      }
    }
  }
  cuda::copy_async_wait<0>();
}

struct GemmRun {
  template <class C>
  static cudaError_t run(const GemmArgs& args, const Launch& launch) {
    static_assert(C::smem_bytes(kMaxExperts) <= kSmemLimit);
    // Always the most that the kernel may take: the limit belongs to the function, and a launch on
    // another thread with more experts must not find it lowered.
    const cudaError_t error = cudaFuncSetAttribute(
        mma_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::smem_bytes(kMaxExperts));
    if (error != cudaSuccess) return error;
    return cuda::launch(mma_kernel<C>, dim3(launch.multiprocessors * C::kBlocksPerSm), C::kThreads,
                        C::smem_bytes(args.experts), launch.stream, args);
  }
};

}  // namespace jaxmoe::sm80

#endif  // JAXMOE_CSRC_SM80_GEMM_CUH_
