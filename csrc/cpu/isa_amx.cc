// cpu_amx: the tile kernels with TDPBF16PS. Tiles 0-3 hold 32 x 32 products, 4-5 two row tiles, 6-7
// two weight tiles.
#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

struct Tdpbf16ps {
  static constexpr int kMinRows = 5;
  static constexpr int kRowStride = kPanelLanes * 4;

  static void enter() {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    // Not _tile_loadconfig: gcc 12 gives it only eight bytes of the operand and drops the other
    // stores.
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void leave() { _tile_release(); }

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
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c, kRowStride);
      _tile_loadd(1, c + 16, kRowStride);
      _tile_loadd(2, c_lower, kRowStride);
      _tile_loadd(3, c_lower + 16, kRowStride);
    }
    for (int plane = 0; plane < planes; ++plane) {
      for (int block = 0; block < k_blocks; ++block) {
        const uint8_t* weights = b + block * 2 * kWeightTileBytes;
        const int64_t offset = plane * plane_stride + block * TileRows::kTileBytes;
        _tile_loadd(6, weights, 64);
        _tile_loadd(4, upper + offset, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + kWeightTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower + offset, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, kRowStride);
    _tile_stored(1, c + 16, kRowStride);
    _tile_stored(2, c_lower, kRowStride);
    _tile_stored(3, c_lower + 16, kRowStride);
  }

  static void one_tile(const uint8_t* b, int k_blocks, const uint8_t* rows, int planes,
                       int64_t plane_stride, float* c, bool first) {
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
    } else {
      _tile_loadd(0, c, kRowStride);
      _tile_loadd(1, c + 16, kRowStride);
    }
    for (int plane = 0; plane < planes; ++plane) {
      for (int block = 0; block < k_blocks; ++block) {
        const uint8_t* weights = b + block * 2 * kWeightTileBytes;
        _tile_loadd(4, rows + plane * plane_stride + block * TileRows::kTileBytes, 64);
        _tile_loadd(6, weights, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + kWeightTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_stored(0, c, kRowStride);
    _tile_stored(1, c + 16, kRowStride);
  }
};

}  // namespace

void fill_amx(Kernels& table) {
  fill_tiles<Tdpbf16ps>(table);
  table.enter = &Tdpbf16ps::enter;
  table.leave = &Tdpbf16ps::leave;
}

}  // namespace jaxmoe::cpu
