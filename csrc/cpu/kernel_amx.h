// The tile kernels' Multiply on eight tile registers: up to 48 rows of products stay in them while
// the panel is read, more rest in c between chunks. The next chunk of weights is decoded between
// the passes over this one. Tiles provides the instructions: AMX and the product of f16 vectors, or
// a model of them in the tests.
#ifndef JAXMOE_CSRC_CPU_KERNEL_AMX_H_
#define JAXMOE_CSRC_CPU_KERNEL_AMX_H_

#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

template <class Tiles>
struct TileMultiply {
  using Half = Tiles;
  static constexpr int kMaxInt8Rows = 8;  // of an expert; more are faster in the tiles
  static constexpr int kTileBytes = TileRows::kTileRows * TileRows::kRowBytes;
  static constexpr int kProductStride = kPanelLanes * 4;               // bytes
  static constexpr int kProducts = TileRows::kTileRows * kPanelLanes;  // of a tile of rows

  template <class Decoder>
  static void run(const Decoder& decoder, uint8_t* tiles, int64_t superblocks, const TileRows& a,
                  int rows, float* c) {
    switch ((rows + TileRows::kTileRows - 1) / TileRows::kTileRows) {
      case 1:
        return resident<1>(decoder, tiles, superblocks, a, c);
      case 2:
        return resident<2>(decoder, tiles, superblocks, a, c);
      case 3:
        return resident<3>(decoder, tiles, superblocks, a, c);
    }
    // Measured: with 96 rows or fewer the trips of c cost less than a larger chunk in L1.
    const int step = rows <= 96 ? 2 : kMaxChunk;
    const int passes = (rows + kPassRows - 1) / kPassRows;
    Chunks<Decoder> chunks(decoder, tiles, superblocks, step);
    for (int64_t first = 0; first < superblocks; first += step) {
      const uint8_t* weights = chunks.take();
      for (int i = 0; i < passes; ++i) {
        chunks.decode_next(i, passes);
        const int row = i * kPassRows;
        const uint8_t* x = a.at(row, first * kSuperblockK);
        if (row + TileRows::kTileRows < rows) {
          pass<2>(weights, chunks.count() * 2, x, a, c + row * kPanelLanes, first == 0);
        } else {
          pass<1>(weights, chunks.count() * 2, x, a, c + row * kPanelLanes, first == 0);
        }
      }
    }
  }

 private:
  using Two = std::make_integer_sequence<int, 2>;
  template <int kRowTiles>
  using RowTiles = std::make_integer_sequence<int, kRowTiles>;

  static constexpr int kPassRows = 2 * TileRows::kTileRows;

  // Chunks of decoded superblocks, one ahead: products of a chunk wait neither for the stores of
  // its weights, nor do the vector instructions that decode the next one wait for the products.
  template <class Decoder>
  class Chunks {
   public:
    JAXMOE_INLINE Chunks(const Decoder& decoder, uint8_t* tiles, int64_t superblocks, int step)
        : decoder_(decoder),
          tiles_{tiles, tiles + step * kDecodedBytes},
          left_(superblocks),
          step_(step) {
      next_count_ = count_of(left_);
      decode_next(0, 1);
    }

    // The chunk that was decoded last.
    JAXMOE_INLINE const uint8_t* take() {
      count_ = next_count_;
      first_ += count_;
      left_ -= count_;
      next_count_ = count_of(left_);
      done_ = 0;
      uint8_t* decoded = tiles_[0];
      tiles_[0] = tiles_[1];
      tiles_[1] = decoded;
      return decoded;
    }
    JAXMOE_INLINE int count() const { return count_; }

    // Part `part` of `parts` of the one after it.
    JAXMOE_INLINE void decode_next(int part, int parts) {
      const int until = next_count_ * (part + 1) / parts;
      decoder_.superblocks(first_ + done_, until - done_, tiles_[0] + done_ * kDecodedBytes);
      done_ = until;
    }

   private:
    JAXMOE_INLINE int count_of(int64_t left) const {
      return static_cast<int>(left < step_ ? left : step_);
    }

    Decoder decoder_;
    uint8_t* tiles_[2];  // of the next chunk, and of this one
    int64_t first_ = 0;  // superblock of the next chunk
    int64_t left_;       // superblocks from there on
    int step_, count_ = 0, next_count_ = 0, done_ = 0;
  };

  // All rows at once, in up to three tiles: the products stay in registers.
  template <int kRowTiles, class Decoder>
  static void resident(const Decoder& decoder, uint8_t* tiles, int64_t superblocks,
                       const TileRows& a, float* c) {
    zero<kRowTiles>();
    Chunks<Decoder> chunks(decoder, tiles, superblocks, 1);
    for (int64_t s = 0; s < superblocks; ++s) {
      const uint8_t* weights = chunks.take();
      chunks.decode_next(0, 1);
      multiply<kRowTiles>(weights, 2, a.at(0, s * kSuperblockK), a);
    }
    store<kRowTiles>(c);
  }

  template <int kRowTiles>
  static void pass(const uint8_t* weights, int k_blocks, const uint8_t* x, const TileRows& a,
                   float* c, bool first) {
    if (first) {
      zero<kRowTiles>();
    } else {
      load<kRowTiles>(c);
    }
    multiply<kRowTiles>(weights, k_blocks, x, a);
    store<kRowTiles>(c);
  }

  template <int kRowTiles>
  static JAXMOE_INLINE void multiply(const uint8_t* weights, int k_blocks, const uint8_t* x,
                                     const TileRows& a) {
    const int64_t next_tile = a.planes * a.plane_stride();
    for (int plane = 0; plane < a.planes; ++plane, x += a.plane_stride()) {
      for (int block = 0; block < k_blocks; ++block) {
        step<kRowTiles>(weights + block * 2 * kWeightTileBytes, x + block * kTileBytes, next_tile);
      }
    }
  }

  // 32 k. Two tiles of rows or fewer leave two registers to each operand, three leave one.
  template <int kRowTiles>
  static JAXMOE_INLINE void step(const uint8_t* weights, const uint8_t* x, int64_t next_tile) {
    if constexpr (kRowTiles == 3) {
      unroll(Two{}, [&](auto half) JAXMOE_LAMBDA {
        Tiles::template load<7>(weights + half * kWeightTileBytes, 64);
        unroll(RowTiles<3>{}, [&](auto i) JAXMOE_LAMBDA {
          Tiles::template load<6>(x + i * next_tile, 64);
          Tiles::template multiply<2 * i + half, 6, 7>();
        });
      });
    } else {
      Tiles::template load<6>(weights, 64);
      Tiles::template load<4>(x, 64);
      Tiles::template multiply<0, 4, 6>();
      Tiles::template load<7>(weights + kWeightTileBytes, 64);
      Tiles::template multiply<1, 4, 7>();
      if constexpr (kRowTiles == 2) {
        Tiles::template load<5>(x + next_tile, 64);
        Tiles::template multiply<2, 5, 6>();
        Tiles::template multiply<3, 5, 7>();
      }
    }
  }

  // Register 2 i + half holds the products of row tile i and of half the lanes.
  template <int kRowTiles>
  static JAXMOE_INLINE void zero() {
    unroll(RowTiles<2 * kRowTiles>{}, [](auto i) JAXMOE_LAMBDA { Tiles::template zero<i>(); });
  }
  template <int kRowTiles>
  static JAXMOE_INLINE void load(const float* c) {
    unroll(RowTiles<2 * kRowTiles>{}, [&](auto i) JAXMOE_LAMBDA {
      Tiles::template load<i>(c + i / 2 * kProducts + i % 2 * 16, kProductStride);
    });
  }
  template <int kRowTiles>
  static JAXMOE_INLINE void store(float* c) {
    unroll(RowTiles<2 * kRowTiles>{}, [&](auto i) JAXMOE_LAMBDA {
      Tiles::template store<i>(c + i / 2 * kProducts + i % 2 * 16, kProductStride);
    });
  }
};

template <class Tiles>
constexpr void fill_amx_kernels(Kernels& table) {
  fill_tiles<TileMultiply<Tiles>>(table);
  table.whole_tiles = true;
  table.max_int8_rows = TileMultiply<Tiles>::kMaxInt8Rows;
  table.enter = &Tiles::configure;
  table.leave = &Tiles::release;
}

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_AMX_H_
