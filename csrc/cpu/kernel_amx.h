// The tile kernels' Multiply on eight tile registers: 0-3 hold 32 x 32 products, 4-5 two tiles of
// rows, 6-7 two tiles of weights. Tiles provides the instructions: AMX, or a model of them in the
// tests.
#ifndef JAXMOE_CSRC_CPU_KERNEL_AMX_H_
#define JAXMOE_CSRC_CPU_KERNEL_AMX_H_

#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

template <class Tiles>
struct TileMultiply {
  static constexpr int kMinRows = 5;        // fewer are faster in f32
  static constexpr int kMaxStreamRows = 0;  // tiles are whole
  static constexpr int kTileBytes = TileRows::kTileRows * TileRows::kRowBytes;
  static constexpr int kProductStride = kPanelLanes * 4;  // bytes

  template <Format kFormat>
  static void stream(const uint8_t*, int64_t, const TileRows&, int, float*) {}

  static void run(const uint8_t* b, int k_blocks, const TileRows& a, int64_t first_block, int rows,
                  float* c, bool first) {
    for (int row = 0; row < rows; row += 2 * TileRows::kTileRows) {
      const uint8_t* upper = a.at(row, first_block * TileRows::kTileK);
      float* products = c + row * kPanelLanes;
      if (row + TileRows::kTileRows < rows) {
        const uint8_t* lower = a.at(row + TileRows::kTileRows, first_block * TileRows::kTileK);
        two_tiles(b, k_blocks, upper, lower, a.planes, a.plane_stride(), products, first);
      } else {
        one_tile(b, k_blocks, upper, a.planes, a.plane_stride(), products, first);
      }
    }
  }

 private:
  static void two_tiles(const uint8_t* b, int k_blocks, const uint8_t* upper, const uint8_t* lower,
                        int planes, int64_t plane_stride, float* c, bool first) {
    float* c_lower = c + TileRows::kTileRows * kPanelLanes;
    if (first) {
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      Tiles::template zero<2>();
      Tiles::template zero<3>();
    } else {
      Tiles::template load<0>(c, kProductStride);
      Tiles::template load<1>(c + 16, kProductStride);
      Tiles::template load<2>(c_lower, kProductStride);
      Tiles::template load<3>(c_lower + 16, kProductStride);
    }
    for (int plane = 0; plane < planes; ++plane) {
      for (int block = 0; block < k_blocks; ++block) {
        const uint8_t* weights = b + block * 2 * kWeightTileBytes;
        const int64_t offset = plane * plane_stride + block * kTileBytes;
        Tiles::template load<6>(weights, 64);
        Tiles::template load<4>(upper + offset, 64);
        Tiles::template multiply<0, 4, 6>();
        Tiles::template load<7>(weights + kWeightTileBytes, 64);
        Tiles::template multiply<1, 4, 7>();
        Tiles::template load<5>(lower + offset, 64);
        Tiles::template multiply<2, 5, 6>();
        Tiles::template multiply<3, 5, 7>();
      }
    }
    Tiles::template store<0>(c, kProductStride);
    Tiles::template store<1>(c + 16, kProductStride);
    Tiles::template store<2>(c_lower, kProductStride);
    Tiles::template store<3>(c_lower + 16, kProductStride);
  }

  static void one_tile(const uint8_t* b, int k_blocks, const uint8_t* rows, int planes,
                       int64_t plane_stride, float* c, bool first) {
    if (first) {
      Tiles::template zero<0>();
      Tiles::template zero<1>();
    } else {
      Tiles::template load<0>(c, kProductStride);
      Tiles::template load<1>(c + 16, kProductStride);
    }
    for (int plane = 0; plane < planes; ++plane) {
      for (int block = 0; block < k_blocks; ++block) {
        const uint8_t* weights = b + block * 2 * kWeightTileBytes;
        Tiles::template load<4>(rows + plane * plane_stride + block * kTileBytes, 64);
        Tiles::template load<6>(weights, 64);
        Tiles::template multiply<0, 4, 6>();
        Tiles::template load<7>(weights + kWeightTileBytes, 64);
        Tiles::template multiply<1, 4, 7>();
      }
    }
    Tiles::template store<0>(c, kProductStride);
    Tiles::template store<1>(c + 16, kProductStride);
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
