// cpu_avx512_bf16: the tile kernels with VDPBF16PS, which multiplies sixteen lanes of bf16 pairs.
//
// Streaming reads the panel as kernel_f32.h does, with a pair of codes per lookup and per product:
// e2m1 is bf16 without its scale, a block is summed unscaled and joins the accumulator by one FMA.
// With more rows the first pass over a chunk of decoded weights decodes the next chunk, eight k at
// a time, on the pipes that products leave free.
#include <algorithm>
#include <utility>

#include "cpu/kernel_tiles.h"

namespace jaxmoe::cpu {
namespace {

struct Vdpbf16ps {
  using Half = NoHalf;
  static constexpr int kMaxRows = 8;         // of a pass: 8 x 2 accumulators
  static constexpr int kMaxStreamRows = 16;  // measured crossover with the decoded weights

  template <Format kFormat>
  static void stream(const uint8_t* panel, int64_t superblocks, const TileRows& a, int rows,
                     float* c, float*) {
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
    for_passes(rows, [&](int begin, int count) {
      kStream[count](panel, superblocks, a, begin, c + begin * kPanelLanes);
    });
  }

  template <class Decoder>
  static void run(const Decoder& decoder, uint8_t* tiles, int64_t superblocks, const TileRows& a,
                  int rows, float* c) {
    // Few rows: a smaller chunk leaves L1 to them. Many: a larger one saves trips of c.
    const int step = rows <= 32 ? 2 : kMaxChunk;
    uint8_t* decoded = tiles;
    uint8_t* other = tiles + step * kDecodedBytes;
    const auto count_at = [&](int64_t first) {
      return static_cast<int>(std::min<int64_t>(step, superblocks - first));
    };
    decoder.superblocks(0, count_at(0), decoded);
    for (int64_t first = 0; first < superblocks; first += step) {
      const int64_t next = first + step;
      const int groups = next < superblocks ? count_at(next) * Decoder::kGroups : 0;
      const auto decode_next = [&](int group) JAXMOE_LAMBDA {
        if (group < groups) decoder.group(next, group, other);
      };
      multiply(decoded, count_at(first) * 2, a, first * 2, rows, c, first == 0, decode_next);
      std::swap(decoded, other);
    }
  }

 private:
  template <class DecodeNext>
  static void multiply(const uint8_t* b, int k_blocks, const TileRows& a, int64_t first_block,
                       int rows, float* c, bool first, const DecodeNext& decode_next) {
    for_passes(rows, [&](int begin, int count) {
      const uint8_t* x = a.at(begin, first_block * TileRows::kTileK);
      float* sums = c + begin * kPanelLanes;
      if (begin == 0) {
        pass_of(count, b, k_blocks, x, a, sums, first, decode_next);
      } else {
        pass_of(count, b, k_blocks, x, a, sums, first, Nothing{});
      }
    });
  }

  template <class DecodeNext>
  static JAXMOE_INLINE void pass_of(int rows, const uint8_t* b, int k_blocks, const uint8_t* x,
                                    const TileRows& a, float* c, bool first,
                                    const DecodeNext& decode_next) {
    using Function = void (*)(const uint8_t*, int, const TileRows&, const uint8_t*, float*, bool,
                              const DecodeNext&);
    static constexpr Function kPass[kMaxRows + 1] = {nullptr,
                                                     &pass<1, DecodeNext>,
                                                     &pass<2, DecodeNext>,
                                                     &pass<3, DecodeNext>,
                                                     &pass<4, DecodeNext>,
                                                     &pass<5, DecodeNext>,
                                                     &pass<6, DecodeNext>,
                                                     &pass<7, DecodeNext>,
                                                     &pass<8, DecodeNext>};
    kPass[rows](b, k_blocks, a, x, c, first, decode_next);
  }

  // Calls visit(begin, count) for passes of nearly equal size.
  template <class Visit>
  static JAXMOE_INLINE void for_passes(int rows, Visit visit) {
    const int passes = (rows + kMaxRows - 1) / kMaxRows;
    for (int p = 0; p < passes; ++p) {
      const int begin = rows * p / passes, end = rows * (p + 1) / passes;
      visit(begin, end - begin);
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
    const uint8_t* x0 = a.at(first_row, 0);
    __m512 sums[2][kRows] = {};
    for (int64_t s = 0; s < superblocks; ++s, panel += kBytes) {
      prefetch_ahead<kBytes>(panel);
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

  struct Nothing {
    JAXMOE_INLINE void operator()(int) const {}
  };

  template <int kRows, class DecodeNext>
  static void pass(const uint8_t* b, int k_blocks, const TileRows& a, const uint8_t* a0, float* c,
                   bool first, const DecodeNext& decode_next) {
    __m512 sums[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelLanes);
      sums[r][1] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanelLanes + 16);
    }
    for (int plane = 0; plane < a.planes; ++plane) {
      for (int block = 0; block < k_blocks; ++block) {
        const uint8_t* weights = b + block * 2 * kWeightTileBytes;
        const uint8_t* x = a0 + plane * a.plane_stride() + block * a.block_stride();
        for (int group = 0; group < 4; ++group) {
          if (plane == 0) decode_next(block * 4 + group);
          for (int pair = group * 4; pair < group * 4 + 4; ++pair) {
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
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(c + r * kPanelLanes, sums[r][0]);
      _mm512_storeu_ps(c + r * kPanelLanes + 16, sums[r][1]);
    }
  }
};

constexpr Kernels make_table() {
  Kernels table;
  fill_tiles<Vdpbf16ps>(table);
  table.stream_tiles[static_cast<int>(Format::kNvfp4)] = &Vdpbf16ps::stream<Format::kNvfp4>;
  table.stream_tiles[static_cast<int>(Format::kMxfp4)] = &Vdpbf16ps::stream<Format::kMxfp4>;
  table.max_stream_rows = Vdpbf16ps::kMaxStreamRows;
  return table;
}

}  // namespace

constexpr Kernels kAvx512Bf16Kernels = make_table();

}  // namespace jaxmoe::cpu
