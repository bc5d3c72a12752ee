// cpu_avx512_bf16: the tile kernels with VDPBF16PS, which multiplies sixteen lanes of bf16 pairs.
#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

struct Vdpbf16ps {
  static constexpr int kMinRows = 5;
  static constexpr int kMaxRows = 8;  // 8 x 2 accumulators, half a tile

  static void run(const uint8_t* b, int k_blocks, const TileRows& a, int64_t first_block, int rows,
                  float* c, bool first) {
    static constexpr Function kPass[kMaxRows + 1] = {
        nullptr, &pass<1>, &pass<2>, &pass<3>, &pass<4>, &pass<5>, &pass<6>, &pass<7>, &pass<8>};
    for (int tile = 0; tile < rows; tile += TileRows::kTileRows) {
      const int left = rows - tile;
      const int valid = left < TileRows::kTileRows ? left : TileRows::kTileRows;
      const int passes = (valid + kMaxRows - 1) / kMaxRows;
      for (int p = 0; p < passes; ++p) {
        const int begin = valid * p / passes, end = valid * (p + 1) / passes;
        const uint8_t* rows_begin = a.at(tile + begin, first_block * TileRows::kTileK);
        kPass[end - begin](b, k_blocks, rows_begin, a.planes, a.plane_stride(),
                           c + (tile + begin) * kPanelLanes, first);
      }
    }
  }

 private:
  using Function = void (*)(const uint8_t*, int, const uint8_t*, int, int64_t, float*, bool);

  template <int kRows>
  static void pass(const uint8_t* b, int k_blocks, const uint8_t* a, int planes,
                   int64_t plane_stride, float* c, bool first) {
    __m512 sums[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelLanes);
      sums[r][1] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelLanes + 16);
    }
    for (int plane = 0; plane < planes; ++plane) {
      for (int block = 0; block < k_blocks; ++block) {
        const uint8_t* weights = b + block * 2 * kWeightTileBytes;
        const uint8_t* x = a + plane * plane_stride + block * TileRows::kTileBytes;
        for (int pair = 0; pair < TileRows::kTileK / 2; ++pair) {
          const __m512bh low = (__m512bh)_mm512_loadu_si512(weights + pair * 64);
          const __m512bh high =
              (__m512bh)_mm512_loadu_si512(weights + kWeightTileBytes + pair * 64);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            int32_t two;
            std::memcpy(&two, x + r * 64 + pair * 4, sizeof(two));
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, high);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(c + r * kPanelLanes, sums[r][0]);
      _mm512_storeu_ps(c + r * kPanelLanes + 16, sums[r][1]);
    }
  }
};

}  // namespace

void fill_avx512_bf16(Kernels& table) { fill_tiles<Vdpbf16ps>(table); }

}  // namespace jaxmoe::cpu
