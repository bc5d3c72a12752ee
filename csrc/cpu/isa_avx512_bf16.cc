// cpu_avx512_bf16: the tile kernels with VDPBF16PS, which multiplies sixteen lanes of bf16 pairs.
//
// Few rows stream the panel as kernel_f32.h does, with a pair of codes per lookup and per product:
// e2m1 is bf16 without its scale, a block is summed unscaled and joins the accumulator by one FMA.
#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

struct Vdpbf16ps {
  using Half = NoHalf;
  static constexpr int kMinRows = 1;
  static constexpr int kMaxInt8Rows = kAnyRows;
  static constexpr int kMaxRows = 8;  // of a pass: 8 x 2 accumulators, half a tile
  static constexpr int kMaxStreamRows =
      16;  // two passes; measured crossover with the decoded tiles

  template <Format kFormat>
  static void stream(const uint8_t* panel, int64_t superblocks, const TileRows& a, int rows,
                     float* c) {
    using StreamFunction = void (*)(const uint8_t*, int64_t, const TileRows&, int, float*);
    static constexpr StreamFunction kStream[kMaxRows + 1] = {nullptr,
                                                             &stream_pass<kFormat, 1>,
                                                             &stream_pass<kFormat, 2>,
                                                             &stream_pass<kFormat, 3>,
                                                             &stream_pass<kFormat, 4>,
                                                             &stream_pass<kFormat, 5>,
                                                             &stream_pass<kFormat, 6>,
                                                             &stream_pass<kFormat, 7>,
                                                             &stream_pass<kFormat, 8>};
    const int passes = (rows + kMaxRows - 1) / kMaxRows;
    for (int p = 0; p < passes; ++p) {
      const int begin = rows * p / passes, end = rows * (p + 1) / passes;
      kStream[end - begin](panel, superblocks, a, begin, c + begin * kPanelLanes);
    }
  }

  template <class Decode>
  static void run(Decode decode, const uint8_t* tiles, int64_t superblocks, const TileRows& a,
                  int rows, float* c) {
    // Few rows: a smaller chunk leaves L1 to them. Many: a larger one saves trips of c.
    for_chunks(superblocks, rows <= 32 ? 2 : kMaxChunk, [&](int64_t first, int count) {
      decode(first, count);
      multiply(tiles, count * 2, a, first * 2, rows, c, first == 0);
    });
  }

 private:
  static void multiply(const uint8_t* b, int k_blocks, const TileRows& a, int64_t first_block,
                       int rows, float* c, bool first) {
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

  static JAXMOE_INLINE __m512bh broadcast_pair(const uint8_t* pair) {
    int32_t bits;
    std::memcpy(&bits, pair, sizeof(bits));
    return (__m512bh)_mm512_set1_epi32(bits);
  }

  template <Format kFormat, int kRows>
  static void stream_pass(const uint8_t* panel, int64_t superblocks, const TileRows& a,
                          int first_row, float* c) {
    constexpr int kBlock = block_size(kFormat);
    constexpr int kBlocks = kSuperblockK / kBlock;
    constexpr int kGroups = kBlock / 8;
    constexpr int kBytes = superblock_bytes(kFormat);
    // A single row would wait for its own sums.
    constexpr int kChains = kRows == 1 ? 2 : 1;
    const uint8_t* x0 = a.data + first_row * TileRows::kRowBytes;
    __m512 sums[2][kRows] = {};
    for (int64_t s = 0; s < superblocks; ++s, panel += kBytes) {
      for (int i = 0; i < kBytes; i += 64) {
        __builtin_prefetch(panel + PanelF32<Isa, kFormat>::kPrefetchBytes + i);
      }
      const uint8_t* codes = panel + scale_bytes(kFormat);
      for (int b = 0; b < kBlocks; ++b) {
        const int64_t k0 = s * kSuperblockK + b * kBlock;
        const uint8_t* x =
            x0 + k0 / TileRows::kTileK * a.block_stride() + k0 % TileRows::kTileK * 2;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m512 partial[kRows][kChains] = {};
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g) {
            const __m512i dwords = _mm512_loadu_si512(codes + ((b * kGroups + g) * 2 + half) * 64);
            unroll(std::make_integer_sequence<int, 4>{}, [&](auto j) JAXMOE_LAMBDA {
              const __m512bh pairs = (__m512bh)_mm512_permutexvar_epi16(
                  j ? _mm512_srli_epi32(dwords, 4 * j) : dwords, bf16_values());
              for (int plane = 0; plane < a.planes; ++plane) {
                const uint8_t* pair = x + plane * a.plane_stride() + (g * 4 + j) * 4;
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                  __m512& sum = partial[r][j % kChains];
                  sum =
                      _mm512_dpbf16_ps(sum, broadcast_pair(pair + r * TileRows::kRowBytes), pairs);
                }
              }
            });
          }
          const BlockScale<Isa, kFormat> scale(panel + b * kPanelLanes + half * 16);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            __m512 block = partial[r][0];
            if constexpr (kChains == 2) block = _mm512_add_ps(block, partial[r][1]);
            sums[half][r] = scale.accumulate(block, sums[half][r]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(c + r * kPanelLanes, sums[0][r]);
      _mm512_storeu_ps(c + r * kPanelLanes + 16, sums[1][r]);
    }
  }

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
        const uint8_t* x =
            a + plane * plane_stride + block * TileRows::kTileRows * TileRows::kRowBytes;
        for (int pair = 0; pair < TileRows::kTileK / 2; ++pair) {
          const __m512bh low = (__m512bh)_mm512_loadu_si512(weights + pair * 64);
          const __m512bh high =
              (__m512bh)_mm512_loadu_si512(weights + kWeightTileBytes + pair * 64);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m512bh both = broadcast_pair(x + r * TileRows::kRowBytes + pair * 4);
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
