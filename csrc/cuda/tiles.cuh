// Which tile of which expert: made by every block of threads from the offsets of the sorted tokens.
#ifndef JAXMOE_CSRC_CUDA_TILES_CUH_
#define JAXMOE_CSRC_CUDA_TILES_CUH_

#include <cstdint>
#include <type_traits>

namespace jaxmoe::cuda {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

class TileTable {
 public:
  static constexpr int bytes(int experts) { return 2 * (experts + 1) * 4; }

  __device__ TileTable(uint8_t* memory, int experts)
      : offsets_(reinterpret_cast<int*>(memory)),
        first_(offsets_ + experts + 1),
        experts_(experts) {}

  // All threads, before a __syncthreads. The first warp adds up the tiles, four experts a lane: so
  // their offsets are on the way together.
  template <int kN>
  __device__ void fill(const int32_t* offsets, int row_tiles) {
    constexpr int kMine = 4;
    if (threadIdx.x >= 32) return;
    int carry = 0;
    for (int base = 0; base <= experts_; base += 32 * kMine) {
      const int first = base + threadIdx.x * kMine;
      int begin[kMine + 1], tiles[kMine], sum = 0;
#pragma unroll
      for (int i = 0; i <= kMine; ++i) begin[i] = offsets[min(first + i, experts_)];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        tiles[i] = (begin[i + 1] - begin[i] + kN - 1) / kN * row_tiles;
        sum += tiles[i];
      }
      const int mine = sum;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (static_cast<int>(threadIdx.x) >= d) sum += other;
      }
      int at = carry + sum - mine;
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (first + i <= experts_) offsets_[first + i] = begin[i], first_[first + i] = at;
        at += tiles[i];
      }
      carry += __shfl_sync(~0u, sum, 31);
    }
  }

  __device__ int offset(int expert) const { return offsets_[expert]; }
  __device__ int total() const { return first_[experts_]; }

  struct Found {
    int expert, row_tile, token_tile;
  };

  // Token tiles vary fastest, in groups of kGroup: they share a tile of weights, and the tokens of
  // a group stay in the L2 cache while the weights pass by.
  template <int kN>
  __device__ Found find(int tile, int row_tiles) const {
    constexpr int kGroup = 8;
    const int expert = expert_of(tile);
    const int token_tiles = (offsets_[expert + 1] - offsets_[expert] + kN - 1) / kN;
    const int within = tile - first_[expert];
    const int group = within / (row_tiles * kGroup);
    const int in_group = within - group * row_tiles * kGroup;
    const int width = min(kGroup, token_tiles - group * kGroup);
    return {expert, in_group / width, group * kGroup + in_group % width};
  }

  // A contiguous share of the tiles, one after the other; the token tiles of a tile of weights
  // follow each other. For kernels that stream the weights once.
  template <int kN>
  class Walk {
   public:
    __device__ Walk(const TileTable& table, int row_tiles) : table_(table), row_tiles_(row_tiles) {
      const int64_t total = table.total();
      const int begin = static_cast<int>(total * blockIdx.x / gridDim.x);
      left_ = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x) - begin;
      if (left_ == 0) return;
      expert = table.expert_of(begin);
      enter();
      row_tile = (begin - table.first_[expert]) / token_tiles_;
      token_tile_ = (begin - table.first_[expert]) % token_tiles_;
    }
    __device__ bool done() const { return left_ == 0; }
    __device__ void next() {
      if (--left_ == 0 || ++token_tile_ < token_tiles_) return;
      token_tile_ = 0;
      if (++row_tile < row_tiles_) return;
      row_tile = 0;
      do {
        ++expert;
      } while (table_.first_[expert + 1] == table_.first_[expert]);
      enter();
    }
    __device__ int begin() const { return begin_ + token_tile_ * kN; }
    __device__ int tokens() const { return min(kN, end_ - begin()); }

    int expert = 0, row_tile = 0;

   private:
    __device__ void enter() {
      begin_ = table_.offsets_[expert];
      end_ = table_.offsets_[expert + 1];
      token_tiles_ = (end_ - begin_ + kN - 1) / kN;
    }

    const TileTable& table_;
    int row_tiles_, left_ = 0, begin_ = 0, end_ = 0, token_tile_ = 0, token_tiles_ = 1;
  };

 private:
  // The expert that a tile belongs to: first_[expert] <= tile < first_[expert + 1].
  __device__ int expert_of(int tile) const {
    int low = 0, high = experts_;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_[middle] <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  int* offsets_;
  int* first_;
  int experts_;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_TILES_CUH_
