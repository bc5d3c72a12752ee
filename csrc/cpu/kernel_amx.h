// The tile kernels' Multiply on eight tile registers: up to 48 rows of products stay in them while
// the panel is read, more rest in c between chunks. Tiles provides the instructions: AMX and the
// product of f16 vectors, or a model of them in the tests.
#ifndef JAXMOE_CSRC_CPU_KERNEL_AMX_H_
#define JAXMOE_CSRC_CPU_KERNEL_AMX_H_

#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

template <class Tiles>
struct TileMultiply {
  using Half = Tiles;
  static constexpr int kMinRows = 5;        // fewer are faster otherwise
  static constexpr int kMaxInt8Rows = 8;    // likewise, of compute="w4a8"
  static constexpr int kMaxStreamRows = 0;  // tiles are whole
  static constexpr int kTileBytes = TileRows::kTileRows * TileRows::kRowBytes;
  static constexpr int kProductStride = kPanelLanes * 4;               // bytes
  static constexpr int kProducts = TileRows::kTileRows * kPanelLanes;  // of a tile of rows

  template <Format kFormat>
  static void stream(const uint8_t*, int64_t, const TileRows&, int, float*) {}

  template <class Decode>
  static void run(Decode decode, const uint8_t* tiles, int64_t superblocks, const TileRows& a,
                  int rows, float* c) {
    switch ((rows + TileRows::kTileRows - 1) / TileRows::kTileRows) {
      case 1:
        return resident<1>(decode, tiles, superblocks, a, c);
      case 2:
        return resident<2>(decode, tiles, superblocks, a, c);
      case 3:
        return resident<3>(decode, tiles, superblocks, a, c);
    }
    // Measured: with 96 rows or fewer the trips of c cost less than a larger chunk in L1.
    for_chunks(superblocks, rows <= 96 ? 2 : kMaxChunk, [&](int64_t first, int count) {
      decode(first, count);
      for (int row = 0; row < rows; row += 2 * TileRows::kTileRows) {
        const uint8_t* x = a.at(row, first * kSuperblockK);
        if (row + TileRows::kTileRows < rows) {
          pass<2>(tiles, count * 2, x, a, c + row * kPanelLanes, first == 0);
        } else {
          pass<1>(tiles, count * 2, x, a, c + row * kPanelLanes, first == 0);
        }
      }
    });
  }

 private:
  using Two = std::make_integer_sequence<int, 2>;
  template <int kRowTiles>
  using RowTiles = std::make_integer_sequence<int, kRowTiles>;

  // All rows at once, in up to three tiles: the products stay in registers.
  template <int kRowTiles, class Decode>
  static void resident(Decode decode, const uint8_t* tiles, int64_t superblocks, const TileRows& a,
                       float* c) {
    zero<kRowTiles>();
    for_chunks(superblocks, 2, [&](int64_t first, int count) {
      decode(first, count);
      multiply<kRowTiles>(tiles, count * 2, a.at(0, first * kSuperblockK), a);
    });
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
void fill_amx_kernels(Kernels& table) {
  fill_tiles<TileMultiply<Tiles>>(table);
  table.enter = &Tiles::configure;
  table.leave = &Tiles::release;
}

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_AMX_H_
