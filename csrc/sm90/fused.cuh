// The whole MLP in one kernel, for so few tokens that latency is most of the time: one block of
// threads on every multiprocessor, all running at once, with one barrier of the grid between the
// two products.
//
// Every block finds the chosen experts by itself and keeps all tokens, zero-padded, in shared
// memory; a column of mma.sync is a token, and what an expert yields for a token that did not
// choose it is dropped. Rows are dealt out by quarters of strips (16 rows, one warp's in the
// layout), evenly and in the order of memory. In the first product a block has its quarters of one
// expert after the other. In the second it has its quarters of `out`, with all experts along K: the
// weighted sum needs no other block.
//
// The warps of a block share out K, and add up through shared memory in a fixed order. Each fetches
// for itself: a private ring of `depth` slots, each of up to four quarters of blocks of K, filled
// by bulk copies as soon as it is read. The copies run ahead across rows, experts and the barrier,
// for the weights of the second product depend on nothing: so memory works while the grid waits.
// The results of the first product go through L2 memory, by ordinary stores and loads.
//
// Both x and those results lie in the order in which a lane multiplies them (`place`).
#ifndef JAXMOE_CSRC_SM90_FUSED_CUH_
#define JAXMOE_CSRC_SM90_FUSED_CUH_

#include <cooperative_groups.h>

#include <utility>

#include "cuda/dequantize.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/fused.h"
#include "cuda/launch.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {

inline constexpr int kFusedTokens = 8;  // columns of mma.sync
inline constexpr int kFusedPairs = 64;  // of a token and an expert

template <class T_, Format kFormat_, Epilogue kEpilogue_, int kWarps_, int kMaxDepth_,
          int kAtFirst_>
struct FusedConfig {
  using T = T_;
  static constexpr Format kFormat = kFormat_;
  static constexpr Epilogue kEpilogue = kEpilogue_;  // of the first product
  static constexpr int kWarps = kWarps_;
  static constexpr int kMaxDepth = kMaxDepth_;
  static constexpr int kAtFirst = kAtFirst_;  // slots that a warp fills before it multiplies

  static constexpr bool kGated = is_gated(kEpilogue);
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kQuarterElements = kElementBytes / 4;
  static constexpr int kQuarterScales = scale_bytes(kFormat) / 4;
  static constexpr int kQuarterBytes = kQuarterElements + kQuarterScales;
  static constexpr int kSlotBytes = block_bytes(kFormat);
  // Sums of a pair of tokens: of each warp, quarter and row pair; two more, against bank conflicts.
  static constexpr int kSumColumn = kWarps * 4 * 8 + 2;
  static_assert(kWarps >= 4);  // one finishes a quarter
};

// What one warp does of a product. The product's units are the quarters of strips that hold any
// rows: first product: of all chosen experts; second: of one, for it has the experts along K.
struct Share {
  const uint8_t* weights;
  int64_t matrix_bytes;
  int quarters;     // of a matrix
  int blocks;       // of its K
  int units;        // of this block of threads
  int expert;       // the first unit's: which of the chosen
  int quarter;      // and which quarter of its matrix
  int items;        // blocks of K for each unit
  int item_expert;  // the first item's: how many matrices further
  int item_block;   // and which block of K
};

// Shared memory: the rings of all warps first, then these offsets.
template <class C>
struct FusedLayout {
  int pairs, row_bytes;
  int sums_bytes;  // of one of two buffers
  int sums, x, full, shares, local, pair_weight, experts, row, weight, scale, bytes;

  __host__ __device__ constexpr FusedLayout(int tokens, int top_k, int hidden, int depth)
      : pairs(tokens * top_k),
        // The odd 64 bytes put neighbouring rows into other banks.
        row_bytes(static_cast<int>(num_blocks(hidden)) * kBlockK * 2 + 64),
        sums_bytes((tokens + 1) / 2 * C::kSumColumn * 16),
        sums(C::kWarps * depth * C::kSlotBytes),
        x(sums + 2 * sums_bytes),
        full(x + tokens * row_bytes),
        shares(full + C::kWarps * depth * 8),
        local(shares + C::kWarps * 2 * static_cast<int>(sizeof(Share))),
        pair_weight(local + pairs * 4),
        experts(pair_weight + pairs * 4),
        row(experts + (pairs + 1) * 4),
        weight(row + pairs * tokens * 4),
        scale(weight + pairs * tokens * 4),
        bytes(scale + pairs * 4) {}

  // The most slots that fit; 0 if none.
  static constexpr int depth(int tokens, int top_k, int hidden) {
    int depth = C::kMaxDepth;
    while (depth > 0 && FusedLayout(tokens, top_k, hidden, depth).bytes > kSmemLimit) --depth;
    return depth;
  }
};

// Where element k of a block of K lies: lane 4g + c multiplies 16 contiguous bytes of token g for
// the first two steps, and 16 for the others.
__host__ __device__ constexpr int place(int k) {
  return k / 32 * 32 + k % 8 / 2 * 8 + k % 32 / 16 * 4 + k % 16 / 8 * 2 + k % 2;
}

// Part `index` of `total` things in `parts`: as even as can be.
struct Part {
  int first, count;
  __device__ __forceinline__ Part(int total, int parts, int index)
      : first(total / parts * index + min(index, total % parts)),
        count(total / parts + (index < total % parts)) {}
};

// `chosen`: how many experts are.
template <class C>
__device__ __forceinline__ Share make_share(const GemmArgs& args, bool second, int chosen) {
  const bool gated = C::kGated && !second;
  Share s;
  s.weights = args.weights;
  s.matrix_bytes = matrix_bytes(C::kFormat, args.outputs, args.k, gated);
  s.quarters = divide_up(args.outputs, gated ? 8 : 16);
  s.blocks = num_blocks(args.k);
  const Part units(second ? s.quarters : chosen * s.quarters, gridDim.x, blockIdx.x);
  s.units = units.count;
  s.expert = units.first / s.quarters;
  s.quarter = units.first % s.quarters;
  const Part items(second ? chosen * s.blocks : s.blocks, C::kWarps, threadIdx.x / 32);
  s.items = items.count;
  s.item_expert = items.first / s.blocks;
  s.item_block = items.first % s.blocks;
  return s;
}

// Goes through a share: by segments, which are up to four quarters of a strip, and their items.
struct Walk {
  const Share* share;
  int units;    // left, with those of the segment
  int expert;   // of the segment
  int quarter;  // its first
  int count;    // its quarters
  int items;    // left of the segment
  int chosen;   // expert of the item
  int block;    // of its K

  __device__ __forceinline__ explicit Walk(const Share* s)
      : share(s), units(s->units), expert(s->expert), quarter(s->quarter) {
    enter();
  }
  __device__ __forceinline__ bool done() const { return units == 0; }
  __device__ __forceinline__ void next_segment() {
    units -= count;
    quarter += count;
    if (quarter == share->quarters) quarter = 0, ++expert;
    enter();
  }
  // Items from this one on that make a piece: one expert's, and no more than a slot holds.
  __device__ __forceinline__ int piece() const {
    return min(min(max(4 >> (count - 1), 1), items), share->blocks - block);
  }
  __device__ __forceinline__ void next_items(int n) {
    items -= n;
    block += n;
    if (block == share->blocks) block = 0, ++chosen;
  }

 private:
  __device__ __forceinline__ void enter() {
    count = min(min(4 - (quarter & 3), share->quarters - quarter), units);
    items = share->items;
    chosen = expert + share->item_expert;
    block = share->item_block;
  }
};

// A warp's ring of slots, filled in the order of its walks through both products.
template <class C>
class Stream {
 public:
  // `shares`: this warp's of both products.
  __device__ Stream(const Share* shares, const int* experts, uint8_t* memory, uint64_t* full,
                    int depth)
      : walk_(shares), last_(shares + 1), experts_(experts), depth_(depth) {
    const int warp = threadIdx.x / 32;
    slots_ = cuda::smem_address(memory) + warp * depth * C::kSlotBytes;
    full_ = full + warp * depth;
    skip();
    for (int i = 0; i < min(C::kAtFirst, depth); ++i) issue();
  }

  // Where the quarters of the item that `walk` is at lie, once they are there.
  __device__ __forceinline__ uint32_t wait(const Walk& walk) {
    if (left_ == 0) {
      left_ = walk.piece();
      offset_ = slots_ + slot_ * C::kSlotBytes;
      cuda::barrier_wait(&full_[slot_], phase_);
    }
    return offset_;
  }
  // The item has been read. After the last one of a slot, that is filled again.
  __device__ __forceinline__ void release(int quarters) {
    offset_ += quarters * C::kQuarterBytes;
    if (--left_ > 0) return;
    __syncwarp();
    --filled_;
    if (++slot_ == depth_) slot_ = 0, phase_ ^= 1;
    // Two for one until the ring is full. All slots at once would wait for memory in this warp,
    // which could multiply meanwhile: the copy engine's queue is short.
    issue();
    if (filled_ < depth_) issue();
  }

 private:
  // Fills one more slot. Of each item first the elements of its quarters, then their scales.
  __device__ __forceinline__ void issue() {
    if (walk_.done()) return;
    const int slot = fill_;
    if (++fill_ == depth_) fill_ = 0;
    ++filled_;
    const int lane = threadIdx.x % 32;
    const Share& share = *walk_.share;
    const int strip = walk_.quarter >> 2, part = walk_.quarter & 3;
    const int items = walk_.piece(), item_bytes = walk_.count * C::kQuarterBytes;
    const uint32_t to = slots_ + slot * C::kSlotBytes;
    uint64_t* full = &full_[slot];
    const uint8_t* from = share.weights + experts_[walk_.chosen] * share.matrix_bytes +
                          (int64_t{strip} * share.blocks + walk_.block) * C::kSlotBytes;
    if (lane == 0) cuda::barrier_arrive_expect(full, items * item_bytes);
    if (walk_.count == 4) {
      if (lane == 0) cuda::bulk_load(to, from, C::kSlotBytes, full);
    } else if (lane < 2 * items) {
      const int item = lane / 2;
      const bool scales = lane % 2;
      const int bytes = scales ? C::kQuarterScales : C::kQuarterElements;
      cuda::bulk_load(to + item * item_bytes + (scales ? walk_.count * C::kQuarterElements : 0),
                      from + item * C::kSlotBytes + (scales ? kElementBytes : 0) + part * bytes,
                      walk_.count * bytes, full);
    }
    walk_.next_items(items);
    skip();
  }
  // To the next piece, past segments in which this warp has none and over to the second product.
  __device__ __forceinline__ void skip() {
    while (true) {
      while (!walk_.done() && walk_.items == 0) walk_.next_segment();
      if (!walk_.done() || walk_.share == last_) return;
      walk_ = Walk(last_);
    }
  }

  Walk walk_;
  const Share* last_;
  const int* experts_;
  uint32_t slots_;
  uint64_t* full_;
  int depth_;
  int fill_ = 0, filled_ = 0;  // the next slot to fill; how many are
  int slot_ = 0, phase_ = 0;   // the next one to read
  int left_ = 0;               // items of the piece that is being read
  uint32_t offset_ = 0;        // where the next one lies
};

// One warp: the distinct experts of this shard, in the order of their first pairs; `local` gets
// every pair's expert, or -1, and `weight` its weight. Returns how many.
__device__ __forceinline__ int find_experts(const FusedArgs& args, int* local, float* weight,
                                            int* experts) {
  const int lane = threadIdx.x % 32;
  const int pairs = args.tokens * args.top_k;
  const int offset = *args.expert_offset;
  int count = 0;
  for (int base = 0; base < pairs; base += 32) {
    const int pair = base + lane;
    int expert = -1;
    if (pair < pairs) {
      // Ids near the ends of int32 must not wrap around into the range.
      const int64_t e = int64_t{args.expert_ids[pair]} - offset;
      weight[pair] = args.weights[pair];
      if (e >= 0 && e < args.up.experts) expert = static_cast<int>(e);
      local[pair] = expert;
    }
    const unsigned same = __match_any_sync(~0u, expert);
    bool first = expert >= 0 && __ffs(same) - 1 == lane;
    for (int i = 0; i < count; ++i) first = first && experts[i] != expert;
    const unsigned firsts = __ballot_sync(~0u, first);
    if (first) experts[count + __popc(firsts & ((1u << lane) - 1))] = expert;
    count += __popc(firsts);
    __syncwarp();
  }
  return count;
}

// The tokens, in the order of `place` and padded with zeros, by the threads from `first` on.
template <class C>
__device__ __forceinline__ void stage_tokens(const FusedArgs& args, const FusedLayout<C>& at,
                                             uint8_t* memory, int first) {
  const int chunks = args.up.k / 8, padded = (at.row_bytes - 64) / 16;
  for (int i = threadIdx.x - first; i < args.tokens * padded; i += C::kThreads - first) {
    const int token = i / padded, chunk = i % padded, k = chunk % 8 * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (chunk < chunks) v = static_cast<const uint4*>(args.up.x)[token * chunks + chunk];
    auto* to = reinterpret_cast<uint32_t*>(memory + at.x + token * at.row_bytes + chunk / 8 * 128 +
                                           place(k) * 2);
    to[0] = v.x, to[4] = v.y, to[8] = v.z, to[12] = v.w;
  }
}

// What the block knows of the pairs, in shared memory.
struct Chosen {
  const int* experts;
  const int* row;       // [experts, tokens]: of the scratch, or -1 where the token has not chosen
  const float* weight;  // [experts, tokens]
  float* scale;         // [experts]: of the second matrix
};

// All threads; the __syncthreads that adds up a segment, or the grid's barrier, comes before any
// use.
template <class C>
__device__ __forceinline__ void fill_tables(const FusedArgs& args, const FusedLayout<C>& at,
                                            uint8_t* memory, int count) {
  const auto* local = reinterpret_cast<const int*>(memory + at.local);
  const auto* weights = reinterpret_cast<const float*>(memory + at.pair_weight);
  const auto* experts = reinterpret_cast<const int*>(memory + at.experts);
  for (int i = threadIdx.x; i < count * args.tokens; i += C::kThreads) {
    const int expert = experts[i / args.tokens], token = i % args.tokens;
    int row = -1;
    float weight = 0.0f;
    for (int pair = token * args.top_k; pair < (token + 1) * args.top_k; ++pair) {
      if (local[pair] != expert) continue;
      if (row < 0) row = pair;  // a token may choose an expert more than once
      weight += weights[pair];
    }
    reinterpret_cast<int*>(memory + at.row)[i] = row;
    reinterpret_cast<float*>(memory + at.weight)[i] = weight;
  }
}

// Quarter q of the `count` that lie at `item`: first all elements, then all scales.
template <class C>
__device__ __forceinline__ void load_quarter(PackedBlock<typename C::T, C::kFormat>& packed,
                                             uint32_t item, int count, int q) {
  const int lane = threadIdx.x % 32;
  packed.load(item + q * C::kQuarterElements + lane * 16,
              item + count * C::kQuarterElements + q * C::kQuarterScales +
                  lane / 4 * 2 * scales_per_row(C::kFormat));
}

// sum += (an item's quarters, which lie at `item`) * (the lane's elements of the tokens).
template <class C>
__device__ __forceinline__ void multiply(uint32_t item, int count, const uint32_t (&b)[8],
                                         float (&sum)[4][4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if (q >= count) break;
    PackedBlock<typename C::T, C::kFormat> packed;
    load_quarter<C>(packed, item, count, q);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      packed.fragment(step, a);
      cuda::mma_16x8x16<typename C::T>(sum[q], a, b[2 * step], b[2 * step + 1]);
    }
  }
}

// Adds up what the warps have of a segment: each puts the sums of its lanes into its own places,
// then warp q gets the total of quarter q.
template <class C>
class Reduction {
 public:
  __device__ Reduction(float4* sums, int buffer_bytes, int tokens)
      : sums_(sums + threadIdx.x % 4 * C::kSumColumn + threadIdx.x % 32 / 4),
        other_(buffer_bytes / 16),
        live_(static_cast<int>(threadIdx.x % 4) * 2 < tokens) {}

  // Whether this lane has a column of any token.
  __device__ __forceinline__ bool live() const { return live_; }
  __device__ __forceinline__ float4& at(int warp, int quarter) const {
    return sums_[(warp * 4 + quarter) * 8];
  }
  __device__ __forceinline__ void finish(int count, float (&total)[4]) {
    const int quarter = threadIdx.x / 32;
    __syncthreads();
    total[0] = total[1] = total[2] = total[3] = 0.0f;
    if (quarter < count && live()) {
#pragma unroll
      for (int w = 0; w < C::kWarps; ++w) {
        const float4 v = at(w, quarter);
        total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
      }
    }
    // Two buffers: a warp that is a segment ahead cannot overwrite what others still add up.
    sums_ += other_;
    other_ = -other_;
  }

 private:
  float4* sums_;
  int other_;
  bool live_;
};

// The first product: activated values of every pair, to the scratch.
template <class C>
__device__ __forceinline__ void first_product(const FusedArgs& args, const FusedLayout<C>& at,
                                              const uint8_t* memory, const Chosen& chosen,
                                              const Share* share, Stream<C>& stream,
                                              Reduction<C>& reduction) {
  using T = typename C::T;
  constexpr int kWarpOutputs = C::kGated ? 8 : 16;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int64_t row_elements = num_blocks(args.up.outputs) * kBlockK;
  // Columns past the last token repeat it.
  const uint32_t tokens =
      cuda::smem_address(memory) + at.x + min(g, args.tokens - 1) * at.row_bytes + c * 16;
  for (Walk walk(share); !walk.done(); walk.next_segment()) {
    const int which = walk.expert;
    const int row = (walk.quarter + warp) * kWarpOutputs;
    Finish<T, C::kFormat, C::kEpilogue> finish;
    if (warp < walk.count) finish = {args.up, chosen.experts[which], row, g};  // read early

    float sum[4][4] = {};
    for (; walk.items > 0; walk.next_items(1)) {
      const uint4 low = cuda::load_shared_16(tokens + walk.block * 128);
      const uint4 high = cuda::load_shared_16(tokens + walk.block * 128 + 64);
      const uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      multiply<C>(stream.wait(walk), walk.count, b, sum);
      stream.release(walk.count);
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q < walk.count && reduction.live()) {
        reduction.at(warp, q) = make_float4(sum[q][0], sum[q][1], sum[q][2], sum[q][3]);
      }
    }
    float total[4];
    reduction.finish(walk.count, total);
    if (warp >= walk.count) continue;

    int target[2] = {-1, -1};
    float weight[2] = {1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * c + i >= args.tokens) continue;
      target[i] = chosen.row[which * args.tokens + 2 * c + i];
      if (args.weight_on_input) weight[i] = chosen.weight[which * args.tokens + 2 * c + i];
    }
    uint32_t value[2];
    finish(total, {weight[0], weight[1]}, value);
#pragma unroll
    for (int half = 0; half < (C::kGated ? 1 : 2); ++half) {
      const int output = row + g + 8 * half;
      auto* to = static_cast<uint16_t*>(args.up.out) + output / kBlockK * kBlockK +
                 place(output % kBlockK);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (target[i] >= 0 && output < args.up.outputs) {
          to[target[i] * row_elements] = static_cast<uint16_t>(value[half] >> (16 * i));
        }
      }
    }
  }
}

// The lane's elements of what the chosen experts yielded for token g, block by block of K.
class Hidden {
 public:
  __device__ Hidden(const FusedArgs& args, const Chosen& chosen)
      : args_(args), chosen_(chosen), blocks_(num_blocks(args.down.k)) {}

  // Sets out from a block of one of the chosen experts.
  __device__ __forceinline__ void enter(int which, int block) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const int row = g < args_.tokens ? chosen_.row[which * args_.tokens + g] : -1;
    const auto* scratch = static_cast<const uint4*>(args_.down.x);
    from_ = row < 0 ? nullptr : scratch + (int64_t{row} * blocks_ + block) * (kBlockK / 8) + c;
  }
  // The current block, then on to the next; zeros where the token has not chosen the expert, and
  // past the end of K, which nobody has written.
  __device__ __forceinline__ void load(int block, uint32_t (&b)[8]) {
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (from_) {
      low = __ldcg(from_);
      high = __ldcg(from_ + 4);
      from_ += kBlockK / 8;
    }
    b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
    b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
    const int rest = args_.down.k - block * kBlockK;
    if (rest < kBlockK) {
      b[6] = b[7] = 0;
      if (rest <= 32) b[4] = b[5] = 0;
      if (rest <= 16) b[2] = b[3] = 0;
    }
  }

 private:
  const FusedArgs& args_;
  const Chosen& chosen_;
  const int blocks_;
  const uint4* from_ = nullptr;
};

// The same for one token, which is every column: lane 4g + c reads for item g of a batch of eight,
// so that a warp's items are on their way together, and hands over to the lanes of column c.
class HiddenOfOne {
 public:
  // Sets out from the first item of a segment, where `walk` is; reads nothing of h yet.
  __device__ HiddenOfOne(const FusedArgs& args, const Chosen& chosen, const Walk& walk)
      : row_of_(chosen.row),
        from_(static_cast<const uint4*>(args.down.x) + threadIdx.x % 4),
        k_(args.down.k),
        blocks_(walk.share->blocks),
        left_(walk.items),
        which_(walk.chosen),
        block_(walk.block) {
    forward(threadIdx.x % 32 / 4);
  }
  // The batch from here on: to be called first, and by `next`.
  __device__ __forceinline__ void load() {
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (left_ > 0) {
      const uint4* from = from_ + (int64_t{row_of_[which_]} * blocks_ + block_) * (kBlockK / 8);
      low = __ldcg(from);
      high = __ldcg(from + 4);
    }
    // Past the end of K nobody has written.
    const int rest = k_ - block_ * kBlockK;
    if (rest <= 48) high.z = high.w = 0;
    if (rest <= 32) high.x = high.y = 0;
    if (rest <= 16) low.z = low.w = 0;
    mine_[0] = low.x, mine_[1] = low.y, mine_[2] = low.z, mine_[3] = low.w;
    mine_[4] = high.x, mine_[5] = high.y, mine_[6] = high.z, mine_[7] = high.w;
    at_ = 0;
  }
  __device__ __forceinline__ void next(uint32_t (&b)[8]) {
    if (at_ == 8) {
      forward(8);
      load();
    }
    const int from = at_++ * 4 + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = __shfl_sync(~0u, mine_[i], from);
  }

 private:
  __device__ __forceinline__ void forward(int items) {
    left_ -= items;
    block_ += items;
    while (block_ >= blocks_) block_ -= blocks_, ++which_;
  }

  const int* row_of_;
  const uint4* from_;
  int k_, blocks_, left_, which_, block_, at_;
  uint32_t mine_[8];
};

// The lane's share of the biases of a segment's rows, weighted and summed over the experts.
__device__ __forceinline__ float4 sum_biases(const FusedArgs& args, const Chosen& chosen, int count,
                                             int first_row) {
  const int row = first_row + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float sum[4] = {};
  if (!args.down.bias) count = 0;
  for (int which = 0; which < count; ++which) {
    const float* bias = args.down.bias + int64_t{chosen.experts[which]} * args.down.outputs;
    const float low = row < args.down.outputs ? bias[row] : 0.0f;
    const float high = row + 8 < args.down.outputs ? bias[row + 8] : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * c + i;
      if (token >= args.tokens || chosen.row[which * args.tokens + token] < 0) continue;
      const float weight = args.weight_on_input ? 1.0f : chosen.weight[which * args.tokens + token];
      sum[i] += weight * low;
      sum[2 + i] += weight * high;
    }
  }
  return make_float4(sum[0], sum[1], sum[2], sum[3]);
}

// Adds a warp's sums for one expert, weighted, to its totals, and starts anew.
template <class C>
__device__ __forceinline__ void add_expert(const FusedArgs& args, const Chosen& chosen, int which,
                                           int count, float (&sum)[4][4],
                                           const Reduction<C>& reduction) {
  constexpr float kFactor = kUnscale<typename C::T, C::kFormat>;
  const float scale = chosen.scale[which];
  float weight[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = static_cast<int>(threadIdx.x) % 4 * 2 + i;
    if (token >= args.tokens) continue;
    const int at = which * args.tokens + token;
    if (chosen.row[at] >= 0) weight[i] = args.weight_on_input ? 1.0f : chosen.weight[at];
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if (q < count && reduction.live()) {
      float4& total = reduction.at(threadIdx.x / 32, q);
      total.x += weight[0] * (sum[q][0] * kFactor * scale);
      total.y += weight[1] * (sum[q][1] * kFactor * scale);
      total.z += weight[0] * (sum[q][2] * kFactor * scale);
      total.w += weight[1] * (sum[q][3] * kFactor * scale);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[q][i] = 0.0f;
  }
}

// A warp's totals of a segment before its first item.
template <class C>
__device__ __forceinline__ void start_segment(const FusedArgs& args, const Chosen& chosen,
                                              int count, const Walk& walk,
                                              const Reduction<C>& reduction) {
  const int warp = threadIdx.x / 32;
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  float4 bias = zero;
  if (warp < walk.count) bias = sum_biases(args, chosen, count, (walk.quarter + warp) * 16);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    if (q < walk.count && reduction.live()) reduction.at(warp, q) = q == warp ? bias : zero;
  }
}

// The second product and the weighted sum over the experts, to `out`. kOne: there is one token.
template <class C, bool kOne>
__device__ __forceinline__ void second_product(const FusedArgs& args, const Chosen& chosen,
                                               int count, const Share* share, Stream<C>& stream,
                                               Reduction<C>& reduction) {
  namespace cg = cooperative_groups;
  using T = typename C::T;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const auto grid = cg::this_grid();
  auto arrived = grid.barrier_arrive();
  // From here to the wait: what depends on the first product of no block.
  Walk walk(share);
  for (int i = threadIdx.x; i < count; i += C::kThreads) {
    chosen.scale[i] = args.down.global_scale[chosen.experts[i]];
  }
  start_segment(args, chosen, count, walk, reduction);
  HiddenOfOne one(args, chosen, walk);
  // With a single token, the weights of a few items.
  constexpr int kEarly = 1;
  uint32_t early[kEarly][4][4];
  int num_early = 0;
  if (kOne && walk.count == 1) {
    Walk ahead = walk;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      if (ahead.items == 0) break;
      PackedBlock<T, C::kFormat> packed;
      load_quarter<C>(packed, stream.wait(ahead), 1, 0);
#pragma unroll
      for (int step = 0; step < 4; ++step) packed.fragment(step, early[i][step]);
      stream.release(1);
      ahead.next_items(1);
      ++num_early;
    }
  }
  grid.barrier_wait(std::move(arrived));

  while (!walk.done()) {
    float sum[4][4] = {};
    if constexpr (kOne) {
      uint32_t b[8];
      const auto next_item = [&] {
        const int which = walk.chosen;
        walk.next_items(1);
        if (walk.items == 0 || walk.chosen != which) {
          add_expert(args, chosen, which, walk.count, sum, reduction);
        }
      };
      one.load();
#pragma unroll
      for (int i = 0; i < kEarly; ++i) {
        if (i >= num_early) break;
        one.next(b);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          cuda::mma_16x8x16<T>(sum[0], early[i][step], b[2 * step], b[2 * step + 1]);
        }
        next_item();
      }
      num_early = 0;
      while (walk.items > 0) {
        one.next(b);
        multiply<C>(stream.wait(walk), walk.count, b, sum);
        stream.release(walk.count);
        next_item();
      }
    } else {
      Hidden hidden(args, chosen);
      uint32_t b[2][8];
      if (walk.items > 0) {
        hidden.enter(walk.chosen, walk.block);
        hidden.load(walk.block, b[0]);
      }
      while (walk.items > 0) {
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const int which = walk.chosen;
          Walk next = walk;
          next.next_items(1);
          const bool last = next.items == 0, over = last || next.chosen != which;
          if (!last) {  // an item ahead, for it comes from L2 memory
            if (over) hidden.enter(next.chosen, 0);
            hidden.load(next.block, b[turn ^ 1]);
          }
          multiply<C>(stream.wait(walk), walk.count, b[turn], sum);
          stream.release(walk.count);
          walk = next;
          if (over) add_expert(args, chosen, which, walk.count, sum, reduction);
          if (last) break;
        }
      }
    }
    float y[4];
    reduction.finish(walk.count, y);
    const int row = (walk.quarter + warp) * 16 + g;
    if (warp < walk.count) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = row + i / 2 * 8, token = 2 * c + i % 2;
        if (output < args.down.outputs && token < args.tokens) {
          static_cast<uint16_t*>(args.down.out)[int64_t{token} * args.down.outputs + output] =
              static_cast<uint16_t>(cuda::Pair<T>::make(y[i], 0.0f));
        }
      }
    }
    walk.next_segment();
    start_segment(args, chosen, count, walk, reduction);
    if constexpr (kOne) one = HiddenOfOne(args, chosen, walk);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    fused_kernel(const __grid_constant__ FusedArgs args, int depth) {
  extern __shared__ __align__(128) uint8_t memory[];
  const FusedLayout<C> at(args.tokens, args.top_k, args.up.k, depth);
  auto* full = reinterpret_cast<uint64_t*>(memory + at.full);
  auto* experts = reinterpret_cast<int*>(memory + at.experts);
  for (int i = threadIdx.x; i < C::kWarps * depth; i += C::kThreads) {
    cuda::barrier_init(&full[i], 1);
    cuda::fence_barrier_init();
  }
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  if (threadIdx.x < 32) {
    const int found = find_experts(args, reinterpret_cast<int*>(memory + at.local),
                                   reinterpret_cast<float*>(memory + at.pair_weight), experts);
    if (threadIdx.x == 0) experts[at.pairs] = found;
  } else {
    stage_tokens(args, at, memory, 32);
  }
  __syncthreads();

  const int count = experts[at.pairs];
  Share* const shares = reinterpret_cast<Share*>(memory + at.shares) + threadIdx.x / 32 * 2;
  const int lane = threadIdx.x % 32;
  if (lane < 2) shares[lane] = make_share<C>(lane ? args.down : args.up, lane == 1, count);
  __syncwarp();
  Stream<C> stream(shares, experts, memory, full, depth);
  fill_tables(args, at, memory, count);
  const Chosen chosen = {experts, reinterpret_cast<const int*>(memory + at.row),
                         reinterpret_cast<const float*>(memory + at.weight),
                         reinterpret_cast<float*>(memory + at.scale)};
  Reduction<C> reduction(reinterpret_cast<float4*>(memory + at.sums), at.sums_bytes, args.tokens);
  first_product(args, at, memory, chosen, shares, stream, reduction);
  if (args.tokens == 1) {
    second_product<C, true>(args, chosen, count, shares + 1, stream, reduction);
  } else {
    second_product<C, false>(args, chosen, count, shares + 1, stream, reduction);
  }
}

struct FusedRun {
  template <class C>
  static cudaError_t run(const FusedArgs& args, const Launch& launch) {
    if constexpr (C::kEpilogue == Epilogue::kStore) {
      return cudaErrorInvalidValue;  // the first product always has an activation
    } else {
      // Whatever the kernel's limits allow, with this many columns; `obstacle` refuses what does
      // not fit.
      static_assert(FusedLayout<C>::depth(kFusedTokens, kFusedPairs / kFusedTokens, 4096) > 0);
      const int depth = FusedLayout<C>::depth(args.tokens, args.top_k, args.up.k);
      const int smem = FusedLayout<C>(args.tokens, args.top_k, args.up.k, depth).bytes;
      const cudaError_t error = cudaFuncSetAttribute(
          fused_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemLimit);
      if (error != cudaSuccess) return error;
      return cuda::launch_cooperative(fused_kernel<C>, dim3(launch.multiprocessors), C::kThreads,
                                      smem, launch.stream, args, depth);
    }
  }
};

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_FUSED_CUH_
